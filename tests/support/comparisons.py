"""The comparisons with the oracle that the tests are made of. `test_mutations.py` shows that each of them can fail."""

from __future__ import annotations

import torch
from torch import Tensor

import oracle
from assertions import assert_gradient, assert_row_output, assert_within, loss_allowance
from cases import IGNORE, PairBatch, Rows, generator
from qkernels import fused_token_dpo, token_logps, token_stats
from qkernels.core.coefficients import coefficients
from qkernels.core.fields import REFERENCE_SOFTMAX, SOFTMAX, bits


def row_sizes(rows: Rows) -> dict[str, Tensor]:
    """What the bounds of an output are relative to, where that is not the output itself (see `assertions`)."""
    keep = (rows.labels != IGNORE).cpu()
    z = torch.where(keep.unsqueeze(-1), oracle.exact(rows.logits), 0.0) / rows.temperature
    z_ref = torch.where(keep.unsqueeze(-1), oracle.exact(rows.reference), 0.0) / rows.temperature
    log_p, log_q = z.log_softmax(-1), z_ref.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()

    def mean_size(weights: Tensor) -> Tensor:
        both = log_p.masked_fill(weights == 0, 0).abs() + log_q.masked_fill(weights == 0, 0).abs()
        return (weights * both).sum(-1)

    return {
        "kl_policy_reference": mean_size(p),
        "kl_reference_policy": mean_size(q),
        "mean_logits": z.abs().mean(-1),
    }


def check_outputs(backend, rows: Rows, outputs: tuple[str, ...] = oracle.STATS) -> None:
    """`token_stats` with these outputs against the oracle; outputs that were not asked for are None."""
    with_reference = any(name in oracle.WITH_REFERENCE for name in outputs)
    stats = token_stats(
        rows.logits,
        rows.labels,
        reference_logits=rows.reference if with_reference else None,
        outputs=outputs,
        temperature=rows.temperature,
        backend=backend.name,
    )
    truth = oracle.token_stats(
        oracle.exact(rows.logits), rows.labels.cpu(), oracle.exact(rows.reference), temperature=rows.temperature
    )
    sizes = row_sizes(rows)
    for name, value in stats._asdict().items():
        if name not in outputs:
            assert value is None, f"{name} was not asked for"
            continue
        assert value.device == rows.logits.device
        assert_row_output(name, value, truth[name], rows.logits.dtype, sizes.get(name, 1.0))


def check_logps(backend, rows: Rows) -> None:
    """`token_logps` against the oracle."""
    actual = token_logps(rows.logits, rows.labels, temperature=rows.temperature, backend=backend.name)
    truth = oracle.token_stats(oracle.exact(rows.logits), rows.labels.cpu(), temperature=rows.temperature)["logps"]
    assert_row_output("logps", actual, truth, rows.logits.dtype)


def random_upstream(rows: Rows, outputs: tuple[str, ...], key: int = 0) -> dict[str, Tensor]:
    """An upstream gradient for each output: different everywhere, some negative, one row 0."""
    upstream = {}
    for i, name in enumerate(outputs):
        g = torch.randn(rows.labels.shape, generator=generator(key, i, rows.vocab))
        g.view(-1)[-2:-1] = 0.0
        upstream[name] = g.to(
            rows.logits.device, torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
        )
    return upstream


def row_gradient(backend, rows: Rows, upstream: dict[str, Tensor], **options) -> Tensor:
    """dL/dlogits of sum(upstream * output) through qkernels; the logits' strides are kept."""
    leaf = rows.logits.detach().requires_grad_()
    reads_reference = any(name in oracle.WITH_REFERENCE for name in upstream)
    stats = token_stats(
        leaf,
        rows.labels,
        reference_logits=rows.reference if reads_reference else None,
        outputs=tuple(upstream),
        temperature=rows.temperature,
        backend=backend.name,
        **options,
    )
    torch.autograd.backward([getattr(stats, name) for name in upstream], list(upstream.values()))
    assert leaf.grad is not None and leaf.grad.dtype == rows.logits.dtype and leaf.grad.shape == rows.logits.shape
    return leaf.grad


