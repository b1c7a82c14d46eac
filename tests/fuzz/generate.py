"""Random cases: seed and number -> a dict of plain values, in which only what is not the default is written."""

from __future__ import annotations

import random
from typing import Any

import oracle
from fuzz import formulas
from fuzz.setup import DEFAULTS, Case
from fuzz.tensors import LAYOUTS, ROW_LAYOUTS

# How often each function is called; the losses have the most options.
SHARES = {
    "token_logps": 8,
    "token_stats": 14,
    "fused_token_dpo": 26,
    "linear_token_logps": 8,
    "linear_token_stats": 10,
    "fused_linear_token_dpo": 26,
    "plan_linear": 3,
    "token_mdp": 6,
    "shift_labels": 3,
    "wrong_call": 10,
}

ROW_ARGUMENTS = {
    "token_logps": ("logits",),
    "token_stats": ("logits", "reference_logits"),
    "fused_token_dpo": ("policy_logits", "reference_logits"),
    "linear_token_logps": ("hidden",),
    "linear_token_stats": ("hidden", "reference_hidden"),
    "fused_linear_token_dpo": ("policy_hidden", "reference_hidden"),
    "plan_linear": ("policy_hidden", "reference_hidden"),
    "token_mdp": ("logits", "reference_logits"),
    "shift_labels": (),
}
OTHER_ARGUMENTS = {
    "token_logps": ("labels",),
    "token_stats": ("labels",),
    "fused_token_dpo": ("labels", "token_weights", "reference_logps", "cu_seqlens"),
    "linear_token_logps": ("labels", "weight", "bias"),
    "linear_token_stats": ("labels", "weight", "bias", "reference_weight", "reference_bias"),
    "fused_linear_token_dpo": (
        "labels", "lm_head_weight", "lm_head_bias", "reference_weight", "reference_bias", "token_weights",
        "reference_logps", "cu_seqlens",
    ),
    "plan_linear": ("labels", "lm_head_weight", "token_weights", "cu_seqlens"),
    "token_mdp": ("labels", "reference_logps", "cu_seqlens"),
    "shift_labels": ("labels", "mask", "cu_seqlens"),
}  # fmt: skip


def _vocab(r: random.Random, rows: int, small: bool) -> int:
    """Mostly small; sometimes of many vectors; rarely as large as those of today's models."""
    kind = r.random()
    if kind < 0.75 or (small and kind < 0.97):
        return r.choice([1, 2, 3, 5, 7, 8, 11, 16, 17, 31, 33, 40])
    if kind < 0.95 or small:
        return r.randint(41, 1300)
    if kind < 0.985:
        return r.randint(1301, 9000)
    return r.randint(9001, 70000) if rows <= 12 else r.randint(1301, 5000)


def _few_rows(case: Case) -> None:
    """At most about six rows: an interpreter or an emulation takes tens of milliseconds for each."""
    if "rows" in case:
        case["rows"] = [min(n, 6 if len(case["rows"]) == 1 else 2) for n in case["rows"]]
    if "pairs" in case:
        case["pairs"], case["length"] = min(case["pairs"], 2), min(case["length"], 2)
    if "lengths" in case:
        case["lengths"] = [min(n, 2) for n in case["lengths"][:4]]


def _lengths(r: random.Random, limit: int) -> list[int]:
    return [r.choice([0, 0, 1, 1, 2, 3, 4, r.randint(0, limit)]) for _ in range(2 * r.randint(1, 4))]


def _loss(r: random.Random, case: Case) -> None:
    normalised = ("ipo", "sigmoid_norm", "simpo")  # twice: they alone divide by numbers of tokens
    names = r.sample(formulas.NAMES, 2) if r.random() < 0.2 else [r.choice(formulas.NAMES + normalised)]
    if r.random() < 0.2:
        names = ["sigmoid"]
    case["loss"] = names
    if len(names) > 1 or r.random() < 0.1:
        case["loss_weights"] = [round(r.uniform(-0.5, 2.0), 3) for _ in names] if r.random() < 0.7 else None
    if r.random() < 0.35:
        case["label_smoothing"] = r.choice([0.0, 0.01, 0.1, 0.3, 0.49])
    kwargs: dict[str, Any] = {}
    if r.random() < 0.4:
        kwargs["ld_alpha"] = r.choice([0, 0.0, 0.0, 0.3, 0.5, 1.0, 1])
    if r.random() < 0.15:
        kwargs["use_weighting"] = True
    if r.random() < 0.3:
        kwargs["f_divergence"] = r.choice([*formulas.DIVERGENCES, "js", "alpha"])
        if r.random() < 0.6:
            kwargs["f_alpha_divergence_coef"] = r.choice([0.0, 0.5, 0.9, 1.0, 1.5, -0.5])
    if r.random() < 0.3:
        kwargs["discopop_tau"] = r.choice([0.01, 0.05, 0.5, 1.0, 2.0])
        kwargs["alpha"] = r.choice([0.0, 0.3, 1.0])
        kwargs["gamma"] = r.choice([0.0, 0.5, 1.5])
    case["loss_kwargs"] = kwargs
    case["beta"] = r.choice([0.1, 0.1, 0.01, 0.5, 1.0, 5.0])
    case["reference"] = r.choice(["live", "live", "tokens", "tokens", "sums", "zero", "none"])
    case["reference_dtype"] = r.choice(["float32", "float32", "bfloat16", "float16", "float64"])
    case["ratio"] = r.choice([1.0, 1.0, 3.0, 10.0, 90.0, 300.0, 1e3, 1e5])
    case["reduction"] = r.choice(["mean", "mean", "sum", "none"])
    if r.random() < 0.4:
        case["weights"] = r.choice(["float32", "bfloat16", "float16", "float64", "bool"])
    if r.random() < 0.35:
        case["lengths"] = _lengths(r, 9)
    else:
        case["pairs"], case["length"] = r.randint(1, 4), r.choice([0, 1, 1, 2, 3, 4, 5, r.randint(0, 16)])


