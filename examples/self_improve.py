"""Self-improvement on a pretrained model, measured by answers that are right or wrong (Garg et al. 2025).

    python examples/self_improve.py --model DIR

DIR is an instruction-tuned causal language model in transformers format; nothing is downloaded. It is asked for
capital, continent, language and currency of countries. Of the training countries it makes pairs (four answers to each
question, its own Yes or No picks best and worst) and trains on them with DPO; of other countries its sampled answers
are checked against the truth, before and after, with the same random numbers. Reported: how often the judge prefers the
right answer of two, the share of right answers with the paired difference, and what the untrained model's judgement
says of the answers before and after. Intervals of 95 % resample countries.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import BLUE, GREY, Clock, Options, interval, panels, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkernels.demo import synthetic
from qkernels.intervals import bootstrap_mean
from qkernels.preference_classifier import PreferenceClassifier
from qkernels.self_preference import build_pairs, improve

QUESTIONS = {
    "capital": "What is the capital of {country}? Answer in one short sentence.",
    "continent": "On which continent does {country} lie? Answer in one short sentence.",
    "language": "What is the official language of {country}? Answer in one short sentence.",
    "currency": "What is the currency of {country} called? Answer in one short sentence.",
}
WORLD = synthetic.facts()
Asked = tuple[str, str]  # a country, and which of its facts


def question(asked: Asked) -> str:
    """What the model reads."""
    return QUESTIONS[asked[1]].format(country=asked[0])


def is_right(asked: Asked, answer: str) -> bool:
    """Whether an answer names the fact."""
    return WORLD[asked[0]][asked[1]].lower() in answer.lower()


def answers_of(model: Any, tokenizer: Any, asked: Sequence[Asked], sampling: dict[str, Any]) -> list[list[str]]:
    """Sampled answers to each question, by the same random numbers at every call; equal ones count once."""
    found: list[list[str]] = []

    def keep(prompts: Sequence[str], responses: Sequence[str], categories: Sequence[Any]) -> list[float]:
        found.append(list(responses))
        return [float(i) for i in range(len(responses))]

    build_pairs(model, tokenizer, map(question, asked), judge=keep, seed=1000, progress=sys.stderr,
                name="held-out answers", **sampling)  # fmt: skip
    return found


def by_country(asked: Sequence[Asked], values: Sequence[float]) -> list[float]:
    """Means of one number per question over the questions about each country."""
    groups: dict[str, list[float]] = {}
    for (country, _), value in zip(asked, values, strict=True):
        groups.setdefault(country, []).append(value)
    return [statistics.mean(group) for group in groups.values()]


def judged_right(lines: Sequence[str], asked: Sequence[Asked]) -> list[bool]:
    """Of the pairs with one right answer, whether the judge preferred it."""
    truth = {question(one): one for one in asked}
    told = [
        (is_right(truth[pair["prompt"]], pair["chosen"]), is_right(truth[pair["prompt"]], pair["rejected"]))
        for pair in map(json.loads, lines)
    ]
    return [chosen for chosen, rejected in told if chosen != rejected]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of an instruction-tuned model")
    add("--out", type=Path, default=Path("experiments"), help="where to write (default: experiments)")
    add("--train", type=int, default=20, help="countries to train on (default: 20)")
    add("--held-out", type=int, default=20, help="countries to measure on (default: 20)")
    add("--samples", type=int, default=4, help="answers to a question (default: 4)")
    add("--new-tokens", type=int, default=20, help="longest answer (default: 20)")
    add("--rounds", type=int, default=1, help="(default: 1, as in the paper)")
    add("--learning-rate", type=float, default=5e-6, help="(default: 5e-6)")
    add("--epochs", type=int, default=2, help="(default: 2)")
    add("--threads", type=int, default=1, help="(default: 1)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    countries = list(WORLD)
    train, held_out = (
        [(country, kind) for country in part for kind in QUESTIONS]
        for part in (countries[: given.train], countries[given.train :][: given.held_out])
    )
    sampling = {"samples": given.samples, "temperature": 0.7, "max_new_tokens": given.new_tokens}
    untrained = copy.deepcopy(model)

    before = answers_of(model, tokenizer, held_out, sampling)
    with tempfile.TemporaryDirectory() as folder:
        found = improve(
            model, tokenizer, map(question, train), Path(folder) / "rounds", rounds=given.rounds, batch_size=4,
            learning_rate=given.learning_rate, epochs=given.epochs, progress=sys.stderr, **sampling,
        )  # fmt: skip
        lines = (found.folder / "round-1/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    after = answers_of(found.model, tokenizer, held_out, sampling)

    decided = judged_right(lines, train)
    shares = [
        [
            statistics.mean(is_right(one, answer) for answer in answers)
            for one, answers in zip(held_out, side, strict=True)
        ]
        for side in (before, after)
    ]
    judge = PreferenceClassifier(untrained, tokenizer)
    scores = [
        [
            judge.scores([question(one)] * len(answers), answers).mean().item()
            for one, answers in zip(held_out, side, strict=True)
        ]
        for side in (before, after)
    ]
    gains = {
        name: interval(by_country(held_out, [b - a for a, b in zip(*values, strict=True)]), 0)
        for name, values in (("right", shares), ("score", scores))
    }
    preferred = bootstrap_mean([float(one) for one in decided] or [0.5], bounds=(0.0, 1.0))
    results = {
        "train_countries": given.train, "held_out_countries": given.held_out, "questions": len(QUESTIONS),
        "samples": given.samples, "longest": given.new_tokens, "learning_rate": given.learning_rate,
        "epochs": given.epochs, "beta": 0.1,
        "rounds": [row._asdict() for row in found.rounds],
        "pairs_with_one_right_answer": len(decided), "judge_preferred_it": sum(decided),
        "judge_accuracy": {"mean": preferred.estimate, "low": preferred.low, "high": preferred.high},
        "right": {
            kind: [
                statistics.mean(v for (_, k), v in zip(held_out, side, strict=True) if k == kind) for side in shares
            ]
            for kind in QUESTIONS
        },
        "right_before": interval(by_country(held_out, shares[0]), 0),
        "right_after": interval(by_country(held_out, shares[1]), 0),
        "right_difference": gains["right"],
        "score_before": interval(by_country(held_out, scores[0]), 0),
        "score_after": interval(by_country(held_out, scores[1]), 0),
        "score_difference": gains["score"],
        "answers": [[question(one), *sides] for one, *sides in zip(held_out[:4], before[:4], after[:4], strict=True)],
    }  # fmt: skip
    paragraph = (
        f"{len(train)} questions to train on, {len(held_out)} about other countries; {found.rounds[0].pairs} pairs in"
        f" the first round, of whose {len(decided)} with one right answer the judge preferred it in {sum(decided)}"
        f" ({preferred.estimate:.2f}, {preferred.low:.2f} to {preferred.high:.2f}). Right answers, held out:"
        f" {statistics.mean(shares[0]):.3f} before, {statistics.mean(shares[1]):.3f} after, difference"
        f" {_signed(gains['right'])}. Score by the untrained model: {statistics.mean(scores[0]):.3f} before,"
        f" {statistics.mean(scores[1]):.3f} after, difference {_signed(gains['score'])}."
    )
    command = f"--train {given.train} --held-out {given.held_out} --samples {given.samples} --rounds {given.rounds}"
    command += f" --learning-rate {given.learning_rate:g} --epochs {given.epochs}"
    chosen = Options(given.out, 0, False, None, f"--model {given.model.name} {command}", given.model)
    write(chosen, "self_improve", results, paragraph, _figure(results), clock)


def _signed(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _figure(results: dict[str, Any]) -> Any:
    figure, (facts, means) = panels(
        "Self-improvement, before and after", "Right answers, by question", "All questions, with intervals"
    )
    kinds = list(QUESTIONS)
    for side, (label, colour) in enumerate((("before", GREY), ("after", BLUE))):
        places = [i + 0.38 * side for i in range(len(kinds))]
        facts.bar(places, [results["right"][kind][side] for kind in kinds], 0.36, color=colour, label=label)
        for place, name in enumerate(("right", "score")):
            found = results[f"{name}_{label}"]
            error = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
            means.errorbar(place + 0.2 * side, found["mean"], error, fmt="o", color=colour, capsize=3)
    facts.set_xticks([i + 0.19 for i in range(len(kinds))], kinds)
    facts.legend()
    means.set_xticks([0.1, 1.1], ["right answers", "judge's score"])
    means.set_xlim(-0.4, 1.6)
    means.set_ylim(0, 1)
    return figure


if __name__ == "__main__":
    main()