def check_gradient(backend, rows: Rows, upstream: dict[str, Tensor], **options) -> Tensor:
    """The gradient of these outputs, combined with these upstream gradients, against the oracle's autograd."""
    how = {"temperature": rows.temperature}
    expected = oracle.gradient(rows.logits, rows.labels, upstream, rows.reference, **how)
    terms = oracle.gradient_terms(rows.logits, rows.labels, upstream, rows.reference, **how)
    grad = row_gradient(backend, rows, upstream, **options)
    assert_gradient(grad, expected, terms, f"gradient of {'+'.join(upstream)}")
    return grad


def check_gradient_into(
    backend, rows: Rows, narrow: torch.dtype, outputs: tuple[str, ...], gap: int = 0, offset: int = 0
) -> None:
    """The gradient of fp32 logits written to a tensor of another dtype, as the path from hidden states wants it.

    Every entry is written, ignored rows as zeros; nothing around the rows is, and the logits stay as they are.
    gap: elements between the rows of the target; offset: those before its first.
    """
    logits, labels = rows.logits.unsqueeze(0), rows.labels.unsqueeze(0)
    full = any(name in oracle.WITH_REFERENCE for name in outputs)
    reference = rows.reference.unsqueeze(0) if full else None
    fields = SOFTMAX | bits(outputs) | (REFERENCE_SOFTMAX if full else 0)
    how = (rows.temperature, IGNORE)
    stats = backend.module.row_stats(logits, labels, reference, fields, *how)
    upstream = random_upstream(rows, outputs)
    given = coefficients(stats, {name: value.unsqueeze(0) for name, value in upstream.items()}, fields)
    pitch = rows.vocab + gap
    memory = torch.full((offset + len(rows.labels) * pitch,), 777.0, dtype=narrow, device=logits.device)
    lines = memory[offset:].view(1, -1, pitch)
    out, before = lines[..., : rows.vocab], logits.clone()
    softmax = (stats[:3], stats[3:6] if full else None)
    backend.module.row_grad_into(out, logits, labels, reference, *softmax, given, None, *how)
    assert torch.equal(logits, before) and bool((lines[..., rows.vocab :] == 777).all())
    assert bool((memory[:offset] == 777).all())
    assert bool((out[labels == IGNORE] == 0).all())
    expected = oracle.gradient(rows.logits, rows.labels, upstream, rows.reference, temperature=rows.temperature)
    terms = oracle.gradient_terms(rows.logits, rows.labels, upstream, rows.reference, temperature=rows.temperature)
    assert_gradient(out[0], expected, terms, f"gradient of {'+'.join(outputs)} in {narrow}")


