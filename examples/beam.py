"""Beam search on DPO policies, measured: wider is better, until it is not? ("From r to Q*", section 5.2)

    python examples/beam.py
    python examples/beam.py --model DIR

Searching for the likeliest answer of a policy is searching with its value function (eq. 13). A reference model is
trained on right and wrong answers alike, and three policies from it, by DPO with three betas. Each is asked about every
country with beams of width 1 to 20, and the answers are judged by a checker that knows the facts: the true score of an
answer is the share of its sentences that state a right fact about the country which it has not stated before. Beside it
stand the answer's length, whether it ends, its log-probability, which is what the search maximises, and its implicit
reward.

A pretrained model learns the form of the answers first, right and wrong alike; that is the reference. Preferences are
between its own samples, which the checker ranks (as people ranked the samples of models for the paper), or, with
`--preferences planted`, between answers of which the rejected have planted errors. They are about some countries, and
the questions about these and about others. Beams are compared with the best of several samples, with a tree search
that may run the policy on as many positions, and with what the reference finds by the same means: true scores, and win
rates against the reference's greedy answers, with intervals.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from common import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    Clock,
    Options,
    Setting,
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

from qkernels.credit import mean
from qkernels.data import Message, Preference
from qkernels.demo import synthetic
from qkernels.demo.tokenizer import encode_prompts
from qkernels.search import Beams, beam_search, best_of, score_completions, tree_search

BETAS = (0.02, 0.1, 0.5)
WIDTHS = (1, 2, 3, 5, 10, 20)
QUESTIONS = ("Tell me about {country}.", "What should I know about {country}?")
LONGEST = 100
LONGEST_PRETRAINED = 44
PRETRAINED_BETA = 0.1


class PretrainedSizes(NamedTuple):
    """The experiment on a pretrained model.

    learnt: countries that the preferences are about.
    asked: of how many of these, and of how many others, a question is asked.
    widths, reference_widths: of the beams with the policy, and with its reference.
    samples: of an answer, of which the best is taken.
    tree: the beam whose positions the tree search may read too; 0 for no tree search.
    drawn: samples of the reference for each question, of which the best and the worst become a pair.
    """

    learnt: int
    asked: int
    widths: tuple[int, ...]
    reference_widths: tuple[int, ...]
    samples: int
    tree: int
    drawn: int
    sft: Training
    dpo: Training


PRETRAINED = PretrainedSizes(
    32, 6, (1, 2, 3, 5, 10, 20), (1, 5), 4, 5, 4, Training(48, 8, 1e-4, 12), Training(12, 6, 3e-5, 12)
)
PRETRAINED_TINY = PretrainedSizes(
    4, 2, (1, 3), (1,), 2, 3, 2, Training(1, 2, 1e-3, 1), Training(1, 2, 1e-3, 1)
)  # fmt: skip
WHO = ("policy", "reference")


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


class Question(NamedTuple):
    """About a country, in one of the forms, and whether the preferences were about it."""

    country: str
    learnt: bool
    form: str = QUESTIONS[0]

    @property
    def prompt(self) -> tuple[Message, ...]:
        return (Message("user", self.form.format(country=self.country)),)


class Countries(NamedTuple):
    """base: answers of both kinds to learn the form from; planted: preferences with planted errors; drawn: questions to
    sample answers to; asked: questions of the test, in another form."""

    base: list[Preference]
    planted: list[Preference]
    drawn: list[Question]
    asked: list[Question]


def country_data(sizes: PretrainedSizes, seed: int) -> Countries:
    rng = random.Random(f"beam {seed}")
    world = synthetic.facts()
    seen, _ = synthetic.split_wrong_values(rng, world)
    countries = rng.sample(sorted(world), len(world))
    learnt, others = countries[: sizes.learnt], countries[sizes.learnt :]
    known = {country: world[country] for country in learnt}
    base = [synthetic.write_pair(rng, known, seen) for _ in range(sizes.sft.steps * sizes.sft.pairs)]
    base = [p._replace(chosen=p.rejected, rejected=p.chosen) if rng.random() < 0.5 else p for p in base]
    planted = [synthetic.write_pair(rng, known, seen) for _ in range(sizes.dpo.steps * sizes.dpo.pairs)]
    drawn = [Question(country, True, QUESTIONS[1]) for country in learnt]
    asked = [Question(c, True) for c in learnt[: sizes.asked]] + [Question(c, False) for c in others[: sizes.asked]]
    return Countries(base, planted, drawn, asked)


class Searcher:
    """Asks the models of the study, and keeps what they answered.

    Args:
        study: with the models.
        names: of the trainings of `WHO`; without the policy's, the reference alone can be asked.
    """

    def __init__(self, study: Study, names: dict[str, str]):
        self.study, self.names = study, names
        self.checker = Checker()
        self.models: dict[str, PreTrainedModel] = {}

    def _model(self, who: str) -> PreTrainedModel:
        if who not in self.models:
            self.models[who] = self.study.model(self.names[who])
        return self.models[who]

    def answers(self, who: str, questions: Sequence[Question], **search: Any) -> list[list[dict[str, Any]]]:
        """Answers to each question by beams, samples or a tree, best first, with the policy's view of them.

        Args:
            who: of `WHO`.
            questions: what is asked.
            search: `width` of the beams, `samples` to draw, or `tree`: how many positions the tree search may read.
        """
        asked = [tuple(question) for question in questions]
        made_with = (sorted(self.names.items()), asked, LONGEST_PRETRAINED, self.study.seed, sorted(search.items()))
        return self.study.once(f"answers-of-{who}", made_with, lambda: self._search(who, questions, search))

    def _search(self, who: str, questions: Sequence[Question], search: dict[str, int]) -> list[list[dict[str, Any]]]:
        self.study.progress.say(f"{who}: {search}")
        torch.manual_seed(self.study.seed)
        found: list[list[dict[str, Any]]] = []
        for start in range(0, len(questions), 12):
            asked = questions[start : start + 12]
            ids, mask = self._prompts(asked)
            beams = self._found(who, ids, mask, **search)
            k = beams.completions.shape[1]
            attended = torch.cat([mask.repeat_interleave(k, 0), beams.completion_mask.flatten(0, 1).long()], 1)
            trained = "policy" if "policy" in self.names else "reference"
            scored = score_completions(
                self._model(trained), beams.sequences.flatten(0, 1), attended, beams.completion_mask.flatten(0, 1),
                reference_model=None if trained == "reference" else self._model("reference"),
                beta=PRETRAINED_BETA, batch_size=8,
            )  # fmt: skip
            for i, question in enumerate(asked):
                records = []
                for j in range(k):
                    tokens = beams.completions[i, j][beams.completion_mask[i, j]]
                    text = self.study.tokenizer.decode(tokens, skip_special_tokens=True)
                    verdict = self.checker.judge(question.country, text)
                    records.append(
                        {
                            "text": text,
                            "score": verdict.score,
                            "right": verdict.right,
                            "repeated": verdict.repeated,
                            "sentences": verdict.sentences,
                            "length": len(tokens),
                            "not_ended": 1.0 - beams.finished[i, j].item(),
                            "logp": scored.logps[i * k + j].item(),
                            "reward": 0.0 if scored.rewards is None else scored.rewards[i * k + j].item(),
                        }
                    )
                found.append(records)
        return found

    def _found(
        self, who: str, ids: torch.Tensor, mask: torch.Tensor, width: int = 0, samples: int = 0, tree: int = 0
    ) -> Beams:
        shared: dict[str, Any] = {"max_new_tokens": LONGEST_PRETRAINED, "batch_size": 8}
        if tree:
            return tree_search(
                self._model(who), ids, mask, simulations=10_000, max_forwards=tree, beta=PRETRAINED_BETA, **shared
            ).beams
        if samples:
            return best_of(self._model(who), None, ids, mask, n=samples, **shared)
        return beam_search(self._model(who), ids, mask, num_beams=width, num_return_sequences=1, **shared)

    def _prompts(self, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts padded on the left, and their mask."""
        asked = [Preference(question.prompt, "x", "y") for question in questions]
        rows = [chosen.prompt for chosen, _ in self.study.encoder.pairs(dict(enumerate(asked)))]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.study.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return ids, mask


