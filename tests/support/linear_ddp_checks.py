"""What `test_linear_autograd.py` runs in two processes: DistributedDataParallel around a model that ends in its loss.

Each process trains on a pair of its own; the averaged gradients are compared with those of both pairs in one process.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cases import make_head_batch, normal
from qkernels import TokenDPOOutput, fused_linear_token_dpo, linear_token_logps

WORLD, LENGTH, SIZE, VOCAB = 2, 6, 8, 21


class Model(nn.Module):
    """Embedding, a layer, and the embedding once more as the head."""

    def __init__(self, plan: str):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, SIZE)
        self.layer = nn.Linear(SIZE, SIZE)
        self.plan = plan
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * normal(*parameter.shape, key=(i,)))
        self.embedding.weight.requires_grad_(plan != "frozen_head")

    def forward(self, tokens: Tensor, labels: Tensor) -> TokenDPOOutput:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        return fused_linear_token_dpo(
            hidden, self.embedding.weight, labels, reference_logps=0.0, beta=0.5, plan=self.plan
        )


def batch(pairs: list[int]) -> tuple[Tensor, Tensor]:
    labels = make_head_batch(WORLD, LENGTH, SIZE, VOCAB, torch.float32).labels
    rows = [*pairs, *(WORLD + pair for pair in pairs)]
    tokens = (torch.arange(2 * WORLD * LENGTH).view(2 * WORLD, LENGTH) * 5) % VOCAB
    return tokens[rows], labels[rows]


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def expect(actual: list[Tensor], expected: list[Tensor], factor: float, what: str) -> None:
    """Gradients that are equal but for the order in which fp32 sums are formed.

    One GEMM of all rows stands against one for each process, and a library may sum either in any order. A gradient is a
    sum of at most 2 * WORLD * LENGTH + VOCAB = 45 products, made of such sums in two further layers. A sum of n terms
    errs by at most n u (u = 2^-24) of its terms' magnitudes; terms cancel, so an entry's error is relative to the
    largest entry of its tensor and not to itself.
    """
    bound = 2 * 3 * (2 * WORLD * LENGTH + VOCAB) * 2.0**-24  # 1.6e-5, both sides erring
    for a, b in zip(actual, expected, strict=True):
        largest = float(factor * b.abs().max())
        assert largest > 0 and float((a - factor * b).abs().max()) <= bound * largest, what


def check(rank: int, plan: str, static: bool, options: dict) -> None:
    alone = Model(plan)
    alone(*batch([0, 1])).loss.backward()
    expected = gradients(alone)
    parallel = nn.parallel.DistributedDataParallel(Model(plan), static_graph=static, **options)
    what = f"{plan}, static {static}, {options}"
    mine = batch([rank])
    for _ in range(2):  # with a static graph the first step is special
        out = parallel(*mine)
        assert out.plan is None or out.plan.name == plan  # None where DDP has rebuilt the tuple
        assert not out.token_logps.requires_grad
        out.loss.backward()
        expect(gradients(parallel), expected, 1.0, what)
    (2.5 * parallel(*mine).loss).backward()
    expect(gradients(parallel), expected, 2.5, what + ", upstream gradient")
    if static:
        return  # one backward for each forward is what a static graph promises
    with parallel.no_sync():
        parallel(*mine).loss.backward()
    parallel(*mine).loss.backward()
    expect(gradients(parallel), expected, 2.0, what + ", accumulation")
    with parallel.no_sync():
        loss = parallel(*mine).loss
        loss.backward(retain_graph=True)
        loss.backward()
    twice = gradients(parallel)
    alone(*mine).loss.backward()
    expect(twice, gradients(alone), 2.0, what + ", a second backward through the same graph")


def check_head_outside(rank: int) -> None:
    """Log-probs made of the wrapped model's outputs and its head, outside of its forward; a loss of one's own."""

    class Backbone(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tanh(self.layer(self.embedding(tokens)))

    def loss(model, weight: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        return linear_token_logps(model(tokens), weight, labels).square().sum()

    alone = Backbone("recompute")
    loss(alone, alone.embedding.weight, *batch([0, 1])).backward()
    parallel = nn.parallel.DistributedDataParallel(Backbone("recompute"))
    for _ in range(2):
        loss(parallel, parallel.module.embedding.weight, *batch([rank])).backward()
    expect(gradients(parallel), gradients(alone), 1.0, "head outside")


def check_all() -> None:
    """On each rank of the default process group."""
    rank = torch.distributed.get_rank()
    for plan in ("pair_chunks", "recompute", "frozen_head"):
        for static in (False, True):
            check(rank, plan, static, {})
        check(rank, plan, False, {"gradient_as_bucket_view": True, "find_unused_parameters": True})
    check_head_outside(rank)
