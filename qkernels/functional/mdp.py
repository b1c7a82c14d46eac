"""The token MDP read off a language model: Q, V, advantages and rewards per token ("From r to Q*", section 4).

State = prompt and tokens so far, action = next token, deterministic, undiscounted. With the logits l of a policy
trained with preferences and temperature 1 (equation numbers of the paper):

    Q(s, a) = beta * l_a        V(s) = beta * logsumexp(l)   (6)        A = Q - V = beta * log pi(a | s)   (5)
    implicit reward  = beta * log(pi / pi_ref)                                                             (11)
    Bellman reward   = Q_t - beta * log pi_ref - V_{t+1},   V = 0 after the last token                     (7)

The implicit reward is the Bellman reward shaped by the potential V (10), so over a sequence they differ by V(s_0).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.printed import summarised
from ..core.sequences import Sequences, log_ratios
from .logits import token_stats


class TokenMDP(NamedTuple):
    """Per-token values, each shaped like `labels`, in units of reward; 0 at ignored rows.

    Q: beta * logit of the label.
    V: beta * logsumexp, the value of the state before the token.
    A: Q - V = beta * log pi(label), the advantage, never above 0.
    implicit_rewards: beta * log(pi / pi_ref).
    bellman_rewards: Q - beta * log pi_ref - V of the next state (0 after the sequence's last valid token).
    """

    Q: Tensor
    V: Tensor
    A: Tensor
    implicit_rewards: Tensor
    bellman_rewards: Tensor

    def __repr__(self) -> str:
        return summarised(self)


def token_mdp_from_logps(
    logps: Tensor,
    logsumexp: Tensor,
    reference_logps: Tensor,
    *,
    beta: float,
    valid: Tensor,
    cu_seqlens: Tensor | None = None,
) -> TokenMDP:
    """The same from per-token results that are at hand: `[S, T]`, or `[N]` with `cu_seqlens`.

    Args:
        logps, logsumexp: of the policy, from `token_stats`.
        reference_logps: log pi_ref(label).
        beta: strength of the KL constraint the policy was trained with.
        valid: bool, the valid rows.
        cu_seqlens: `[2B + 1]`, boundaries of a packed batch.
    """
    shape = logps.shape
    as_rows = (
        (lambda x: x.unsqueeze(0)) if logps.dim() == 1 else (lambda x: x.reshape(math.prod(shape[:-1]), shape[-1]))
    )
    valid = as_rows(valid)
    sequences = Sequences.of(valid, cu_seqlens)
    advantage, value = beta * as_rows(logps), beta * as_rows(logsumexp)
    q = advantage + value
    reference = as_rows(reference_logps)
    implicit = beta * log_ratios(as_rows(logps), reference).masked_fill(~valid, 0.0)
    # r_t = Q_t - beta log pi_ref - V_{t+1}, written as implicit reward + potential difference (10): exact for large V.
    bellman = (implicit + (value - sequences.next_valid(value, valid))).masked_fill(~valid, 0.0)
    return TokenMDP(*(x.view(shape) for x in (q, value, advantage, implicit, bellman)))


def token_mdp(
    logits: Tensor,
    labels: Tensor,
    *,
    reference_logits: Tensor | None = None,
    reference_logps: Tensor | float | None = None,
    beta: float = 0.1,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> TokenMDP:
    """Q, V, A, implicit and Bellman rewards of each token, in one pass over the logits. No gradients.

    Args:
        logits: `[..., T, V]` of the policy, at temperature 1; or packed `[N, V]` with `cu_seqlens`. A plain `[N, V]`
            is one sequence.
        labels: int64 `[..., T]` or `[N]`, aligned with the rows.
        reference_logits: like `logits`.
        reference_logps: instead, cached log pi_ref(label), shaped like `labels`; 0.0 for reference-free.
        beta: strength of the KL constraint the policy was trained with.
        cu_seqlens: int32 `[2B + 1]`, boundaries of a packed batch.
        ignore_index, backend: as in `token_logps`.

    Returns:
        `TokenMDP`.

    Raises:
        As `fused_token_dpo`.
    """
    beta = checks.positive(beta, "beta")
    logits = checks.logits(logits, "logits").detach()
    labels = checks.labels(labels, logits, "logits")
    if (reference_logits is None) == (reference_logps is None):
        raise ValueError("give either reference_logits or reference_logps (cached log-probs; 0.0 for reference-free)")
    cached = reference_logps
    if isinstance(cached, Tensor):
        cached = checks.like(cached, "reference_logps", labels.shape, labels, "labels").detach()
    elif cached is not None and (isinstance(cached, bool) or cached != 0):
        raise ValueError(f"reference_logps must be a tensor or 0.0 (reference-free), got {cached!r}")
    if cu_seqlens is not None:
        cu_seqlens = checks.cu_seqlens(cu_seqlens, labels)
    outputs = ["logps", "logsumexp"] + (["reference_logps"] if cached is None else [])
    stats = token_stats(
        logits, labels, reference_logits=reference_logits, outputs=outputs, ignore_index=ignore_index, backend=backend
    )
    logps, logsumexp, reference = stats.logps, stats.logsumexp, stats.reference_logps
    assert logps is not None and logsumexp is not None
    if reference is None:
        reference = cached.to(logps.dtype) if isinstance(cached, Tensor) else torch.zeros_like(logps)
    return token_mdp_from_logps(
        logps, logsumexp, reference, beta=beta, valid=labels != ignore_index, cu_seqlens=cu_seqlens
    )