def ranked_pairs(study: Study, reference: str, questions: Sequence[Question], drawn: int) -> list[Preference]:
    """Of the reference's samples for each question the best and the worst, where the checker tells them apart; samples
    that do not end are left out."""
    sampled = Searcher(study, {"reference": reference}).answers("reference", questions, samples=drawn)
    pairs = []
    for question, records in zip(questions, sampled, strict=True):
        ended = sorted((r for r in records if not r["not_ended"] and r["text"]), key=lambda r: r["score"])
        if ended and ended[-1]["score"] > ended[0]["score"]:
            pairs.append(Preference(question.prompt, ended[-1]["text"], ended[0]["text"]))
    if not pairs:  # of a model that is trained for one step, to show that all works
        study.progress.say("The checker tells no two samples apart; the first two stand for a pair")
        pairs = [Preference(q.prompt, "Yes.", "No.") for q in questions[:1]]
    return pairs


def on_pretrained(chosen: Options) -> None:
    """The experiment on a pretrained model."""
    clock = Clock()
    sizes = PRETRAINED_TINY if chosen.tiny else PRETRAINED
    if chosen.widths is not None:
        narrower = tuple(width for width in sizes.reference_widths if width == 1 or width in chosen.widths)
        sizes = sizes._replace(widths=chosen.widths, reference_widths=narrower)
    if chosen.samples is not None:
        sizes = sizes._replace(samples=chosen.samples)
    study = Study(chosen, 128)
    data = country_data(sizes, chosen.seed)
    reference = study.sft("countries", data.base, sizes.sft)
    planted = chosen.preferences == "planted"
    pairs = data.planted if planted else ranked_pairs(study, reference, data.drawn, sizes.drawn)
    policy, _ = study.dpo("planted" if planted else "samples", pairs, sizes.dpo, reference, PRETRAINED_BETA)
    searcher = Searcher(study, {"policy": policy, "reference": reference})
    first: dict[str, dict[str, list[dict[str, Any]]]] = {who: {} for who in WHO}
    for width in sizes.widths:
        for who in WHO if width in sizes.reference_widths else WHO[:1]:
            found = searcher.answers(who, data.asked, width=width)
            first[who][f"{width} beams"] = [records[0] for records in found]
    for who in WHO if sizes.samples else ():
        drawn = searcher.answers(who, data.asked, samples=sizes.samples)
        ways = first[who]
        ways["sampled"] = [random.Random(f"{i}").choice(records) for i, records in enumerate(drawn)]
        for key in ("logp", "reward"):
            ways[f"best of {sizes.samples} by {key}"] = [
                max(records, key=lambda record: record[key]) for records in drawn
            ]
    if sizes.tree:
        found = searcher.answers("policy", data.asked, tree=sizes.tree * LONGEST_PRETRAINED)
        first["policy"]["tree search"] = [records[0] for records in found]
    greedy = first["reference"]["1 beams"]

    def measured(ways: dict[str, list[dict[str, Any]]], way: str, learnt: bool | None) -> dict[str, Any]:
        rows = [i for i, q in enumerate(data.asked) if learnt is None or q.learnt == learnt]
        records, rivals = [ways[way][i] for i in rows], [greedy[i] for i in rows]
        return {
            "score": interval([r["score"] for r in records], chosen.seed),
            "win_rate": interval(wins(records, rivals), chosen.seed),
            **{key: mean(r[key] for r in records)
               for key in ("sentences", "right", "repeated", "length", "not_ended", "logp", "reward")},
        }  # fmt: skip

    results: dict[str, Any] = {
        "beta": PRETRAINED_BETA,
        "questions": len(data.asked),
        "longest": LONGEST_PRETRAINED,
        "preferences": "planted errors" if planted else "samples of the reference",
        "pairs": len(pairs),
        "sizes": sizes._asdict() | {"sft": sizes.sft._asdict(), "dpo": sizes.dpo._asdict()},
        "train": [
            {key: entry[key] for key in ("loss", "rewards/margins", "rewards/accuracies")}
            for entry in study.log(policy)
        ],
        "examples": {who: {way: records[0]["text"] for way, records in ways.items()} for who, ways in first.items()},
    }
    for group, learnt in (("all", None), ("learnt", True), ("others", False)):
        results[group] = {who: {way: measured(ways, way, learnt) for way in ways} for who, ways in first.items()}
    write(
        chosen, "beam", results, pretrained_paragraph(results, sizes), pretrained_figure(chosen, results, sizes), clock
    )


