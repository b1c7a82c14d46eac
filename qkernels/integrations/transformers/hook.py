"""The forward hook on a model's head: compute there what was requested, without the model's logits.

A causal language model ends in `logits = transform(lm_head(hidden))`, where `transform` is a scale, a soft cap, a
truncation, or nothing. During a call with the keyword `qkernels` the head's `forward` is replaced. The replacement gets
the hidden states of all positions, computes what was requested, chunk by chunk (`qkernels.functional.hidden`), and
returns one row of sentinel logits instead of `[B, T, V]` logits. The rest of the model's own forward runs unchanged, so

- the hidden states contain everything that the model does before its head (final norm, muP divisions, projections);
- the sentinel logits leave the model as `transform` made them. They are compared with what the model's configuration
  was read to say, so that a model whose head does something else raises an error instead of giving wrong values;
- everything happens inside one call of the outermost module: hooks of DDP and FSDP, autocast and gradient checkpointing
  see an ordinary forward, and the parameters of the head are gathered as they are in one.

`forward` itself is replaced because torch's own hooks run before or after a module's forward and cannot skip it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..linears import faster_linears
from .parameters import LogitsTransform, hidden_and_adapted_head
from .requests import HeadCall, HeadRequest, HeadResult, compute_at_head
from .wrappers import head_module, is_fsdp2_module, unwrap


class HeadHook:
    """The forwards that replace those of one model and of its head.

    `call`, `labels` and `result` are set during a call with a request; without one, both forwards are the model's own.
    """

    def __init__(self, causal: nn.Module):
        self.causal = causal
        self.head = head_module(causal)
        self.transform = LogitsTransform.of(causal)
        self.own_forward = causal.forward
        self.own_head_forward = self.head.forward
        self.takes_use_cache = "use_cache" in inspect.signature(type(causal).forward).parameters
        self.installed = self.verified = False
        self.head_vocab_size = 0
        self.call: HeadCall | None = None
        self.labels: Tensor | None = None
        self.result: HeadResult | None = None

    def is_current(self, causal: nn.Module) -> bool:
        """Whether this is the hook of that model, and its forwards have not been replaced since."""
        if self.causal is not causal or self.head is not head_module(causal):
            return False
        return self.installed or (self.own_forward, self.own_head_forward) == (causal.forward, self.head.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadHook:
        # The forwards are bound methods, which copy.deepcopy binds to the copies of model and head.
        copied = object.__new__(HeadHook)
        memo[id(self)] = copied
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in self.__dict__.items())
        return copied

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled model gets a new hook when it needs one

    def forward(self, *args: Any, qkernels: HeadCall | None = None, **kwargs: Any) -> Any:
        """Replaces the model's forward; with `qkernels`, returns a `HeadResult`.

        The labels come aligned with the rows, under the model's own keyword: PEFT's prompt methods lengthen it as they
        lengthen the rows.
        """
        if qkernels is None:
            return self.own_forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            transform = LogitsTransform.of(self.causal)
            if transform != self.transform:  # the configuration was edited
                self.transform, self.verified = transform, False
        if self.takes_use_cache:
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
        sentinel_logits = outputs[0] if logits is None else logits
        if not torch.compiler.is_compiling():
            self.verify(sentinel_logits)
            sentinel_logits = None
        return result._replace(aux_loss=getattr(outputs, "aux_loss", None), sentinel_logits=sentinel_logits)

    def head_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replaces the head's forward."""
        if self.call is None:
            return self.own_head_forward(hidden, *args, **kwargs)
        if self.result is not None:
            raise ValueError(
                f"{type(self.causal).__name__}.forward calls its head more than once; which of the calls makes the"
                " logits is not known here"
            )
        if torch.is_grad_enabled() and is_fsdp2_module(self.head):
            # FSDP2 would free the weight now, and gather it again when the gradient of the head's output is computed.
            # The output here is the sentinel, which has none.
            self.head.set_reshard_after_forward(False)  # type: ignore[operator]
        head = hidden_and_adapted_head(self.head, hidden)
        self.head_vocab_size = head.weight.shape[0]
        head = head.truncated(self.transform.vocab_size)
        self.result = compute_at_head(self.call.request, hidden, head, self.labels, self.transform)
        return self.sentinel_logits(hidden.device)

    def sentinel_logits(self, device: torch.device) -> Tensor:
        """What the head returns instead of logits, fp32 `[1, 1, V]`: values that any scale or softcap would change."""
        row = torch.linspace(-40, 40, self.head_vocab_size, dtype=torch.float32, device=device)
        return row.view(1, 1, self.head_vocab_size)

    def verify(self, made: Tensor) -> None:
        """Check once per model and configuration that the model applies just the transform that was read from it.

        Args:
            made: what the model returned as its logits when its head returned the sentinel logits.

        Raises:
            ValueError: they are not the transform of the sentinel logits.
        """
        if self.verified:
            return
        softcap, scale, vocab_size = self.transform
        expected = scale * self.sentinel_logits(made.device).double()
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        expected = expected[..., :vocab_size]
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


