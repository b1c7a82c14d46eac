"""How many rows of a batch are valid: counted on the host, or given by the caller and compared with the labels.

A row is valid if its label is not `ignore_index` and no weight of 0 takes it out. The GEMMs run over valid rows only,
so their number is needed before anything else. On a GPU the host synchronises to learn it, unless the caller gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.sequences import Sequences
from ..distributed.groups import Ranks
from .preference import Batch


class Counts(NamedTuple):
    """The numbers of valid rows of the sequences of a batch.

    known: on the host, `[2B]`; None where the host does not know them, or compiles.
    given: those that the caller has given; None without.
    unchecked: the given ones on the device, `[2B]` int64, where the host has not compared them with the labels.
    """

    known: list[int] | None
    given: list[int] | None
    unchecked: Tensor | None

    @staticmethod
    def of(batch: Batch, given: list[int] | None, checked: bool) -> Counts:
        """Count them, or take the given numbers.

        Args:
            batch: the rows.
            given: `valid_rows` of the caller.
            checked: whether the host has compared them already.
        """
        labels = batch.labels
        if given is None:
            known = None
            if host_can_count(labels):  # on a GPU this is where it synchronises, and only here
                known = [int(n) for n in sums(batch).tolist()]
            return Counts(known, None, None)
        unchecked = None if checked or labels.device.type == "meta" else on_device(given, labels.device)
        return Counts(None if torch.compiler.is_compiling() else given, given, unchecked)

    def wrong(self, batch: Batch) -> Tensor | None:
        """A factor that is NaN if the given numbers are not those of the labels; None if they are known to be right."""
        return None if self.unchecked is None else nan_if((sums(batch) != self.unchecked).any())


def host_can_count(labels: Tensor) -> bool:
    """Whether numbers of rows can be known: not those of meta tensors, nor inside torch.compile."""
    return not torch.compiler.is_compiling() and labels.device.type != "meta"


def sums(batch: Batch) -> Tensor:
    """Valid rows of each sequence, `[2B]` float64, where the rows are."""
    return batch.sequences.here().sums(batch.valid.double())


def check_sizes(given: list[int], sequences: Sequences) -> None:
    """ValueError for numbers of valid rows that no labels of this shape could have."""
    number, length, packed = sequences.number, sequences.length, sequences.offsets is not None
    if len(given) != number:
        raise ValueError(f"valid_rows must have one number for each of the {number} sequences, got {len(given)}")
    for i, n in enumerate(given):
        if n > length:
            raise ValueError(f"valid_rows[{i}] is {n}, but {'the batch' if packed else 'a sequence'} has {length} rows")
    if packed and sum(given) > length:
        raise ValueError(f"valid_rows is {sum(given)} rows in all, but the batch has {length}")


def check_counts(given: list[int], batch: Batch) -> None:
    """ValueError for numbers of valid rows that are not those of the labels; the host reads the labels."""
    for i, (claimed, n) in enumerate(zip(given, sums(batch).tolist(), strict=True)):
        if claimed != n:
            raise ValueError(
                f"valid_rows[{i}] is {claimed}, but {int(n)} rows of sequence {i} are valid (a label that is not"
                " ignore_index, a token weight that is not 0, and with ld_alpha=0 within the pair's shared length)"
            )


def check_number(given: int, labels: Tensor, ignore_index: int) -> Tensor | None:
    """Compare the number of all valid rows with the labels `[N]`.

    Returns:
        None where the host has compared it; else a factor that is NaN if it is wrong.

    Raises:
        ValueError: a number that the labels do not have, or that no labels of this shape could have.
    """
    if given > labels.shape[0]:
        raise ValueError(f"valid_rows is {given}, but there are {labels.shape[0]} rows")
    if labels.device.type == "meta":
        return None
    count = (labels != ignore_index).sum()
    if not checks.readable(labels):
        return nan_if(count != given)
    if int(count) != given:
        raise ValueError(f"valid_rows is {given}, but {int(count)} labels are not ignore_index ({ignore_index})")
    return None


def as_equal(given: int | list[int] | None, ranks: Ranks | None) -> dict[str, Tensor | None]:
    """What ranks compare: a tensor on the CPU, whose values they compare when they agree for the first time."""
    return {} if ranks is None else {"valid_rows": None if given is None else torch.tensor(given, dtype=torch.int64)}


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`[n]` int64. On a GPU a copy from page-locked memory, for which the host does not wait.

    A captured CUDA graph would copy again from memory that has been reused by then: there, and for the compiler, each
    number is an argument of a kernel that writes it.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    return torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])


def nan_if(wrong: Tensor) -> Tensor:
    """A factor `[]`: NaN if `wrong` `[]`, else 1. A factor, not a term: gradients become NaN as well."""
    return torch.ones((), device=wrong.device).masked_fill(wrong, torch.nan)


def times(stats: dict[str, Tensor], factor: Tensor | None) -> dict[str, Tensor]:
    """Per-row results times a factor of `nan_if`."""
    return stats if factor is None else {name: value * factor for name, value in stats.items()}