def wins(records: Sequence[dict[str, Any]], rivals: Sequence[dict[str, Any]]) -> list[float]:
    """1 where a true score is above the rival's, 1/2 where they are equal."""
    return [
        0.5 * ((a["score"] > b["score"]) + (a["score"] >= b["score"])) for a, b in zip(records, rivals, strict=True)
    ]


def pretrained_paragraph(results: dict[str, Any], sizes: PretrainedSizes) -> str:
    def figures(row: dict[str, Any], key: str) -> str:
        return f"{row[key]['mean']:.3f} ({row[key]['low']:.3f} to {row[key]['high']:.3f})"

    def ways(who: str) -> str:
        return f"{who}: " + "; ".join(
            f"{way} {figures(row, 'score')}, wins {figures(row, 'win_rate')}"
            for way, row in results["all"][who].items()
        )

    policy = results["all"]["policy"]
    first, last = (policy[f"{width} beams"] for width in (sizes.widths[0], sizes.widths[-1]))
    widest = f"{sizes.widths[-1]} beams instead of {sizes.widths[0]}"
    return (
        f"{results['questions']} questions, {sizes.sft.steps} steps of SFT on right and wrong answers alike, then"
        f" {sizes.dpo.steps} of DPO on {results['pairs']} pairs ({results['preferences']}). True scores, and win rates"
        f" against the reference's greedy answers, with intervals of 95 %. {'. '.join(map(ways, WHO))}. With {widest}"
        f" the policy's answers have {last['length']:.1f} tokens instead of {first['length']:.1f}, state"
        f" {last['right']:.2f} right facts instead of {first['right']:.2f}, repeat {_share(last):.0%} of their"
        f" sentences instead of {_share(first):.0%}, log pi goes from {first['logp']:.2f} to {last['logp']:.2f} and"
        f" the implicit reward from {first['reward']:+.2f} to {last['reward']:+.2f}."
    )


