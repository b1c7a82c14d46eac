"""Credit assignment, measured: do the token rewards of DPO fall on the wrong words? ("From r to Q*", section 5.1)

    python examples/credit.py
    python examples/credit.py --model DIR --pairs FILE

The errors are ones that the reference itself makes: for each fact there are two popular misconceptions, and the texts
that the reference learns from have them. DPO is told which of two answers is worse, never where; it meets only one of
the two misconceptions. The held-out answers have the other one. And not all that is unlikely is wrong: each answer ends
with the name of a source that cannot be guessed. Each token is scored by minus its reward, and the score held against
the places of the errors: AUROC within an answer, hit@k, and whether a second error is still found. The same for
baselines: log-probs and entropies of the models, and the token rewards of a model trained on shuffled preferences. All
twice: with logits as the model makes them, and rounded to bf16 before the softmax.

On a pretrained model the text is natural: beginnings of answers out of a file of real pairs, in which words are
replaced by others of the same kind. The policy that has learnt to tell these apart then reads whole real answers, and
its least rewarded spans are shown.
"""

from __future__ import annotations

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
from pretrained import Study, Training, passages, plant_errors
from torch import Tensor
from transformers import PreTrainedModel

from qkernels import credit, token_stats
from qkernels.data import Preference
from qkernels.demo import synthetic
from qkernels.demo.encode import IGNORE, EncodedPair, pair_batch
from qkernels.demo.options import Sizes
from qkernels.score.encode import EncodedAnswer

BETA = 0.1


class RealSizes(NamedTuple):
    """The experiment on a pretrained model.

    prompt: characters of a prompt.
    shortest, longest: characters of a passage.
    max_length: tokens of prompt and answer.
    sources: how many of the real pairs passages are taken from, for training and held out.
    held_out: passages with planted errors on which scores are measured.
    real: pairs of which the answers are read as they are, and how many of their least rewarded spans to report.
    """

    prompt: int
    shortest: int
    longest: int
    max_length: int
    sources: tuple[int, int]
    held_out: int
    real: tuple[int, int]
    dpo: Training


NATURAL = RealSizes(80, 60, 170, 128, (110, 50), 36, (8, 12), Training(16, 4, 1e-4, 12))
NATURAL_TINY = RealSizes(80, 10, 200, 96, (6, 6), 3, (2, 2), Training(2, 2, 1e-3, 1))
SYLLABLES = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]


def misconceptions(sizes: Sizes, seed: int) -> Texts:
    """Answers about countries. Errors: of the base texts either misconception, of the training pairs the first, of the
    held-out pairs the second."""
    rng = random.Random(f"credit {seed}")
    world = synthetic.facts()
    first: synthetic.WrongValues = {}
    second: synthetic.WrongValues = {}
    for country in world:
        for kind in synthetic.KINDS:
            wrong = synthetic.wrong_values(country, kind, world)
            rng.shuffle(wrong)
            first[country, kind], second[country, kind] = wrong[:1], wrong[1:2]
    either = {fact: first[fact] + second[fact] for fact in first}

    def pairs(count: int, wrong: synthetic.WrongValues) -> list[Preference]:
        written = []
        for _ in range(count):
            pair = synthetic.write_pair(rng, world, wrong)
            name = "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()
            end = f" This is from a letter by {name}."
            written.append(pair._replace(chosen=pair.chosen + end, rejected=pair.rejected + end))
        return written

    base = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs(sizes.train_pairs, either)]
    return Texts(base, pairs(sizes.train_pairs, first), pairs(sizes.held_out_pairs, second))


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


def natural_text(study: Study, sizes: RealSizes) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """Passages with planted errors, to train on and held out, and real pairs: all of different conversations."""
    rng = random.Random(f"natural {study.seed}")
    pairs = study.real_pairs(sizes.prompt, sum(sizes.sources) + sizes.real[0])
    parts = pairs[: sizes.sources[0]], pairs[sizes.sources[0] : sum(sizes.sources)]
    train, held_out = (plant_errors(rng, passages(part, sizes.shortest, sizes.longest)) for part in parts)
    return train, held_out[: sizes.held_out], pairs[sum(sizes.sources) :]


