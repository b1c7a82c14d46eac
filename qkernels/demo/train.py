"""The demo's two trainings: supervised fine-tuning on the chosen answers, then token-level DPO against the result."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..credit import mean, ranked_right
from ..functional.logits import fused_token_dpo, token_logps
from ..report.progress import Progress
from .encode import IGNORE, EncodedPair, chosen_batch, pair_batch
from .evaluate import PairLogps, pair_logps
from .options import DemoError, DemoOptions, Sizes
from .tokenizer import END, PAD, token_id

# Small models from scratch take larger initial weights than the usual 0.02: with it the facts are learnt in half the
# steps.
_INITIALIZER_RANGE = 0.06
_WARM_UP = 10
_FINAL_LR = 0.05  # of the peak
_MAX_GRADIENT_NORM = 1.0


def build_model(tokenizer: PreTrainedTokenizerBase, sizes: Sizes, seed: int) -> PreTrainedModel:
    """A small Llama with weights drawn from `seed`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.max_length,
        tie_word_embeddings=True,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_sft(
    model: PreTrainedModel, pairs: Sequence[EncodedPair], sizes: Sizes, seed: int, progress: Progress
) -> list[dict[str, float]]:
    """Fit the chosen answers; returns the loss (nats per token) of each step."""
    curve: list[dict[str, float]] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.sft_lr, betas=(0.9, 0.98), weight_decay=0.01)
    batches = _batches(pairs, 2 * sizes.batch_size, random.Random(f"sft {seed}"))
    model.train()
    with progress.phase("SFT", sizes.sft_steps) as phase:
        for step in range(1, sizes.sft_steps + 1):
            batch = chosen_batch([pairs[i] for i in next(batches)], model.config.pad_token_id)
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
            loss = -token_logps(logits, batch.labels, inplace_backward=True).sum() / (batch.labels != IGNORE).sum()
            value = _update(model, optimizer, loss, sizes.sft_lr * _schedule(step, sizes.sft_steps), "SFT", step)
            curve.append({"step": step, "loss": value})
            phase.step(f"loss {value:.3f}")
    return curve


class PreferenceCurves(NamedTuple):
    """How preference training went.

    train: per step, of the batch before its update: loss, chosen_reward, rejected_reward, margin, accuracy.
    held_out: the same without the loss, of all held-out pairs, at step 0 and at even distances after it.
    """

    train: list[dict[str, float]]
    held_out: list[dict[str, float]]


