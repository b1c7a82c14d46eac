"""The folder of a scoring run when things go wrong: strangers' files, two processes, power cuts, damage and attacks.

Most tests write a run's folder through `Results`, without models: small tables of known numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from processes import Command
from qkernels.cli import main
from qkernels.data import Message, Preference
from qkernels.score import ScoreError, read_scores, store
from qkernels.score.encode import EncodedAnswer
from qkernels.score.files import CHECKSUMS, LOCK, PairInfo
from qkernels.score.folder import RunLock
from qkernels.score.store import CachedReference, Results
from qkernels.score.summary import Overview
from qkernels.score.table import prompt_of
from score_runs import resign, score, started, usual

OUTPUTS = ["logps", "reference_logps", "implicit_rewards", "entropy"]
SETTINGS = {"model": "m", "reference": "r", "beta": 0.1, "outputs": OUTPUTS, "special_ids": [4]}
PAIRS = 6


def preference(number: int) -> Preference:
    return Preference((Message("user", f"question {number}"),), f"good {number}", f"bad {number}")


def answers(number: int) -> list:
    """The scored answers of a pair, of 2 to 5 tokens; each number is another."""
    made = []
    for side, count in (("chosen", 2 + number % 3), ("rejected", 3 + number % 2)):
        encoded = EncodedAnswer([1], [10 * number + i for i in range(count)], ["w "] * count, [(-1, -1)] * count)
        base = 100 * number + (50 if side == "rejected" else 0)
        columns = {name: np.arange(base, base + count, dtype=np.float32) + k / 8 for k, name in enumerate(OUTPUTS)}
        made.append((side, encoded, columns))
    return made


@contextlib.contextmanager
def opened(out: Path, resume: bool = False, overwrite: bool = False):
    with RunLock(out) as lock:
        results = Results(out, SETTINGS, lock)
        results.open(resume, overwrite)
        yield results


def add(results: Results, numbers) -> None:
    for number in numbers:
        if number not in results.info:
            results.add(number, answers(number), preference(number))
    results.flush()


def finish(results: Results) -> None:
    """As a run ends."""
    results.merge()
    overview = Overview()
    for window in results.windows():
        overview.add(window)
    prompts = [(i, prompt_of(preference(i))) for i in range(PAIRS)]
    results.replace("pairs.parquet", lambda temporary: overview.write_pairs(temporary, prompts, results.info))
    results.write("summary.json", "{}")
    results.write("report.html", "<!DOCTYPE html>")
    results.close()


def run(out: Path, **how: bool) -> None:
    """A run from beginning to end, in two parts; takes up what is there."""
    with opened(out, **how) as results:
        add(results, range(PAIRS // 2))
        add(results, range(PAIRS))
        finish(results)


def complete(out: Path) -> None:
    """Whether every number of every pair is there, once."""
    table = read_scores(out)
    for number in range(PAIRS):
        for side, encoded, columns in answers(number):
            rows = table.select(number, side)
            assert rows["token_id"].tolist() == encoded.ids
            for name, column in columns.items():
                assert rows[name].tolist() == column.tolist()
    assert table.pairs() == list(range(PAIRS)) and table.prompts[2] == [("user", "question 2")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run(out)
    complete(out)
    return out


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after two parts."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with opened(out) as results:
        add(results, range(2))
        add(results, range(4))
    assert sorted(path.name for path in (out / "parts").iterdir()) == ["000000.parquet", "000001.parquet"]
    return out


@pytest.fixture
def copies(finished: Path, unfinished: Path, tmp_path: Path) -> dict[str, Path]:
    """Both folders, to be damaged."""
    made = {"finished": finished, "unfinished": unfinished}
    return {name: Path(shutil.copytree(path, tmp_path / name / "out")) for name, path in made.items()}


def test_a_run_leaves_its_files_and_no_lock(finished: Path) -> None:
    names = ["checksums.json", "pairs.parquet", "report.html", "settings.json", "summary.json", "tokens.parquet"]
    assert sorted(path.name for path in finished.iterdir()) == names
    noted = json.loads((finished / CHECKSUMS).read_text())["files"]
    assert noted == {
        name: [hashlib.sha256((finished / name).read_bytes()).hexdigest()] for name in names if name != CHECKSUMS
    }


# --- files of others --------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }


def put(*names: str) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("precious")

    return write


def link(name: str, is_folder: bool) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        target = out.parent / "elsewhere"
        target.mkdir()
        (target / "000000.parquet").write_text("precious")
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target if is_folder else target / "000000.parquet", target_is_directory=is_folder)

    return make


@pytest.mark.parametrize("kind", ["mine", "finished", "unfinished"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("parts/years_of_work/thesis.tex"), "parts"),
        (put("parts/000000.parquet.bak"), "parts"),
        (put("parts/notes.txt", "parts/1.parquet"), "parts"),
        (put("model/weights.bin"), "model"),
        (put("reference/books.bib"), "reference"),
        (put(".partial-thesis.tex"), ".partial-thesis.tex"),
        (put(".partial-drafts/one.tex"), ".partial-drafts"),
        (put("report.html/index.html"), "report.html"),
        (link("parts", True), "parts"),
        (link("tokens.parquet", False), "tokens.parquet"),
    ],
)
def test_overwriting_spares_what_is_not_a_runs(
    copies: dict[str, Path], tmp_path: Path, kind: str, change: Callable[[Path], None], named: str
) -> None:
    out = copies.get(kind, tmp_path / "mine")
    out.mkdir(exist_ok=True)
    if (out / "report.html").exists():
        (out / "report.html").unlink()
    change(out)
    before = files_of(out.parent)
    with pytest.raises(ScoreError) as refused, opened(out, overwrite=True):
        pass
    assert "--overwrite replaces only what an earlier run has written" in str(refused.value)
    assert named in str(refused.value)
    assert files_of(out.parent) == before


def test_overwriting_replaces_a_run(copies: dict[str, Path]) -> None:
    for out in copies.values():
        (out / ".partial-report.html").write_text("left by a killed run")
        (out / ".partial-1234-tokens.parquet").write_text("left by a killed run of an earlier version")
        with opened(out, overwrite=True) as results:
            assert sorted(files_of(out)) == [LOCK, CHECKSUMS, "settings.json"]
            add(results, range(PAIRS))
            finish(results)
        complete(out)


def test_what_appears_during_a_run_stays(finished: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "out") as results:
        add(results, range(PAIRS))
        put("parts/notes.txt")(tmp_path / "out")
        finish(results)
    assert (tmp_path / "out/parts/notes.txt").read_text() == "precious"
    assert not list((tmp_path / "out/parts").glob("*.parquet"))
    complete(tmp_path / "out")


def test_the_command_spares_the_thesis(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    put("parts/years_of_work/thesis.tex")(out)
    status, _, err = score(*usual(folders, out, "--overwrite"))
    assert status == 2 and "no run has written to this folder" in err and "it holds parts" in err
    assert (out / "parts/years_of_work/thesis.tex").read_text() == "precious"


# --- two processes ----------------------------------------------------------------------------------------------------


WAITING = """
import pathlib, time
real = store.Results.add
def add(self, number, *rest):
    real(self, number, *rest)
    if number == 7:
        pathlib.Path("scoring").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.02)
