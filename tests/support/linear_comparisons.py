"""The comparisons of the hidden-states path with the oracle. `test_linear_mutations.py` shows that each can fail."""

from __future__ import annotations

import torch
from torch import Tensor

import oracle
from assertions import (
    HEAD_GRADIENT,
    ROW_BOUNDS,
    assert_head_gradient,
    assert_row_output,
    assert_within,
    loss_allowance,
)
from cases import IGNORE, HeadBatch, Rows, generator
from comparisons import row_sizes
from qkernels import LinearPlan, fused_linear_token_dpo, linear_token_stats, plan_linear

MODELS = ("hidden", "weight", "bias")


def leaves(batch: HeadBatch, trains: str) -> dict[str, Tensor | None]:
    """Fresh copies of the policy's tensors; those whose initials are in `trains` require grad."""
    return {
        name: None if (t := getattr(batch, name)) is None else t.detach().clone().requires_grad_(name[0] in trains)
        for name in MODELS
    }


def exact_model(batch: HeadBatch, prefix: str = "") -> tuple[Tensor, Tensor, Tensor | None]:
    """One model in float64. Ignored rows may hold anything, NaN too: 0 here."""
    hidden, weight, bias = (getattr(batch, prefix + name) for name in MODELS)
    ignored = (batch.labels == IGNORE).cpu().unsqueeze(-1)
    return (
        oracle.exact(hidden).masked_fill(ignored, 0.0),
        oracle.exact(weight),
        None if bias is None else oracle.exact(bias),
    )