def on_natural_text(chosen: Options) -> None:
    """The experiment on a pretrained model."""
    clock = Clock()
    sizes = NATURAL_TINY if chosen.tiny else NATURAL
    study = Study(chosen, sizes.max_length)
    train, held_out, real = natural_text(study, sizes)
    rng = random.Random(f"shuffled {chosen.seed}")
    shuffled = [
        pair._replace(chosen=pair.rejected, rejected=pair.chosen) if rng.random() < 0.5 else pair for pair in train
    ]
    policies = {
        "": study.dpo("errors", train, sizes.dpo, None, BETA)[0],
        ", shuffled preferences": study.dpo("errors-shuffled", shuffled, sizes.dpo, None, BETA)[0],
    }
    answers = [rejected for _, rejected in study.encode(held_out)]
    planted = [credit.overlapping(answer.offsets, pair.planted) for answer, pair in zip(answers, held_out, strict=True)]
    before, before_entropies = rejected_scores(study, None, answers)
    scores: dict[str, list[list[float]]] = {
        "-log pi, reference": [[-x for x in row] for row in before],
        "entropy, reference": before_entropies,
    }
    for name, policy in policies.items():
        after, entropies = rejected_scores(study, policy, answers)
        scores[f"token reward{name}"] = [
            [-BETA * (p - q) for p, q in zip(ours, theirs, strict=True)]
            for ours, theirs in zip(after, before, strict=True)
        ]
        if not name:
            scores["-log pi, after DPO"] = [[-x for x in row] for row in after]
            scores["entropy, after DPO"] = entropies
    table: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        measured = credit.detection(values, planted)
        each = [
            (credit.auroc(row, flags), credit.hit_at_k(row, flags, 1))
            for row, flags in zip(values, planted, strict=True)
            if any(flags) and not all(flags)
        ]
        table[name] = {
            **{key: value for key, value in measured._asdict().items() if not key.startswith("answers")},
            "auroc_interval": interval([auroc for auroc, _ in each], chosen.seed),
            "hit_at_1_interval": interval([hit for _, hit in each], chosen.seed),
        }
    chance = credit.mean(credit.hit_at_k([0.0] * len(flags), flags, 1) for flags in planted if any(flags))
    spans, shown = real_spans(study, policies[""], real, sizes.real[1])
    results = {
        "answers": len(planted),
        "answers_with_two_errors": sum(len(credit.error_spans(flags)) > 1 for flags in planted),
        "chance_hit_at_1": chance,
        "beta": BETA,
        "sizes": sizes._asdict() | {"dpo": sizes.dpo._asdict()},
        "example": {"chosen": held_out[0].chosen, "rejected": held_out[0].rejected, "planted": held_out[0].planted},
        "scores": table,
        "train": [{key: entry[key] for key in ("loss", "rewards/accuracies")} for entry in study.log(policies[""])],
        "real_spans": spans,
    }
    paragraph = natural_paragraph(results, sizes)
    figure = natural_figure(chosen, table, shown)
    write(chosen, "credit", results, paragraph, figure, clock)


def rejected_scores(
    study: Study, training: str | None, answers: Sequence[EncodedAnswer]
) -> tuple[list[list[float]], list[list[float]]]:
    """log pi and entropy of each token of the answers under a model; computed once."""

    def compute() -> list[list[list[float]]]:
        model = study.model(training)
        return [
            [[float(x) for x in row] for row in study.scores(model, answers, output)] for output in ("logps", "entropy")
        ]

    logps, entropies = study.once("rejected", ([(a.prompt, a.ids) for a in answers], training), compute)
    return logps, entropies


