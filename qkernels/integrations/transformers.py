"""Causal language models of transformers: their hidden states, their head, and per-token results without their logits.

How it works. A causal language model ends in `logits = post(lm_head(hidden))`, where `post` is a scale, a soft cap, or
nothing. For the time of a call the head's `forward` is replaced by one that takes the hidden states of all positions,
computes what was asked for, chunk by chunk (`qkernels.functional.hidden`), and hands on a row of
known numbers instead of logits.
The rest of the model's own forward runs as it is, so that

- everything that the model does before its head is in the hidden states (final norm, muP divisions, projections);
- the row of known numbers comes out as `post` made it, and is compared with what the model's configuration was read
  to say: a model whose head does something else is refused, not computed wrongly;
- everything happens inside one call of the outermost module: hooks of DDP and FSDP, autocast and gradient checkpointing
  see an ordinary forward, and the parameters of the head are as they are in one.

Nothing of transformers or PEFT is imported; models are known by what they have.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.hidden import linear_token_dpo, linear_token_stats
from ..functional.logits import shift_labels
from ..functional.results import TokenStats

__all__ = [
    "HeadParameters",
    "batch_labels",
    "compute_token_logps",
    "compute_token_stats",
    "head_parameters",
    "hidden_states",
    "unwrap",
]


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


# --- finding the model inside its wrappers -------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The causal language model itself, inside DDP, FSDP, DeepSpeed, torch.compile, PEFT.

    Raises:
        TypeError: something without `get_output_embeddings` at the bottom.
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


def _is_peft(model: nn.Module) -> bool:
    return callable(getattr(type(model), "get_base_model", None)) and hasattr(model, "peft_config")


def _head_module(causal: nn.Module) -> nn.Module:
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


# --- the head's parameters -----------------------------------------------------------------------------------------


class _Adapter(NamedTuple):
    """One active LoRA adapter of a head: logits += scaling * B(A(dropout(x)))."""

    a: nn.Linear
    b: nn.Linear
    scaling: float
    dropout: nn.Module


def _linear(head: nn.Module) -> tuple[Tensor, Tensor | None, list[_Adapter]]:
    """Weight and bias of the linear layer at the bottom of a head, and the LoRA adapters upon it."""
    if "modules_to_save" in head._modules and "original_module" in head._modules:
        saved: Any = head.modules_to_save
        active = [name for name in _active_adapters(head) if name in saved]
        if getattr(head, "disable_adapters", False) or not active:
            return _linear(head.original_module)  # type: ignore[arg-type]
        return _linear(saved[active[0]])
    if "token_adapter" in head._modules:  # trainable tokens of tied embeddings
        layer: Any = head.token_adapter
        _unmerge_if_off(layer)
        off = layer.disable_adapters or layer.merged or not layer.active_adapters
        return _linear(layer.base_layer) if off else (layer.get_merged_weights(layer.active_adapters), None, [])
    if "base_layer" in head._modules:
        _unmerge_if_off(head)
        base, bias, below = _linear(head.base_layer)  # type: ignore[arg-type]
        return base, bias, below + _lora(head)
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
    return weight, head.bias, []


def _unmerge_if_off(layer: Any) -> None:
    """As PEFT's own forwards do: a switched-off adapter leaves the weight that it was merged into."""
    if getattr(layer, "disable_adapters", False) and getattr(layer, "merged", False):
        layer.unmerge()


def _active_adapters(layer: nn.Module) -> list[str]:
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None) or []
    return [active] if isinstance(active, str) else list(active)


def _lora(layer: nn.Module) -> list[_Adapter]:
    """The active adapters of a PEFT layer that have not been merged into its weight."""
    kind = type(layer).__name__
    lora_a, lora_b = layer._modules.get("lora_A"), layer._modules.get("lora_B")
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return []
    active = _active_adapters(layer)
    if lora_a is None or lora_b is None:
        if active:
            raise TypeError(
                f"the head carries a {type(layer).__module__}.{kind}; only LoRA (and modules_to_save) is known on the"
                " head. Merge it, or leave the head out of target_modules"
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
        found.append(_Adapter(lora_a[name], lora_b[name], float(scaling[name]), dropout[name]))  # type: ignore[index]
    return found


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


# Configuration entries that multiply the logits; those that divide them. A head that finds them applied already
# (MiniCPM3 divides the hidden states) or not at all (MPT) is listed with what it ignores.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_IGNORED_ENTRIES = {
    "mpt": ("logit_scale",),
    "minicpm3": ("logits_scaling",),
    "gemma3": ("final_logit_softcapping",),  # the vision-language model; the text model's type is gemma3_text
}