def _share(row: dict[str, Any]) -> float:
    """Of the sentences, those that say again what has been said."""
    return row["repeated"] / row["sentences"] if row["sentences"] else 0.0


def pretrained_figure(chosen: Options, results: dict[str, Any], sizes: PretrainedSizes) -> Any:
    figure, axes = panels(f"Beam search before and after DPO, {chosen.model.name}", "True score",
                          "Win rate against greedy reference", "Length, tokens",
                          "Implicit reward", width=3.3)  # fmt: skip
    for who, colour in zip(WHO, (BLUE, GREY), strict=True):
        widths = sizes.widths if who == "policy" else sizes.reference_widths
        rows, ways = results["all"][who], [f"{width} beams" for width in widths]
        for axis, key in zip(axes, ("score", "win_rate"), strict=False):
            axis.plot(widths, [rows[way][key]["mean"] for way in ways], "o-", ms=3.5, color=colour, label=who)
            axis.fill_between(widths, [rows[way][key]["low"] for way in ways],
                              [rows[way][key]["high"] for way in ways], color=colour, alpha=0.15, lw=0)  # fmt: skip
        for axis, key in zip(axes[2:], ("length", "reward"), strict=True):
            axis.plot(widths, [rows[way][key] for way in ways], "o-", ms=3.5, color=colour, label=who)
    rows = results["all"]["policy"]
    for axis, key in zip(axes, ("score", "win_rate"), strict=False):
        if sizes.samples:
            best = rows[f"best of {sizes.samples} by logp"][key]["mean"]
            axis.axhline(best, color=BLUE, ls=":", lw=1.2, label=f"best of {sizes.samples} by log pi")
        if sizes.tree:
            axis.plot([sizes.tree], [rows["tree search"][key]["mean"]], "*", ms=8, color=GREEN, label="tree search")
    axes[1].axhline(0.5, color=DARK, lw=0.8)
    for axis in axes:
        axis.set_xlabel("beams")
        axis.set_xticks(sizes.widths)
    axes[0].legend(loc="best", fontsize=6)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(
        __doc__.partition("\n")[0], arguments, base_steps=95, needs_pairs=False, preferences=("samples", "planted")
    )
    if chosen.model is not None:
        on_pretrained(chosen)
        return
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
