"""What holds at the edges: labels of any layout, losses past fp32's range, an interrupted backward, constants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cases import IGNORE, normal
from qkernels import backends, fused_linear_token_dpo, fused_token_dpo, objectives, token_logps, token_stats
from qkernels.core import layout
from qkernels.objectives import scores

VOCAB, SIZE = 23, 8


def labels_of(layout_name: str, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The same labels in another layout; (rows, columns) of `shape`."""
    rows, columns = shape
    plain = (torch.arange(rows * columns, device=device) * 7).view(shape) % VOCAB
    if layout_name == "column":
        return torch.stack([plain, (plain + 5) % VOCAB], 2)[..., 0]
    if layout_name == "transposed":
        return plain.t().contiguous().t()
    return plain[:, :1].expand(shape)  # "expanded"


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("layout_name", ["column", "transposed", "expanded"])
@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_labels_of_any_layout_give_the_same_bits(backend, dtype, layout_name, plan, loss_type):
    results = []
    labels = labels_of(layout_name, (4, 3), backend.device)
    assert not labels.is_contiguous()
    for given in (labels, labels.contiguous()):
        hidden = normal(4, 3, SIZE, key=(1,)).to(backend.device, dtype).requires_grad_()
        weight = normal(VOCAB, SIZE, key=(2,)).to(backend.device, dtype).requires_grad_()
        out = fused_linear_token_dpo(
            hidden, weight, given, reference_logps=0.0, loss_type=loss_type, plan=plan, backend=backend.name
        )
        out.loss.backward()
        results.append([*(x for x in out if x is not None), hidden.grad, weight.grad])
    for other, plain in zip(*results, strict=True):
        assert torch.equal(other, plain)


@pytest.mark.only_backends("cpu", "cuda", "triton")
def test_backends_refuse_a_layout_that_they_would_misread(backend):
    logits = torch.zeros(2, 3, VOCAB, device=backend.device)
    labels = torch.zeros(2, 6, dtype=torch.int64, device=backend.device)[:, ::2]
    with pytest.raises(ValueError, match=r"contiguous torch\.int64.*strides \(6, 2\)"):
        backend.module.row_stats(logits, labels, None, 4, 1.0, IGNORE)
    sparse = torch.zeros(2, 3, 2 * VOCAB, device=backend.device)[..., ::2]
    with pytest.raises(ValueError, match=r"last dimension is contiguous.*, 2\)"):
        backend.module.row_stats(sparse, labels.contiguous(), None, 4, 1.0, IGNORE)


def test_layouts_are_checked_by_shape_and_dtype():
    with pytest.raises(ValueError, match=r"contiguous torch\.int64"):
        layout.dense(torch.zeros(3, dtype=torch.int32), torch.int64)
    assert layout.rows(torch.zeros(4, 1).t()).shape == (1, 4)  # strides of dimensions of size 1 mean nothing
    assert layout.rows(torch.zeros(3, 1)[:, ::1]).shape == (3, 1)


