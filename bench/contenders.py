"""The same work done by this package and by what people would use instead.

Each contender is a function `(policy, reference, labels) -> loss` on `[2B, T, V]` logits; its backward is part of the
work. Peers are imported as they are published; the eager one repeats what TRL's `selective_log_softmax` does on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

BETA = 0.1
IGNORE = -100


def qkernels_in_place(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    return qkernels.fused_token_dpo(policy, labels, reference_logits=reference, beta=BETA, inplace_backward=True).loss


def qkernels_new_gradient(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    return qkernels.fused_token_dpo(policy, labels, reference_logits=reference, beta=BETA).loss


def dpo(policy_logps: Tensor, reference_logps: Tensor, labels: Tensor) -> Tensor:
    """The sigmoid loss from per-token log-probs, as every trainer writes it.

    Summed in fp32, whatever the log-probs come in: a bf16 sum over a long answer would be off by whole nats.
    """
    mask = labels != IGNORE
    policy, reference = ((logps.float() * mask).sum(-1) for logps in (policy_logps, reference_logps))
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def selective_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Eager per-token log-probs: a loop over sequences, log-sum-exp for fp32 and log-softmax for 16-bit logits."""
    index = labels.clamp_min(0).unsqueeze(-1)
    if logits.dtype == torch.float32:
        selected = logits.gather(-1, index).squeeze(-1)
        return selected - torch.stack([row.logsumexp(-1) for row in logits])
    rows = [F.log_softmax(row, -1).gather(-1, i).squeeze(-1) for row, i in zip(logits, index, strict=True)]
    return torch.stack(rows)


def eager(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        reference_logps = selective_log_softmax(reference, labels)
    return dpo(selective_log_softmax(policy, labels), reference_logps, labels)


def _whole(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    index = labels.clamp_min(0).unsqueeze(-1)
    logps = policy.float().log_softmax(-1).gather(-1, index).squeeze(-1)
    reference_logps = reference.float().log_softmax(-1).gather(-1, index).squeeze(-1)
    return dpo(logps, reference_logps, labels)


@cache
def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_whole)


def trl(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax as published

    with torch.no_grad():
        reference_logps = published(reference, labels.clamp_min(0))
    return dpo(published(policy, labels.clamp_min(0)), reference_logps, labels)


def liger(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """Liger has no loss from logits. Its DPO loss takes hidden states and the head's weight, so the logits stand in for
    hidden states and an operator that passes them through stands in for the weight: everything after the product is
    Liger's own code on the same numbers, and the product costs nothing."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    head = _PassThrough(policy.shape[-1])
    liger_loss = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, compute_nll_loss=False, compiled=False)
    loss, _ = liger_loss(head, policy, labels, ref_input=reference, ref_weight=head)
    return loss


class _PassThrough:
    """A weight whose product with the logits is the logits."""

    requires_grad = False

    def __init__(self, vocab: int):
        self.shape = (vocab, vocab)

    def t(self) -> _PassThrough:
        return self

    def __rmatmul__(self, logits: Tensor) -> Tensor:
        return logits


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _eager_entropy() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def call(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logps = logits.float().log_softmax(-1)
        return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)

    return call


def _qkernels_entropy() -> Callable[[Tensor, Tensor], qkernels.TokenStats]:
    return lambda logits, labels: qkernels.token_stats(logits, labels, outputs=("logps", "entropy"))


def _trl_entropy() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from trl.trainer.utils import entropy_from_logits
    from trl.trainer.utils import selective_log_softmax as published

    return lambda logits, labels: (published(logits, labels), entropy_from_logits(logits))


def _trl_kernel() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from trl.trainer.utils import selective_log_softmax_and_entropy as published

    return lambda logits, labels: published(logits, labels)


# Log-probs and entropy in one go: name -> how to get a function of (logits, labels); ImportError where it is missing.
ENTROPY: dict[str, Callable[[], Callable[[Tensor, Tensor], object]]] = {
    "qkernels": _qkernels_entropy,
    "eager torch": _eager_entropy,
    "TRL": _trl_entropy,
    "TRL, logprob_entropy": _trl_kernel,
}

# Name -> (loss, the package it needs). The first is what the others are compared with.
CONTENDERS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "qkernels, in place": (qkernels_in_place, "qkernels"),
    "qkernels, new gradient": (qkernels_new_gradient, "qkernels"),
    "torch.compile": (lambda *tensors: compiled()(*tensors), "torch"),
    "eager torch": (eager, "torch"),
    "TRL": (trl, "trl"),
    "Liger": (liger, "liger_kernel"),
}
