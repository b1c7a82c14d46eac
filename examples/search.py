"""Tree search beside beam search on a DPO policy: what they find for equally many forwards ("From r to Q*", 5.2)

Both look for the completion whose value as a plan is highest, V(s_0) + beta log pi (eqs. 12, 13): the beam keeps the W
likeliest prefixes of each length, the tree reads one leaf after another by PUCT, with the policy as prior and its own
values. A policy is trained by DPO on the demo's answers with planted errors. Beams of several widths are searched, and
counted is on how many positions the policy was run; the tree is allowed as many. Compared are log pi of the answer that
was found, its length, and its true score by a checker that knows the facts, with intervals of 95 % over countries.

--tune measures several exploration constants instead, on the other countries: those that the comparison does not ask
about. The default of `tree_search` was chosen so. --policy DIR keeps the trained policy there, for another search.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from beam import Checker, ask
from common import BLUE, GREEN, ORANGE, Clock, Setting, fine_tune, interval, options, panels, prefer, setting, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qkernels.search import Beams, TreeSearch, beam_search, best_of, tree_search

WIDTHS, COUNTRIES, LONGEST, BETA = (1, 2, 3, 5, 10), 25, 60, 0.1
EXPLORATION = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of --tune


class Positions:
    """Counts the positions that a model is run on, without those of the prompts."""

    def __init__(self, model: nn.Module):
        self.count = 0
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        self.count += ids.numel() if ids.shape[1] == 1 else 0

    def done(self) -> int:
        self._handle.remove()
        return self.count


def numbers(found: Beams, checker: Checker, countries: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """Of the best answer to each prompt."""
    texts = [
        tokenizer.decode(row[0][mask[0]], skip_special_tokens=True)
        for row, mask in zip(found.completions, found.completion_mask, strict=True)
    ]
    return {
        "logp": found.logps[:, 0].tolist(),
        "length": found.lengths[:, 0].double().tolist(),
        "score": [checker.judge(country, text).score for country, text in zip(countries, texts, strict=True)],
    }


def summary(values: dict[str, Any]) -> dict[str, float]:
    return {name: sum(value) / len(value) for name, value in values.items() if isinstance(value, list)}


def difference(one: Sequence[float], other: Sequence[float], countries: Sequence[str]) -> dict[str, float]:
    """Mean of the differences, and its interval over countries."""
    gaps: dict[str, list[float]] = {}
    for country, a, b in zip(countries, one, other, strict=True):
        gaps.setdefault(country, []).append(a - b)
    return interval([statistics.mean(group) for group in gaps.values()], 0)


def shown(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


class Searches:
    """Beams and trees of a policy for the same prompts, at equal cost."""

    def __init__(self, policy: nn.Module, tokenizer: Any, checker: Checker, prompts: tuple[Tensor, Tensor, list[str]]):
        self.policy, self.tokenizer, self.checker = policy, tokenizer, checker
        self.ids, self.mask, self.countries = prompts
        self._shared: dict[str, Any] = {"beta": BETA, "max_new_tokens": LONGEST, "batch_size": 25}

    def _numbers(self, found: Beams) -> dict[str, Any]:
        return numbers(found, self.checker, self.countries, self.tokenizer)

    def beam(self, width: int) -> tuple[dict[str, Any], int]:
        """What it finds, and how many positions it reads for a prompt."""
        positions = Positions(self.policy)
        found = beam_search(
            self.policy, self.ids, self.mask, num_beams=width, num_return_sequences=1, **self._shared
        )  # fmt: skip
        return self._numbers(found), max(1, positions.done() // len(self.ids))

    def tree(self, forwards: int, **how: float) -> tuple[dict[str, Any], TreeSearch]:
        found = tree_search(
            self.policy, self.ids, self.mask, simulations=10_000, max_forwards=forwards, **self._shared, **how
        )  # fmt: skip
        return self._numbers(found.beams), found

    def best_of(self, count: int, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return self._numbers(best_of(self.policy, None, self.ids, self.mask, n=count, by="logp", **self._shared))


def tune(searches: Searches, widths: Sequence[int]) -> None:
    """Print log pi above the beam's by the exploration constant."""
    beams = {width: searches.beam(width) for width in widths}
    for exploration in EXPLORATION:
        gaps = []
        for width, (beam, forwards) in beams.items():
            tree, _ = searches.tree(forwards, exploration=exploration)
            gap = difference(tree["logp"], beam["logp"], searches.countries)
            gaps.append(f"{width}: {shown(gap)}")
        print(f"exploration {exploration:g}, log pi above the beam's by width: {'; '.join(gaps)}", flush=True)


