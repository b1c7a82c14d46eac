"""Why the rewards of chosen answers fall, measured: DPO with and without SFT first ("From r to Q*", section 5.4)

    python examples/decline.py
    python examples/decline.py --model DIR --pairs FILE

A base model has read texts about countries, right and wrong alike, that say things in other words than the answers of
the preference pairs do. From there: (a) SFT on the chosen answers, and DPO from the result; (b) DPO from the base model
itself. By eq. 16 the implicit reward is negative on average over what the reference writes, -beta KL(ref || policy) at
each position. After SFT on them, chosen answers are what it writes; without, they are not. The equation is checked at
every evaluation: the expectation summed over the whole vocabulary in float64 from full logits, against -beta times the
exact KL of qkernels, for models in float64, float32 and bf16.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from common import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    Clock,
    Options,
    Texts,
    fine_tune,
    interval,
    options,
    panels,
    prefer,
    setting,
    write,
)  # fmt: skip
from pretrained import Study, Training
from transformers import PreTrainedModel

from qkernels import credit, token_stats
from qkernels.data import Preference
from qkernels.demo import synthetic
from qkernels.demo.encode import IGNORE, EncodedPair, chosen_batch
from qkernels.demo.options import Sizes
from qkernels.monitor import RewardMonitor, measure_rewards

BETA = 0.1
BASE_STEPS, SFT_STEPS = 100, 40
ORDERS = 3  # of the batches
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class RealSizes(NamedTuple):
    """The experiment on a pretrained model.

    longest_prompt: characters of a prompt.
    max_length: tokens of prompt and answer.
    train, held_out: pairs.
    checked: held-out pairs on whose chosen answers eq. 16 is checked.
    every: steps from one evaluation to the next.
    """

    longest_prompt: int
    max_length: int
    train: int
    held_out: int
    checked: int
    sft: Training
    dpo: Training
    every: int


REAL = RealSizes(80, 128, 40, 12, 2, Training(10, 4, 5e-5, 12), Training(10, 4, 1e-4, 12), 5)
REAL_TINY = RealSizes(80, 96, 4, 2, 1, Training(1, 2, 1e-3, 1), Training(2, 2, 1e-3, 1), 1)


def other_words(sizes: Sizes, seed: int) -> Texts:
    """The demo's answers, with one form of each sentence kept for the base texts, and the others for the pairs."""
    rng = random.Random(f"decline {seed}")
    world = synthetic.facts()
    apart = {kind: forms[:1] for kind, forms in synthetic.SENTENCES.items()}
    forms = {kind: forms[1:] for kind, forms in synthetic.SENTENCES.items()}
    seen, unseen = synthetic.split_wrong_values(rng, world)
    base = [synthetic.write_pair(rng, world, seen, apart) for _ in range(sizes.train_pairs)]
    return Texts(
        [p._replace(chosen=p.rejected, rejected=p.chosen) if rng.random() < 0.5 else p for p in base],
        [synthetic.write_pair(rng, world, seen, forms) for _ in range(sizes.train_pairs)],
        [synthetic.write_pair(rng, world, unseen, forms) for _ in range(sizes.held_out_pairs)],
    )


@torch.no_grad()
def equation_16(
    policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[EncodedPair], dtype: torch.dtype
) -> tuple[float, float, float]:
    """Both sides of (16) on the chosen answers with models in `dtype`.

    Returns:
        The largest difference at a position; the mean over positions of E_ref[reward] and of -beta KL(ref || policy).
    """
    batch = chosen_batch(pairs, policy.config.pad_token_id)
    logits, reference_logits = (
        (model if model.dtype == dtype else copy.deepcopy(model).to(dtype)).eval()(input_ids=batch.input_ids).logits
        for model in (policy, reference)
    )
    kl = token_stats(
        logits, batch.labels, reference_logits=reference_logits, outputs=("kl_reference_policy",)
    ).kl_reference_policy
    log_p, log_q = logits.double().log_softmax(-1), reference_logits.double().log_softmax(-1)
    expectation = (log_q.exp() * (BETA * (log_p - log_q))).sum(-1)
    counts = batch.labels != IGNORE
    expectation, bound = expectation[counts], (-BETA * kl.double())[counts]
    return (expectation - bound).abs().max().item(), expectation.mean().item(), bound.mean().item()


