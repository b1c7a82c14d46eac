"""Token MDP read-outs of a causal language model: numbers for every token of given answers, logits never stored.

Answers are batched by length under a budget of tokens. Each batch goes through the policy and the reference up to their
heads; from the hidden states the per-token results come chunk by chunk (`qkernels.functional.hidden`), for the
answers' tokens alone. What a batch takes beyond the two models' own forward is a chunk of logits, whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..functional.hidden import linear_token_stats
from ..functional.logits import shift_labels
from ..functional.mdp import TokenMDP, token_mdp_from_logps
from ..functional.results import TokenStats
from ..integrations.transformers import compute_token_stats, head_parameters, reference_rows
from ..text.between import Between, interleaved
from ..text.lengths import batches_by_length, default_batch_tokens

if TYPE_CHECKING:
    import numpy as np

IGNORE = -100

# What the numbers are made of: fields of TokenStats, read off the heads, and of TokenMDP, which follow from those.
_FROM = {
    "Q": ("logps", "logsumexp"),
    "V": ("logps", "logsumexp"),
    "A": ("logps",),
    "implicit_rewards": ("logps", "reference_logps"),
    "bellman_rewards": ("logps", "logsumexp", "reference_logps"),
}
OUTPUTS: tuple[str, ...] = (*TokenStats._fields, *TokenMDP._fields)
_ONLY_LIVE = ("kl_reference_policy", "kl_policy_reference", "reference_logsumexp")
DEFAULT_OUTPUTS: tuple[str, ...] = (
    "logps",
    "reference_logps",
    "implicit_rewards",
    "bellman_rewards",
    "Q",
    "V",
    "A",
    "entropy",
    "kl_policy_reference",
    "kl_reference_policy",
    "is_top1",
)


class Batch(NamedTuple):
    """A forward pass that is about to begin: the how-manieth of how many, sequences, tokens of the longest."""

    number: int
    batches: int
    sequences: int
    longest: int

    def __str__(self) -> str:
        return f"batch {self.number} of {self.batches}: {self.sequences} x {self.longest} tokens"


class Answer(NamedTuple):
    """Token ids of an answer and of what the model reads before it (at least one token).

    prompt: what is read before the answer.
    ids: the tokens that are scored.
    between: of an answer of several turns, tokens that are read and not scored: groups (number of the token of `ids`
        that follows, token ids).
    """

    prompt: Sequence[int]
    ids: Sequence[int]
    between: Between = ()

    @property
    def length(self) -> int:
        """All tokens."""
        return len(self.prompt) + len(self.ids) + sum(len(group) for _, group in self.between)


def check_outputs(outputs: Sequence[str] | None, reference: str) -> tuple[str, ...]:
    """The outputs asked for, or all that the reference allows.

    Args:
        outputs: names of `OUTPUTS`; None for the usual ones.
        reference: "live" (a model or an adapter to switch off), "cached" (log-probs) or "none".
    """
    impossible = {"live": (), "cached": _ONLY_LIVE}.get(
        reference, (*_ONLY_LIVE, "reference_logps", "implicit_rewards", "bellman_rewards")
    )
    if outputs is None:
        return tuple(name for name in DEFAULT_OUTPUTS if name not in impossible)
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names, got the string {outputs!r}")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        got = f"unknown {', '.join(map(repr, unknown))}" if unknown else "none"
        raise ValueError(f"outputs must be names out of {', '.join(OUTPUTS)}; got {got}")
    refused = [name for name in outputs if name in impossible]
    if refused:
        needs = "a reference model (cached log-probs do not tell them)" if reference == "cached" else "a reference"
        raise ValueError(f"outputs {', '.join(refused)} need {needs}")
    return tuple(dict.fromkeys(outputs))


class TokenScorer:
    """A policy, its reference, and which numbers of their tokens are wanted.

    Args:
        model: the policy, a causal language model of transformers, bare or inside PEFT.
        reference: another such model; or `model` itself, if it is a PEFT model, whose adapter is then switched off; or
            None, with log-probs given to `scores` instead, or for outputs that need no reference.
        cached: whether `scores` will be given `reference_logps`.
        beta: strength of the KL constraint the policy was trained with: the unit of rewards, Q, V and A.
        outputs: names of fields of `TokenStats` and `TokenMDP`; by default all that are of use and can be had.
        batch_tokens: padded tokens of a forward pass, at most, unless a single sequence has more; None for 8192 on a
            GPU, 1024 on a CPU.
        max_chunk_bytes, backend: as in `qkernels.linear_token_stats`.

    Raises:
        TypeError, ValueError: a model whose head is not known, an output that cannot be had, a number out of range.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        reference: torch.nn.Module | None = None,
        *,
        cached: bool = False,
        beta: float = 0.1,
        outputs: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        max_chunk_bytes: int | None = None,
        backend: str = "auto",
    ):
        if reference is not None and cached:
            raise ValueError("give either a reference or cached reference_logps, not both")
        for name, module in (("model", model), ("reference", reference)):
            if module is not None and not isinstance(module, torch.nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        if reference is model and not callable(getattr(model, "disable_adapter", None)):
            raise ValueError("reference is model itself, which has no PEFT adapter to switch off; pass a frozen copy")
        self.model, self.reference, self.cached = model, reference, cached
        self.beta = checks.positive(beta, "beta")
        if batch_tokens is None:
            batch_tokens = default_batch_tokens(next(model.parameters()).device)
        self.batch_tokens = checks.integer(batch_tokens, "batch_tokens", 1)
        self.max_chunk_bytes, self.backend = max_chunk_bytes, backend
        self.outputs = check_outputs(outputs, "cached" if cached else "none" if reference is None else "live")
        needed = {part for name in self.outputs for part in _FROM.get(name, (name,))}
        if "reference_logps" not in needed and not needed & set(_ONLY_LIVE) and (cached or reference is not None):
            raise ValueError(f"none of the outputs {', '.join(self.outputs)} reads the reference: leave it out")
        if cached:
            needed.discard("reference_logps")
        self._fields = tuple(name for name in TokenStats._fields if name in needed)
        # The columns of the heads: those that both have, should one be padded further than the other.
        self.vocabularies = [_vocabulary(m) for m in (model, reference) if m is not None]
        self.vocabulary = min(self.vocabularies)

    @torch.no_grad()
    def scores(
        self,
        answers: Sequence[Answer],
        reference_logps: Sequence[Any] | None = None,
        *,
        wanted: Sequence[bool] | None = None,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The wanted numbers of each answer, longest sequences first.

        Args:
            answers: token ids.
            reference_logps: per answer, one number per token of it (`cached`).
            wanted: per answer, whether it is needed; batches without one that is are left out, and the others stay as
                they are, so that the results do not depend on what is wanted. None for all.
            on_batch: called before each forward pass.

        Yields:
            (index of the answer, arrays `[tokens]` by output): fp32 (fp64 of a float64 model), `is_top1` bool.
            Log-probs, entropy and KLs in nats, rewards, Q, V and A in units of reward.

        Raises:
            ValueError: an answer without tokens, or with nothing before it; an id outside the vocabulary;
                `reference_logps` that do not fit.
        """
        self._check(answers, reference_logps)
        models = [m for m in (self.model, self.reference) if m is not None]
        training = [m.training for m in models]
        for model in models:
            model.eval()
        try:
            lengths = [answer.length for answer in answers]
            batched = batches_by_length(lengths, self.batch_tokens)
            groups = [group for group in batched if wanted is None or any(wanted[i] for i in group)]
            for number, group in enumerate(groups, start=1):
                if on_batch is not None:
                    on_batch(Batch(number, len(groups), len(group), max(lengths[i] for i in group)))
                known = None if reference_logps is None else [reference_logps[i] for i in group]
                yield from zip(group, self._batch([answers[i] for i in group], known), strict=True)
        finally:
            for model, was in zip(models, training, strict=True):
                model.train(was)

    def _check(self, answers: Sequence[Answer], reference_logps: Sequence[Any] | None) -> None:
        if (reference_logps is not None) != self.cached:
            raise ValueError("reference_logps must be given exactly if the scorer was made with cached=True")
        if reference_logps is not None and len(reference_logps) != len(answers):
            raise ValueError(f"reference_logps has {len(reference_logps)} entries for {len(answers)} answers")
        for i, answer in enumerate(answers):
            if not len(answer.ids):
                raise ValueError(f"answer {i} has no tokens")
            if not len(answer.prompt):
                raise ValueError(f"answer {i} has no token before it: the probability of its first is not defined")
            parts = (answer.prompt, answer.ids, *(group for _, group in answer.between))
            largest = max(map(max, parts))
            if largest >= self.vocabulary or min(map(min, parts)) < 0:
                raise ValueError(f"answer {i} has token {largest}, outside the vocabulary [0, {self.vocabulary})")
            if reference_logps is not None and len(reference_logps[i]) != len(answer.ids):
                raise ValueError(
                    f"answer {i} has {len(answer.ids)} tokens and {len(reference_logps[i])} reference_logps"
                )

    def _batch(self, answers: list[Answer], known: list[Any] | None) -> list[dict[str, np.ndarray]]:
        device = next(self.model.parameters()).device
        length = max(answer.length for answer in answers)
        # No attention mask goes with it: under a causal model nothing looks at padding that comes after it, and a mask
        # would be a T x T tensor.
        input_ids = torch.zeros(len(answers), length, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE)
        cache = torch.zeros(len(answers), length, dtype=torch.float64) if known is not None else None
        rows: list[Tensor] = []  # of logits, which predict the scored tokens
        for i, answer in enumerate(answers):
            tokens, scored = interleaved(answer.ids, answer.between)
            start = len(answer.prompt)
            input_ids[i, : answer.length] = torch.tensor([*answer.prompt, *tokens])
            places = start + torch.tensor(scored).nonzero().squeeze(1)
            labels[i, places] = input_ids[i, places]
            if cache is not None and known is not None:
                cache[i, places - 1] = torch.as_tensor(known[i], dtype=torch.float64)
            rows.append(places - 1)
        input_ids, labels = input_ids.to(device), labels.to(device)
        stats = self._stats(input_ids, labels)
        valid = shift_labels(labels) != IGNORE
        values: dict[str, Tensor] = {name: getattr(stats, name) for name in self._fields}
        if cache is not None:
            values["reference_logps"] = cache.to(values["logps"])
        if any(name in _FROM for name in self.outputs):
            values |= _mdp(values, self.beta, valid)._asdict()
        arrays = {name: values[name].cpu().numpy() for name in self.outputs}
        # Copies, so that the padded batch can go.
        return [{name: array[i, places.numpy()] for name, array in arrays.items()} for i, places in enumerate(rows)]

    def _stats(self, input_ids: Tensor, labels: Tensor) -> TokenStats:
        inputs: Mapping[str, Any] = {"input_ids": input_ids}
        how: dict[str, Any] = {
            "outputs": self._fields,
            "max_chunk_bytes": self.max_chunk_bytes,
            "backend": self.backend,
        }
        if self.reference is None or len(set(self.vocabularies)) == 1:
            return compute_token_stats(self.model, inputs, labels=labels, reference_model=self.reference, **how)
        # One head is padded further than the other: only the columns that both have take part.
        x, weight, bias = reference_rows(self.model, inputs, self.reference)
        ref_x, ref_weight, ref_bias = reference_rows(self.reference, inputs, self.model)
        head, common = head_parameters(self.model), self.vocabulary
        return linear_token_stats(
            x,
            weight[:common],
            shift_labels(labels),
            bias=None if bias is None else bias[:common],
            reference_hidden=ref_x,
            reference_weight=ref_weight[:common],
            reference_bias=None if ref_bias is None else ref_bias[:common],
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            **how,
        )


def _mdp(stats: Mapping[str, Tensor], beta: float, valid: Tensor) -> TokenMDP:
    """The whole MDP; what was not read off the heads, because no output depends on it, stands in as 0."""
    logps = stats["logps"]
    zero = torch.zeros_like(logps)
    return token_mdp_from_logps(
        logps, stats.get("logsumexp", zero), stats.get("reference_logps", zero), beta=beta, valid=valid
    )


def _vocabulary(model: torch.nn.Module) -> int:
    return head_parameters(model).weight.shape[0]
