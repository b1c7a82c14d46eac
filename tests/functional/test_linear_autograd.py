"""Autograd of the hidden-states path: numerical checks, second backwards, autocast, checkpointing, two processes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import linear_ddp_checks
import oracle
import qkernels
from assertions import assert_head_gradient, assert_within
from cases import IGNORE, make_head_batch, normal
from linear_comparisons import (
    MODELS,
    bytes_for,
    check_head_gradients,
    check_linear_outputs,
    head_size,
    leaves,
    truth_logits,
)
from oracle import Options
from processes import Ranks
from qkernels import fused_linear_token_dpo, fused_token_dpo, linear_token_logps, linear_token_stats

EXACT = torch.float64
PLAIN = (torch.float32, torch.bfloat16)
PLANS = ("frozen_head", "pair_chunks", "recompute")


def trains(plan: str) -> str:
    return "h" if plan == "frozen_head" else "hwb"


def loss_of(backend, batch, models, **options):
    """`fused_linear_token_dpo` on these leaves, reference-free unless told otherwise."""
    options = {"reference_logps": 0.0, **options} if "reference_hidden" not in options else options
    return fused_linear_token_dpo(
        models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], backend=backend.name, **options
    )


def gradients(models) -> dict[str, torch.Tensor]:
    """The leaves' gradients, which are taken away from them."""
    found = {}
    for name, leaf in models.items():
        if leaf is not None and leaf.requires_grad:
            found[name], leaf.grad = leaf.grad, None
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], factor: float = 1.0) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], factor * b[name]) for name in a)


# --- numerical checks (float64: the reference backend) ----------------------------------------------------------------


@pytest.mark.nightly_cases(shape=({},))
@pytest.mark.parametrize("name", oracle.WITH_GRADIENT)
@pytest.mark.parametrize("shape", [{}, {"softcap": 2.0, "logit_scale": 0.7, "temperature": 1.3}], ids=["plain", "cap"])
def test_gradcheck_of_each_output(name, shape):
    batch = make_head_batch(1, 3, 3, 5, EXACT, scale=1.0)
    reference = {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight}
    reference = reference if name in oracle.WITH_REFERENCE else {}

    def run(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, batch.labels, bias=bias, outputs=(name,), max_chunk_bytes=4 * 5 * 8, **shape, **reference
        )
        return getattr(stats, name)

    inputs = tuple(t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias))
    torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.nightly_except(loss_type=("sigmoid", "tdpo1"))
@pytest.mark.nightly_cases(loss_type=("tdpo1",), plan=("pair_chunks",))
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "tdpo1", "aot", "sft"])
@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
def test_gradcheck_of_losses(loss_type, plan):
    batch = make_head_batch(2, 3, 3, 5, EXACT, scale=1.0)
    if loss_type in ("aot", "sft") and plan == "pair_chunks":
        plan = "auto"

    def run(hidden, weight, bias):
        return fused_linear_token_dpo(
            hidden, weight, batch.labels, lm_head_bias=bias, reference_hidden=batch.reference_hidden,
            reference_weight=batch.reference_weight, loss_type=loss_type, beta=0.3, plan=plan,
            max_chunk_bytes=6 * 5 * 16, backend="torch",
        ).loss  # fmt: skip

    inputs = tuple(t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias))
    torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


