"""The chain rule of the per-row results: upstream gradients of all of them become at most five numbers per row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .fields import DIFFERENTIABLE, field_index

# Order of the per-row coefficients of `row_grad`. A buffer with only the first one stands for the common case in
# which nothing but `logps` is differentiated. With p, q the softmaxes of policy and reference, entry j of a row is
#   temperature * dL/dlogits_j = label * (1[j = y] - p_j) + p_j (p + p_logp * log p_j - p_logq * log q_j) - q * q_j
COEFFICIENTS: tuple[str, ...] = ("label", "p", "p_logp", "p_logq", "q")


def coefficients(stats: torch.Tensor, grads: Mapping[str, torch.Tensor | None], fields: int) -> torch.Tensor:
    """Upstream gradients of the fields -> the coefficients of `row_grad` (chain rule; formulas of each field).

    With H the entropy, K = KL(policy || reference), and upstream gradients g of each output:
      d logps      = g (1[j=y] - p_j)
      d logsumexp  = g p_j
      d entropy    = -g p_j (log p_j + H)
      d KL(ref||pi) = g (p_j - q_j)
      d KL(pi||ref) = g p_j (log p_j - log q_j - K)

    Args:
        stats: `[K, ...]`, what `row_stats` returned for `fields`.
        grads: by name of field, dL/dfield `[...]`; fields without a gradient are None or missing.
        fields: the mask that `stats` was made with.

    Returns:
        `[1, ...]` (only `label`) when nothing but `logps` has a gradient, else `[5, ...]` in the order of
        `COEFFICIENTS`.
    """
    label = grads.get("logps")
    others = [grads.get(name) for name in DIFFERENTIABLE[1:]]
    if label is not None and all(g is None for g in others):
        return label.unsqueeze(0)
    zero = torch.zeros_like(stats[0])
    label = zero if label is None else label
    lse, entropy, kl_ref_policy, kl_policy_ref = (zero if g is None else g for g in others)

    def times_value(g: torch.Tensor, name: str) -> torch.Tensor:
        # A KL divergence may be infinite; where nothing depends on it, it must not turn 0 * inf into NaN.
        if grads.get(name) is None:
            return zero
        return torch.where(g == 0, zero, g * stats[field_index(fields, name)])

    p = lse + kl_ref_policy - times_value(entropy, "entropy") - times_value(kl_policy_ref, "kl_policy_reference")
    return torch.stack([label, p, kl_policy_ref - entropy, kl_policy_ref, kl_ref_policy])