def check_preference(
    backend,
    batch: PairBatch,
    loss_type="sigmoid",
    *,
    truth_name=None,
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
    inplace_backward: bool = False,
):
    """`fused_token_dpo`: loss, rewards, per-token outputs and the gradient of the logits against the oracle.

    truth_name: the oracle's name of the objective, when `loss_type` is a callable.
    upstream: dL/dloss, so that a lost upstream gradient shows.
    """
    options = options or oracle.Options()
    kwargs = dict(loss_kwargs or {})
    if ld_alpha is not None:
        kwargs["ld_alpha"] = ld_alpha
    if use_weighting:
        kwargs["use_weighting"] = True
    leaf = batch.logits.detach().requires_grad_()
    original = batch.logits.detach().clone()
    out = fused_token_dpo(
        leaf,
        batch.labels,
        reference_logits=batch.reference if live_reference else None,
        reference_logps=reference_logps,
        beta=options.beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=options.label_smoothing,
        loss_kwargs=kwargs or None,
        token_weights=token_weights,
        cu_seqlens=batch.cu_seqlens,
        temperature=temperature,
        reduction=reduction,
        inplace_backward=inplace_backward,
        backend=backend.name,
    )
    truth = oracle.preference(
        original,
        batch.labels,
        batch.reference if live_reference else None,
        loss_type=truth_name or loss_type,
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
    dtype = original.dtype
    # The WPO factor is exp of a mean of log-probs: an error of 4e-6 there is a relative error of the loss.
    extra = 4e-6 * truth.loss.abs() if use_weighting and dtype != torch.float64 else 0.0
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(out.loss, truth.loss, loss_allowance(truth.loss, truth.sensitivity, dtype) + extra, "loss")
    for name in ("chosen_rewards", "rejected_rewards"):
        check_rewards(name, getattr(out, name), truth, options.beta, dtype)
    check_token_outputs(out, truth, batch, token_weights, options.beta, dtype, reference_logps)

    grad_of_loss = torch.as_tensor(upstream, dtype=out.loss.dtype, device=out.loss.device).expand(out.loss.shape)
    out.loss.backward(grad_of_loss)
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert_gradient(leaf.grad, truth.grad, truth.terms, f"gradient of {truth_name or loss_type}")
    return out, leaf.grad


def check_rewards(name: str, actual: Tensor, truth: oracle.Loss, beta: float, dtype: torch.dtype) -> None:
    """Sequence rewards: beta times sums of log-ratios, each of whose terms may err as log-probs do."""
    expected = getattr(truth, name)
    assert not actual.requires_grad, f"{name} must not carry gradient"
    total = sum(
        truth.stats[field].abs().clamp_min(1).sum() for field in ("logps", "reference_logps") if field in truth.stats
    )
    unit = 1e-12 if dtype == torch.float64 else 2e-6
    assert_within(actual, expected, unit * beta * total + 1e-7 * expected.abs(), name)


def check_token_outputs(out, truth, batch, token_weights, beta, dtype, reference_logps) -> None:
    """`token_logps`, `token_rewards`, `reference_token_logps`, `logsumexp`: 0 where a row counts for nothing."""
    counts = batch.labels.cpu() != IGNORE
    if token_weights is not None:
        counts &= token_weights.cpu() != 0
    logps = truth.stats["logps"] * counts
    for name in ("token_logps", "reference_token_logps", "token_rewards", "logsumexp"):
        value = getattr(out, name)
        assert value is None or (value.shape == batch.labels.shape and not value.requires_grad), name
    assert_row_output("logps", out.token_logps, logps, dtype)
    assert_row_output("logsumexp", out.logsumexp, truth.stats["logsumexp"] * counts, dtype)
    if "reference_logps" in truth.stats:
        reference = truth.stats["reference_logps"] * counts
    elif isinstance(reference_logps, Tensor) and reference_logps.shape == batch.labels.shape:
        reference = reference_logps.cpu().double() * counts
    elif isinstance(reference_logps, Tensor):
        assert out.reference_token_logps is None and out.token_rewards is None
        return
    else:
        reference = torch.zeros_like(logps)
    assert_row_output("reference_logps", out.reference_token_logps, reference, dtype)
    unit = 1e-12 if dtype == torch.float64 else 2e-6
    allowed = unit * beta * (logps.abs().clamp_min(1) + reference.abs().clamp_min(1))
    assert_within(out.token_rewards, beta * (logps - reference), allowed, "token_rewards")


def strided(values: torch.Tensor, strides: tuple[int, ...], offset: int) -> torch.Tensor:
    """A view of larger memory, full of NaN elsewhere, with these strides and storage offset."""
    span = offset + 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = torch.full((span + 13,), torch.nan, dtype=values.dtype, device=values.device)
    view = memory.as_strided(values.shape, strides, offset)
    view.copy_(values)
    return view


def check_layout(backend, rows: Rows) -> None:
    """Outputs, gradients and the in-place gradient for logits and reference as they lie in memory."""
    check_outputs(backend, rows)
    check_logps(backend, rows)
    upstream = random_upstream(rows, oracle.WITH_GRADIENT)
    grad = check_gradient(backend, rows, upstream)
    own_memory = all(
        stride > 0 or size == 1 for size, stride in zip(rows.logits.shape, rows.logits.stride(), strict=True)
    )
    if own_memory and rows.logits.untyped_storage().data_ptr() != rows.reference.untyped_storage().data_ptr():
        clone = strided(rows.logits, rows.logits.stride(), rows.logits.storage_offset())
        rows = Rows(clone, rows.labels, rows.reference, rows.temperature)
        inplace = row_gradient(backend, rows, upstream, inplace_backward=True)
        assert torch.equal(inplace, grad)
        assert torch.equal(clone, grad), "the gradient is not where the logits were"
        outside = clone.new_ones(clone.untyped_storage().nbytes() // clone.element_size(), dtype=torch.bool)
        outside.as_strided(clone.shape, clone.stride(), clone.storage_offset()).fill_(False)
        memory = clone.as_strided(outside.shape, (1,), 0)
        assert bool(memory[outside].isnan().all()), "something was written between the rows"
