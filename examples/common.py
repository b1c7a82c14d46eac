"""What the three experiments share: options, the demo's data and trainings, and how results are written."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qkernels
from qkernels.data import Preference
from qkernels.demo import DemoOptions, synthetic
from qkernels.demo.encode import EncodedPair, encode
from qkernels.demo.evaluate import pair_logps
from qkernels.demo.options import Sizes
from qkernels.demo.tokenizer import train_tokenizer
from qkernels.demo.train import PreferenceCurves, build_model, train_preferences, train_sft
from qkernels.intervals import bootstrap_mean
from qkernels.report.progress import Progress

BLUE, ORANGE, GREEN, GREY, DARK = "#0b6e99", "#c2410c", "#3f7d20", "#9aa1a8", "#22272b"


class Options(NamedTuple):
    """The command line.

    out: where to write.
    seed: of everything.
    tiny: whether to run at a size that only shows that all works.
    base_steps: how long the base model is trained, in the experiments that let the user choose; None in others.
    command: what was typed, but for folders.
    model: folder of a pretrained model; None for the small one that is trained from scratch.
    pairs: file of real preference pairs; None if none was given.
    widths, samples: of the search on a pretrained model; None for those of the experiment.
    preferences: what a pretrained model learns from, in an experiment that lets the user choose; None in others.
    """

    out: Path
    seed: int
    tiny: bool
    base_steps: int | None
    command: str
    model: Path | None = None
    pairs: Path | None = None
    widths: tuple[int, ...] | None = None
    samples: int | None = None
    preferences: str | None = None

    def name(self, experiment: str) -> str:
        """What the experiment's files are called."""
        return experiment if self.model is None else f"{experiment}-{self.model.name}"


def options(
    description: str,
    arguments: Sequence[str] | None,
    base_steps: int | None = None,
    needs_pairs: bool = True,
    preferences: Sequence[str] = (),
) -> Options:
    """Read the command line, and keep torch to the number of threads that is asked for.

    Args:
        description: for --help.
        arguments: None for those of the process.
        base_steps: the default of --base-steps, for an experiment that has it.
        needs_pairs: whether the experiment on a pretrained model needs real pairs.
        preferences: what a pretrained model may learn from, the default first.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--out", type=Path, default=Path("experiments"), metavar="DIR", help="where to write (default: experiments)")
    add("--seed", type=int, default=0, metavar="N", help="of data, weights and batches (default: 0)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads; the matrices are small (default: 1)")
    add("--tiny", action="store_true", help="seconds; shows that everything works, not what is found")
    text = "a pretrained model in transformers format (default: a small model, trained here on generated texts)"
    add("--model", type=Path, metavar="DIR", help=text)
    if not needs_pairs:
        add("--widths", type=int, nargs="+", metavar="N", help="of the beams, with --model")
        add("--samples", type=int, metavar="N", help="of which the best is taken, with --model; 0 for no sampling")
    if needs_pairs:
        add("--pairs", type=Path, metavar="FILE", help="real preference pairs, JSON or JSONL; with --model")
    if preferences:
        text = f"what it learns from, with --model (default: {preferences[0]})"
        add("--preferences", choices=preferences, default=preferences[0], help=text)
    if base_steps is not None:
        text = f"how long the base model is trained (default: {base_steps}; not with --tiny)"
        add("--base-steps", type=int, default=base_steps, metavar="N", help=text)
    chosen = parser.parse_args(arguments)
    steps = getattr(chosen, "base_steps", None)
    if chosen.threads < 1 or chosen.seed < 0 or (steps is not None and steps < 1):
        parser.error("--threads and --base-steps must be 1 or more and --seed 0 or more")
    pairs = getattr(chosen, "pairs", None)
    if chosen.model is not None and not (chosen.model / "config.json").is_file():
        parser.error(f"--model: {chosen.model} is not the folder of a model, it has no config.json")
    if needs_pairs and (chosen.model is None) != (pairs is None):
        parser.error("--model and --pairs go together: the pretrained model is given real text")
    widths, samples = getattr(chosen, "widths", None), getattr(chosen, "samples", None)
    if chosen.model is None and (widths is not None or samples is not None):
        parser.error("--widths and --samples go with --model")
    if min(widths or [1]) < 1 or (samples or 0) < 0:
        parser.error("--widths must be 1 or more and --samples 0 or more")
    torch.set_num_threads(chosen.threads)
    command = f"--seed {chosen.seed}"
    if chosen.model is not None:
        command += f" --model {chosen.model.name}"
    if pairs is not None:
        command += f" --pairs {pairs.name}"
    if steps != base_steps:
        command += f" --base-steps {steps}"
    if widths is not None:
        command += " --widths " + " ".join(map(str, widths))
    if samples is not None:
        command += f" --samples {samples}"
    learnt = getattr(chosen, "preferences", None)
    if preferences and learnt != preferences[0]:
        command += f" --preferences {learnt}"
    if chosen.tiny:
        command += " --tiny"
    widths = None if widths is None else tuple(widths)
    return Options(chosen.out, chosen.seed, chosen.tiny, steps, command, chosen.model, pairs, widths, samples, learnt)


class Texts(NamedTuple):
    """Answers before tokenisation. base: what a base model is trained on, the chosen side of each pair."""

    base: list[Preference]
    train: list[Preference]
    held_out: list[Preference]


def country_answers(sizes: Sizes, seed: int) -> Texts:
    """The demo's pairs, whose rejected answers have planted errors; a base model reads both kinds alike."""
    data = synthetic.generate(sizes.train_pairs, sizes.held_out_pairs, seed)
    rng = random.Random(f"base {seed}")
    base = [p._replace(chosen=p.rejected, rejected=p.chosen) if rng.random() < 0.5 else p for p in data.train]
    return Texts(base, data.train, data.held_out)


