"""Preferences that are not Bradley-Terry: the simulation of "Your Language Model is Secretly a Single-Index Model"

(Kallus 2025). A network with random weights is the teacher: its log-probs give every answer a known reward. Which of
two answers wins is drawn with a probability that is flat where the rewards are within `shift` of each other, which no
logistic function of the reward fits. A network of the same size is trained on these preferences with each loss, and
then used at many strengths of the KL constraint: pi_ref^(1 - 1/b) pi^(1/b). Compared is the true reward where the
divergence from the reference is 0.2 nats. Sizes, schedules and the order of the random draws are those of the authors'
code, so the runs of `sigmoid` and `rspo` are theirs to the digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from common import BLUE, DARK, GREEN, ORANGE, Clock, options, panels, write
from torch import Tensor, nn

from qkernels import fused_token_dpo
from qkernels.semiparametric import OSPO, PSPO, LearnedLink

FEATURES, ANSWERS, PAIRS, CONTEXTS, BATCH, EPOCHS = 20, 10, 1000, 2000, 128, 100
REWARD, SHARPNESS, SHIFTS, BUDGET, SEEDS = 10.0, 0.25, (0.0, 1.5), 0.2, 8
STRENGTHS = (0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 5, 8, 10, 15, 20, 30, 50, 80, 100, 150, 200, 300, 500, 800, 1000)
# "PSPO" fits to the whole data set on the authors' schedule (3 epochs of DPO, then a fit every 2 epochs, 4 times).
LOSSES = ("sigmoid", "rspo", "pspo", "pspo, memory", "ospo")


def network() -> nn.Sequential:
    """Logits of the answers to a context."""
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, ANSWERS))


class Data(NamedTuple):
    """Contexts of the pairs `[N, 20]`, the answer that won and the one that lost `[N]`, contexts to evaluate on."""

    contexts: Tensor
    chosen: Tensor
    rejected: Tensor
    held_out: Tensor


def rewards(teacher: nn.Module, contexts: Tensor) -> Tensor:
    """r* of every answer, `[N, 10]`: nu log(pi* / pi_ref) with a uniform reference."""
    with torch.no_grad():
        return REWARD * (teacher(contexts).log_softmax(-1) + math.log(ANSWERS))


def draw(teacher: nn.Module, pairs: int, shift: float, seed: int) -> Data:
    """Contexts, pairs of uniform answers, and who won: the link has two steps, at -shift and at shift."""
    rng = np.random.default_rng(seed)
    contexts, held_out = (
        torch.from_numpy(rng.normal(size=(n, FEATURES)).astype(np.float32)) for n in (pairs, CONTEXTS)
    )
    first, second = (torch.from_numpy(rng.integers(0, ANSWERS, size=pairs, dtype=np.int64)) for _ in range(2))
    true = rewards(teacher, contexts)
    gap = (true.gather(1, second[:, None]) - true.gather(1, first[:, None]))[:, 0]
    second_wins = 0.5 * torch.sigmoid((gap - shift) / SHARPNESS) + 0.5 * torch.sigmoid((gap + shift) / SHARPNESS)
    won = torch.bernoulli(second_wins) > 0
    return Data(contexts, torch.where(won, second, first), torch.where(won, first, second), held_out)


def margins(policy: nn.Module, data: Data) -> Tensor:
    """t of every pair, `[N]`: the log-ratio of chosen minus rejected (the uniform reference cancels)."""
    with torch.no_grad():
        logps = policy(data.contexts).log_softmax(-1)
    return (logps.gather(1, data.chosen[:, None]) - logps.gather(1, data.rejected[:, None]))[:, 0]


def train(policy: nn.Module, data: Data, loss: Any, epochs: int, *, prelude: bool = False) -> None:
    """Adam on shuffled batches; each pair is two sequences of one token.

    prelude: draw one order of the data first and not use it, as the authors' OSPO does.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    count = len(data.contexts)
    start = torch.randperm(count) if prelude else torch.arange(count)
    for epoch in range(epochs):
        order = torch.randperm(count)
        order = start[order] if prelude and epoch < 2 else order
        for picked in order.split(BATCH):
            if isinstance(loss, PSPO) and loss.refit_due:
                loss.fit_to(margins(policy, data))
            logits = policy(data.contexts[picked])
            labels = torch.cat([data.chosen[picked], data.rejected[picked]])[:, None]
            out = fused_token_dpo(
                torch.cat([logits, logits])[:, None],
                labels,
                reference_logps=torch.full(labels.shape, -math.log(ANSWERS)),
                beta=1.0,
                loss_type=loss,
            )
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()


def frontier(policy: nn.Module, teacher: nn.Module, data: Data, sign: float) -> tuple[list[float], list[float]]:
    """Exact KL to the reference and exact true reward of pi_ref^(1 - 1/b) pi^(1/b), for every b."""
    true = rewards(teacher, data.held_out)
    with torch.no_grad():
        index = sign * policy(data.held_out).log_softmax(-1)
    divergences, values = [], []
    for strength in STRENGTHS:
        logps = (index / strength).log_softmax(-1)
        divergences.append((logps.exp() * (logps + math.log(ANSWERS))).sum(1).mean().item())
        values.append((logps.exp() * true).sum(1).mean().item())
    return divergences, values


