"""verl's fused heads, computed by this package: log-probs and entropy of the labels from hidden states."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from ...functional.hidden import linear_token_stats
from ..patches import Patch

# Module -> the callable with its parameters, as verl 0.5 to 0.9.1 has them.
TRITON, TORCH = "verl.utils.kernel.linear_cross_entropy", "verl.utils.experimental.torch_functional"
SIGNATURES = {
    (TRITON, "LinearCrossEntropy.forward"): (
        "ctx",
        "hidden",
        "weight",
        "labels",
        "temperature",
        "reduction",
        "dist_process_group",
    ),
    (TORCH, "FusedLinearForPPO.forward"): ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
}

_installed: Patch | None = None


def log_probs_and_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of its row, `[...]` fp32 and differentiable, of `hidden [..., H]`."""
    stats = linear_token_stats(
        hidden, weight, labels.long(), outputs=("logps", "entropy"), temperature=temperature, ignore_index=-100
    )
    assert stats.logps is not None and stats.entropy is not None
    return stats.logps, stats.entropy


def install() -> Patch:
    """Replace verl's heads in this process, until `uninstall`; calling it again changes nothing.

    Returns:
        The patch. It is empty, with one warning that names the versions, where verl's functions are not the ones that
        this package knows; verl then uses its own.

    Raises:
        ImportError: verl is not installed.
    """
    global _installed
    if _installed is not None:
        return _installed
    patch = Patch()
    modules = {name: importlib.import_module(name) for name in (TRITON, TORCH)}
    unknown = _unknown(modules)
    if unknown:
        version = importlib.metadata.version("verl")
        warnings.warn(f"qkernels: verl {version} keeps its own heads: {'; '.join(unknown)}", stacklevel=2)
        return patch
    stock = modules[TRITON].linear_cross_entropy
    stock_forward = modules[TORCH].FusedLinearForPPO.forward

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """verl's `linear_cross_entropy`: `(log_probs, entropy)`, one per token.

        Megatron sums dL/dhidden over tensor-parallel ranks itself, which this package would do once more: with a group
        of several ranks, for a reduced result and for a temperature per token verl's own function runs.
        """
        ranks = 1 if dist_process_group is None else torch.distributed.get_world_size(dist_process_group)
        if ranks > 1 or reduction.lower() != "none" or not isinstance(temperature, (int, float)):
            return stock(hidden, weight, labels, temperature, reduction, dist_process_group)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return log_probs_and_entropy(flat, weight, labels.reshape(-1), temperature)

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """verl's `FusedLinearForPPO.forward`: `(log_probs, entropy)` in fp32, shaped like `input_ids`."""
        if not isinstance(temperature, (int, float)):
            return stock_forward(self, hidden_states, vocab_weights, input_ids, temperature)
        return log_probs_and_entropy(hidden_states, vocab_weights, input_ids, temperature)

    patch.set(modules[TRITON], "linear_cross_entropy", linear_cross_entropy)
    patch.set(modules[TORCH].FusedLinearForPPO, "forward", forward)
    _installed = patch
    return patch


def uninstall() -> None:
    """Put verl's own heads back; does nothing if ours are not in place."""
    global _installed
    if _installed is not None:
        _installed.undo()
        _installed = None


def _unknown(modules: dict[str, Any]) -> list[str]:
    """What differs from the signatures that this package knows."""
    differences = []
    for (module, path), parameters in SIGNATURES.items():
        holder, name = path.split(".")
        function = getattr(getattr(modules[module], holder, None), name, None)
        found = None if function is None else tuple(inspect.signature(function).parameters)
        if found != parameters:
            differences.append(f"{module}.{path} takes {found}, known is {parameters}")
    return differences