class Setting(NamedTuple):
    """Data in tokens, and the sizes of model and trainings."""

    tokenizer: PreTrainedTokenizerBase
    base: list[EncodedPair]
    train: list[EncodedPair]
    held_out: list[EncodedPair]
    sizes: Sizes
    seed: int
    progress: Progress


def setting(chosen: Options, write: Callable[[Sizes, int], Texts] = country_answers, **sizes: Any) -> Setting:
    """Write the texts, train a tokenizer on the training pairs, tokenise.

    Args:
        chosen: the command line.
        write: makes the texts out of sizes and seed.
        sizes: changes to the demo's sizes (`qkernels.demo.options.Sizes`); not at the tiny size.
    """
    changed = DemoOptions(chosen.out, seed=chosen.seed, tiny=chosen.tiny).base_sizes()
    if not chosen.tiny:
        changed = replace(changed, **sizes)
    texts = write(changed, chosen.seed)
    lines = [line for pair in texts.train for line in (*(m.content for m in pair.prompt), pair.chosen, pair.rejected)]
    tokenizer = train_tokenizer(lines, changed.vocabulary_size)
    base, train, held_out = (encode(pairs, tokenizer) for pairs in texts)
    longest = max(pair.length for pairs in (base, train, held_out) for pair in pairs)
    changed = replace(changed, max_length=longest + 80)  # room for what is generated
    return Setting(tokenizer, base, train, held_out, changed, chosen.seed, Progress(sys.stderr))


def fine_tune(
    given: Setting, pairs: Sequence[EncodedPair], start: PreTrainedModel | None = None, steps: int | None = None
) -> PreTrainedModel:
    """Supervised fine-tuning on the chosen side of pairs; the frozen result.

    Args:
        given: sizes, seed.
        pairs: what to learn from.
        start: the model to go on with (its copy is trained); random weights without.
        steps: at most so many; as the sizes say without.
    """
    sizes = given.sizes if steps is None else replace(given.sizes, sft_steps=min(steps, given.sizes.sft_steps))
    model = build_model(given.tokenizer, sizes, given.seed) if start is None else copy.deepcopy(start)
    model.requires_grad_(True)
    train_sft(model, pairs, sizes, given.seed, given.progress)
    return model.requires_grad_(False).eval()


def prefer(
    given: Setting,
    reference: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    beta: float = 0.1,
    on_evaluation: Callable[[PreTrainedModel, int], None] | None = None,
) -> tuple[PreTrainedModel, PreferenceCurves]:
    """Plain token-level DPO (no SFT term) from a copy of the reference; the policy in eval mode, and its curves."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    demo = DemoOptions(Path("unused"), seed=given.seed, beta=beta, sft_weight=0.0)
    known = pair_logps(reference, given.held_out, given.sizes.batch_size)
    curves = train_preferences(
        policy,
        reference,
        pairs,
        given.held_out,
        known,
        demo,
        given.sizes,
        given.progress,
        None if on_evaluation is None else lambda step: on_evaluation(policy, step),
    )
    return policy.requires_grad_(False).eval(), curves


class Clock:
    """Wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)


def machine() -> str:
    """The processor and its number of cores, such as "AMD EPYC, 2 cores"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = os.cpu_count()
    return f"{name}, {cores} core{'' if cores == 1 else 's'}"


def write(chosen: Options, name: str, results: dict[str, Any], paragraph: str, figure: Any, clock: Clock) -> None:
    """Write `name`.json and `name`.png, and print the paragraph."""
    document = {
        "command": f"python examples/{name}.py {chosen.command}",
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "qkernels": qkernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": clock.seconds(),
        "paragraph": paragraph,
        "results": _rounded(results),
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    name = chosen.name(name)
    (chosen.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    save_png(figure, chosen.out / f"{name}.png")
    print(f"{paragraph}\n\n{chosen.out / name}.json, {chosen.out / name}.png; {document['seconds']:.0f} s")


def save_png(figure: Any, path: Path) -> None:
    """Save a figure with a palette of 128 colours, a third of the size of full colours."""
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


def interval(values: Sequence[float], seed: int) -> dict[str, float]:
    """A mean with its interval of 95 % by the bootstrap: `mean`, `low`, `high`."""
    found = bootstrap_mean(list(values), seed=seed)
    return {"mean": found.estimate, "low": found.low, "high": found.high}


def _rounded(value: Any) -> Any:
    """Numbers to six digits, so that the files stay small."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def panels(title: str, *names: str, width: float = 4.2, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure with one panel per name, side by side, in the experiments' style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.labelcolor": DARK,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e8ea",
            "grid.linewidth": 0.7,
            "xtick.color": DARK,
            "ytick.color": DARK,
            "legend.frameon": False,
            "legend.fontsize": 8,
        }
    )
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(width * len(names), height), layout="constrained", squeeze=False
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=DARK)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, loc="left")
    return figure, list(axes[0])
