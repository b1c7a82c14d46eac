"""Likelihood search on a policy trained with preferences, which is planning with its value function; what it found.

"From r to Q*", eqs. 12 and 13: the sequence that maximises K steps of reward and reference log-prob plus the value of
the state they lead to is the one that maximises V(s_0) + sum beta log pi. (The paper prints (13) with -V(s_0);
telescoping (10) gives a plus, and a constant of the prompt changes no ranking.) So a beam search by the sum of
log-probs, without a length penalty, is a search with rewards and a value function, of which no model other than the
policy has to be asked. `beam_search` runs it through transformers' own `generate` and returns beside every beam its
log-probs, its values and, given the reference, its implicit rewards. `best_of` samples instead, and ranks what came
out. Ways to change what is searched or sampled are in `qkernels.decoding`.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from .core import checks
from .core.printed import summarised
from .core.sequences import log_ratios
from .integrations.transformers import compute_token_stats, head_parameters, hidden_states, unwrap
from .integrations.transformers.generation import plain_generation
from .planning.planner import Leaves, Planner, Settings, prefix_models
from .report.progress import Phase, Progress
from .text.padding import left_padding

# What keeps `generate` to the policy's own distribution, unless the caller says otherwise: its own defaults are others.
# (The model's generation_config has no say: see `plain_generation`.)
_PLAIN = {"do_sample": False}
_PLAIN_BEAMS = {"length_penalty": 0.0, "early_stopping": "never"}
_PLAIN_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
# What would make samples of `scan_beta` another distribution's, with the values that do not.
_CHANGING = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "top_h": None, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None,
    "bad_words_ids": None, "logits_processor": None,
}  # fmt: skip
# generate begins a beam that does not exist with -1e9, which its score, a sum over its length, stays below.
_NO_BEAM = -1e8


class _Nowhere(io.StringIO):
    """Where progress goes that nobody asked for."""

    def write(self, text: str) -> int:
        return len(text)


class ScoredSequences(NamedTuple):
    """Completions and their numbers, `[S, T]` per token with 0 outside the completion, `[S]` per sequence.

    token_logps: log pi(token), nats.
    token_values: V = beta * logsumexp of the state before the token (6), in units of reward.
    reference_token_logps: log pi_ref(token); None without a reference.
    token_rewards: beta * (log pi - log pi_ref), the implicit reward (11); None without a reference.
    logps: sum of token_logps.
    rewards: sum of token_rewards; None without a reference.
    """

    token_logps: Tensor
    token_values: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    logps: Tensor
    rewards: Tensor | None

    def __repr__(self) -> str:
        return summarised(self)


class Beams(NamedTuple):
    """What a search found: K sequences for each of B prompts, best first (as drawn, when sampling).

    sequences: int64 `[B, K, P + T]`, the prompt with its padding and the completion.
    completions: int64 `[B, K, T]`; the pad token after the end.
    completion_mask: bool `[B, K, T]`, the tokens of the completion, its end token included.
    finished: bool `[B, K]`, whether it ends with an end token, and not for want of room.
    scores: fp32 `[B, K]`, what generate ranked by: the sum of the log-probs after all logits processors, divided as the
        length penalty says (none by default). Without beams the same as `logps`. -inf for a beam that does not exist,
        because there are fewer sequences than beams; its mask is empty.
    token_logps, token_values, reference_token_logps, token_rewards: `[B, K, T]`, as in `ScoredSequences`.
    logps, rewards: `[B, K]`, their sums: log pi and the implicit reward of the completion.
    beta: that rewards and values were made with.
    """

    sequences: Tensor
    completions: Tensor
    completion_mask: Tensor
    finished: Tensor
    scores: Tensor
    token_logps: Tensor
    token_values: Tensor
    reference_token_logps: Tensor | None
    token_rewards: Tensor | None
    logps: Tensor
    rewards: Tensor | None
    beta: float

    @property
    def plan_values(self) -> Tensor:
        """`[B, K]`, V(s_0) + beta log pi: the value of the completion as a plan (12, 13), in units of reward."""
        return self.token_values[..., 0] + self.beta * self.logps

    @property
    def lengths(self) -> Tensor:
        """int64 `[B, K]`, tokens of the completion."""
        return self.completion_mask.sum(-1)

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The completions as text, special tokens left out: for each of B prompts a list of K."""
        return [tokenizer.batch_decode(beams, skip_special_tokens=True) for beams in self.completions]

    def __repr__(self) -> str:
        return summarised(self)


