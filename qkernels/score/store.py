"""The folder of a scoring run: what is scored stays, whatever happens next; nothing in it is ever half written.

    tokens.parquet   one row per token, in the order of the data; a row group for every 64 pairs
    pairs.parquet    one row per pair: rewards, margin, lengths, cuts, prompt
    summary.json     the figures of the report, and the settings
    report.html
    settings.json    what makes results comparable; a run that resumes must agree
    parts/           while a run is under way or was interrupted: what has been scored

Every file is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data import Preference
from .encode import EncodedAnswer
from .options import ScoreError
from .table import SIDES, TokenTable

if TYPE_CHECKING:
    import numpy as np

TOKENS, PAIRS, SUMMARY, REPORT, SETTINGS, PARTS = (
    "tokens.parquet",
    "pairs.parquet",
    "summary.json",
    "report.html",
    "settings.json",
    "parts",
)
_CONTENTS = (TOKENS, PAIRS, SUMMARY, REPORT, SETTINGS, PARTS)
_TEMPORARY = ".partial-"
WINDOW = 64  # pairs that are batched together, and that share a row group
_FLUSH_SECONDS, _FLUSH_TOKENS = 20.0, 1_000_000
_METADATA = b"qkernels"
_ADVICE = "delete it to score it again"
CUT_COLUMNS = ("prompt_cut", "chosen_cut", "rejected_cut")

# One scored answer of a pair: side, tokens, results.
Scored = tuple[str, EncodedAnswer, Mapping[str, "np.ndarray"]]


class PairInfo(NamedTuple):
    """What a scored pair was, to tell on resuming whether it still is the same.

    digest: of its texts.
    longest: tokens of its longer sequence, after any cut.
    cuts: tokens cut off the prompt, the chosen and the rejected answer.
    """

    digest: str
    longest: int
    cuts: tuple[int, int, int]


def digest(pair: Preference) -> str:
    """What tells one pair's texts from another's."""
    text = json.dumps([pair.prompt, pair.chosen, pair.rejected], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Results:
    """The folder of one run.

    Args:
        out: the folder.
        settings: what results depend on; plain JSON values.

    Attributes:
        info: the pairs whose scores lie in the folder, by number.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self.settings = out, dict(settings)
        self.info: dict[int, PairInfo] = {}
        self._waiting: dict[int, tuple[list[Scored], PairInfo]] = {}
        self._tokens_waiting = 0
        self._flushed = time.monotonic()

    # --- opening ----------------------------------------------------------------------------------------------------

    @staticmethod
    def refuse(out: Path, resume: bool, overwrite: bool) -> None:
        """Say no before anything is loaded.

        Raises:
            ScoreError: `out` is there and may not be touched.
        """
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise ScoreError(f"--out {out}: exists and is not a folder")
        if resume:
            if not (out / SETTINGS).is_file() and any(out.iterdir()):
                raise ScoreError(f"--out {out}: no run to resume there; the folder has no {SETTINGS}")
            return
        if not overwrite:
            parts = any((out / PARTS).glob("[0-9]*.parquet"))
            unfinished = (out / SETTINGS).is_file() and (parts or not (out / REPORT).is_file())
            what = (
                "the folder holds an unfinished run; continue it with --resume" if unfinished else "the folder exists"
            )
            raise ScoreError(f"--out {out}: {what}; choose another one, or replace it with --overwrite")
        foreign = sorted(e.name for e in out.iterdir() if e.name not in _CONTENTS and not e.name.startswith(_TEMPORARY))
        if foreign:
            raise ScoreError(
                f"--out {out}: --overwrite replaces only what an earlier run has written; the folder also holds"
                f" {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}"
            )

    def open(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, or take up what is in it.

        Raises:
            ScoreError: it may not be touched, cannot be written, or holds results of other settings.
        """
        self.refuse(self.out, resume, overwrite)
        try:
            if overwrite and self.out.is_dir():
                for entry in self.out.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            elif resume and (self.out / SETTINGS).is_file():
                self._take_up()
                return
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / PARTS).mkdir(exist_ok=True)
        except OSError as error:
            raise ScoreError(f"--out {self.out}: cannot be written ({error.strerror or error})") from None
        self.write(SETTINGS, as_json(self.settings))

    def _take_up(self) -> None:
        try:
            earlier = json.loads((self.out / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ScoreError(
                f"--out {self.out}: {SETTINGS} is damaged ({error}); start over with --overwrite"
            ) from None
        now = json.loads(as_json(self.settings))
        changed = [
            f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
            for name in sorted({*earlier, *now})
            if earlier.get(name) != now.get(name)
        ]
        if changed:
            raise ScoreError(
                f"--out {self.out}: --resume needs the settings that the run began with: {'; '.join(changed)}"
            )
        (self.out / PARTS).mkdir(exist_ok=True)
        for left in [*self.out.glob(f"{_TEMPORARY}*"), *(self.out / PARTS).glob(f"{_TEMPORARY}*")]:
            left.unlink()
        if (self.out / TOKENS).is_file() and (self.out / PAIRS).is_file():
            rows = _read(self.out / PAIRS, ["pair", "digest", "longest", *CUT_COLUMNS]).to_pylist()
            for row in rows:
                cuts = tuple(row[name] for name in CUT_COLUMNS)
                self.info[row["pair"]] = PairInfo(row["digest"], row["longest"], cuts)  # type: ignore[arg-type]
        for part in self._parts():
            metadata = json.loads((_open(part).schema_arrow.metadata or {}).get(_METADATA, b"{}"))
            for pair, (known, longest, cuts) in metadata.items():
                self.info[int(pair)] = PairInfo(known, longest, tuple(cuts))

    def check(self, pairs: Mapping[int, Preference], max_length: int | None) -> None:
        """Whether what was scored before would be scored the same way now.

        Raises:
            ScoreError: naming the first pair that would not.
        """
        for number, info in sorted(self.info.items()):
            where = f"--out {self.out}: --resume: pair {number} has been scored"
            if number not in pairs:
                raise ScoreError(f"{where}, and the data has only {len(pairs)} pairs now")
            if digest(pairs[number]) != info.digest:
                raise ScoreError(f"{where}, and its texts in the data have changed since")
            if any(info.cuts) if max_length is None else info.longest > max_length:
                raise ScoreError(f"{where} with another --max-length ({info.longest} tokens); it must stay as it was")
            if any(info.cuts) and info.longest != max_length:
                raise ScoreError(f"{where} cut to {info.longest} tokens; --max-length must stay as it was")

    # --- adding -----------------------------------------------------------------------------------------------------

    def add(self, number: int, answers: Iterable[Scored], pair: Preference) -> None:
        """Keep a scored pair; it is on disk after the next `flush`, which comes by itself every 20 seconds."""
        answers = list(answers)
        encoded = [tokens for _, tokens, _ in answers]
        cuts = (max(tokens.cut_prompt for tokens in encoded), encoded[0].cut_answer, encoded[1].cut_answer)
        self._waiting[number] = answers, PairInfo(digest(pair), max(tokens.length for tokens in encoded), cuts)
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
            last = max((int(part.stem) for part in (self.out / PARTS).glob("[0-9]*.parquet")), default=-1)
            self._write_tables(self.out / PARTS / f"{last + 1:06d}.parquet", tables, info)
            self.info |= info
            self._waiting, self._tokens_waiting = {}, 0
        self._flushed = time.monotonic()

    def _write_tables(self, path: Path, tables: Iterable[TokenTable], info: Mapping[int, PairInfo]) -> None:
        """One row group per table; what the pairs were goes into the file's metadata."""
        import pyarrow.parquet as pq

        def write(temporary: Path) -> None:
            writer = None
            try:
                for table in tables:
                    rows = table.to_arrow()
                    if writer is None:
                        metadata = {_METADATA: json.dumps(info, separators=(",", ":"))} if info else None
                        writer = pq.ParquetWriter(temporary, rows.schema.with_metadata(metadata))
                    writer.write_table(rows, row_group_size=max(1, len(rows)))
            finally:
                if writer is not None:
                    writer.close()

        self.replace(path.relative_to(self.out), write)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder."""
        self.replace(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def replace(self, name: str | Path, write: Callable[[Path], Any]) -> None:
        """Write a file of the folder: `write` gets a temporary path, which takes the name when it is complete."""
        path = self.out / name
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
        try:
            write(temporary)
            with temporary.open("r+b") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise ScoreError(f"--out {self.out}: {path.name} cannot be written ({error.strerror or error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    # --- finishing --------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Bring all parts into `tokens.parquet`, in the order of the data, a window in memory at a time."""
        self.flush()
        if not self._parts():
            return
        groups: dict[int, list[tuple[Any, int]]] = {}
        files = []
        for source in self.sources():
            file = _open(source)
            files.append(file)
            for group in range(file.num_row_groups):
                first = file.read_row_group(group, ["pair"]).column("pair")[0].as_py()
                groups.setdefault(first // WINDOW, []).append((file, group))
        tables = (
            TokenTable.concat([TokenTable.from_arrow(file.read_row_group(group)) for file, group in groups[window]])
            for window in sorted(groups)
        )
        self._write_tables(self.out / TOKENS, tables, {})
        for file in files:
            file.close()

    def close(self) -> None:
        """All is written: the parts, which are in `tokens.parquet` and `pairs.parquet` now, can go."""
        shutil.rmtree(self.out / PARTS)

    def windows(self) -> Iterator[TokenTable]:
        """The merged results, a window at a time."""
        file = _open(self.out / TOKENS)
        for group in range(file.num_row_groups):
            yield TokenTable.from_arrow(file.read_row_group(group))

    def _parts(self) -> list[Path]:
        return sorted((self.out / PARTS).glob("[0-9]*.parquet")) if (self.out / PARTS).is_dir() else []

    def sources(self) -> list[Path]:
        """The files that hold results: what earlier runs completed, and parts."""
        merged = self.out / TOKENS
        return [*([merged] if merged.is_file() else []), *self._parts()]


def _open(path: Path, advice: str = _ADVICE) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ScoreError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {advice}") from error


def _read(path: Path, columns: list[str], advice: str = _ADVICE) -> Any:
    file = _open(path, advice)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise ScoreError(f"{path}: expected the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    return file.read(columns)


def as_json(value: Any) -> str:
    """A value as the text of a file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_scores(folder: str | PathLike[str]) -> TokenTable:
    """The results of a finished or interrupted run as one table.

    Args:
        folder: what `qkernels score --out` wrote.

    Raises:
        ScoreError: not such a folder, nothing scored in it yet, or a damaged file.
    """
    out = Path(folder)
    if not (out / SETTINGS).is_file():
        raise ScoreError(f"{out}: not a folder of scores; it has no {SETTINGS}")
    settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    sources = Results(out, settings).sources()
    if not sources:
        raise ScoreError(f"{out}: nothing has been scored there yet")
    table = TokenTable.concat([TokenTable.from_arrow(_open(source).read()) for source in sources])
    prompts = {}
    if (out / PAIRS).is_file():
        pairs = _read(out / PAIRS, ["pair", "prompt"])
        for pair, prompt in zip(pairs.column("pair").to_pylist(), pairs.column("prompt").to_pylist(), strict=True):
            prompts[pair] = [(role, text) for role, text in json.loads(prompt)]
    return TokenTable(table.columns, prompts, settings.get("special_ids", ()))


class CachedReference:
    """The reference's log-probs out of an earlier run.

    Args:
        path: its folder, or a Parquet file with the columns pair, side, position, token_id, reference_logps.

    Raises:
        ScoreError: no such results.
    """

    def __init__(self, path: Path):
        import numpy as np

        self.path = path
        columns = ["pair", "side", "position", "token_id", "reference_logps"]
        if path.is_dir():
            sources, advice = Results(path, {}).sources(), _ADVICE
            if not sources:
                raise ScoreError(f"--reference-logps {path}: no results in that folder")
        elif path.is_file():
            sources, advice = [path], "expected a Parquet file of scores, or the folder of a run"
        else:
            raise ScoreError(f"--reference-logps {path}: no such file or folder")
        import pyarrow as pa

        table = pa.concat_tables([_read(source, columns, advice) for source in sources], promote_options="permissive")
        rejected = np.array(table.column("side").to_pylist(), dtype=object) != SIDES[0]
        pair, position = table.column("pair").to_numpy(), table.column("position").to_numpy()
        order = np.lexsort((position, rejected, pair))
        self._answer = (2 * pair + rejected)[order]
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
