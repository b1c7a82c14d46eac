"""Beam search on DPO policies, measured: wider is better, until it is not? ("From r to Q*", section 5.2)

    python examples/beam.py

Searching for the likeliest answer of a policy is searching with its value function (eq. 13). A reference model is
trained on right and wrong answers alike, and three policies from it, by DPO with three betas. Each is asked about every
country with beams of width 1 to 20, and the answers are judged by a checker that knows the facts: the true score of an
answer is the share of its sentences that state a right fact about the country which it has not stated before. Beside it
stand the answer's length, whether it ends, its log-probability, which is what the search maximises, and its implicit
reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from common import BLUE, GREEN, GREY, ORANGE, Clock, Setting, fine_tune, options, panels, prefer, setting, write
from transformers import PreTrainedModel

from qkernels.credit import mean
from qkernels.data import Message
from qkernels.demo import synthetic
from qkernels.demo.tokenizer import encode_prompts
from qkernels.search import beam_search

BETAS = (0.02, 0.1, 0.5)
WIDTHS = (1, 2, 3, 5, 10, 20)
QUESTIONS = ("Tell me about {country}.", "What should I know about {country}?")
LONGEST = 100


class Verdict(NamedTuple):
    """What the checker finds in an answer: sentences that state a right fact for the first time, sentences that say
    again what has been said, and all sentences; the others are wrong or none of the known forms."""

    right: int
    repeated: int
    sentences: int

    @property
    def score(self) -> float:
        return self.right / self.sentences if self.sentences else 0.0


class Checker:
    """Knows the facts and the ways in which an answer may state them."""

    def __init__(self) -> None:
        self.world = synthetic.facts()
        self.forms = [
            (kind, re.compile(_pattern(form))) for kind, forms in synthetic.SENTENCES.items() for form in forms
        ]

    def judge(self, country: str, answer: str) -> Verdict:
        """Read an answer sentence by sentence; what follows the last full stop is a sentence too."""
        sentences = [part.strip() for part in answer.split(".") if part.strip()]
        stated: set[str] = set()
        right = repeated = 0
        for sentence in sentences:
            for kind, form in self.forms:
                match = form.fullmatch(sentence)
                if match is None or match.groupdict().get("country", country) != country:
                    continue
                value = match["value"]
                if kind in stated:
                    repeated += 1
                elif value not in synthetic.wrong_values(country, kind, self.world):
                    right += value in {known[kind] for known in self.world.values()}
                stated.add(kind)
                break
        return Verdict(right, repeated, len(sentences))


def _pattern(form: str) -> str:
    """A form of `synthetic.SENTENCES` as a regular expression."""
    pattern = re.escape(form.rstrip(".")).replace(r"\{value\}", "(?P<value>.+)")
    return pattern.replace(r"\{country\}", "(?P<country>.+)", 1)


def ask(given: Setting, countries: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Prompts about each country, padded on the left, their mask, and the country of each."""
    questions = [(country, form) for country in countries for form in QUESTIONS]
    rows = encode_prompts(
        given.tokenizer, [(Message("user", form.format(country=country)),) for country, form in questions]
    )
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), given.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask, [country for country, _ in questions]


