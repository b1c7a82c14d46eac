"""The search itself: simulations of all prompts side by side, one batched forward for each token of their rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional.logits import token_stats
from .prefixes import PrefixModel
from .tree import Node, Tree


class Leaves(NamedTuple):
    """Leaves of a search, S at a time, as a user's reward and value function see them.

    prompts: int64 `[S]`, which prompt of the batch.
    sequences: int64 `[S, P + T]`, the prompt with its padding on the left, the completion, padding.
    attention_mask: int64 `[S, P + T]`, 0 at padding.
    completion_mask: bool `[S, T]`, the tokens of the completion.
    finished: bool `[S]`, whether the completion has ended; if not, more may come.
    """

    prompts: Tensor
    sequences: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    finished: Tensor


@dataclass(frozen=True)
class Settings:
    """What a search was asked for. See `qkernels.search.tree_search`; ends: ids of end tokens, pad: fills up."""

    beta: float
    simulations: int
    max_new_tokens: int
    exploration: float
    width: int
    rollout: int | None
    parallel: int
    max_forwards: int | None
    keep: int
    ends: frozenset[int]
    pad: int
    value: Callable[[Leaves], Tensor] | None  # None: the policy's own
    reward: Callable[[Leaves], Tensor] | None  # None: the implicit reward

    @property
    def bounded(self) -> bool:
        """Whether values are the policy's own throughout, so that no continuation is worth more than its prefix."""
        return self.value is None and self.reward is None


@dataclass
class _Row:
    """A rollout: the node that is read next, how many tokens may follow it, and the leaf that began it."""

    prompt: int
    node: Node
    left: int | None
    origin: tuple[Node, int] | None = None