# --- any loss downstream, any upstream gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_logps_in_a_loss_of_ones_own(backend, dtype, frozen):
    """GRPO-like: ratios, clipping, an entropy bonus and a KL penalty, against the same in float64."""
    batch = make_head_batch(2, 5, 16, 30, dtype, backend.device)
    old, valid = (normal(4, 5) * 0.1).to(backend.device), batch.labels != IGNORE

    def objective(logps, old, valid, entropy=None, kl=None):
        ratio = torch.exp(0.1 * logps - old)
        total = -(torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * valid).sum()
        return total if entropy is None else total - (0.3 * entropy - 0.7 * kl).sum()

    names = ("logps",) if frozen else ("logps", "entropy", "kl_policy_reference")
    reference = {
        "reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight,
        "reference_bias": batch.reference_bias,
    }  # fmt: skip
    models = leaves(batch, "h" if frozen else "hwb")
    stats = linear_token_stats(
        models["hidden"], models["weight"], batch.labels, bias=models["bias"], outputs=names, backend=backend.name,
        max_chunk_bytes=bytes_for(6, batch), **({} if frozen else reference),
    )  # fmt: skip
    objective(stats.logps, old, valid, *(getattr(stats, name) for name in names[1:])).backward()

    z, z_ref = truth_logits(batch, None, 1.0)
    values = oracle.token_stats(z, batch.labels.cpu(), z_ref)
    inner = [values[name].requires_grad_() for name in names]
    slopes = torch.autograd.grad(objective(inner[0], old.cpu().double(), valid.cpu(), *inner[1:]), inner)
    upstream = dict(zip(names, slopes, strict=True))
    grad = oracle.gradient(z, batch.labels, upstream, z_ref)
    terms = oracle.gradient_terms(z, batch.labels, upstream, z_ref)
    exact = [oracle.exact(getattr(batch, name)) for name in MODELS]
    products = torch.float32 if dtype == torch.float16 and backend.device.type == "cpu" else dtype
    # The upstream gradients carry the error of the log-probs they were made of.
    size = 3 * head_size(batch)
    check_head_gradients(batch, models, oracle.head_gradient(*exact, grad, terms.size), products, size)


@pytest.mark.dtypes(*PLAIN)
def test_upstream_gradients_of_any_layout_and_value(backend, dtype):
    batch = make_head_batch(2, 5, 16, 30, dtype, backend.device)
    strided = torch.randn(5, 9, device=backend.device)[:, 1:9:2].T
    for upstream in (torch.ones(1, 1, device=backend.device).expand(4, 5), strided, 1e4 * strided, 0 * strided):
        for who in ("h", "hwb"):
            models = leaves(batch, who)
            logps = linear_token_logps(
                models["hidden"], models["weight"], batch.labels, bias=models["bias"], backend=backend.name
            )
            logps.backward(upstream)
            z, _ = truth_logits(batch, None, 1.0)
            grad = oracle.gradient(z, batch.labels, {"logps": upstream})
            terms = oracle.gradient_terms(z, batch.labels, {"logps": upstream})
            exact = [oracle.exact(getattr(batch, name)) for name in MODELS]
            truth = oracle.head_gradient(*exact, grad, terms.size)
            check_head_gradients(batch, models, truth, dtype, head_size(batch))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", ["frozen_head", "recompute"])
def test_whatever_is_upstream_of_an_ignored_row_stays_there(backend, dtype, plan):
    """exp(0 - old) of a padded row may overflow: 0 * inf must not reach the hidden states."""
    batch = make_head_batch(2, 5, 16, 30, dtype, backend.device)
    found = []
    for value in (0.0, torch.nan, torch.inf):
        models = leaves(batch, trains(plan))
        logps = linear_token_logps(
            models["hidden"], models["weight"], batch.labels, bias=models["bias"], backend=backend.name
        )
        logps.backward(torch.where(batch.labels == IGNORE, value, 1.0))
        found.append(gradients(models))
    assert all(bool(g.isfinite().all()) for g in found[0].values())
    assert same(found[1], found[0]) and same(found[2], found[0])


