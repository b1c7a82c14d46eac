"""The head of a causal language model: weight, bias and LoRA adapters, and what the model does to its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .wrappers import head_module, text_config, unwrap


class HeadParameters(NamedTuple):
    """The head of a causal language model: logits = softcap * tanh(logit_scale * (hidden weight^T + bias) / softcap).

    weight: `[V, H]`, with its gradient.
    bias: `[V]` or None.
    softcap: None for none (Gemma 2 has 30).
    logit_scale: what multiplies the logits before the softcap (Cohere; the inverse of Granite's `logits_scaling`).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The logits themselves, fp32, of a few hidden states: `[..., H]` to `[..., V]`; with token ids `[R, k]`, of
        those alone, `[R, n, H]` to `[R, n, k]`."""
        hidden = hidden.to(self.weight.device, self.weight.dtype)
        bias = self.bias
        if tokens is None:
            logits = nn.functional.linear(hidden, self.weight, bias).float()
        else:
            tokens = tokens.to(self.weight.device)
            logits = (hidden @ self.weight[tokens].transpose(1, 2)).float()
            logits = logits if bias is None else logits + bias[tokens].float()[:, None]
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HiddenAndHead(NamedTuple):
    """Hidden states and the head that belongs to them: logits before scale and softcap are hidden weight^T + bias.

    With LoRA on the head, H is the model's hidden size plus the ranks of the adapters (`hidden_and_adapted_head`).

    hidden: `[B, T, H]`.
    weight: `[V, H]`.
    bias: `[V]` or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def truncated(self, vocab_size: int | None) -> HiddenAndHead:
        """The same with the first entries of the vocabulary only; None for all."""
        if vocab_size is None:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return HiddenAndHead(self.hidden, self.weight[:vocab_size], bias)

    def detached(self) -> HiddenAndHead:
        """The same without gradients to weight and bias."""
        bias = None if self.bias is None else self.bias.detach()
        return HiddenAndHead(self.hidden, self.weight.detach(), bias)


# --- what a model does to its logits -------------------------------------------------------------------------------

# Entries of a configuration that multiply the logits, and those that cap them.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Entries to ignore, by model type: the model applies them before its head (MiniCPM3 divides the hidden states) or
# never (MPT; Gemma 3's vision-language model, while its text model, of type gemma3_text, does).
_IGNORED_ENTRIES = {
    "mpt": ("logit_scale",),
    "minicpm3": ("logits_scaling",),
    "gemma3": ("final_logit_softcapping",),
}


class LogitsTransform(NamedTuple):
    """What a model does to the output of its head: truncate, multiply by a scale, cap.

    softcap: None for none.
    logit_scale: applied before the softcap.
    vocab_size: how many entries of the vocabulary the model keeps; None for all. (Inkling pads its head.)
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    vocab_size: int | None = None

    @staticmethod
    def of(causal: nn.Module) -> LogitsTransform:
        """As the configuration of an unwrapped model says."""
        config: Any = getattr(causal, "config", None)
        if config is None:
            return LogitsTransform()
        text = text_config(causal)
        ignored = _IGNORED_ENTRIES.get(getattr(config, "model_type", ""), ())

        def entry(name: str) -> Any:
            return None if name in ignored else getattr(text, name, None)

        softcaps = [cap for cap in map(entry, _SOFTCAPS) if cap is not None]
        scale = 1.0
        for factor in map(entry, _MULTIPLIERS):
            if isinstance(factor, (int, float)):
                scale *= factor
        if entry("logits_scaling") is not None:
            scale *= text.logits_scaling if text.model_type.startswith("hyperclovax") else 1 / text.logits_scaling
        return LogitsTransform(float(softcaps[0]) if softcaps else None, float(scale), entry("unpadded_vocab_size"))


def check_same_logits_transform(model: nn.Module, reference_model: nn.Module) -> None:
    """Raise ValueError for a reference whose logits are scaled, capped or truncated differently from the policy's."""
    ours, theirs = LogitsTransform.of(unwrap(model)), LogitsTransform.of(unwrap(reference_model))
    if ours != theirs:
        raise ValueError(
            "reference_model must shape its logits as model does: softcap, logit scale and vocabulary size are"
            f" {tuple(ours)} of model and {tuple(theirs)} of reference_model"
        )


# --- weight, bias and adapters -------------------------------------------------------------------------------------


class _LoraAdapter(NamedTuple):
    """One active LoRA adapter of a head: logits += scaling * B(A(dropout(x)))."""

    a: nn.Linear
    b: nn.Linear
    scaling: float
    dropout: nn.Module


class _LinearHead(NamedTuple):
    """The linear layer innermost in a head, and the LoRA adapters around it."""

    weight: Tensor
    bias: Tensor | None
    adapters: list[_LoraAdapter]

    def bias_with(self, adapter: _LoraAdapter, bias: Tensor | None) -> Tensor | None:
        """`bias` plus that of an adapter."""
        if adapter.b.bias is None:
            return bias
        added = (adapter.scaling * adapter.b.bias).to(self.weight.dtype)
        return added if bias is None else bias + added


def _linear_head(head: nn.Module) -> _LinearHead:
    """Look through PEFT's layers down to the linear layer of a head.

    Raises:
        TypeError, ValueError: another module than a linear layer; a quantised one; one on the meta device; an adapter
            that is not LoRA.
    """
    if "modules_to_save" in head._modules and "original_module" in head._modules:
        saved: Any = head.modules_to_save
        active = [name for name in _active_adapters(head) if name in saved]
        if getattr(head, "disable_adapters", False) or not active:
            return _linear_head(head.original_module)  # type: ignore[arg-type]
        return _linear_head(saved[active[0]])
    if "token_adapter" in head._modules:  # trainable tokens of tied embeddings
        layer: Any = head.token_adapter
        _unmerge_if_disabled(layer)
        if layer.disable_adapters or layer.merged or not layer.active_adapters:
            return _linear_head(layer.base_layer)
        return _LinearHead(layer.get_merged_weights(layer.active_adapters), None, [])
    if "base_layer" in head._modules:
        _unmerge_if_disabled(head)
        base = _linear_head(head.base_layer)  # type: ignore[arg-type]
        return _LinearHead(base.weight, base.bias, base.adapters + _lora_adapters(head))
    weight: Any = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or weight is None:
        raise TypeError(
            f"the head is a {type(head).__module__}.{type(head).__qualname__}; expected torch.nn.Linear, or a LoRA"
            " adapter or modules_to_save of PEFT on one. Its forward is not known here; use qkernels.token_stats on the"
            " model's logits"
        )
    if not weight.is_floating_point():
        raise TypeError(f"the head's weight is {weight.dtype}; a quantised head has to be dequantised first")
    if weight.is_meta:
        raise ValueError(
            "the head's weight is on the meta device: it is offloaded, or the model is not loaded yet. Keep the head on"
            " a device (device_map)"
        )
    return _LinearHead(weight, head.bias, [])


def _unmerge_if_disabled(layer: Any) -> None:
    """As PEFT's own forwards do: take a disabled adapter out of the weight that it was merged into."""
    if getattr(layer, "disable_adapters", False) and getattr(layer, "merged", False):
        layer.unmerge()


def _active_adapters(layer: nn.Module) -> list[str]:
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None) or []
    return [active] if isinstance(active, str) else list(active)


