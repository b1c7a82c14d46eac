"""The report of a training run: held-out pairs token by token, curves, and what the reward monitor found."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..intervals import wilson
from ..monitor import RewardMonitor
from ..report.page import (
    REWARD_FORMULA,
    Figure,
    Page,
    Section,
    Series,
    charts,
    heat_map,
    line_chart,
    number,
    table,
    tiles,
)
from ..text.characters import printable
from .folder import write

_EXPLANATION = f"""<div class="prose">
<p>How much more, or less, likely preference training has made a token than it was under the model that training started
from:</p>
{REWARD_FORMULA}
<p>Summed over an answer it is the answer's reward, and a pair is ranked right when the chosen answer has the larger
sum. Training sees only which of two whole answers is better.</p>
</div>"""
_CURVES = (
    ("Rewards", "mean reward per answer", (("rewards/chosen", "chosen", "chosen"),
     ("rewards/rejected", "rejected", "rejected"))),
    ("Margin", "chosen − rejected reward", (("rewards/margins", "training", "neutral"),)),
    ("Loss", "per pair", (("loss", "training", "neutral"),)),
)  # fmt: skip


def write_page(path: Path, metrics: Mapping[str, Any], monitor: RewardMonitor | None, scores: Any, shown: int) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        metrics: what `metrics.json` gets.
        monitor: of the run; None without one.
        scores: `TokenTable` of the held-out pairs; None without any.
        shown: how many pairs to show, those with the lowest margins and as many of the others.
    """
    training, data = metrics["training"], metrics["data"]
    subtitle = f"{training['model']}, trained on {data['train_pairs']} pairs of {data['source']}"
    if scores is not None:
        subtitle += f" and shown {data['held_out_pairs']} that it has not seen"
    page = Page("What training has rewarded", printable(subtitle + "."), lead=_tiles(metrics))
    page.sections.append(Section("What the reward monitor found", _findings(monitor)))
    if scores is not None and shown:
        pairs, numbers = _chosen(scores, shown), data["held_out_numbers"]
        intro = (
            f"{len(pairs)} of {data['held_out_pairs']} held-out pairs: those with the lowest margins, which contradict"
            " their labels most, then those with the highest. Point at a token, tap it, or move through an answer with"
            " the arrow keys to see its numbers."
        )
        page.sections.append(Section("What a token reward is", _EXPLANATION))
        page.sections.append(
            Section(
                "Held-out answers",
                heat_map([scores.scored_pair(pair, f"Pair {numbers[pair]}.") for pair in pairs]),
                intro,
            )
        )
    curves = _curves(metrics, monitor)
    if curves:
        page.sections.append(Section("Training", charts(curves)))
    page.sections.append(Section("This run", f'<div class="facts">{table((), facts(metrics))}</div>'))
    write(path, page.html())


