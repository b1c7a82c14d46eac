"""One round of self-improvement on a pretrained model, measured by answers that are right or wrong.

    python examples/self_improve.py --model DIR --out OUT

DIR is an instruction-tuned causal language model in transformers format; nothing is downloaded. It is asked for
capitals of countries: of the training countries it makes pairs (four answers each, its own Yes or No picks best and
worst) and trains on them with DPO; of other countries its sampled answers are checked against the truth, before and
after. Printed: how often the judge prefers the right answer of two, the share of right answers with the paired
difference and its 95 % interval from resampling countries, and what the untrained model's judgement says of the answers
before and after.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkernels.intervals import bootstrap_mean
from qkernels.preference_classifier import PreferenceClassifier
from qkernels.self_preference import build_pairs, improve

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Egypt": "Cairo", "Canada": "Ottawa", "Kenya": "Nairobi",
    "Norway": "Oslo", "Spain": "Madrid", "Cuba": "Havana", "Iran": "Tehran", "Poland": "Warsaw", "Chile": "Santiago",
    "Italy": "Rome", "Turkey": "Ankara", "Ghana": "Accra", "Vietnam": "Hanoi", "Greece": "Athens", "Iraq": "Baghdad",
    "Austria": "Vienna", "Portugal": "Lisbon", "Australia": "Canberra", "Hungary": "Budapest", "Ireland": "Dublin",
    "Thailand": "Bangkok", "Sweden": "Stockholm", "Finland": "Helsinki", "Ecuador": "Quito", "Nepal": "Kathmandu",
    "Uganda": "Kampala", "Russia": "Moscow", "Denmark": "Copenhagen", "Lebanon": "Beirut",
}  # fmt: skip


def question(country: str) -> str:
    """What the model is asked."""
    return f"What is the capital of {country}? Answer in one short sentence."


def is_right(country: str, answer: str) -> bool:
    """Whether an answer names the capital."""
    return CAPITALS[country].lower() in answer.lower()


def answers_of(model: Any, tokenizer: Any, countries: Sequence[str], sampling: dict[str, Any]) -> list[list[str]]:
    """Sampled answers for each country, by the same random numbers at every call."""
    found: list[list[str]] = []

    def keep(prompts: Sequence[str], responses: Sequence[str], categories: Sequence[Any]) -> list[float]:
        found.append(list(responses))
        return [float(i) for i in range(len(responses))]

    build_pairs(model, tokenizer, map(question, countries), judge=keep, seed=1000, progress=sys.stderr,
                name="held-out answers", **sampling)  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of an instruction-tuned model")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--train", type=int, default=16, help="countries to train on (default: 16)")
    parser.add_argument("--held-out", type=int, default=16, help="countries to measure on (default: 16)")
    parser.add_argument("--samples", type=int, default=4, help="answers per country (default: 4)")
    parser.add_argument("--new-tokens", type=int, default=16, help="longest answer (default: 16)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: 1)")
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="(default: 5e-6)")
    parser.add_argument("--epochs", type=int, default=2, help="(default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    countries = list(CAPITALS)
    train, held_out = countries[: options.train], countries[options.train :][: options.held_out]
    sampling = {"samples": options.samples, "temperature": 0.7, "max_new_tokens": options.new_tokens}
    untrained = copy.deepcopy(model)

    before = answers_of(model, tokenizer, held_out, sampling)
    found = improve(
        model, tokenizer, map(question, train), options.out, rounds=options.rounds, batch_size=4,
        learning_rate=options.learning_rate, epochs=options.epochs, progress=sys.stderr, **sampling,
    )  # fmt: skip
    after = answers_of(found.model, tokenizer, held_out, sampling)

    lines = (options.out / "round-1/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    told = [(is_right(country, pair["chosen"]), is_right(country, pair["rejected"]))
            for pair in map(json.loads, lines) for country in train if question(country) == pair["prompt"]]  # fmt: skip
    decided = [chosen for chosen, rejected in told if chosen != rejected]
    shares = [[statistics.mean(is_right(c, a) for a in given) for c, given in zip(held_out, answers, strict=True)]
              for answers in (before, after)]  # fmt: skip
    judge = PreferenceClassifier(untrained, tokenizer)
    scores = [
        judge.scores([question(c) for c, given in zip(held_out, answers, strict=True) for _ in given],
                     [answer for given in answers for answer in given]).mean().item()
        for answers in (before, after)
    ]  # fmt: skip
    difference = [b - a for a, b in zip(*shares, strict=True)]
    gain = bootstrap_mean(difference, bounds=(-1.0, 1.0))
    print(
        f"{options.model}: {len(train)} countries to train on, {len(held_out)} held out, {options.samples} answers"
        f" each, {options.rounds} round(s), learning rate {options.learning_rate}, {options.epochs} epochs"
    )
    print(f"pairs of the first round: {len(told)}; of the {len(decided)} with one right answer, the judge preferred it"
          f" in {sum(decided)}")  # fmt: skip
    print(f"right answers, held out: {statistics.mean(shares[0]):.3f} before, {statistics.mean(shares[1]):.3f} after,"
          f" difference {gain.estimate:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")  # fmt: skip
    print(f"score by the untrained model: {scores[0]:.3f} before, {scores[1]:.3f} after")
    for row in found.rounds:
        print(f"round {row.number}: {row.pairs} pairs, mean score {row.mean_score:.3f}, mean gap {row.mean_gap:.3f}")
    print(f"CPU time: {time.process_time() - start:.0f} s")


if __name__ == "__main__":
    main()