@pytest.mark.dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "simpo", "sigmoid"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3])
def test_ld_dpo_gradients_are_those_of_the_loss(backend, dtype, loss_type, ld_alpha):
    """Per-token means divide by the answer's tokens, also where LD-DPO's alpha of 0 drops some of their rows."""
    labels = (torch.arange(20, device=backend.device) * 3).view(4, 5) % VOCAB
    labels[0, 2:] = IGNORE  # chosen shorter than rejected
    labels[3, 1:] = IGNORE  # rejected shorter than chosen
    found = {}
    for plan in ("pair_chunks", "recompute"):
        hidden = normal(4, 5, SIZE, key=(3,)).to(backend.device, dtype).requires_grad_()
        weight = normal(VOCAB, SIZE, key=(4,)).to(backend.device, dtype).requires_grad_()
        out = fused_linear_token_dpo(
            hidden, weight, labels, reference_logps=0.0, loss_type=loss_type, loss_kwargs={"ld_alpha": ld_alpha},
            plan=plan, backend=backend.name,
        )  # fmt: skip
        out.loss.backward()
        found[plan] = (hidden.grad, weight.grad)
    # The loss as a function of plain log-probs, differentiated by autograd.
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logps = token_logps(hidden @ weight.t(), labels, backend="torch")
    valid = labels != IGNORE
    counts = valid.sum(1)
    shared = torch.minimum(counts[:2], counts[2:]).repeat(2)
    factors = torch.where(torch.arange(5, device=labels.device) < shared[:, None], 1.0, ld_alpha) * valid
    sums = (factors * logps).sum(1)
    chosen, rejected = sums.chunk(2)
    mean_chosen, mean_rejected = (sums / counts).chunk(2)
    beta, log_sigmoid = 0.1, torch.nn.functional.logsigmoid
    losses = {
        "sigmoid": lambda: -log_sigmoid(beta * (chosen - rejected)),
        "sigmoid_norm": lambda: -log_sigmoid(beta * (mean_chosen - mean_rejected)),
        "ipo": lambda: (mean_chosen - mean_rejected - 1 / (2 * beta)) ** 2,
        "simpo": lambda: -log_sigmoid(beta * (mean_chosen - mean_rejected) - 0.5),
    }
    expected = torch.autograd.grad(losses[loss_type]().mean(), (hidden, weight))
    for gradients in found.values():
        for actual, truth in zip(gradients, expected, strict=True):
            # fp32: two GEMMs and the rows' softmax, sums of at most 23 terms each, relative to the largest entry.
            assert float((actual.double() - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


# Objectives and options whose formulas leave fp32's range.
EXTREME = [
    *((name, {}) for name in objectives.OBJECTIVES if not name.startswith("tdpo")),
    ("discopop", {"discopop_tau": 2.0}),
    *(
        (name, {"f_divergence": divergence, **more})
        for name in ("sigmoid", "ipo", "exo_pair", "robust", "discopop", "rspo")
        for divergence, more in (
            ("forward_kl", {}), ("js_divergence", {}), ("alpha_divergence", {"f_alpha_divergence_coef": 0.2}),
            ("alpha_divergence", {"f_alpha_divergence_coef": 3.0}),
        )
    ),
]  # fmt: skip


@pytest.mark.nightly_cases(ratio=(-1e3, 1e3))
@pytest.mark.parametrize("loss_type, options", EXTREME, ids=str)
@pytest.mark.parametrize("ratio", [-1e5, -1e3, -89.0, 89.0, 1e3, 1e5])
def test_no_objective_turns_large_log_ratios_into_nan(loss_type, options, ratio):
    """Chosen and rejected answers on both sides of the range, alone and together."""
    labels = (torch.arange(12) * 5).view(4, 3) % VOCAB
    smoothing = 1e-3 if loss_type == "exo_pair" else 0.0
    for signs in ((1, 0), (0, 1), (1, 1), (1, -1)):
        logits = normal(4, 3, VOCAB, key=(5,)).requires_grad_()
        shift = torch.tensor([signs[0], signs[0], signs[1], signs[1]]) * ratio
        reference = token_logps(logits.detach(), labels).sum(1) - shift
        out = fused_token_dpo(
            logits, labels, reference_logps=reference, beta=0.3, loss_type=loss_type, loss_kwargs=options,
            label_smoothing=smoothing,
        )  # fmt: skip
        out.loss.backward()
        assert not out.loss.isnan()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("divergence, coefficient", [("forward_kl", 0.5), ("alpha_divergence", 0.2)])
def test_links_keep_their_order_past_the_range_of_exp(divergence, coefficient):
    """The worse the ratio the lower the score, and its slope stays above 0 where exp alone would be inf."""
    ratios = torch.tensor([-1e5, -1e3, -120.0, -79.0, -10.0, 0.0, 3.0], requires_grad=True)
    zeros = torch.zeros_like(ratios)
    pair_scores = objectives.PairScores(
        ratios, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
        f_divergence=divergence, f_alpha_divergence_coef=coefficient,
    ).chosen_scores  # fmt: skip
    (slope,) = torch.autograd.grad(pair_scores.sum(), ratios)
    assert (pair_scores[1:] > pair_scores[:-1]).all() and (slope > 0).all() and slope.isfinite().all()
    inside = ratios.detach().double()[3:]
    power = -inside if divergence == "forward_kl" else (coefficient - 1) * inside
    truth = -power.expm1() if divergence == "forward_kl" else power.expm1() / (coefficient - 1)
    assert torch.allclose(pair_scores[3:].double(), truth, rtol=1e-5, atol=0)


def test_an_interrupted_in_place_backward_leaves_marked_logits(monkeypatch):
    """Ctrl-C while the kernel writes: the logits are partly gradients, and every later use is refused."""
    logits = normal(2, 3, VOCAB, key=(6,)).requires_grad_()
    labels = torch.zeros(2, 3, dtype=torch.int64)
    out = fused_token_dpo(logits, labels, reference_logps=0.0, inplace_backward=True)
    module = backends.get(backends.resolve("auto", logits))
    write = module.row_grad_

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt  # what Python makes of the signal once the kernel has returned

    monkeypatch.setattr(module, "row_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        out.loss.backward()
    with pytest.raises(RuntimeError, match="no longer holds logits"):
        token_logps(logits, labels)


def test_outputs_without_a_gradient_are_constants(backend, dtype):
    logits = normal(2, 3, VOCAB, key=(7,)).to(backend.device, dtype).requires_grad_()
    labels = torch.zeros(2, 3, dtype=torch.int64, device=backend.device)
    constants = ("log_sum_sq_probs", "mean_logits", "is_top1", "reference_logps", "reference_logsumexp")
    for name in constants:
        reference = logits.detach() + 1 if name.startswith("reference") else None
        stats = token_stats(logits, labels, reference_logits=reference, outputs=(name,), backend=backend.name)
        assert not getattr(stats, name).requires_grad, name


def test_empty_logits_may_be_overwritten():
    logits = torch.empty(3, 0, VOCAB).transpose(0, 1).requires_grad_()
    logps = token_logps(logits, torch.empty(0, 3, dtype=torch.int64), inplace_backward=True)
    logps.sum().backward()
    assert logits.grad.shape == (0, 3, VOCAB)


def test_the_continuation_of_exp_meets_it_in_value_and_slope():
    limit = scores._MAX_EXPONENT[torch.float64]
    x = torch.tensor([limit - 1e-6, limit + 1e-6], dtype=torch.float64, requires_grad=True)
    y = scores.finite_exp(torch.exp, x) / math.exp(limit)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(y, 1 + (x - limit), rtol=0, atol=1e-11)
    assert torch.allclose(slope, torch.ones_like(slope), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name, options", [("exo_pair", {"label_smoothing": 1e-3}), ("apo_zero", {}), ("apo_down", {})])
@pytest.mark.parametrize("ratio", [-60.0, 60.0])
def test_saturated_losses_keep_the_digits_of_their_gradients(name, options, ratio):
    """1 - sigma(x) formed from sigma(x) would have none left."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([ratio], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([-ratio / 3], dtype=dtype, requires_grad=True)
        zero = torch.zeros(1, dtype=dtype)
        pair = objectives.PairScores(chosen, rejected, zero, zero, zero, zero, zero, zero)
        loss = objectives.OBJECTIVES[name].function(pair, beta=0.3, **options)
        gradients.append(torch.stack(torch.autograd.grad(loss, (chosen, rejected))).double())
    # An exponential of up to 24 in magnitude, whose argument is rounded to fp32: 24 u relative, and a few roundings.
    assert torch.allclose(gradients[0], gradients[1], rtol=40 * 2.0**-24, atol=0)