def truth_logits(batch: HeadBatch, softcap: float | None, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Logits of policy and reference in float64."""
    how = {"softcap": softcap, "logit_scale": logit_scale}
    return oracle.head_logits(*exact_model(batch), **how), oracle.head_logits(*exact_model(batch, "reference_"), **how)


def head_size(batch: HeadBatch, logit_scale: float = 1.0, reference: bool = True) -> float:
    """What the rounding of the logits goes by (see `assertions`): of the rows that count, the largest."""
    models = [(batch.hidden, batch.weight, batch.bias)]
    if reference:
        models.append((batch.reference_hidden, batch.reference_weight, batch.reference_bias))
    keep, largest = batch.labels.cpu() != IGNORE, 1.0
    for hidden, weight, bias in models:
        size = oracle.exact(hidden)[keep].abs() @ oracle.exact(weight).abs().T
        size = size if bias is None else size + oracle.exact(bias).abs().nan_to_num(posinf=0.0)
        largest = max(largest, logit_scale * float(size.max()) / 4) if size.numel() else largest
    return largest


def products_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the products take for inputs of this dtype: fp16 is widened on CPUs."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def check_head_gradients(
    batch: HeadBatch, models: dict[str, Tensor | None], truth: oracle.HeadGradient, products: torch.dtype, size: float
) -> None:
    """The gradients of the leaves against the oracle; those that do not train have none."""
    for name, leaf in models.items():
        if leaf is None:
            continue
        if not leaf.requires_grad:
            assert leaf.grad is None, f"{name} does not train"
            continue
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape, name
        assert_head_gradient(
            leaf.grad, getattr(truth, name), truth.sizes[name], size, products, f"gradient of the {name}"
        )


def check_linear_stats(
    backend,
    batch: HeadBatch,
    outputs: tuple[str, ...],
    *,
    trains: str = "hwb",
    chunk_rows: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Tensor | None]:
    """`linear_token_stats` and the gradient of its outputs under random upstream gradients."""
    models = leaves(batch, trains)
    with_reference = any(name in oracle.WITH_REFERENCE for name in outputs)
    reference = (
        {
            "reference_hidden": batch.reference_hidden,
            "reference_weight": batch.reference_weight,
            "reference_bias": batch.reference_bias,
        }
        if with_reference
        else {}
    )
    stats = linear_token_stats(
        models["hidden"],
        models["weight"],
        batch.labels,
        bias=models["bias"],
        outputs=outputs,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        max_chunk_bytes=None
        if chunk_rows is None
        else bytes_for(chunk_rows, batch, trains, softcap, with_reference, any("kl_" in name for name in outputs)),
        backend=backend.name,
        **reference,
    )
    z, z_ref = truth_logits(batch, softcap, logit_scale)
    labels = batch.labels.cpu()
    truth = oracle.token_stats(z, labels, z_ref, temperature=temperature)
    sizes = row_sizes(Rows(z, labels, z_ref, temperature))
    size = head_size(batch, logit_scale, with_reference) / temperature
    for name, value in stats._asdict().items():
        if name not in outputs:
            assert value is None, f"{name} was not asked for"
            continue
        relative = torch.as_tensor(sizes.get(name, 1.0), dtype=torch.float64)
        # A rounding of the logits reaches entropy and divergences times E|log p|, and the log-sum-exp's bound is tight.
        factor = 4.0 if name in ("logsumexp", "reference_logsumexp", "entropy", "mean_logits") else 2.0
        assert_row_output(name, value, truth[name], batch.hidden.dtype, factor * size * relative.clamp_min(1.0))
    names = tuple(name for name in outputs if name in oracle.WITH_GRADIENT)
    if not trains or not names:
        assert all(value is None or not value.requires_grad for value in stats)
        return models
    values = {name: getattr(stats, name) for name in names}
    upstream = {
        name: torch.randn(labels.shape, generator=generator(i, batch.vocab)).to(value)
        for i, (name, value) in enumerate(values.items())
    }
    torch.autograd.backward(list(values.values()), list(upstream.values()))
    how = {"temperature": temperature}
    grad = oracle.gradient(z, labels, upstream, z_ref, **how)
    terms = oracle.gradient_terms(z, labels, upstream, z_ref, **how)
    expected = oracle.head_gradient(*exact_model(batch), grad, terms.size, softcap, logit_scale)
    check_head_gradients(batch, models, expected, products_of(batch.hidden.dtype, batch.hidden.device), size)
    return models


def bytes_for(
    rows: int,
    batch: HeadBatch,
    trains: str = "hwb",
    softcap: float | None = None,
    live_reference: bool = True,
    divergence: bool = False,
) -> int:
    """A budget that holds exactly so many rows; `divergence`: of a call that compares the two models' distributions."""
    models = leaves(batch, trains)
    reference = (
        {"reference_hidden": batch.reference_hidden, "reference_weight": batch.reference_weight}
        if live_reference
        else {"reference_logps": 0.0}
    )
    plan = plan_linear(
        models["hidden"], models["weight"], batch.labels, lm_head_bias=models["bias"], cu_seqlens=batch.cu_seqlens,
        softcap=softcap, loss_type="tdpo1" if divergence else "sigmoid", **reference,
    )  # fmt: skip
    return rows * plan.chunk_bytes // plan.chunk_rows


def check_linear_preference(
    backend,
    batch: HeadBatch,
    loss_type="sigmoid",
    *,
    trains: str = "hwb",
    plan: str = "auto",
    chunk_rows: int | None = None,
    options: oracle.Options | None = None,
    reduction: str = "mean",
    live_reference: bool = True,
    reference_logps=None,
    upstream: Tensor | float = 1.0,
    loss_kwargs: dict | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    loss_weights: list[float] | None = None,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
):
    """`fused_linear_token_dpo`: loss, rewards, per-token outputs and all gradients against the oracle."""
    options = options or oracle.Options()
    kwargs = dict(loss_kwargs or {})
    if ld_alpha is not None:
        kwargs["ld_alpha"] = ld_alpha
    if use_weighting:
        kwargs["use_weighting"] = True
    models = leaves(batch, trains)
    reference = {}
    if live_reference:
        reference = {
            "reference_hidden": batch.reference_hidden,
            "reference_weight": batch.reference_weight,
            "reference_bias": batch.reference_bias,
        }
    arguments = {
        "lm_head_bias": models["bias"],
        "reference_logps": reference_logps,
        "beta": options.beta,
        "loss_type": loss_type,
        "loss_weights": loss_weights,
        "label_smoothing": options.label_smoothing,
        "loss_kwargs": kwargs or None,
        "token_weights": token_weights,
        "cu_seqlens": batch.cu_seqlens,
        "temperature": temperature,
        "reduction": reduction,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "plan": plan,
        "max_chunk_bytes": None
        if chunk_rows is None
        else bytes_for(chunk_rows, batch, trains, softcap, live_reference, "tdpo" in str(loss_type)),
        "backend": backend.name,
        **reference,
    }
    out = fused_linear_token_dpo(models["hidden"], models["weight"], batch.labels, **arguments)
    assert isinstance(out.plan, LinearPlan)
    assert out.plan == plan_linear(models["hidden"], models["weight"], batch.labels, **arguments)._replace(
        peak_bytes=out.plan.peak_bytes
    )
    if chunk_rows is not None:
        assert out.plan.chunk_rows <= chunk_rows

    z, z_ref = truth_logits(batch, softcap, logit_scale)
    truth = oracle.preference(
        z,
        batch.labels,
        z_ref if live_reference else None,
        loss_type=loss_type,
        loss_weights=loss_weights,
        options=options,
        reference_logps=reference_logps,
        token_weights=token_weights,
        cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.cpu(),
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        temperature=temperature,
        reduction=reduction,
        upstream=upstream,
    )
    dtype = batch.hidden.dtype
    size = head_size(batch, logit_scale, live_reference) / temperature
    extra = 4e-6 * size * truth.loss.abs() if use_weighting and dtype != torch.float64 else 0.0
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(out.loss, truth.loss, size * loss_allowance(truth.loss, truth.sensitivity, dtype) + extra, "loss")
    check_linear_outputs(out, truth, batch, token_weights, options.beta, size, reference_logps)

    if trains:
        grad_of_loss = torch.as_tensor(upstream, dtype=out.loss.dtype, device=out.loss.device).expand(out.loss.shape)
        out.loss.backward(grad_of_loss)
        # What cannot be judged (a slope that cancels) joins the terms, for whose errors a share is allowed, which goes
        # by `size`. The slope's own roundings do not: that share of it is never less than all of it.
        terms = truth.terms.size + truth.terms.unsure * max(1e5, 1 / (HEAD_GRADIENT * (1 + size)))
        expected = oracle.head_gradient(*exact_model(batch), truth.grad, terms, softcap, logit_scale)
        check_head_gradients(batch, models, expected, products_of(dtype, batch.hidden.device), size)
    else:
        assert not out.loss.requires_grad
    return out, models


def check_linear_outputs(out, truth, batch, token_weights, beta, size, reference_logps) -> None:
    """Rewards and per-token outputs: 0 where a row counts for nothing, and without gradient."""
    counts = batch.labels.cpu() != IGNORE
    if token_weights is not None:
        counts &= token_weights.cpu() != 0
    logps, dtype = truth.stats["logps"] * counts, batch.hidden.dtype
    unit = 1e-12 if dtype == torch.float64 else ROW_BOUNDS["logps"]
    assert_row_output("logps", out.token_logps, logps, dtype, size)
    assert_row_output("logsumexp", out.logsumexp, truth.stats["logsumexp"] * counts, dtype, 4 * size)
    if "reference_logps" in truth.stats:
        reference = truth.stats["reference_logps"] * counts
    elif isinstance(reference_logps, Tensor) and reference_logps.shape == batch.labels.shape:
        reference = reference_logps.cpu().double() * counts
    else:
        reference = torch.zeros_like(logps)
    if isinstance(reference_logps, Tensor) and reference_logps.shape != batch.labels.shape:
        assert out.reference_token_logps is None and out.token_rewards is None
    else:
        assert_row_output("reference_logps", out.reference_token_logps, reference, dtype, size)
        allowed = 2 * unit * beta * size * torch.ones_like(logps).maximum(logps.abs()).maximum(reference.abs())
        assert_within(out.token_rewards, beta * (logps - reference), allowed, "token_rewards")
    total = sum(
        truth.stats[field].abs().clamp_min(size).sum() for field in ("logps", "reference_logps") if field in truth.stats
    )
    for name in ("chosen_rewards", "rejected_rewards"):
        actual, expected = getattr(out, name), getattr(truth, name)
        assert_within(actual, expected, unit * beta * total + 1e-7 * expected.abs(), name)
    for name, value in out._asdict().items():
        assert name == "loss" or value is None or not value.requires_grad, name
