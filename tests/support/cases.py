"""Made-up batches: logits or hidden states, labels and references of a given shape and dtype, the same everywhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Rows:
    """Logits `[..., V]` with aligned labels; about one row in five is ignored."""

    logits: Tensor
    labels: Tensor
    reference: Tensor
    temperature: float = 1.0

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    seed = 17
    for part in key:
        seed = (seed * 1_000_003 + part) % 2**31
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, key: tuple[int, ...] = ()) -> Tensor:
    """Standard normal fp32 numbers on the CPU."""
    return torch.randn(*shape, generator=generator(*shape, *key))


def make_labels(shape: tuple[int, ...], vocab: int, key: tuple[int, ...] = (), ignored: float = 0.2) -> Tensor:
    """Labels that touch the first and last column and both sides of ignored rows."""
    g = generator(*shape, vocab, *key)
    labels = torch.randint(0, vocab, shape, generator=g)
    labels[torch.rand(shape, generator=g) < ignored] = IGNORE
    flat = labels.view(-1)
    if flat.numel() > 3:
        flat[0], flat[1], flat[2], flat[-1] = vocab - 1, IGNORE, 0, vocab - 1
    return labels


def make_rows(
    shape: tuple[int, ...],
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    temperature: float = 1.0,
    scale: float = 3.0,
    key: tuple[int, ...] = (),
) -> Rows:
    """Policy and reference that differ by about a third, as after some training."""
    logits = scale * normal(*shape, vocab, key=(1, *key))
    reference = 0.9 * logits + 0.4 * scale * normal(*shape, vocab, key=(2, *key))
    labels = make_labels(shape, vocab, key)
    return Rows(logits.to(device, dtype), labels.to(device), reference.to(device, dtype), temperature)


@dataclass
class PairBatch:
    """A preference batch, dense `[2B, T, V]` or packed `[N, V]` with `cu_seqlens`."""

    logits: Tensor
    labels: Tensor
    reference: Tensor
    cu_seqlens: Tensor | None = None


def make_pairs(
    pairs: int,
    length: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    key: tuple[int, ...] = (),
    scale: float = 3.0,
) -> PairBatch:
    """A dense batch: each sequence has a prompt and padding of its own length."""
    rows = make_rows((2 * pairs, length), vocab, dtype, "cpu", key=key, scale=scale)
    labels = make_labels((2 * pairs, length), vocab, key, ignored=0.1)
    g = generator(pairs, length, *key)
    for i in range(2 * pairs):
        prompt = int(torch.randint(0, max(1, length // 4), (), generator=g))
        padding = int(torch.randint(0, max(1, length // 3), (), generator=g))
        labels[i, :prompt] = IGNORE
        labels[i, length - padding :] = IGNORE
        labels[i, length // 2] = min(i, vocab - 1)
    return PairBatch(rows.logits.to(device), labels.to(device), rows.reference.to(device))


def pack(batch: PairBatch, *, keep_ignored: bool = True) -> PairBatch:
    """The same data as one packed row of tokens.

    keep_ignored: leave ignored rows inside the spans; otherwise only valid rows remain.
    """
    keep = torch.ones_like(batch.labels, dtype=torch.bool) if keep_ignored else batch.labels != IGNORE
    lengths = keep.sum(1)
    ends = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=batch.labels.device)
    ends[1:] = lengths.cumsum(0)
    return PairBatch(batch.logits[keep], batch.labels[keep], batch.reference[keep], ends)


@dataclass
class HeadBatch:
    """A preference batch as hidden states: policy and reference, dense `[2B, T, H]` or packed `[N, H]`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    reference_bias: Tensor | None
    cu_seqlens: Tensor | None = None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def valid(self) -> int:
        """Number of rows that count."""
        return int((self.labels != IGNORE).sum())

    def pack(self) -> HeadBatch:
        """The same data as one packed row of tokens, ignored rows included."""
        count, length = self.labels.shape
        ends = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=self.labels.device)
        return dataclasses.replace(
            self,
            hidden=self.hidden.flatten(0, 1),
            reference_hidden=self.reference_hidden.flatten(0, 1),
            labels=self.labels.flatten(),
            cu_seqlens=ends,
        )


def make_head_batch(
    pairs: int,
    length: int,
    size: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    bias: bool = True,
    reference_size: int | None = None,
    key: tuple[int, ...] = (),
    scale: float = 2.0,
) -> HeadBatch:
    """Hidden states of size `size` whose logits have a standard deviation of about `scale`; prompts and padding.

    reference_size: H of the reference, where it is another model; else it is a little trained away from the policy.
    """
    labels = make_pairs(pairs, length, vocab, torch.float32, key=key).labels
    x, w = normal(2 * pairs, length, size, key=(3, *key)), scale * size**-0.5 * normal(vocab, size, key=(4, *key))
    b = normal(vocab, key=(5, *key))
    if reference_size is None:
        rx, rw = (
            0.95 * x + 0.2 * normal(*x.shape, key=(6, *key)),
            w + 0.1 * scale * size**-0.5 * normal(*w.shape, key=(7, *key)),
        )
    else:
        rx = normal(2 * pairs, length, reference_size, key=(6, *key))
        rw = scale * reference_size**-0.5 * normal(vocab, reference_size, key=(7, *key))
    rb = b + 0.1 * normal(vocab, key=(8, *key))
    x, w, b, rx, rw, rb = (t.to(device, dtype) for t in (x, w, b, rx, rw, rb))
    return HeadBatch(x, w, b if bias else None, labels.to(device), rx, rw, rb if bias else None)