class RealTraining(NamedTuple):
    """A preference training on real pairs, by the names that `Study.model` knows.

    reference, policy: before and after; None for the pretrained model.
    held_out: pairs that no training has seen.
    course: what `evaluate` found in the course of the training.
    """

    reference: str | None
    policy: str
    held_out: list[Preference]
    course: list[dict[str, Any]]


def train_on_real_pairs(study: Study, sft_first: bool) -> RealTraining:
    """DPO on the pairs of the file, with or without SFT on their chosen answers first."""
    sizes = REAL_TINY if study.chosen.tiny else REAL
    pairs = study.real_pairs(sizes.longest_prompt, sizes.train + sizes.held_out)
    train, held_out = pairs[: sizes.train], pairs[sizes.train :]
    start = study.sft("real", train, sizes.sft) if sft_first else None
    encoded = study.encode(held_out)
    answers = [answer for pair in encoded for answer in pair]
    reference = study.model(start)

    def before() -> list[list[float]]:
        return [logps.tolist() for logps in study.scores(reference, answers)]

    known = study.once("held-out", (held_out, start), before)
    checked = [EncodedPair(c.prompt, c.ids, r.ids, [], i) for i, (c, r) in enumerate(encoded[: sizes.checked])]

    def evaluate(policy: PreTrainedModel, step: int) -> dict[str, Any]:
        after = study.scores(policy, answers) if step else known  # they are equal before the first step
        rewards = [BETA * (sum(map(float, p)) - sum(q)) for p, q in zip(after, known, strict=True)]
        sides = list(zip(rewards[::2], rewards[1::2], strict=True))
        checks = [equation_16(policy, reference, [p], torch.float32) if step else (0.0, 0.0, 0.0) for p in checked]
        return {
            "step": step,
            "chosen_reward": credit.mean(c for c, _ in sides),
            "rejected_reward": credit.mean(r for _, r in sides),
            "margin": credit.mean(c - r for c, r in sides),
            "accuracy": credit.ranked_right(sides),
            "rewards": sides,
            "largest_difference": max(error for error, _, _ in checks),
            "expectation": credit.mean(expectation for _, expectation, _ in checks),
            "minus_beta_kl": credit.mean(bound for _, _, bound in checks),
        }

    name = "real-after-sft" if sft_first else "real"
    policy, course = study.dpo(name, train, sizes.dpo, start, BETA, (sizes.every, evaluate))
    return RealTraining(start, policy, held_out, course)


