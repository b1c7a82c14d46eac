"""One random call of each public function, run and compared with float64: values, gradients, requires_grad, dtypes.

`CALLS[name](case, backend)` raises `Mismatch` (or whatever the package raised on a valid call).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import oracle
import qkernels as qk
from fuzz.heads import Heads
from fuzz.losses import Batch, Preference, Request
from fuzz.rows import Rows, backward, check_logits_gradient
from fuzz.setup import Case, Mismatch, Setup, check, check_constant, compare, exact
from fuzz.tensors import DTYPES

# --- logits -----------------------------------------------------------------------------------------------------------


def token_logps(case: Case, backend: str) -> None:
    s = Setup({**case, "outputs": ["logps"]}, backend)
    _rows_call(s, "token_logps")


def token_stats(case: Case, backend: str) -> None:
    _rows_call(Setup(case, backend), "token_stats")


def _rows_call(s: Setup, function: str) -> None:
    shape = tuple(s["rows"])
    outputs = tuple(dict.fromkeys(s["outputs"]))
    labels = s.labels(shape)
    policy, reference = s.logits(shape, labels, ("logits", "reference_logits"))
    reads_reference = any(name in oracle.WITH_REFERENCE for name in outputs)
    inplace = s["inplace"] and s.layout("logits", True) != "expanded"
    rows = Rows(s, exact(policy), exact(reference) if reads_reference else None, labels, s["temperature"])
    before = policy.clone()
    leaf = s.leaf(policy, True)
    how = {
        "temperature": s["temperature"],
        "ignore_index": s["ignore_index"],
        "inplace_backward": inplace,
        "backend": s.backend,
    }
    if function == "token_logps":
        found = {"logps": s.call(qk.token_logps, leaf, labels, **how)}
    else:
        stats = s.call(
            qk.token_stats,
            leaf,
            labels,
            reference_logits=reference if reads_reference else None,
            outputs=outputs,
            **how,
        )
        for name, value in stats._asdict().items():
            check((value is not None) == (name in outputs), name, "is None" if value is None else "was not asked for")
        found = {name: getattr(stats, name) for name in outputs}
    for name, value in found.items():
        rows.check(name, value)
        differentiable = name in oracle.WITH_GRADIENT and s["grad"]
        if not differentiable:
            check_constant(value, name)
        else:
            check(value.requires_grad, f"requires_grad of {name}", "is False")
    check(bool((leaf.detach() == before)[~before.isnan()].all()), "logits", "were changed by the forward")
    _backward_rows(s, rows, leaf, found, inplace)


def _backward_rows(s: Setup, rows: Rows, leaf: Tensor, found: dict[str, Tensor], inplace: bool) -> None:
    if not s["grad"]:
        return
    # An infinite divergence has no gradient.
    names = [n for n in found if n in oracle.WITH_GRADIENT and bool(rows.stats[n].isfinite().all() or n == "logps")]
    if not names or not rows.labels.numel():
        return
    upstream = {name: s.upstream(found[name], name) for name in names}
    times = backward(s, [found[n] for n in names], [upstream[n] for n in names], inplace)
    grad, terms = rows.gradient(upstream)
    check_logits_gradient(s, leaf, rows, grad, terms, times)
    bad = rows.broken & (torch.stack([g.cpu() for g in upstream.values()]) != 0).any(0)
    check(bool(leaf.grad.cpu()[bad].isnan().all()), "gradient", "of a broken row is not NaN")
    if inplace:
        check(torch.equal(leaf.detach().nan_to_num(), leaf.grad.nan_to_num()), "logits", "do not hold the gradient")
        try:
            s.call(qk.token_logps, leaf, rows.labels.to(s.device), ignore_index=s["ignore_index"], backend=s.backend)
        except RuntimeError:
            return
        raise Mismatch("overwritten logits", "were taken by another call")


def fused_token_dpo(case: Case, backend: str) -> None:
    s = Setup(case, backend)
    request = Request(s)
    batch = Batch(s, request)
    policy, reference = s.logits(batch.shape, batch.labels, ("policy_logits", "reference_logits"))
    live = request.reference == "live"
    inplace = s["inplace"] and s.layout("policy_logits", True) != "expanded"
    rows = Rows(s, exact(policy), exact(reference) if live else None, batch.labels, s["temperature"])
    leaf = s.leaf(policy, True)
    out = s.call(
        qk.fused_token_dpo,
        leaf,
        batch.labels,
        reference_logits=reference if live else None,
        reference_logps=batch.reference_logps,
        token_weights=batch.weights,
        cu_seqlens=batch.cu_seqlens,
        temperature=s["temperature"],
        ignore_index=s["ignore_index"],
        reduction=s["reduction"],
        inplace_backward=inplace,
        backend=s.backend,
        **request.arguments(),
    )
    truth = Preference(s, request, batch, rows)
    truth.check_loss(out.loss)
    truth.check_outputs(out)
    if not s["grad"]:
        return check_constant(out.loss, "loss")
    check(out.loss.requires_grad, "requires_grad of loss", "is False")
    times = backward(s, [out.loss], [truth.upstream.to(out.loss)], inplace)
    grad, terms = rows.gradient(truth.coefficients, truth.coefficient_errors)
    fine = ~truth.broken_pairs.repeat(2)[batch.sequence].view(rows.labels.shape)
    rows.broken = ~fine
    check_logits_gradient(s, leaf, rows, grad, terms, times)
    return None


# --- hidden states ----------------------------------------------------------------------------------------------------


def _bytes_for(s: Setup, heads: Heads, live: bool, divergence: bool) -> int | None:
    """A chunk budget that holds so many rows as the case says; a divergence needs both models' logits at once."""
    if s["chunk_rows"] is None:
        return None
    rows = max(1, heads.labels.numel())
    flat = heads.hidden.detach().reshape(-1, heads.hidden.shape[-1])[:rows].requires_grad_(bool(heads.trained))
    doubled = torch.cat([flat, flat])
    kwargs: dict[str, Any] = {"reference_logps": 0.0}
    if live:
        r_hidden, r_weight, r_bias = heads.reference
        r_flat = r_hidden.reshape(-1, r_hidden.shape[-1])[:rows]
        kwargs = {
            "reference_hidden": torch.cat([r_flat, r_flat]),
            "reference_weight": r_weight,
            "reference_bias": r_bias,
            "loss_type": "tdpo1" if divergence else "sigmoid",
        }
    number = doubled.shape[0]
    ends = torch.tensor([0, number // 2, number], dtype=torch.int32, device=s.device)
    labels = torch.zeros(number, dtype=torch.int64, device=s.device)
    how = {"cu_seqlens": ends, "softcap": s["softcap"], "backend": s.backend}
    plan = s.call(qk.plan_linear, doubled, heads.weight, labels, **how, **kwargs)
    return s["chunk_rows"] * plan.chunk_bytes // plan.chunk_rows


def linear_token_logps(case: Case, backend: str) -> None:
    _linear_rows(Setup({**case, "outputs": ["logps"], "detached": []}, backend), "linear_token_logps")


def linear_token_stats(case: Case, backend: str) -> None:
    _linear_rows(Setup(case, backend), "linear_token_stats")


NAMES_OF_ROWS = {"hidden": "hidden", "weight": "weight", "bias": "bias"}
NAMES_OF_LOSS = {"hidden": "policy_hidden", "weight": "lm_head_weight", "bias": "lm_head_bias"}


def _linear_rows(s: Setup, function: str) -> None:
    shape = tuple(s["rows"])
    outputs = tuple(dict.fromkeys(s["outputs"]))
    detached = tuple(name for name in s["detached"] if name in outputs)
    labels = s.labels(shape)
    heads = Heads(s, labels, NAMES_OF_ROWS)
    live = any(name in oracle.WITH_REFERENCE for name in outputs)
    size = heads.size(live)
    rows = Rows(s, heads.logits(), heads.logits(True) if live else None, labels, s["temperature"], size)
    r_hidden, r_weight, r_bias = heads.reference
    how = {
        "bias": heads.leaves["bias"],
        "softcap": s["softcap"],
        "logit_scale": s["logit_scale"],
        "temperature": s["temperature"],
        "ignore_index": s["ignore_index"],
        "valid_rows": int((labels != s["ignore_index"]).sum()) if s["valid_rows"] else None,
        "max_chunk_bytes": _bytes_for(s, heads, live, any("kl_" in name for name in outputs)),
        "backend": s.backend,
    }
    if function == "linear_token_logps":
        found = {"logps": s.call(qk.linear_token_logps, heads.leaves["hidden"], heads.leaves["weight"], labels, **how)}
    else:
        how |= {"outputs": outputs, "detached": detached}
        if live:
            how |= {"reference_hidden": r_hidden, "reference_weight": r_weight, "reference_bias": r_bias}
        stats = s.call(qk.linear_token_stats, heads.leaves["hidden"], heads.leaves["weight"], labels, **how)
        for name, value in stats._asdict().items():
            check((value is not None) == (name in outputs), name, "is None" if value is None else "was not asked for")
        found = {name: getattr(stats, name) for name in outputs}
    names = []
    for name, value in found.items():
        rows.check(name, value)
        if name in oracle.WITH_GRADIENT and name not in detached and heads.trained:
            check(value.requires_grad, f"requires_grad of {name}", "is False")
            names.append(name)
        else:
            check_constant(value, name)
    names = [name for name in names if bool(rows.stats[name].isfinite().all())]
    if not names or not labels.numel():
        return
    upstream = {name: s.upstream(found[name], name) for name in names}
    times = backward(s, [found[n] for n in names], [upstream[n] for n in names], False)
    grad, terms = rows.gradient(upstream)
    heads.check_gradients(grad, terms, size, times, rows.broken)


def _linear_arguments(s: Setup, request: Request, batch: Batch, heads: Heads) -> dict[str, Any]:
    """Keyword arguments of `fused_linear_token_dpo` and `plan_linear`, with a plan that can do the work."""
    live = request.reference == "live"
    r_hidden, r_weight, r_bias = heads.reference
    budget = _bytes_for(s, heads, live, request.needs_kl)
    used = batch.loss_weights if not request.wpo and "sft" not in request.names else batch.base
    counts = [int(n) for n in batch.sums((used != 0).double())]
    half = batch.number // 2
    largest = max(a + b for a, b in zip(counts[:half], counts[half:], strict=True))
    plan = s["plan"]
    trains_head = bool({"weight", "bias"} & set(heads.trained))
    if plan == "frozen_head" and (trains_head or request.needs_kl):
        plan = "auto"
    if plan == "pair_chunks" and (
        request.coupled or s["reduction"] == "none" or (budget is not None and largest > s["chunk_rows"])
    ):
        plan = "auto"
    return {
        "lm_head_bias": heads.leaves["bias"],
        "reference_hidden": r_hidden if live else None,
        "reference_weight": r_weight if live else None,
        "reference_bias": r_bias if live else None,
        "reference_logps": batch.reference_logps,
        "token_weights": batch.weights,
        "cu_seqlens": batch.cu_seqlens,
        "valid_rows": counts if s["valid_rows"] and request.ld_alpha != 0 else None,
        "temperature": s["temperature"],
        "ignore_index": s["ignore_index"],
        "reduction": s["reduction"],
        "softcap": s["softcap"],
        "logit_scale": s["logit_scale"],
        "plan": plan,
        "max_chunk_bytes": budget,
        "backend": s.backend,
        **request.arguments(),
    }


def fused_linear_token_dpo(case: Case, backend: str) -> None:
    s = Setup(case, backend)
    request = Request(s)
    batch = Batch(s, request)
    heads = Heads(s, batch.labels, NAMES_OF_LOSS)
    live = request.reference == "live"
    size = heads.size(live)
    rows = Rows(s, heads.logits(), heads.logits(True) if live else None, batch.labels, s["temperature"], size)
    arguments = _linear_arguments(s, request, batch, heads)
    out = s.call(qk.fused_linear_token_dpo, heads.leaves["hidden"], heads.leaves["weight"], batch.labels, **arguments)
    truth = Preference(s, request, batch, rows)
    truth.check_loss(out.loss)
    truth.check_outputs(out)
    plan = s.call(qk.plan_linear, heads.leaves["hidden"], heads.leaves["weight"], batch.labels, **arguments)
    check(plan.name == out.plan.name, "plan", f"{out.plan.name}, announced was {plan.name}")
    wanted = arguments["plan"]
    if heads.trained and wanted != "auto":
        check(plan.name == wanted, "plan", f"{plan.name}, asked for was {wanted}")
    if s["chunk_rows"] is not None:
        check(plan.chunk_rows <= max(s["chunk_rows"], 1), "plan", f"chunk of {plan.chunk_rows} rows")
    if not heads.trained:
        return check_constant(out.loss, "loss")
    check(out.loss.requires_grad, "requires_grad of loss", "is False")
    times = backward(s, [out.loss], [truth.upstream.to(out.loss)], False)
    grad, terms = rows.gradient(truth.coefficients, truth.coefficient_errors)
    broken = truth.broken_pairs.repeat(2)[batch.sequence].view(rows.labels.shape)
    heads.check_gradients(grad, terms, size, times, broken)
    return None


def plan_linear(case: Case, backend: str) -> None:
    """Also on the meta device: the same plan as with values where `valid_rows` says as much."""
    s = Setup({**case, "valid_rows": True}, backend)
    request = Request(s)
    batch = Batch(s, request)
    heads = Heads(s, batch.labels, NAMES_OF_LOSS)
    arguments = _linear_arguments(s, request, batch, heads)
    plan = s.call(qk.plan_linear, heads.leaves["hidden"], heads.leaves["weight"], batch.labels, **arguments)
    valid = int(batch.counts.sum()) if request.ld_alpha != 0 else plan.rows
    check(plan.rows == valid, "plan", f"{plan.rows} rows, expected {valid}")
    check(plan.chunk_rows >= 1 and plan.chunks >= 0 and plan.chunk_bytes > 0, "plan", f"sizes of {plan}")
    check(plan.chunks * plan.chunk_rows >= plan.rows or plan.name == "pair_chunks", "plan", f"too few chunks in {plan}")
    check(bool(str(plan)) and plan.name in str(plan), "plan", "does not print")
    if plan.name == "forward_only":
        check(not heads.trained, "plan", "forward_only, but something trains")
    if arguments["valid_rows"] is None or s.backend not in ("torch",):
        return  # a named backend may not run on meta tensors

    def meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)

    given = {key: meta(value) for key, value in arguments.items()}
    if given["plan"] != "auto" or given["max_chunk_bytes"] is None or s.dtype == torch.float16:
        return  # free memory, and the size of what fp16 is widened to, differ from device to device
    other = s.call(
        qk.plan_linear, meta(heads.leaves["hidden"]), meta(heads.leaves["weight"]), meta(batch.labels), **given
    )
    check(other.name == plan.name and other.rows == plan.rows, "plan", f"{other.name} on the meta device, {plan.name}")


# --- the token MDP, labels --------------------------------------------------------------------------------------------


def token_mdp(case: Case, backend: str) -> None:
    s = Setup({**case, "temperature": 1.0}, backend)
    request = Request(s)
    if request.reference in ("sums", "none"):
        request.reference = "tokens"
    if s["lengths"] is not None:
        batch = Batch(s, request)
        shape, labels, cu_seqlens, sequence = batch.shape, batch.labels, batch.cu_seqlens, batch.sequence
    else:
        shape = tuple(s["rows"])
        labels, cu_seqlens = s.labels(shape), None
        sequence = torch.arange(labels.numel()) // max(1, shape[-1])
    policy, reference = s.logits(shape, labels, ("logits", "reference_logits"))
    given: dict[str, Any] = {"reference_logits": reference}
    live = request.reference == "live"
    if request.reference == "zero":
        given = {"reference_logps": 0.0}
    elif not live:
        values = s.random.normal(*shape) * s["ratio"]
        dtype = DTYPES[s["reference_dtype"]]
        given = {"reference_logps": s.place(values.clamp(-3e4, 3e4).to(dtype), "reference_logps")}
    rows = Rows(s, exact(policy), exact(reference) if live else None, labels, 1.0)
    beta, unit = s["beta"], s.unit
    given |= {"cu_seqlens": cu_seqlens, "ignore_index": s["ignore_index"], "backend": s.backend}
    found = s.call(qk.token_mdp, s.leaf(policy, True), labels, beta=beta, **given)
    logps, lse = rows.stats["logps"], rows.stats["logsumexp"]
    e_logps, e_lse = rows.errors["logps"], rows.errors["logsumexp"]
    if live:
        ref, e_ref = rows.stats["reference_logps"], rows.errors["reference_logps"]
    else:
        ref = exact(given["reference_logps"]) if isinstance(given["reference_logps"], Tensor) else torch.zeros_like(lse)
        e_ref = 2 * unit * ref.abs()
    valid = rows.valid
    ratio = torch.where((logps == -torch.inf) & (ref == -torch.inf), 0.0, logps - ref)
    following, e_following = torch.zeros(valid.numel(), dtype=torch.float64), torch.zeros(valid.numel())
    contaminated = rows.broken.reshape(-1).clone()
    places = valid.reshape(-1).nonzero().view(-1).tolist()
    for here, there in itertools.pairwise(places):
        if sequence[here] == sequence[there]:
            following[here], e_following[here] = lse.reshape(-1)[there], e_lse.reshape(-1)[there]
            contaminated[here] |= bool(rows.broken.reshape(-1)[there])
    following, e_following = following.view(valid.shape), e_following.view(valid.shape)
    e_ratio = e_logps + e_ref + 2 * unit * (logps.abs() + ref.abs()).nan_to_num(posinf=0.0)
    expected = {
        "Q": (logps + lse, e_logps + e_lse),
        "V": (lse, e_lse),
        "A": (logps, e_logps),
        "implicit_rewards": (ratio, e_ratio),
        "bellman_rewards": (ratio + lse - following, e_ratio + e_lse + e_following),
    }
    for name, (value, error) in expected.items():
        actual = getattr(found, name)
        check(actual.dtype == s.wide and actual.shape == labels.shape, name, f"{actual.dtype} {tuple(actual.shape)}")
        check_constant(actual, name)
        size = (logps.abs() + lse.abs() + following.abs() + ref.abs()).nan_to_num(posinf=0.0)
        error = beta * (error + 16 * unit * size)
        where = ~(contaminated.view(valid.shape) if name == "bellman_rewards" else rows.broken)
        compare(actual, torch.where(valid, beta * value, 0.0), torch.where(valid, error, 0.0), name, where)


def shift_labels(case: Case, backend: str) -> None:
    s = Setup(case, backend)
    if s["lengths"] is not None:
        batch = Batch(s, Request(s))
        labels, cu_seqlens, sequence = batch.labels, batch.cu_seqlens, batch.sequence.tolist()
    else:
        labels, cu_seqlens = s.labels(tuple(s["rows"])), None
        sequence = (torch.arange(labels.numel()) // max(1, labels.shape[-1])).tolist()
    mask = None
    if s["mask"] is not None:
        keep = s.random.uniform(*labels.shape) < 0.7
        mask = s.place(keep if s["mask"] == "bool" else keep.long(), "mask")
    found = qk.shift_labels(labels, mask=mask, cu_seqlens=cu_seqlens, ignore_index=s["ignore_index"])
    ids = labels.cpu().reshape(-1).tolist()
    kept = [True] * len(ids) if mask is None else [bool(m) for m in mask.cpu().reshape(-1).tolist()]
    expected = []
    for i in range(len(ids)):
        last = i + 1 == len(ids) or sequence[i + 1] != sequence[i]
        expected.append(s["ignore_index"] if last or not kept[i + 1] else ids[i + 1])
    check(found.dtype == torch.int64 and found.shape == labels.shape, "labels", f"{found.dtype} {tuple(found.shape)}")
    check(found.cpu().reshape(-1).tolist() == expected, "labels", f"{found.reshape(-1).tolist()}, expected {expected}")


CALLS: dict[str, Callable[[Case, str], None]] = {
    "token_logps": token_logps,
    "token_stats": token_stats,
    "fused_token_dpo": fused_token_dpo,
    "linear_token_logps": linear_token_logps,
    "linear_token_stats": linear_token_stats,
    "fused_linear_token_dpo": fused_linear_token_dpo,
    "plan_linear": plan_linear,
    "token_mdp": token_mdp,
    "shift_labels": shift_labels,
}


def run(case: Case, backend: str) -> None:
    """Run one case. Warnings of torch about zero-size tensors and the like are not results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CALLS[case["call"]](case, backend)