@pytest.mark.dtypes(torch.float16)
@pytest.mark.parametrize("plan", PLANS)
def test_loss_scaling_saves_small_gradients_of_fp16(backend, dtype, plan):
    """A gradient that is rounded to fp16 before the scaler's 65536 has been multiplied in has lost its digits."""
    batch = make_head_batch(2, 6, 16, 50, dtype, backend.device)
    models, exact = leaves(batch, trains(plan)), leaves(batch, trains(plan))
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in exact.items()}
    options = {"beta": 1e-4, "plan": plan, "reference_logps": 0.0}
    for leaves_ in (models, exact):
        out = fused_linear_token_dpo(
            leaves_["hidden"], leaves_["weight"], batch.labels, lm_head_bias=leaves_["bias"], **options,
            backend=backend.name if leaves_ is models else "torch",
        )  # fmt: skip
        (out.loss * 65536).backward()
    for name, expected in gradients(exact).items():
        error = (models[name].grad.double() - expected).norm() / expected.norm()
        assert error < 3e-4, f"gradient of the {name}: {error:.2g}"


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.usefixtures("bare_products")
def test_a_second_backward_gives_the_same_gradients(backend, dtype, plan):
    """`pair_chunks` has given its gradients away by then, and makes them anew."""
    batch = make_head_batch(3, 6, 16, 30, dtype, backend.device)
    models = leaves(batch, trains(plan))
    loss = loss_of(backend, batch, models, plan=plan, max_chunk_bytes=bytes_for(12, batch)).loss
    loss.backward(retain_graph=True)
    first = gradients(models)
    with FlopCounterMode(display=False) as flops:
        loss.backward(torch.tensor(2.0), retain_graph=True)
    assert same(gradients(models), first, 2.0)
    again = {"frozen_head": 0, "pair_chunks": 3, "recompute": 3}[plan]
    assert flops.get_total_flops() == again * 2 * batch.valid * 16 * 30
    (alone,) = torch.autograd.grad(loss, models["hidden"])
    assert torch.equal(alone, first["hidden"])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
def test_inputs_that_changed_before_a_backward_are_noticed(backend, plan):
    batch = make_head_batch(2, 6, 16, 30, torch.float32, backend.device)
    models = leaves(batch, "hwb")
    loss = loss_of(backend, batch, models, plan=plan).loss
    if plan == "pair_chunks":  # the first one needs the inputs no more
        loss.backward(retain_graph=True)
    with torch.no_grad():
        models["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("plan", PLANS)
def test_double_backward_is_refused_not_wrong(backend, plan):
    batch = make_head_batch(2, 5, 8, 20, torch.float32, backend.device)
    models = leaves(batch, trains(plan))
    loss = loss_of(backend, batch, models, plan=plan).loss
    (grad,) = torch.autograd.grad(loss, models["hidden"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.pow(2).sum().backward()


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_accumulate(backend, dtype, plan):
    """Two losses on the same leaves, and micro-batches of pairs."""
    batch = make_head_batch(2, 6, 16, 30, dtype, backend.device)
    options = {"plan": plan, "reduction": "sum"}
    both, one = leaves(batch, trains(plan)), leaves(batch, trains(plan))
    loss_of(backend, batch, both, **options).loss.backward()
    loss_of(backend, batch, both, beta=0.7, **options).loss.backward()
    loss_of(backend, batch, one, **options).loss.backward()
    first = gradients(one)
    loss_of(backend, batch, one, beta=0.7, **options).loss.backward()
    second = gradients(one)
    assert same(gradients(both), {name: first[name] + second[name] for name in first})
    for pair in (0, 1):
        rows = [pair, 2 + pair]
        micro = {**one, "hidden": one["hidden"][rows]}
        part = copy.copy(batch)
        part.labels = batch.labels[rows]
        loss_of(backend, part, micro, **options).loss.backward()
    unit = 1e-5 if dtype == torch.float32 else 2e-2
    for name, grad in gradients(one).items():
        assert_within(grad, first[name], unit * first[name].double().abs().max().cpu(), f"accumulated {name}")


@pytest.mark.parametrize("plan", PLANS)
def test_only_the_loss_requires_grad(backend, plan):
    batch = make_head_batch(2, 5, 8, 20, torch.float32, backend.device)
    models = leaves(batch, trains(plan))
    reference = batch.reference_hidden.clone().requires_grad_(), batch.reference_weight.clone().requires_grad_()
    out = loss_of(backend, batch, models, plan=plan, reference_hidden=reference[0], reference_weight=reference[1])
    assert {name for name, value in out._asdict().items() if value.requires_grad} == {"loss"}
    out.loss.backward()
    assert reference[0].grad is None and reference[1].grad is None
    frozen = leaves(batch, "")
    alone = loss_of(backend, batch, frozen, reference_hidden=reference[0], reference_weight=reference[1])
    assert not alone.loss.requires_grad and alone.plan.name == "forward_only"


def test_which_stats_require_grad(backend):
    batch = make_head_batch(2, 5, 8, 20, torch.float32, backend.device)
    for who, expected in (("h", set(oracle.WITH_GRADIENT)), ("w", set(oracle.WITH_GRADIENT)), ("", set())):
        models = leaves(batch, who)
        stats = linear_token_stats(
            models["hidden"], models["weight"], batch.labels, reference_hidden=batch.reference_hidden,
            reference_weight=batch.reference_weight, outputs=oracle.STATS, backend=backend.name,
        )  # fmt: skip
        assert {name for name, value in stats._asdict().items() if value.requires_grad} == expected


def test_the_graph_holds_no_logits(backend):
    """What is kept between forward and backward: inputs, numbers per row, and what the plan says."""
    batch = make_head_batch(2, 8, 16, 1000, torch.float32, backend.device)
    for plan in PLANS:
        models = leaves(batch, trains(plan))
        known = {t.untyped_storage().data_ptr() for t in (*models.values(), batch.labels)}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t), t)[1], lambda t: t):
            loss_of(backend, batch, models, plan=plan)
        own = sum(t.numel() for t in saved if t.untyped_storage().data_ptr() not in known)
        assert saved and own <= (32 * (16 + 10) if plan == "frozen_head" else 32 * 10), plan


