"""Ranks that work on one call together: their groups, that they agree on the call, and the sums they share.

`tp_group` splits the vocabulary (`qkernels.distributed.vocab_parallel`), `sp_group` the positions of each
sequence. Every collective is started in this file.

Ranks that disagree (other shapes, other options, an error on one of them) would wait for each other forever. So they
compare 32 bytes before the first result is exchanged: on every call with tensors on the CPU, where that is one small
message more; on a GPU, where the host would have to wait, on the first call of each kind and shape, or on every call
with QKERNELS_CHECK=1.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import checks
from ..core.memory import free_memory
from .fingerprint import NOTHING, Fingerprint, SequencesFingerprint, digest

# What the ranks of a group have agreed on before, by fingerprint of the call.
_agreed: weakref.WeakKeyDictionary[Any, dict[int, list[Part]]] = weakref.WeakKeyDictionary()


def all_reduce_(values: Tensor, how: str, group: Any) -> Tensor:
    """Sum or maximum over the ranks, in place."""
    dist.all_reduce(values, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
    return values


def all_reduce_start_(values: Tensor, group: Any) -> Callable[[], Tensor]:
    """Start to sum over the ranks, in place; the returned call waits and gives the tensor."""
    work = dist.all_reduce(values, group=group, async_op=True)

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return values

    return finish


class SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a group. Every rank makes the same loss of it: the gradient of its own part is that of the
    sum, and counts once. With `apart` each rank makes losses of its own of it, and their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any, apart: bool = False) -> Tensor:
        ctx.group = group if apart else None
        return sum_over_ranks(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.group is None else sum_over_ranks(grad, ctx.group), None, None


def sum_over_ranks(values: Tensor, group: Any) -> Tensor:
    """A new tensor: the sum over the ranks."""
    return all_reduce_(values.clone(memory_format=torch.contiguous_format), "sum", group)


def gather_vectors(values: Tensor, group: Any) -> Tensor:
    """The vectors of all ranks, which may differ in length, one after the other, on every rank; no gradient."""
    values = values.detach().contiguous()
    ranks = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(ranks)]
    dist.all_gather(lengths, lengths[0].new_tensor([values.shape[0]]), group=group)
    known = [int(length) for length in lengths]
    padded = values.new_zeros(max(known))
    padded[: values.shape[0]] = values
    found = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(found, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(found, known, strict=True)])


class SequenceShard(NamedTuple):
    """Which part of the positions this rank holds: those after the parts of all lower ranks.

    group: the process group.
    rank, ranks: this rank's number, and how many there are.
    apart: whether each rank uses the sums for losses of its own rows, not all of them for the same loss.
    """

    group: Any
    rank: int
    ranks: int
    apart: bool = False

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, differentiable."""
        total: Tensor = SumOverRanks.apply(values, self.group, self.apart)
        return total

    def for_rows(self) -> SequenceShard:
        """The same for sums that enter the losses of single rows."""
        return self._replace(apart=True)

    def before(self, values: Tensor) -> Tensor:
        """Sum over the lower ranks; no gradient."""
        slots = values.new_zeros(self.ranks, *values.shape)
        slots[self.rank] = values
        return sum_over_ranks(slots, self.group)[: self.rank].sum(0)

    def gather(self, values: Tensor) -> Tensor:
        """Vectors of any lengths, those of all ranks one after the other; no gradient."""
        return gather_vectors(values, self.group)

    def largest(self, value: Tensor) -> Tensor:
        """The largest over the ranks; no gradient."""
        return all_reduce_(value.detach().clone(), "max", self.group)