def _shaping(causal: nn.Module) -> tuple[float | None, float, int | None]:
    """Softcap, logit scale and number of columns kept (None for all), from the configuration."""
    config: Any = getattr(causal, "config", None)
    if config is None:
        return None, 1.0, None
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
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
    return (float(softcaps[0]) if softcaps else None), float(scale), entry("unpadded_vocab_size")


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
    weight, bias, adapters = _linear(_head_module(causal))
    for adapter in adapters:
        if _drops(adapter.dropout):
            raise ValueError(
                "the LoRA adapter on the head has dropout, which has no merged weight: call model.eval(), set"
                " lora_dropout=0, or use compute_token_logps, which applies it"
            )
        delta = adapter.scaling * (adapter.b.weight @ adapter.a.weight)
        weight = weight + delta.to(weight.dtype)
        if adapter.b.bias is not None:
            added = (adapter.scaling * adapter.b.bias).to(weight.dtype)
            bias = added if bias is None else bias + added
    softcap, scale, columns = _shaping(causal)
    if columns is not None:
        weight, bias = weight[:columns], None if bias is None else bias[:columns]
    return HeadParameters(weight, bias, softcap, scale)


def _with_adapters(head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias of a head, LoRA included: [x, A x] and [W, scaling B] side by side.

    The same logits as PEFT's own forward, dropout included, with one product; a merged 16-bit weight would round the
    adapter away.
    """
    weight, bias, adapters = _linear(head)
    x = x.to(weight.device)  # a model split over devices may end on another one than its head
    if not adapters:
        return x, weight, bias
    xs, weights = [x], [weight]
    for adapter in adapters:
        low = adapter.a(adapter.dropout(x.to(adapter.a.weight.dtype)))
        xs.append(low.to(x.dtype))
        weights.append((adapter.scaling * adapter.b.weight).to(weight.dtype))
        if adapter.b.bias is not None:
            added = (adapter.scaling * adapter.b.bias).to(weight.dtype)
            bias = added if bias is None else bias + added
    return torch.cat(xs, -1), torch.cat(weights, -1), bias


# --- running the model up to its head ------------------------------------------------------------------------------


class HeadCall:
    """What one call of a model is to compute at its head. Travels through the wrappers as the keyword `qkernels`.

    A plain object and no tuple: wrappers that cast the tensors among a model's arguments (mixed precision of FSDP) must
    not round log-probs on their way in.

    outputs: names of fields of `TokenStats`; with neither these nor a loss, the hidden states themselves.
    options: what else `linear_token_stats` (or, with `loss`, `linear_token_dpo`) takes: temperature, backend ...
    loss: whether to compute a preference loss.
    fp32: run the head in fp32, whatever the model and autocast compute in.
    copy_head: with the hidden states, give copies of weight and bias, as they are while the model runs.
    """

    def __init__(
        self,
        outputs: Sequence[str] = (),
        *,
        loss: bool = False,
        fp32: bool = False,
        copy_head: bool = False,
        **options: Any,
    ):
        self.outputs, self.loss, self.fp32, self.copy_head = tuple(outputs), loss, fp32, copy_head
        self.options = options


def _read_head(tap: _Tap, call: HeadCall, labels: Tensor | None, hidden: Tensor) -> dict[str, Tensor]:
    """What the replaced head computes, by name. The labels come aligned with the rows, under the model's own keyword:
    PEFT's prompt methods lengthen it as they lengthen the rows."""
    x, weight, bias = _with_adapters(tap.head, hidden)
    tap.vocab = weight.shape[0]
    softcap, scale, columns = tap.shaping
    if columns is not None:
        weight, bias = weight[:columns], None if bias is None else bias[:columns]
    if call.copy_head:
        copies = {"hidden": x, "weight": weight.clone(), "bias": None if bias is None else bias.clone()}
        return {name: value for name, value in copies.items() if value is not None}
    if not (call.outputs or call.loss):
        # The head's parameters are used outside: an output that reaches them keeps DDP from taking them for unused.
        result = {"hidden": hidden}
        if torch.is_grad_enabled():
            reached = [p.reshape(-1)[0] for p in (weight, bias) if p is not None and p.requires_grad]
            if reached:
                result["reached"] = torch.stack([p.float() for p in reached]).sum()
        return result
    if labels is None or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"one label for each of the {tuple(hidden.shape[:-1])} positions is expected, got"
            f" {None if labels is None else tuple(labels.shape)}"
        )
    labels = labels.to(x.device)
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": scale, **call.options}
    context: Any = contextlib.nullcontext()
    if call.fp32:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        context = torch.autocast(x.device.type, enabled=False)
    with context:
        if not call.loss:
            stats = linear_token_stats(x, weight, labels, bias=bias, outputs=call.outputs, **options)
            return {name: value for name, value in stats._asdict().items() if value is not None}
        added = labels.shape[1] - options.pop("length")
        if added:  # virtual tokens of a prompt method
            for name in ("token_weights", "reference_logps"):
                value = options.get(name)
                if isinstance(value, Tensor) and value.dim() == 2:
                    options[name] = nn.functional.pad(value, (added, 0))
        if options.get("cu_seqlens") is not None:
            x, labels = x.squeeze(0), labels.squeeze(0)
        output, stats = linear_token_dpo(x, weight, labels, lm_head_bias=bias, outputs=call.outputs, **options)
    result = {**output._asdict(), **stats._asdict()}
    return {name: value for name, value in result.items() if value is not None}


