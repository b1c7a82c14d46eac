# ruff: noqa: F811
"""`qkernels score` on several ranks: the table is that of one process, whatever happens to a rank in between."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")

import pyarrow.parquet as pq
import torch

from qkernels.score import ScoreError, ScoreOptions, ranks, read_scores, run, store
from qkernels.score.folder import RunLock
from qkernels.score.ranks import Ranks, bitmap, in_bitmap
from score_runs import BETA, ROOT, folders, models, records, write_data  # noqa: F401  fixtures

# The ranks are processes of their own, which take the best instruction set; another one has other bits.
pytestmark = pytest.mark.skipif(
    "QKERNELS_TEST_INSTRUCTION_SET" in os.environ, reason="this process runs on another instruction set than its ranks"
)

PAIRS = 22
_SECONDS = 60


@pytest.fixture(scope="module")
def data(folders: Path) -> Path:
    return write_data(folders / "many.json", records(PAIRS))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of four pairs, and ranks that are missed after a second; ranks are forked, and inherit it."""
    for module in (run, store):
        monkeypatch.setattr(module, "WINDOW", 4)
    monkeypatch.setattr(ranks, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(ranks, "_LOST_SECONDS", 1.5)
    monkeypatch.setattr(ranks, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(ranks, "_TELL_SECONDS", 2.0)


@pytest.fixture(scope="module")
def alone(folders: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process, with the same windows."""
    out = tmp_path_factory.mktemp("alone") / "out"
    before = run.WINDOW, store.WINDOW
    run.WINDOW = store.WINDOW = 4
    try:
        run.run_score(options(folders, data, out), io.StringIO())
    finally:
        run.WINDOW, store.WINDOW = before
    return out


def options(folders: Path, data: Path, out: Path, **more) -> ScoreOptions:
    return ScoreOptions(
        model=str(folders / "policy"), reference=str(folders / "reference"), data=data, out=out, beta=BETA,
        batch_tokens=60, **more,
    )  # fmt: skip


def _serve(rank: int, size: int, port: int, chosen: ScoreOptions, hook, connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if hook is not None:
        hook(rank)
    stream = io.StringIO()
    try:
        answer = ("figures", run.run_score(chosen, stream))
    except Exception as error:
        answer = (type(error).__name__, str(error))
    connection.send((*answer, stream.getvalue()))


def launch(size: int, chosen, hook=None, *, killed: tuple[int, ...] = ()) -> list:
    """Run the ranks; what each returned or raised, and printed. None of a rank that is killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes, pipes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        its = chosen(rank) if callable(chosen) else chosen
        processes.append(context.Process(target=_serve, args=(rank, size, port, its, hook, there), daemon=True))
        pipes.append(here)
    for process in processes:
        process.start()
    answers = []
    try:
        for rank, pipe in enumerate(pipes):
            if rank in killed:
                processes[rank].join(_SECONDS)
                assert processes[rank].exitcode == -signal.SIGKILL
                answers.append(None)
                continue
            assert pipe.poll(_SECONDS), f"rank {rank} hangs"
            answers.append(pipe.recv())
    finally:
        for process in processes:
            process.join(1)  # one that has answered ends by itself, and coverage.py can write what it has run
            process.kill()
            process.join()
    return answers


def same(out: Path, alone: Path) -> None:
    """Every row of both tables, bit for bit, and the figures."""
    for name in ("tokens.parquet", "pairs.parquet"):
        assert pq.read_table(out / name).equals(pq.read_table(alone / name)), name
    figures = [json.loads((folder / "summary.json").read_text()) for folder in (out, alone)]
    for name in ("pairs", "tokens", "mean_margin", "pair_accuracy", "token_means", "settings"):
        assert figures[0][name] == figures[1][name], name
    left = sorted(path.name for path in out.iterdir())
    assert left == sorted(path.name for path in alone.iterdir()), "no lock, no part, no folder of a rank"


@pytest.mark.parametrize("size", [2, 3])
def test_the_table_is_that_of_one_process(folders: Path, data: Path, alone: Path, tmp_path: Path, size: int):
    answers = launch(size, options(folders, data, tmp_path / "out"), spread)
    assert [kind for kind, _, _ in answers] == ["figures"] * size, answers
    assert answers[0][1]["pairs"] == PAIRS and answers[0][1]["ranks"] == size
    assert answers[0][1]["elapsed_seconds"]["tokens_scored"] == answers[0][1]["tokens"]
    assert all(figures == {} and not text for _, figures, text in answers[1:])
    assert f"; {size} ranks" in answers[0][2] and f"scoring {PAIRS}/{PAIRS}" in answers[0][2]
    assert run.summary(answers[1][1], options(folders, data, tmp_path / "out")) == ""
    same(tmp_path / "out", alone)


def spread(rank: int) -> None:
    """No rank is so quick that the others get nothing."""
    add = store.Results.add

    def slow(self, *arguments):
        time.sleep(0.02)
        add(self, *arguments)

    store.Results.add = slow


def write_at_once(rank: int) -> None:
    store._FLUSH_SECONDS = 0.0


def die(after: int, which: int):
    """A rank that is killed once it has scored so many pairs, and written them."""

    def hook(rank: int) -> None:
        write_at_once(rank)
        spread(rank)
        add, count = store.Results.add, 0

        def struck(self, *arguments):
            nonlocal count
            add(self, *arguments)
            count += 1
            if rank == which and count == after:
                os.kill(os.getpid(), signal.SIGKILL)

        store.Results.add = struck

    return hook


def test_a_lost_rank_is_named_and_another_number_of_ranks_goes_on(
    folders: Path,
    data: Path,
    alone: Path,
    tmp_path: Path,
):
    out = tmp_path / "out"
    answers = launch(3, options(folders, data, out), die(2, which=2), killed=(2,))
    kind, message, _ = answers[0]
    assert kind == "ScoreError" and "rank 2 (process " in message and "is lost: no sign of life for" in message
    # The others have been told, unless they had ended before.
    assert answers[1][0] == "figures" or "rank 0 stopped: rank 2" in answers[1][1]
    table = read_scores(out)
    missing = set(range(PAIRS)) - set(table.pairs())
    assert len(missing) in (1, 2), "what the killed rank had written of its window is there too"
    answers = launch(2, options(folders, data, out, resume=True))
    assert answers[0][0] == "figures", answers
    assert f"; {len(table.pairs())} scored before" in answers[0][2]
    same(out, alone)


def test_rank_0_is_lost_and_one_process_goes_on(folders: Path, data: Path, alone: Path, tmp_path: Path):
    out = tmp_path / "out"
    answers = launch(2, options(folders, data, out), die(4, which=0), killed=(0,))
    assert answers[1][0] == "ScoreError" and "rank 0, or the launcher, is lost" in answers[1][1], answers
    kept = len(read_scores(out).pairs())
    assert kept >= 4 and (out / "ranks/00001/parts").is_dir()
    stream = io.StringIO()
    run.run_score(options(folders, data, out, resume=True), stream)
    assert f"; {kept} scored before" in stream.getvalue()
    same(out, alone)


def test_what_stops_one_rank_is_told_by_all(folders: Path, data: Path, tmp_path: Path):
    """A pair that does not fit is in the share of rank 1; nothing is written."""
    rows = records(PAIRS)
    rows[5]["chosen"] += " and so on" * 600
    bad = write_data(tmp_path / "bad.json", rows)
    answers = launch(2, options(folders, bad, tmp_path / "out"))
    assert answers[1][0] == "ScoreError" and answers[1][1].startswith("pair 5 (record 6 of the data), chosen answer")
    assert answers[0][:2] == ("ScoreError", f"rank 1 stopped: {answers[1][1]}")
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    answers = launch(2, options(folders, data, tmp_path / "there"))
    assert "the folder exists" in answers[0][1] and answers[1][1] == f"rank 0 stopped: {answers[0][1]}"


def test_ranks_that_see_other_files_are_told(folders: Path, data: Path, tmp_path: Path):
    other = write_data(tmp_path / "other.json", records(PAIRS - 1))
    answers = launch(2, lambda rank: options(folders, other if rank else data, tmp_path / "out"))
    assert "rank 1 and rank 0 differ in the number of pairs" in answers[1][1], answers
    assert "rank 1 stopped: rank 1 and rank 0 differ" in answers[0][1]


def test_a_folder_that_rank_0_does_not_see_is_told(folders: Path, data: Path, tmp_path: Path):
    """Ranks on two machines whose --out is not the same folder."""
    answers = launch(2, lambda rank: options(folders, data, tmp_path / f"machine{rank}/out"), spread)
    assert answers[0][0] == "ScoreError" and "on a file system that all ranks share" in answers[0][1], answers


def test_parts_of_ranks_are_taken_over_once(folders: Path, data: Path, alone: Path, tmp_path: Path):
    """A run that is struck while it takes over has the same rows; damage and strangers are told."""
    out = tmp_path / "out"
    launch(2, options(folders, data, out), die(4, which=0), killed=(0,))
    before = read_scores(out)
    twice = Path(shutil.copytree(out / "ranks/00001", tmp_path / "copy"))
    chosen = options(folders, data, out, resume=True)
    with RunLock(out / "ranks/00001") as lock:
        lock.acquire()
        with pytest.raises(ScoreError, match="is still writing to"):
            run.run_score(chosen, io.StringIO())
    (part,) = sorted((out / "ranks/00001/parts").iterdir())[:1]
    content = part.read_bytes()
    part.write_bytes(content[:-9] + b"damaged!!")
    with pytest.raises(ScoreError, match=r"ranks/00001/parts/.*SHA-256 differs"):
        run.run_score(chosen, io.StringIO())
    part.write_bytes(content)
    (out / "ranks/00001/notes.txt").write_text("precious")
    settings = json.loads((out / "settings.json").read_text())
    with RunLock(out) as lock:
        results = store.Results(out, {k: v for k, v in settings.items() if k != "format"}, lock)
        results.open(True, False)
        assert sorted(results.info) == before.pairs()
    assert (out / "ranks/00001/notes.txt").read_text() == "precious"
    (out / "ranks/00001/notes.txt").unlink()
    shutil.rmtree(out / "ranks")
    shutil.copytree(twice, out / "ranks/00001")  # as if it had been struck before the rank's folder was gone
    assert (read_scores(out)["logps"] == before["logps"]).all()
    run.run_score(chosen, io.StringIO())
    same(out, alone)
    (out / "ranks/00001").mkdir(parents=True)
    run.run_score(options(folders, data, out, overwrite=True), io.StringIO())
    same(out, alone)


def test_bitmaps():
    numbers = {0, 7, 8, 1000}
    bits = bitmap(numbers)
    assert {n for n in range(1100) if in_bitmap(bits, n)} == numbers and not in_bitmap(bitmap(set()), 0)


@pytest.mark.nightly
def test_under_torchrun(folders: Path, data: Path, alone: Path, tmp_path: Path):
    """The command as documented; a rank that fails ends the run, and --resume goes on."""
    code = "from qkernels.score import run, store\nrun.WINDOW = store.WINDOW = 4\nfrom qkernels import cli\n"
    script = tmp_path / "score.py"
    script.write_text(code + "import sys\nsys.exit(cli.main())\n")
    arguments = ["score", "--model", folders / "policy", "--reference", folders / "reference", "--data", data,
                 "--out", tmp_path / "out", "--beta", BETA, "--batch-tokens", 60]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    with contextlib.suppress(KeyError):
        del environment["RANK"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
         *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "; 2 ranks" in done.stderr and done.stdout.count("ranked right") == 1
    same(tmp_path / "out", alone)


@pytest.mark.parametrize(
    "environment, local",
    [({"LOCAL_RANK": "3"}, 3), ({"SLURM_LOCALID": "2"}, 2), ({"LOCAL_RANK": "0", "SLURM_LOCALID": "2"}, 0), ({}, 5)],
    ids=str,
)
def test_each_rank_of_a_machine_has_a_device_of_its_own(monkeypatch, environment, local):
    """Whatever launcher has started it."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *args, **how: SimpleNamespace(clone=lambda: None))
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: store)
    assert Ranks().local == local
