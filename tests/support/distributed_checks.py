"""What every rank runs in `test_distributed.py`: a call on this rank's part, compared with the same call on everything.

Each function runs on all ranks of a group at once (`processes.Ranks`), makes the same batch everywhere, takes its own
part of it, and checks that part's results and gradients. The truth is float64: the oracle's, or this package's own on
one process. A function that provokes errors returns what it caught.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import oracle
import qkernels
from assertions import assert_row_output, assert_within, gradient_allowance
from cases import IGNORE, PairBatch, Rows, make_pairs, make_rows, normal, pack
from comparisons import random_upstream, row_sizes
from qkernels import (
    fused_linear_token_dpo,
    fused_sequence_loss,
    fused_token_dpo,
    linear_token_logps,
    linear_token_stats,
    plan_linear,
    token_logps,
    token_stats,
)
from qkernels.distributed import vocab_parallel

TRUTH = {"backend": "torch"}


def world() -> Any:
    return dist.group.WORLD


def cuts(size: int, ranks: int) -> list[int]:
    """Where parts of unequal length begin and end."""
    ends = [0] + [min(size, (i + 1) * size // ranks + (1 if i % 2 else -1)) for i in range(ranks)]
    ends[-1] = size
    return ends


def part(size: int, group: Any = None) -> slice:
    """This rank's part of `size` columns or positions."""
    group = group or world()
    rank, ends = dist.get_rank(group), cuts(size, dist.get_world_size(group))
    return slice(ends[rank], ends[rank + 1])


def relative(actual: Tensor, expected: Tensor, allowed: float, what: str, whole: Tensor | None = None) -> None:
    """Error relative to the largest entry, of `whole` if given."""
    bound = allowed * float((expected if whole is None else whole).abs().max())
    assert bound > 0, f"{what}: nothing to compare"
    assert_within(actual, expected, bound, what)


def tolerance(dtype: torch.dtype) -> float:
    """Of gradients that went through products: the dtype's own rounding of terms that do not cancel."""
    return {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}[dtype]


# --- the vocabulary, from logits -------------------------------------------------------------------------------------


def check_rows(rows: Rows, backend: str, inplace: bool, group: Any) -> None:
    """All outputs and the gradient of all that have one, of this rank's columns, within the suite's own bounds."""
    mine = part(rows.vocab, group)
    upstream = random_upstream(rows, oracle.WITH_GRADIENT)
    leaf = rows.logits[..., mine].contiguous().requires_grad_()
    stats = token_stats(
        leaf * 1 if inplace else leaf, rows.labels, reference_logits=rows.reference[..., mine].contiguous(),
        outputs=oracle.STATS, temperature=rows.temperature, inplace_backward=inplace, backend=backend, tp_group=group,
    )  # fmt: skip
    truth = oracle.token_stats(
        oracle.exact(rows.logits), rows.labels.cpu(), oracle.exact(rows.reference), temperature=rows.temperature
    )
    sizes = row_sizes(rows)
    for name, value in stats._asdict().items():
        assert_row_output(name, value, truth[name], rows.logits.dtype, sizes.get(name, 1.0))
    torch.autograd.backward([getattr(stats, name) for name in upstream], list(upstream.values()))
    how = {"temperature": rows.temperature}
    expected = oracle.gradient(rows.logits, rows.labels, upstream, rows.reference, **how)
    terms = oracle.gradient_terms(rows.logits, rows.labels, upstream, rows.reference, **how)
    allowed = gradient_allowance(expected, terms, rows.logits.dtype)
    assert leaf.grad is not None
    assert_within(leaf.grad, expected[..., mine], allowed[..., mine], "gradient of a part")


def rows_of_logits(dtype: torch.dtype, backend: str, vocab: int, inplace: bool = False) -> None:
    check_rows(make_rows((3, 5), vocab, dtype, temperature=0.8), backend, inplace, world())


def rows_on_gpu(dtype: torch.dtype) -> None:
    check_rows(make_rows((3, 5), 67, dtype, f"cuda:{dist.get_rank()}", temperature=0.8), "auto", False, world())


def perturbed_rows(changed: str) -> str:
    """The check of the check: one of the sums that travel is 1 % off, or one coefficient."""
    real, real_inputs = vocab_parallel.groups.all_reduce_, vocab_parallel.Shard.gradient_inputs

    def wrong(values: Tensor, how: str, group: str) -> Tensor:
        real(values, how, group)
        if how == "sum" and changed.isdigit():
            values[int(changed)] *= 1.01
        return values

    def wrong_inputs(self, call):
        call = real_inputs(self, call)
        if changed in ("softmax", "coefficients"):
            values = call.softmax[2] if changed == "softmax" else call.coefficients[1]
            values *= 1.01
        return call

    vocab_parallel.groups.all_reduce_, vocab_parallel.Shard.gradient_inputs = wrong, wrong_inputs
    try:
        rows_of_logits(torch.float32, "auto", 67)
    except AssertionError as error:
        return str(error)
    finally:
        vocab_parallel.groups.all_reduce_, vocab_parallel.Shard.gradient_inputs = real, real_inputs
    return ""