store.Results.add = add
"""


@pytest.mark.nightly_except(how=([],))
@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]], ids=["fresh", "resume", "overwrite"])
def test_two_processes_do_not_share_a_folder(folders: Path, tmp_path: Path, how: list[str]) -> None:
    out = tmp_path / "out"
    if how:
        assert score(*usual(folders, out, "--limit", 2))[0] == 0
    with started(folders, out, *how, code=WAITING, cwd=tmp_path) as first:
        limit = time.monotonic() + 120
        while not (tmp_path / "scoring").exists():
            assert first.runs() and time.monotonic() < limit
            time.sleep(0.02)
        before = files_of(out)
        for more in (["--resume"], ["--overwrite"], []):
            status, _, err = score(*usual(folders, out, *more))
            assert status == 2 and "is writing to it" in err, err
            assert f"process {first.pid} on " in err and "Traceback" not in err
        assert files_of(out) == before
        (tmp_path / "go").touch()
        err = first.errors.read()
        assert first.wait() == 0, err
    assert read_scores(out).pairs() == list(range(20)) and not (out / LOCK).exists()
    assert pq.read_table(out / "pairs.parquet").num_rows == 20


@pytest.mark.nightly_except(how=("--resume",))
@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_two_processes_at_the_same_moment(folders: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    assert score(*usual(folders, out, "--limit", 2))[0] == 0
    with started(folders, out, how, cwd=tmp_path) as one, started(folders, out, how, cwd=tmp_path) as other:
        errors = [process.errors.read() for process in (one, other)]
        codes = [process.wait() for process in (one, other)]
    assert sorted(codes) in ([0, 2], [0, 0]), errors  # the second may begin after the first has ended
    for code, err in zip(codes, errors, strict=True):
        assert "Traceback" not in err
        assert code == 0 or "is writing to it" in err
    assert read_scores(out).pairs() == list(range(20))
    assert pq.read_table(out / "pairs.parquet").num_rows == 20


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_lock_of_a_killed_process_is_stale(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    code = """
import pathlib, sys, time
from qkernels.score.folder import RunLock
lock = RunLock(pathlib.Path("out"))
lock.acquire()
print("held", file=sys.stderr)
time.sleep(60)
"""
    with Command(["--version"], tmp_path, code) as holder, RunLock(out) as lock:
        assert holder.errors.readline() == "held\n"
        assert lock.is_held() and not lock.is_locked
        with pytest.raises(ScoreError, match=f"another run .process {holder.pid} on .*, since 20.*is writing to it"):
            lock.acquire()
        (out / LOCK).write_text('["\x1b[31m"]')  # what it says is not trusted
        with pytest.raises(ScoreError, match="another run is writing to it"):
            lock.acquire()
        os.kill(holder.pid, signal.SIGKILL)
        assert holder.wait(30) == -signal.SIGKILL
        assert (out / LOCK).exists() and not lock.is_held()
        lock.acquire()
        assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()
    assert not (out / LOCK).exists()


def test_what_is_merged_is_what_was_scored(tmp_path: Path) -> None:
    for change, message in (
        (lambda info: info.__setitem__(9, info[0]), "1 of 7 scored pairs are missing from it .9."),
        (lambda info: info.pop(3), "pair 3 is not as it was scored .nothing says"),
        (
            lambda info: info.__setitem__(2, info[2]._replace(tokens=(9, 3))),
            "pair 2 .*4 and 3 tokens instead of 9 and 3",
        ),
    ):
        out = tmp_path / hashlib.md5(message.encode()).hexdigest()
        with opened(out) as results:
            add(results, range(PAIRS))
            change(results.info)
            with pytest.raises(ScoreError, match=message):
                results.merge()
        assert sorted(path.name for path in out.iterdir()) == [CHECKSUMS, "parts", "settings.json"]
        run(out, resume=True)
        complete(out)


# --- power cuts -------------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Nothing is written after it, not even by a clean-up."""