def trained(given: Setting, folder: Path | None) -> nn.Module:
    """The policy: that of a folder, if it is there, or else trained, and kept there if there is a folder."""
    if folder is not None and (folder / "config.json").is_file():
        policy: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
        return policy
    given.progress.say("Reference: answers of both kinds")
    reference = fine_tune(given, given.base)
    made, _ = prefer(given, reference, given.train, BETA)
    if folder is not None:
        made.save_pretrained(folder)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--policy", type=Path)
    own, others = parser.parse_known_args(arguments)
    chosen = options(__doc__.partition("\n")[0], others)
    clock = Clock()
    given = setting(chosen, sft_steps=95, steps=100, evaluations=2)
    checker = Checker()
    countries = sorted(checker.world)
    countries = countries[COUNTRIES:] if own.tune else countries[:COUNTRIES]
    prompts = ask(given, countries[: 2 if chosen.tiny else COUNTRIES])
    policy = trained(given, own.policy)
    widths = WIDTHS[:2] if chosen.tiny else WIDTHS
    searches = Searches(policy, given.tokenizer, checker, prompts)
    if own.tune:
        tune(searches, widths[1:])
        return
    rows: dict[str, Any] = {}
    for width in widths:
        beam, forwards = searches.beam(width)
        planned, tree = searches.tree(forwards)
        rows[str(width)] = {
            "forwards_of_the_beam": float(forwards),
            "forwards_of_the_tree": tree.forwards.double().mean().item(),
            "proven": tree.proven.double().mean().item(),
            "beam": summary(beam),
            "tree": summary(planned),
            "best_of": summary(searches.best_of(width, chosen.seed)),
            **{
                f"tree_minus_beam_{kind}": difference(planned[kind], beam[kind], searches.countries)
                for kind in ("logp", "score")
            },
        }
        print(
            f"width {width}, {forwards} forwards: log pi {shown(rows[str(width)]['tree_minus_beam_logp'])}", flush=True
        )
    results = {"prompts": len(prompts[0]), "beta": BETA, "longest": LONGEST, "widths": rows}

    def describe(width: str) -> str:
        row = rows[width]
        return (
            f"Width {width}: {row['forwards_of_the_beam']:.0f} forwards by the beam, {row['forwards_of_the_tree']:.0f}"
            f" by the tree ({row['proven']:.0%} proven); log pi {row['beam']['logp']:.3f} and {row['tree']['logp']:.3f}"
            f" (difference {shown(row['tree_minus_beam_logp'])}); {row['beam']['length']:.1f} and"
            f" {row['tree']['length']:.1f} tokens; true score {row['beam']['score']:.3f} and"
            f" {row['tree']['score']:.3f} (difference {shown(row['tree_minus_beam_score'])})"
        )

    paragraph = f"{len(prompts[0])} questions, beta {BETA:g}. " + ". ".join(map(describe, rows)) + "."
    figure, axes = panels("Tree and beam search on a DPO policy, by forwards of the policy", "log pi of the answer",
                          "True score")  # fmt: skip
    for axis, kind in zip(axes, ("logp", "score"), strict=True):
        for name, colour in (("beam", ORANGE), ("tree", BLUE), ("best_of", GREEN)):
            costs = [row["forwards_of_the_tree" if name == "tree" else "forwards_of_the_beam"] for row in rows.values()]
            label = name.replace("_", " ") + (" n = width" if name == "best_of" else "")
            axis.plot(costs, [row[name][kind] for row in rows.values()], "o-", ms=3.5, color=colour, label=label)
        axis.set_xlabel("positions read per question")
    axes[0].legend()
    write(chosen, "search", results, paragraph, figure, clock)


if __name__ == "__main__":
    main()
