"""The model card, README.md of the trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..intervals import wilson
from ..monitor import RewardMonitor
from .folder import CONFIG, REPORT, write
from .page import facts


def write_card(path: Path, metrics: Mapping[str, Any], monitor: RewardMonitor | None) -> None:
    """Write the card: what the model is, how it did on held-out pairs, how to use and to repeat it.

    Args:
        path: of the file.
        metrics: what `metrics.json` gets.
        monitor: of the run; None without one.
    """
    training = metrics["training"]
    adapter = bool(training["lora_rank"])
    base = str(training["model"])
    lines = [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"base_model: {_yaml(base)}",
        "tags: [dpo, trl, qkernels, generated_from_trainer]",
        "---",
        "",
        f"# {path.resolve().parent.name}",
        "",
        f"{'A LoRA adapter of' if adapter else 'Trained from'} `{base}` with preferences"
        f" ({' + '.join(map(str, training['loss']))}, β = {training['beta']:g}) by [TRL](https://github.com/huggingface/trl)"
        " and qkernels.",
        "",
        "## On held-out pairs",
        "",
        *_figures(metrics),
        "",
        "## What the reward monitor found",
        "",
        *_findings(monitor),
        "",
        "## Use",
        "",
        *_use(base, adapter),
        "",
        "Every token of an answer has a reward under this model, β (log π − log π_ref):"
        f" `qkernels score --model . --reference {training['reference']} --beta {training['beta']:g} --data DATA --out"
        " scores`.",
        "",
        "## This run",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in facts(metrics)),
        "",
        f"`{CONFIG}` repeats it: `qkernels train --config {CONFIG} --out OUT`. `{REPORT}` shows held-out pairs token by"
        " token.",
        "",
    ]
    write(path, "\n".join(lines))


def _yaml(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML string


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    results = metrics["results"]
    if results is None:
        return ["None were held out."]
    _, low, high, _ = wilson(results["pair_accuracy"], results["pairs"])
    before = results["pair_accuracy_of_reference_logps"]
    return [
        "| | |",
        "|---|---|",
        f"| pairs | {results['pairs']}; {metrics['data']['split']} |",
        f"| ranked right by reward | {results['pair_accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) |",
        f"| ranked right by the first model's log-prob | {before:.1%} |",
        f"| mean margin | {results['mean_margin']:+.3f} |",
        f"| mean reward, chosen and rejected | {results['mean_chosen_reward']:+.3f},"
        f" {results['mean_rejected_reward']:+.3f} |",
    ]


def _findings(monitor: RewardMonitor | None) -> list[str]:
    if monitor is None:
        return ["It did not run."]
    return [f"- {finding}" for finding in monitor.findings] or ["Nothing that it knows as a sign of trouble."]


def _use(base: str, adapter: bool) -> list[str]:
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    return [
        "```python",
        f"from {'peft' if adapter else 'transformers'} import {kind}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]