def _head(r: random.Random, case: Case) -> None:
    case["hidden"] = r.choice([1, 2, 4, 5, 8, 16, 33])
    if r.random() < 0.2:
        case["reference_hidden"] = r.choice([1, 3, 8])
    case["bias"] = r.random() < 0.4
    if r.random() < 0.25:
        case["softcap"] = r.choice([1.0, 3.0, 30.0])
    if r.random() < 0.25:
        case["logit_scale"] = r.choice([0.0625, 0.5, 2.0])
    case["trains"] = r.choice(["hwb", "hwb", "h", "w", "hw", "b", ""])
    case["plan"] = r.choice(["auto", "auto", "frozen_head", "pair_chunks", "recompute"])
    if r.random() < 0.5:
        case["chunk_rows"] = r.randint(1, 7)
    case["valid_rows"] = r.random() < 0.25


def _outputs(r: random.Random) -> list[str]:
    kind = r.random()
    if kind < 0.25:
        return list(oracle.STATS)
    if kind < 0.5:
        return [r.choice(oracle.STATS)]
    return r.sample(oracle.STATS, r.randint(1, 5))


def draw(seed: int, number: int, backend: str) -> Case:
    """Case `number` of a run; it depends on the three arguments alone."""
    r = random.Random(f"{seed}/{number}")
    call = r.choices(list(SHARES), list(SHARES.values()))[0]
    case: Case = {"call": call, "seed": r.randrange(10**6)}
    if call == "wrong_call":
        return case
    small = backend in ("triton", "cuda")
    dtypes = ["float32"] * 4 + ["bfloat16"] * 3 + ["float16"] * 2 + (["float64"] * 2 if backend == "torch" else [])
    case["dtype"] = r.choice(dtypes)
    case["ignored"] = r.choice([0.0, 0.0, 0.2, 0.5, 1.0])
    case["ignore_index"] = r.choice([-100, -100, -100, -1, 0, 7, 2**40])
    case["poison"] = r.random() < 0.3
    case["equal"] = r.random() < 0.08
    case["scale"] = r.choice([3.0, 3.0, 3.0, 0.0, 0.1, 30.0, 1e3, 1e6, 1e30])
    case["temperature"] = r.choice([1.0, 1.0, 0.7, 2.0, 0.05])
    case["grad"] = r.random() < 0.93
    case["mode"] = r.choice(["no_grad", "inference_mode"]) if r.random() < 0.06 else None
    case["twice"] = r.random() < 0.15
    case["inplace"] = r.random() < 0.25
    case["upstream"] = r.choice(["one", "random"])
    rows_call = call in ("token_logps", "token_stats", "linear_token_logps", "linear_token_stats")
    if rows_call or call in ("token_mdp", "shift_labels"):
        shape = [r.randint(0, 4), r.choice([0, 1, 1, 2, 3, 4, 5, 9])] if r.random() < 0.6 else [r.randint(0, 12)]
        if r.random() < 0.15:
            shape = [r.randint(1, 3), *shape]
        case["rows"] = shape
    if call in ("fused_token_dpo", "fused_linear_token_dpo", "plan_linear"):
        _loss(r, case)
    if call in ("linear_token_logps", "linear_token_stats", "fused_linear_token_dpo", "plan_linear"):
        _head(r, case)
        if r.random() < 0.02:
            case["broken"] = r.choice(["nan", "inf"])
    else:
        if r.random() < 0.2:
            case["masked"] = r.choice([0.1, 0.5, 1.0])
            case["masked_label"] = call in ("token_logps", "token_stats", "token_mdp") and r.random() < 0.3
        if r.random() < 0.1:
            case["broken"] = r.choice(["nan", "inf", "-inf"])
    if call in ("token_stats", "linear_token_stats"):
        case["outputs"] = _outputs(r)
        if r.random() < 0.3:
            case["detached"] = r.sample(oracle.WITH_GRADIENT, 2)
        case["reference_dtype"] = r.choice(["float32", "bfloat16", "float16"])
    if call in ("token_mdp", "shift_labels"):
        case["reference"] = r.choice(["live", "tokens", "zero"])
        case["reference_dtype"] = r.choice(["float32", "bfloat16", "float16", "float64"])
        case["ratio"] = r.choice([1.0, 10.0, 1e3])
        if r.random() < 0.4:
            case["lengths"] = _lengths(r, 9)
        case["mask"] = r.choice([None, "bool", "int64"])
    layouts = {}
    for name in ROW_ARGUMENTS[call]:
        if r.random() < 0.5:
            layouts[name] = r.choice(ROW_LAYOUTS)
    for name in OTHER_ARGUMENTS[call]:
        if r.random() < 0.5:
            layouts[name] = r.choice(LAYOUTS)
    case["layouts"] = layouts
    if small:
        _few_rows(case)
    number_of_rows = 1
    for n in case.get("rows", [2 * case.get("pairs", 1), case.get("length", 3)]):
        number_of_rows *= n
    if case.get("lengths"):
        number_of_rows = sum(case["lengths"])
    case["vocab"] = _vocab(r, number_of_rows, small)
    if call in ("token_stats", "linear_token_stats", "token_mdp") and case["scale"] > 1e6 and r.random() < 0.5:
        case["scale"] = 1e6
    return {key: value for key, value in case.items() if key == "call" or DEFAULTS.get(key) != value}