def measure(
    given: Setting,
    checker: Checker,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    prompts: tuple[torch.Tensor, torch.Tensor, list[str]],
    beta: float,
    **search: Any,
) -> dict[str, float]:
    """Search (or sample) one answer to each prompt; means over the answers."""
    ids, mask, countries = prompts
    records: list[dict[str, float]] = []
    for start in range(0, len(ids), 25):
        rows = slice(start, start + 25)
        found = beam_search(
            policy, ids[rows], mask[rows], reference_model=reference, beta=beta, num_return_sequences=1,
            max_new_tokens=LONGEST, batch_size=25, **search,
        )  # fmt: skip
        for i, country in enumerate(countries[rows]):
            tokens = found.completions[i, 0][found.completion_mask[i, 0]]
            verdict = checker.judge(country, given.tokenizer.decode(tokens, skip_special_tokens=True))
            records.append(
                {
                    "score": verdict.score,
                    "sentences": verdict.sentences,
                    "right": verdict.right,
                    "repeated": verdict.repeated,
                    "length": found.lengths[i, 0].item(),
                    "not_ended": 1.0 - found.finished[i, 0].item(),
                    "logp": found.logps[i, 0].item(),
                }
            )
            if found.rewards is not None:
                records[-1]["implicit_reward"] = found.rewards[i, 0].item()
    return {name: mean(record[name] for record in records) for name in records[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments, base_steps=95)
    clock = Clock()
    given = setting(chosen, sft_steps=chosen.base_steps, steps=100, evaluations=2)
    betas, widths = (BETAS, WIDTHS) if not chosen.tiny else (BETAS[:2], (1, 3))
    checker = Checker()
    countries = sorted(checker.world)[: 4 if chosen.tiny else None]
    prompts = ask(given, countries)
    given.progress.say("Reference: answers of both kinds")
    reference = fine_tune(given, given.base)
    results: dict[str, Any] = {
        "prompts": len(prompts[2]),
        "base_steps": given.sizes.sft_steps,
        "longest": LONGEST,
        "reference": {
            "width 1": measure(given, checker, reference, None, prompts, 1.0, num_beams=1),
            "width 5": measure(given, checker, reference, None, prompts, 1.0, num_beams=5),
        },
        "policies": {},
    }
    for beta in betas:
        given.progress.say(f"DPO, beta {beta}")
        policy, curves = prefer(given, reference, given.train, beta)
        torch.manual_seed(chosen.seed)
        sampled = measure(given, checker, policy, reference, prompts, beta, num_beams=1, do_sample=True)
        by_width = {}
        for width in widths:
            by_width[str(width)] = measure(given, checker, policy, reference, prompts, beta, num_beams=width)
        results["policies"][str(beta)] = {
            "held_out": curves.held_out[-1], "sampled": sampled, "widths": by_width
        }  # fmt: skip
        line = ", ".join(f"{width}: {row['score']:.3f}" for width, row in by_width.items())
        given.progress.say(f"  true score by width: {line}")

    def describe(beta: str) -> str:
        rows = results["policies"][beta]["widths"]
        best = max(rows, key=lambda width: rows[width]["score"])
        first, last = (rows[str(width)] for width in (widths[0], widths[-1]))
        again = [row["repeated"] / row["sentences"] if row["sentences"] else 0.0 for row in (first, last)]
        return (
            f"Beta {beta}: true score {first['score']:.3f} greedily, at best {rows[best]['score']:.3f} (width {best}),"
            f" {last['score']:.3f} with {widths[-1]} beams; {first['length']:.1f} to {last['length']:.1f} tokens,"
            f" {last['not_ended']:.0%} unended; sentences that repeat {again[0]:.0%} to {again[1]:.0%}; log pi"
            f" {first['logp']:.2f} to {last['logp']:.2f}, implicit reward {first['implicit_reward']:+.2f} to"
            f" {last['implicit_reward']:+.2f}"
        )

    start = results["reference"]["width 1"]
    paragraph = (
        f"{results['prompts']} questions, base model of {given.sizes.sft_steps} steps; the reference's greedy answers"
        f" have a true score of {start['score']:.3f}. " + ". ".join(describe(str(beta)) for beta in betas) + "."
    )
    figure, axes = panels("Beam search on DPO policies, by width of the beam", "True score", "Length, tokens",
                          "log pi of the answer", "Implicit reward", width=3.1)  # fmt: skip
    for beta, colour in zip(betas, (ORANGE, BLUE, GREEN), strict=False):
        rows = results["policies"][str(beta)]["widths"]
        for axis, name in zip(axes, ("score", "length", "logp", "implicit_reward"), strict=True):
            axis.plot(widths, [rows[str(width)][name] for width in widths], "o-", ms=3.5, color=colour,
                      label=rf"$\beta$ = {beta}")  # fmt: skip
    for axis, name in zip(axes, ("score", "length", "logp"), strict=False):
        axis.axhline(start[name], color=GREY, ls="--", lw=1, label="reference, greedy")
    for axis in axes:
        axis.set_xlabel("beams")
        axis.set_xticks(widths)
    axes[0].legend(loc="best")
    write(chosen, "beam", results, paragraph, figure, clock)


if __name__ == "__main__":
    main()
