"""The demo's report: its figures, curves and held-out pairs, in the pieces that `qkernels.report` makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import Preference
from ..report.page import (
    REWARD_FORMULA,
    Figure,
    Page,
    ScoredPair,
    Section,
    Series,
    Token,
    charts,
    heat_map,
    line_chart,
    number,
    smooth,
    table,
    tiles,
)
from .encode import EncodedPair
from .evaluate import TokenScores
from .tokenizer import token_texts

_EXPLANATION = f"""<div class="prose">
<p>A language model trained with preferences carries its own reward. For every token it tells how much more, or less,
likely training has made that token than it was under the reference, the model that training started from:</p>
{REWARD_FORMULA}
<p>This is eq. 11 of “From r to Q*: Your Language Model is Secretly a Q-Function” (Rafailov et al. 2024). Summed over an
answer it is the answer's reward, and the pair is ranked right when the chosen answer has the larger sum. Training only
ever sees which of two whole answers is better; that the blame comes to lie on single tokens is what the map below
shows.</p>
</div>"""

_SCORE_NAMES = {
    "token_reward": "−token reward",
    "logp_after": "−log-prob, trained policy",
    "logp_before": "−log-prob, SFT model",
    "entropy": "entropy, trained policy",
}


def write_page(
    path: Path,
    metrics: dict[str, Any],
    pairs: Sequence[Preference],
    held_out: Sequence[EncodedPair],
    scores: Sequence[tuple[TokenScores, TokenScores]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        metrics: what `metrics.json` gets.
        pairs: all pairs, as `EncodedPair.source` numbers them.
        held_out: the held-out pairs.
        scores: of the held-out pairs, chosen and rejected.
        tokenizer: for the text of each token.
    """
    generated = metrics["options"]["data"] is None
    sizes = metrics["sizes"]
    shown = _shown(scores, sizes["shown_pairs"])
    views = [_view(pairs[held_out[i].source], held_out[i], scores[i], tokenizer) for i in shown]
    subtitle = (
        f"A model of {sizes['parameters'] / 1e6:.2f} M parameters, trained from scratch on {sizes['train_pairs']} pairs"
        f" of answers and shown {sizes['held_out_pairs']} it has never seen."
    )
    if generated:
        subtitle += " Each rejected answer is the chosen one with a wrong fact planted in it, now and then two."
    page = Page("Where the reward falls, token by token", subtitle, lead=_key_figures(metrics))
    page.sections.append(Section("What a token reward is", _EXPLANATION))
    page.sections.append(Section("Held-out answers", heat_map(views), _heat_intro(shown, scores, generated)))
    if "planted_errors" in metrics["results"]:
        page.sections.append(_detection(metrics["results"]["planted_errors"]))
    page.sections.append(Section("Training", _curves(metrics)))
    page.sections.append(Section("This run", f'<div class="facts">{table((), _facts(metrics))}</div>'))
    path.write_text(page.html(), encoding="utf-8")


def _key_figures(metrics: dict[str, Any]) -> str:
    results = metrics["results"]
    figures = [
        Figure(
            _percent(results["pair_accuracy"]),
            "held-out pairs ranked right",
            f"by reward, which is 0 before training; by the SFT model's log-prob"
            f" {_percent(results['pair_accuracy_before'])}",
        ),
        Figure(
            number(results["mean_margin"], 2, True),
            "mean margin",
            f"chosen {number(results['mean_chosen_reward'], 2, True)},"
            f" rejected {number(results['mean_rejected_reward'], 2, True)}",
        ),
    ]
    if "planted_errors" in results:
        planted = results["planted_errors"]
        found = planted["token_reward"]
        figures += [
            Figure(number(found["auroc"]), "AUROC, planted errors", "of −token reward within a rejected answer"),
            Figure(
                _percent(found["hit_at_1"]),
                "lowest reward is on an error",
                f"by chance: {_percent(planted['chance_hit_at_1'])}",
            ),
        ]
    figures.append(Figure(f"{metrics['elapsed_seconds']['total']:.0f} s", "for the whole run", "on the CPU"))
    return tiles(figures)


def _heat_intro(shown: list[int], scores: Sequence[tuple[TokenScores, TokenScores]], generated: bool) -> str:
    listing = f"The first {len(shown)} of {len(scores)} held-out pairs"
    if shown != list(range(len(shown))):
        wrong = sum(map(_is_wrong, scores))
        listing = f"{len(shown)} of {len(scores)} held-out pairs: the first ones, and the first of {wrong} ranked wrong"
    outlined = " A planted error is outlined." if generated else ""
    return (
        f"{listing}. Point at a token, tap it, or move through an answer with the arrow keys to see its numbers; its"
        f" counterpart in the other answer lights up.{outlined}"
    )