@dataclass
class Planner:
    """Trees of B prompts and the models that are asked.

    Args:
        settings: what is asked for.
        policy: whose log-probs and values the plan is made of.
        reference: of eq. 12 with a reward of the user's; None where the policy stands for it.
        input_ids, attention_mask: int64 `[B, P]`, prompts padded on the left.
    """

    settings: Settings
    policy: PrefixModel
    reference: PrefixModel | None
    input_ids: Tensor
    attention_mask: Tensor
    trees: list[Tree] = field(init=False)

    def __post_init__(self) -> None:
        given = self.settings
        self.trees = [Tree(given.exploration, given.keep, given.bounded) for _ in self.input_ids]
        kept = [row[mask.bool()].tolist() for row, mask in zip(self.input_ids, self.attention_mask, strict=True)]
        self._prompts: list[list[int]] = kept
        logits, self._slots = self.policy.read(self.input_ids, self.attention_mask)
        others = None
        if self.reference is not None:
            others, self._reference_slots = self.reference.read(self.input_ids, self.attention_mask)
        self._expand(list(range(len(self.trees))), [tree.root for tree in self.trees], logits, others)

    def run(self, step: Callable[[int], None]) -> None:
        """Search until every prompt has had its simulations, its forwards or all there is. step(n): n are done."""
        given, first = self.settings, True
        left = len(self.trees) * given.simulations
        while True:
            rows: list[_Row] = []
            for prompt, tree in enumerate(self.trees):
                if not self._affordable(tree):
                    continue
                for _ in range(1 if first else min(given.parallel, given.simulations - tree.simulations)):
                    picked = tree.select()
                    if picked is None:
                        break
                    node, rank = picked
                    child = node.children.get(rank) or node.child(rank)
                    rows.append(_Row(prompt, child, None if first else given.rollout, picked))
            if not rows:
                break
            self._roll_out(rows)
            step(len(rows))
            left -= len(rows)
            first = False
        if given.rollout is not None:
            self._complete()
        if left:  # simulations that would find nothing more, or that there are no forwards for
            step(left)

    def _affordable(self, tree: Tree) -> bool:
        limit = self.settings.max_forwards
        enough = limit is not None and tree.forwards >= limit
        return not tree.exhausted and tree.simulations < self.settings.simulations and not enough

    def _complete(self) -> None:
        """Go on to the end from the paths of the most visits."""
        rows = []
        for prompt, tree in enumerate(self.trees):
            node = tree.principal()
            open_ = [rank for rank in range(len(node.tokens)) if rank not in node.closed]
            if open_:
                rows.append(_Row(prompt, node.children.get(open_[0]) or node.child(open_[0]), None))
        self._roll_out(rows)

    def _ended(self, node: Node) -> bool:
        return node.token in self.settings.ends

    def _complete_unread(self, node: Node) -> bool:
        """Whether a node is a completion whose next-token distribution nobody needs."""
        return self._ended(node) or (self.settings.bounded and node.depth == self.settings.max_new_tokens)

    def _roll_out(self, rows: list[_Row]) -> None:
        """Read the nodes of all rows and go on with their likeliest tokens, then value where they have come to."""
        origins = [(self.trees[row.prompt], *row.origin) for row in rows if row.origin is not None]
        leaves = [(row.prompt, row.node) for row in rows if self._complete_unread(row.node)]
        rows = [row for row in rows if not self._complete_unread(row.node)]
        self._follow(rows)
        while rows:
            self._read(rows)
            going: list[int] = []
            for i, row in enumerate(rows):
                leaf = self._advance(row)
                if leaf is None:
                    going.append(i)
                elif leaf is not row.node or not self.trees[row.prompt].cut(leaf.score + max(leaf.logps)):
                    leaves.append((row.prompt, leaf))
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                if rows:
                    for model in self._models():
                        model.keep(torch.tensor(going))
        self._value(leaves)
        for tree, node, rank in origins:
            tree.arrived(node, rank)

    def _advance(self, row: _Row) -> Node | None:
        """Move a row, whose node has been read, to its next node; or return the leaf where it stops."""
        tree, node, given = self.trees[row.prompt], row.node, self.settings
        spent = given.max_forwards is not None and tree.forwards >= given.max_forwards and bool(tree.found)
        if node.depth == given.max_new_tokens or row.left == 0 or spent or tree.cut(node.score + node.logps[0]):
            return node
        child = node.child(0)
        if self._complete_unread(child):
            return child
        row.node = child
        row.left = None if row.left is None else row.left - 1
        return None

    def _models(self) -> list[PrefixModel]:
        return [self.policy] if self.reference is None else [self.policy, self.reference]

    def _follow(self, rows: Sequence[_Row]) -> None:
        """Set the models to the prefixes before the nodes of these rows."""
        if not rows:
            return
        paths = [row.node.path()[:-1] for row in rows]
        tokens = [
            [*self._prompts[row.prompt], *(node.token for node in path)] for row, path in zip(rows, paths, strict=True)
        ]
        self.policy.follow(
            tokens,
            [[*self._slots[row.prompt], *(n.slot for n in path)] for row, path in zip(rows, paths, strict=True)],
        )
        if self.reference is not None:
            slots = self._reference_slots
            self.reference.follow(
                tokens,
                [
                    [*slots[row.prompt], *(n.reference_slot for n in path)]
                    for row, path in zip(rows, paths, strict=True)
                ],
            )

    def _read(self, rows: Sequence[_Row]) -> None:
        """One forward of the nodes of all rows."""
        tokens = torch.tensor([row.node.token for row in rows])
        logits, slots = self.policy.step(tokens)
        others = None
        if self.reference is not None:
            others, other_slots = self.reference.step(tokens)
            for row, slot in zip(rows, other_slots, strict=True):
                row.node.reference_slot = slot
        for row, slot in zip(rows, slots, strict=True):
            row.node.slot = slot
            self.trees[row.prompt].forwards += 1
        self._expand([row.prompt for row in rows], [row.node for row in rows], logits, others)

    def _expand(self, prompts: Sequence[int], nodes: Sequence[Node], logits: Tensor, others: Tensor | None) -> None:
        """Give nodes their children, out of the logits `[R, V]` of the policy and of the reference."""
        width = min(self.settings.width, logits.shape[1])
        logsumexp = _logsumexp(logits)
        top, tokens = (logits - logsumexp[:, None]).topk(min(width + 1, logits.shape[1]), 1)
        references = None
        if others is not None:
            references = (others - _logsumexp(others)[:, None]).gather(1, tokens.to(others.device)).tolist()
        lists = zip(prompts, nodes, top.tolist(), tokens.tolist(), logsumexp.tolist(), strict=True)
        for i, (prompt, node, logps, ids, normaliser) in enumerate(lists):
            possible = sum(logp > -torch.inf for logp in logps[:width])
            if references is not None:
                node.reference_logps = references[i][:possible]
            rest = logps[width] if len(logps) > width else -torch.inf
            if node.parent is None:
                node.logsumexp = normaliser  # of the root, which all values of its tree contain
            self.trees[prompt].expand(node, ids[:possible], logps[:possible], rest, normaliser)
            if self.settings.bounded:
                last = node.depth + 1 == self.settings.max_new_tokens
                complete = [rank for rank, token in enumerate(node.tokens) if last or token in self.settings.ends]
                self.trees[prompt].settle(node, complete)

    def _value(self, leaves: Sequence[tuple[int, Node]]) -> None:
        """Value leaves, and say which are completions."""
        given = self.settings
        values: list[float]
        if given.bounded:
            values = [self.trees[prompt].root.logsumexp + node.score for prompt, node in leaves]
        else:
            values = self._values_of_the_user(leaves) if leaves else []
        for (prompt, node), value in zip(leaves, values, strict=True):
            complete = self._ended(node) or node.depth == given.max_new_tokens
            self.trees[prompt].value(node, value, complete)

    def _values_of_the_user(self, leaves: Sequence[tuple[int, Node]]) -> list[float]:
        """Rewards so far and the reference's log-probs (12), and the value of what may come, in nats."""
        given, batch = self.settings, self.leaves(leaves)
        total = torch.zeros(len(leaves), dtype=torch.float64, device="cpu")
        for i, (prompt, node) in enumerate(leaves):
            open_value = 0.0 if self._ended(node) else node.logsumexp
            if given.reward is None:  # Bellman rewards (10): they and beta log pi_ref add up to this
                total[i] = self.trees[prompt].root.logsumexp + node.score - open_value
            else:
                total[i] = node.score if self.reference is None else node.reference_score
            if given.value is None:
                total[i] += open_value
        if given.reward is not None:
            total += _numbers(given.reward, batch, "reward") / given.beta
        if given.value is not None:
            total += _numbers(given.value, batch, "value").masked_fill(batch.finished.cpu(), 0.0) / given.beta
        return total.tolist()

    def leaves(self, nodes: Sequence[tuple[int, Node]]) -> Leaves:
        """Nodes as padded sequences."""
        paths = [[step.token for step in node.path()] for _, node in nodes]
        longest = max(map(len, paths))
        device = self.input_ids.device
        prompts = torch.tensor([prompt for prompt, _ in nodes], device=device)
        tokens = torch.tensor([path + [self.settings.pad] * (longest - len(path)) for path in paths], device=device)
        mask = torch.tensor([[True] * len(path) + [False] * (longest - len(path)) for path in paths], device=device)
        return Leaves(
            prompts,
            torch.cat([self.input_ids[prompts], tokens], 1),
            torch.cat([self.attention_mask[prompts], mask.long()], 1),
            mask,
            torch.tensor([self._ended(node) for _, node in nodes], device=device),
        )