def _is_mesh(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.device_mesh")
    return module is not None and isinstance(value, module.DeviceMesh)


def process_group(value: Any, name: str) -> Any:
    """A process group that this rank is a member of, from a group or a 1-D `DeviceMesh`.

    Raises:
        TypeError: neither of the two.
        ValueError: torch.distributed is not initialized; a mesh of more dimensions; not a member.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{name} needs torch.distributed: call torch.distributed.init_process_group first")
    if _is_mesh(value):
        if value.ndim != 1:
            raise ValueError(
                f"{name} must be a process group or a 1-D DeviceMesh, got a mesh of {value.ndim} dimensions"
            )
        value = value.get_group()
    if isinstance(value, int) and value == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: rank {dist.get_rank()} is not a member of this process group")
    if not isinstance(value, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup or a 1-D DeviceMesh, got {type(value).__name__}"
        )
    if dist.get_rank(value) < 0:
        raise ValueError(f"{name}: rank {dist.get_rank()} is not a member of this process group")
    return value


def _backends(group: Any) -> dict[str, str]:
    """Device type -> backend of a group."""
    return dict(entry.split(":") for entry in dist.get_backend_config(group).split(",") if ":" in entry)


def _check_backend(group: Any, name: str, device: torch.device) -> None:
    backends = _backends(group)
    if device.type not in backends:
        has = ", ".join(f"{backend} for {kind}" for kind, backend in backends.items())
        raise ValueError(f"{name} cannot send tensors on {device}: it has {has}")
    if device.type == "cuda" and backends["cuda"] == "gloo":
        raise ValueError(
            f"{name} would send tensors on {device} through gloo, on the host; use a group of backend nccl"
        )


class Part(NamedTuple):
    """What a rank sends to the others.

    failed: whether it has an error of its own to raise.
    width: columns of the vocabulary that it holds (0 for positions).
    free: bytes of memory that it has for a chunk.
    fingerprint: of what has to be the same everywhere.
    """

    failed: int
    width: int
    free: int
    fingerprint: int


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _exchange(
    group: Any, name: str, numbers: tuple[int, int], facts: Mapping[str, Any], device: torch.device, error: str = ""
) -> list[Part]:
    """Exchange 32 bytes, and more only if something is wrong.

    Args:
        group, name: which, and the argument that it came as.
        numbers: width and free memory of a `Part`.
        facts: those of a `Fingerprint`, by their words.
        device: of the call's tensors.
        error: of this rank.

    Raises, unless this rank brings an `error` of its own:
        RuntimeError: another rank failed.
        ValueError: the ranks disagree; the message says on what.
    """
    # On the CPU where the group can: no GPU has to be waited for. Otherwise where the tensors are; the current device
    # may be another.
    on_cpu = "cpu" in _backends(group)
    own = torch.tensor(
        [bool(error), *numbers, digest(facts)], dtype=torch.int64, device=torch.device("cpu") if on_cpu else device
    )
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    parts = [Part(*row) for row in torch.stack(gathered).tolist()]
    failed = [rank for rank, part in enumerate(parts) if part.failed]
    if not failed and len({part.fingerprint for part in parts}) == 1:
        return parts
    # Every rank sees the same parts, so all of them come here.
    details: list[Any] = [None] * len(parts)
    with contextlib.nullcontext() if on_cpu else torch.cuda.device(device):  # objects travel by the current device
        dist.all_gather_object(details, error or {key: repr(value) for key, value in facts.items()}, group=group)
    if error:
        return parts
    if failed:
        raise RuntimeError(f"{_listed(failed[:1])} of {name} failed: {details[failed[0]]}")
    keys = dict.fromkeys(key for other in details for key in other)
    key = next(key for key in keys if len({other.get(key) for other in details}) > 1)
    by_value: dict[str, list[int]] = {}
    for rank, other in enumerate(details):
        by_value.setdefault(other.get(key, "absent"), []).append(rank)
    values = " and ".join(f"{value} on {_listed(ranks)}" for value, ranks in by_value.items())
    raise ValueError(f"the ranks of {name} disagree: {key} is {values}")


class Ranks:
    """The groups of one call, as a context in which its arguments are checked and agreed on.

    An error on one rank before the agreement is raised on all: as itself there, as a RuntimeError that quotes it
    elsewhere.

    Args:
        tp_group, sp_group: process groups (or 1-D meshes), or None.
        device: of the tensors.
        hint: added to what `tp_group`'s ranks disagree on.
    """

    def __init__(self, tp_group: Any, sp_group: Any, device: torch.device, hint: str = ""):
        self.device, self._hint = device, hint
        given = {"tp_group": tp_group, "sp_group": sp_group}
        groups = {name: process_group(group, name) for name, group in given.items() if group is not None}
        # A rank alone has nobody to agree with.
        self.groups = {name: group for name, group in groups.items() if dist.get_world_size(group) > 1}
        self._waiting = list(self.groups)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception) and self._every_call():  # else the others may not be listening
            for name in self._waiting:
                with contextlib.suppress(Exception):  # a group that cannot send must not hide the reason
                    told = f"{type(error).__name__}: {error}"
                    _exchange(self.groups[name], name, (0, 0), {}, self.device, error=told)

    def _every_call(self) -> bool:
        return self.device.type == "cpu" or checks.asked_to_check()

    def agree(self, name: str, fingerprint: Fingerprint, width: int = 0, chunked: bool = False) -> list[Part]:
        """Compare a call with the other ranks of a group, and return what each of them brings.

        Args:
            name: "tp_group" or "sp_group".
            fingerprint: what has to be the same; checksums are compared where ranks exchange something.
            width: columns of the vocabulary that this rank holds.
            chunked: whether to say how much memory is free.
        """
        group = self.groups[name]
        _check_backend(group, name, self.device)
        self._waiting.remove(name)
        facts = fingerprint.facts()
        known: dict[int, list[Part]] | None = None
        if not self._every_call():
            known = _agreed.setdefault(group, {})
            call = digest({**facts, "own width": width})
            if call in known:
                return known[call]
        facts |= fingerprint.checksums()
        try:
            free = free_memory(self.device) if chunked else 0
            parts = _exchange(group, name, (width, free), facts, self.device)
        except ValueError as error:
            raise ValueError(f"{error}{self._hint if name == 'tp_group' else ''}") from None
        if known is not None:
            known[call] = parts
        return parts

    def sequence_shard(self, sequences: int, dtype: torch.dtype, options: Fingerprint | None) -> SequenceShard | None:
        """Agree with the other ranks of `sp_group` on a loss; None without one. See `SequencesFingerprint`."""
        if "sp_group" not in self.groups:
            return None
        self.agree("sp_group", SequencesFingerprint(sequences=sequences, dtype=dtype, options=options or NOTHING))
        group = self.groups["sp_group"]
        return SequenceShard(group, dist.get_rank(group), dist.get_world_size(group))


_ALONE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def ranks(tp_group: Any, sp_group: Any, of: Any, hint: str = "") -> contextlib.AbstractContextManager[Ranks | None]:
    """The context of a call; one that does nothing where no group was given."""
    if tp_group is None and sp_group is None:
        return _ALONE
    return Ranks(tp_group, sp_group, of.device if isinstance(of, Tensor) else torch.device("cpu"), hint)


_FSDP = (
    ". (A tensor sharded over one mesh dimension is taken for a part of the vocabulary. A weight that FSDP shards is"
    " gathered inside its module's forward; elsewhere call its module's unshard() first)"
)


def any_dtensor(*values: Any) -> bool:
    """Whether one of the values is a DTensor."""
    # None can exist before its module has been imported, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(value, module.DTensor) for value in values)


def to_local(tp_group: Any, **tensors: tuple[Any, int | None]) -> tuple[Any, str, list[Any]]:
    """Local tensors for DTensors; other values as they are.

    Args:
        tp_group: the caller's, or None.
        tensors: by argument name: the value, and the dimension that the vocabulary has in it (None if it has none).

    Returns:
        The group over which the vocabulary is split, a hint for disagreements over it, and the local values. Their
        gradients come back as DTensors of the same placements.

    Raises:
        TypeError: a DTensor that is neither whole on every rank nor split in the vocabulary over one mesh dimension.
        ValueError: DTensors split over different groups, or a whole one with a `tp_group`.
    """
    if not any_dtensor(*(value for value, _ in tensors.values())):
        return tp_group, "", [value for value, _ in tensors.values()]
    module = sys.modules["torch.distributed.tensor"]
    group, hint, local = tp_group, "", []
    for name, (value, dim) in tensors.items():
        if not isinstance(value, module.DTensor):
            local.append(value)
            continue
        placements, mesh = value.placements, value.device_mesh
        if all(placement.is_replicate() for placement in placements):
            if dim is not None and tp_group is not None:
                raise ValueError(f"{name} is whole on every rank, but tp_group means that each holds some columns")
        elif dim is not None and mesh.ndim == 1 and placements[0] == module.Shard(dim % value.ndim):
            own = mesh.get_group()
            if torch.compiler.is_compiling():
                raise RuntimeError(f"{name} is a DTensor: inside torch.compile say so with tp_group as well")
            if group is None:
                group, hint = own, _FSDP
            elif dist.get_process_group_ranks(process_group(group, "tp_group")) != dist.get_process_group_ranks(own):
                raise ValueError(f"{name} is sharded over another group than tp_group or the other tensors")
        else:
            where = "replicated" if dim is None else f"replicated, or sharded in dimension {dim} over a 1-D mesh"
            raise TypeError(
                f"{name} is a DTensor with placements {tuple(placements)} on a mesh of {mesh.ndim} dimensions; expected"
                f" it {where}. Redistribute it{'' if dim is None else _FSDP}"
            )
        local.append(value.to_local())
    return group, hint, local


def rank_of(group: Any) -> int:
    """This rank's number in a group."""
    return dist.get_rank(group)