class Power:
    """Lets so many changes of the file system through, then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, changes: int):
        self.left = changes
        for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
            monkeypatch.setattr(os, name, self._limited(getattr(os, name)))

    def _limited(self, real):
        def change(*arguments, **options):
            if self.left <= 0:
                raise PowerCut
            self.left -= 1
            return real(*arguments, **options)

        return change


@pytest.mark.parametrize("earlier", ["nothing", "unfinished", "finished"])
def test_a_power_cut_at_any_moment_loses_nothing(
    copies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str
) -> None:
    kept = 0
    if earlier == "finished":  # and six pairs more are coming; until then four were finished
        with opened(copies["unfinished"], resume=True) as results:
            finish(results)
    for changes in range(200):
        out = tmp_path / str(changes) / "out"
        out.parent.mkdir()
        if earlier != "nothing":
            shutil.copytree(copies["unfinished"], out)
        with monkeypatch.context() as patched:
            power = Power(patched, changes)
            with contextlib.suppress(PowerCut):
                run(out, resume=True)
            ended = power.left > 0
        if earlier != "nothing":
            assert set(read_scores(out).pairs()) >= set(range(4))
        elif out.exists():
            try:
                now = len(read_scores(out).pairs())
            except ScoreError as error:
                assert "nothing has been scored" in str(error) or "it has no settings.json" in str(error)
                now = 0
            assert now >= kept
            kept = now
        run(out, resume=True)
        complete(out)
        assert sorted(path.name for path in out.iterdir())[0] == CHECKSUMS
        assert not [path for path in out.rglob("*") if path.name.startswith(".")]
        if ended:
            break
    assert ended and changes > 25


# --- damage -----------------------------------------------------------------------------------------------------------


def refusal(action: Callable[[], object]) -> str:
    """The one sentence that an action ends in."""
    with pytest.raises(ScoreError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def resume(out: Path) -> Results:
    with opened(out, resume=True) as results:
        results.merge()
        for _ in results.windows():
            pass
        return results


READ = {
    "read_scores": read_scores,
    "show": lambda out: show(out),
    "cached reference": CachedReference,
    "resume": resume,
}


def show(out: Path) -> str:
    """The command; its error as the exception it was."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main(["show", str(out)])
    if status:
        assert status == 2 and not stdout.getvalue() and stderr.getvalue().count("\n") == 1
        assert stderr.getvalue().startswith("qkernels show: error: ")
        raise ScoreError(stderr.getvalue().removeprefix("qkernels show: error: ").rstrip("\n"))
    return stdout.getvalue()


