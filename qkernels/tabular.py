"""Token MDPs small enough to solve exactly: every state a row of a table, the soft Bellman backup from the end.

The tree of all sequences of `horizon` tokens over `vocab` symbols has one state per prefix. States of depth t are
numbered as the base-`vocab` number that their tokens spell, so the table of depth t has `vocab ** t` rows and the
children of row i are the rows `i * vocab + a` of the next depth. Equation numbers are of "From r to Q*" (Rafailov et
al. 2024). What a language model's logits say about such a tree is `qkernels.token_mdp`; this module gives the exact
values that it can be compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import checks
from .core.sequences import log_ratios

# A tree of this many states is solved in a fraction of a second; larger ones are a slip of the pen.
_MAX_STATES = 2_000_000


@dataclass(frozen=True)
class TabularMDP:
    """A token MDP and its solution. Lists have one float64 table per depth, `[vocab ** t, vocab]` (V: `[vocab ** t]`).

    beta: strength of the KL constraint.
    rewards: r(s, a), any numbers.
    reference_logps: log pi_ref(a | s), normalised.
    Q: Q*(s, a) = r + beta log pi_ref + V*(s'), with V* = 0 after the last token (7).
    V: V*(s) = beta log sum_a exp(Q*(s, a) / beta) (6).
    """

    beta: float
    rewards: tuple[Tensor, ...]
    reference_logps: tuple[Tensor, ...]
    Q: tuple[Tensor, ...]
    V: tuple[Tensor, ...]

    @property
    def vocab(self) -> int:
        return self.Q[0].shape[1]

    @property
    def horizon(self) -> int:
        return len(self.Q)

    @property
    def logits(self) -> tuple[Tensor, ...]:
        """Q* / beta: the logits of the optimal policy, whose log-sum-exp is V* / beta."""
        return tuple(q / self.beta for q in self.Q)

    @property
    def logps(self) -> tuple[Tensor, ...]:
        """log pi*(a | s) = (Q* - V*) / beta (5)."""
        return tuple((q - v[:, None]) / self.beta for q, v in zip(self.Q, self.V, strict=True))

    @property
    def implicit_rewards(self) -> tuple[Tensor, ...]:
        """beta log(pi* / pi_ref) = r + V*(s') - V*(s) (10)."""
        pairs = zip(self.logps, self.reference_logps, strict=True)
        return tuple(self.beta * log_ratios(logp, reference) for logp, reference in pairs)

    def states(self, tokens: Tensor) -> Tensor:
        """Rows of the tables along sequences: `[..., T]` int64 tokens to `[..., T]` int64, the state before each."""
        return self._states(tokens)[..., :-1]

    def _states(self, tokens: Tensor) -> Tensor:
        """The state before each token and, last, the one after all of them: `[..., T + 1]`."""
        tokens = checks.tensor(tokens, "tokens")
        if tokens.dtype != torch.int64 or tokens.dim() == 0 or tokens.shape[-1] > self.horizon:
            raise ValueError(
                f"tokens must be int64 [..., T] with T at most the horizon {self.horizon}; got {tokens.dtype}"
                f" {tuple(tokens.shape)}"
            )
        if bool(((tokens < 0) | (tokens >= self.vocab)).any()):
            raise ValueError(f"tokens must lie in [0, {self.vocab}), got {tokens.min()} to {tokens.max()}")
        states = [tokens.new_zeros(tokens.shape[:-1])]
        for t in range(tokens.shape[-1]):
            states.append(states[-1] * self.vocab + tokens[..., t])
        return torch.stack(states, -1)

    def along(self, tables: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Look a table up along sequences.

        Args:
            tables: one per depth: `[states, vocab]` (the taken action's entry is picked) or `[states]` such as V.
            tokens: `[..., T]`.

        Returns:
            `[..., T]` float64.
        """
        states = self.states(tokens)
        picked = []
        for t in range(tokens.shape[-1]):
            rows = tables[t][states[..., t]]
            picked.append(rows if tables[t].dim() == 1 else rows.gather(-1, tokens[..., t, None])[..., 0])
        return torch.stack(picked, -1)

    def rows(self, tables: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Whole rows of a table along sequences, `[..., T]` to `[..., T, vocab]`: `rows(mdp.logits, tokens)` is what a
        language model of the optimal policy returns."""
        states = self.states(tokens)
        return torch.stack([tables[t][states[..., t]] for t in range(tokens.shape[-1])], -2)

    def value_after(self, tokens: Tensor) -> Tensor:
        """V* of the state after the sequences, `[..., T]` to `[...]`; 0 where T is the horizon."""
        after, length = self._states(tokens)[..., -1], tokens.shape[-1]
        return torch.zeros_like(after, dtype=torch.float64) if length == self.horizon else self.V[length][after]

    def plan_values(self, tokens: Tensor) -> Tensor:
        """What planning maximises (12): the sum of r + beta log pi_ref over the sequence, plus V* after it, `[...]`.

        By (13) it is V*(s_0) + beta log pi* of the sequence.
        """
        step = [r + self.beta * reference for r, reference in zip(self.rewards, self.reference_logps, strict=True)]
        return self.along(step, tokens).sum(-1) + self.value_after(tokens)

    def sequences(self, length: int | None = None) -> Tensor:
        """All sequences of `length` tokens (the horizon by default), `[vocab ** length, length]` int64, in order."""
        length = self.horizon if length is None else length
        if not 0 < length <= self.horizon:
            raise ValueError(f"length must lie in [1, {self.horizon}], got {length}")
        return torch.tensor(list(itertools.product(range(self.vocab), repeat=length)))


def solve_mdp(rewards: Sequence[Tensor], reference_logits: Sequence[Tensor], beta: float) -> TabularMDP:
    """Solve a small token MDP exactly: the soft Bellman backup (6), (7), from the last depth to the first, in float64.

    Args:
        rewards: one table per depth t = 0 .. horizon - 1, `[vocab ** t, vocab]`, any floating dtype; row i holds the
            rewards of the state whose tokens spell i in base `vocab`.
        reference_logits: the reference policy's, the same shapes; normalised here. -inf forbids an action, which the
            optimal policy then forbids as well; each state needs one that is allowed.
        beta: strength of the KL constraint; above 0.

    Returns:
        `TabularMDP`.

    Raises:
        TypeError, ValueError: no depth, wrong shapes or dtypes, NaN or infinite rewards, a tree of more than two
            million states.
    """
    beta = checks.positive(beta, "beta")
    if len(rewards) == 0 or len(rewards) != len(reference_logits):
        raise ValueError(
            "rewards and reference_logits must have one table for each depth, got"
            f" {len(rewards)} and {len(reference_logits)}"
        )
    vocab = checks.tensor(rewards[0], "rewards[0]").shape[-1]
    if vocab ** len(rewards) > _MAX_STATES:
        raise ValueError(f"{vocab} symbols and {len(rewards)} steps make more than {_MAX_STATES} states")
    r = [_table(table, f"rewards[{t}]", vocab, t) for t, table in enumerate(rewards)]
    reference = [_table(table, f"reference_logits[{t}]", vocab, t) for t, table in enumerate(reference_logits)]
    if not all(bool(table.isfinite().all()) for table in r):
        raise ValueError("rewards must be finite")
    log_ref = [table.log_softmax(-1) for table in reference]
    if any(bool(table.isnan().any()) for table in log_ref):
        raise ValueError("each row of reference_logits needs a finite entry, and none may be NaN or +inf")
    q: list[Tensor] = []
    v: list[Tensor] = []
    following: Tensor | float = 0.0
    for reward, log_prob in zip(reversed(r), reversed(log_ref), strict=True):
        q.append(reward + beta * log_prob + following)
        v.append(beta * torch.logsumexp(q[-1] / beta, -1))
        following = v[-1].view(-1, vocab) if len(v) < len(r) else 0.0
    return TabularMDP(beta, tuple(r), tuple(log_ref), tuple(reversed(q)), tuple(reversed(v)))


def random_mdp(vocab: int, horizon: int, beta: float, generator: torch.Generator) -> TabularMDP:
    """A solved MDP with standard normal rewards and reference logits."""

    def tables() -> Iterator[Tensor]:
        for t in range(horizon):
            yield torch.randn(vocab**t, vocab, generator=generator, dtype=torch.float64)

    return solve_mdp(list(tables()), list(tables()), beta)


def _table(value: Tensor, name: str, vocab: int, depth: int) -> Tensor:
    value = checks.tensor(value, name)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.shape != (vocab**depth, vocab):
        raise ValueError(f"{name} must have shape ({vocab**depth}, {vocab}), got {tuple(value.shape)}")
    return value.detach().double().cpu()
