"""`python -m bench.gpu_check` rehearsed on the CPU, and what it does when a machine, a tool or a peer lets it down.

The order of steps, budgets and records are tested with a process that prints what a step prints and computes nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from qkernels import backends

gpu_check = pytest.importorskip("bench.gpu_check.__main__", reason="bench/ lies in the source tree only")
pytest.importorskip("qkernels._C", reason="the compiled extension is missing")

from bench.gpu_check import commands, machine, record, schedule, step, wheels, worker  # noqa: E402
from bench.gpu_check.steps import correctness, peers, profiles, tuning  # noqa: E402

CPU = torch.device("cpu")
# Not the peers, whose imports take longer than all the rest, nor pytest within pytest: they are in the nightly one.
FIRST = ("build", "runnable", "values", "sanitizer", "waits", "graph", "products")
REST = (
    "stats", "backward", "loss", "linear", "launch", "linear_rows", "wheels", "profiles", "backend_choice", "splits",
    "triton_threads", "chunk_bytes", "cuda_threads", "tests",
)  # fmt: skip


def read(folder: Path) -> dict:
    return json.loads((folder / record.NAME).read_text())


def test_a_rehearsal_in_two_calls(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "age", lambda: 0.0)  # the budget counts from the start of the process: these tests'
    first, both = tmp_path / "first", tmp_path / "both"
    on_cpu = ["--device", "cpu", "--budget", "100000"]
    assert gpu_check.main([*on_cpu, "--steps", *FIRST, "--out", str(first)]) == 0
    assert set(read(first)["steps"]) == set(FIRST)
    assert gpu_check.main([*on_cpu, "--steps", *FIRST, *REST, "--continue", str(first), "--out", str(both)]) == 0
    printed = capsys.readouterr().out
    found = read(both)
    assert set(found["steps"]) == {*FIRST, *REST} and len(found["calls"]) == 2
    assert {outcome["state"] for outcome in found["steps"].values()} == {"ok", "missing"}
    assert found["steps"]["values"] == read(first)["steps"]["values"], "a step that is done is not run again"
    works = {entry["work"] for entry in found["results"]}
    assert {"log-probs", "log-probs and entropy", "gradient in place", "loss and gradient, cached reference"} <= works
    assert {"plan pair_chunks", "plan frozen_head", "plan recompute", "loss from hidden states"} <= works
    assert "the figures mean nothing" in printed
    page = (both / record.PAGE).read_text()
    assert page.strip() in printed and "call 2" in page and "everything ran" in page
    assert all(f"- {name}: " in page for name in (*FIRST, *REST))


@pytest.mark.nightly
def test_exactly_the_two_calls_with_emulated_kernels(tmp_path):
    """As on a rented machine, with Triton's interpreter and with wheels."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "liger_kernel", "chunked_loss", "class LigerFusedLinearDPOLoss: pass\n")
    script = [sys.executable, "-m", "bench.gpu_check", "--device", "cpu", "--out", str(tmp_path / "out")]
    how = {"cwd": step.ROOT, "env": commands.environment(TRITON_INTERPRET="1"), "capture_output": True, "text": True}
    one = subprocess.run([*script, "--budget", "240"], check=False, **how)
    assert one.returncode in (0, 3), one.stdout[-5000:] + one.stderr[-5000:]
    script[-2:] = ["--continue", str(tmp_path / "out"), "--wheels", str(folder)]
    two = subprocess.run([*script, "--budget", "300"], check=False, **how)
    assert two.returncode in (0, 3), two.stdout[-5000:] + two.stderr[-5000:]
    found = read(tmp_path / "out")
    assert {"values", "core", "sanitizer", "stats", "peers", "triton_threads"} <= set(found["steps"])
    assert any("triton" in entry["contender"] for entry in found["results"])


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "rehearsal" in printed and "--continue DIR" in printed and "Exit status" in printed


# --- order, budget, records -------------------------------------------------------------------------------------------

ENTRY = {
    "work": "w", "contender": "c", "dtype": "d", "shape": "s", "unit": "GB", "floor": "copy", "peak_bytes": None,
    "logits_bytes": 8, "milliseconds": 1.5, "fastest": 1.5, "slowest": 1.5, "amount": 1.5, "floor_ratio": 1.5,
}  # fmt: skip
# A step's process: `how` says for each step what it does.
FAKE = """
import json, os, signal, sys, time
how = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    print("gpu_check begin: " + name, flush=True)
    print("gpu_check entry: " + json.dumps({**how["entry"], "work": name}), flush=True)
    what = how.get(name, "ok")
    if what == "hangs":
        print("how far it came", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.05)
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exits":
        sys.exit(7)
    print("gpu_check result: " + json.dumps({"state": what, "lines": ["a line of " + name]}), flush=True)
    if what == "failed":
        sys.exit(1)
"""


