"""Finding a causal language model and its head inside PEFT, DDP, FSDP, DeepSpeed and torch.compile."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The causal language model itself, inside DDP, FSDP, DeepSpeed, torch.compile, PEFT.

    Raises:
        TypeError: `model` is no module, is inside `nn.DataParallel`, or the innermost module has no
            `get_output_embeddings`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner: Any = model
    while True:
        submodules = inner._modules
        if "_orig_mod" in submodules:  # torch.compile
            inner = submodules["_orig_mod"]
        elif _is_peft(inner):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.DataParallel):
            raise TypeError(
                "nn.DataParallel runs copies of the model, whose heads cannot be read; use one process per GPU (DDP)"
            )
        elif not hasattr(type(inner), "get_output_embeddings") and isinstance(submodules.get("module"), nn.Module):
            inner = submodules["module"]  # DDP, DeepSpeed
        elif isinstance(submodules.get("_fsdp_wrapped_module"), nn.Module):
            inner = submodules["_fsdp_wrapped_module"]
        else:
            break
    if not callable(getattr(inner, "get_output_embeddings", None)):
        raise TypeError(
            f"{type(inner).__name__} has no get_output_embeddings(): expected a causal language model of transformers,"
            " bare or inside PEFT, DDP, FSDP or torch.compile"
        )
    result: nn.Module = inner
    return result


def head_module(causal: nn.Module) -> nn.Module:
    """The language model head of an unwrapped model.

    Raises:
        ValueError: an encoder-decoder; a model without one single head.
    """
    config = getattr(causal, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(causal).__name__} is an encoder-decoder; expected a causal language model")
    head = causal.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(causal).__name__}.get_output_embeddings() gives {type(head).__name__}: it has no single language"
            " model head; expected a model such as AutoModelForCausalLM loads"
        )
    return head


def text_config(model: Any) -> Any:
    """The configuration of a model's text part, which is the whole configuration unless it has further modalities."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def peft_wrapper(model: nn.Module) -> nn.Module | None:
    """The PEFT model among a model's wrappers, or None."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if _is_peft(inner):
            return inner
        inner = inner._modules.get("_orig_mod") or inner._modules.get("module")
    return None


def _is_peft(model: nn.Module) -> bool:
    return callable(getattr(type(model), "get_base_model", None)) and hasattr(model, "peft_config")


def is_fsdp2_module(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module itself."""
    return _is_of_fsdp_class(module, "FSDPModule")


def contains_fsdp(model: nn.Module) -> bool:
    """Whether FSDP, of either generation, shards any part of a model."""
    return any(_is_of_fsdp_class(module, "FSDPModule", "FullyShardedDataParallel") for module in model.modules())


def _is_of_fsdp_class(module: nn.Module, *names: str) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was never imported, no module is of its classes
    return fsdp is not None and isinstance(module, tuple(getattr(fsdp, name) for name in names))