def test_the_result_is_a_named_tuple_that_can_be_copied(backend):
    batch = make_head_batch(2, 5, 8, 20, torch.float32, backend.device)
    out = loss_of(backend, batch, leaves(batch, ""))
    for twin in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert twin.plan == out.plan and torch.equal(twin.loss, out.loss)
    loss, *_ = out
    assert torch.equal(loss, out.loss) and out._replace(loss=loss + 1).loss == loss + 1
    fields = torch.utils._pytree.tree_map(lambda t: t.double(), out)
    assert type(fields) is type(out) and fields.loss.dtype == torch.float64


@pytest.mark.parametrize("outputs", [("logps", "reference_logps"), ("kl_policy_reference",)])
def test_a_reference_of_inference_mode_serves_a_policy_in_training(backend, outputs):
    batch = make_head_batch(2, 5, 8, 20, torch.float32, backend.device)
    with torch.inference_mode():
        hidden, weight = batch.reference_hidden.clone(), batch.reference_weight.clone()
    found = []
    for reference in ((hidden, weight), (batch.reference_hidden, batch.reference_weight)):
        models = leaves(batch, "hw")
        stats = linear_token_stats(
            models["hidden"], models["weight"], batch.labels, reference_hidden=reference[0],
            reference_weight=reference[1], outputs=outputs, backend=backend.name,
        )  # fmt: skip
        getattr(stats, outputs[0]).sum().backward()
        for loss_type in ("sigmoid", "tdpo1", "aot"):
            loss_of(
                backend, batch, {**models, "bias": None}, loss_type=loss_type, reference_hidden=reference[0],
                reference_weight=reference[1],
            ).loss.backward()  # fmt: skip
        found.append(gradients({**models, "bias": None}))
    assert same(*found)


def test_inference_mode_takes_everything(backend):
    batch = make_head_batch(2, 5, 8, 20, torch.float32, backend.device)
    expected = loss_of(backend, batch, leaves(batch, "hwb"))
    with torch.inference_mode():
        out = loss_of(backend, batch, leaves(batch, "hwb"))
    assert out.plan.name == "forward_only" and not out.loss.requires_grad
    assert torch.equal(out.token_logps, expected.token_logps) and torch.equal(out.loss, expected.loss.detach())


# --- the head's parameter ---------------------------------------------------------------------------------------------