def _lora_adapters(layer: nn.Module) -> list[_LoraAdapter]:
    """The active adapters of a PEFT layer that are not merged into its weight."""
    lora_a, lora_b = layer._modules.get("lora_A"), layer._modules.get("lora_B")
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return []
    active = _active_adapters(layer)
    if lora_a is None or lora_b is None:
        if active:
            raise TypeError(
                f"the head carries a {type(layer).__module__}.{type(layer).__name__}; only LoRA (and modules_to_save)"
                " is known on the head. Merge it, or leave the head out of target_modules"
            )
        return []
    found = []
    scaling: Any = layer.scaling
    dropout: Any = layer.lora_dropout
    for name in active:
        if name not in lora_a:  # type: ignore[operator]
            continue
        dora = getattr(layer, "use_dora", {}).get(name, False)
        variant = getattr(layer, "lora_variant", {}).get(name)
        if dora or variant is not None:
            what = "DoRA" if dora else type(variant).__name__
            raise ValueError(
                f"adapter {name!r} on the head is {what}, which is not a sum of weights; use plain LoRA on the head, or"
                " leave the head out of target_modules"
            )
        if getattr(layer, "fan_in_fan_out", False):
            raise ValueError(f"adapter {name!r} on the head has fan_in_fan_out=True; a head is not a Conv1D")
        found.append(_LoraAdapter(lora_a[name], lora_b[name], float(scaling[name]), dropout[name]))  # type: ignore[index]
    return found


def head_parameters(model: nn.Module) -> HeadParameters:
    """Weight, bias, softcap and logit scale of a model's head, as the functions on hidden states take them.

    The weight of a head with LoRA adapters is base + scaling * B A, differentiable in A and B, in the dtype of the
    base; the active adapters count, and none inside `model.disable_adapter()`. (`compute_token_logps` keeps the two
    products apart, as PEFT does, and so loses no digits of a 16-bit base.)

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP or torch.compile.

    Returns:
        `HeadParameters`; the parameters themselves, not copies, unless an adapter adds to them.

    Raises:
        TypeError, ValueError: no single linear head; a quantised head; an adapter that is not a sum of weights (DoRA);
            LoRA dropout on the head that is switched on.
    """
    causal = unwrap(model)
    head = _linear_head(head_module(causal))
    weight, bias = head.weight, head.bias
    for adapter in head.adapters:
        dropout = adapter.dropout
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            raise ValueError(
                "the LoRA adapter on the head has dropout, which has no merged weight: call model.eval(), set"
                " lora_dropout=0, or use compute_token_logps, which applies it"
            )
        delta = adapter.scaling * (adapter.b.weight @ adapter.a.weight)
        weight = weight + delta.to(weight.dtype)
        bias = head.bias_with(adapter, bias)
    transform = LogitsTransform.of(causal)
    if transform.vocab_size is not None:
        weight, bias = weight[: transform.vocab_size], None if bias is None else bias[: transform.vocab_size]
    return HeadParameters(weight, bias, transform.softcap, transform.logit_scale)


def hidden_and_adapted_head(head: nn.Module, hidden: Tensor) -> HiddenAndHead:
    """Hidden states and weights with LoRA folded in by concatenation: [x, A x] and [W, scaling B].

    The logits are those of PEFT's own forward, dropout included, and take one GEMM. Adding scaling * B A to a 16-bit
    weight would round a small adapter away.
    """
    linear = _linear_head(head)
    hidden = hidden.to(linear.weight.device)  # a model split over devices may end on another one than its head
    if not linear.adapters:
        return HiddenAndHead(hidden, linear.weight, linear.bias)
    inputs, weights, bias = [hidden], [linear.weight], linear.bias
    for adapter in linear.adapters:
        low_rank = adapter.a(adapter.dropout(hidden.to(adapter.a.weight.dtype)))
        inputs.append(low_rank.to(hidden.dtype))
        weights.append((adapter.scaling * adapter.b.weight).to(linear.weight.dtype))
        bias = linear.bias_with(adapter, bias)
    return HiddenAndHead(torch.cat(inputs, -1), torch.cat(weights, -1), bias)