def hard_rows(backend: str) -> None:
    """Parts of nothing but -inf, forbidden labels, NaN, infinities, certainty, large offsets: as in one process."""
    vocab, ranks = 24, dist.get_world_size()
    ends = cuts(vocab, ranks)
    first, last = slice(0, ends[1]), slice(ends[-2], vocab)
    logits, labels = 2 * normal(15, vocab), torch.arange(15)
    reference = logits + 0.5 * normal(15, vocab, key=(1,))
    logits[0, first] = -torch.inf  # an empty part, which the label lies in
    labels[0] = 0
    logits[1, last] = -torch.inf  # an empty part, the label elsewhere
    labels[1] = 0
    logits[2] = -torch.inf  # nothing at all
    logits[3, -1] = torch.nan
    logits[4, 0] = torch.inf
    logits[5, 3:] = -torch.inf
    labels[5] = 2
    logits[6, -1] += 30.0  # certain, in the last part
    labels[6] = vocab - 1
    logits[7, 0] += 30.0  # certain, in the first
    labels[7] = 0
    logits[8] += 1e4
    logits[9] -= 1e4
    logits[10, last] -= 300.0  # a part that underflows
    labels[10] = vocab - 1
    logits[11], labels[11] = 0.0, 0  # equal everywhere: only the first label is top
    logits[12], labels[12] = 0.0, vocab - 1
    logits[13], labels[13] = torch.nan, IGNORE
    reference[14, last] = -torch.inf
    logits[14, last] = -torch.inf  # forbidden by both: no contribution to either divergence
    labels[14] = 0
    reference[5] = logits[5]  # the same model: exactly 0
    broken = [2, 3, 4]
    fine = [row for row in range(15) if row not in broken]
    mine = part(vocab)
    carrying = ("logps", "logsumexp", "entropy")
    for with_reference in (False, True):
        names = oracle.STATS if with_reference else [n for n in oracle.STATS if n not in oracle.WITH_REFERENCE]

        def run(x: Tensor, ref: Tensor, how: dict, names=names, with_reference=with_reference):
            leaf = x.clone().requires_grad_()
            stats = token_stats(leaf, labels, reference_logits=ref if with_reference else None, outputs=names, **how)
            torch.autograd.backward([getattr(stats, name) for name in carrying], [torch.ones(15).to(ref)] * 3)
            only = x.clone().requires_grad_()
            token_logps(only, labels, **how).sum().backward()
            return stats, leaf.grad, only.grad

        want, *want_gradients = run(logits.double(), reference.double(), TRUTH)
        how = {"backend": backend, "tp_group": world()}
        got, *gradients = run(logits[:, mine].contiguous(), reference[:, mine].contiguous(), how)
        for name in names:
            rows_ = fine if name in oracle.WITH_REFERENCE else slice(None)  # the broken rows are the policy's
            assert_row_output(name, getattr(got, name)[rows_], getattr(want, name)[rows_].double(), torch.float32, 20.0)
        assert got.logps[broken].isnan().all() and got.logps[fine].isfinite().sum() == len(fine) - 1
        for gradient, expected in zip(gradients, want_gradients, strict=True):
            assert gradient[broken].isnan().all()
            for row in fine:
                scale = float(expected[row].nan_to_num().abs().max())
                assert_within(gradient[row], expected[row, mine], 2e-5 * scale, f"gradient of row {row}")
        # 1 - p of the certain rows is 1e-12: it has its digits, and a sum that contained the 1 would have lost it.
        assert 0 < -float(got.logps[6]) < 1e-10
        if with_reference:
            assert got.kl_reference_policy[5] == 0 and got.kl_policy_reference[5] == 0
            assert got.kl_reference_policy[[0, 1]].isinf().all() and got.kl_policy_reference[14].isfinite()


def losses_from_logits(loss_type: Any, packed: bool, reference: str, kwargs: dict, options: dict) -> None:
    """`fused_token_dpo` of the parts equals that of the whole: loss, rewards, gradients."""
    batch = make_pairs(2, 9, 31, torch.float32)
    compare_losses(pack(batch) if packed else batch, loss_type, reference, kwargs, options, tp_group=world())


def _references(batch: PairBatch, reference: str, columns: slice, rows_: Callable[[Tensor], Tensor]) -> dict:
    """The arguments of one kind of reference, for the whole batch or a part of it."""
    if reference == "live":
        return {"reference_logits": rows_(batch.reference)[..., columns].contiguous()}
    if reference == "token":
        return {"reference_logps": rows_(-3 + normal(*batch.labels.shape))}
    if reference == "sequence":
        count = batch.labels.shape[0] if batch.cu_seqlens is None else len(batch.cu_seqlens) - 1
        return {"reference_logps": -20 + normal(count)}
    return {"reference_logps": 0.0}


def compare_losses(
    batch: PairBatch, loss_type: Any, reference: str, kwargs: dict, options: dict, tp_group=None, sp_group=None
) -> None:
    """One loss on this rank's columns and positions, against the whole in float64."""
    vocab = batch.logits.shape[-1]
    columns = slice(0, vocab) if tp_group is None else part(vocab, tp_group)
    where, ends = _positions(batch, sp_group)
    weights = 0.5 + normal(*batch.labels.shape).abs()
    if options.pop("token_weights", False):
        weights[..., 1] = 0.0
    else:
        weights = None
    how = {"loss_type": loss_type, "beta": 0.3, "loss_kwargs": kwargs or None, **options}
    whole = batch.logits.double().requires_grad_()
    exact = PairBatch(whole, batch.labels, batch.reference.double(), batch.cu_seqlens)
    references = _references(exact, reference, slice(0, vocab), lambda x: x)
    references = {k: v.double() if isinstance(v, Tensor) else v for k, v in references.items()}
    want = fused_token_dpo(
        whole, batch.labels, token_weights=weights, cu_seqlens=batch.cu_seqlens, **references, **how, **TRUTH
    )
    leaf = where(batch.logits)[..., columns].contiguous().requires_grad_()
    got = fused_token_dpo(
        leaf, where(batch.labels), token_weights=None if weights is None else where(weights), cu_seqlens=ends,
        **_references(batch, reference, columns, where), **how, tp_group=tp_group, sp_group=sp_group,
    )  # fmt: skip
    upstream = torch.linspace(0.5, 2.0, want.loss.numel()).view(want.loss.shape)
    want.loss.backward(upstream.double())
    got.loss.backward(upstream)
    compare_outputs(got, want, where)
    assert leaf.grad is not None and whole.grad is not None
    relative(leaf.grad, where(whole.grad)[..., columns], 1e-5, f"gradient of {loss_type}", whole.grad)