@pytest.fixture
def fake(monkeypatch):
    """Three steps of a process that computes nothing; what each does can be changed."""
    how = {"entry": ENTRY}
    steps = {name: schedule.Step(lambda bench: [], 20, 5) for name in ("a", "b", "c")}
    monkeypatch.setattr(schedule, "STEPS", steps)
    monkeypatch.setattr(
        worker, "command", lambda names, bench: [sys.executable, "-S", "-c", FAKE, json.dumps(how), *names]
    )
    monkeypatch.setattr(machine, "age", lambda: 0.0)
    monkeypatch.setattr(machine, "facts", lambda device: {"machine": "none"})
    return how


def states(folder: Path) -> dict[str, str]:
    return {name: outcome["state"] for name, outcome in read(folder)["steps"].items()}


def call(*options: str | Path) -> int:
    return gpu_check.main(["--device", "cpu", *map(str, options)])


def test_steps_that_do_not_fit_are_left_to_the_next_call(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "_PATIENCE", 1)
    schedule.STEPS["b"] = schedule.Step(lambda bench: [], 600, 60)
    monkeypatch.setattr(step.Bench, "rehearsal", False)
    assert call("--budget", 30, "--out", tmp_path) == 3
    assert states(tmp_path) == {"a": "ok", "c": "ok"}
    assert "b: left for another call" in capsys.readouterr().out
    assert call("--budget", 90, "--continue", tmp_path) == 0
    assert states(tmp_path) == {"a": "ok", "c": "ok", "b": "ok"}
    assert [entry["work"] for entry in read(tmp_path)["results"]] == ["a", "c", "b"]


@pytest.mark.parametrize("how, said", [("dies", "SIGKILL"), ("exits", "ended with 7"), ("failed", "a line of b")])
def test_a_step_that_fails_is_reported_and_the_others_run(fake, tmp_path, capsys, how, said):
    fake["b"] = how
    assert call("--out", tmp_path) == 1
    assert states(tmp_path) == {"a": "ok", "b": "failed", "c": "ok"}
    assert said in " ".join(read(tmp_path)["steps"]["b"]["lines"])
    assert len(read(tmp_path)["results"]) == 3, "what a step measured is kept however it ends"
    assert "failed: b" in capsys.readouterr().out
    fake["b"] = "ok"
    assert call("--continue", tmp_path) == 0 and states(tmp_path)["b"] == "ok"


def test_a_step_that_hangs_is_stopped(fake, tmp_path, monkeypatch):
    fake["b"] = "hangs"
    schedule.STEPS["b"] = schedule.Step(lambda bench: [], 1, 0)
    monkeypatch.setattr(gpu_check, "_PATIENCE", 1)
    assert call("--out", tmp_path) == 3
    assert states(tmp_path) == {"a": "ok", "b": "stopped", "c": "ok"}
    assert read(tmp_path)["steps"]["b"]["lines"] == ["how far it came", "stopped after 1 s"]


# A whole call in a process that can be killed, with the three fake steps.
CALL = """
import sys
from bench.gpu_check import __main__ as check, machine, schedule, worker
fake, how, *arguments = sys.argv[1:]
schedule.STEPS = {name: schedule.Step(lambda bench: [], 20, 0) for name in "abc"}
worker.command = lambda names, bench: [sys.executable, "-S", "-c", fake, how, *names]
machine.facts = lambda device: {"machine": "none"}
sys.exit(check.main(["--device", "cpu", *arguments]))
"""


