"""Credit assignment, measured: do the token rewards of DPO fall on the wrong words? ("From r to Q*", section 5.1)

    python examples/credit.py

A model is trained on pairs whose rejected answers contain one or two planted errors; it is told which answer is worse,
never where. On held-out pairs, whose errors it has not seen, each token is scored by minus its reward, and the score is
held against the places of the errors: AUROC within an answer, hit@k, and whether a second error is still found. The
same for baselines: the log-probs and entropies of the models, and the token rewards of a model trained on preferences
that were shuffled. All twice: with logits as the model makes them, and rounded to bf16 before the softmax.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from common import BLUE, DARK, GREY, ORANGE, Clock, fine_tune, options, panels, prefer, setting, write
from torch import Tensor
from transformers import PreTrainedModel

from qkernels import credit, token_stats
from qkernels.demo.encode import IGNORE, EncodedPair, pair_batch

BETA = 0.1


@torch.no_grad()
def rejected_tokens(
    model: PreTrainedModel, pairs: Sequence[EncodedPair], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """log pi and entropy of each token of the rejected answers, from logits rounded to `dtype`."""
    logps, entropies = [], []
    model.eval()
    for start in range(0, len(pairs), 50):
        batch = pair_batch(pairs[start : start + 50], model.config.pad_token_id)
        ids, labels = (x.chunk(2)[1].contiguous() for x in batch)
        stats = token_stats(model(input_ids=ids).logits.to(dtype), labels, outputs=("logps", "entropy"))
        for row, label in enumerate(labels):
            logps.append(stats.logps[row][label != IGNORE])
            entropies.append(stats.entropy[row][label != IGNORE])
    return logps, entropies


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments)
    clock = Clock()
    given = setting(chosen, evaluations=20)
    pairs = given.held_out
    planted = [pair.planted for pair in pairs]
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def found(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
        measured = credit.detection(scores, planted)
        return {k: v for k, v in measured._asdict().items() if not k.startswith("answers")}

    def by_reward(policy_logps: list[Tensor], reference_logps: list[Tensor]) -> list[list[float]]:
        return [(-BETA * (p - q)).tolist() for p, q in zip(policy_logps, reference_logps, strict=True)]

    reference = fine_tune(given, given.train)
    before = {name: rejected_tokens(reference, pairs, dtype) for name, dtype in precisions.items()}

    course: list[dict[str, Any]] = []

    def evaluate(policy: PreTrainedModel, step: int) -> None:
        if step == 0:  # all rewards are 0
            return
        point: dict[str, Any] = {"step": step}
        for name, dtype in precisions.items():
            scores = by_reward(rejected_tokens(policy, pairs, dtype)[0], before[name][0])
            measured = found(scores)
            point[name] = {"auroc": measured["auroc"], "hit_at_1": measured["hit_at_1"]}
            if name == "fp32":
                point["mean_absolute_reward"] = credit.mean(abs(x) for row in scores for x in row)
        course.append(point)

    policy, curves = prefer(given, reference, given.train, BETA, evaluate)
    rng = random.Random(f"shuffled {given.seed}")
    shuffled = [
        pair._replace(chosen=pair.rejected, rejected=pair.chosen) if rng.random() < 0.5 else pair
        for pair in given.train
    ]
    misled, _ = prefer(given, reference, shuffled, BETA)

    table: dict[str, dict[str, Any]] = {}
    for name, dtype in precisions.items():
        logps, entropies = rejected_tokens(policy, pairs, dtype)
        misled_logps, _ = rejected_tokens(misled, pairs, dtype)
        before_logps, before_entropies = before[name]
        scores = {
            "token reward": by_reward(logps, before_logps),
            "token reward, shuffled preferences": by_reward(misled_logps, before_logps),
            "-log pi, after DPO": [(-row).tolist() for row in logps],
            "-log pi, SFT model": [(-row).tolist() for row in before_logps],
            "entropy, after DPO": [row.tolist() for row in entropies],
            "entropy, SFT model": [row.tolist() for row in before_entropies],
        }
        for score, values in scores.items():
            table.setdefault(score, {})[name] = found(values)
    chance = credit.mean(credit.hit_at_k([0.0] * len(flags), flags, 1) for flags in planted if any(flags))
    exact = table["token reward"]["fp32"]
    rivals = {name: row["fp32"]["auroc"] for name, row in table.items() if name != "token reward"}
    best_rival = max(rivals, key=rivals.__getitem__)
    early = course[0]
    results = {
        "answers": len(planted),
        "answers_with_two_errors": sum(len(credit.error_spans(flags)) > 1 for flags in planted),
        "chance_hit_at_1": chance,
        "beta": BETA,
        "scores": table,
        "course": course,
        "held_out": curves.held_out[-1],
    }
    seconds = exact["second_error_recall"]
    paragraph = (
        f"On {len(planted)} held-out rejected answers the token reward finds the planted errors with an AUROC of"
        f" {exact['auroc']:.3f}; the lowest reward of an answer stands on an error in {exact['hit_at_1']:.1%} (by"
        f" chance {chance:.1%}), one of the three lowest in {exact['hit_at_3']:.1%}"
        + (f", and with the first error taken out the second is the lowest in {seconds:.1%}" if seconds else "")
        + f". The best baseline is {best_rival} with {rivals[best_rival]:.3f}; rewards from shuffled preferences reach"
        f" {rivals['token reward, shuffled preferences']:.3f}. With logits rounded to bf16 before the softmax the"
        f" AUROC is {table['token reward']['bf16']['auroc']:.3f} at the end of training and {early['bf16']['auroc']:.3f}"
        f" instead of {early['fp32']['auroc']:.3f} after {early['step']} steps, when the mean reward of a token is"
        f" {early['mean_absolute_reward']:.1g}."
    )

    figure, (bars, lines) = panels("Which tokens does DPO blame? Held-out answers with planted errors",
                                   "Finding the planted errors", "Token rewards in the course of training")  # fmt: skip
    names = sorted(table, key=lambda name: table[name]["fp32"]["auroc"])
    for offset, precision, shade in ((0.2, "fp32", 1.0), (-0.2, "bf16", 0.45)):
        bars.barh(
            [i + offset for i in range(len(names))],
            [table[name][precision]["auroc"] for name in names],
            height=0.36,
            color=[BLUE if name == "token reward" else GREY for name in names],
            alpha=shade,
        )
    for i, name in enumerate(names):
        for offset, precision in ((0.2, "fp32"), (-0.2, "bf16")):
            value = table[name][precision]["auroc"]
            bars.text(value + 0.004, i + offset, f"{value:.3f}", va="center", fontsize=7, color=DARK)
    bars.set_yticks(range(len(names)), names)
    bars.set_xlim(0.4, 1.08)
    bars.set_xlabel("AUROC (solid: logits as they are; pale: rounded to bf16)")
    bars.grid(axis="y", visible=False)
    steps = [point["step"] for point in course]
    for precision, colour in (("fp32", BLUE), ("bf16", ORANGE)):
        label = "logits as they are" if precision == "fp32" else "rounded to bf16"
        lines.plot(steps, [p[precision]["auroc"] for p in course], color=colour, label=f"AUROC, {label}")
        lines.plot(
            steps, [p[precision]["hit_at_1"] for p in course], color=colour, ls="--", lw=1, label=f"hit@1, {label}"
        )
    lines.set_xlabel("steps of DPO")
    lines.set_ylim(0, 1.03)
    lines.legend(loc="lower right")
    figure.set_size_inches(10.5, 3.8)
    write(chosen, "credit", results, paragraph, figure, clock)


if __name__ == "__main__":
    main()
