"""Two installations of qkernels beside each other: the same calls give the same bits.

    python -m bench.compare_installs A B

A and B are Python interpreters with qkernels installed, or source trees with the extension built in place. In each, the
same grid of calls runs with the same inputs on the CPU: every public function, loss, plan, dtype and layout, on the
backends `cpu` and `torch`. Losses, per-token results and gradients are compared bit for bit. The exit status is 0 if
all are equal, 1 if any differs (the first difference is printed), 2 if an installation could not run the calls.

A call that raises counts as its type of error, so wording may differ.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BACKENDS = ("cpu", "torch")
Call = Callable[[], dict[str, Tensor | None]]


# --- inputs: the same in both, drawn from a key that names them -------------------------------------------------------


def normal(*shape: int, key: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(7919 * key + sum(shape))
    return torch.randn(shape, generator=generator)


def labels_of(shape: tuple[int, ...], vocab: int) -> Tensor:
    """int64 labels: prompts, padding and some rows in between are ignored; the first and the last column occur."""
    generator = torch.Generator().manual_seed(vocab + sum(shape))
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = IGNORE
    labels.view(-1)[0], labels.view(-1)[-1] = vocab - 1, 0
    return labels


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of their own: "whole", rows "apart", or beginning at an odd "offset"."""
    if layout == "whole":
        return values.clone()
    pitch, offset = (values.shape[-1] + 5, 0) if layout == "apart" else (values.shape[-1], 3)
    rows = values.reshape(-1, values.shape[-1])
    memory = torch.zeros(offset + rows.shape[0] * pitch, dtype=values.dtype)
    strides = [1, pitch]
    for size in reversed(values.shape[1:-1]):
        strides.append(strides[-1] * size)
    view = memory.as_strided(values.shape, tuple(reversed(strides)), offset)
    view.copy_(values)
    return view


# --- calls ------------------------------------------------------------------------------------------------------------