def _logsumexp(logits: Tensor) -> Tensor:
    """Of each row, by one pass of the fused kernels."""
    found = token_stats(logits, logits.new_zeros(len(logits), dtype=torch.int64), outputs=("logsumexp",)).logsumexp
    assert found is not None
    return found


def _numbers(function: Callable[[Leaves], Tensor], leaves: Leaves, name: str) -> Tensor:
    found = function(leaves)
    if not isinstance(found, Tensor) or found.shape != leaves.prompts.shape or bool(found.isnan().any()):
        what = f"{tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name} must return one number per leaf, none of them NaN, [S] = {tuple(leaves.prompts.shape)}; got {what}"
        )
    return found.detach().double().cpu()


def prefix_models(
    policy: nn.Module, reference: nn.Module | None, use_cache: bool
) -> tuple[PrefixModel, PrefixModel | None]:
    """The models of a search; a reference that is the policy is a PEFT model without its adapter.

    Raises:
        ValueError: it is the policy, and has no adapter.
    """
    if reference is policy and not callable(getattr(policy, "disable_adapter", None)):
        raise ValueError("reference_model is model itself, which has no PEFT adapter to switch off; pass a frozen copy")
    other = None if reference is None else PrefixModel(reference, adapter_off=reference is policy, use_cache=use_cache)
    return PrefixModel(policy, use_cache=use_cache), other