def beam_search(
    model: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    *,
    reference_model: nn.Module | None = None,
    beta: float = 0.1,
    num_beams: int = 5,
    num_return_sequences: int | None = None,
    max_new_tokens: int = 128,
    logits_processor: Sequence[Any] | None = None,
    batch_size: int = 16,
    **generate_kwargs: Any,
) -> Beams:
    """Search the likeliest completions under a policy, and say what they are worth to it. No gradients.

    One call of `model.generate`, then one teacher-forced forward of policy and reference over what came out, in
    `batch_size` sequences at a time, through `qkernels.integrations.transformers` (no logits are stored). Rewards and
    values are therefore those of the models themselves, whatever processors took part in the search. In 16 bits they
    may differ from the search's own scores by the rounding of two ways to compute the same thing.

    Args:
        model: a causal language model of transformers with `generate`, in eval mode: the policy.
        input_ids: int64 `[B, P]`, prompts, padded on the left; or what a tokenizer returns, with the mask in it.
        attention_mask: `[B, P]`, 0 at padding; None if there is none.
        reference_model: the frozen reference the policy was trained from, for the implicit rewards; `model` itself if
            it is a PEFT model, whose adapter is then switched off; None to do without.
        beta: strength of the KL constraint the policy was trained with; the unit of values and rewards.
        num_beams: width of the search; 1 is greedy.
        num_return_sequences: K; num_beams by default.
        max_new_tokens: longest completion.
        logits_processor: transformers' or `qkernels.decoding`'s; the latter are told the attention mask.
        batch_size: sequences per scoring forward.
        generate_kwargs: anything else that `generate` takes. Unless given here, `do_sample=False`, `length_penalty=0`,
            `early_stopping="never"` and no repetition penalty hold whatever the model's generation_config says; with
            `do_sample=True`, temperature 1 and no truncation.

    Returns:
        `Beams`, on the device of `input_ids`.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or option; a model in training mode, without `generate`, or with a
            head that is not known (`qkernels.integrations.transformers`); padding on the right.
    """
    input_ids, attention_mask = _prompts(input_ids, attention_mask)
    beta = checks.positive(beta, "beta")
    for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        _at_least_one(value, name)
    if num_return_sequences is None:
        num_return_sequences = num_beams
    _at_least_one(num_return_sequences, "num_return_sequences")
    _check_generates(model, generate_kwargs, "beam_search")
    _check_models(model=model, reference_model=reference_model)
    kwargs: dict[str, Any] = {**_PLAIN, **(_PLAIN_BEAMS if num_beams > 1 else {})}
    if generate_kwargs.get("do_sample"):
        kwargs.update(_PLAIN_SAMPLING)
    kwargs.update(generate_kwargs, num_beams=num_beams, max_new_tokens=max_new_tokens)
    _check_processors(logits_processor)
    found = _generate(model, input_ids, attention_mask, num_return_sequences, logits_processor, kwargs)
    return _beams(found, attention_mask, model, reference_model, beta, batch_size)


def best_of(
    policy: nn.Module,
    reference: nn.Module | None,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    *,
    n: int = 8,
    by: str | Callable[[Beams], Tensor] = "logp",
    sampler: nn.Module | None = None,
    beta: float = 0.1,
    max_new_tokens: int = 128,
    logits_processor: Sequence[Any] | None = None,
    batch_size: int = 16,
    progress: TextIO | None = None,
    **generate_kwargs: Any,
) -> Beams:
    """Sample n completions of each prompt and rank them by a policy trained with preferences. No gradients.

    `by="logp"` takes the likelihood under the policy, which is its value of the completion as a plan (13); V-STaR
    (Hosseini et al. 2024; "From r to Q*", section 5.2) ranks the samples of one model by the likelihood under a second
    one trained with DPO: pass the first as `sampler`. `by="reward"` takes the implicit reward, which leaves out how
    likely the reference finds the completion.

    Samples are drawn from torch's global generator, so `torch.manual_seed` and equal arguments (`batch_size` included)
    give equal samples.

    Args:
        policy: a causal language model of transformers, in eval mode.
        reference: the frozen reference of its training, for the implicit rewards; the policy itself if it is a PEFT
            model, whose adapter is then switched off; None to do without (not with `by="reward"`).
        input_ids, attention_mask: as in `beam_search`.
        n: samples per prompt.
        by: "logp", "reward", or a function of `Beams` (of all prompts, in the order in which they were drawn) that
            returns `[B, n]` scores, of which higher is better.
        sampler: the model that writes, in eval mode, with the policy's tokens; None for the policy.
        beta: strength of the KL constraint that the policy was trained with; the unit of values and rewards.
        max_new_tokens: longest completion.
        logits_processor: transformers' or `qkernels.decoding`'s; of the sampling alone.
        batch_size: sequences per call of `generate` and per scoring forward.
        progress: where to draw a progress bar, such as `sys.stderr`; None for none.
        generate_kwargs: anything else that `generate` takes, such as `temperature`. Unless given here, temperature 1,
            no truncation and no repetition penalty hold whatever the sampler's generation_config says.

    Returns:
        `Beams` with K = n, best first; `scores` is what they were ranked by.

    Raises:
        TypeError, ValueError: as `beam_search`; no reference where one is needed; scores of the wrong shape or NaN.
    """
    input_ids, attention_mask = _prompts(input_ids, attention_mask)
    beta = checks.positive(beta, "beta")
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        _at_least_one(value, name)
    if not callable(by) and by not in ("logp", "reward"):
        raise ValueError(f'by must be "logp", "reward" or a function of Beams, got {by!r}')
    if by == "reward" and reference is None:
        raise ValueError('by="reward" needs a reference: the implicit reward is beta * log(pi / pi_ref)')
    sampler = policy if sampler is None else sampler
    _check_processors(logits_processor)
    kwargs = _sampling(sampler, generate_kwargs, max_new_tokens, "best_of")
    _check_models(policy=policy, reference=reference, sampler=sampler)
    with Progress(progress or _Nowhere()).phase("sampling", len(input_ids) * n) as phase:

        def write(prompts: Tensor, count: int) -> _Generated:
            given = (input_ids[prompts], attention_mask[prompts])
            for processor in chosen:
                processor.choose_prompts(prompts)
            return _generate(sampler, *given, count, logits_processor, kwargs)

        chosen = [one for one in logits_processor or () if hasattr(one, "choose_prompts")]
        try:
            drawn = _in_batches(write, len(input_ids), n, batch_size, _pad(sampler, kwargs), phase)
        finally:
            for processor in chosen:
                processor.choose_prompts(None)
    found = _beams(drawn, attention_mask, policy, reference, beta, batch_size)
    if callable(by):
        return _ranked(found, _scores_of(by, found, "by"))
    scores = found.rewards if by == "reward" else found.logps
    assert scores is not None
    return _ranked(found, scores)


