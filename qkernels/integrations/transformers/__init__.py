"""Causal language models of transformers: hidden states, head parameters, and per-token results without stored logits.

    wrappers.py    the causal language model and its head inside PEFT, DDP, FSDP, DeepSpeed and torch.compile
    parameters.py  weight, bias, LoRA adapters, softcap and scale of a head
    requests.py    what one call of a model computes at its head, and the result
    hook.py        the forward hook on the head, and the call of a model through all its wrappers
    stats.py       per-token results and references of a batch

Neither transformers nor PEFT is imported; models are recognised by their attributes.
"""

from __future__ import annotations

from .parameters import HeadParameters, HiddenAndHead, head_parameters
from .stats import (
    batch_labels,
    compute_token_logps,
    compute_token_stats,
    hidden_states,
    model_inputs,
    reference_rows,
)
from .wrappers import unwrap

__all__ = [
    "HeadParameters",
    "HiddenAndHead",
    "batch_labels",
    "compute_token_logps",
    "compute_token_stats",
    "head_parameters",
    "hidden_states",
    "model_inputs",
    "reference_rows",
    "unwrap",
]