def _shown(scores: Sequence[tuple[TokenScores, TokenScores]], count: int) -> list[int]:
    """The first pairs, the last of them giving way to pairs that are ranked wrong, so that failures show."""
    wrong = [i for i, pair in enumerate(scores) if _is_wrong(pair)]
    first = list(range(min(count, len(scores))))
    missing = [i for i in wrong if i not in first][: max(0, max(1, count // 6) - len(set(wrong) & set(first)))]
    return first[: len(first) - len(missing)] + missing


def _is_wrong(pair: tuple[TokenScores, TokenScores]) -> bool:
    """A tie, as before the first step, is neither right nor wrong."""
    return sum(pair[0].rewards) < sum(pair[1].rewards)


def _view(
    pair: Preference, encoded: EncodedPair, scores: tuple[TokenScores, TokenScores], tokenizer: PreTrainedTokenizerBase
) -> ScoredPair:
    special = set(tokenizer.all_special_ids)

    def tokens(ids: list[int], score: TokenScores, planted: Sequence[bool]) -> list[Token]:
        columns = (ids, token_texts(tokenizer, ids), *score, planted)
        return [
            Token(text, reward, logp, reference, entropy, wrong, token_id in special)
            for token_id, text, logp, reference, reward, entropy, wrong in zip(*columns, strict=True)
        ]

    cut = [name for name, ids in (("chosen", encoded.chosen), ("rejected", encoded.rejected)) if ids[-1] not in special]
    return ScoredPair(
        [(message.role, message.content) for message in pair.prompt],
        tokens(encoded.chosen, scores[0], [False] * len(encoded.chosen)),
        tokens(encoded.rejected, scores[1], encoded.planted),
        f"Cut to the maximal length: {' and '.join(cut)} answer." if cut else "",
    )


def _detection(planted: dict[str, Any]) -> Section:
    def percent(share: float | None) -> str:
        return "–" if share is None else _percent(share)

    rows = [
        (
            name,
            number(planted[key]["auroc"]),
            _percent(planted[key]["hit_at_1"]),
            percent(planted[key]["second_error_recall"]),
        )
        for key, name in _SCORE_NAMES.items()
    ]
    chance = planted["chance_second_error_recall"]
    rows.append(("chance", number(0.5), _percent(planted["chance_hit_at_1"]), percent(chance)))
    intro = (
        f"Four scores that could point at the planted error, on {planted['answers']} held-out rejected answers. AUROC:"
        " the chance that a token of the error scores above another token of the same answer. Hit@1: how often the"
        f" highest score is on an error. Second error: {planted['answers_with_two']} answers have two; with the tokens"
        " of the first taken out, how often the highest score left is on the second. A model that has learnt these"
        " facts finds a wrong one improbable, so plain log-probs do well here too; a token reward is the change that"
        " preference training has made to them."
    )
    return Section("Finding the error", table(("score", "AUROC", "hit@1", "second error"), rows, strong=0), intro)


def _curves(metrics: dict[str, Any]) -> str:
    curves = metrics["curves"]
    window = max(1, len(curves["train"]) // 20)

    def train(key: str) -> list[tuple[float, float]]:
        return smooth([(point["step"], point[key]) for point in curves["train"]], window)

    def held_out(key: str) -> list[tuple[float, float]]:
        return [(point["step"], point[key]) for point in curves["held_out"]]

    averaged = (
        f"Training curves: mean over {window} steps of {metrics['sizes']['batch_size']} pairs." if window > 1 else ""
    )
    accuracies = train("accuracy") + held_out("accuracy")
    figures = [
        line_chart(
            "Rewards",
            [
                Series("chosen, held out", held_out("chosen_reward"), "chosen"),
                Series("rejected, held out", held_out("rejected_reward"), "rejected"),
                Series("chosen, training", train("chosen_reward"), "chosen", faint=True),
                Series("rejected, training", train("rejected_reward"), "rejected", faint=True),
            ],
            x_label="step",
            y_label="mean reward per answer",
            description=averaged,
        ),
        line_chart(
            "Margin",
            [
                Series("held out", held_out("margin"), "neutral"),
                Series("training", train("margin"), "neutral", faint=True),
            ],
            x_label="step",
            y_label="chosen − rejected reward",
            description="What preference training widens.",
        ),
        line_chart(
            "Pair accuracy",
            [
                Series("held out", held_out("accuracy"), "neutral"),
                Series("training", train("accuracy"), "neutral", faint=True),
            ],
            x_label="step",
            y_label="pairs ranked right by reward",
            y_range=(math.floor(10 * min(0.5, *(y for _, y in accuracies))) / 10, 1.0),
            percent=True,
            description="At step 0 all rewards are 0, and every pair is a tie.",
        ),
    ]
    losses = [("Loss of preference training", [(p["step"], p["loss"]) for p in curves["train"]], "per pair")]
    if curves["sft"]:
        losses.insert(
            0, ("Loss of supervised fine-tuning", [(p["step"], p["loss"]) for p in curves["sft"]], "nats per token")
        )
    for title, points, unit in losses:
        figures.append(line_chart(title, [Series("training", points)], x_label="step", y_label=unit))
    return charts(figures)


def _facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    sizes, data, options = metrics["sizes"], metrics["data"], metrics["options"]
    terms = " + ".join(
        name if weight == 1 else f"{weight:g} · {name}" for name, weight in metrics["loss_terms"].items()
    )
    cut = (
        f"{data['truncated_prompts']} prompts (beginning), {data['truncated_answers']} answers (end);"
        f" {data['dropped_pairs']} pairs dropped for no longer differing"
    )
    any_cut = data["truncated_prompts"] or data["truncated_answers"]
    return [
        ("data", f"{data['source']}; {sizes['train_pairs']} training pairs; {data['split']}"),
        ("ignored fields", ", ".join(data["ignored_fields"]) or "none"),
        ("cut", f"{cut}, at {sizes['max_length']} tokens" if any_cut else "nothing"),
        ("loss", f"{terms}, β = {options['beta']:g}"),
        (
            "model",
            f"Llama, {sizes['layers']} layers, width {sizes['hidden_size']}, {sizes['heads']} heads,"
            f" {sizes['vocabulary']} tokens",
        ),
        (
            "training",
            f"{sizes['sft_steps']} steps of supervised fine-tuning on {2 * sizes['batch_size']} answers,"
            f" {sizes['steps']} steps on {sizes['batch_size']} pairs; seed {options['seed']}",
        ),
        ("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in metrics["elapsed_seconds"].items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())),
        ("backend", f"{metrics['backend']}, threads: {metrics['threads']}"),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"