class _Tap:
    """The forwards of one model and of its head that stand in for their own while qkernels reads the head.

    `call` is set while a call is under way; without one, both forwards are the model's own.
    """

    def __init__(self, causal: nn.Module):
        self.causal = causal
        self.head = _head_module(causal)
        self.shaping = _shaping(causal)
        self.own_forward = causal.forward
        self.own_head_forward = self.head.forward
        self.takes_cache = "use_cache" in inspect.signature(type(causal).forward).parameters
        self.installed = self.verified = False
        self.vocab = 0
        self.call: HeadCall | None = None
        self.labels: Tensor | None = None
        self.result: dict[str, Tensor] | None = None

    def stands_for(self, causal: nn.Module) -> bool:
        """Whether this is the tap of that model, whose forwards nobody has replaced since."""
        if self.causal is not causal or self.head is not _head_module(causal):
            return False
        return self.installed or (self.own_forward, self.own_head_forward) == (causal.forward, self.head.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        copied = object.__new__(_Tap)
        memo[id(self)] = copied
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in self.__dict__.items())
        return copied

    def __reduce__(self) -> Any:
        return type(None), ()  # a stored model gets a tap of its own when it needs one

    def forward(self, *args: Any, qkernels: HeadCall | None = None, **kwargs: Any) -> Any:
        """Stands in for the model's forward."""
        if qkernels is None:
            return self.own_forward(*args, **kwargs)
        if not torch.compiler.is_compiling() and self.shaping != _shaping(self.causal):  # the configuration was edited
            self.shaping, self.verified = _shaping(self.causal), False
        if self.takes_cache:
            kwargs["use_cache"] = False
        self.call, self.labels, self.result = qkernels, kwargs.pop("labels", None), None
        try:
            outputs = self.own_forward(*args, **kwargs)
            result = self.result
        finally:
            self.call = self.labels = self.result = None
        if result is None:
            raise ValueError(
                f"{type(self.causal).__name__}.forward does not call the {type(self.head).__name__} that"
                " get_output_embeddings() gives; this model's head is not known here. Use qkernels.token_stats on its"
                " logits"
            )
        logits = getattr(outputs, "logits", None)
        result["known_numbers"] = outputs[0] if logits is None else logits
        if not torch.compiler.is_compiling():
            self.verify(result)
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is not None:
            result["aux_loss"] = aux_loss
        return result

    def head_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the head's forward."""
        if self.call is None:
            return self.own_head_forward(hidden, *args, **kwargs)
        if self.result is not None:
            raise ValueError(
                f"{type(self.causal).__name__}.forward calls its head more than once; which of the calls makes the"
                " logits is not known here"
            )
        if torch.is_grad_enabled() and _shards_itself(self.head):
            # FSDP would free the weight now and gather it again for the gradient of the logits, which nobody computes.
            self.head.set_reshard_after_forward(False)  # type: ignore[operator]
        self.result = _read_head(self, self.call, self.labels, hidden)
        return self.known_numbers(hidden.device)

    def known_numbers(self, device: torch.device) -> Tensor:
        """What the head hands on instead of logits, `[1, 1, V]`."""
        return torch.linspace(-40, 40, self.vocab, dtype=torch.float32, device=device).view(1, 1, self.vocab)

    def verify(self, result: dict[str, Tensor]) -> None:
        """Compare what the model made of the known numbers with scale and softcap as the configuration was read.

        Once for each model and configuration.
        """
        made = result.pop("known_numbers")
        if self.verified:
            return
        softcap, scale, columns = self.shaping
        expected = scale * self.known_numbers(made.device).double()
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        expected = expected[..., :columns]
        tolerance = 1e-4 if made.dtype in (torch.float32, torch.float64) else 2e-2
        if made.shape != expected.shape or not torch.allclose(
            made.detach().double(), expected, rtol=tolerance, atol=tolerance
        ):
            raise ValueError(
                f"{type(self.causal).__name__}.forward does something to its logits that is not known here: with"
                f" softcap {softcap} and logit scale {scale}, as read from its configuration, they come out"
                " differently. Use qkernels.token_stats on its logits"
            )
        self.verified = True