def hook_of(causal: nn.Module) -> HeadHook:
    """The hook of an unwrapped model, which keeps it: torch.compile has to meet the same functions in every call."""
    hook = causal.__dict__.get("_qkernels_head_hook")
    if isinstance(hook, HeadHook) and hook.is_current(causal):
        return hook
    if isinstance(hook, HeadHook) and hook.installed and hook.causal is causal:  # the model has got another head
        _restore_forwards([(hook.head, hook.own_head_forward)])
        installed_forward, causal.forward = causal.forward, hook.own_forward  # type: ignore[method-assign]
        hook = HeadHook(causal)
        causal.forward, hook.installed = installed_forward, True  # type: ignore[method-assign]
        hook.head.forward = hook.head_forward  # type: ignore[method-assign]
    else:
        hook = HeadHook(causal)
    causal._qkernels_head_hook = hook  # type: ignore[assignment]
    return hook


def _restore_forwards(modules: list[tuple[nn.Module, Any]]) -> None:
    """Give modules their own forwards back; where that is their class's, by deleting the attribute."""
    for module, own_forward in modules:
        if getattr(own_forward, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = own_forward


@contextlib.contextmanager
def hooked(causal: nn.Module) -> Iterator[HeadHook]:
    """Let an unwrapped model take the keyword `qkernels` (a `HeadCall`) until the end of the block."""
    hook = hook_of(causal)
    if hook.installed:
        yield hook
        return
    causal.forward, hook.head.forward = hook.forward, hook.head_forward  # type: ignore[method-assign]
    try:
        yield hook
    finally:
        _restore_forwards([(causal, hook.own_forward), (hook.head, hook.own_head_forward)])


def install(causal: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a model take the keyword `qkernels` until `uninstall`, for trainers that pass the model to other libraries.

    Args:
        causal: the model, unwrapped.
        forward: a function `(causal, *args, **kwargs)` that becomes its forward; it calls `hook_of(causal).forward`.
    """
    hook = hook_of(causal)
    # A method of the model, not of the hook: accelerate takes `model.forward.__func__` and binds it to the model again.
    causal.forward = types.MethodType(functools.wraps(type(causal).forward)(forward), causal)  # type: ignore[method-assign]
    hook.head.forward = hook.head_forward  # type: ignore[method-assign]
    hook.installed = True


def uninstall(causal: nn.Module) -> None:
    """Undo `install`."""
    hook = causal.__dict__.get("_qkernels_head_hook")
    if isinstance(hook, HeadHook) and hook.installed:
        _restore_forwards([(causal, hook.own_forward), (hook.head, hook.own_head_forward)])
        del causal._qkernels_head_hook


def run(model: nn.Module, inputs: Mapping[str, Any], request: HeadRequest, labels: Tensor | None = None) -> HeadResult:
    """Call a model once, through all its wrappers, and return what its head was asked for.

    Args:
        model: a causal language model of transformers, bare or inside its wrappers.
        inputs: what the model takes, without labels.
        request: what to compute.
        labels: `[B, T]`, aligned with the rows; for `StatsRequest` and `LossRequest`.

    Raises:
        TypeError, ValueError: a model or head that is not known here; as the request's computation.
    """
    if labels is not None:
        inputs = {**inputs, "labels": labels}
    # With gradients it is for the caller to enter it around the backward, too.
    linears = contextlib.nullcontext() if torch.is_grad_enabled() else faster_linears(model)
    with hooked(unwrap(model)) as hook, linears:
        result: HeadResult = model(**inputs, qkernels=HeadCall(request))
        if result.sentinel_logits is not None:  # the call was compiled
            hook.verify(result.sentinel_logits)
    return result