@pytest.mark.parametrize("reader", READ)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("finished", "tokens.parquet"), ("finished", "pairs.parquet"), ("unfinished", "parts/000001.parquet")],
)
def test_a_flipped_byte_is_found_and_named(copies: dict[str, Path], kind: str, name: str, reader: str) -> None:
    out = copies[kind]
    contents = (out / name).read_bytes()
    for place in range(0, len(contents), max(1, len(contents) // 15)):
        changed = bytearray(contents)
        changed[place] ^= 0x20
        (out / name).write_bytes(changed)
        before = files_of(out)
        message = refusal(lambda: READ[reader](out))
        assert str(out / name) in message and "changed since it was written" in message
        assert files_of(out) == before
    (out / name).write_bytes(contents)
    READ[reader](out)


@pytest.mark.parametrize("reader", READ)
def test_a_missing_row_is_found_and_named(copies: dict[str, Path], reader: str) -> None:
    for kind, name in (("finished", "tokens.parquet"), ("unfinished", "parts/000000.parquet")):
        rows = pq.read_table(copies[kind] / name)
        pq.write_table(rows.slice(0, len(rows) - 1), copies[kind] / name)
        assert name in refusal(lambda kind=kind: READ[reader](copies[kind]))
        resign(copies[kind])  # and if the checksum was made to fit, by what is known of the pairs
        if reader != "cached reference":
            assert "is not as it was scored" in refusal(lambda kind=kind: READ[reader](copies[kind]))


def test_a_missing_file_is_named_and_scored_again(copies: dict[str, Path]) -> None:
    for kind, name, again in (
        ("unfinished", "parts/000000.parquet", {0, 1}),
        ("finished", "tokens.parquet", set(range(PAIRS))),
        ("finished", "pairs.parquet", set(range(PAIRS))),
    ):
        out = copies[kind]
        (out / name).unlink()
        for reader in (read_scores, show, CachedReference):
            message = refusal(lambda out=out, reader=reader: reader(out))
            assert f"{name} missing, though the run wrote it" in message
        with opened(out, resume=True) as results:
            (note,) = results.notes
            assert str(out / name) in note and "scored again" in note
            assert again & set(results.info) == set()
            add(results, range(PAIRS))
            finish(results)
        complete(out)


def test_a_damaged_part_is_deleted_and_scored_again(copies: dict[str, Path]) -> None:
    out = copies["unfinished"]
    (out / "parts/000001.parquet").write_bytes(b"PAR1")
    assert "delete it, and --resume scores its pairs again" in refusal(lambda: resume(out))
    (out / "parts/000001.parquet").unlink()
    run(out, resume=True)
    complete(out)


def test_a_folder_of_an_earlier_version_is_read_and_not_continued(copies: dict[str, Path]) -> None:
    for out in copies.values():
        (out / CHECKSUMS).unlink()
        settings = json.loads((out / "settings.json").read_text())
        (out / "settings.json").write_text(json.dumps({**settings, "format": 1}))
        assert len(read_scores(out).pairs()) >= 4
        assert CachedReference(out).logps("", 1, "chosen", [10, 11, 12]).tolist() == [100.125, 101.125, 102.125]
        message = refusal(lambda out=out: resume(out))
        assert "an earlier version of qkernels wrote it" in message and "--overwrite" in message
        run(out, overwrite=True)
        complete(out)


# --- attacks ----------------------------------------------------------------------------------------------------------


def settings(**changes: object) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        found = json.loads((out / "settings.json").read_text())
        (out / "settings.json").write_text(json.dumps({**found, **changes}))
        resign(out)

    return change


def raw(name: str, contents: bytes) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        for path in tables(out) if name == "tables" else [out / name]:
            path.write_bytes(contents)
        if name != CHECKSUMS:
            resign(out)

    return change


def tables(out: Path) -> list[Path]:
    """Where the tokens are: merged, or the last part."""
    return [out / "tokens.parquet"] if (out / "tokens.parquet").exists() else [out / "parts/000001.parquet"]


def rows(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Write the tokens changed, the metadata as they were unless the change replaces them."""

    def write(out: Path) -> None:
        for path in tables(out):
            pq.write_table(change(pq.read_table(path)), path)
        resign(out)

    return write


def column(name: str, values: Callable[[pa.Table], object]) -> Callable[[Path], None]:
    return rows(lambda table: table.set_column(table.column_names.index(name), name, pa.array(values(table))))


def metadata(value: bytes | None) -> Callable[[Path], None]:
    return rows(lambda table: table.replace_schema_metadata(None if value is None else {b"qkernels": value}))


def pairs(name: str, value: object) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        path = out / "pairs.parquet"
        if path.exists():
            table = pq.read_table(path)
            array = pa.array([value] * len(table))
            pq.write_table(table.set_column(table.column_names.index(name), name, array), path)
            resign(out)

    return write


def noted(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        found = json.loads((out / CHECKSUMS).read_text())
        changed = change(found)
        (out / CHECKSUMS).write_text(json.dumps(found if changed is None else changed))

    return write


def stray(name: str) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        (out / "parts").mkdir(exist_ok=True)
        shutil.copyfile(tables(out)[0], out / "parts" / name)

    return write


def folder_instead(name: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        if (out / name).exists():
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        (out / name).mkdir(parents=True)

    return make


def file_instead(name: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / name).write_text("x")

    return make


def deep(table: pa.Table) -> pa.Table:
    return table.append_column("extra", pa.array([[[1]]] * len(table)))


DEEP = b"[" * 200000 + b"]" * 200000
NESTED = b'{"a":' * 100000 + b"1" + b"}" * 100000
TAMPERINGS: dict[str, Callable[[Path], None]] = {
    "settings a list": raw("settings.json", b"[]"),
    "settings null": raw("settings.json", b"null"),
    "settings a number": raw("settings.json", b"17"),
    "settings a string": raw("settings.json", b'"settings"'),
    "settings empty": raw("settings.json", b""),
    "settings an empty object": raw("settings.json", b"{}"),
    "settings not JSON": raw("settings.json", b"{beta: 1"),
    "settings not UTF-8": raw("settings.json", b'{"beta": "\xff\xfe"}'),
    "settings deep": raw("settings.json", DEEP),
    "settings nested": raw("settings.json", NESTED),
    "settings of 10,000 digits": raw("settings.json", b'{"beta": ' + b"9" * 10000 + b"}"),
    "settings a folder": folder_instead("settings.json"),
    "settings missing": lambda out: (out / "settings.json").unlink(),
    "settings with an escape sequence": settings(model="\x1b]0;owned\x07"),
    "format a string": settings(format="2"),
    "format of the future": settings(format=99),
    "format a list": settings(format=[2]),
    "outputs a string": settings(outputs="logps"),
    "outputs null": settings(outputs=None),
    "outputs numbers": settings(outputs=[1, 2, 3]),
    "outputs nested": settings(outputs=[[*OUTPUTS]]),
    "outputs twice": settings(outputs=[*OUTPUTS, "logps"]),
    "outputs without rewards": settings(outputs=["logps"]),
    "outputs not in the table": settings(outputs=[*OUTPUTS, "magic"]),
    "outputs a path": settings(outputs=[*OUTPUTS, "../../etc/passwd"]),
    "special ids a number": settings(special_ids=4),
    "special ids texts": settings(special_ids=["a"]),
    "special ids nested": settings(special_ids=[[1]]),
    "special ids booleans": settings(special_ids=[True]),
    "checksums missing": lambda out: (out / CHECKSUMS).unlink(),
    "checksums a list": raw(CHECKSUMS, b"[]"),
    "checksums null": raw(CHECKSUMS, b"null"),
    "checksums deep": raw(CHECKSUMS, DEEP),
    "checksums not UTF-8": raw(CHECKSUMS, b"\xff"),
    "checksums without files": noted(lambda found: {"format": 2}),
    "checksums of another format": noted(lambda found: {**found, "format": 3}),
    "checksums of no files": noted(lambda found: {**found, "files": {}}),
    "checksums that climb out": noted(lambda found: found["files"].update({"../../etc/passwd": ["0"]})),
    "checksums of an absolute path": noted(lambda found: found["files"].update({"/etc/passwd": ["0"]})),
    "checksums of a strange part": noted(lambda found: found["files"].update({"parts/00x.parquet": ["0"]})),
    "checksums that are numbers": noted(lambda found: found["files"].update({"settings.json": [7]})),
    "checksums that are no list": noted(lambda found: found["files"].update({"settings.json": "a"})),
    "checksums that are empty": noted(lambda found: found["files"].update({"settings.json": []})),
    "checksums nested": noted(lambda found: found.update(files=[[]])),
    "tables empty": raw("tables", b""),
    "tables of zeros": raw("tables", b"PAR1" + b"\0" * 100 + b"PAR1"),
    "tables of text": raw("tables", b"pair,side\n0,chosen\n"),
    "tables truncated": lambda out: (
        [(path.write_bytes(path.read_bytes()[:-50]), resign(out)) for path in tables(out)] and None
    ),
    "no metadata": metadata(None),
    "metadata null": metadata(b"null"),
    "metadata a list": metadata(b"[1]"),
    "metadata a number": metadata(b"3"),
    "metadata not JSON": metadata(b"{"),
    "metadata not UTF-8": metadata(b"\xff\xff"),
    "metadata deep": metadata(DEEP),
    "metadata of a text": metadata(b'{"two": ["a", 1, [0, 0, 0], [1, 1]]}'),
    "metadata of a negative pair": metadata(b'{"-2": ["a", 1, [0, 0, 0], [1, 1]]}'),
    "metadata of a huge pair": metadata(b'{"99999999999999999999": ["a", 1, [0, 0, 0], [1, 1]]}'),
    "metadata too short": metadata(b'{"2": ["a", 1]}'),
    "metadata of texts": metadata(b'{"2": ["a", "b", ["c"], "de"]}'),
    "metadata with a NaN": metadata(b'{"2": ["a", NaN, [0, 0, 0], [1, 1]]}'),
    "no column pair": rows(lambda table: table.drop_columns(["pair"])),
    "no column logps": rows(lambda table: table.drop_columns(["logps"])),
    "no columns": rows(lambda table: table.select([])),
    "no rows": rows(lambda table: table.slice(0, 0)),
    "a column twice": rows(lambda table: table.append_column("logps", table.column("logps"))),
    "a column of lists": column("logps", lambda table: [[1.0]] * len(table)),
    "a column of nulls": column("logps", lambda table: [None] * len(table)),
    "some nulls": column("entropy", lambda table: [None, *[1.0] * (len(table) - 1)]),
    "pairs that are text": column("pair", lambda table: ["0"] * len(table)),
    "pairs that are fractions": column("pair", lambda table: [0.5] * len(table)),
    "pairs below 0": column("pair", lambda table: [-1] * len(table)),
    "pairs beyond all bounds": column("pair", lambda table: [2**62] * len(table)),
    "pairs that are null": column("pair", lambda table: pa.array([None] * len(table), pa.int64())),
    "sides that are numbers": column("side", lambda table: [1] * len(table)),
    "a third side": column("side", lambda table: ["neither"] * len(table)),
    "one side": column("side", lambda table: ["chosen"] * len(table)),
    "tokens that are numbers": column("token", lambda table: [1] * len(table)),
    "token ids that are text": column("token_id", lambda table: ["1"] * len(table)),
    "positions all 0": column("position", lambda table: [0] * len(table)),
    "positions negative": column("position", lambda table: [-1] * len(table)),
    "rewards that are text": column("implicit_rewards", lambda table: ["1"] * len(table)),
    "rows twice": rows(lambda table: pa.concat_tables([table, table])),
    "rows of an unknown pair": column("pair", lambda table: [77] * len(table)),
    "prompts that are no JSON": pairs("prompt", "{"),
    "prompts null": pairs("prompt", "null"),
    "prompts of numbers": pairs("prompt", "[[1, 2]]"),
    "prompts too long": pairs("prompt", '[["a", "b", "c"]]'),
    "prompts deep": pairs("prompt", DEEP.decode()),
    "prompts that are bytes": pairs("prompt", b"[]"),
    "digests that are numbers": pairs("digest", 5),
    "counts below 0": pairs("chosen_tokens", -1),
    "cuts that are text": pairs("prompt_cut", "none"),
    "parts a file": file_instead("parts"),
    "tokens a folder": folder_instead("tokens.parquet"),
}
# Another of the tamperings takes the same way through the checks.
NIGHTLY = {
    "settings null", "settings a number", "settings a string", "settings an empty object", "settings nested",
    "format a list", "outputs numbers", "outputs nested", "special ids nested", "special ids texts", "checksums null",
    "checksums deep", "checksums not UTF-8", "checksums of an absolute path", "checksums that are no list",
    "tables of text", "metadata a list", "metadata a number", "metadata not UTF-8", "metadata of a text",
    "metadata of texts", "no columns", "a column of nulls", "pairs that are fractions", "pairs that are null",
    "tokens that are numbers", "rewards that are text", "positions negative", "prompts null",
    "digests that are numbers", "cuts that are text", "a part named 0000007.parquet", "a lock of a list",
}  # fmt: skip
HARMLESS: dict[str, Callable[[Path], None]] = {
    "a column of lists more": rows(deep),
    "a part named 00x.parquet": stray("00x.parquet"),
    "a part named 0000007.parquet": stray("0000007.parquet"),
    "a part that is not noted": stray("000009.parquet"),
    "a part that was not complete": stray(".partial-000002.parquet"),
    "a report of another kind": raw("report.html", b"\0"),
    "a lock of a list": lambda out: (out / LOCK).write_text("[]") and None,
    "a lock of escapes": lambda out: (out / LOCK).write_text('{"pid": "\x1b[2J"}') and None,
}


def test_there_are_enough_tamperings() -> None:
    assert len(TAMPERINGS) + len(HARMLESS) >= 100 and {*TAMPERINGS, *HARMLESS} > NIGHTLY


@pytest.mark.nightly_cases(name=NIGHTLY)
@pytest.mark.parametrize("name", [*TAMPERINGS, *HARMLESS])
def test_tampering_ends_in_one_sentence(copies: dict[str, Path], finished: Path, unfinished: Path, name: str) -> None:
    refused = 0
    for kind, out in copies.items():
        whole = read_scores(out)
        if name == "a report of another kind" and kind == "unfinished":
            continue
        {**TAMPERINGS, **HARMLESS}[name](out)
        before = files_of(out)
        for reader in (read_scores, show, CachedReference, resume):
            try:
                found = reader(out)
            except ScoreError as error:
                assert "\n" not in str(error) and "\x1b" not in str(error), error
                refused += 1
                assert name in TAMPERINGS, error
                assert reader is not resume or files_of(out).items() >= {
                    item for item in before.items() if item[0].endswith(".parquet") and "partial" not in item[0]
                }, "a refused run changes no results"
                continue
            if isinstance(found, str):
                assert "\x1b" not in found
            elif reader is read_scores and name in HARMLESS:
                assert all(np.array_equal(found[column], whole[column]) for column in whole.columns)
        # The folder can be replaced, or that is refused by a message as well.
        try:
            run(out, overwrite=True)
        except ScoreError:
            continue
        complete(out)
    assert bool(refused) == (name in TAMPERINGS)


def test_numbers_of_a_pair_are_checked() -> None:
    assert PairInfo.of(["a", 3, [0, 0, 1], [1, 2]]) == PairInfo("a", 3, (0, 0, 1), (1, 2))
    for wrong in (["a", 3, [0, 0], [1, 2]], ["a", True, [0, 0, 0], [1, 2]], ["a", 3, [0, 0, 0], [1, 2**40]], ["a"], 3):
        with pytest.raises((ValueError, TypeError)):
            PairInfo.of(wrong)


def test_the_store_and_its_readers_agree_on_names() -> None:
    assert store.PARTS == "parts" and store.TOKENS == "tokens.parquet"


def test_what_is_kept_of_a_pair_is_small():
    """A million pairs: what a run keeps of each for its end, as packed numbers."""
    from qkernels.score.files import PairInfos
    from qkernels.score.summary import PairFigures

    count = 5000
    overview, infos = Overview(), PairInfos()
    tracemalloc.start()
    try:
        for i in range(count):
            infos[i] = PairInfo(f"{i:012x}", 300 + i, (i, 0, 2), (100 + i, 200 + i))
            overview.pairs.append(PairFigures(i, 300 + i, 400 + i, *(0.5 * i + k for k in range(7))))
        assert tracemalloc.get_traced_memory()[0] < 350 * count
    finally:
        tracemalloc.stop()
    assert infos[7] == PairInfo("000000000007", 307, (7, 0, 2), (107, 207)) and list(infos) == list(range(count))
    assert list(overview.pairs)[3] == PairFigures(3, 303, 403, *(1.5 + k for k in range(7)))
    assert len(overview.pairs) == count and type(list(overview.pairs)[3].pair) is int