def test_a_machine_that_goes_away_leaves_what_was_measured(fake, tmp_path, capsys):
    fake["b"] = "hangs"
    command = [sys.executable, "-c", CALL, FAKE, json.dumps(fake), "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=commands.environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / record.NAME).exists() or len(read(tmp_path)["results"]) < 2:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert states(tmp_path) == {"a": "ok", "b": "running"}
    assert "it did not come to its end" in (tmp_path / record.PAGE).read_text()
    # The next call does the rest first: the step in which it happened might do it again.
    fake["b"] = "ok"
    assert schedule.order(record.read(tmp_path), "abc") == ["c", "b"]
    assert call("--continue", tmp_path) == 0
    assert states(tmp_path) == {"a": "ok", "b": "ok", "c": "ok"}


def test_a_call_that_is_told_to_end_says_so(fake, tmp_path, capsys):
    fake["b"] = "hangs"

    def end() -> None:
        while not (tmp_path / record.NAME).exists() or len(read(tmp_path)["results"]) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    assert call("--out", tmp_path) == 128 + signal.SIGTERM
    assert "ended by SIGTERM" in capsys.readouterr().out and read(tmp_path)["calls"][0]["ended"] == "ended by SIGTERM"
    assert states(tmp_path) == {"a": "ok", "b": "running"}


def test_steps_end_with_the_call_that_wanted_them(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "killpg", lambda *how: ended.append(how))
    worker.end_with(os.getppid() + 1, every=60)
    assert ended == [(0, signal.SIGKILL)]


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"gpu": 1}'])
def test_a_record_that_cannot_be_continued_is_refused(fake, tmp_path, capsys, text):
    if text is not None:
        (tmp_path / record.NAME).write_text(text)
    assert call("--continue", tmp_path) == 2
    assert f"--continue {tmp_path}" in capsys.readouterr().err


def test_another_machine_or_an_earlier_record_is_refused(fake, tmp_path, capsys):
    assert call("--out", tmp_path) == 0
    assert call("--out", tmp_path) == 2
    assert "to go on with it" in capsys.readouterr().err
    document = read(tmp_path) | {"gpu": "NVIDIA H200"}
    (tmp_path / record.NAME).write_text(json.dumps(document))
    assert call("--continue", tmp_path) == 2
    assert "measured on NVIDIA H200, this is rehearsal" in capsys.readouterr().err


def test_changed_sources_are_said(fake, tmp_path, monkeypatch):
    assert call("--out", tmp_path) == 0
    monkeypatch.setattr(machine, "sources", lambda: "0123")
    assert call("--continue", tmp_path) == 0
    assert "earlier steps checked other code" in (tmp_path / record.PAGE).read_text()


@pytest.mark.parametrize("budget", ["0", "-3", "nan", "soon"])
def test_a_budget_that_is_none_is_refused(capsys, budget):
    with pytest.raises(SystemExit) as ended:
        call("--budget", budget)
    assert ended.value.code == 2 and "--budget" in capsys.readouterr().err


# --- machines ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_driver_that_is_too_old_for_torch_is_named(monkeypatch, capsys):
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert gpu_check.main(["--budget", "10"]) == 2
    assert "driver on your system is too old (found version 12020)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reason",
    [
        "the driver supports CUDA 12.2, the extension was built with CUDA 13.0",
        "looking for kernels for this device failed on the GPU: cudaErrorNoKernelImageForDevice",
    ],
)
def test_what_the_extension_cannot_run_on_fails_a_step_of_its_own(monkeypatch, reason):
    told = {"cuda": f"{reason} (compiled for sm_80)", "triton": None}
    monkeypatch.setattr(backends, "unavailable", lambda name, device, dtype: told[name])
    bench = step.Bench(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"cuda cannot run here: .*compiled for sm_80"):
        correctness.runnable(bench)


def test_a_build_for_this_gpu_is_kept_and_another_is_not(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "qkernels").mkdir()
    (tmp_path / "csrc" / "a.cu").touch()
    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    monkeypatch.setattr(correctness, "_SOURCES_OF_BUILD", tmp_path / "sources.txt")
    monkeypatch.setattr(machine, "sources", lambda: "a digest")
    assert not correctness._built_for("90"), "nothing is built"
    (tmp_path / "qkernels" / "_C.so").touch()
    (tmp_path / "qkernels" / "_build.json").write_text('{"cuda": {"architectures": ["80-real", "90"]}}')
    assert correctness._built_for("90") and correctness._built_for("80") and not correctness._built_for("100")
    os.utime(tmp_path / "csrc" / "a.cu", (time.time() + 60,) * 2)
    assert not correctness._built_for("90"), "the sources are newer"
    (tmp_path / "sources.txt").write_text("a digest")
    assert correctness._built_for("90") and not correctness._built_for("100"), "newer files of the same text"
    (tmp_path / "sources.txt").write_text("another digest")
    assert not correctness._built_for("90")


