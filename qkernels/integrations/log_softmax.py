"""`patch_log_softmax`: fused log-probs for trainers that compute them from logits.

Older TRL (before 1.16, as ms-swift and axolotl pin it) and what is built on it take the log-probs of the answer tokens
with `trl.trainer.utils.selective_log_softmax(logits, index)`. This replaces that function: one read of the logits in
the forward, no log-softmax of their size, results in fp32 (stock returns bf16 for bf16 logits). Newer TRL never makes
the logits; there `qkernels.integrations.trl.patch_trl` is the better patch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..functional.logits import token_logps
from .patches import Patch, holders

_NAME = "selective_log_softmax"
_PARAMETERS = ("logits", "index")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_log_softmax(logits: Tensor, index: Tensor, *, stock: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """TRL's `selective_log_softmax`, computed by this package where it takes one index per position.

    Args:
        logits: `[..., V]` fp32, bf16, fp16 or fp64.
        index: `[...]` int64, the token of each position; `[..., K]` goes to `stock`, and so does a dtype or a layout
            that this package's kernels do not take.
        stock: TRL's own function.

    Returns:
        `[...]` fp32 (fp64 for fp64 logits), nats, differentiable. It may be changed in place.
    """
    fused = (
        index.shape == logits.shape[:-1]
        and index.dtype == torch.int64
        and logits.dtype in _FLOATS
        and logits.stride(-1) == 1
        and index.numel() > 0
    )
    if not fused:
        return stock(logits, index)
    return token_logps(logits, index).clone()  # torch forbids a change in place of what an autograd function returns


def patch_log_softmax(packages: Sequence[str] = ("trl",)) -> Patch:
    """Replace `selective_log_softmax` in TRL and in every loaded module of some packages that has imported it.

    Args:
        packages: top-level names of the packages whose modules may hold the function, such as `("trl", "swift")`.

    Returns:
        A context manager; `undo()` puts everything back. Empty, with one warning, where the installed TRL has no such
        function of two arguments.
    """
    patch = Patch()
    try:
        stock = vars(importlib.import_module("trl.trainer.utils"))[_NAME]
        found = tuple(inspect.signature(stock).parameters)
    except (ImportError, KeyError) as error:
        warnings.warn(f"qkernels: log-probs stay TRL's own: trl.trainer.utils has no {_NAME} ({error})", stacklevel=2)
        return patch
    if found != _PARAMETERS:
        if getattr(stock, "func", None) is not selective_log_softmax:  # ours, from an earlier call
            warnings.warn(
                f"qkernels: log-probs stay TRL's own: {_NAME} takes {found}, expected {_PARAMETERS}", stacklevel=2
            )
        return patch
    ours = functools.partial(selective_log_softmax, stock=stock)
    for module in holders(stock, _NAME, packages):
        patch.set(module, _NAME, ours)
    return patch
