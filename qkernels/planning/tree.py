"""The tree of one prompt: which leaf to look at next (PUCT), what was found, what need not be looked at any more.

A node is a prefix whose next-token distribution is known. Its children are its likeliest tokens, whether they have been
read or not. Numbers are in nats: values in units of reward, divided by beta. `best` of a node is the largest value of a
leaf below it (transitions are deterministic and the plan is one sequence, so values are not averaged).

The rule: child a of node s has the priority Q(s, a) + c P(a | s) sqrt(N(s)) / (1 + N(s, a)), P the policy and N
visits. Q of a child that was visited is its `best`. One that was not is expected to go on as well as its best visited
sibling b, so that Q(s, a) = Q(s, b) + log P(a | s) - log P(b | s).

Where values are the policy's own, that of a completion is known once all but its last token have been read, so every
end among a node's children counts as found. And the value of a prefix is at least that of everything below it (12, 13:
it falls by -log pi of each token), so a prefix worth no more than the worst of the completions that are kept is cut
off. When nothing is left, what was found is the best there is.
"""

from __future__ import annotations

import math


class Node:
    """A prefix: its place in the tree, and its children by rank (0 is the likeliest token)."""

    __slots__ = (
        "best", "busy", "children", "closed", "depth", "logps", "logsumexp", "parent", "pending", "rank",
        "reference_logps", "reference_score", "reference_slot", "score", "slot", "token", "tokens", "visits",
    )  # fmt: skip

    def __init__(self, parent: Node | None, rank: int, token: int, score: float, reference_score: float):
        self.parent, self.rank, self.token = parent, rank, token
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.score, self.reference_score = score, reference_score  # sums of log pi and of log pi_ref from the root
        self.slot = self.reference_slot = -1
        self.tokens: list[int] = []  # of the children; none while the node is unread, or ended
        self.logps: list[float] = []
        self.reference_logps: list[float] = []
        self.logsumexp = 0.0
        self.children: dict[int, Node] = {}
        self.busy: set[int] = set()  # ranks that a simulation is on its way to
        self.closed: set[int] = set()  # ranks below which there is nothing left
        self.visits, self.pending, self.best = 0, 0, -math.inf

    def path(self) -> list[Node]:
        """The nodes from the first token to this one."""
        found: list[Node] = []
        node = self
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def child(self, rank: int) -> Node:
        """A new node for this rank, which enters the tree when it is read or valued."""
        reference = self.reference_logps[rank] if self.reference_logps else 0.0
        return Node(self, rank, self.tokens[rank], self.score + self.logps[rank], self.reference_score + reference)


class Tree:
    """One prompt's tree.

    Args:
        exploration: c, in nats.
        keep: completions that are returned.
        bounded: whether a prefix is worth at least as much as all that is below it.
    """

    def __init__(self, exploration: float, keep: int, bounded: bool):
        self.root = Node(None, 0, -1, 0.0, 0.0)
        self.exploration, self.keep, self.bounded = exploration, keep, bounded
        self.found: list[tuple[float, Node]] = []  # completions, best first
        self.omitted = -math.inf  # the largest value of a token that was not among a node's children
        self.simulations = self.forwards = 0
        self.exhausted = False

    @property
    def least(self) -> float:
        """What a prefix must be worth more than."""
        return self.found[-1][0] if len(self.found) == self.keep else -math.inf

    @property
    def proven(self) -> bool:
        """Whether no other completion is worth more than those that are kept."""
        return self.bounded and self.exhausted and self.omitted <= self.least

    def cut(self, score: float) -> bool:
        """Whether a prefix of this sum of log-probs cannot lead to a completion that would be kept."""
        return self.bounded and self.root.logsumexp + score <= self.least

    def select(self) -> tuple[Node, int] | None:
        """The leaf to look at next, as a node and the rank of its child; None if there is none. Marks it as busy."""
        while True:
            node = self.root
            while True:
                rank = self._choose(node)
                if rank is None:
                    break
                child = node.children.get(rank)
                if child is None or not child.tokens:
                    self._mark(node, rank)
                    return node, rank
                node = child
            if node.pending:
                return None  # others are on their way; what they find decides
            if node.parent is None:
                self.exhausted = True
                return None
            node.parent.closed.add(node.rank)

    def _mark(self, node: Node, rank: int) -> None:
        node.busy.add(rank)
        self.simulations += 1
        up: Node | None = node
        while up is not None:
            up.visits, up.pending = up.visits + 1, up.pending + 1
            up = up.parent

    def _choose(self, node: Node) -> int | None:
        """The rank with the highest priority among those that are open, not busy and not cut off."""
        known = [(child.best, rank) for rank, child in node.children.items() if child.best > -math.inf]
        base, sibling = max(known) if known else (self.root.logsumexp + node.score, -1)
        offset = base - (node.logps[sibling] if known else 0.0)
        wide = self.exploration * math.sqrt(max(1, node.visits))
        chosen, highest = None, -math.inf
        for rank, logp in enumerate(node.logps):
            if self.cut(node.score + logp):
                break  # the others are less likely still
            if rank in node.closed or rank in node.busy:
                continue
            child = node.children.get(rank)
            visits, value = (0, -math.inf) if child is None else (child.visits, child.best)
            if value == -math.inf:
                value = offset + logp
            priority = value + wide * math.exp(logp) / (1 + visits)
            if priority > highest:
                chosen, highest = rank, priority
        return chosen

    def expand(self, node: Node, tokens: list[int], logps: list[float], rest: float, logsumexp: float) -> None:
        """The next-token distribution of a node: its likeliest tokens and their log-probs; that of the next one."""
        node.tokens, node.logps, node.logsumexp = tokens, logps, logsumexp
        self.omitted = max(self.omitted, self.root.logsumexp + node.score + rest)
        node.visits = max(1, node.visits)
        if node.parent is not None:
            node.parent.children[node.rank] = node

    def settle(self, node: Node, ranks: list[int]) -> None:
        """Value the children of a node that are complete, ranks ascending: known without a forward (13)."""
        for rank in ranks:
            child = node.child(rank)
            if self.cut(child.score):
                break  # the others are less likely still
            self.value(child, self.root.logsumexp + child.score, True)

    def value(self, node: Node, value: float, complete: bool) -> None:
        """A leaf is worth so much; a complete one is kept if it is among the best, and has nothing below it."""
        assert node.parent is not None
        if node.rank in node.parent.closed:
            return  # a rollout has come to a completion that is known
        node.parent.children[node.rank] = node
        if complete:
            node.parent.closed.add(node.rank)
            self.found = sorted([*self.found, (value, node)], key=lambda pair: -pair[0])[: self.keep]
        up: Node | None = node
        while up is not None:
            up.best = max(up.best, value)
            up = up.parent

    def arrived(self, node: Node, rank: int) -> None:
        """A simulation that was on its way to this leaf has ended."""
        node.busy.discard(rank)
        up: Node | None = node
        while up is not None:
            up.pending -= 1
            up = up.parent

    def principal(self) -> Node:
        """The open node at the end of the path of the most visits, the best values among equals."""
        node = self.root
        while node.children:
            open_ = [child for rank, child in node.children.items() if child.tokens and rank not in node.closed]
            if not open_:
                break
            node = max(open_, key=lambda child: (child.visits, child.best))
        return node