def compare_outputs(got: Any, want: Any, where: Callable[[Tensor], Tensor], allowed: float = 3e-6) -> None:
    """Loss and rewards are the whole's, per-token results this rank's part of the whole's."""
    for name, value in want._asdict().items():
        actual = getattr(got, name)
        if value is None:
            assert actual is None, name
            continue
        expected = where(value.detach()) if name.startswith(("token", "reference", "logsumexp")) else value.detach()
        assert_within(actual, expected, allowed * (1 + expected.abs()), name)


def _positions(batch: PairBatch, group: Any) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """This rank's positions of a per-row tensor, and their cu_seqlens if the batch is packed."""
    if group is None:
        return (lambda x: x), batch.cu_seqlens
    if batch.cu_seqlens is None:
        mine = part(batch.labels.shape[1], group)
        return (lambda x: x[:, mine].contiguous()), None
    spans = [torch.arange(a, b) for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)]
    own = [span[part(len(span), group)] for span in spans]
    ends = torch.tensor([0, *(len(span) for span in own)]).cumsum(0).int()
    return (lambda x: x[torch.cat(own)].contiguous()), ends


# --- the vocabulary, from hidden states ------------------------------------------------------------------------------


def make_head(dtype: torch.dtype, vocab: int = 29, size: int = 12, pairs: int = 3, length: int = 7) -> dict:
    """Hidden states of a batch, a head with bias and a reference's, all of `dtype`."""
    batch = make_pairs(pairs, length, vocab, torch.float32)
    shape = (2 * pairs, length, size)
    tensors = {
        "hidden": normal(*shape),
        "weight": 0.5 * normal(vocab, size),
        "bias": 0.3 * normal(vocab),
        "reference_hidden": normal(*shape, key=(1,)),
        "reference_weight": 0.5 * normal(vocab, size, key=(1,)),
        "reference_bias": 0.3 * normal(vocab, key=(1,)),
    }
    return {"labels": batch.labels, **{name: value.to(dtype) for name, value in tensors.items()}}


OF_VOCAB = ("weight", "bias", "reference_weight", "reference_bias")


def losses_from_hidden(dtype: torch.dtype, plan: str, options: dict, loss: dict, live: bool, chunks: bool) -> None:
    """`fused_linear_token_dpo` on rows of the head equals that on the whole head, under each plan."""
    head = make_head(dtype)
    compare_head_losses(head, dtype, plan, options, loss, live, chunks, tp_group=world())


def compare_head_losses(
    head: dict, dtype: torch.dtype, plan: str, options: dict, loss: dict, live: bool, chunks: bool,
    tp_group: Any = None, sp_group: Any = None, device: str = "cpu",
) -> None:  # fmt: skip
    """One loss on this rank's rows of the head and positions of the batch, against the whole in float64."""
    vocab = head["weight"].shape[0]
    mine = slice(0, vocab) if tp_group is None else part(vocab, tp_group)
    positions = slice(None) if sp_group is None else part(head["labels"].shape[1], sp_group)
    trained = ("hidden",) if plan == "frozen_head" else ("hidden", "weight", "bias")

    def run(take: Callable[[str, Tensor], Tensor], convert: Callable[[Tensor], Tensor], **how):
        tensors = {name: take(name, value) for name, value in head.items()}
        tensors = {name: convert(x) if x.is_floating_point() else x for name, x in tensors.items()}
        for name in trained:
            tensors[name] = tensors[name].detach().clone().requires_grad_()
        reference = {name: tensors[name] for name in tensors if name.startswith("reference_")} if live else {}
        if not live:
            reference = {"reference_logps": 0.0}
        keywords = {"lm_head_bias": tensors["bias"], **reference, "beta": 0.3, **options, **loss, **how}
        args = (tensors["hidden"], tensors["weight"], tensors["labels"])
        if chunks and "tp_group" in how:  # room for the largest pair, 14 rows
            whole = plan_linear(*args, **keywords)
            keywords["max_chunk_bytes"] = 15 * whole.chunk_bytes // whole.chunk_rows
        out = fused_linear_token_dpo(*args, **keywords)
        out.loss.backward(torch.full_like(out.loss, 1.5))
        return out, {name: tensors[name].grad for name in trained}

    def own(name: str, value: Tensor) -> Tensor:
        if name in OF_VOCAB:
            return value[mine]
        return value[:, positions].contiguous()

    want, gradients = run(lambda _, x: x, lambda x: x.double(), **TRUTH)
    got, actual = run(
        lambda name, x: own(name, x).to(device), lambda x: x, plan=plan, tp_group=tp_group, sp_group=sp_group
    )
    assert got.plan.name == plan and (got.plan.chunks > 1) == chunks, got.plan
    compare_outputs(got, want, lambda x: x[:, positions], {torch.bfloat16: 2e-5}.get(dtype, 3e-6))
    for name in trained:
        gradient = actual[name]
        if sp_group is not None and name != "hidden":
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=sp_group)
        relative(gradient, own(name, gradients[name]), tolerance(dtype), f"gradient of {name}", gradients[name])


def head_on_gpu(dtype: torch.dtype, plan: str) -> None:
    """The same with tensors on a GPU each."""
    device = f"cuda:{dist.get_rank()}"
    compare_head_losses(make_head(dtype), dtype, plan, {}, {}, True, True, tp_group=world(), device=device)


