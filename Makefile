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

.PHONY: help demo quick test nightly bench lint types package sanitize clean

help:
	@echo "make demo      train a small model with token-level DPO and write a report to $(OUT)/"
	@echo "               (again: make demo ARGS=--overwrite)"
	@echo "make quick     the tests of kernels, losses and messages that take seconds"
	@echo "make test      the tests that have to pass before a merge;  make nightly: every test, and more fuzzing"
	@echo "               (of one layer: make test TESTS=tests/head)"
	@echo "make bench     compare with eager torch, torch.compile and installed peers"
	@echo "make lint      ruff;  make types: mypy;  make sanitize: C++ core under sanitizers"
	@echo "make package   build the sdist and the wheel, install them in a fresh environment and use them"
	@echo "ARGS='...' is passed on to demo, the tests and bench"

# torch comes first and pinned, so that nothing else pulls in another build of it.
$(READY): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[demo,test,trl]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/qkernels demo --out $(OUT) $(ARGS)

quick: $(READY)
	$(BIN)/pytest -q -m "quick and not nightly" $(TESTS) $(ARGS)

# Each process takes the next file, so that what the tests of a file share is made once.
test: $(READY)
	$(BIN)/pytest -q -n $(JOBS) --maxprocesses 8 --dist loadfile -m "not nightly" $(TESTS) $(ARGS)

nightly: $(READY)
	$(BIN)/pytest -q -n $(JOBS) --maxprocesses 8 --dist loadfile $(TESTS) $(ARGS)
	$(BIN)/pytest -q tests/fuzz --fuzz-cases 5000 $(ARGS)

bench: $(READY)
	$(BIN)/pytest bench/ --benchmark-only $(ARGS)

lint: $(READY)
	$(PIP) ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(PIP) mypy
	$(BIN)/mypy

package: $(READY)
	$(BIN)/python .ci/check_package.py

sanitize: $(READY)
	for kind in address,undefined thread; do \
	  PATH=$(abspath $(BIN)):$$PATH cmake -S csrc -B build/$$kind -G Ninja -DQK_TESTS=ON -DQK_SANITIZE=$$kind \
	    -DCMAKE_BUILD_TYPE=None && \
	  PATH=$(abspath $(BIN)):$$PATH cmake --build build/$$kind && build/$$kind/test_core && build/$$kind/test_cuda_walk || exit 1; \
	done

clean:
	rm -rf $(VENV) build demo_output *.egg-info qkernels/_C*.so qkernels/_build.json
