"""Why the rewards of chosen answers fall, measured: DPO with and without SFT first ("From r to Q*", section 5.3)

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
    given = setting(chosen, other_words, evaluations=12, steps=120)
    pad = given.tokenizer.pad_token_id
    given.progress.say("Base model: right and wrong texts in other words")
    base = fine_tune(given, given.base, steps=BASE_STEPS)
    given.progress.say("SFT on the chosen answers")
    tuned = fine_tune(given, given.train, base, steps=SFT_STEPS)

    probe = given.held_out[:48]
    batches = [preference_inputs(probe[i : i + 16], pad) for i in range(0, len(probe), 16)]
    runs: dict[str, dict[str, Any]] = {}
    worst = dict.fromkeys(DTYPES, 0.0)
    for name, reference in (("SFT first", tuned), ("no SFT", base)):
        given.progress.say(f"DPO, {name}")
        monitor = RewardMonitor(BETA)
        checks: list[dict[str, Any]] = []

        def evaluate(policy: PreTrainedModel, step: int, reference=reference, monitor=monitor, checks=checks) -> None:
            monitor.observe(step, measure_rewards(policy, reference, batches, beta=BETA))
            point: dict[str, Any] = {"step": step}
            for kind, dtype in DTYPES.items():
                error, expectation, bound = equation_16(policy, reference, probe[:16], dtype)
                worst[kind] = max(worst[kind], error)
                point[kind] = {"largest_difference": error, "expectation": expectation, "minus_beta_kl": bound}
            checks.append(point)

        _, curves = prefer(given, reference, given.train, BETA, evaluate)
        runs[name] = {
            "held_out": curves.held_out,
            "equation_16": checks,
            "observations": [{k: v for k, v in stats._asdict().items() if v is not None} for stats in monitor.history],
            "findings": [finding._asdict() for finding in monitor.findings],
        }

    ends = {name: run["held_out"][-1] for name, run in runs.items()}
    results = {"beta": BETA, "largest_difference_eq_16": worst, "runs": runs}
    tokens = {name: run["observations"][-1] for name, run in runs.items()}

    def text(name: str) -> str:
        end = ends[name]
        return (
            f"chosen {end['chosen_reward']:+.2f}, rejected {end['rejected_reward']:+.2f}, margin {end['margin']:+.2f},"
            f" ranked right {end['accuracy']:.1%}"
        )

    expected = {name: -BETA * now["chosen_kl_reference_policy"] for name, now in tokens.items()}
    seen = {
        name: ", ".join(finding["name"].replace("_", " ") for finding in run["findings"]) or "nothing"
        for name, run in runs.items()
    }
    paragraph = (
        f"After {ends['SFT first']['step']} steps of DPO, on {len(given.held_out)} held-out pairs: with SFT on the"
        f" chosen answers first {text('SFT first')}; without {text('no SFT')}. At the positions of chosen answers a"
        f" token drawn from the reference has an expected reward of {expected['SFT first']:.4f} with SFT and"
        f" {expected['no SFT']:.4f} without; the chosen token itself has"
        f" {tokens['SFT first']['chosen_token_reward']:+.4f} and {tokens['no SFT']['chosen_token_reward']:+.4f}. Eq. 16"
        f" held at every position of every evaluation: the largest difference of its two sides is"
        f" {worst['float64']:.1g} with models in float64, {worst['float32']:.1g} in float32 and"
        f" {worst['bfloat16']:.1g} in bf16. What the monitor said of the run with SFT first: {seen['SFT first']}; of"
        f" the other: {seen['no SFT']}."
    )

    figure, axes = panels("Implicit rewards of held-out answers during DPO", "SFT on the chosen answers first",
                          "No SFT: straight from the base model", "Equation 16")  # fmt: skip
    for axis, (name, run) in zip(axes, runs.items(), strict=False):
        steps = [p["step"] for p in run["held_out"]]
        for key, colour, label in (
            ("margin", GREY, "margin"),
            ("chosen_reward", BLUE, "chosen"),
            ("rejected_reward", ORANGE, "rejected"),
        ):
            values = [p[key] for p in run["held_out"]]
            axis.plot(steps, values, color=colour, lw=1.8)
            axis.annotate(f"{label} {values[-1]:+.2f}", (steps[-1], values[-1]), xytext=(-4, 5), ha="right",
                          textcoords="offset points", color=colour if colour != GREY else DARK, fontsize=8)  # fmt: skip
        axis.axhline(0, color=DARK, lw=0.6)
        axis.margins(y=0.15)
        axis.set_xlabel(f"steps of DPO ({name})")
        axis.set_ylabel("sequence reward")
    for name, colour in (("SFT first", BLUE), ("no SFT", ORANGE)):
        checks = runs[name]["equation_16"]
        steps = [p["step"] for p in checks]
        axes[2].plot(steps, [p["float64"]["expectation"] for p in checks], color=colour, lw=1.8,
                     label=rf"$E_{{ref}}[r]$, {name}")  # fmt: skip
        axes[2].plot(steps, [p["bfloat16"]["minus_beta_kl"] for p in checks], "o", color=colour, ms=4, mfc="none",
                     label=rf"$-\beta\,KL$ (models in bf16), {name}")  # fmt: skip
    axes[2].axhline(0, color=DARK, lw=0.6)
    axes[2].set_xlabel("steps of DPO")
    axes[2].set_ylabel("reward of a token drawn from the reference")
    axes[2].legend(loc="lower left")
    write(chosen, "decline", results, paragraph, figure, clock)


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
