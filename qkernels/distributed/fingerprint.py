"""What ranks that work on one call must have alike, each fact declared once, with its type and its words in a message.

Ranks compare 64 bits of all facts. Only if these differ do they exchange the facts themselves, in words, and every rank
raises an error that names the first fact on which they disagree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


def words(text: str) -> dict[str, str]:
    """Metadata of a fact whose name in messages is not that of its attribute; `{name}` stands for another fact."""
    return {"words": text}


@dataclass(frozen=True, eq=False, kw_only=True)
class Fingerprint:
    """Facts that are the same on all ranks, one attribute each. Those of a part of a call are a `Fingerprint` again."""

    def facts(self) -> dict[str, Any]:
        """All of them by their words, in the order of the attributes."""
        found: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Fingerprint):
                more = value.facts()
            else:
                more = {one.metadata.get("words", one.name).format_map(vars(self)): value}
            found = _united(found, more)
        return found

    def checksums(self) -> dict[str, str]:
        """Further facts, which take a pass over tensors."""
        return {}


# Of a call without options that all ranks must have alike.
NOTHING = Fingerprint()


@dataclass(frozen=True, eq=False, kw_only=True)
class CallFingerprint(Fingerprint):
    """Of a call whose vocabulary is split over ranks.

    call: name of the public function.
    options: facts of its options.
    labels: of the whole vocabulary, as the caller shaped them.
    arguments: further arguments by name. Of a tensor ranks compare dtype, shape and whether it requires a gradient,
        and a checksum of its values; a number stands for itself.
    """

    call: str = field(metadata=words("the call"))
    options: Fingerprint
    labels: Tensor
    arguments: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        labels, arguments = found.pop("labels"), found.pop("arguments")
        kinds = {name: _kind(value) for name, value in {"labels": labels, **arguments}.items()}
        return _united(found, {"labels.shape": tuple(labels.shape)}, kinds)

    def checksums(self) -> dict[str, str]:
        arguments = {"labels": self.labels, **self.arguments}
        return {f"the checksum of {name}": _checksum(x) for name, x in arguments.items() if _has_values(x)}


@dataclass(frozen=True, eq=False, kw_only=True)
class SequencesFingerprint(Fingerprint):
    """Of a loss on sequences whose positions are spread over ranks.

    sequences: how many there are.
    dtype: of the rows.
    options: facts of the loss.
    """

    sequences: int = field(metadata=words("number of sequences"))
    dtype: torch.dtype
    options: Fingerprint


def _united(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """All facts; no two may go by the same words, as only one of them would be compared."""
    found = {name: value for part in parts for name, value in part.items()}
    assert len(found) == sum(map(len, parts)), f"two facts by the same words among {[*map(list, parts)]}"
    return found


def digest(facts: Mapping[str, Any]) -> int:
    """64 bits of facts by their words."""
    text = repr(sorted(facts.items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _has_values(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta"


def _kind(value: Any) -> Any:
    """What an argument is: a number itself, of a tensor what can be seen without its values."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Tensor):
        return None if value is None else type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} of shape {tuple(value.shape)}{', requires grad' if value.requires_grad else ''}"


def _checksum(values: Tensor) -> str:
    """A number that other values, or the same ones in another order, hardly have."""
    flat = values.detach().reshape(-1).double()
    return repr(float((flat * torch.arange(1, flat.shape[0] + 1, device=flat.device)).sum()))
