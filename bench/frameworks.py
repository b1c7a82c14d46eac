"""What the plug-ins for other frameworks stand on, and what they gain: `python -m bench.frameworks --wheels DIR`.

DIR holds wheels of the frameworks (`pip download --no-deps -d DIR verl axolotl ms-swift openrlhf llamafactory`, and the
versions of trl that axolotl and ms-swift pin). Nothing of them is installed or imported as a package: functions are
read out of the wheels' sources. `--check` compares signatures and results with what `qkernels.integrations` expects
and exits with 1 where something has moved; without it the functions are timed too, theirs and ours in turn.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import time
import types
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import qkernels
from qkernels.integrations.log_softmax import selective_log_softmax
from qkernels.integrations.verl import heads

from . import measure


@dataclass(frozen=True)
class Hook:
    """One place of a framework that a plug-in or a recipe of this package stands on.

    wheel: the wheel's name; older: only versions below this one count (TRL, which axolotl and ms-swift pin).
    file, name: where it is, such as "FusedLinearForPPO.forward".
    parameters: of the function, as this package knows them.
    """

    framework: str
    wheel: str
    file: str
    name: str
    parameters: tuple[str, ...]


_TRL = ("logits", "index")
_VERL = {name: parameters for (_, name), parameters in heads.SIGNATURES.items()}
HOOKS = (
    Hook("axolotl, ms-swift", "trl", "trl/trainer/utils.py", "selective_log_softmax", _TRL),
    Hook("axolotl", "axolotl", "axolotl/integrations/base.py", "BasePlugin.pre_model_load", ("self", "cfg")),
    Hook("ms-swift", "ms_swift", "swift/utils/utils.py", "import_external_file", ("file_path",)),
    Hook(
        "verl", "verl", "verl/utils/kernel/linear_cross_entropy.py", "LinearCrossEntropy.forward",
        _VERL["LinearCrossEntropy.forward"],
    ),
    Hook(
        "verl", "verl", "verl/utils/experimental/torch_functional.py", "FusedLinearForPPO.forward",
        _VERL["FusedLinearForPPO.forward"],
    ),
    Hook(
        "LLaMA-Factory", "llamafactory", "llamafactory/train/trainer_utils.py", "get_batch_logps",
        ("logits", "labels", "label_pad_token_id", "ld_alpha"),
    ),
    Hook(
        "OpenRLHF", "openrlhf", "openrlhf/models/utils.py", "log_probs_from_logits",
        ("logits", "labels", "temperature"),
    ),
)  # fmt: skip
# Text that has to stand somewhere in a wheel's Python files.
WORDS = {"verl": "verl.plugins", "ms_swift": "external_plugins", "axolotl": "plugins"}


class Wheel:
    """Sources in a wheel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.title = "-".join(path.name.split("-")[:2])
        self._archive = zipfile.ZipFile(path)

    def source(self, file: str) -> str:
        """The text of a file, also of one under `*.data/purelib`."""
        found = [name for name in self._archive.namelist() if name == file or name.endswith(f"/purelib/{file}")]
        if not found:
            raise LookupError(f"{self.title} has no {file}")
        return self._archive.read(found[0]).decode()

    def contains(self, word: str) -> bool:
        names = [name for name in self._archive.namelist() if name.endswith(".py")]
        return any(word in self._archive.read(name).decode(errors="replace") for name in names)


def parameters_of(source: str, name: str) -> tuple[str, ...] | None:
    """The parameters of a function or method; None if there is none of that name."""
    nodes: list[ast.stmt] = ast.parse(source).body
    found: ast.AST | None = None
    for part in name.split("."):
        found = next((node for node in nodes if getattr(node, "name", None) == part), None)
        nodes = getattr(found, "body", [])
    if not isinstance(found, ast.FunctionDef):
        return None
    return tuple(argument.arg for argument in (*found.args.posonlyargs, *found.args.args))


def module_of(source: str, names: Sequence[str] = ()) -> types.SimpleNamespace:
    """A file of a framework, run by itself; with `names`, only these definitions of it."""
    tree = ast.parse(source)
    if names:
        tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    namespace: dict[str, Any] = {"torch": torch, "F": F, "Optional": None, "IGNORE_INDEX": -100, "__name__": "stock"}
    exec(compile("from __future__ import annotations\n" + ast.unparse(tree), "wheel", "exec"), namespace)
    return types.SimpleNamespace(**namespace)


def check(wheels: dict[str, list[Wheel]]) -> list[str]:
    """What has moved, a line each."""
    moved = []
    for hook in HOOKS:
        for wheel in wheels.get(hook.wheel, []):
            try:
                found = parameters_of(wheel.source(hook.file), hook.name)
            except LookupError as error:
                moved.append(f"{hook.framework}: {error}")
                continue
            state = "as known" if found == hook.parameters else f"takes {found}, known is {hook.parameters}"
            print(f"{hook.framework:18} {wheel.title:24} {hook.name}: {state}")
            if found != hook.parameters:
                moved.append(f"{hook.framework}: {wheel.title} {hook.name} {state}")
    for name, word in WORDS.items():
        moved += [f"{wheel.title}: no {word!r} in it" for wheel in wheels.get(name, []) if not wheel.contains(word)]
    return moved


@dataclass(frozen=True)
class Pair:
    """A framework's function and ours on the same inputs. Each returns what a backward starts from."""

    title: str
    stock: Callable[[], torch.Tensor]
    ours: Callable[[], torch.Tensor]
    inputs: tuple[torch.Tensor, ...]