def real_spans(
    study: Study, policy: str, pairs: Sequence[Preference], limit: int
) -> tuple[list[dict[str, Any]], list[tuple[str, list[str], list[float]]]]:
    """The least rewarded spans of real answers that no training has seen.

    Returns:
        The spans, and of the three rejected answers with the lowest ones: a title, the tokens' texts, their rewards.
    """
    sides = [(number, side, answer) for number, pair in enumerate(study.encode(pairs))
             for side, answer in zip(("chosen", "rejected"), pair, strict=True)]  # fmt: skip
    answers = [answer for _, _, answer in sides]
    logps = [rejected_scores(study, name, answers)[0] for name in (None, policy)]
    found = []
    for (number, side, answer), before, after in zip(sides, *logps, strict=True):
        rewards = [BETA * (p - q) for p, q in zip(after, before, strict=True)]
        for span in credit.low_reward_spans(rewards, limit=2):
            text = "".join(answer.texts[span.start : span.end])
            found.append(
                {"pair": number, "side": side, "reward": span.reward, "text": text, "tokens": answer.texts,
                 "rewards": rewards}
            )  # fmt: skip
    found.sort(key=lambda span: span["reward"])
    shown: dict[int, tuple[str, list[str], list[float]]] = {}
    for span in found:
        if span["side"] == "rejected" and span["pair"] not in shown and len(shown) < 3:
            title = f"Real pair {span['pair']}, rejected: {sum(span['rewards']):+.2f}"
            shown[span["pair"]] = (title, span["tokens"], span["rewards"])
    kept = [{key: span[key] for key in ("pair", "side", "reward", "text")} for span in found[:limit]]
    return kept, list(shown.values())


def natural_paragraph(results: dict[str, Any], sizes: RealSizes) -> str:
    table = results["scores"]

    def line(name: str) -> str:
        row = table[name]
        auroc, hit = row["auroc_interval"], row["hit_at_1_interval"]
        return (
            f"AUROC {row['auroc']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f}), hit@1 {row['hit_at_1']:.1%}"
            f" ({hit['low']:.1%} to {hit['high']:.1%}), hit@3 {row['hit_at_3']:.1%}"
            + (f", second error {row['second_error_recall']:.1%}" if row["second_error_recall"] is not None else "")
        )

    return (
        f"On {results['answers']} held-out passages of natural text with planted errors"
        f" ({results['answers_with_two_errors']} with two), after {sizes.dpo.steps} steps of DPO with"
        f" {sizes.dpo.pairs} pairs each (by chance hit@1 {results['chance_hit_at_1']:.1%}): "
        + "; ".join(f"{name}: {line(name)}" for name in sorted(table, key=lambda name: -table[name]["auroc"]))
        + "."
    )


def natural_figure(
    chosen: Options, table: dict[str, dict[str, Any]], shown: Sequence[tuple[str, list[str], list[float]]]
) -> Any:
    """AUROC and hit rates on the left; on the right real answers, their tokens coloured by their rewards."""
    figure, (bars, hits, texts) = panels(
        f"Which tokens does DPO blame? {chosen.model.name}, natural text", "Finding planted errors: AUROC",
        "Lowest token on an error: hit@1", "Real rejected answers (orange: low reward)",
    )  # fmt: skip
    names = sorted(table, key=lambda name: table[name]["auroc"])
    for axis, key in ((bars, "auroc"), (hits, "hit_at_1")):
        for i, name in enumerate(names):
            row, colour = table[name][f"{key}_interval"], BLUE if name == "token reward" else GREY
            axis.barh(i, row["mean"], color=colour, height=0.6)
            axis.plot([row["low"], row["high"]], [i, i], color=DARK, lw=1)
            axis.text(row["high"] + 0.02, i, f"{row['mean']:.3f}", va="center", fontsize=7, color=DARK)
        axis.set_yticks(range(len(names)), names if axis is bars else [""] * len(names))
        axis.set_xlim(0, 1.15)
        axis.grid(axis="y", visible=False)
    texts.axis("off")
    scale = max((abs(x) for _, _, rewards in shown for x in rewards), default=1.0)
    figure.set_size_inches(14, 4)
    texts.set_xlim(0, 1)
    texts.set_ylim(0, 1)
    y = 0.97
    for title, tokens, rewards in shown:
        texts.text(0, y, title, fontsize=7, color=DARK, weight="bold")
        y, x = y - 0.05, 0.0
        for token, reward in zip(tokens, rewards, strict=True):
            for part in token.replace("\n", " ").splitlines() or [""]:
                width = 0.0128 * len(part)
                if x + width > 1:
                    x, y = 0.0, y - 0.05
                if y < title_room(shown, title):
                    break
                shade = min(1.0, abs(reward) / scale) ** 0.5
                box = {"facecolor": ORANGE if reward < 0 else BLUE, "alpha": 0.75 * shade, "pad": 0.6, "lw": 0}
                texts.text(x, y, part.replace("$", r"\$"), fontsize=6, family="monospace", bbox=box)
                x += width
        y = title_room(shown, title) - 0.05
    return figure


