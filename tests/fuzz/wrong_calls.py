"""Malformed arguments: each has to raise an error of the promised kind whose message names the argument.

A case of this kind has a `seed` alone, which picks the function, the argument, and one of the values that are wrong
for it. `all_wrong_calls` lists every combination.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import torch

import qkernels as qk
from fuzz.setup import Case, Mismatch

PROMISED = (ValueError, TypeError, IndexError, RuntimeError)
V, H = 7, 4
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(qk, name)
    for name in (
        "token_logps", "token_stats", "fused_token_dpo", "linear_token_logps", "linear_token_stats",
        "fused_linear_token_dpo", "plan_linear", "token_mdp", "shift_labels", "fused_policy_loss",
        "fused_linear_policy_loss", "plan_linear_policy", "fused_sequence_loss", "fused_linear_sequence_loss",
        "plan_linear_sequences",
    )
}  # fmt: skip
POLICY = ("fused_policy_loss", "fused_linear_policy_loss", "plan_linear_policy")
SEQUENCE = ("fused_sequence_loss", "fused_linear_sequence_loss", "plan_linear_sequences")
FROM_HIDDEN = (*POLICY[1:], *SEQUENCE[1:])
# What takes the arguments of another function by name.
SAME_ARGUMENTS = {
    "plan_linear_policy": "fused_linear_policy_loss",
    "plan_linear_sequences": "fused_linear_sequence_loss",
}


def parameters(function: str) -> list[str]:
    """The names of all arguments."""
    return [*inspect.signature(FUNCTIONS[SAME_ARGUMENTS.get(function, function)]).parameters]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def base(function: str, packed: bool = False, vocab: int = V, size: int = H) -> dict[str, Any]:
    """Arguments of a valid call: two sequences of four rows, logits of `vocab` or hidden states of `size` entries."""
    g = _generator()
    rows = (8,) if packed else (2, 4)
    labels = torch.randint(0, vocab, rows, generator=g)
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    logits, reference = (torch.randn(*rows, vocab, generator=g) for _ in range(2))
    hidden, reference_hidden = (torch.randn(*rows, size, generator=g) for _ in range(2))
    weight, reference_weight = (torch.randn(vocab, size, generator=g) for _ in range(2))
    common: dict[str, Any] = {"labels": labels}
    if function in ("token_logps", "token_stats", "token_mdp"):
        common["logits"] = logits
    if function == "token_stats":
        common |= {"reference_logits": reference, "outputs": ["logps", "entropy", "reference_logps"]}
    if function == "token_mdp":
        common |= {"reference_logits": reference} | ({"cu_seqlens": ends} if packed else {})
    if function == "fused_token_dpo":
        common |= {"policy_logits": logits, "reference_logits": reference} | ({"cu_seqlens": ends} if packed else {})
    if function in ("linear_token_logps", "linear_token_stats"):
        common |= {"hidden": hidden, "weight": weight}
    if function == "linear_token_stats":
        common |= {"reference_hidden": reference_hidden, "reference_weight": reference_weight}
        common["outputs"] = ["logps", "entropy", "reference_logps"]
    if function in ("fused_linear_token_dpo", "plan_linear"):
        common |= {"policy_hidden": hidden, "lm_head_weight": weight} | ({"cu_seqlens": ends} if packed else {})
        common |= {"reference_hidden": reference_hidden, "reference_weight": reference_weight}
    if function in (*POLICY, *SEQUENCE):
        rows_of = {"logits": logits, "reference_logits": reference}
        if function in FROM_HIDDEN:
            rows_of = {"hidden": hidden, "weight": weight}
            rows_of |= {"reference_hidden": reference_hidden, "reference_weight": reference_weight}
        common |= rows_of | ({"cu_seqlens": ends} if packed else {})
        old, sampling = (-3 * torch.rand(*rows, generator=g) for _ in range(2))
        if function in POLICY:
            common |= {"advantages": torch.tensor([1.0, -0.7]), "old_logps": old, "sampling_logps": sampling}
            common |= {"importance_correction": "token_truncate", "beta": 0.1, "outputs": ["entropy"]}
        else:
            common |= {"desirable": torch.tensor([True, False]), "kl": 0.1, "outputs": ["entropy"]}
    if function == "shift_labels" and packed:
        common["cu_seqlens"] = ends
    return common


def _numbers(*more: Any) -> list[Any]:
    """Wrong for a number that has to be finite and above 0."""
    return [0, 0.0, -1.0, math.nan, math.inf, -math.inf, "1", True, None, [1.0], torch.ones(2), *more]


def _logits(name: str) -> list[Any]:
    last = H if "hidden" in name else V
    wrong = [
        None, 3.0, [[1.0]], "x",
        torch.zeros(2, 4, last, dtype=torch.int64), torch.zeros(2, 4, last, dtype=torch.complex64), torch.zeros(()),
        torch.zeros(3), torch.zeros(2, 4, 0), torch.zeros(2, 4, last, device="meta"), torch.zeros(2, 5, last),
        torch.zeros(2, 4, last, 2)[..., 0], torch.zeros(2, 4, 1, last), torch.zeros(2, 4, last).to_sparse(),
        torch.zeros(2, 4, last, dtype=torch.float8_e4m3fn),
    ]  # fmt: skip
    if name.startswith("reference"):  # None means no reference; another kind of error than of a wrong one
        wrong = [w for w in wrong if w is not None] + [torch.zeros(2, 4, last, dtype=torch.float64)]
    return wrong


def _weights(name: str) -> list[Any]:
    wrong = [
        3.0, "x", torch.zeros(V), torch.zeros(H), torch.zeros(V, H + 1), torch.zeros(0, H),
        torch.zeros(V, H, dtype=torch.int64), torch.zeros(V, H, dtype=torch.float64), torch.zeros(V, H, device="meta"),
        torch.zeros(V, H, 1), torch.zeros(V, H).to_sparse(),
    ]  # fmt: skip
    return wrong + ([torch.zeros(V + 1, H), None] if name.startswith("reference") else [None])


WRONG: dict[str, list[Any]] = {
    **{n: _logits(n) for n in ("logits", "policy_logits", "reference_logits")},
    **{n: _logits(n) for n in ("hidden", "policy_hidden", "reference_hidden")},
    **{n: _weights(n) for n in ("weight", "lm_head_weight", "reference_weight")},
    **{
        n: [3.0, "x", torch.zeros(V + 1), torch.zeros(V, 1), torch.zeros(V, dtype=torch.int64),
            torch.zeros(V, device="meta")]
        for n in ("bias", "lm_head_bias", "reference_bias")
    },
    "labels": [
        None, 3, [[1]], "x",
        torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64), torch.zeros(8, dtype=torch.int64), torch.zeros(2, 4, 1, dtype=torch.int64),
        torch.full((2, 4), V), torch.full((2, 4), -1), torch.full((2, 4), 2**63 - 1), torch.full((2, 4), -(2**63)),
        torch.zeros(2, 4, dtype=torch.int64, device="meta"), torch.zeros(2, 4, dtype=torch.int64).to_sparse(),
        torch.zeros(2, 4, dtype=torch.bool),
    ],
    "mask": [3, "x", torch.zeros(2, 5), torch.zeros(()), torch.zeros(2, 4, device="meta")],
    "temperature": _numbers(),
    "logit_scale": _numbers(),
    "softcap": [w for w in _numbers() if w is not None],
    "beta": _numbers(),
    "ignore_index": [1.5, True, "x", None, torch.tensor(-100), math.nan],
    "loss_type": ["nope", "", [], 3, None, ["sigmoid", "nope"], ["sigmoid", 3], "ospo", b"sigmoid", {"sigmoid": 1}],
    "loss_weights": [[1.0, 2.0], [math.nan], [math.inf], [], ["a"], 3.0, [None], "a"],
    "label_smoothing": [-0.1, 1.0, 2, math.nan, math.inf, "a", None, [0.1], torch.ones(2)],
    "loss_kwargs": [
        {"nope": 1}, {"ld_alpha": -0.1}, {"ld_alpha": 1.5}, {"ld_alpha": math.nan}, {"ld_alpha": "a"},
        {"f_divergence": "x"},
        {"f_divergence": None}, {"f_alpha_divergence_coef": 0.5}, {"use_weighting": 1}, {"use_weighting": None},
        {"discopop_tau": 1.0}, {"f_divergence": "alpha", "f_alpha_divergence_coef": math.nan},
        {"f_divergence": "alpha", "f_alpha_divergence_coef": "a"}, 3, "ld_alpha", [1], {3: 4},
    ],
    "token_weights": [
        3.0, [1.0], torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(()), torch.zeros(2, 4, 1),
        torch.ones(2, 4, requires_grad=True), torch.zeros(2, 4, device="meta"),
    ],
    "reduction": ["median", None, 3, "", ["mean"]],
    "reference_logps": [
        1.0, -3, True, "x", [0.0], torch.zeros(3), torch.zeros(2, 5), torch.zeros(()),
        torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, device="meta"), torch.zeros(2, 4, 1), math.nan,
    ],
    "inplace_backward": [1, None, "yes", 0.0],
    "backend": ["nope", "", None, 3, "CPU", ["cpu"]],
    "plan": ["nope", None, 3, "", "forward_only", ["auto"]],
    "max_chunk_bytes": [0, -1, 1, 1.5, "1", True, math.inf],
    "outputs": [[], ["nope"], "logps", ["logps", "nope"], 3, [3], None, ["kl"]],
    "detached": [["nope"], ["kl_policy_reference"], "logps", 3, [3]],
    "cu_seqlens": [
        3, [0, 4, 8], torch.tensor([0, 4, 7], dtype=torch.int32), torch.tensor([1, 4, 8], dtype=torch.int32),
        torch.tensor([0, 9, 8], dtype=torch.int32), torch.tensor([0, 4, 4, 8], dtype=torch.int32),
        torch.tensor([0.0, 4, 8]),
        torch.tensor([0, 4, 8], dtype=torch.int16), torch.tensor([[0, 4, 8]], dtype=torch.int32),
        torch.tensor(8, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32),
        torch.tensor([0, -4, 8], dtype=torch.int32), torch.tensor([0, 4, 8], dtype=torch.int32, device="meta"),
    ],
    "logits_dtype": ["bfloat16", "float16", "", None, 16, torch.float32, ["input"]],
    "advantages": [
        None, 1.0, [1.0, -1.0], "x", torch.zeros(3), torch.zeros(()), torch.zeros(2, 5), torch.zeros(2, 4, 1),
        torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, device="meta"),
    ],
    **{
        n: [3.0, "x", [0.0], torch.zeros(3), torch.zeros(2), torch.zeros(()), torch.zeros(2, 5), torch.zeros(2, 4, 1),
            torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, device="meta")]
        for n in ("old_logps", "sampling_logps")
    },
    "on_policy": [1, None, "yes", 0.0, True],
    "epsilon": [-0.1, 1.0, math.nan, math.inf, "1", True, [0.1], torch.ones(2)],
    "epsilon_high": [-0.1, math.nan, math.inf, "1", True, [0.1], torch.ones(2)],
    "delta": [0, -0.1, math.nan, math.inf, "1", True, [0.1], torch.ones(2)],
    "importance_sampling_level": ["nope", "", 3, True, ["token"]],
    "importance_correction": ["nope", "", 3, True, ["token_mask"]],
    **{n: [-0.1, math.nan, math.inf, "1", True, [0.1], torch.ones(2)] for n in ("correction_min", "correction_max")},
    "entropy_coef": [math.nan, math.inf, "1", True, None, [0.1], torch.ones(2)],
    "num_items_in_batch": [-1, math.nan, math.inf, "1", True, [8], torch.ones(2)],
    "max_completion_length": [0, -1, 1.5, "1", True, None, [8]],
    "desirable": [
        None, True, [True, False], "x", torch.ones(2), torch.ones(2, dtype=torch.int64),
        torch.ones(3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool), torch.tensor(True),
        torch.ones(2, dtype=torch.bool, device="meta"),
    ],
    "kl": [-1.0, math.nan, math.inf, "1", True, [0.1], torch.ones(2), torch.tensor(-1.0)],
    **{
        n: [3.0, "x", [0.0], None, torch.zeros(3), torch.zeros(()), torch.zeros(0), torch.zeros(2, 1),
            torch.zeros(2, dtype=torch.int64), torch.zeros(2, device="meta")]
        for n in ("kl_logps", "kl_reference_logps")
    },
    "tp_group": [3, "x"],
    "sp_group": [3, "x"],
}  # fmt: skip
WRONG_COUNT = [9, 7, -1, 1.5, "x", True, [1, 2], torch.tensor([8, 8])]
WRONG_COUNTS = [8, [4], [4, 5], [5, 4], [4, 4, 4], [-1, 9], [4.0, 4], ["x", 4], "x", [True, 4], 1.5, torch.tensor(8)]


def _fine(function: str, argument: str, wrong: Any) -> bool:
    """Whether the value is a right one for this function after all: `shift_labels` takes ids of any shape and value."""
    dense = isinstance(wrong, torch.Tensor) and wrong.layout == torch.strided
    return (
        function == "shift_labels" and argument == "labels" and dense and wrong.dtype == torch.int64 and wrong.dim() > 0
    )


def all_wrong_calls() -> list[tuple[str, str, int]]:
    """Every function, argument and number of a wrong value."""
    found = []
    for function in FUNCTIONS:
        for argument in parameters(function):
            for i, wrong in enumerate(values(function, argument)):
                if not _fine(function, argument, wrong):
                    found.append((function, argument, i))
    return found


def values(function: str, argument: str) -> list[Any]:
    """Wrong values of an argument; KeyError for one that the table lacks."""
    if argument == "valid_rows":
        of_sequences = function in ("fused_linear_token_dpo", "plan_linear", *FROM_HIDDEN)
        return WRONG_COUNTS if of_sequences else WRONG_COUNT
    wrong = WRONG[argument]
    if function in (*POLICY, *SEQUENCE):
        if argument == "outputs":  # none are the default
            return wrong[1:]
        if argument == "cu_seqlens":  # an odd number of sequences is one too many for the other arguments only
            return [w for w in wrong if not (isinstance(w, torch.Tensor) and w.shape == (4,))]
    if function in POLICY:
        if argument == "beta":  # no penalty
            return wrong[2:]
        if argument == "reduction":  # the loss's own
            return [w for w in wrong if w is not None]
    return wrong


def arguments(function: str, argument: str, wrong: Any) -> dict[str, Any]:
    """A valid call but for one argument."""
    given = base(function, packed=argument == "cu_seqlens")
    if argument == "reference_logps":
        for name in ("reference_logits", "reference_hidden", "reference_weight"):
            given.pop(name, None)
    if argument == "num_items_in_batch":
        given["reduction"] = "items"
    if argument == "max_completion_length":
        given["reduction"] = "fixed_length"
    if argument in ("kl_logps", "kl_reference_logps"):
        del given["kl"]
        given |= {"kl_logps": torch.zeros(2), "kl_reference_logps": torch.zeros(2)}
    if argument == "label_smoothing":
        given["loss_type"] = "sigmoid"
    given[argument] = wrong
    return given


# Errors in which the argument is called by what it belongs to.
ALSO = {
    "f_divergence": "loss_kwargs",
    "reference_bias": "reference",
    "tp_group": "group",
    "sp_group": "group",
    "loss_kwargs": "loss_kwargs|ld_alpha|f_divergence|use_weighting|discopop_tau",
    "valid_rows": "valid_rows",
    "hidden": "hidden",
    "kl_logps": "kl_reference_logps",
}


def attempt(function: str, argument: str, number: int, backend: str = "auto") -> None:
    """Make one wrong call; `Mismatch` unless it is refused as promised."""
    wrong = values(function, argument)[number]
    given = arguments(function, argument, wrong)
    if argument != "backend" and "backend" in parameters(function):
        given["backend"] = backend
    shown = f"{function}({argument}={_shown(wrong)})"
    try:
        FUNCTIONS[function](**given)
    except PROMISED as error:
        names = [argument, *ALSO.get(argument, "").split("|")]
        if any(name and name in str(error) for name in names):
            return
        raise Mismatch(shown, f"{type(error).__name__} does not name {argument}: {error}") from None
    except Exception as error:
        raise Mismatch(shown, f"raised {type(error).__name__}: {error}") from None
    raise Mismatch(shown, "was taken")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.device} {value.layout}"
    return repr(value)


def run(case: Case, backend: str) -> None:
    """The wrong call that the case's seed picks."""
    function, argument, number = random.Random(case.get("seed", 0)).choice(all_wrong_calls())
    attempt(function, argument, number, backend)