@pytest.mark.skipif("amx_instructions" in sys.modules, reason="a new process has another extension than this one")
def test_facts_come_from_a_new_process(monkeypatch):
    """Or from this one, where that fails."""
    here, anew = machine.facts(CPU), machine.facts_anew(CPU)
    assert anew.keys() == here.keys() and anew["backends"] == here["backends"]
    monkeypatch.setattr(machine, "facts", lambda device: {"of": "this process"})
    assert machine.facts_anew(CPU).keys() == here.keys()
    monkeypatch.setattr(machine.commands, "run", lambda *command, **how: ["no JSON"])
    assert machine.facts_anew(CPU) == {"of": "this process"}


@pytest.mark.parametrize("said, expected", [("Device not supported", step.Missing), ("out of bounds", RuntimeError)])
def test_a_sanitizer_that_cannot_be_used_is_missing(monkeypatch, said, expected):
    """It says so first; the program then ends with an error of its own."""
    code = f"print('========= {said}'); print('error 999'); raise SystemExit(9)"

    def run(program, *how, keep, **more):
        return commands.run(sys.executable, "-S", "-c", code, keep=keep)

    monkeypatch.setattr(correctness, "run", run)
    monkeypatch.setattr(correctness, "tool", lambda name: name)
    with pytest.raises(expected, match=said):
        correctness.sanitizer(step.Bench(torch.device("cuda", 0)))


def test_a_command_that_fails_ends_its_step():
    with pytest.raises(RuntimeError, match="ended with 3: so far"):
        commands.run(sys.executable, "-S", "-c", "print('so far'); raise SystemExit(3)")


def test_a_tool_that_is_not_there_is_no_failure(tmp_path, capsys, monkeypatch):
    with pytest.raises(step.Missing, match="not installed: no-such-tool"):
        commands.tool("no-such-tool")

    def needs_a_tool(bench: step.Bench) -> list[str]:
        raise step.Missing("not installed: ncu")

    def breaks(bench: step.Bench) -> list[str]:
        raise ValueError("a number")

    monkeypatch.setattr(schedule, "PARTS", {"one": needs_a_tool, "two": breaks, "three": needs_a_tool})
    assert worker.work(["one", "two", "three"], step.Bench(CPU)) == 1
    told = [
        json.loads(line[len(step.RESULT) :])
        for line in capsys.readouterr().out.splitlines()
        if line[:17] == step.RESULT[:17]
    ]
    assert told == [
        {"state": "missing", "lines": ["not installed: ncu"]},
        {"state": "failed", "lines": ["ValueError: a number"]},
    ]


# --- peers ------------------------------------------------------------------------------------------------------------


def wheel(folder: Path, package: str, module: str, code: str, requires: str = "") -> None:
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{package}/__init__.py", "")
        archive.writestr(f"{package}/{module}.py", code)
        archive.writestr(f"{package}-1.0.dist-info/METADATA", f"Name: {package}\nVersion: 1.0\n{requires}\n")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An import system that forgets what a test adds, and a folder for wheels."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(wheels, "_STAND_INS", wheels._StandIns())
    for name in ("wheels", "scratch"):
        (tmp_path / name).mkdir()
    return tmp_path / "wheels", tmp_path / "scratch"


def test_kernels_are_imported_without_the_dependencies_of_their_wheel(fresh):
    folder, scratch = fresh
    code = "from absent_sets import Batch, load\nimport absent_sets.deep\nclass Mine(Batch): pass\n"
    code += "def kernel(): return 7\n"
    requires = "Requires-Dist: absent-sets (>=1)\nRequires-Dist: absent-extra ; extra == 'x'\nRequires-Dist: torch"
    wheel(folder, "peer_of_mine", "kernels", code, requires)
    lines = wheels.use(folder, scratch)
    assert lines == ["not installed, replaced by stand-ins: absent_sets"]
    import peer_of_mine.kernels as found

    assert found.kernel() == 7 and not isinstance(3, found.Batch)
    with pytest.raises(ImportError, match=r"absent_sets is not installed, so absent_sets\.load cannot be used"):
        found.load()
    with pytest.raises(ModuleNotFoundError):
        import absent_extra  # noqa: F401


def test_a_wheel_that_does_not_import_fails_its_step_and_says_why(fresh, monkeypatch):
    folder, scratch = fresh
    wheel(folder, "broken_peer", "kernels", "raise OSError('no such symbol')\n")
    (folder / "torn-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")
    bench = step.Bench(CPU, wheels=folder, unpacked=wheels.use(folder, scratch))
    monkeypatch.setattr(peers, "KERNELS", {"broken_peer": ("broken_peer.kernels",), "absent_peer": ("absent_peer",)})
    with pytest.raises(RuntimeError) as failed:
        peers.wheels(bench)
    assert "broken_peer does not import: OSError: no such symbol" in str(failed.value)
    assert "torn-1.0-py3-none-any.whl: cannot be unpacked" in str(failed.value)
    assert "absent_peer: no wheel, and not installed" in str(failed.value)