@pytest.mark.dtypes(torch.float32, EXACT)
@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
@pytest.mark.parametrize("chunk_rows", [None, 12])
def test_tied_embeddings(backend, dtype, plan, chunk_rows):
    """One parameter as embedding and as head: both gradients add up in it."""
    batch = make_head_batch(2, 6, 8, 20, dtype, backend.device)
    tokens = (torch.arange(24).view(4, 6) * 7 % 20).to(backend.device)
    grads = []
    for linear in (True, False):
        embedding = nn.Embedding(20, 8, device=backend.device, dtype=dtype)
        with torch.no_grad():
            embedding.weight.copy_(batch.weight)
        hidden = torch.tanh(embedding(tokens))
        if linear:
            out = fused_linear_token_dpo(
                hidden, embedding.weight, batch.labels, reference_logps=0.0, plan=plan, backend=backend.name,
                max_chunk_bytes=None if chunk_rows is None else bytes_for(chunk_rows, batch, live_reference=False),
            )  # fmt: skip
            assert chunk_rows is None or out.plan.chunks > 1
        else:
            out = fused_token_dpo(hidden @ embedding.weight.T, batch.labels, reference_logps=0.0, backend="torch")
        (3 * out.loss).backward()
        grads.append(embedding.weight.grad)
    unit = 1e-12 if dtype == EXACT else 1e-5
    assert_within(grads[0], grads[1].double(), unit * grads[1].double().abs().max().cpu(), "tied weight")


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_lora_on_the_head(backend, loss_type):
    """A head made of a frozen part and a product of two small matrices: gradients reach the small ones alone."""
    batch = make_head_batch(2, 6, 8, 20, torch.float32, backend.device)
    small = [normal(3, 8).to(backend.device), normal(20, 3).to(backend.device)]
    grads = []
    for exact in (False, True):
        a, b = (t.double().requires_grad_() if exact else t.clone().requires_grad_() for t in small)
        base, hidden = (t.double() if exact else t for t in (batch.weight, batch.hidden))
        hidden = hidden.clone().requires_grad_()
        out = fused_linear_token_dpo(
            hidden, base + 0.1 * (b @ a), batch.labels, reference_hidden=hidden.detach(), reference_weight=base,
            loss_type=loss_type, backend="torch" if exact else backend.name,
        )  # fmt: skip
        assert out.plan.name == ("pair_chunks" if loss_type == "sigmoid" else "recompute")
        out.loss.backward()
        grads.append((a.grad, b.grad, hidden.grad))
    for actual, expected in zip(*grads, strict=True):
        assert_within(actual, expected, 2e-5 * expected.abs().max().cpu(), "gradient of a factor")


# --- autocast ---------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Which dtypes the matrix products take."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {t.dtype for t in [x for x in args if isinstance(x, torch.Tensor)][-2:]}
        return func(*args, **(kwargs or {}))


@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_a_linear_layer_does(backend, dtype, plan, to):
    """Inputs of any dtype enter the products in autocast's; gradients come back in the inputs' own."""
    batch = make_head_batch(3, 6, 16, 30, dtype, backend.device)
    batch.weight, batch.reference_weight = batch.weight.float(), batch.reference_weight.float()
    batch.bias = batch.reference_bias = None
    models = leaves(batch, trains(plan))
    how = {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight, "plan": plan}
    with torch.autocast(backend.device.type, to), Products() as seen:
        layer = nn.functional.linear(models["hidden"], models["weight"])
        assert layer.dtype == to
        out = loss_of(backend, batch, models, max_chunk_bytes=bytes_for(12, batch), **how)
        assert out.plan.chunks > 1
    with seen:
        (2.0 * out.loss).backward()  # outside, as everybody does it
    widened = to == torch.float16 and backend.device.type == "cpu"
    native = to == torch.bfloat16 and (backend.device.type != "cpu" or qkernels.backends.cpu.gemm_kernel("logits", to))
    if native:
        assert seen.dtypes == {to}, "a product has run in another dtype"
    assert out.loss.dtype == out.token_logps.dtype == torch.float32

    rounded = copy.copy(batch)
    for name in ("hidden", "weight", "reference_hidden", "reference_weight"):
        setattr(rounded, name, getattr(batch, name).to(to))
    z, z_ref = truth_logits(rounded, None, 1.0)
    truth = oracle.preference(z, batch.labels, z_ref, options=Options(), upstream=2.0)
    size = head_size(rounded)
    check_linear_outputs(out, truth, rounded, None, 0.1, size, None)
    exact = [oracle.exact(rounded.hidden), oracle.exact(rounded.weight), None]
    expected = oracle.head_gradient(*exact, truth.grad, truth.terms.size)
    for name in trains(plan).replace("b", ""):
        name = {"h": "hidden", "w": "weight"}[name]
        grad = models[name].grad
        assert grad.dtype == models[name].dtype
        assert_head_gradient(
            grad, getattr(expected, name), expected.sizes[name], size, torch.float32 if widened else to, name
        )


