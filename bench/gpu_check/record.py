"""What was measured so far, on disk: `record.json` for the next call, `results.md` to read.

Both are replaced as a whole after every step and every figure, so that a machine that goes away leaves what was
measured until then.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import report

NAME, PAGE = "record.json", "results.md"
# What became of a step. "running" in a record that is read: the call ended in the middle of it.
OK, FAILED, STOPPED, MISSING, RUNNING = "ok", "failed", "stopped", "missing", "running"


class Unusable(Exception):
    """A record that cannot be continued."""


@dataclass
class Outcome:
    """What became of a step.

    state: "ok", "failed", "stopped" (by a time limit), "missing" (a tool is not installed) or "running".
    seconds: how long it ran.
    lines: its result, or the end of its output.
    """

    state: str
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)


@dataclass
class Record:
    """All that the calls on one machine found.

    folder: where it is kept; None for a rehearsal that keeps nothing.
    gpu: name of the device.
    sources: digest of the code that was checked.
    machine: facts about machine and software, of the last call.
    calls: what each call was given and how it ended.
    """

    folder: Path | None
    gpu: str
    sources: str
    machine: dict[str, str]
    calls: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    entries: list[report.Entry] = field(default_factory=list)

    def add(self, entry: report.Entry) -> None:
        """Keep a figure; one of the same work from before is replaced."""

        def name(e: report.Entry) -> tuple[str, ...]:
            return (e.work, e.contender, e.dtype, e.shape)

        self.entries = [old for old in self.entries if name(old) != name(entry)] + [entry]
        self.save()

    def note(self, step: str, outcome: Outcome) -> None:
        self.outcomes[step] = outcome
        self.save()

    def page(self) -> str:
        """Steps and figures as Markdown."""
        lines = [f"# Checked on a GPU: {self.gpu}", ""]
        for number, call in enumerate(self.calls, 1):
            said = [f"budget {call['budget']:g} s", *call["notes"], call.get("ended", "it did not come to its end")]
            lines.append(f"- call {number}, {call['begun']}: {'; '.join(said)}")
        for step, outcome in self.outcomes.items():
            lines += said_of(step, outcome)
        return "\n".join([*lines, "", report.markdown(self.entries, self.machine)]) + "\n"

    def save(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        document = {
            "gpu": self.gpu,
            "sources": self.sources,
            "machine": self.machine,
            "calls": self.calls,
            "steps": {step: asdict(outcome) for step, outcome in self.outcomes.items()},
            "results": [asdict(entry) for entry in self.entries],
        }
        _replace(self.folder / NAME, json.dumps(document, indent=1) + "\n")
        _replace(self.folder / PAGE, self.page())


def said_of(step: str, outcome: Outcome) -> list[str]:
    """What is printed of a step."""
    state = outcome.state if outcome.state == OK else outcome.state.upper()
    return [f"- {step}: {state}, {outcome.seconds:.0f} s", *(f"  - {line}" for line in outcome.lines)]


def _replace(path: Path, text: str) -> None:
    """Write a file so that it always holds either what it held or all of `text`."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(folder: Path) -> Record:
    """The record of an earlier call.

    Raises:
        Unusable: there is none, or it is not one.
    """
    path = folder / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        record = Record(folder, document["gpu"], document["sources"], document["machine"], document["calls"])
        record.outcomes = {step: Outcome(**found) for step, found in document["steps"].items()}
        record.entries = [report.Entry(**found) for found in document["results"]]
    except OSError as error:
        raise Unusable(f"--continue {folder}: no record of an earlier call there ({error})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unusable(f"--continue {folder}: {path.name} is no record of an earlier call ({error!r})") from None
    return record