class BetaScan(NamedTuple):
    """Samples of pi_b = pi_ref^(1 - s/b) pi^(s/b), normalised at each token, for W strengths b and the sign s.

    strengths: b; 1 is the policy as trained, above it nearer to the reference.
    divergences: fp32 `[W]`, KL(pi_b || pi_ref) of whole completions in nats: the mean over all samples of the sum of
        the exact KL of each token's distribution.
    divergence_errors: fp32 `[W]`, its standard error over samples.
    scores: fp32 `[W]`, mean of the judge's scores; None without a judge.
    score_errors: fp32 `[W]`, its standard error over samples; None without a judge.
    found: the samples of each strength, `Beams` in the order in which they were drawn. Log-probs are those of the
        policy, not of pi_b.
    """

    strengths: tuple[float, ...]
    divergences: Tensor
    divergence_errors: Tensor
    scores: Tensor | None
    score_errors: Tensor | None
    found: tuple[Beams, ...]

    def within(self, budget: float) -> int:
        """Index of the strength that goes furthest from the reference with a divergence of at most `budget` nats.

        Raises:
            ValueError: none stays within it.
        """
        allowed = [i for i, value in enumerate(self.divergences.tolist()) if value <= budget]
        if not allowed:
            raise ValueError(
                f"no strength has a divergence of at most {budget}; the least is {self.divergences.min().item():.4g} at"
                f" strength {self.strengths[int(self.divergences.argmin())]:g}: scan larger ones"
            )
        return max(allowed, key=lambda i: self.divergences[i].item())


def scan_beta(
    policy: nn.Module,
    reference: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    *,
    strengths: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    sign: float = 1.0,
    judge: Callable[[Beams], Tensor] | None = None,
    n: int = 1,
    beta: float = 0.1,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: TextIO | None = None,
    **generate_kwargs: Any,
) -> BetaScan:
    """Sample from pi_ref^(1 - 1/b) pi^(1/b) for several b, and say how far each is from the reference. No gradients.

    The strength of the KL constraint, chosen after training. A loss that learns its link (`qkernels.semiparametric`)
    leaves the scale of the reward open, so this choice is a part of the method (Kallus 2025); after DPO it trades
    reward for divergence, as decoding-time realignment does. Take the b whose judged score is best, or the largest
    divergence that is allowed (`BetaScan.within`), and go on with `ImplicitRewardGuidance(reference=..., weight=sign /
    b - 1, beta=1.0)` on the policy.

    Args:
        policy: a causal language model of transformers, in eval mode.
        reference: that its training started from; the policy itself if it is a PEFT model, whose adapter is then
            switched off.
        input_ids, attention_mask: as in `beam_search`.
        strengths: values of b; above 0.
        sign: 1, or -1 where a learned link has found the reward upside down (`LearnedLink.sign`).
        judge: of `Beams`, returns `[B, n]` scores.
        n: samples per prompt and strength.
        beta: of the policy's training; the unit of the values and rewards in `found`.
        max_new_tokens, batch_size, progress: as in `best_of`.
        generate_kwargs: anything else that `generate` takes and that leaves the distribution alone.

    Returns:
        `BetaScan`.

    Raises:
        TypeError, ValueError: as `best_of`; strengths that are not above 0; a sign other than 1 and -1; a temperature,
            a truncation or a processor, since `divergences` are of pi_b itself.
    """
    from .decoding import MeasuredGuidance

    input_ids, attention_mask = _prompts(input_ids, attention_mask)
    beta = checks.positive(beta, "beta")
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        _at_least_one(value, name)
    if not isinstance(strengths, (Sequence, Tensor)):
        raise TypeError(f"strengths must be a sequence of numbers, got {type(strengths).__name__}")
    strengths = tuple(checks.positive(value, f"strengths[{i}]") for i, value in enumerate(strengths))
    if not strengths:
        raise ValueError("strengths must hold at least one value of b, got none")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    changing = sorted(name for name, value in generate_kwargs.items() if name in _CHANGING and value != _CHANGING[name])
    if changing:
        raise ValueError(
            "scan_beta samples from pi_b itself, whose divergence it reports, which these would change: "
            + ", ".join(changing)
        )
    kwargs = _sampling(policy, generate_kwargs, max_new_tokens, "scan_beta")
    _check_models(policy=policy, reference=reference)
    found, divergences = [], []
    with Progress(progress or _Nowhere()).phase("sampling", len(strengths) * len(input_ids) * n) as phase:
        for strength in strengths:
            guidance = MeasuredGuidance(
                reference=reference, weight=sign / strength - 1, beta=1.0, adapter_off=reference is policy
            )
            sums: list[Tensor] = []

            def write(prompts: Tensor, count: int, guidance: Any = guidance, sums: list[Tensor] = sums) -> _Generated:
                part = _generate(policy, input_ids[prompts], attention_mask[prompts], count, [guidance], kwargs)
                where = part.completion_mask
                steps = torch.stack(guidance.divergences, -1).view(where.shape).to(where.device)
                sums.append((steps * part.completion_mask).double().sum(-1).flatten())
                return part

            drawn = _in_batches(write, len(input_ids), n, batch_size, _pad(policy, kwargs), phase)
            divergences.append(torch.cat(sums))
            found.append(_beams(drawn, attention_mask, policy, reference, beta, batch_size))
    means, errors = _means(divergences)
    if judge is None:
        return BetaScan(strengths, means, errors, None, None, tuple(found))
    scores = [_scores_of(judge, beams, "judge").double().flatten() for beams in found]
    return BetaScan(strengths, means, errors, *_means(scores), tuple(found))


