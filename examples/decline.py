"""Why the rewards of chosen answers fall, measured: DPO with and without SFT first ("From r to Q*", section 5.4)

    python examples/decline.py

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
from typing import Any

import torch
from common import BLUE, DARK, GREY, ORANGE, Clock, Texts, fine_tune, options, panels, prefer, setting, write
from transformers import PreTrainedModel

from qkernels import token_stats
from qkernels.demo import synthetic
from qkernels.demo.encode import IGNORE, EncodedPair, chosen_batch
from qkernels.demo.options import Sizes
from qkernels.monitor import RewardMonitor, measure_rewards

BETA = 0.1
BASE_STEPS, SFT_STEPS = 100, 40
ORDERS = 3  # of the batches
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
        copy.deepcopy(model).to(dtype).eval()(input_ids=batch.input_ids).logits for model in (policy, reference)
    )
    kl = token_stats(
        logits, batch.labels, reference_logits=reference_logits, outputs=("kl_reference_policy",)
    ).kl_reference_policy
    log_p, log_q = logits.double().log_softmax(-1), reference_logits.double().log_softmax(-1)
    expectation = (log_q.exp() * (BETA * (log_p - log_q))).sum(-1)
    counts = batch.labels != IGNORE
    expectation, bound = expectation[counts], (-BETA * kl.double())[counts]
    return (expectation - bound).abs().max().item(), expectation.mean().item(), bound.mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments)
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