def at_budget(divergences: Sequence[float], values: Sequence[float], budget: float) -> float:
    """The reward at this KL, interpolated."""
    order = np.argsort(divergences)
    return float(np.interp(budget, np.asarray(divergences)[order], np.asarray(values)[order]))


def run(name: str, shift: float, seed: int, pairs: int, epochs: int) -> tuple[float, float, list[Any]]:
    """One training: reward at the budget, the sign that the loss found, and the frontier."""
    torch.manual_seed(seed)
    teacher = network()
    data = draw(teacher, pairs, shift, seed)
    policy = network()
    steps = -(-pairs // BATCH)
    made: dict[str, Callable[[], Any]] = {
        "pspo": lambda: PSPO(memory=pairs, warm_up=3 * pairs, refit=2 * steps, refit_on="data"),
        "pspo, memory": lambda: PSPO(warm_up=3 * pairs),
        "ospo": lambda: OSPO(memory=pairs, warm_up=2 * pairs),
    }
    loss = made[name]() if name in made else name
    short = name.startswith("pspo")
    train(policy, data, loss, min(11, epochs) if short else epochs + 2 * (name == "ospo"), prelude=name == "ospo")
    sign = loss.sign if isinstance(loss, LearnedLink) else 1.0
    divergences, values = frontier(policy, teacher, data, sign)
    return at_budget(divergences, values, BUDGET), sign, [divergences, values]


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__.partition("\n")[0], arguments)
    clock = Clock()
    seeds = range(chosen.seed, chosen.seed + (2 if chosen.tiny else SEEDS))
    pairs, epochs = (256, 12) if chosen.tiny else (PAIRS, EPOCHS)
    results: dict[str, Any] = {
        "pairs": pairs,
        "seeds": len(seeds),
        "budget": BUDGET,
        "link_shifts": list(SHIFTS),
        "shifts": {},
    }
    curves: dict[str, Any] = {}
    for shift in SHIFTS:
        rows: dict[str, Any] = {}
        for name in LOSSES:
            runs = [run(name, shift, seed, pairs, epochs) for seed in seeds]
            found = [reward for reward, _, _ in runs]
            error = float(np.std(found, ddof=1) / math.sqrt(len(found)))
            more = np.subtract(found, rows["sigmoid"]["by_seed"] if rows else found)
            rows[name] = {
                "reward": float(np.mean(found)),
                "standard_error": error,
                "more_than_sigmoid": float(np.mean(more)),
                "its_standard_error": float(np.std(more, ddof=1) / math.sqrt(len(more))),
                "by_seed": found,
                "flipped": sum(sign < 0 for _, sign, _ in runs),
            }
            curves[name] = np.mean([curve for _, _, curve in runs], axis=0)
            print(f"shift {shift:g}, {name}: {rows[name]['reward']:.3f} +- {error:.3f}", flush=True)
        results["shifts"][f"{shift:g}"] = rows

    def describe(shift: float) -> str:
        rows = results["shifts"][f"{shift:g}"]
        return ", ".join(f"{name} {row['reward']:.3f} ({row['standard_error']:.3f})" for name, row in rows.items())

    paragraph = (
        f"Reward at a KL of {BUDGET:g}, mean of {len(seeds)} seeds (standard error): "
        + "; ".join(f"link shift {shift:g}: {describe(shift)}" for shift in SHIFTS)
        + f". Of {len(seeds) * len(SHIFTS) * 3} trainings with a learned link"
        f" {sum(row['flipped'] for rows in results['shifts'].values() for row in rows.values())} had the wrong sign."
    )
    figure, axes = panels(
        "True reward and KL to the reference, by the strength after training", f"Link shift {SHIFTS[-1]:g}", "By seed"
    )
    colours = dict(zip(LOSSES, (DARK, BLUE, ORANGE, "#e9a178", GREEN), strict=True))
    last = results["shifts"][f"{SHIFTS[-1]:g}"]
    for name, (divergences, values) in curves.items():
        axes[0].plot(divergences, values, "o-", ms=3, color=colours[name], label=name)
    axes[0].axvline(BUDGET, color="#9aa1a8", ls="--", lw=1)
    axes[0].set_xlim(0, 1)
    axes[0].set_xlabel("KL to the reference, nats")
    axes[0].set_ylabel("true reward")
    axes[0].legend(loc="lower right")
    for place, name in enumerate(LOSSES):
        axes[1].plot([place] * len(seeds), last[name]["by_seed"], "o", ms=3, color=colours[name], alpha=0.6)
        axes[1].errorbar(place, last[name]["reward"], last[name]["standard_error"], fmt="_", ms=14, color=colours[name])
    axes[1].set_xticks(range(len(LOSSES)), LOSSES, rotation=20)
    axes[1].set_ylabel(f"reward at KL {BUDGET:g}")
    write(chosen, "single_index", results, paragraph, figure, clock)


if __name__ == "__main__":
    main()
