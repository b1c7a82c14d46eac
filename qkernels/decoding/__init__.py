"""Logits processors for transformers' `generate`: other models, or the prompt itself, take part in each next token.

    ProxyTuning             pi ~ pi_base (pi_proxy / pi_ref)^gamma            "From r to Q*", eq. 14
    ImplicitRewardGuidance  pi ~ pi_base exp(weight * beta log(pi / pi_ref))   the implicit reward (11) as guidance
    CopyMixture             (1 - c m) pi_base + c * attention to the prompt    LargePiG (Sun et al. 2024)

They work with greedy search, sampling and beams, in batches padded on the left. An auxiliary model has a KV cache of
its own, whose rows follow the beams; results do not depend on it.

    auxiliary.py  models that follow the rows of a generation; padding of prompts
    log_ratio.py  ProxyTuning, ImplicitRewardGuidance
    copying.py    CopyMixture: presets, pointer, copy probability
    inside.py     hidden states and attention weights of the generating model's own forward
"""

from .copying import CopyMixture, mark_source
from .log_ratio import ImplicitRewardGuidance, MeasuredGuidance, ProxyTuning

__all__ = ["CopyMixture", "ImplicitRewardGuidance", "MeasuredGuidance", "ProxyTuning", "mark_source"]
