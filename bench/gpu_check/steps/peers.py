"""What people would use instead, on the same work: packages that are installed, or come out of a folder of wheels."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import contenders
from ...linear_contenders import LINEAR_CONTENDERS
from ...linear_work import PLANS, step
from ..step import Bench, Missing, first_line
from .figures import linear_work_of, record_step

# Package -> the modules with its kernels.
KERNELS = {"trl": ("trl.kernels", "trl.trainer.utils"), "liger_kernel": ("liger_kernel.chunked_loss",)}
AIM = 1.3  # times as fast as TRL's Triton kernel


def wheels(bench: Bench) -> list[str]:
    """The peers that `--wheels` brings can be imported; each is tried, and what cannot is told with its reason."""
    if bench.wheels is None:
        raise Missing("no --wheels: peers are those that are installed")
    lines, broken = list(bench.unpacked), [line for line in bench.unpacked if "cannot be unpacked" in line]
    for package, modules in KERNELS.items():
        if not contenders.installed(package):
            lines.append(f"{package}: no wheel, and not installed")
            continue
        try:
            found = [importlib.import_module(module) for module in modules]
        except Exception as error:  # whatever a module does when it is imported
            broken.append(f"{package} does not import: {first_line(error)}")
        else:
            lines.append(f"{package}: imported from {found[0].__file__}")
    if broken:
        raise RuntimeError("; ".join([*broken, *lines]))
    return lines


_ENTROPY = "log-probs and entropy, beside peers"


def peers(bench: Bench) -> list[str]:
    """The loss from both models' logits by what people would use instead; and log-probs with entropy."""
    lines = []
    rows, vocab = bench.rows // (1 if bench.rehearsal else 2), bench.vocab
    policy = bench.logits(rows, vocab, torch.bfloat16).view(8, -1, vocab)
    reference = bench.logits(rows, vocab, torch.bfloat16, 2).view(8, -1, vocab)
    labels = bench.labels(rows, vocab).view(8, -1)
    storage = policy.clone()
    holder: dict[str, Tensor] = {}

    def refill() -> None:
        storage.copy_(policy)
        holder["leaf"] = storage.detach().requires_grad_()

    def attempt(name: str, work: str, passes: float, call: Callable[[], object], setup: Any = None) -> None:
        try:
            bench.add(work, name, policy, passes, call, setup)
        except Exception as error:  # a peer that fails is a line, not the end
            lines.append(f"{name}: {first_line(error)}")
            bench.free()

    for name, (function, package) in contenders.CONTENDERS.items():
        if not contenders.installed(package):
            lines.append(f"{name}: not installed")
        elif not (bench.rehearsal and name == "torch.compile"):  # compiling takes longer than the whole rehearsal
            attempt(
                name, "loss and gradient, reference logits", 4,
                lambda f=function: f(holder["leaf"], reference, labels).backward(), refill,
            )  # fmt: skip
    for name, entropy in contenders.ENTROPY.items():
        try:
            call = entropy()
        except ImportError:
            lines.append(f"{name}: not installed")
            continue
        except Exception as error:
            lines.append(f"{name}: {first_line(error)}")
            continue
        attempt(name, _ENTROPY, 1, lambda c=call: c(policy, labels))
    times = {entry.contender: entry.milliseconds for entry in bench.entries if entry.work == _ENTROPY}
    if "TRL, logprob_entropy" in times:
        ratio = times["TRL, logprob_entropy"] / times["qkernels"]
        reached = "reached" if ratio >= AIM else "NOT reached"
        lines.append(f"{ratio:.2f} x as fast as TRL's Triton kernel (log-probs and entropy); aim {AIM} x: {reached}")
    return lines


def linear_peers(bench: Bench) -> list[str]:
    """The default loss from hidden states by what people would use instead."""
    lines = []
    work = linear_work_of(bench, bench.rows)
    gradients = 2 * (work.hidden.numel() + work.weight.numel())
    for name, (function, package) in LINEAR_CONTENDERS.items():
        if not contenders.installed(package):
            lines.append(f"{name}: not installed")
            continue
        if name == "F.linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            lines.append(f"{name}: not in this torch")
            continue
        call = step(function, work, work.labels, True)
        try:
            lines.append(
                record_step(
                    bench, "loss from hidden states, beside peers", name, work, call, PLANS["pair_chunks"][1], gradients
                )
            )
        except Exception as error:  # a peer that fails is a line, not the end
            lines.append(f"{name}: {first_line(error)}")
            bench.free()
    return lines