def tap_of(causal: nn.Module) -> _Tap:
    """The tap of a model. The model keeps it, so that torch.compile meets the same functions in every call."""
    tap = causal.__dict__.get("_qkernels_tap")
    if not isinstance(tap, _Tap) or not tap.stands_for(causal):
        if isinstance(tap, _Tap) and tap.installed and tap.causal is causal:  # its head has been replaced
            _put_back([(tap.head, tap.head_forward)])
            forward, causal.forward = causal.forward, tap.own_forward  # type: ignore[method-assign]
            tap = _Tap(causal)
            causal.forward, tap.installed = forward, True  # type: ignore[method-assign]
            tap.head.forward = tap.head_forward  # type: ignore[method-assign]
        else:
            tap = _Tap(causal)
        causal._qkernels_tap = tap  # type: ignore[assignment]
    return tap


def _put_back(modules: list[tuple[nn.Module, Any]]) -> None:
    """Give modules the forwards that they had: that of their class where it is the same."""
    for module, own in modules:
        if getattr(own, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def tapped(causal: nn.Module) -> Iterator[_Tap]:
    """Let a model take the keyword `qkernels` (a `HeadCall`), and put its own forwards back at the end."""
    tap = tap_of(causal)
    if tap.installed:
        yield tap
        return
    causal.forward, tap.head.forward = tap.forward, tap.head_forward  # type: ignore[method-assign]
    try:
        yield tap
    finally:
        _put_back([(causal, tap.own_forward), (tap.head, tap.own_head_forward)])


def install(causal: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a model keep taking the keyword `qkernels`, as a trainer needs it that hands the model to other libraries.

    Args:
        causal: the model, unwrapped.
        forward: a function `(causal, *args, **kwargs)` that becomes its forward; it calls `tap_of(causal).forward`.
    """
    tap = tap_of(causal)
    # A method of the model, not of the tap: accelerate takes `model.forward.__func__` and binds it to the model again.
    causal.forward = types.MethodType(functools.wraps(type(causal).forward)(forward), causal)  # type: ignore[method-assign]
    tap.head.forward = tap.head_forward  # type: ignore[method-assign]
    tap.installed = True


def uninstall(causal: nn.Module) -> None:
    """Undo `install`."""
    tap = causal.__dict__.get("_qkernels_tap")
    if isinstance(tap, _Tap) and tap.installed:
        _put_back([(causal, tap.own_forward), (tap.head, tap.own_head_forward)])
        del causal._qkernels_tap


def run(model: nn.Module, inputs: Mapping[str, Any], call: HeadCall, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Call a model once, through all its wrappers, and return what its head was asked for, by name."""
    if labels is not None:
        inputs = {**inputs, "labels": labels}
    with tapped(unwrap(model)) as tap:
        result: dict[str, Tensor] = model(**inputs, qkernels=call)
        if "known_numbers" in result:  # the call was compiled
            tap.verify(result)
    return result


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The hidden states that a model's head gets, for all positions; the logits are not computed.

    They are after the final norm and whatever else the model does before its head. One call of `model(**inputs)`,
    through all its wrappers, with `use_cache=False` where the model knows it. Gradients flow as in any forward.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile.
        inputs: what the model takes: input_ids `[B, T]`, attention_mask, pixel_values ...; no labels.

    Returns:
        `[B, T, H]` in the dtype that the model computes in. (A prompt-learning PEFT method adds its virtual tokens in
        front.) With `head_parameters(model)` they give the logits, but for LoRA dropout on the head.

    Raises:
        TypeError, ValueError: not such a model; a head that is not known here (the message says what to do).
    """
    if "labels" in inputs:
        raise ValueError("hidden_states takes no labels; give them to linear_token_logps, shifted with shift_labels")
    return run(model, inputs, HeadCall())["hidden"]


# --- per-token results ---------------------------------------------------------------------------------------------

# Entries of a batch that are about the loss and not for the model: those of TRL's preference collator, and of ours.
_NOT_INPUTS = ("labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps", "token_weights",
               "ref_token_logps", "cu_seqlens")  # fmt: skip


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is for the model."""
    return {name: value for name, value in batch.items() if name not in _NOT_INPUTS}


def batch_labels(
    batch: Mapping[str, Any],
    labels: Tensor | None = None,
    completion_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels `[B, T]` aligned with the rows (row t has token t + 1), from a batch of model inputs.

    Tokens to be scored, in this order of precedence: `labels`, or `batch["labels"]` (as transformers has them: aligned
    with the tokens, `ignore_index` for the others); otherwise `input_ids` where `completion_mask` (or
    `batch["completion_mask"]`), if there is one, and `attention_mask`, if there is one, are not 0, and whose
    predecessor is not padding. The first token of a sequence of a packed row is never scored; where sequences start is
    read from `cu_seq_lens_q`, or from `position_ids` that are 0.

    Raises:
        TypeError, ValueError: entries that are missing or do not fit each other.
    """
    if labels is None:
        labels = batch.get("labels")
    if completion_mask is None:
        completion_mask = batch.get("completion_mask")
    given = labels is not None
    if labels is None:
        if not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(f"the batch has neither labels nor input_ids; it has {sorted(map(str, batch))}")
        labels = batch["input_ids"]
        attended = batch.get("attention_mask")
        if attended is not None and attended.shape == labels.shape:
            labels = labels.masked_fill(attended == 0, ignore_index)
            labels[:, 1:] = labels[:, 1:].masked_fill(attended[:, :-1] == 0, ignore_index)
        if completion_mask is not None:
            if completion_mask.shape != labels.shape:
                raise ValueError(
                    f"completion_mask must have the shape of input_ids, {tuple(labels.shape)}, got"
                    f" {tuple(completion_mask.shape)}"
                )
            labels = labels.masked_fill(completion_mask == 0, ignore_index)
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape [B, T], got {tuple(labels.shape)}")
    ends, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    starts = None
    if ends is not None:
        starts = torch.isin(torch.arange(labels.shape[1], device=labels.device), ends.to(labels.device))
    elif not given and positions is not None and positions.shape == labels.shape:
        starts = positions == 0
    if starts is not None:
        labels = labels.masked_fill(starts, ignore_index)
    return shift_labels(labels, ignore_index=ignore_index)


def compute_token_stats(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    outputs: Sequence[str] = ("logps", "logsumexp"),
    labels: Tensor | None = None,
    reference_model: nn.Module | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Any subset of the per-token numbers of a model on a batch, differentiable, without storing logits.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile. It is called
            once.
        batch: what the model takes (input_ids `[B, T]`, attention_mask, ...), and optionally labels or
            completion_mask, which say what tokens to score; see `batch_labels`.
        outputs: names of fields of `qkernels.TokenStats`.
        labels: `[B, T]` int64, aligned with the tokens, instead of `batch["labels"]`.
        reference_model: for the outputs that compare with a reference: another model with the same vocabulary, softcap
            and logit scale, or `model` itself if it is a PEFT model, whose adapter is then switched off. It is called
            without gradients.
        temperature, max_chunk_bytes, backend: as in `qkernels.linear_token_stats`.
        ignore_index: the label that marks a token as not to be scored.

    Returns:
        `TokenStats` of `[B, T]` tensors: entry t belongs to token t + 1, as row t of the logits does; 0 where nothing
        is scored.

    Raises:
        TypeError, ValueError: what cannot be done; the message names the argument.
        IndexError: a label outside the vocabulary.
    """
    inputs = model_inputs(batch)
    aligned = batch_labels(batch, labels, ignore_index=ignore_index)
    reference = None
    if reference_model is not None:
        reference = reference_rows(reference_model, inputs, model)
    call = HeadCall(
        outputs,
        reference_hidden=None if reference is None else reference[0],
        reference_weight=None if reference is None else reference[1],
        reference_bias=None if reference is None else reference[2],
        temperature=temperature,
        ignore_index=ignore_index,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
    )
    result = run(model, inputs, call, aligned)
    length = aligned.shape[1]  # prompt-learning PEFT prepends virtual tokens
    return TokenStats(**{name: result[name][:, -length:] for name in call.outputs})


def compute_token_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each token of a batch under a model, differentiable, without storing logits.

    Args:
        As `compute_token_stats`.

    Returns:
        `[B, T]` fp32, nats: entry t is log pi(token t + 1 | tokens up to t); 0 where nothing is scored.

    Raises:
        As `compute_token_stats`.
    """
    stats = compute_token_stats(
        model,
        batch,
        outputs=("logps",),
        labels=labels,
        temperature=temperature,
        ignore_index=ignore_index,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
    )
    assert stats.logps is not None
    return stats.logps


def reference_rows(
    reference_model: nn.Module, inputs: Mapping[str, Any], model: nn.Module
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states `[B, T, H]`, weight and bias of a reference, without gradients.

    Args:
        reference_model: another model, or `model` itself with its PEFT adapter, which is switched off.
        inputs: what the model takes.
        model: the policy, whose softcap and logit scale the reference must share.
    """
    adapter: contextlib.AbstractContextManager = contextlib.nullcontext()
    if reference_model is model:
        peft = _peft_model(model)
        if peft is None:
            raise ValueError(
                "reference_model is model itself, which has no PEFT adapter to switch off; pass a frozen copy"
            )
        adapter = peft.disable_adapter()  # type: ignore[operator]
    check_same_shape_of_logits(model, reference_model)
    with adapter:
        return hidden_and_head(reference_model, inputs)


def check_same_shape_of_logits(model: nn.Module, reference_model: nn.Module) -> None:
    """Refuse a reference whose logits are capped or scaled in another way than the policy's."""
    ours, its = _shaping(unwrap(model)), _shaping(unwrap(reference_model))
    if ours != its:
        raise ValueError(
            "reference_model must shape its logits as model does: softcap, logit scale and columns are"
            f" {ours} of model and {its} of reference_model"
        )


def hidden_and_head(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states `[B, T, H]`, weight and bias of a model as it is now, without gradients, for use as a reference."""
    causal = unwrap(model)
    with torch.no_grad():
        if _in_fsdp(model):  # which frees the gathered head when the forward ends
            copies = run(model, inputs, HeadCall(copy_head=True))
            return copies["hidden"], copies["weight"], copies.get("bias")
        x, weight, bias = _with_adapters(_head_module(causal), hidden_states(model, **inputs))
    columns = _shaping(causal)[2]
    return x, weight[:columns].detach(), None if bias is None else bias[:columns].detach()


def _shards_itself(module: nn.Module, *more: str) -> bool:
    """Whether `fully_shard` (FSDP2) was called on a module, or it is of one of the further kinds."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing can be in it before it has been imported
    return fsdp is not None and isinstance(module, tuple(getattr(fsdp, name) for name in ("FSDPModule", *more)))


def _in_fsdp(model: nn.Module) -> bool:
    """Whether FSDP, of either generation, shards any part of a model."""
    return any(_shards_itself(module, "FullyShardedDataParallel") for module in model.modules())


def _peft_model(model: nn.Module) -> nn.Module | None:
    """The PEFT wrapper among a model's wrappers."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if _is_peft(inner):
            return inner
        inner = inner._modules.get("_orig_mod") or inner._modules.get("module")
    return None