def train_preferences(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    train: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    held_out_reference: Sequence[PairLogps],
    options: DemoOptions,
    sizes: Sizes,
    progress: Progress,
    on_evaluation: Callable[[int], None] | None = None,
) -> PreferenceCurves:
    """Train the policy with the loss of the options.

    The reference is frozen, so its log-probs are computed before training and kept per token: one forward pass per
    pair, however often training comes back to it, and never a second set of logits beside the policy's. The TDPO losses
    need the reference's whole distribution at each token, hence its logits at each step.

    Args:
        model: starts as a copy of `reference`; trained in place.
        reference: the frozen SFT model.
        train, held_out: the pairs.
        held_out_reference: the reference's log-probs of the held-out pairs.
        on_evaluation: called with the number of steps done whenever the held-out pairs have been scored.
    """
    needs_logits = options.plan().needs_kl
    loss_types = options.loss_types()
    pad = model.config.pad_token_id
    batches = _batches(train, sizes.batch_size, random.Random(f"preferences {options.seed}"))
    schedule = list(itertools.islice(batches, sizes.steps))
    cached: dict[int, PairLogps] = {}
    if not needs_logits:
        # By length, so that little of a batch is padding; pairs that no step reaches are left out.
        visited = sorted({i for indices in schedule for i in indices}, key=lambda i: train[i].length)
        with progress.phase("reference log-probs", _chunks(len(visited), sizes.batch_size)) as phase:
            logps = pair_logps(reference, [train[i] for i in visited], sizes.batch_size, phase.step)
        cached = dict(zip(visited, logps, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.lr, betas=(0.9, 0.98), weight_decay=0.0)
    curves = PreferenceCurves([], [])

    def score_held_out(step: int) -> None:
        scores = pair_logps(model, held_out, sizes.batch_size)
        rewards = [policy.rewards(ref, options.beta) for policy, ref in zip(scores, held_out_reference, strict=True)]
        chosen, rejected = mean(r[0] for r in rewards), mean(r[1] for r in rewards)
        curves.held_out.append(_point(step, chosen, rejected, ranked_right(rewards)))
        if on_evaluation is not None:
            on_evaluation(step)

    every = max(1, -(-sizes.steps // sizes.evaluations))
    score_held_out(0)
    with progress.phase("DPO" if options.loss == "sigmoid" else options.loss, sizes.steps) as phase:
        for step, indices in enumerate(schedule, 1):
            batch = pair_batch([train[i] for i in indices], pad)
            given: dict[str, Any] = {}
            if needs_logits:
                with torch.no_grad():
                    given["reference_logits"] = reference(input_ids=batch.input_ids, use_cache=False).logits
            else:
                given["reference_logps"] = _as_rows([cached[i] for i in indices], batch.labels)
            model.train()
            output = fused_token_dpo(
                model(input_ids=batch.input_ids, use_cache=False).logits,
                batch.labels,
                beta=options.beta,
                loss_type=loss_types,
                loss_weights=list(options.terms.values()),
                label_smoothing=options.label_smoothing,
                inplace_backward=True,
                **given,
            )
            loss = _update(model, optimizer, output.loss, sizes.lr * _schedule(step, sizes.steps), "training", step)
            chosen, rejected = output.chosen_rewards.mean().item(), output.rejected_rewards.mean().item()
            pairs = list(zip(output.chosen_rewards.tolist(), output.rejected_rewards.tolist(), strict=True))
            curves.train.append({**_point(step, chosen, rejected, ranked_right(pairs)), "loss": loss})
            if step % every == 0 or step == sizes.steps:
                score_held_out(step)
            last = curves.held_out[-1]
            phase.step(f"loss {loss:.3f}, held-out margin {last['margin']:.2f}, ranked right {last['accuracy']:.0%}")
    return curves


def _point(step: int, chosen: float, rejected: float, accuracy: float) -> dict[str, float]:
    return {
        "step": step,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "accuracy": accuracy,
    }


def _as_rows(logps: Sequence[PairLogps], labels: Tensor) -> Tensor:
    """Cached log-probs in the places that the labels of a `pair_batch` mark, `[2B, T]`."""
    rows = torch.zeros(labels.shape)
    rows[labels != IGNORE] = torch.cat([pair.chosen for pair in logps] + [pair.rejected for pair in logps])
    return rows


def _update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, what: str, step: int
) -> float:
    """One optimiser step; the loss as a number."""
    value = loss.item()
    if not math.isfinite(value):
        raise DemoError(
            f"{what} diverged: the loss is {value} at step {step}; try another --beta or a larger --batch-size"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
    optimizer.step()
    return value


def _schedule(step: int, steps: int) -> float:
    """Learning rate at step 1 .. steps as a share of the peak: linear warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    return min(1.0, step / _WARM_UP) * (_FINAL_LR + (1 - _FINAL_LR) * cosine)


def _chunks(count: int, size: int) -> int:
    return -(-count // size)


def _batches(pairs: Sequence[EncodedPair], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Indices of pairs, pass after pass; sequences of like length share a batch, so that little of it is padding."""
    size = min(size, len(pairs))
    while True:
        order = list(range(len(pairs)))
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), 8 * size):
            window = sorted(order[start : start + 8 * size], key=lambda i: pairs[i].length)
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        # A short rest at the end of a pass would be a step of its own on very few pairs.
        batches = [batch for batch in batches if len(batch) == size]
        rng.shuffle(batches)
        yield from batches