def test_autocast_that_is_off_changes_nothing(backend):
    batch = make_head_batch(2, 5, 16, 30, torch.float32, backend.device)
    expected = loss_of(backend, batch, leaves(batch, "hwb"))
    kind = backend.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=False):
        assert torch.equal(loss_of(backend, batch, leaves(batch, "hwb")).loss, expected.loss)
    with torch.autocast(kind, torch.bfloat16), torch.autocast(kind, enabled=False):
        assert torch.equal(loss_of(backend, batch, leaves(batch, "hwb")).loss, expected.loss)
    with torch.autocast(kind, torch.bfloat16):
        assert not torch.equal(loss_of(backend, batch, leaves(batch, "hwb")).loss, expected.loss)


def test_autocast_leaves_float64_alone(backend):
    if not backend.takes(EXACT):
        pytest.skip("the backend has no float64")
    batch = make_head_batch(2, 5, 16, 30, EXACT, backend.device)
    expected = loss_of(backend, batch, leaves(batch, "hwb"))
    with torch.autocast(backend.device.type, torch.bfloat16):
        assert torch.equal(loss_of(backend, batch, leaves(batch, "hwb")).loss, expected.loss)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_torch_default_dtype_does_not_change_results(backend, default):
    batch = make_head_batch(2, 5, 16, 30, torch.float32, backend.device)

    def run():
        found = []
        for plan in PLANS:
            models = leaves(batch, trains(plan))
            out = loss_of(backend, batch, models, plan=plan, softcap=3.0)
            out.loss.backward()
            found += [out.loss.detach(), out.chosen_rewards, *gradients(models).values()]
        return found

    plain = run()
    torch.set_default_dtype(default)
    try:
        other = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(plain, other, strict=True))


# --- checkpointing and several processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", ["backbone", "everything"])
@pytest.mark.parametrize("plan", PLANS)
def test_gradient_checkpointing(backend, plan, inside, use_reentrant):
    """Around the model in front of the head, and around the loss too."""
    batch = make_head_batch(2, 6, 8, 20, torch.float32, backend.device)
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).to(backend.device)
    weight = batch.weight.clone().requires_grad_(plan != "frozen_head")

    def backbone(x):
        return torch.tanh(layer(x))

    def loss(hidden):
        return fused_linear_token_dpo(
            hidden, weight, batch.labels, reference_logps=0.0, plan=plan, backend=backend.name
        ).loss

    def run(how):
        x = batch.hidden.clone().requires_grad_()
        (2.0 * how(x)).backward()
        found = [x.grad, layer.weight.grad, weight.grad]
        layer.zero_grad()
        weight.grad = None
        return found

    def again(function, *args):
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    expected = run(lambda x: loss(backbone(x)))
    if inside == "backbone":
        actual = run(lambda x: loss(again(backbone, x)))
    else:
        actual = run(lambda x: again(lambda y: loss(backbone(y)), x))
    for a, b in zip(actual, expected, strict=True):
        assert (a is None and b is None and plan == "frozen_head") or torch.equal(a, b)


def test_two_data_parallel_processes():
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is missing")
    with Ranks(2) as ranks:
        ranks.run(linear_ddp_checks.check_all)