def _tiles(metrics: Mapping[str, Any]) -> str:
    results, training = metrics["results"], metrics["training"]
    figures = []
    if results is not None:
        _, low, high, _ = wilson(results["pair_accuracy"], results["pairs"])
        figures += [
            Figure(
                f"{100 * results['pair_accuracy']:.1f}\u00a0%",
                "held-out pairs ranked right",
                f"by reward, 95 % interval {100 * low:.0f} to {100 * high:.0f} %; by the first model's log-prob"
                f" {100 * results['pair_accuracy_of_reference_logps']:.1f}\u00a0%",
            ),
            Figure(
                number(results["mean_margin"], 2, True),
                "mean margin",
                f"chosen {number(results['mean_chosen_reward'], 2, True)},"
                f" rejected {number(results['mean_rejected_reward'], 2, True)}",
            ),
        ]
    figures.append(Figure(str(training["steps"]), "steps", f"of {training['pairs_a_step']} pairs"))
    seconds = metrics["elapsed_seconds"]["total"]
    figures.append(Figure(f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min", "for the whole run", ""))
    return tiles(figures)


def _findings(monitor: RewardMonitor | None) -> str:
    if monitor is None:
        return '<div class="prose"><p>It did not run.</p></div>'
    found = [f"<li>{escape(str(finding))}</li>" for finding in monitor.findings]
    listing = f"<ul>{''.join(found)}</ul>" if found else "<p>Nothing that it knows as a sign of trouble.</p>"
    return f'<div class="prose">{listing}<pre>{escape(_head(monitor))}</pre></div>'


def _head(monitor: RewardMonitor) -> str:
    """The numbers of its report, without the findings that stand above."""
    return "\n".join(monitor.report().split("\n")[: None if not monitor.findings else -len(monitor.findings)])


def _chosen(scores: Any, shown: int) -> list[int]:
    rewards = scores.pair_rewards()
    order = [int(pair) for pair in rewards["pair"][rewards["margins"].argsort()]]
    lowest = order[: -(-min(shown, len(order)) // 2)]
    rest = [pair for pair in reversed(order) if pair not in lowest]
    return lowest + rest[: min(shown, len(order)) - len(lowest)]


def _curves(metrics: Mapping[str, Any], monitor: RewardMonitor | None) -> list[str]:
    log = metrics["curves"]["log"]
    held_out = {
        "rewards/chosen": "chosen_reward", "rewards/rejected": "rejected_reward", "rewards/margins": "margin",
    }  # fmt: skip
    history = [] if monitor is None else monitor.history
    figures = []
    for title, unit, lines in _CURVES:
        series = []
        for name, label, tone in lines:
            points = [(entry["step"], float(entry[name])) for entry in log if name in entry]
            if points:
                series.append(Series(f"{label}, training" if label != "training" else label, points, tone, faint=True))
            if history and name in held_out:
                seen = [(one.step, getattr(one, held_out[name])) for one in history]
                series.append(Series(f"{label}, held out" if label != "training" else "held out", seen, tone))
        if series:
            figures.append(line_chart(title, series, x_label="step", y_label=unit))
    if metrics["curves"]["sft"]:
        points = [(point["step"], point["loss"]) for point in metrics["curves"]["sft"]]
        title = "Loss of supervised fine-tuning"
        figures.insert(0, line_chart(title, [Series("training", points)], x_label="step", y_label="nats per token"))
    return figures


def facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was, for the report and the model card."""
    training, data = metrics["training"], metrics["data"]
    cut = f"{data['cut_pairs']} pairs, at {training['max_length']} tokens" if data["cut_pairs"] else "nothing"
    rows = [
        ("model", str(training["model"])),
        ("reference", str(training["reference"])),
        ("data", f"{data['source']}; {data['train_pairs']} training pairs; {data['split']}"),
        ("prompts", "chat template" if training["chat_template"] else "plain text"),
        ("cut", cut),
        ("left out", _left_out(data, training["max_length"])),
        ("loss", f"{' + '.join(map(str, training['loss']))}, β = {training['beta']:g}"),
        (
            "training",
            f"{training['steps']} steps of {training['pairs_a_step']} pairs, learning rate"
            f" {training['learning_rate']:g}, "
            + (f"LoRA of rank {training['lora_rank']}" if training["lora_rank"] else "all weights")
            + f", seed {training['seed']}",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())),
    ]
    return [(name, printable(text)) for name, text in rows]


def _left_out(data: Mapping[str, Any], max_length: int | None) -> str:
    """Records that cannot be used, and pairs of which a cut would leave only the prompt."""
    parts = [data["skipped"].removeprefix("left out ")] if data["skipped"] else []
    if data["dropped_pairs"]:
        parts.append(f"{data['dropped_pairs']} pairs, whose prompt alone has {max_length} tokens or more")
    if data["held_out_unanswered"]:
        parts.append(f"of evaluation and monitor {data['held_out_unanswered']} held-out pairs, for the same reason")
    return "; ".join(parts) or "nothing"