def title_room(shown: Sequence[tuple[str, list[str], list[float]]], title: str) -> float:
    """The lower edge of the part of the panel that an answer may take."""
    number = [name for name, _, _ in shown].index(title)
    return 0.97 - (number + 1) * 0.97 / len(shown) + 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments)
    if chosen.model is not None:
        on_natural_text(chosen)
        return
    clock = Clock()
    given = setting(chosen, misconceptions, steps=160, evaluations=16)
    pairs = given.held_out
    planted = [pair.planted for pair in pairs]
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def found(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
        measured = credit.detection(scores, planted)
        return {k: v for k, v in measured._asdict().items() if not k.startswith("answers")}

    def by_reward(policy_logps: list[Tensor], reference_logps: list[Tensor]) -> list[list[float]]:
        return [(-BETA * (p - q)).tolist() for p, q in zip(policy_logps, reference_logps, strict=True)]

    reference = fine_tune(given, given.base)
    before = {name: rejected_tokens(reference, pairs, dtype) for name, dtype in precisions.items()}

    course: list[dict[str, Any]] = []

    def evaluate(policy: PreTrainedModel, step: int) -> None:
        if step == 0:  # all rewards are 0
            return
        point: dict[str, Any] = {"step": step}
        rewards = {}
        for name, dtype in precisions.items():
            scores = by_reward(rejected_tokens(policy, pairs, dtype)[0], before[name][0])
            measured = found(scores)
            point[name] = {"auroc": measured["auroc"], "hit_at_1": measured["hit_at_1"]}
            rewards[name] = torch.tensor([x for row in scores for x in row], dtype=torch.float64)
        size, error = rewards["fp32"], rewards["bf16"] - rewards["fp32"]
        point["mean_absolute_reward"] = size.abs().mean().item()
        point["rounding_error"] = (error.square().mean() / size.square().mean()).sqrt().item()
        point["largest_rounding_error"] = error.abs().max().item()
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
            "-log pi, reference": [(-row).tolist() for row in before_logps],
            "entropy, after DPO": [row.tolist() for row in entropies],
            "entropy, reference": [row.tolist() for row in before_entropies],
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
    late = table["token reward"]["bf16"]
    paragraph = (
        f"On {len(planted)} held-out rejected answers the token reward finds the planted errors with an AUROC of"
        f" {exact['auroc']:.3f}; the lowest reward of an answer stands on an error in {exact['hit_at_1']:.1%} (by"
        f" chance {chance:.1%}), one of the three lowest in {exact['hit_at_3']:.1%}"
        + (f", and with the first error taken out the second is the lowest in {seconds:.1%}" if seconds else "")
        + f". The best baseline is {best_rival}: AUROC {rivals[best_rival]:.3f}, hit@1"
        f" {table[best_rival]['fp32']['hit_at_1']:.1%}; rewards from shuffled preferences reach"
        f" {rivals['token reward, shuffled preferences']:.3f}. With logits rounded to bf16 before the softmax: AUROC"
        f" {late['auroc']:.3f} and hit@1 {late['hit_at_1']:.1%} at the end of training; after {early['step']} steps,"
        f" when a token's reward is {early['mean_absolute_reward']:.1g} on average and the rounding errs by"
        f" {early['rounding_error']:.1%} of that (root mean squares; {course[-1]['rounding_error']:.1%} at the end),"
        f" {early['bf16']['auroc']:.3f} and {early['bf16']['hit_at_1']:.1%} instead of {early['fp32']['auroc']:.3f} and"
        f" {early['fp32']['hit_at_1']:.1%}."
    )

    figure, (bars, lines, errors) = panels(
        "Which tokens does DPO blame? Held-out answers with planted errors", "Finding the errors",
        "Token rewards in the course of training", "What rounding logits to bf16 does to them",
    )  # fmt: skip
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
    lines.set_ylim(0.5, 1.02)
    errors.plot(steps, [100 * point["rounding_error"] for point in course], color=ORANGE)
    errors.set_ylim(0, None)
    errors.set_xlabel("steps of DPO")
    errors.set_ylabel("error of a token reward, % of its size (RMS)")
    lines.legend(loc="lower right")
    figure.set_size_inches(13.5, 3.7)
    write(chosen, "credit", results, paragraph, figure, clock)


if __name__ == "__main__":
    main()