def results(named: dict[str, Any], outputs: list[Tensor], leaves: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The results, and the gradients of the outputs' sum with a weight for each entry."""
    total = sum((normal(*out.shape, key=3).to(out.dtype) * out).sum() for out in outputs if out.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    found = {name: value.detach() if isinstance(value, Tensor) else None for name, value in named.items()}
    for name, leaf in leaves.items():
        found[f"gradient of {name}"] = None if leaf is None else leaf.grad
    return found


def rows(qk: Any, backend: str, dtype: torch.dtype, layout: str, vocab: int, temperature: float) -> Call:
    """`token_stats` with all outputs, `token_logps`, and the gradient over the logits' own storage."""

    def call() -> dict[str, Tensor | None]:
        logits = laid_out((3 * normal(4, 5, vocab, key=1)).to(dtype), layout)
        reference = laid_out((3 * normal(4, 5, vocab, key=2)).to(dtype), layout)
        labels, leaf = labels_of((4, 5), vocab), logits.requires_grad_()
        how = {"temperature": temperature, "backend": backend}
        stats = qk.token_stats(leaf, labels, reference_logits=reference, outputs=qk.TokenStats._fields, **how)
        found = results(stats._asdict(), [out for out in stats if out.is_floating_point()], {"logits": leaf})
        again = laid_out(logits.detach(), layout).requires_grad_()
        logps = qk.token_logps(again, labels, inplace_backward=True, **how)
        more = results({"logps": logps}, [logps], {"logits, in place": again})
        return found | {f"token_logps: {name}": value for name, value in more.items()}

    return call


def pairs_of(size: int, dtype: torch.dtype, packed: bool, key: int) -> tuple[Tensor, Tensor | None]:
    """`[2B, T, size]` or `[N, size]` with its `cu_seqlens`, of 3 pairs."""
    if packed:
        ends = torch.tensor([0, 4, 11, 11, 13, 20, 26], dtype=torch.int32)
        return normal(26, size, key=key).to(dtype), ends
    return normal(6, 5, size, key=key).to(dtype), None


def preference(qk: Any, backend: str, dtype: torch.dtype, packed: bool, loss: dict[str, Any], reference: str) -> Call:
    """`fused_token_dpo`."""

    def call() -> dict[str, Tensor | None]:
        logits, ends = pairs_of(67, dtype, packed, 11)
        other = pairs_of(67, dtype, packed, 12)[0]
        labels = labels_of(tuple(logits.shape[:-1]), 67)
        leaf = logits.requires_grad_()
        out = qk.fused_token_dpo(
            leaf, labels, cu_seqlens=ends, backend=backend, **given(reference, {"reference_logits": other}, labels),
            **weighted(loss, labels),
        )  # fmt: skip
        return results(out._asdict(), [out.loss], {"logits": leaf})

    return call


def given(reference: str, live: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """The reference as arguments: a model "computed" in the call, log-probs "per token", "per sequence", or "none"."""
    if reference == "computed":
        return live
    if reference == "per token":
        return {"reference_logps": -3 * normal(*labels.shape, key=13).abs()}
    if reference == "per sequence":
        return {"reference_logps": -9 * normal(6, key=14).abs()}
    return {"reference_logps": 0.0}


def weighted(loss: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """The loss' arguments, with token weights where it says so."""
    options = dict(loss)
    if options.pop("weighted", False):
        options["token_weights"] = normal(*labels.shape, key=15).abs()
    return options


def from_hidden(
    qk: Any, backend: str, dtype: torch.dtype, packed: bool, loss: dict[str, Any], reference: str, head: dict[str, Any]
) -> Call:
    """`fused_linear_token_dpo`, with `plan_linear`'s name of the plan."""

    def call() -> dict[str, Tensor | None]:
        options, size, vocab = dict(head), 16, 67
        hidden, ends = pairs_of(size, dtype, packed, 21)
        weight, bias = (normal(vocab, size, key=22) / 2).to(dtype), normal(vocab, key=23).to(dtype)
        live = {
            "reference_hidden": pairs_of(size, dtype, packed, 24)[0],
            "reference_weight": (normal(vocab, size, key=25) / 2).to(dtype),
            "reference_bias": normal(vocab, key=26).to(dtype),
        }
        labels = labels_of(tuple(hidden.shape[:-1]), vocab)
        hidden.requires_grad_()
        if not options.pop("frozen", False):
            weight.requires_grad_()
            bias.requires_grad_()
        how = {
            "lm_head_bias": bias, "cu_seqlens": ends, "backend": backend, **given(reference, live, labels),
            **weighted(loss, labels), **options,
        }  # fmt: skip
        plan = qk.plan_linear(hidden, weight, labels, **how)
        out = qk.fused_linear_token_dpo(hidden, weight, labels, **how)
        found = results(out._asdict(), [out.loss], {"hidden": hidden, "weight": weight, "bias": bias})
        facts = torch.tensor([*plan.name.encode(), *(x for x in plan if isinstance(x, int))])
        return found | {"plan": facts}

    return call


def head_rows(
    qk: Any, backend: str, dtype: torch.dtype, frozen: bool, head: dict[str, Any], length: int, size: int, vocab: int
) -> Call:
    """`linear_token_stats` with all outputs, and `linear_token_logps`."""

    def call() -> dict[str, Tensor | None]:
        shape, how = (4, length, size), dict(head)
        if "max_chunk_bytes" in how:
            how["max_chunk_bytes"] *= vocab // 67
        hidden, weight = normal(*shape, key=31).to(dtype), (2 * size**-0.5 * normal(vocab, size, key=32)).to(dtype)
        bias, labels = normal(vocab, key=33).to(dtype), labels_of(shape[:2], vocab)
        reference = {"reference_hidden": normal(*shape, key=34).to(dtype), "reference_weight": weight.clone()}
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        for leaf in (hidden,) if frozen else (hidden, weight, bias):
            leaf.requires_grad_()
        stats = qk.linear_token_stats(
            hidden, weight, labels, bias=bias, outputs=qk.TokenStats._fields, backend=backend, **reference,
            reference_bias=bias.detach().clone(), **how,
        )  # fmt: skip
        found = results(stats._asdict(), [out for out in stats if out.is_floating_point()], leaves)
        for leaf in leaves.values():
            leaf.grad = None
        logps = qk.linear_token_logps(hidden, weight, labels, bias=bias, backend=backend, **how)
        more = results({"logps": logps}, [logps], leaves)
        return found | {f"linear_token_logps: {name}": value for name, value in more.items()}

    return call


def mdp(qk: Any, backend: str, dtype: torch.dtype, packed: bool, reference: str) -> Call:
    """`token_mdp`, and `shift_labels` before it."""

    def call() -> dict[str, Tensor | None]:
        logits, ends = pairs_of(31, dtype, packed, 41)
        labels = qk.shift_labels(labels_of(tuple(logits.shape[:-1]), 31), cu_seqlens=ends)
        how = given(reference, {"reference_logits": pairs_of(31, dtype, packed, 42)[0]}, labels)
        out = qk.token_mdp(logits, labels, beta=0.3, cu_seqlens=ends, backend=backend, **how)
        return {"labels": labels, **out._asdict()}

    return call


def policy(qk: Any, backend: str, dtype: torch.dtype, packed: bool, loss: dict[str, Any]) -> Call:
    """`fused_policy_loss`, and `fused_linear_policy_loss` with the name of its plan."""

    def call() -> dict[str, Tensor | None]:
        labels = labels_of((26,) if packed else (6, 5), 67)
        own = {
            "advantages": normal(6, key=51), "old_logps": -4 - 0.3 * normal(*labels.shape, key=52).abs(),
            "reference_logps": -4 - 0.3 * normal(*labels.shape, key=53).abs(), "backend": backend, **loss,
        }  # fmt: skip
        return by_unit(
            labels, (dtype, packed),
            lambda logits, ends: qk.fused_policy_loss(logits, labels, cu_seqlens=ends, **own),
            lambda *head, ends: qk.fused_linear_policy_loss(*head, labels, cu_seqlens=ends, **own),
            lambda *head, ends: qk.plan_linear_policy(*head, labels, cu_seqlens=ends, **own),
        )  # fmt: skip

    return call


def unpaired(qk: Any, backend: str, dtype: torch.dtype, packed: bool, loss: dict[str, Any]) -> Call:
    """`fused_sequence_loss`, and `fused_linear_sequence_loss` with the name of its plan."""

    def call() -> dict[str, Tensor | None]:
        labels = labels_of((26,) if packed else (6, 5), 67)
        own = {"reference_logps": -4 - 0.3 * normal(*labels.shape, key=53).abs(), "backend": backend, **loss}
        given = (labels, torch.tensor([True, False, True, True, False, False]))
        return by_unit(
            labels, (dtype, packed),
            lambda logits, ends: qk.fused_sequence_loss(logits, *given, cu_seqlens=ends, **own),
            lambda *head, ends: qk.fused_linear_sequence_loss(*head, *given, cu_seqlens=ends, **own),
            lambda *head, ends: qk.plan_linear_sequences(*head, *given, cu_seqlens=ends, **own),
        )  # fmt: skip

    return call


def by_unit(
    labels: Tensor,
    how: tuple[torch.dtype, bool],
    rows: Callable[..., Any],
    linear: Callable[..., Any],
    plan_of: Callable[..., Any],
) -> dict[str, Tensor | None]:
    """A loss of tokens or sequences from logits and from hidden states, and its plan."""
    logits, ends = pairs_of(67, *how, 54)
    hidden, weight = pairs_of(16, *how, 55)[0], (normal(67, 16, key=56) / 2).to(how[0])
    for leaf in (logits, hidden, weight):
        leaf.requires_grad_()
    out = rows(logits, ends)
    found = results(flat(out), [out.loss], {"logits": logits})
    plan = plan_of(hidden, weight, ends=ends)
    out = linear(hidden, weight, ends=ends)
    more = results(flat(out), [out.loss], {"hidden": hidden, "weight": weight})
    facts = torch.tensor([*plan.name.encode(), *(x for x in plan if isinstance(x, int))])
    return found | {f"linear: {name}": value for name, value in more.items()} | {"plan": facts}


def flat(out: Any) -> dict[str, Any]:
    """The fields of a result, and those of the results in it."""
    found: dict[str, Any] = {}
    for name, value in out._asdict().items():
        inner = flat(value) if hasattr(value, "_asdict") else None
        found |= {name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return found


def policies_of(qk: Any) -> dict[str, dict[str, Any]]:
    """Every policy loss with the arguments that select it; none where an installation has none."""
    if not hasattr(qk, "fused_linear_policy_loss"):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, objective in qk.objectives.POLICY_OBJECTIVES.items():
        length = {"max_completion_length": 9} if objective.reduction == "fixed_length" else {}
        found[name] = {"loss_type": name, "beta": 0.1, **length}
    found["grpo, with an entropy bonus"] = {"entropy_coef": 0.01, "outputs": ("entropy",)}
    return found


def unpaired_of(qk: Any) -> dict[str, dict[str, Any]]:
    """Every loss on plain sequences with the arguments that select it; none where an installation has none."""
    if not hasattr(qk, "fused_linear_sequence_loss"):
        return {}
    found = {}
    for name, objective in qk.objectives.SEQUENCE_OBJECTIVES.items():
        found[name] = {"loss_type": name, "beta": 0.3, **({"kl": 0.1} if objective.needs_kl else {})}
    return found


def losses_of(qk: Any) -> dict[str, dict[str, Any]]:
    """Every loss with the arguments that select it, and the options that act on all of them."""
    found: dict[str, dict[str, Any]] = {}
    for name, objective in qk.objectives.OBJECTIVES.items():
        smoothing = {"label_smoothing": 0.1} if objective.smoothing else {}
        found[name] = {"loss_type": name, "beta": 0.3, **smoothing}
    for name in qk.objectives.F_DIVERGENCES:
        found[f"sigmoid, {name}"] = {"loss_kwargs": {"f_divergence": name}}
    found["the default"] = {}
    found["the default, weighted"] = {"weighted": True, "label_smoothing": 0.2}
    found["a sum"] = {"reduction": "sum", "beta": 0.5}
    found["one per pair"] = {"reduction": "none", "weighted": True}
    found["a mixture"] = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    found["discounted tails"] = {"loss_kwargs": {"ld_alpha": 0.5}, "weighted": True}
    found["WPO"] = {"loss_kwargs": {"use_weighting": True}}
    found["warm"] = {"temperature": 1.7, "loss_type": "simpo"}
    return found


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"frozen": True},
    "softcap": {"softcap": 3.0, "logit_scale": 0.7},
    "recompute": {"plan": "recompute"},
    "pairs": {"plan": "pair_chunks"},
    "small chunks": {"max_chunk_bytes": 2048},
}


def grid(qk: Any) -> Iterator[tuple[str, Call]]:
    """Every call with a name of its own."""
    losses = losses_of(qk)
    references = ("computed", "per token", "per sequence", "none")
    for backend in BACKENDS:
        dtypes = (FP32, BF16, FP16, FP64) if backend == "torch" else (FP32, BF16, FP16)
        for dtype in dtypes:
            run = f"{backend}, {str(dtype).removeprefix('torch.')}"
            shapes = itertools.product(("whole", "apart", "offset"), (2, 67, 1003, 4099), (1.0, 0.7))
            for layout, vocab, temperature in shapes:
                name = f"rows: {run}, {layout}, vocabulary of {vocab}, temperature {temperature}"
                yield name, rows(qk, backend, dtype, layout, vocab, temperature)
            for packed, reference in itertools.product((False, True), references):
                where = f"{run}, {'packed' if packed else 'dense'}, reference {reference}"
                yield f"token_mdp: {where}", mdp(qk, backend, dtype, packed, reference)
                for loss, options in losses.items():
                    name = f"fused_token_dpo: {where}, {loss}"
                    yield name, preference(qk, backend, dtype, packed, options, reference)
                    for head, how in HEADS.items():
                        name = f"fused_linear_token_dpo: {where}, {loss}, {head}"
                        yield name, from_hidden(qk, backend, dtype, packed, options, reference, how)
            for packed in (False, True):
                where = f"{run}, {'packed' if packed else 'dense'}"
                for loss, options in policies_of(qk).items():
                    yield f"fused_policy_loss: {where}, {loss}", policy(qk, backend, dtype, packed, options)
                for loss, options in unpaired_of(qk).items():
                    yield f"fused_sequence_loss: {where}, {loss}", unpaired(qk, backend, dtype, packed, options)
            heads, frozen_or_not = ("plain", "softcap", "small chunks"), (False, True)
            for head, frozen, shape in itertools.product(heads, frozen_or_not, ((5, 16, 67), (40, 96, 1003))):
                where = f"{run}, {head}, {'frozen' if frozen else 'trained'} head, {shape}"
                yield f"linear_token_stats: {where}", head_rows(qk, backend, dtype, frozen, HEADS[head], *shape)


def record(path: Path, only: str) -> None:
    """Run the calls whose name holds `only` in this process, and save what they return."""
    import qkernels

    torch.set_num_threads(1)
    found: dict[str, dict[str, Tensor | None] | str] = {}
    for name, call in grid(qkernels):
        if only in name:
            try:
                found[name] = call()
            except Exception as error:  # an error is a result too
                found[name] = type(error).__name__
    torch.save({"package": str(Path(qkernels.__file__).parent), "calls": found}, path)


# --- comparison -------------------------------------------------------------------------------------------------------


def difference(a: Any, b: Any) -> str | None:
    """What the first difference between two results of a call is; None if they are equal bit for bit."""
    if isinstance(a, str) or isinstance(b, str):
        shown = [x if isinstance(x, str) else "no error" for x in (a, b)]
        return None if shown[0] == shown[1] else f"{shown[0]} and {shown[1]}"
    if a.keys() != b.keys():
        return f"results {sorted(a)} and {sorted(b)}"
    for name in a:
        x, y = a[name], b[name]
        if x is None or y is None:
            if x is not y:
                return f"{name}: {'None' if x is None else 'a tensor'} and {'None' if y is None else 'a tensor'}"
            continue
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"{name}: {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        unequal = (bits(x) != bits(y)).reshape(*x.shape, -1).any(-1).nonzero()
        if len(unequal):
            at = tuple(unequal[0].tolist())
            return f"{name}: {len(unequal)} of {x.numel()} entries; at {at} {x[at].item()!r} and {y[at].item()!r}"
    return None


def bits(values: Tensor) -> Tensor:
    """The bytes of every entry."""
    return values.contiguous().view(-1).view(torch.uint8)


def run_in(installation: str, path: Path, only: str) -> None:
    """`record` in the given interpreter, or in this one with the given source tree before everything else."""
    place = Path(installation)
    python, environment = installation, dict(os.environ)
    if place.is_dir():
        python = sys.executable
        environment["PYTHONPATH"] = os.pathsep.join([str(place.resolve()), environment.get("PYTHONPATH", "")])
    else:
        environment.pop("PYTHONPATH", None)
    # From an empty folder, so that no source tree is imported that was not asked for.
    with tempfile.TemporaryDirectory() as empty:
        subprocess.run(
            [python, "-W", "ignore", str(Path(__file__).resolve()), "--record", str(path), "--only", only],
            env=environment, cwd=empty, check=True,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare_installs", description=__doc__.split("\n")[0])
    parser.add_argument("installations", nargs="*", metavar="PYTHON or SOURCE_TREE", help="the two to compare")
    parser.add_argument("--only", default="", metavar="TEXT", help="the calls whose name holds this text")
    parser.add_argument("--record", type=Path, metavar="FILE", help="run the calls here and save the results")
    options = parser.parse_args(arguments)
    if options.record is not None:
        record(options.record, options.only)
        return 0
    if len(options.installations) != 2:
        parser.error(f"two installations are compared, got {len(options.installations)}")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("a", "b")]
        try:
            for installation, path in zip(options.installations, files, strict=True):
                run_in(installation, path, options.only)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the calls did not run: {error}", file=sys.stderr)
            return 2
        first, second = (torch.load(path, weights_only=True) for path in files)
    print(f"A: {first['package']}\nB: {second['package']}")
    if not first["calls"]:
        print(f"no call has {options.only!r} in its name", file=sys.stderr)
        return 2
    if first["calls"].keys() != second["calls"].keys():
        odd = sorted(first["calls"].keys() ^ second["calls"].keys())
        print(f"{len(odd)} calls are possible in only one of them; the first: {odd[0]}")
        return 1
    found = {name: difference(calls, second["calls"][name]) for name, calls in first["calls"].items()}
    different = {name: text for name, text in found.items() if text is not None}
    raised = sum(isinstance(calls, str) for calls in first["calls"].values())
    tensors = sum(
        x is not None for calls in first["calls"].values() if not isinstance(calls, str) for x in calls.values()
    )
    if different:
        name, text = next(iter(different.items()))
        print(f"{len(different)} of {len(found)} calls differ; the first: {name}: {text}")
        return 1
    print(f"{len(found)} calls ({raised} of which raise), {tensors} tensors: equal bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