def test_a_folder_without_wheels_is_refused(fresh, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="there are no wheels"):
        wheels.use(*fresh)
    assert call("--wheels", tmp_path / "nowhere") == 2
    assert "there is no such folder" in capsys.readouterr().err


# --- profiles and tuning ----------------------------------------------------------------------------------------------

CSV = """==PROF== Connected to process 1
ran log-probs
==PROF== Disconnected from process 1
"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","ns","register/thread"
"0","1","void row_stats_kernel<float>(StatsCall, int)","(8, 1, 1)","5,120","64"
"""


@pytest.mark.parametrize(
    "printed, status, told",
    [
        (CSV, 0, ["void row_stats_kernel<float>, grid (8, 1, 1): time 5,120, registers 64"]),
        ("==ERROR== ERR_NVGPUCTRPERM: no permission\n", 1, "cannot be used on this machine.*ERR_NVGPUCTRPERM"),
        ("==WARNING== No kernels were profiled.\n", 0, "read no counters: ==WARNING== No kernels"),
    ],
)
def test_counters_are_read_where_they_can_be(tmp_path, monkeypatch, printed, status, told):
    (tmp_path / "printed").write_text(printed)
    (tmp_path / "ncu").write_text(f"#!/bin/sh\ncat {tmp_path}/printed\nexit {status}\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if status or "No kernels" in printed:
        with pytest.raises(step.Missing, match=told):
            profiles.profiled and profiles.profiles(step.Bench(CPU))
    else:
        assert profiles.profiles(step.Bench(CPU)) == told


def test_every_kernel_is_in_the_profile():
    (line,) = profiles.profiled(step.Bench(CPU))
    assert all(
        name in line for name in ("log-probs", "with KLs", "16 rows", "gradient of log-probs", "gradient with KLs")
    )


@pytest.mark.parametrize("faster, kept", [(0.98, True), (0.969, False), (1.2, True)])
def test_a_constant_is_kept_unless_another_is_3_percent_better(faster, kept):
    line = tuning.settled("threads", 256, {128: 1.5e-3, 256: 1e-3, 512: faster * 1e-3}, "kThreads in vector_io.h")
    assert ("keep 256" in line) is kept and ("change kThreads in vector_io.h" in line) is not kept
    assert "256: 1.000 ms" in line


def test_every_tuned_constant_is_one_that_is_used():
    """Whose value at the time of the call decides, and which is put back after it."""
    from qkernels.backends import cuda

    pytest.importorskip("triton")
    from qkernels.backends.triton import common

    def cuda_splits() -> int:
        return cuda.splits_for(300, 1 << 20, 132, 64)

    for module, constants in ((cuda, tuning._CUDA_SPLITS), (common, tuning._TRITON_SPLITS)):
        for name, values in constants.items():
            assert getattr(module, name) in values, "the default is one of the candidates"
    before = cuda_splits()
    assert tuning._with(cuda, {"_BLOCKS_PER_SM": 16}, cuda_splits)() != before == cuda_splits()

    for name, rows, vocab in (("PROGRAMS_PER_SM", 16, 1 << 20), ("SMALLEST_PIECE", 4, 1 << 15)):
        before = common.splits_for(rows, vocab, 132)
        call = tuning._with(common, {name: 2}, lambda r=rows, v=vocab: common.splits_for(r, v, 132))
        assert call() != before == common.splits_for(rows, vocab, 132)


def test_another_build_is_timed_from_its_own_folder(tmp_path, monkeypatch):
    """The process that times a package imports it from there."""
    (tmp_path / "torch.py").write_text("raise SystemExit('the package of this folder')")  # imported before qkernels
    with pytest.raises(RuntimeError, match="512 threads: the package of this folder"):
        tuning.timed_package(tmp_path, step.Bench(CPU), 512)


def test_each_kernel_of_a_step_is_timed():
    times = dict(json.loads(line) for line in tuning.step_times(step.Bench(CPU)))
    assert set(times) == {"log-probs", "log-probs of short rows", "with KLs", "gradient"} and min(times.values()) > 0