def sent(call: Callable[[], Any]) -> list[int]:
    """Bytes of each message that a call sends."""
    sizes: list[int] = []
    names = ("all_reduce", "all_gather")
    real = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def send(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            sizes.append(tensor.numel() * tensor.element_size())
            return real[name](*args, **kwargs)

        return send

    for name in names:
        setattr(dist, name, counting(name))
    try:
        call()
    finally:
        for name in names:
            setattr(dist, name, real[name])
    return sizes


def messages() -> dict[str, list[int]]:
    """What each kind of call sends, forward and backward apart; 36 of 42 rows are valid."""
    head = make_head(torch.float32)
    valid = int((head["labels"] != IGNORE).sum())
    mine, positions = part(29), part(7)
    found: dict[str, list[int]] = {"valid": [valid]}
    logits = (head["hidden"] @ head["weight"].t()).detach()

    def count(name: str, call: Callable[[], Any]) -> None:
        loss: list[Tensor] = []
        found[name] = sent(lambda: loss.append(call()))
        found[name + ", backward"] = sent(lambda: loss[0].backward())

    for plan in ("frozen_head", "pair_chunks", "recompute"):
        weight = head["weight"][mine].clone().requires_grad_(plan != "frozen_head")
        hidden = head["hidden"].clone().requires_grad_()
        count(plan, lambda w=weight, h=hidden, p=plan: fused_linear_token_dpo(
            h, w, head["labels"], reference_logps=0.0, plan=p, tp_group=world()
        ).loss)  # fmt: skip
    columns = logits[..., mine].contiguous().requires_grad_()
    count("logits", lambda: token_logps(columns, head["labels"], tp_group=world()).sum())
    local = logits[:, positions].contiguous().requires_grad_()
    labels = head["labels"][:, positions].contiguous()
    count("positions", lambda: fused_token_dpo(local, labels, reference_logps=0.0, sp_group=world()).loss)
    alone = logits.clone().requires_grad_()
    count("one process", lambda: fused_token_dpo(alone, head["labels"], reference_logps=0.0).loss)
    return found


def example(code: str) -> None:
    """A block of the documentation."""
    exec(compile(code, "docs/scaling.md", "exec"), {"__name__": "__main__"})


def stats_from_hidden(dtype: torch.dtype, chunks: bool) -> None:
    """`linear_token_stats` on rows of the head: every output, and the gradient of all that have one."""
    head = make_head(dtype)
    mine = part(head["weight"].shape[0])
    upstream = {name: normal(*head["labels"].shape, key=(i,)) for i, name in enumerate(oracle.WITH_GRADIENT)}

    def run(tensors: dict, **how):
        tensors = dict(tensors)
        for name in ("hidden", "weight", "bias"):
            tensors[name] = tensors[name].detach().clone().requires_grad_()
        stats = linear_token_stats(
            **tensors, outputs=oracle.STATS, temperature=0.9, softcap=6.0, logit_scale=1.3, **how
        )
        torch.autograd.backward(
            [getattr(stats, name) for name in upstream],
            [g.to(stats.logps.dtype) for g in upstream.values()],
        )
        return stats, {name: tensors[name].grad for name in ("hidden", "weight", "bias")}

    exact = {name: x.double() if x.is_floating_point() else x for name, x in head.items()}
    want, gradients = run(exact, **TRUTH)
    local = {name: x[mine] if name in OF_VOCAB else x for name, x in head.items()}
    small = {"max_chunk_bytes": 24 * 20 * head["weight"].shape[0]} if chunks else {}
    got, actual = run(local, tp_group=world(), **small)
    for name in oracle.STATS:
        expected = getattr(want, name)
        if name == "is_top1":
            assert torch.equal(got.is_top1, expected)
        else:
            allowed = 1e-12 if dtype == torch.float64 else 5e-6
            assert_within(getattr(got, name), expected, allowed * (1 + expected.abs()), name)
    for name, gradient in actual.items():
        expected = gradients[name][mine] if name in OF_VOCAB else gradients[name]
        relative(gradient, expected, tolerance(dtype), f"gradient of {name}")


# --- DTensor ---------------------------------------------------------------------------------------------------------


def weight_is_dtensor(uneven: bool, named: bool) -> None:
    """A head sharded over a mesh gives the whole head's results, and gets its gradient as such a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    head = make_head(torch.float32, vocab=27 if uneven else 28)
    weight = distribute_tensor(head["weight"], mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(head["bias"], mesh, [Shard(0)]).requires_grad_()
    hidden = distribute_tensor(head["hidden"], mesh, [Replicate()]).requires_grad_()
    reference = distribute_tensor(head["reference_weight"], mesh, [Shard(0)])
    more = {"tp_group": mesh} if named else {}
    out = fused_linear_token_dpo(
        hidden, weight, head["labels"], lm_head_bias=bias, reference_hidden=head["reference_hidden"],
        reference_weight=reference, **more,
    )  # fmt: skip
    out.loss.backward()
    whole = {name: head[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    want = fused_linear_token_dpo(
        whole["hidden"], whole["weight"], head["labels"], lm_head_bias=whole["bias"],
        reference_hidden=head["reference_hidden"], reference_weight=head["reference_weight"],
    )  # fmt: skip
    want.loss.backward()
    compare_outputs(out, want, lambda x: x)
    for leaf, name in ((weight, "weight"), (bias, "bias"), (hidden, "hidden")):
        assert isinstance(leaf.grad, DTensor) and leaf.grad.placements == leaf.placements
        relative(leaf.grad.full_tensor(), whole[name].grad, 3e-6, f"gradient of {name}")
    # Logits split over the vocabulary, as ColwiseParallel leaves them, imply their group too.
    logits = (head["hidden"] @ head["weight"].t()).requires_grad_()
    split = distribute_tensor(logits.detach(), mesh, [Shard(2)]).requires_grad_()
    token_logps(logits, head["labels"]).sum().backward()
    token_logps(split, head["labels"]).sum().backward()
    # torch 2.11 gathers the gradient of a leaf with uneven parts, because it takes another stride for the whole's.
    placements = {(Shard(2),), (Replicate(),)} if torch.__version__ < "2.13" else {(Shard(2),)}
    assert isinstance(split.grad, DTensor) and split.grad.placements in placements
    relative(split.grad.full_tensor(), logits.grad, 1e-5, "gradient of split logits")
    # Whole on every rank: one process' results.
    everywhere = distribute_tensor(head["weight"], mesh, [Replicate()])
    same = linear_token_logps(head["hidden"], everywhere, head["labels"])
    assert torch.equal(same, linear_token_logps(head["hidden"], head["weight"], head["labels"]))


def dtensors_that_cannot_be_used() -> dict[str, str]:
    """What is said of each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    plane = init_device_mesh("cpu", (2, ranks // 2))
    head = make_head(torch.float32, vocab=28)
    weight, hidden, labels = head["weight"], head["hidden"], head["labels"]

    def said(hidden: Tensor, weight: Tensor, **how) -> str:
        try:
            linear_token_logps(hidden, weight, labels, **how)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    found = {
        "other dimension": said(hidden, distribute_tensor(weight, mesh, [Shard(1)])),
        "two dimensions": said(hidden, distribute_tensor(weight, plane, [Shard(0), Replicate()])),
        "hidden": said(distribute_tensor(hidden, mesh, [Shard(2)]), weight),
        "whole": said(hidden, distribute_tensor(weight, mesh, [Replicate()]), tp_group=world()),
        "another group": said(hidden, sharded, tp_group=plane.get_group(0)),
    }
    labels = torch.where(labels == IGNORE, IGNORE, (labels + dist.get_rank()) % 28)
    return {**found, "data of its own": said(hidden + dist.get_rank(), sharded)}


# --- positions -------------------------------------------------------------------------------------------------------


def losses_of_positions(loss_type: Any, packed: bool, reference: str, kwargs: dict, options: dict) -> None:
    """`fused_token_dpo` with the positions of each sequence spread over ranks equals that of whole sequences."""
    batch = make_pairs(2, 11, 23, torch.float32)
    compare_losses(pack(batch) if packed else batch, loss_type, reference, kwargs, options, sp_group=world())


def head_losses_of_positions(dtype: torch.dtype, plan: str, loss: dict, live: bool) -> None:
    """The same from hidden states; the head's gradient is the sum over the ranks."""
    head = make_head(dtype, length=11)
    compare_head_losses(head, dtype, plan, {}, loss, live, False, sp_group=world())


def both_groups(rows_: int) -> None:
    """Vocabulary and positions split at once, over the columns and rows of a grid of ranks."""
    grid = torch.arange(dist.get_world_size()).view(rows_, -1)
    # Every rank makes every group, in the same order.
    tp_groups = [dist.new_group(line.tolist()) for line in grid]
    sp_groups = [dist.new_group(line.tolist()) for line in grid.t()]
    row, column = divmod(dist.get_rank(), grid.shape[1])
    groups = {"tp_group": tp_groups[row], "sp_group": sp_groups[column]}
    head = make_head(torch.float32, length=11)
    compare_head_losses(
        head, torch.float32, "recompute", {"softcap": 4.0}, {"loss_type": "tdpo1"}, True, False, **groups
    )
    compare_head_losses(head, torch.float32, "frozen_head", {}, {"loss_type": "ipo"}, False, False, **groups)
    batch = make_pairs(2, 11, 23, torch.float32)
    compare_losses(batch, "sigmoid", "live", {"ld_alpha": 0.5}, {}, **groups)
    compare_losses(pack(batch), "sigmoid_norm", "token", {}, {}, **groups)
    # An error on one rank reaches all of them, also those that share no group with it.
    heard = caught(lambda: fused_token_dpo(
        batch.logits[..., part(23, groups["tp_group"])].contiguous(), batch.labels, reference_logps=0.0,
        beta=-1.0 if dist.get_rank() == 0 else 0.1, **groups,
    ))  # fmt: skip
    assert ("beta" in heard) and (heard.startswith("ValueError") == (dist.get_rank() == 0)), heard


def numbers_known_beforehand(how: str) -> None:
    """`valid_rows` changes nothing in a split vocabulary, nor with split positions (numbers of the rank's own rows)."""
    head, group = make_head(torch.float32, length=11), {f"{how}_group": world()}
    mine, positions = slice(None), slice(None)
    if how == "tp":
        mine = part(head["weight"].shape[0])
    else:
        positions = part(11)
    used = head["labels"] != IGNORE
    total = used.sum(1)
    shared = torch.minimum(total[:3], total[3:]).repeat(2).unsqueeze(1)
    for kwargs, rows_ in ((None, used), ({"ld_alpha": 0.0}, used & (used.cumsum(1) <= shared))):
        for plan in ("frozen_head", "recompute") + (("pair_chunks",) if how == "tp" else ()):
            found = []
            numbers = rows_[:, positions].sum(1).tolist()
            for valid_rows in (None, numbers):
                hidden = head["hidden"][:, positions].contiguous().requires_grad_()
                weight = head["weight"][mine].clone().requires_grad_(plan != "frozen_head")
                out = fused_linear_token_dpo(
                    hidden, weight, head["labels"][:, positions].contiguous(), reference_logps=0.0, plan=plan,
                    loss_kwargs=kwargs, valid_rows=valid_rows, **group,
                )  # fmt: skip
                out.loss.backward()
                assert out.loss.isfinite()
                found.append([out.loss, out.token_logps, hidden.grad, *([weight.grad] * weight.requires_grad)])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (kwargs, plan)
    if how == "sp":  # nobody can raise after the ranks have agreed: all get NaN
        numbers[0] += dist.get_rank() == 0
        out = fused_linear_token_dpo(
            hidden, weight, head["labels"][:, positions].contiguous(), reference_logps=0.0, loss_kwargs=kwargs,
            valid_rows=numbers, **group,
        )  # fmt: skip
        assert out.loss.isnan()


# --- data parallelism: the loss inside the model ----------------------------------------------------------------------


class PreferenceModel(nn.Module):
    """A model that ends in its loss: whoever wraps it has gathered the head by then, and sees the gradients."""

    def __init__(self, how: str = "inside"):
        super().__init__()
        self.how = how
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 19, bias=False)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * normal(*parameter.shape, key=(i,)))

    def forward(self, features: Tensor, labels: Tensor) -> Any:
        hidden = torch.tanh(self.body(features))
        if self.how == "unshard":  # a head that is wrapped on its own
            self.head.unshard()
        return fused_linear_token_dpo(hidden, self.head.weight, labels, reference_logps=0.0, beta=0.5)


def _pairs_of(features: Tensor, labels: Tensor, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's pairs of a batch: the chosen sequences and the rejected ones of the same numbers."""
    pairs = torch.arange(len(labels)).view(2, -1)[:, rank::ranks].reshape(-1)
    return features[pairs], labels[pairs]


def _same_gradients(model: nn.Module, expected: nn.Module, what: str) -> None:
    for (name, parameter), truth in zip(model.named_parameters(), expected.parameters(), strict=True):
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        relative(gradient, truth.grad, 1e-5, f"{what}: gradient of {name}")


def sharded_model(how: str) -> None:
    """FSDP2 and DDP around a model that ends in its loss: the gradients are those of all pairs in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    rank, ranks = dist.get_rank(), dist.get_world_size()
    labels = make_pairs(ranks, 6, 19, torch.float32).labels
    features = normal(2 * ranks, 6, 8)
    expected = PreferenceModel()
    want = expected(features, labels)
    want.loss.backward()
    model = PreferenceModel(how)
    if how == "with tp":  # 2 groups of data, 2 parts of the vocabulary
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight, mesh["tp"], [Shard(0)]))
        fully_shard(model, mesh=mesh["dp"])
        part_of, parts = rank // 2, ranks // 2
    else:
        mesh = init_device_mesh("cpu", (ranks,))
        part_of, parts = rank, ranks
    mine = _pairs_of(features, labels, part_of, parts)
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
        out = wrapped(*mine)
    elif how == "outside":  # the loss outside of the model: gathered by hand, and the sum over ranks made a mean
        fully_shard(model.body, mesh=mesh)
        fully_shard(model.head, mesh=mesh)
        hidden = torch.tanh(model.body(mine[0]))
        weight = model.head.weight.full_tensor(grad_placements=[Partial()])
        out = fused_linear_token_dpo(hidden, weight, mine[1], reference_logps=0.0, beta=0.5)
    else:
        if how == "unshard":
            fully_shard(model.head, mesh=mesh)
        if how != "with tp":
            fully_shard(model, mesh=mesh)
        out = model(*mine)
    out.loss.backward()
    if how == "outside":
        assert isinstance(model.head.weight.grad, DTensor)
        model.head.weight.grad /= ranks
    _same_gradients(model, expected, how)
    losses = out.loss.detach().clone()
    dist.all_reduce(losses)
    assert_within(losses / ranks, want.loss, 1e-6, "mean of the losses")


def compiled() -> dict[str, str]:
    """Inside torch.compile a call with a group is a break of the graph, and an error where there may be none."""
    batch = make_pairs(2, 6, 21, torch.float32)
    logits = batch.logits[..., part(21)].contiguous().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return fused_token_dpo(x.tanh(), batch.labels, reference_logps=0.0, tp_group=world()).loss.exp()

    want = loss(logits)
    (expected,) = torch.autograd.grad(want, logits)
    got = torch.compile(loss, backend="eager")(logits)
    (gradient,) = torch.autograd.grad(got, logits)
    assert torch.equal(got, want) and torch.equal(gradient, expected)
    torch._dynamo.reset()
    return {"fullgraph": caught(lambda: torch.compile(loss, backend="eager", fullgraph=True)(logits))}


# --- errors ----------------------------------------------------------------------------------------------------------


def caught(call: Callable[[], Any]) -> str:
    """Name and text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def wrong_calls(case: str) -> str:
    """One kind of mistake; what each rank hears of it. A right call afterwards finds the ranks in step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch = make_pairs(2, 6, 21, torch.float32)
    mine = part(21)
    logits, labels, head = batch.logits[..., mine].contiguous(), batch.labels, make_head(torch.float32, vocab=21)
    weight = head["weight"][mine]
    last = rank == ranks - 1

    def dpo(logits: Any = logits, labels: Any = labels, **how) -> Any:
        return fused_token_dpo(logits, labels, **{"reference_logps": 0.0, "tp_group": world(), **how})

    def linear(weight: Any = weight, hidden: Any = head["hidden"], labels: Any = head["labels"], **how) -> Any:
        return linear_token_logps(hidden, weight, labels, **{"tp_group": world(), **how})

    if case == "shapes":
        text = caught(lambda: dpo(logits[:, : 6 - rank].contiguous(), labels[:, : 6 - rank].contiguous()))
    elif case == "labels":
        text = caught(lambda: dpo(labels=(labels + (last and labels > 0)).clamp_max(20)))
    elif case == "own error":
        text = caught(lambda: dpo(labels=labels.float() if last else labels))
    elif case == "options":
        text = caught(lambda: dpo(temperature=1.0 + rank))
    elif case == "weights":
        text = caught(lambda: dpo(token_weights=torch.full(labels.shape, 1.0 + rank)))
    elif case == "shape of weights":  # the same numbers, so the checksum is the same
        ones = torch.ones(labels.shape)
        text = caught(lambda: dpo(token_weights=ones.reshape(-1) if last else ones))
    elif case == "weights with a gradient":
        text = caught(lambda: dpo(token_weights=torch.ones(4, 6, requires_grad=last)))
    elif case == "constant reference":
        text = caught(lambda: dpo(reference_logps=0.5 * rank))
    elif case == "constant kl":
        text = caught(lambda: fused_sequence_loss(
            logits, labels, labels[:, 0] > 0, reference_logps=0.0, kl=0.5 * rank, tp_group=world(),
        ))  # fmt: skip
    elif case == "functions":
        text = caught(lambda: dpo() if last else token_logps(logits, labels, tp_group=world()))
    elif case == "requires_grad":
        text = caught(lambda: linear(hidden=head["hidden"].clone().requires_grad_(not last)))
    elif case == "hidden size":
        text = caught(lambda: linear(weight[:, : 12 - rank], head["hidden"][..., : 12 - rank].contiguous()))
    elif case == "label beyond":
        text = caught(lambda: linear(labels=head["labels"].masked_fill(head["labels"] == 20, 21)))
    elif case == "label beyond, from logits":
        text = caught(lambda: dpo(labels=labels.masked_fill(labels == 20, 21)))
    elif case == "uncovered":  # the last columns were forgotten
        text = caught(lambda: linear(weight[:-1] if last else weight))
    elif case == "no columns":
        text = caught(lambda: linear(weight[:0] if last else weight))
    elif case == "sequences":
        half = slice(None) if last else [0, 2]
        text = caught(lambda: dpo(logits=batch.logits[half], labels=labels[half], tp_group=None, sp_group=world()))
    elif case == "loss":
        text = caught(lambda: dpo(
            logits=batch.logits, tp_group=None, sp_group=world(), loss_type="ipo" if last else "sigmoid",
        ))  # fmt: skip
    elif case == "label of one position":
        text = caught(lambda: dpo(
            logits=batch.logits, labels=labels.masked_fill(labels == 20, 99) if last else labels, tp_group=None,
            sp_group=world(),
        ))  # fmt: skip
    elif case == "numbers":
        text = caught(lambda: linear(valid_rows=int((head["labels"] != IGNORE).sum()) - last))
    elif case == "wrong numbers":
        text = caught(lambda: linear(valid_rows=1))
    elif case == "numbers of one position":
        numbers = (head["labels"] != IGNORE).sum(1) + torch.tensor([0, 0, -1, 1, 0, 0]) * last
        text = caught(lambda: fused_linear_token_dpo(
            head["hidden"], head["weight"], head["labels"], reference_logps=0.0, valid_rows=numbers, sp_group=world(),
        ))  # fmt: skip
    elif case == "reference of one position":
        wrong = torch.zeros(3 if last else 4)
        text = caught(lambda: dpo(logits=batch.logits, reference_logps=wrong, tp_group=None, sp_group=world()))
    else:
        raise ValueError(case)
    rows_of_logits(torch.float32, "auto", 13)
    return text


def wrong_groups() -> dict[str, str]:
    """Groups that cannot be used; nothing is sent."""
    logits, labels = normal(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    others = dist.new_group([0])
    grid = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(), 1))
    meta = torch.empty(2, 3, 5, device="meta")
    of_gpus = dist.new_group(backend="cuda:gloo")
    return {
        "type": caught(lambda: token_logps(logits, labels, tp_group="tp")),
        "mesh": caught(lambda: token_logps(logits, labels, tp_group=grid)),
        "member": caught(lambda: token_logps(logits, labels, tp_group=others)) if dist.get_rank() else "",
        "backend": caught(lambda: token_logps(logits, labels, tp_group=of_gpus)),
        "alone": caught(lambda: token_logps(logits, labels, tp_group=others)) if dist.get_rank() == 0 else "",
        "device": caught(
            lambda: token_logps(meta, torch.zeros(2, 3, dtype=torch.int64, device="meta"), tp_group=world())
        ),
    }


def unit_losses_of_positions(how: str) -> None:
    """Policy losses and KTO with the positions of each sequence spread over ranks: values, metrics and gradients of
    one process; what would need the tokens of all ranks is refused, and an error of one rank is raised on all."""
    made = make_head(torch.float32, length=11)
    hidden, weight, labels = (made[name].detach() for name in ("hidden", "weight", "labels"))
    number, where = hidden.shape[0], part(labels.shape[1])
    advantages = torch.linspace(-1.0, 1.3, number)
    own = qkernels.linear_token_logps(hidden, weight, labels)
    old = own + 0.3 * torch.sin(torch.arange(own.numel())).view_as(own)
    whole: dict[str, Any] = {"labels": labels, "old_logps": old, "sampling_logps": old - 0.1, "reference_logps": old}
    how, _, plan = how.partition(", ")
    kinds: dict[str, dict[str, Any]] = {
        "dapo": {"loss_type": "dapo", "entropy_coef": 0.1, "beta": 0.2, "importance_correction": "sequence_truncate"},
        "grpo": {"loss_type": "grpo", "off_policy_threshold": 0.01},
        "high entropy": {"loss_type": "grpo", "entropy_coef": 0.2, "loss_kwargs": {"entropy_quantile": 0.4}},
        "gspo": {"loss_type": "gspo", "epsilon": 1e-3},
        "vespo": {"loss_type": "vespo"},
        "kto": {"loss_type": "kto", "kl": 0.1},
        "logits": {"loss_type": "rloo", "beta": 0.1},
    }
    options = dict(kinds[how])
    if "off_policy_threshold" in options:
        options["loss_kwargs"] = {"off_policy_threshold": options.pop("off_policy_threshold")}
    reads = {
        "dapo": set(whole),
        "logits": {"labels", "old_logps", "reference_logps"},
        "kto": {"labels", "reference_logps"},
    }
    named = reads.get(how, {"labels", "old_logps"})

    def call(take: Callable[[Tensor], Tensor], group: Any, **more: Any) -> tuple[Any, list[Tensor | None]]:
        leaves = take(hidden).clone().requires_grad_(), weight.clone().requires_grad_(plan != "frozen_head")
        tensors = {name: take(value).contiguous() for name, value in whole.items() if name in named}
        keywords = {**tensors, **options, "sp_group": group, **more}
        if how == "logits":
            out = qkernels.fused_policy_loss(leaves[0] @ leaves[1].t(), advantages=advantages, **keywords)
        elif how == "kto":
            out = qkernels.fused_linear_sequence_loss(*leaves, desirable=advantages > 0, **keywords)
        else:
            out = qkernels.fused_linear_policy_loss(*leaves, **{"advantages": advantages, **keywords})
        out.loss.backward()
        return out, [leaf.grad for leaf in leaves]

    want, (want_hidden, want_weight) = call(lambda value: value, None)
    got, (got_hidden, got_weight) = call(lambda value: value[:, where], world())
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.token_logps, want.token_logps[:, where], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_hidden, want_hidden[:, where], rtol=1e-4, atol=1e-6)
    if want_weight is not None:
        dist.all_reduce(got_weight)
        torch.testing.assert_close(got_weight, want_weight, rtol=1e-4, atol=1e-6)
    if how == "kto":
        torch.testing.assert_close(got.rewards, want.rewards, rtol=1e-5, atol=1e-5)
        return
    for name, value in want.metrics._asdict().items():
        mine = getattr(got.metrics, name)
        if value is None or (name == "idle_rows" and mine is None):
            continue
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    if how != "grpo":
        return
    assert got.plan.name == "recompute" and "sp_group" in got.plan.reason
    wrong = advantages[:1] if dist.get_rank() else advantages
    with pytest.raises((ValueError, RuntimeError), match="advantages must have shape"):
        call(lambda value: value[:, where], world(), advantages=wrong)


def entropy_of_other_sequences() -> None:
    """Each of two ranks has sequences of its own, as under DDP, one of them perhaps no valid token; the tokens of the
    highest entropy are those of one process with all sequences."""
    made = make_head(torch.float32, length=11)
    hidden, weight, all_labels = (made[name].detach() for name in ("hidden", "weight", "labels"))
    advantages = torch.linspace(-1.0, 1.3, hidden.shape[0])
    where = slice(1) if dist.get_rank() == 0 else slice(1, None)

    def call(where: slice, labels: Tensor, **own: Any) -> tuple[Tensor, Tensor]:
        x = hidden[where].clone().requires_grad_()
        out = qkernels.fused_linear_policy_loss(
            x, weight, labels[where].contiguous(), advantages=advantages[where], loss_type="grpo", on_policy=True,
            reduction="none", loss_kwargs={"entropy_quantile": 0.4, **own},
        )  # fmt: skip
        out.loss.sum().backward()
        return out.loss.detach(), x.grad

    idle = all_labels.clone()
    idle[1:] = -100
    for labels in (all_labels, idle):
        want, want_grad = call(slice(None), labels)
        got, got_grad = call(where, labels, entropy_group=world())
        number = int((labels != -100).sum())
        assert abs(int((want_grad != 0).any(-1).sum()) - 0.4 * number) < 2
        torch.testing.assert_close(got, want[where], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_grad, want_grad[where], rtol=1e-4, atol=1e-6)


def unit_losses(how: str) -> None:
    """Policy losses and KTO with a split vocabulary: values, gradients and idle rows of one process; advantages that
    differ are an error on every rank."""
    made = make_head(torch.float32)
    hidden, weight, labels = (made[name].detach() for name in ("hidden", "weight", "labels"))
    columns, number = part(weight.shape[0]), hidden.shape[0]
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, -0.3])[:number]
    old = torch.nn.functional.pad(torch.zeros_like(labels[:, 1:], dtype=torch.float32), (0, 1)) - 3.0
    policy = {"advantages": advantages, "old_logps": old, "loss_type": "gspo" if how == "gspo" else "grpo"}

    def call(weight: Tensor, group: Any, **more: Any) -> tuple[Any, list[Tensor | None]]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_("frozen" not in how)
        if how == "logits":
            out = qkernels.fused_policy_loss(leaves[0] @ leaves[1].t(), labels, tp_group=group, **{**policy, **more})
        elif how == "kto":
            wanted = torch.arange(number) % 2 == 0
            out = qkernels.fused_linear_sequence_loss(
                *leaves, labels, wanted, reference_logps=old, kl=0.1, tp_group=group, **more
            )
        else:
            out = qkernels.fused_linear_policy_loss(*leaves, labels, tp_group=group, **{**policy, **more})
        out.loss.backward()
        return out, [leaf.grad for leaf in leaves]

    want, (want_hidden, want_weight) = call(weight, None)
    got, (got_hidden, got_weight) = call(weight[columns], world())
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.token_logps, want.token_logps, rtol=1e-5, atol=1e-5)
    if how == "logits":  # dL/dhidden of this rank's columns is a part of the sum
        dist.all_reduce(got_hidden)
    torch.testing.assert_close(got_hidden, want_hidden, rtol=1e-4, atol=1e-6)
    if want_weight is not None:
        torch.testing.assert_close(got_weight, want_weight[columns], rtol=1e-4, atol=1e-6)
    if how in ("grpo", "gspo"):
        assert got.plan.name == want.plan.name and got.plan.idle_rows == want.plan.idle_rows > 0
    if how != "kto":
        own = advantages + dist.get_rank()
        with pytest.raises(ValueError, match="advantages"):
            call(weight[columns], world(), advantages=own)
