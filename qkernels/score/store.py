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

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

# One scored answer of a pair: side, tokens, results.
Scored = tuple[str, EncodedAnswer, Mapping[str, "np.ndarray"]]


class Results:
    """The folder of one run.

    Args:
        out: the folder.
        settings: what results depend on; plain JSON values.

    Attributes:
        done: numbers of the pairs whose scores lie in the folder.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self.settings = out, dict(settings)
        self.done: set[int] = set()
        self._waiting: dict[int, list[Scored]] = {}
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
            unfinished = (out / PARTS).is_dir()
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
        self.write(SETTINGS, _json(self.settings))

    def _take_up(self) -> None:
        try:
            earlier = json.loads((self.out / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ScoreError(
                f"--out {self.out}: {SETTINGS} is damaged ({error}); start over with --overwrite"
            ) from None
        now = json.loads(_json(self.settings))
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
        for source in self._sources():
            self.done.update(int(pair) for pair in _read(source, ["pair"]).column("pair").unique().to_pylist())

    # --- adding -----------------------------------------------------------------------------------------------------

    def add(self, pair: int, answers: Iterable[Scored]) -> None:
        """Keep a scored pair; it is on disk after the next `flush`, which comes by itself every 20 seconds."""
        self._waiting[pair] = list(answers)
        self._tokens_waiting += sum(len(encoded.ids) for _, encoded, _ in self._waiting[pair])
        if self._tokens_waiting >= _FLUSH_TOKENS or time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is kept in memory."""
        if self._waiting:
            windows: dict[int, list[int]] = {}
            for pair in sorted(self._waiting):
                windows.setdefault(pair // WINDOW, []).append(pair)
            tables = [
                TokenTable.of_answers((pair, *answer) for pair in pairs for answer in self._waiting[pair])
                for pairs in windows.values()
            ]
            cuts = {
                pair: cut
                for pair, answers in self._waiting.items()
                if any(cut := [answers[0][1].cut_prompt, *(encoded.cut_answer for _, encoded, _ in answers)])
            }
            last = max((int(part.stem) for part in (self.out / PARTS).glob("[0-9]*.parquet")), default=-1)
            self._write_tables(self.out / PARTS / f"{last + 1:06d}.parquet", tables, cuts)
            self.done.update(self._waiting)
            self._waiting, self._tokens_waiting = {}, 0
        self._flushed = time.monotonic()

    def _write_tables(self, path: Path, tables: Iterable[TokenTable], cuts: Mapping[int, list[int]]) -> None:
        """One row group per table."""
        import pyarrow.parquet as pq

        def write(temporary: Path) -> None:
            writer = None
            try:
                for table in tables:
                    rows = table.to_arrow()
                    if writer is None:
                        text = json.dumps({"cuts": cuts}, separators=(",", ":"))
                        writer = pq.ParquetWriter(temporary, rows.schema.with_metadata({_METADATA: text}))
                    writer.write_table(rows, row_group_size=max(1, len(rows)))
            finally:
                if writer is not None:
                    writer.close()

        self._replace(path, write)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder."""
        self._replace(self.out / name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _replace(self, path: Path, write: Callable[[Path], Any]) -> None:
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
        try:
            write(temporary)
            with temporary.open("rb") as written:
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
        if not any((self.out / PARTS).iterdir()):
            return
        groups: dict[int, list[tuple[Any, int]]] = {}
        files = []
        for source in self._sources():
            file = _open(source)
            files.append(file)
            for group in range(file.num_row_groups):
                first = file.read_row_group(group, ["pair"]).column("pair")[0].as_py()
                groups.setdefault(first // WINDOW, []).append((file, group))
        tables = (
            TokenTable.concat([TokenTable.from_arrow(file.read_row_group(group)) for file, group in groups[window]])
            for window in sorted(groups)
        )
        self._write_tables(self.out / TOKENS, tables, self.cuts())
        for file in files:
            file.close()
        shutil.rmtree(self.out / PARTS)
        (self.out / PARTS).mkdir()

    def close(self) -> None:
        """The run is complete: the folder of parts goes."""
        shutil.rmtree(self.out / PARTS)

    def cuts(self) -> dict[int, list[int]]:
        """Tokens cut off prompt, chosen and rejected answer, of the pairs that were cut."""
        found = {}
        for source in self._sources():
            metadata = _open(source).schema_arrow.metadata or {}
            text = metadata.get(_METADATA)
            found.update({int(pair): cut for pair, cut in json.loads(text)["cuts"].items()} if text else {})
        return found

    def windows(self) -> Iterator[TokenTable]:
        """The merged results, a window at a time."""
        file = _open(self.out / TOKENS)
        for group in range(file.num_row_groups):
            yield TokenTable.from_arrow(file.read_row_group(group))

    def _sources(self) -> list[Path]:
        merged = self.out / TOKENS
        parts = sorted((self.out / PARTS).glob("*.parquet")) if (self.out / PARTS).is_dir() else []
        return ([merged] if merged.is_file() else []) + [p for p in parts if not p.name.startswith(_TEMPORARY)]


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ScoreError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it to score it again"
        ) from error


def _read(path: Path, columns: list[str]) -> Any:
    file = _open(path)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise ScoreError(f"{path}: expected the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    return file.read(columns)


def _json(value: Any) -> str:
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
    sources = Results(out, settings)._sources()
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
            sources = Results(path, {})._sources()
            if not sources:
                raise ScoreError(f"--reference-logps {path}: no results in that folder")
        elif path.is_file():
            sources = [path]
        else:
            raise ScoreError(f"--reference-logps {path}: no such file or folder")
        import pyarrow as pa

        table = pa.concat_tables([_read(source, columns) for source in sources], promote_options="permissive")
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
