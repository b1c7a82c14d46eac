"""DPO learns Q*: preferences of a known reward in, the soft Q-function of that reward out ("From r to Q*", 4.2)

A token MDP of three steps over four symbols, small enough to be solved exactly: reference policy and rewards of every
token are random numbers. Pairs of sequences are drawn from the reference, and which one wins is drawn by Bradley-Terry
from their true rewards. A policy that is a table of logits is trained on these pairs with the DPO loss, and sees
nothing else. The theory says what it must come to: its logits are Q* / beta up to a constant of each state, its
beta log pi the advantage Q* - V*, and its implicit reward of each token r + V*(s') - V*(s). The experiment compares all
three, token by token, as the number of pairs grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from common import BLUE, GREY, ORANGE, Clock, options, panels, write
from torch import Tensor

from qkernels import fused_token_dpo
from qkernels.tabular import TabularMDP, random_mdp

VOCAB, HORIZON, BETA, SEEDS, STEPS = 4, 3, 0.5, 5, 100
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)


def preferences(mdp: TabularMDP, pairs: int | None, generator: torch.Generator) -> Tensor:
    """How often sequence i won against sequence j, `[S, S]`: S sequences in the order of `mdp.sequences()`.

    Both are drawn from the reference, and i wins with probability sigma(R(i) - R(j)). pairs: how many; None for the
    expected shares, which sum to 1.
    """
    sequences = mdp.sequences()
    share = mdp.along(mdp.reference_logps, sequences).sum(1).exp()
    total = mdp.along(mdp.rewards, sequences).sum(1)
    expected = share[:, None] * share * torch.sigmoid(total[:, None] - total) * 2
    if pairs is None:
        return expected / expected.sum()
    drawn = torch.multinomial(share, 2 * pairs, replacement=True, generator=generator).view(2, pairs)
    first_wins = torch.rand(pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(
        total[drawn[0]] - total[drawn[1]]
    )
    winner, loser = torch.where(first_wins, drawn, drawn.flip(0))
    count = len(sequences)
    return torch.bincount(winner * count + loser, minlength=count**2).view(count, count).double()


def learn(mdp: TabularMDP, wins: Tensor, steps: int) -> list[Tensor]:
    """log pi of a table of logits after DPO on these preferences, one table per depth; it starts at the reference.

    L-BFGS on all pairs at once; steps: at most so many, which also keeps few pairs from being fitted without end.
    """
    sequences = mdp.sequences()
    winner, loser = (wins > 0).nonzero().T
    weight = wins[winner, loser] / wins.sum()
    tokens = torch.cat([sequences[winner], sequences[loser]])
    reference = mdp.along(mdp.reference_logps, tokens)
    tables = [table.clone().requires_grad_() for table in mdp.reference_logps]
    optimizer = torch.optim.LBFGS(tables, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        out = fused_token_dpo(
            mdp.rows(tables, tokens), tokens, reference_logps=reference, beta=mdp.beta, reduction="none"
        )
        total = (out.loss * weight).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return [table.detach().log_softmax(-1) for table in tables]


def visits(mdp: TabularMDP) -> list[Tensor]:
    """How often the reference takes each action of each state, one table per depth; each sums to 1."""
    tables, reached = [], torch.ones(1, dtype=torch.float64)
    for logps in mdp.reference_logps:
        tables.append(reached[:, None] * logps.exp())
        reached = tables[-1].flatten()
    return tables


def compare(learnt: Sequence[Tensor], true: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, float]:
    """Correlation and root mean square error over all states and actions, weighted by how often they are met."""
    x, y, w = (torch.cat([table.flatten() for table in tables]) for tables in (learnt, true, weights))
    w = w / w.sum()
    dx, dy = x - (w * x).sum(), y - (w * y).sum()
    correlation = (w * dx * dy).sum() / ((w * dx**2).sum() * (w * dy**2).sum()).sqrt()
    return {"correlation": correlation.item(), "error": (w * (x - y) ** 2).sum().sqrt().item()}


def quantities(mdp: TabularMDP, logps: Sequence[Tensor]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What was learnt and what is true: advantages, implicit rewards, and Q up to a constant of each state."""
    advantages = [mdp.beta * table for table in logps]
    reference = mdp.reference_logps
    implicit = [mdp.beta * (table - ref) for table, ref in zip(logps, reference, strict=True)]

    def centred(tables: Sequence[Tensor]) -> list[Tensor]:
        """Less the reference's mean of each state, which shaping is free to choose."""
        return [q - (ref.exp() * q).sum(-1, keepdim=True) for q, ref in zip(tables, reference, strict=True)]

    return {
        "advantage": (advantages, [q - v[:, None] for q, v in zip(mdp.Q, mdp.V, strict=True)]),
        "implicit reward": (implicit, list(mdp.implicit_rewards)),
        "Q up to shaping": (centred(advantages), centred(mdp.Q)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments)
    clock = Clock()
    sizes, seeds, steps = (SIZES[1:3], 2, 20) if chosen.tiny else (SIZES, SEEDS, STEPS)
    results: dict[str, Any] = {"states": sum(VOCAB**t for t in range(HORIZON)), "seeds": seeds, "sizes": {}}
    points: tuple[Tensor, Tensor] | None = None
    for size in sizes:
        rows: list[dict[str, dict[str, float]]] = []
        for seed in range(chosen.seed, chosen.seed + seeds):
            generator = torch.Generator().manual_seed(seed)
            mdp = random_mdp(VOCAB, HORIZON, BETA, generator)
            found = quantities(mdp, learn(mdp, preferences(mdp, size, generator), steps))
            rows.append({name: compare(*pair, visits(mdp)) for name, pair in found.items()})
            if seed == chosen.seed:
                points = tuple(torch.cat([table.flatten() for table in side]) for side in found["implicit reward"])
        results["sizes"][str(size)] = {
            name: {
                kind: [row[name][kind] for row in rows] for kind in ("correlation", "error")
            } | {"mean_correlation": sum(row[name]["correlation"] for row in rows) / len(rows),
                 "least_correlation": min(row[name]["correlation"] for row in rows),
                 "mean_error": sum(row[name]["error"] for row in rows) / len(rows)}
            for name in rows[0]
        }  # fmt: skip
        row = results["sizes"][str(size)]["advantage"]
        print(f"{size} pairs: correlation of advantages {row['mean_correlation']:.4f}", flush=True)

    def describe(size: int) -> str:
        row = results["sizes"][str(size)]
        return f"{size:,} pairs: " + ", ".join(
            f"{name} {value['mean_correlation']:.4f} (error {value['mean_error']:.3f})" for name, value in row.items()
        )

    paragraph = (
        f"{results['states']} states of {VOCAB} actions, means of {seeds} random MDPs, correlation (root mean square"
        " error) over all states and actions, weighted by the reference's visits. "
        + "; ".join(map(describe, sizes))
        + f". Least correlation of advantages at {sizes[-1]:,} pairs:"
        f" {results['sizes'][str(sizes[-1])]['advantage']['least_correlation']:.4f}."
    )
    figure, axes = panels("DPO learns Q*", "Correlation with the truth", "Error, units of reward",
                          f"Implicit rewards, {sizes[-1]:,} pairs")  # fmt: skip
    for name, colour, style in (("advantage", BLUE, "o-"), ("implicit reward", ORANGE, "s--"),
                                ("Q up to shaping", GREY, "^:")):  # fmt: skip
        for axis, kind in zip(axes, ("mean_correlation", "mean_error"), strict=False):
            values = [results["sizes"][str(size)][name][kind] for size in sizes]
            axis.plot(sizes, values, style, ms=4, color=colour, label=name)
    first = results["sizes"][str(sizes[-1])]["implicit reward"]["mean_error"]
    axes[1].plot(sizes, [first * math.sqrt(sizes[-1] / size) for size in sizes], color=GREY, lw=0.8,
                 label=r"$1/\sqrt{n}$")  # fmt: skip
    axes[1].set_yscale("log")
    for axis in axes[:2]:
        axis.set_xscale("log")
        axis.set_xlabel("preference pairs")
        axis.legend()
    assert points is not None
    axes[2].plot(points[1], points[0], "o", ms=3, color=BLUE)
    ends = [points[1].min().item(), points[1].max().item()]
    axes[2].plot(ends, ends, color=GREY, lw=1)
    axes[2].set_xlabel("r + V*(s') - V*(s)")
    axes[2].set_ylabel(r"learnt $\beta$ log $\pi/\pi_{ref}$")
    write(chosen, "qstar", results, paragraph, figure, clock)


if __name__ == "__main__":
    main()
