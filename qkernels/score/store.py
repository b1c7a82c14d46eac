"""The folder of a scoring run: what is scored stays, whatever happens next; nothing in it is ever half written.

    tokens.parquet   one row per token, in the order of the data; a row group for every 64 pairs
    pairs.parquet    one row per pair: rewards, margin, lengths, cuts, prompt
    summary.json     the figures of the report, and the settings
    report.html
    settings.json    what makes results comparable; a run that resumes must agree
    checksums.json   SHA-256 of the others; what was changed or lost since is found and named, and never merged
    parts/           while a run is under way or was interrupted: what has been scored
    ranks/           of a run of many processes: folders like this one, of all ranks but the first
    .lock            while a run is under way: its process, so that no other one writes to the folder

Every file is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data import Preference
from ..report import folders
from .encode import EncodedAnswer, Encoder
from .files import (
    CHECKSUMS,
    FORMAT,
    LOCK,
    PAIRS,
    PARTS,
    RANKS,
    REPORT,
    RESTORE,
    SETTINGS,
    SUMMARY,
    TOKENS,
    PairInfo,
    PairInfos,
    TokenFile,
    as_json,
    check_all_there,
    check_rows,
    digest,
    is_part,
    is_rank_folder,
    metadata_of,
    part_name,
    part_number,
    read_pairs,
    read_settings,
    windows_of,
)
from .folder import Checksums, RunLock, clear, foreign, is_blank, is_own_name, is_run
from .options import ScoreError
from .table import KEYS, SIDES, TokenTable

if TYPE_CHECKING:
    import numpy as np

WINDOW = 64  # pairs that are batched together, and that share a row group
_FLUSH_SECONDS, _FLUSH_TOKENS = 20.0, 1_000_000
_AGAIN = "delete it, and --resume scores its pairs again"

# One scored answer of a pair: side, tokens, results.
Scored = tuple[str, EncodedAnswer, Mapping[str, "np.ndarray"]]


class Results:
    """The folder of one run.

    Args:
        out: the folder.
        settings: what results depend on; plain JSON values.
        lock: of the folder; held from `open` on, until its owner lets it go.

    Attributes:
        info: the pairs whose scores lie in the folder, by number.
        notes: what `open` found that the user should know.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], lock: RunLock):
        self.out, self.settings, self.lock = out, {"format": FORMAT, **settings}, lock
        self.info = PairInfos()
        self.notes: list[str] = []
        self._checksums = Checksums(out)
        self._columns = [*KEYS, *self.settings["outputs"]]
        self._waiting: dict[int, tuple[list[Scored], PairInfo]] = {}
        self._tokens_waiting = 0
        self._flushed = time.monotonic()

    # --- opening ----------------------------------------------------------------------------------------------------

    @staticmethod
    def refuse(out: Path, resume: bool, overwrite: bool, lock: RunLock) -> None:
        """Say no before anything is loaded.

        Args:
            out: the folder.
            resume, overwrite: what the user allows.
            lock: of the folder; another process that holds it is a reason to say no.

        Raises:
            ScoreError: `out` is there and may not be touched.
        """
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise ScoreError(f"--out {out}: exists and is not a folder")
        if lock.is_held():
            raise ScoreError(f"--out {out}: {lock.holder()} is writing to it; wait for its end, or choose another one")
        if resume:
            if (out / SETTINGS).is_file():
                read_settings(out)
            elif not is_blank(out):
                raise ScoreError(f"--out {out}: no run to resume there; the folder has no {SETTINGS}")
            return
        if not overwrite:
            what = (
                "the folder holds an unfinished run; continue it with --resume"
                if _is_unfinished(out)
                else "the folder exists"
            )
            raise ScoreError(f"--out {out}: {what}; choose another one, or replace an earlier run with --overwrite")
        if not is_run(out):
            held = sorted(entry.name for entry in out.iterdir())
            raise ScoreError(
                f"--out {out}: --overwrite replaces only what an earlier run has written, and no run has written to"
                f" this folder (it has no {SETTINGS} of one); it holds {folders.some_of(held)}"
            )
        in_the_way = foreign(out)
        if in_the_way:
            raise ScoreError(
                f"--out {out}: --overwrite replaces only what an earlier run has written; the folder also holds"
                f" {folders.some_of(in_the_way)}"
            )

    def open(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, or take up what is in it.

        Raises:
            ScoreError: it may not be touched, cannot be written, or holds results of other settings.
        """
        try:
            if os.path.lexists(self.out):
                self.refuse(self.out, resume, overwrite, self.lock)
            else:
                self.out.mkdir(parents=True)
            self.lock.acquire()
            if resume and (self.out / SETTINGS).is_file():
                self._take_up()
            else:
                if overwrite:
                    clear(self.out)
                self.write(SETTINGS, as_json(self.settings))
            (self.out / PARTS).mkdir(exist_ok=True)
        except OSError as error:
            raise ScoreError(f"--out {self.out}: cannot be written ({error.strerror or error})") from None

    def _take_up(self) -> None:
        earlier = read_settings(self.out)
        if earlier["format"] != FORMAT:
            raise ScoreError(
                f"--out {self.out}: an earlier version of qkernels wrote it, without checksums; `qkernels show` reads"
                " it, but it cannot be continued; score again with --overwrite"
            )
        self._checksums = checksums = Checksums.read(self.out)
        if SETTINGS not in checksums.files or checksums.find(SETTINGS) is None:
            raise ScoreError(f"{self.out / CHECKSUMS}: damaged (says nothing of {SETTINGS}); {RESTORE}")
        now = json.loads(as_json(self.settings))
        changed = [
            f"{name} was {repr(earlier[name]) if name in earlier else 'not noted'} and is {now.get(name)!r}"
            for name in sorted({*earlier, *now})
            if earlier.get(name) != now.get(name)
        ]
        if changed:
            raise ScoreError(
                f"--out {self.out}: --resume needs the settings that the run began with: {'; '.join(changed)}"
            )
        noted = [name for name in (TOKENS, PAIRS) if name in checksums.files]
        merged = {name: place for name in noted if (place := checksums.find(name)) is not None}
        if len(merged) < len(noted):
            # Without either of them nothing is known of the other's pairs.
            self._again(next(name for name in noted if name not in merged), f"the pairs of {TOKENS} are scored again")
            checksums.drop(noted)
            merged = {}
        for name, place in merged.items():
            checksums.settle(name, place)
        if PAIRS in merged:
            self.info.update(read_pairs(self.out / PAIRS, prompts=False)[0])
        for name in checksums.parts():
            place = checksums.find(name, _AGAIN)
            if place is None:
                self._again(name, "its pairs are scored again")
                checksums.drop([name])
                continue
            checksums.settle(name, place)
            with TokenFile(self.out / name, self._columns, _AGAIN) as part:
                self.info.update(part.info())
        self.adopt()
        # What a run left that was struck between two steps: files that were not complete, parts that were merged.
        wanted = {*checksums.files, TOKENS, PAIRS, SUMMARY, REPORT, CHECKSUMS, LOCK}
        folders.remove(self.out, lambda name: is_own_name(name) and name not in wanted, _is_parts)

    def adopt(self) -> None:
        """Take over the parts of other ranks, which wrote each into a folder of its own.

        A part is copied, noted here, and then removed there: struck in between, it is there twice, which `merge` can
        tell.

        Raises:
            ScoreError: a rank is still writing, or what it wrote is damaged, or not of this run.
        """
        for folder in rank_folders(self.out):
            lock = RunLock(folder)
            if lock.is_held():
                raise ScoreError(f"--out {self.out}: {lock.holder()} is still writing to {folder}; wait for its end")
            for place in _parts_of_rank(folder, self.settings, _AGAIN):
                with TokenFile(place, self._columns, _AGAIN) as part:
                    info = part.info()
                last = max((part_number(name) for name in self._checksums.parts()), default=-1)
                self.replace(part_name(last + 1), functools.partial(shutil.copyfile, place))
                self.info.update(info)
            try:
                if not folders.remove(folder, is_own_name, _is_parts):
                    folder.rmdir()
            except OSError as error:
                raise ScoreError(f"{folder}: cannot be removed ({error.strerror or error})") from None
        with contextlib.suppress(OSError):  # not there, or somebody else's files in it
            (self.out / RANKS).rmdir()

    def _again(self, name: str, consequence: str) -> None:
        self.notes.append(f"{self.out / name} is missing, though the run wrote it: {consequence}")

    def check(self, pairs: Iterable[tuple[int, Preference]], encoder: Encoder) -> None:
        """Whether what was scored before would be scored the same way now.

        Args:
            pairs: all of the data, with their numbers.
            encoder: of the run.

        Raises:
            ScoreError: naming the first pair that would not.
        """
        last, found, is_cut, max_length = -1, 0, False, encoder.max_length
        for number, pair in pairs:
            last = number
            if number not in self.info:
                continue
            found += 1
            info, where = self.info[number], f"--out {self.out}: --resume: pair {number} has been scored"
            if digest(pair) != info.digest:
                raise ScoreError(f"{where}, and its texts in the data have changed since")
            if any(info.cuts) if max_length is None else info.longest > max_length:
                raise ScoreError(f"{where} with another --max-length ({info.longest} tokens); it must stay as it was")
            if any(info.cuts) and not is_cut:
                # Lengths do not tell where the cut was: what is not scored at the end of a trajectory goes after it.
                is_cut = True  # one pair tells, and encoding takes its time
                if _info(pair, encoder.pairs({number: pair})[0]) != info:
                    raise ScoreError(f"{where} cut to {info.longest} tokens; --max-length must stay as it was")
        if found < len(self.info):
            beyond = [number for number in sorted(self.info) if number > last]
            what = f"the data has only {last + 1} pairs now" if beyond else "some records of the data are left out now"
            where = f"pair {beyond[0]} has" if beyond else f"{len(self.info) - found} pairs have"
            raise ScoreError(f"--out {self.out}: --resume: {where} been scored, and {what}")

    def check_reference(self, cached: CachedReference) -> None:
        """Whether what was scored before was scored with these log-probs; there may be more of them now.

        Raises:
            ScoreError: naming the first pair that was not.
        """
        import numpy as np

        for name in filter(lambda name: name == TOKENS or is_part(name), self._checksums.files):
            with TokenFile(self.out / name, [*KEYS, "reference_logps"]) as file:
                for table in map(file.table, range(file.groups)):
                    for pair, side in itertools.product(table.pairs(), SIDES):
                        rows, where = table.select(pair, side), f"--resume: pair {pair}, {side} answer"
                        known = cached.logps(where, pair, side, rows["token_id"].tolist()).astype(np.float32)
                        if not np.array_equal(known, rows["reference_logps"], equal_nan=True):
                            raise ScoreError(
                                f"--out {self.out}: --resume: pair {pair} has been scored, and its log-probs in"
                                f" --reference-logps {cached.path} are others now"
                            )

    # --- adding -----------------------------------------------------------------------------------------------------

    def add(self, number: int, answers: Iterable[Scored], pair: Preference) -> None:
        """Keep a scored pair; it is on disk after the next `flush`, which comes by itself every 20 seconds."""
        answers = list(answers)
        encoded = [tokens for _, tokens, _ in answers]
        self._waiting[number] = answers, _info(pair, encoded)
        self._tokens_waiting += sum(len(tokens.ids) for tokens in encoded)
        if self._tokens_waiting >= _FLUSH_TOKENS or time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is kept in memory."""
        if self._waiting:
            windows: dict[int, list[int]] = {}
            for pair in sorted(self._waiting):
                windows.setdefault(pair // WINDOW, []).append(pair)
            tables = [
                TokenTable.of_answers((pair, *answer) for pair in pairs for answer in self._waiting[pair][0])
                for pairs in windows.values()
            ]
            info = {pair: known for pair, (_, known) in self._waiting.items()}
            last = max((part_number(name) for name in self._checksums.parts()), default=-1)
            self._write_tables(part_name(last + 1), tables, info)
            self.info.update(info)
            self._waiting, self._tokens_waiting = {}, 0
        self._flushed = time.monotonic()

    def _write_tables(self, name: str, tables: Iterable[TokenTable], info: Mapping[int, PairInfo]) -> None:
        """One row group per table; what the pairs were goes into the file's metadata."""
        import pyarrow.parquet as pq

        def write(temporary: Path) -> None:
            writer = None
            try:
                for table in tables:
                    rows = table.to_arrow()
                    if writer is None:
                        schema = rows.schema.with_metadata(metadata_of(info) if info else None)
                        writer = pq.ParquetWriter(temporary, schema)
                    writer.write_table(rows, row_group_size=max(1, len(rows)))
            finally:
                if writer is not None:
                    writer.close()

        self.replace(name, write)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder."""
        self.replace(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def replace(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file of the folder: `write` gets a temporary path, which takes the name when it is complete."""
        self._checksums.put(name, write)

    # --- finishing --------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Bring all parts into `tokens.parquet`, in the order of the data, a window in memory at a time.

        Raises:
            ScoreError: a part, or what earlier runs have merged, is not as it was written; the merged table would not
                hold every scored pair exactly once. `tokens.parquet` is then as it was.
        """
        self.flush()
        parts = self._checksums.parts()
        if not parts:
            return
        with contextlib.ExitStack() as stack:
            files = []
            for name in [TOKENS] * (TOKENS in self._checksums.files) + parts:
                path = self._checksums.find(name)
                if path is None:
                    raise ScoreError(f"{self.out / name}: missing, though this run wrote it; {RESTORE}")
                files.append(stack.enter_context(TokenFile(path, self._columns)))
            self._write_tables(TOKENS, self._merged(files), {})

    def _merged(self, files: list[TokenFile]) -> Iterator[TokenTable]:
        """The rows of all files, window by window, each pair checked and in the end whether all are there."""
        groups: dict[int, list[tuple[TokenFile, int]]] = {}
        for file in files:
            for group in range(file.groups):
                for window in sorted({pair // WINDOW for pair in file.pairs(group)}):
                    groups.setdefault(window, []).append((file, group))
        found: list[int] = []
        for window in sorted(groups):
            table = TokenTable.concat([file.table(group) for file, group in groups[window]])
            found += check_rows(table, self.out / TOKENS, self.info)
            yield table
        check_all_there(found, self.info, self.out / TOKENS)

    def close(self) -> None:
        """All is written: the parts, which are in `tokens.parquet` and `pairs.parquet` now, can go."""
        self._checksums.drop(self._checksums.parts())
        try:
            folders.remove(self.out, lambda name: name.startswith(f"{PARTS}/") and is_own_name(name), _is_parts)
        except OSError as error:
            raise ScoreError(f"--out {self.out}: {PARTS} cannot be removed ({error.strerror or error})") from None

    def windows(self) -> Iterator[TokenTable]:
        """The merged results, a window at a time.

        Raises:
            ScoreError: they do not hold every scored pair exactly once.
        """
        with TokenFile(self.out / TOKENS, self._columns) as file:
            yield from windows_of(file, self.info)


def _info(pair: Preference, encoded: Sequence[EncodedAnswer]) -> PairInfo:
    return PairInfo(
        digest(pair),
        max(tokens.length for tokens in encoded),
        (max(tokens.cut_prompt for tokens in encoded), *(tokens.cut_answer for tokens in encoded)),
        tuple(len(tokens.ids) for tokens in encoded),
    )


def rank_folders(out: Path) -> list[Path]:
    """The folders of the ranks of a run of many, as far as they are there."""
    found = sorted((out / RANKS).iterdir()) if (out / RANKS).is_dir() else []
    return [path for path in found if is_rank_folder(f"{RANKS}/{path.name}") and path.is_dir()]


def _parts_of_rank(folder: Path, settings: Mapping[str, Any], advice: str) -> list[Path]:
    """The verified parts in the folder of a rank; none where it was struck before it wrote one."""
    if not (folder / SETTINGS).is_file():
        return []
    if read_settings(folder) != json.loads(as_json(settings)):
        raise ScoreError(f"{folder}: a run with other settings wrote it; {advice}")
    checksums = Checksums.read(folder)
    places = [checksums.find(name, advice) for name in checksums.parts()]
    return [place for place in places if place is not None]


def _is_parts(name: str) -> bool:
    return name == PARTS


def _is_unfinished(out: Path) -> bool:
    """Whether a folder looks like that of a run that has not ended."""
    parts = any((out / PARTS).glob("[0-9]*.parquet"))
    return (out / SETTINGS).is_file() and (parts or not (out / REPORT).is_file())


# --- reading ----------------------------------------------------------------------------------------------------------


class _Sources(NamedTuple):
    """Where results lie: tables of tokens, those of them that say what their pairs are, and the table of pairs."""

    tokens: list[Path]
    parts: list[Path]
    pairs: Path | None


def _sources(out: Path, settings: Mapping[str, Any]) -> _Sources:
    """The files of a run, verified; those of an earlier version, which had no checksums, as they are.

    Raises:
        ScoreError: nothing has been scored yet; a file is missing or was changed.
    """
    if settings["format"] == FORMAT:
        checksums = Checksums.read(out)
        places = {name: checksums.find(name) for name in checksums.files if name not in (SUMMARY, REPORT)}
        missing = [name for name, place in places.items() if place is None]
        if missing:
            raise ScoreError(f"{out}: {folders.some_of(missing)} missing, though the run wrote it; {RESTORE}")
        found = {name: place for name, place in places.items() if place is not None}
    else:
        names = [TOKENS, PAIRS, *(f"{PARTS}/{path.name}" for path in sorted((out / PARTS).glob("*.parquet")))]
        found = {name: out / name for name in names if (out / name).is_file() and is_own_name(name)}
    parts = [found[name] for name in sorted(filter(is_part, found))]
    for folder in rank_folders(out):
        parts += _parts_of_rank(folder, settings, RESTORE)
    tokens = [found[TOKENS], *parts] if TOKENS in found else parts
    if not tokens:
        raise ScoreError(f"{out}: nothing has been scored there yet")
    return _Sources(tokens, parts, found.get(PAIRS))


def read_scores(folder: str | PathLike[str]) -> TokenTable:
    """The results of a finished or interrupted run as one table.

    Args:
        folder: what `qkernels score --out` wrote. One of a version without checksums is read as it is.

    Raises:
        ScoreError: not such a folder, nothing scored in it yet, or a file that is not as it was written.
    """
    out = Path(folder)
    while True:
        before = _noted(out)
        try:
            return _read_scores(out)
        except ScoreError:
            if _noted(out) == before:  # else a run at work has merged its parts meanwhile
                raise


def _noted(out: Path) -> bytes | None:
    try:
        return (out / CHECKSUMS).read_bytes()
    except OSError:
        return None


def _read_scores(out: Path) -> TokenTable:
    settings = read_settings(out)
    sources = _sources(out, settings)
    columns = [*KEYS, *settings["outputs"]]
    info = PairInfos()
    prompts: Mapping[int, Any] = {}
    if sources.pairs is not None:
        info, prompts = read_pairs(sources.pairs, prompts=True)
    tables = []
    for path in sources.tokens:
        with TokenFile(path, columns) as file:
            tables.append(file.table())
            if settings["format"] == FORMAT and path in sources.parts:
                info.update(file.info())
    table = TokenTable.concat(tables)
    if not len(table):
        raise ScoreError(f"{out}: nothing has been scored there yet")
    known = info if settings["format"] == FORMAT else None
    found = check_rows(table, out, known)
    if known is not None:
        check_all_there(found, known, out)
    return TokenTable(table.columns, prompts, settings["special_ids"])


class CachedReference:
    """The reference's log-probs out of an earlier run.

    Args:
        path: its folder, or a Parquet file with the columns pair, side, position, token_id, reference_logps.

    Raises:
        ScoreError: no such results.
    """

    def __init__(self, path: Path):
        import numpy as np
        import pyarrow as pa

        self.path = path
        columns = ["pair", "side", "position", "token_id", "reference_logps"]
        if path.is_dir():
            sources, advice = _sources(path, read_settings(path)).tokens, RESTORE
        elif path.is_file():
            sources, advice = [path], "expected a Parquet file of scores, or the folder of a run"
        else:
            raise ScoreError(f"--reference-logps {path}: no such file or folder")
        tables = []
        for source in sources:
            with TokenFile(source, columns, advice) as file:
                tables.append(file.arrow())
        table = pa.concat_tables(tables, promote_options="permissive")
        rejected = np.array(table.column("side").to_pylist(), dtype=object) != SIDES[0]
        answer, position = 2 * table.column("pair").to_numpy() + rejected, table.column("position").to_numpy()
        order = np.lexsort((position, answer))
        # A run that was struck after it had merged its parts has their rows twice.
        same = (np.diff(answer[order]) == 0) & (np.diff(position[order]) == 0)
        order = order[np.concatenate([np.ones(min(1, len(order)), bool), ~same])]
        self._answer = answer[order]
        self._ids = table.column("token_id").to_numpy()[order]
        self._logps = table.column("reference_logps").to_numpy()[order]

    def logps(self, where: str, pair: int, side: str, ids: list[int]) -> np.ndarray:
        """The log-probs of one answer's tokens.

        Raises:
            ScoreError: it is not there, or consists of other tokens.
        """
        import numpy as np

        key = 2 * pair + (side != SIDES[0])
        first, last = np.searchsorted(self._answer, [key, key + 1])
        if first == last:
            raise ScoreError(f"{where}: not among the answers of --reference-logps {self.path}")
        if self._ids[first:last].tolist() != ids:
            raise ScoreError(
                f"{where}: its tokens are not those of --reference-logps {self.path} ({last - first} there, {len(ids)}"
                " here); the same data, tokenizer, template and --max-length are needed"
            )
        return self._logps[first:last]
