"""The preference loss from hidden states, by this package and by what people would use instead.

Each contender is a function `(hidden [2B, T, H], weight [V, H], labels [2B, T]) -> loss` without a reference (cached
log-probs of 0); its backward is part of the work. Peers are called as they are published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

from .contenders import BETA, IGNORE, dpo, selective_log_softmax
from .linear_work import Loss


def qkernels_by(plan: str, max_chunk_bytes: int | None = None) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return qkernels.fused_linear_token_dpo(
            hidden, weight, labels, reference_logps=0.0, beta=BETA, plan=plan, max_chunk_bytes=max_chunk_bytes
        ).loss

    return loss


def _loss(logps: Tensor, labels: Tensor) -> Tensor:
    return dpo(logps, torch.zeros_like(logps, dtype=torch.float32), labels)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A linear layer, its logits stored, and log-probs as TRL's `selective_log_softmax` takes them."""
    return _loss(selective_log_softmax(F.linear(hidden, weight), labels), labels)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's fused head, as its DPOTrainer applies it: all positions, vocabulary in tiles of 32768."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.clamp_min(0).reshape(-1)
    logps = ChunkedLogProbFunction.apply(flat, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]
    return _loss(logps.view(labels.shape), labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    liger_loss = LigerFusedLinearDPOLoss(
        ignore_index=IGNORE, beta=BETA, compute_nll_loss=False, compiled=False, use_ref_model=False
    )
    return liger_loss(weight, hidden, labels)[0]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own fused head (2.13): cross entropy per token."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses = F.linear_cross_entropy(flat, weight, labels.reshape(-1), ignore_index=IGNORE, reduction="none")
    return _loss(-losses.view(labels.shape), labels)


# Name -> (loss, the package it needs). The first is what the others are compared with.
LINEAR_CONTENDERS: dict[str, tuple[Loss, str]] = {
    "qkernels": (qkernels_by("auto"), "qkernels"),
    "eager torch, logits stored": (eager, "torch"),
    "F.linear_cross_entropy": (linear_cross_entropy, "torch"),
    "TRL": (trl, "trl"),
    "Liger": (liger, "liger_kernel"),
}
