"""Tree search beside beam search on a DPO policy: what they find for equally many forwards ("From r to Q*", 5.2)

Both look for the completion whose value as a plan is highest, V(s_0) + beta log pi (eqs. 12, 13): the beam keeps the W
likeliest prefixes of each length, the tree reads one leaf after another by PUCT, with the policy as prior and its own
values. A policy is trained by DPO on the demo's answers with planted errors. Beams of several widths are searched, and
counted is on how many positions the policy was run; the tree is allowed as many. Compared are log pi of the answer that
was found, and its true score by a checker that knows the facts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from beam import Checker, ask
from common import BLUE, GREEN, ORANGE, Clock, fine_tune, options, panels, prefer, setting, write
from torch import Tensor, nn

from qkernels.search import Beams, beam_search, best_of, tree_search

WIDTHS, COUNTRIES, LONGEST, BETA = (1, 2, 3, 5, 10), 25, 60, 0.1


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
        "score": [checker.judge(country, text).score for country, text in zip(countries, texts, strict=True)],
    }


def summary(values: dict[str, Any]) -> dict[str, float]:
    return {name: sum(value) / len(value) for name, value in values.items() if isinstance(value, list)}


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, and its standard error."""
    gaps = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return gaps.mean().item(), (gaps.std() / math.sqrt(len(gaps))).item()


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments)
    clock = Clock()
    given = setting(chosen, sft_steps=95, steps=100, evaluations=2)
    checker = Checker()
    ids, mask, countries = ask(given, sorted(checker.world)[: 2 if chosen.tiny else COUNTRIES])
    given.progress.say("Reference: answers of both kinds")
    reference = fine_tune(given, given.base)
    policy, _ = prefer(given, reference, given.train, BETA)
    widths = WIDTHS[:2] if chosen.tiny else WIDTHS
    rows: dict[str, Any] = {}

    def shared() -> dict[str, Any]:
        return {"beta": BETA, "max_new_tokens": LONGEST, "batch_size": 25}

    for width in widths:
        positions = Positions(policy)
        found: Tensor | Any = beam_search(policy, ids, mask, num_beams=width, num_return_sequences=1, **shared())
        beam = numbers(found, checker, countries, given.tokenizer)
        budget = positions.done() // len(ids)
        tree = tree_search(policy, ids, mask, simulations=10_000, max_forwards=max(1, budget), **shared())
        planned = numbers(tree.beams, checker, countries, given.tokenizer)
        torch.manual_seed(chosen.seed)
        sampled = numbers(
            best_of(policy, None, ids, mask, n=width, by="logp", **shared()), checker, countries, given.tokenizer
        )
        gap, error = difference(planned["logp"], beam["logp"])
        score_gap, score_error = difference(planned["score"], beam["score"])
        rows[str(width)] = {
            "forwards_of_the_beam": float(budget),
            "forwards_of_the_tree": tree.forwards.double().mean().item(),
            "proven": tree.proven.double().mean().item(),
            "beam": summary(beam),
            "tree": summary(planned),
            "best_of": summary(sampled),
            "tree_minus_beam_logp": gap,
            "standard_error_logp": error,
            "tree_minus_beam_score": score_gap,
            "standard_error_score": score_error,
        }
        print(f"width {width}, {budget} forwards: log pi {gap:+.3f} +- {error:.3f} by the tree", flush=True)
    results = {"prompts": len(ids), "beta": BETA, "longest": LONGEST, "widths": rows}

    def describe(width: str) -> str:
        row = rows[width]
        return (
            f"Width {width}: {row['forwards_of_the_beam']:.0f} forwards by the beam, {row['forwards_of_the_tree']:.0f}"
            f" by the tree ({row['proven']:.0%} proven); log pi {row['beam']['logp']:.3f} and {row['tree']['logp']:.3f}"
            f" (difference {row['tree_minus_beam_logp']:+.3f}, standard error {row['standard_error_logp']:.3f}); true"
            f" score {row['beam']['score']:.3f} and {row['tree']['score']:.3f} (difference"
            f" {row['tree_minus_beam_score']:+.3f}, standard error {row['standard_error_score']:.3f})"
        )

    paragraph = f"{len(ids)} questions, beta {BETA:g}. " + ". ".join(map(describe, rows)) + "."
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