def _means(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard error of each; the error of a single sample is not known, NaN."""
    means = torch.stack([x.mean() for x in samples])
    errors = torch.stack([x.std() / len(x) ** 0.5 if len(x) > 1 else x.new_full((), float("nan")) for x in samples])
    return means.float(), errors.float()


def _sampling(model: nn.Module, generate_kwargs: dict[str, Any], max_new_tokens: int, caller: str) -> dict[str, Any]:
    """Keyword arguments of `generate` that draw from the model's own distribution, unless the caller says otherwise."""
    _check_generates(model, generate_kwargs, caller)
    for name in ("num_beams", "num_return_sequences", "do_sample"):
        if name in generate_kwargs:
            raise ValueError(f"{name} is {caller}'s own: it draws n samples, without beams")
    own = {"do_sample": True, "num_beams": 1, "max_new_tokens": max_new_tokens}
    return {**_PLAIN, **_PLAIN_SAMPLING, **generate_kwargs, **own}


def _scores_of(judge: Callable[[Beams], Tensor], found: Beams, name: str) -> Tensor:
    """What a user's function says of samples, checked, `[B, n]`."""
    scores = checks.tensor(judge(found), f"{name}(...)").to(found.logps.device)
    if scores.shape != found.logps.shape or bool(scores.isnan().any()):
        raise ValueError(
            f"{name} must return one number per sample, none of them NaN, [B, n] = {tuple(found.logps.shape)}; got"
            f" {tuple(scores.shape)}{' with NaN' if bool(scores.isnan().any()) else ''}"
        )
    return scores


class TreeSearch(NamedTuple):
    """What a tree search found, and what it took.

    beams: the best completions of each prompt, best first; `scores` is the value of the plan, in units of reward.
    simulations: int64 `[B]`, leaves that were looked at.
    forwards: int64 `[B]`, positions that the policy was run on after the prompt, before the final scoring; a beam
        search of width W takes W for each token.
    proven: bool `[B]`, whether there is no completion of a higher value than those returned.
    """

    beams: Beams
    simulations: Tensor
    forwards: Tensor
    proven: Tensor


def tree_search(
    policy: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    *,
    reference_model: nn.Module | None = None,
    beta: float = 0.1,
    simulations: int = 32,
    max_new_tokens: int = 128,
    num_return_sequences: int = 1,
    value: str | Callable[[Leaves], Tensor] = "policy",
    reward: str | Callable[[Leaves], Tensor] = "implicit",
    exploration: float = 4.0,
    width: int = 16,
    rollout: int | None = None,
    parallel: int = 4,
    max_forwards: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    use_cache: bool = True,
    batch_size: int = 16,
    progress: TextIO | None = None,
) -> TreeSearch:
    """Monte Carlo tree search for the completion of the highest value (12), with the policy as prior. No gradients.

    The value of a completion as a plan is the sum of r + beta log pi_ref over its tokens, plus V where it stops short
    of an end. With the policy's own rewards and values that is V(s_0) + beta log pi (13), what a beam search by
    likelihood maximises, and no other model is asked while searching; with a reward or value from outside it is guided
    decoding.

    Each simulation goes down the tree by PUCT (`qkernels.planning.tree`), reads the leaf it comes to, and follows the
    policy's likeliest tokens from there (a rollout). Everything read stays in the tree, with its keys and values. With
    the policy's own rewards and values, every prefix that was read is also a completion if an end is among its `width`
    likeliest tokens, which costs no forward; prefixes that cannot beat what was found are cut off, so that the search
    may end early with the certainty that there is nothing better (`proven`).

    Args:
        policy: a causal language model of transformers, in eval mode.
        input_ids, attention_mask: as in `beam_search`.
        reference_model: the frozen reference; for implicit rewards in the result, and with a reward of your own for
            beta log pi_ref in (12). None: no implicit rewards, and the policy itself stands for it.
        beta: strength of the KL constraint; the unit of rewards and values.
        simulations: leaves to look at, per prompt.
        max_new_tokens: longest completion.
        num_return_sequences: K.
        value: "policy" for V = beta * logsumexp(logits) of an unfinished leaf, or a function of `Leaves` that returns
            what is still to come, `[S]`, in units of reward; finished leaves have 0.
        reward: "implicit" for the policy's own (10), or a function of `Leaves` that returns the reward of the
            completion so far, `[S]`.
        exploration: c of PUCT, in nats; 0 goes where the best was found, more tries more other beginnings.
        width: children of a node, its likeliest tokens.
        rollout: tokens that are followed from a leaf before it is valued; None for all until the end. The first
            simulation always goes to the end, and with a number the path of the most visits does at last.
        parallel: simulations of a prompt in one batch.
        max_forwards: positions per prompt that the policy may be run on; the first completion is finished in any case.
        eos_token_id: end tokens; the model's own by default.
        use_cache: keep the keys and values of all nodes. False reads prefixes again, as does a model without such a
            cache.
        batch_size: sequences per forward of the final scoring.
        progress: where to draw a progress bar, such as `sys.stderr`; None for none.

    Returns:
        `TreeSearch`.

    Raises:
        TypeError, ValueError: as `beam_search`; a function that returns other than one number per leaf.
    """
    input_ids, attention_mask = _prompts(input_ids, attention_mask)
    sizes = {
        "simulations": simulations, "max_new_tokens": max_new_tokens, "num_return_sequences": num_return_sequences,
        "width": width, "parallel": parallel, "batch_size": batch_size,
        **({} if max_forwards is None else {"max_forwards": max_forwards}),
        **({} if rollout in (None, 0) else {"rollout": rollout}),
    }  # fmt: skip
    for name, size in sizes.items():
        _at_least_one(size, name)
    for name, given, word in (("value", value, "policy"), ("reward", reward, "implicit")):
        if given != word and not callable(given):
            raise ValueError(f'{name} must be "{word}" or a function of Leaves, got {given!r}')
    if isinstance(exploration, bool) or not isinstance(exploration, (int, float)) or not 0 <= exploration < math.inf:
        raise ValueError(f"exploration must be a finite number of 0 or more, got {exploration!r}")
    _check_models(policy=policy, reference_model=reference_model)
    ends = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
    settings = Settings(
        beta=checks.positive(beta, "beta"),
        simulations=simulations,
        max_new_tokens=max_new_tokens,
        exploration=float(exploration),
        width=width,
        rollout=rollout,
        parallel=parallel,
        max_forwards=max_forwards,
        keep=num_return_sequences,
        ends=frozenset(_token_ids(policy, ends, "eos_token_id")),
        pad=_pad(policy, ends),
        value=value if callable(value) else None,
        reward=reward if callable(reward) else None,
    )
    models = prefix_models(policy, reference_model if callable(reward) else None, use_cache)
    with Progress(progress or _Nowhere()).phase("simulations", len(input_ids) * simulations) as phase:
        planner = Planner(settings, *models, input_ids, attention_mask)
        planner.run(lambda count: phase.step(steps=count))
    return _tree_search(planner, policy, reference_model, batch_size)


def _tree_search(planner: Planner, policy: nn.Module, reference: nn.Module | None, batch_size: int) -> TreeSearch:
    """The completions of a search in rows, with the numbers of a teacher-forced forward."""
    trees, count, beta = planner.trees, planner.settings.keep, planner.settings.beta
    best = [(prompt, node) for prompt, tree in enumerate(trees) for _, node in tree.found]
    rows = [prompt * count + k for prompt, tree in enumerate(trees) for k in range(len(tree.found))]
    leaves = planner.leaves(best)
    device, length = leaves.sequences.device, leaves.completion_mask.shape[1]
    place, shape = torch.tensor(rows, device=device), (len(trees), count)
    tokens = torch.full((len(trees) * count, length), planner.settings.pad, device=device)
    tokens[place] = leaves.sequences[:, -length:]
    mask, finished, exists = (torch.zeros(len(tokens), dtype=torch.bool, device=device) for _ in range(3))
    mask = mask[:, None].repeat(1, length)
    mask[place], finished[place], exists[place] = leaves.completion_mask, leaves.finished, True
    scores = torch.full((len(tokens),), -torch.inf, device=device)
    scores[place] = beta * torch.tensor([value for tree in trees for value, _ in tree.found], device=device)
    sequences = torch.cat([planner.input_ids.repeat_interleave(count, 0), tokens], 1)
    found = _Generated(*(x.unflatten(0, shape) for x in (sequences, mask, finished, exists, scores)))
    return TreeSearch(
        _beams(found, planner.attention_mask, policy, reference, beta, batch_size),
        *(torch.tensor([getattr(tree, name) for tree in trees]) for name in ("simulations", "forwards", "proven")),
    )


class _Generated(NamedTuple):
    """What `generate` wrote: K sequences for each of B prompts; `scores` is None without beams."""

    sequences: Tensor  # [B, K, P + T]
    completion_mask: Tensor  # [B, K, T]
    finished: Tensor  # [B, K]
    exists: Tensor  # [B, K]
    scores: Tensor | None  # [B, K]


def _generate(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int, processors: Any, kwargs: dict[str, Any]
) -> _Generated:
    """One call of `model.generate` on the model's device, and which of its tokens are completions."""
    kwargs, device = dict(kwargs), input_ids.device
    there = next(model.parameters()).device
    if there.type != "meta":  # offloaded weights do not say where they are used
        input_ids, attention_mask = input_ids.to(there), attention_mask.to(there)
    if processors is not None:
        for processor in processors:
            if hasattr(processor, "for_prompt"):
                processor.for_prompt(attention_mask)
        kwargs["logits_processor"] = _processor_list(processors)
    several = kwargs["num_beams"] > 1
    with torch.no_grad(), plain_generation(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_return_sequences=count,
            return_dict_in_generate=True,
            output_scores=several,
            **kwargs,
        )
    sequences = output.sequences
    mask, finished = _completion_mask(output, sequences[:, input_ids.shape[1] :], model, kwargs)
    exists = torch.ones(len(sequences), dtype=torch.bool, device=sequences.device)
    scores = None
    if several:
        lengths = (output.beam_indices >= 0).sum(1).clamp(min=1)
        exists = output.sequences_scores * lengths ** kwargs["length_penalty"] > _NO_BEAM
        mask &= exists[:, None]
        scores = output.sequences_scores.masked_fill(~exists, -torch.inf)
    shape = (len(input_ids), count)
    return _Generated(
        sequences=sequences.unflatten(0, shape).to(device),
        completion_mask=mask.unflatten(0, shape).to(device),
        finished=(finished & exists).unflatten(0, shape).to(device),
        exists=exists.unflatten(0, shape).to(device),
        scores=None if scores is None else scores.unflatten(0, shape).to(device),
    )


def _in_batches(
    write: Callable[[Tensor, int], _Generated], prompts: int, n: int, batch_size: int, pad: int, phase: Phase
) -> _Generated:
    """n samples of each prompt, `batch_size` sequences in a call. write: prompts `[b]` and how many of each."""
    groups = []
    for group in torch.arange(prompts).split(max(1, batch_size // n)):
        parts = []
        for start in range(0, n, batch_size):
            count = min(batch_size, n - start)
            parts.append(write(group, count))
            phase.step(steps=count * len(group))
        groups.append(_joined(parts, 1, pad))
    return _joined(groups, 0, pad)


def _joined(parts: Sequence[_Generated], dim: int, pad: int) -> _Generated:
    """Several calls of `generate` on prompts of one width as if they were one; the shorter completions are padded."""
    longest = max(part.completion_mask.shape[2] for part in parts)

    def widened(x: Tensor, short: int, value: int) -> Tensor:
        return nn.functional.pad(x, (0, short), value=value)

    short = [longest - part.completion_mask.shape[2] for part in parts]
    return _Generated(
        torch.cat([widened(part.sequences, k, pad) for part, k in zip(parts, short, strict=True)], dim),
        torch.cat([widened(part.completion_mask, k, False) for part, k in zip(parts, short, strict=True)], dim),
        torch.cat([part.finished for part in parts], dim),
        torch.cat([part.exists for part in parts], dim),
        None,
    )


def _beams(
    found: _Generated,
    attention_mask: Tensor,
    model: nn.Module,
    reference_model: nn.Module | None,
    beta: float,
    batch_size: int,
) -> Beams:
    """Everything that a policy and its reference say of sequences; ranked by their log-probs if by nothing else."""
    shape = found.exists.shape
    mask = found.completion_mask.flatten(0, 1)
    scored = score_completions(
        model,
        found.sequences.flatten(0, 1),
        torch.cat([attention_mask.repeat_interleave(shape[1], 0), mask.long()], 1),
        mask,
        reference_model=reference_model,
        beta=beta,
        batch_size=batch_size,
    )

    def shaped(value: Tensor) -> Tensor:
        return value.unflatten(0, shape)

    def optional(value: Tensor | None) -> Tensor | None:
        return None if value is None else shaped(value)

    logps = shaped(scored.logps).masked_fill(~found.exists, -torch.inf)
    return Beams(
        sequences=found.sequences,
        completions=found.sequences[..., attention_mask.shape[1] :],
        completion_mask=found.completion_mask,
        finished=found.finished,
        scores=logps if found.scores is None else found.scores,
        token_logps=shaped(scored.token_logps),
        token_values=shaped(scored.token_values),
        reference_token_logps=optional(scored.reference_token_logps),
        token_rewards=optional(scored.token_rewards),
        logps=logps,
        rewards=optional(scored.rewards),
        beta=beta,
    )


def _ranked(found: Beams, scores: Tensor) -> Beams:
    """The same sequences, those with the highest scores first."""
    scores, order = scores.sort(stable=True, dim=1, descending=True)

    def sorted_(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.gather(1, order.view(*order.shape, *[1] * (value.dim() - 2)).expand_as(value))

    return Beams(*(sorted_(value) for value in found))._replace(scores=scores)


def _check_models(**models: nn.Module | None) -> None:
    for name, module in models.items():
        if module is not None and module.training:
            raise ValueError(f"{name} is in training mode, in which dropout changes its log-probs: call {name}.eval()")


def _check_generates(model: nn.Module, generate_kwargs: dict[str, Any], caller: str) -> None:
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"{type(model).__name__} has no generate(); expected a causal language model of transformers")
    for name in ("return_dict_in_generate", "output_scores", "generation_config"):
        if name in generate_kwargs:
            raise ValueError(f"{name} is {caller}'s own; give generation options as keywords")


def score_completions(
    model: nn.Module,
    sequences: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    reference_model: nn.Module | None = None,
    beta: float = 0.1,
    batch_size: int = 16,
    processors: Sequence[Any] | None = None,
) -> ScoredSequences:
    """Log-probs, values and implicit rewards of completions that are at hand, however they were made. No gradients.

    With `processors`, the log-probs are those of the distribution that they make of the model's at each token, as
    `generate` would draw from it: how likely given texts are under proxy tuning, say, or a copy mixture.

    Args:
        model, reference_model, beta, batch_size: as in `beam_search`.
        sequences: int64 `[S, L]`, prompt and completion; padding anywhere that `attention_mask` says.
        attention_mask: `[S, L]`, 0 at padding.
        completion_mask: bool `[S, T]` over the last T tokens: those to be scored.
        processors: logits processors, transformers' or `qkernels.decoding`'s, in the order in which they apply; the
            latter are told the prompts' padding. They are called once per completion token with all S rows, and their
            results are normalised. Values and rewards stay those of the models. None for none.

    Returns:
        `ScoredSequences`, `[S, T]` and `[S]`, fp32, on the device of `sequences`.

    Raises:
        As `beam_search`; with processors, prompts padded on the right and completions with gaps.
    """
    beta = checks.positive(beta, "beta")
    _at_least_one(batch_size, "batch_size")
    sequences = checks.tensor(sequences, "sequences")
    if sequences.dim() != 2 or sequences.dtype != torch.int64:
        raise ValueError(f"sequences must be int64 [S, L], got {sequences.dtype} {tuple(sequences.shape)}")
    attention_mask = checks.tensor(attention_mask, "attention_mask").to(sequences.device)
    if attention_mask.shape != sequences.shape:
        raise ValueError(
            f"attention_mask must have the shape of sequences, {tuple(sequences.shape)}, got"
            f" {tuple(attention_mask.shape)}"
        )
    completion_mask = checks.tensor(completion_mask, "completion_mask")
    length = completion_mask.shape[-1]
    if completion_mask.dim() != 2 or len(completion_mask) != len(sequences) or length >= sequences.shape[1]:
        raise ValueError(
            f"completion_mask must have shape [S, T] with S = {len(sequences)} and T below L = {sequences.shape[1]} (a"
            f" completion has a prompt), got {tuple(completion_mask.shape)}"
        )
    completion_mask = completion_mask.to(sequences.device) != 0
    labels = sequences.new_full(sequences.shape, -100)
    if length:
        labels[:, -length:] = sequences[:, -length:].masked_fill(~completion_mask, -100)
    names = ("logps", "logsumexp", *(("reference_logps",) if reference_model is not None else ()))
    parts: list[list[Tensor]] = [[] for _ in names]
    # Positions count tokens and not padding, as `generate` has them.
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(type(unwrap(model)).forward).parameters
    with torch.no_grad():
        for rows in torch.arange(len(sequences)).split(batch_size):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            # Columns that are padding in all of these rows are not computed.
            used = attention_mask[span].any(0)
            batch = {"input_ids": sequences[span][:, used], "attention_mask": attention_mask[span][:, used]}
            if takes_positions:
                batch["position_ids"] = positions[span][:, used]
            stats = compute_token_stats(
                model,
                _to_model(batch, model),
                outputs=names,
                labels=_to_model({"labels": labels[span][:, used]}, model)["labels"],
                reference_model=reference_model,
            )
            for part, name in zip(parts, names, strict=True):
                # Entry t of the statistics belongs to token t + 1.
                aligned = torch.nn.functional.pad(getattr(stats, name)[:, :-1].to(sequences.device), (1, 0))
                whole = aligned.new_zeros(len(rows), sequences.shape[1])
                whole[:, used] = aligned
                part.append(whole[:, sequences.shape[1] - length :])
    empty = torch.zeros(0, length, device=sequences.device)
    logps, logsumexp, *reference = (torch.cat(part) if part else empty for part in parts)
    values = beta * logsumexp * completion_mask
    rewards = beta * log_ratios(logps, reference[0]) if reference else None
    if processors:
        logps = _processed_logps(model, sequences, attention_mask, completion_mask, processors, batch_size)
    if rewards is None:
        return ScoredSequences(logps, values, None, None, _sums(logps), None)
    return ScoredSequences(logps, values, reference[0], rewards, _sums(logps), _sums(rewards))


def _processed_logps(
    model: nn.Module,
    sequences: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    processors: Sequence[Any],
    batch_size: int,
) -> Tensor:
    """Log-probs `[S, T]` of completions under what processors make of the model's distributions.

    The hidden states of all completion tokens come from one teacher-forced forward; the logits are formed, and the
    processors called, one token after another, as in `generate`.
    """
    length = completion_mask.shape[1]
    start = sequences.shape[1] - length
    prompts, attended = left_padding(attention_mask[:, :start]), attention_mask[:, start:] != 0
    if bool((completion_mask & (attended.long().cumprod(1) == 0)).any()):
        raise ValueError("with processors, attention_mask must not have gaps before the tokens of completion_mask")
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(type(unwrap(model)).forward).parameters
    states = []
    with torch.no_grad():
        for rows in torch.arange(len(sequences)).split(batch_size):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            batch = {"input_ids": sequences[span], "attention_mask": attention_mask[span]}
            if takes_positions:
                batch["position_ids"] = positions[span]
            states.append(hidden_states(model, **_to_model(batch, model))[:, start - 1 : -1])
        hidden, head = torch.cat(states), head_parameters(model)
        for processor in processors:
            if hasattr(processor, "for_prompt"):
                processor.for_prompt(prompts)
        logps = torch.zeros(completion_mask.shape, device=sequences.device)
        scored = completion_mask.any(0).nonzero()
        for t in range(int(scored[-1]) + 1 if len(scored) else 0):
            scores = head.logits(hidden[:, t]).to(sequences.device)
            for processor in processors:
                scores = processor(sequences[:, : start + t], scores)
            tokens = sequences[:, start + t, None]
            logps[:, t] = scores.float().gather(1, tokens)[:, 0] - scores.float().logsumexp(1)
    return torch.where(completion_mask, logps, 0.0)


def _sums(tokens: Tensor) -> Tensor:
    return tokens.double().sum(1).to(tokens.dtype)


def _to_model(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _processor_list(processors: Sequence[Any]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors)


def _check_processors(processors: Any) -> None:
    if processors is not None and not isinstance(processors, Sequence):
        raise TypeError(f"logits_processor must be a list of processors, got {type(processors).__name__}")


def _completion_mask(output: Any, completions: Tensor, model: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which of `[S, T]` are tokens of the completion, and whether an end token is among them, `[S]`."""

    def among(name: str) -> Tensor:
        ids = torch.tensor(_token_ids(model, kwargs, name), dtype=torch.int64, device=completions.device)
        return torch.isin(completions, ids)

    is_end = among("eos_token_id")
    beam_indices = getattr(output, "beam_indices", None)
    if beam_indices is not None:  # -1 after the last token of a beam
        mask = beam_indices >= 0
        return mask, (is_end & mask).any(1)
    mask = (is_end.long().cumsum(1) - is_end.long()) == 0  # up to and including the first end token
    if any(kwargs.get(name) is not None for name in ("stop_strings", "stopping_criteria", "max_time")):
        # Sequences that something else than an end token has stopped go on in padding.
        is_pad = among("pad_token_id") & ~is_end
        mask &= is_pad.flip(1).long().cumprod(1).flip(1) == 0
    return mask, is_end.any(1)


def _token_ids(model: Any, kwargs: dict[str, Any], name: str) -> list[int]:
    """The ids that `generate` takes for an end or a pad token: those it is handed, or the model's.

    None stands for no end token, if it is handed, and for the model's pad token.
    """
    value = kwargs.get(name)
    if value is None and not (name == "eos_token_id" and name in kwargs):
        value = getattr(model.generation_config, name)
    return torch.as_tensor([] if value is None else value).reshape(-1).tolist()


def _pad(model: Any, kwargs: dict[str, Any]) -> int:
    """The id that `generate` fills up with."""
    return next(iter(_token_ids(model, kwargs, "pad_token_id") + _token_ids(model, kwargs, "eos_token_id")), 0)


def _prompts(input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """Checked prompts and their mask, int64 `[B, P]`."""
    if isinstance(input_ids, Mapping) and attention_mask is None:  # what a tokenizer returns
        input_ids, attention_mask = input_ids.get("input_ids"), input_ids.get("attention_mask")
    input_ids = checks.tensor(input_ids, "input_ids")
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids must be int64, got {input_ids.dtype}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape [B, P] and hold a prompt, got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    attention_mask = left_padding(attention_mask).to(input_ids.device)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got"
            f" {tuple(attention_mask.shape)}"
        )
    return input_ids, attention_mask


def _at_least_one(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