def on_real_pairs(chosen: Options) -> None:
    """The experiment on a pretrained model and real pairs."""
    clock = Clock()
    sizes = REAL_TINY if chosen.tiny else REAL
    study = Study(chosen, sizes.max_length)
    runs = {name: train_on_real_pairs(study, name == "SFT first") for name in ("SFT first", "no SFT")}
    results: dict[str, Any] = {
        "beta": BETA,
        "sizes": sizes._asdict() | {"sft": sizes.sft._asdict(), "dpo": sizes.dpo._asdict()},
        "trained_pairs": sizes.dpo.steps * sizes.dpo.pairs,
        "largest_difference_eq_16": max(point["largest_difference"] for run in runs.values() for point in run.course),
        "runs": {},
    }
    for name, run in runs.items():
        last = run.course[-1]["rewards"]
        results["runs"][name] = {
            "held_out": run.course,
            "chosen_reward": interval([c for c, _ in last], chosen.seed),
            "rejected_reward": interval([r for _, r in last], chosen.seed),
            "margin": interval([c - r for c, r in last], chosen.seed),
            "train": [
                {key: entry[f"rewards/{key}"] for key in ("chosen", "rejected", "margins")}
                for entry in study.log(run.policy)
            ],
        }

    def text(name: str) -> str:
        run = results["runs"][name]
        parts = [
            f"{label} {run[key]['mean']:+.3f} ({run[key]['low']:+.3f} to {run[key]['high']:+.3f})"
            for label, key in (("chosen", "chosen_reward"), ("rejected", "rejected_reward"), ("margin", "margin"))
        ]
        point = run["held_out"][-1]
        return (
            f"{', '.join(parts)}; {point['accuracy']:.0%} ranked as labelled; E_ref[r] at positions of chosen answers"
            f" {point['expectation']:.2g}"
        )

    paragraph = (
        f"Sequence rewards of {sizes.held_out} held-out real pairs after {sizes.dpo.steps} steps of DPO with"
        f" {sizes.dpo.pairs} pairs each, and intervals of 95 % (bootstrap over pairs). With SFT on the chosen answers"
        f" first: {text('SFT first')}. Without: {text('no SFT')}. The largest difference of the two sides of eq. 16 at"
        f" a position is {results['largest_difference_eq_16']:.1g}, with models in float32."
    )
    figure, axes = panels(f"Implicit rewards of held-out real answers during DPO, {chosen.model.name}",
                          "SFT on the chosen answers first", "No SFT: straight from the pretrained model",
                          "Equation 16, at positions of chosen answers")  # fmt: skip
    for axis, name, colour in zip(axes, runs, (BLUE, ORANGE), strict=False):
        course = results["runs"][name]["held_out"]
        steps = [point["step"] for point in course]
        for key, shade, label in (
            ("margin", GREY, "margin"), ("chosen_reward", BLUE, "chosen"), ("rejected_reward", ORANGE, "rejected")
        ):  # fmt: skip
            values = [point[key] for point in course]
            axis.plot(steps, values, "o-", ms=3, color=shade, label=f"{label} {values[-1]:+.2f}")
        axis.axhline(0, color=DARK, lw=0.6)
        axis.set_xlabel(f"steps of DPO ({name})")
        axis.set_ylabel("sequence reward")
        axis.legend(loc="best")
        axes[2].plot(steps, [point["expectation"] for point in course], color=colour, lw=1.8,
                     label=rf"$E_{{ref}}[r]$, {name}")  # fmt: skip
        axes[2].plot(steps, [point["minus_beta_kl"] for point in course], "o", color=colour, ms=5, mfc="none",
                     label=r"$-\beta\,KL$")  # fmt: skip
    axes[2].set_xlabel("steps of DPO")
    axes[2].set_ylabel("reward of a token of the reference")
    axes[2].legend(loc="best")
    write(chosen, "decline", results, paragraph, figure, clock)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments)
    if chosen.model is not None:
        on_real_pairs(chosen)
        return
    clock = Clock()
    given = setting(chosen, other_words, evaluations=8, steps=80)
    pad = given.tokenizer.pad_token_id
    given.progress.say("Base model: right and wrong texts in other words")
    base = fine_tune(given, given.base, steps=BASE_STEPS)
    given.progress.say("SFT on the chosen answers")
    tuned = fine_tune(given, given.train, base, steps=SFT_STEPS)

    probe = given.held_out[:48]
    batches = [preference_inputs(probe[i : i + 16], pad) for i in range(0, len(probe), 16)]
    worst = dict.fromkeys(DTYPES, 0.0)
    runs: dict[str, dict[str, Any]] = {}
    for name, reference in (("SFT first", tuned), ("no SFT", base)):
        run: dict[str, Any] = {"held_out": [], "equation_16": [], "findings": []}
        for order in range(ORDERS):
            given.progress.say(f"DPO, {name}, order of the batches {order + 1} of {ORDERS}")
            monitor = RewardMonitor(BETA)
            checks: list[dict[str, Any]] = []

            def evaluate(policy: PreTrainedModel, step: int, reference=reference, monitor=monitor, checks=checks):
                monitor.observe(step, measure_rewards(policy, reference, batches, beta=BETA))
                point: dict[str, Any] = {"step": step}
                for kind, dtype in DTYPES.items():
                    error, expectation, bound = equation_16(policy, reference, probe[:16], dtype)
                    worst[kind] = max(worst[kind], error)
                    point[kind] = {"largest_difference": error, "expectation": expectation, "minus_beta_kl": bound}
                checks.append(point)

            shuffled = given._replace(seed=given.seed + 1000 * order)
            _, curves = prefer(shuffled, reference, given.train, BETA, evaluate)
            run["held_out"].append(curves.held_out)
            run["equation_16"].append(checks)
            run["findings"].append([f"step {found.step}: {found.name}" for found in monitor.findings])
            if order == 0:
                run["last_report"] = monitor.report()
        runs[name] = run

    results = {"beta": BETA, "base_steps": BASE_STEPS, "sft_steps": SFT_STEPS, "largest_difference_eq_16": worst,
               "runs": runs}  # fmt: skip

    def over_orders(name: str, key: str) -> str:
        values = [curve[-1][key] for curve in runs[name]["held_out"]]
        return ", ".join(f"{value:+.2f}" for value in values)

    def text(name: str) -> str:
        turns = [_turns([p["chosen_reward"] for p in curve]) for curve in runs[name]["held_out"]]
        return (
            f"chosen {over_orders(name, 'chosen_reward')}; rejected {over_orders(name, 'rejected_reward')}; margin"
            f" {over_orders(name, 'margin')}; the chosen reward changed direction {', '.join(map(str, turns))} times"
        )

    paragraph = (
        f"Sequence rewards of {len(given.held_out)} held-out pairs after {runs['no SFT']['held_out'][0][-1]['step']}"
        f" steps of DPO, for {ORDERS} orders of the batches. With SFT on the chosen answers first: {text('SFT first')}."
        f" Without: {text('no SFT')}. Eq. 16 held at every position of every evaluation: the largest difference of its"
        f" two sides is {worst['float64']:.1g} with models in float64, {worst['float32']:.1g} in float32 and"
        f" {worst['bfloat16']:.1g} in bf16."
    )

    figure, axes = panels("Implicit rewards of held-out answers during DPO; thin lines: other orders of the batches",
                          "SFT on the chosen answers first", "No SFT: straight from the base model",
                          "Equation 16, at positions of chosen answers")  # fmt: skip
    for axis, (name, run) in zip(axes, runs.items(), strict=False):
        for order, curve in enumerate(run["held_out"]):
            steps = [p["step"] for p in curve]
            for key, colour, label in (
                ("margin", GREY, "margin"), ("chosen_reward", BLUE, "chosen"), ("rejected_reward", ORANGE, "rejected")
            ):  # fmt: skip
                values = [p[key] for p in curve]
                main_line = order == 0
                axis.plot(steps, values, color=colour, lw=2.0 if main_line else 0.9, alpha=1.0 if main_line else 0.6,
                          label=f"{label} {values[-1]:+.2f}" if main_line else None)  # fmt: skip
        axis.axhline(0, color=DARK, lw=0.6)
        axis.set_xlabel(f"steps of DPO ({name})")
        axis.set_ylabel("sequence reward")
        axis.legend(loc="best")
    for name, colour in (("SFT first", BLUE), ("no SFT", ORANGE)):
        checks = runs[name]["equation_16"][0]
        steps = [p["step"] for p in checks]
        axes[2].plot(steps, [p["float64"]["expectation"] for p in checks], color=colour, lw=1.8,
                     label=rf"$E_{{ref}}[r]$, {name}")  # fmt: skip
        axes[2].plot(steps, [p["bfloat16"]["minus_beta_kl"] for p in checks], "o", color=colour, ms=4, mfc="none",
                     label=r"$-\beta\,KL$, models in bf16")  # fmt: skip
    axes[2].axhline(0, color=DARK, lw=0.6)
    axes[2].set_xlabel("steps of DPO")
    axes[2].set_ylabel("reward of a token of the reference")
    axes[2].legend(loc="best")
    write(chosen, "decline", results, paragraph, figure, clock)


def _turns(values: Sequence[float]) -> int:
    """How often a course changes its direction."""
    steps = [b - a for a, b in itertools.pairwise(values)]
    return sum(a * b < 0 for a, b in itertools.pairwise(steps))


def preference_inputs(pairs: Sequence[EncodedPair], pad: int) -> dict[str, torch.Tensor]:
    """Pairs as a batch of model inputs with a completion mask, chosen sequences first."""
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), width), pad)
    attended, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attended[row, :end] = 1
        completion[row, len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": attended, "completion_mask": completion}


if __name__ == "__main__":
    main()