def pairs(wheels: dict[str, list[Wheel]], rows: int, vocab: int, hidden: int) -> list[Pair]:
    """What can be run of the wheels at hand."""
    torch.manual_seed(0)
    made: list[Pair] = []
    logits = torch.randn(4, rows // 4, vocab).requires_grad_()
    labels = torch.randint(0, vocab, (4, rows // 4))
    for wheel in wheels.get("trl", []):
        stock = module_of(wheel.source("trl/trainer/utils.py"), ["selective_log_softmax"]).selective_log_softmax
        made.append(
            Pair(
                f"{wheel.title} selective_log_softmax (axolotl, ms-swift)",
                lambda stock=stock: stock(logits, labels),  # type: ignore[misc]
                lambda stock=stock: selective_log_softmax(logits, labels, stock=stock),  # type: ignore[misc]
                (logits,),
            )
        )
    for wheel in wheels.get("llamafactory", []):
        source = wheel.source("llamafactory/train/trainer_utils.py")
        batch_logps = module_of(source, ["get_batch_logps"]).get_batch_logps
        made.append(
            Pair(
                f"{wheel.title} get_batch_logps",
                lambda stock=batch_logps: stock(logits, labels)[0],  # type: ignore[misc]
                lambda: qkernels.token_logps(logits[:, :-1], labels[:, 1:]).sum(-1),
                (logits,),
            )
        )
    for wheel in wheels.get("openrlhf", []):
        names = ["log_probs_from_logits", "_logsumexp_by_chunk"]
        from_logits = module_of(wheel.source("openrlhf/models/utils.py"), names).log_probs_from_logits
        made.append(
            Pair(
                f"{wheel.title} log_probs_from_logits",
                lambda stock=from_logits: stock(logits, labels),  # type: ignore[misc]
                lambda: qkernels.token_logps(logits, labels),
                (logits,),
            )
        )
    states, weight = torch.randn(rows, hidden).requires_grad_(), torch.randn(vocab, hidden).requires_grad_()
    flat = labels.flatten()
    for wheel in wheels.get("verl", []):
        stock_head = module_of(wheel.source("verl/utils/experimental/torch_functional.py")).FusedLinearForPPO()
        made.append(
            Pair(
                f"{wheel.title} FusedLinearForPPO (torch)",
                lambda head=stock_head: torch.stack(head(states, weight, flat, 0.9)),  # type: ignore[misc]
                lambda: torch.stack(heads.log_probs_and_entropy(states, weight, flat, 0.9)),
                (states, weight),
            )
        )
    return made


def backward(pair: Pair, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    result = call()
    return (result.detach(), *torch.autograd.grad(result.sum(), pair.inputs))


def disagreement(pair: Pair) -> float:
    """The largest difference of results and gradients over the largest value of each."""
    both = zip(backward(pair, pair.stock), backward(pair, pair.ours), strict=True)
    return max(float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)) for one, other in both)


def timed(pair: Pair, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(rounds):
        for name, call in (("stock", pair.stock), ("ours", pair.ours)):
            start = time.perf_counter()
            backward(pair, call)
            seconds[name].append(time.perf_counter() - start)
    peaks = {
        name: measure.peak_memory(lambda call=call: backward(pair, call))  # type: ignore[misc]
        for name, call in (("stock", pair.stock), ("ours", pair.ours))
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"title": pair.title, "seconds": medians, "peak_bytes": peaks}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.frameworks", description=__doc__)
    parser.add_argument("--wheels", type=Path, required=True, metavar="DIR", help="folder of wheels, searched whole")
    parser.add_argument("--check", action="store_true", help="only compare signatures and results")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(arguments)
    wheels: dict[str, list[Wheel]] = {}
    for path in sorted(args.wheels.rglob("*.whl")):
        wheels.setdefault(path.name.split("-")[0], []).append(Wheel(path))
    known = {hook.wheel for hook in HOOKS}
    if not known & set(wheels):
        parser.error(f"no wheel of {', '.join(sorted(known))} under {args.wheels}")
    missing = sorted(known - set(wheels))
    if missing:
        print(f"not looked at, no wheel: {', '.join(missing)}")
    moved = check(wheels)
    small = pairs(wheels, rows=64, vocab=1000, hidden=64)
    for pair in small:
        error = disagreement(pair)
        print(f"{pair.title}: results and gradients within {error:.1e}")
        if not error < 1e-4:  # both sides round sums of about 1000 terms to fp32
            moved.append(f"{pair.title}: differs by {error:.1e}")
    for line in moved:
        print(f"MOVED: {line}", file=sys.stderr)
    if args.check or moved:
        return int(bool(moved))
    rows = [timed(pair, args.rounds) for pair in pairs(wheels, args.rows, args.vocab, args.hidden)]
    print(
        f"\n{args.rows} rows, V = {args.vocab}, H = {args.hidden}, fp32, forward and backward, median of {args.rounds}"
    )
    for row in rows:
        stock, ours = row["seconds"]["stock"], row["seconds"]["ours"]
        line = f"{row['title']}: {1e3 * stock:.0f} ms, ours {1e3 * ours:.0f} ms, {stock / ours:.1f}x"
        if None not in row["peak_bytes"].values():
            line += (
                f"; memory {row['peak_bytes']['stock'] / 2**20:.0f} MiB, {row['peak_bytes']['ours'] / 2**20:.0f} MiB"
            )
        print(line)
    if args.out is not None:
        shape = {"rows": args.rows, "vocab": args.vocab, "hidden": args.hidden, "rounds": args.rounds}
        args.out.write_text(json.dumps({"machine": measure.machine(), **shape, "results": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
