"""Policy losses and losses without pairs or reference, from hidden states, by this package and by what people use.

Each contender is a function `(hidden [S, T, H], weight [V, H], labels [S, T]) -> loss`; its backward is part of the
work. Peers are called as they are published, Liger without `torch.compile`, which takes longer than the work on a CPU.
TRL's trainers take the log-probs of their fused head and these formulas; its CPO and ORPO trainers store the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

from .contenders import BETA, IGNORE, selective_log_softmax
from .linear_work import Loss

KL = 0.02
EPSILON, CISPO_CAP, GAMMA = 0.2, 5.0, 0.5


class Batch(NamedTuple):
    """What the losses read besides hidden states, head and labels.

    advantages: `[S]`.
    old_logps: `[S, T]`, within the clip: no row loses its gradient to it.
    desirable: bool `[S]`.
    """

    advantages: Tensor
    old_logps: Tensor
    desirable: Tensor

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Batch:
        own = qkernels.linear_token_logps(hidden, weight, labels)
        noise = torch.rand(own.shape, generator=torch.Generator().manual_seed(1))
        signs = torch.ones(hidden.shape[0])
        signs[1::2] = -1
        return Batch(signs, own + 0.1 * (noise - 0.5), signs > 0)

    def half_idle(self) -> Batch:
        """The same with half of the sequences' advantages 0."""
        advantages = self.advantages.clone()
        advantages[: len(advantages) // 2] = 0
        return self._replace(advantages=advantages)


Formula = Callable[[Tensor, Batch], Tensor]


def grpo(logps: Tensor, batch: Batch) -> Tensor:
    ratio = torch.exp(logps - batch.old_logps)
    a = batch.advantages.unsqueeze(1)
    return -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a).mean(1).mean()


def cispo(logps: Tensor, batch: Batch) -> Tensor:
    ratio = torch.exp(logps - batch.old_logps).clamp(max=CISPO_CAP).detach()
    return -(ratio * batch.advantages.unsqueeze(1) * logps).mean()


def kto(logps: Tensor, batch: Batch) -> Tensor:
    r = (logps - batch.old_logps).sum(1)
    return torch.where(batch.desirable, 1 - torch.sigmoid(BETA * (r - KL)), 1 - torch.sigmoid(BETA * (KL - r))).mean()


def orpo(logps: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = logps.mean(1).chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -chosen.mean() - BETA * F.logsigmoid(odds).mean()


def simpo(logps: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = logps.mean(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


FORMULAS: dict[str, Formula] = {"grpo": grpo, "cispo": cispo, "kto": kto, "orpo": orpo, "simpo": simpo}
PAIRED = ("orpo", "simpo")


def ours(name: str, batch: Batch) -> Loss:
    """By this package."""
    own = {"gamma": GAMMA} if name == "simpo" else None

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if name in PAIRED:
            return qkernels.fused_linear_token_dpo(
                hidden, weight, labels, reference_logps=0.0, beta=BETA, loss_type=name, loss_kwargs=own
            ).loss
        if name == "kto":
            return qkernels.fused_linear_sequence_loss(
                hidden, weight, labels, batch.desirable, reference_logps=batch.old_logps, kl=KL, beta=BETA
            ).loss
        return qkernels.fused_linear_policy_loss(
            hidden, weight, labels, advantages=batch.advantages, old_logps=batch.old_logps, loss_type=name
        ).loss

    return loss


def eager(name: str, batch: Batch) -> Loss:
    """A linear layer, its logits stored."""
    return lambda hidden, weight, labels: FORMULAS[name](
        selective_log_softmax(F.linear(hidden, weight), labels).float(), batch
    )


def trl(name: str, batch: Batch) -> Loss:
    """TRL's fused head with the formula of its trainer; its CPO and ORPO trainers have none."""
    if name in PAIRED:
        return eager(name, batch)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        logps = ChunkedLogProbFunction.apply(flat, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]
        return FORMULAS[name](logps.view(labels.shape), batch)

    return loss


def liger(name: str, batch: Batch) -> Loss:
    """Liger's chunked losses; its ORPO and KTO average over a chunk of sequences as published."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel import chunked_loss

        how = {"compiled": False, "beta": BETA, "ignore_index": IGNORE}
        if name in ("grpo", "cispo"):
            cap = CISPO_CAP if name == "cispo" else EPSILON
            made = chunked_loss.LigerFusedLinearGRPOLoss(
                beta=0.0, compiled=False, use_ref_model=False, loss_type=name, epsilon_high=cap
            )
            mask = torch.ones_like(labels)
            return made(hidden, weight, labels, mask, batch.advantages, old_per_token_logps=batch.old_logps)[0]
        if name == "orpo":
            return chunked_loss.LigerFusedLinearORPOLoss(**how)(weight, hidden, labels)[0]
        if name == "simpo":
            made = chunked_loss.LigerFusedLinearSimPOLoss(**how, gamma=GAMMA, compute_nll_loss=False)
            return made(weight, hidden, labels)[0]
        # (Its KTO takes a reference as hidden states only, which would cost a GEMM more: reference-free here.)
        made = chunked_loss.LigerFusedLinearKTOLoss(**how, use_ref_model=False)
        return made(hidden, weight, labels, preference_labels=batch.desirable, kl=torch.tensor(KL))[0]

    return loss


# Name -> (loss, the package it needs).
LOSS_CONTENDERS: dict[str, tuple[Callable[[str, Batch], Loss], str]] = {
    "qkernels": (ours, "qkernels"),
    "eager torch, logits stored": (eager, "torch"),
    "TRL": (trl, "trl"),
    "Liger": (liger, "liger_kernel"),
}
