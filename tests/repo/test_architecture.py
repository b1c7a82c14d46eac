"""The layers of the package, read from its imports: no folder imports a layer above it, and nothing runs in circles.

`docs/architecture.md` states the rule: a file beside `qkernels/__init__.py` is public, a folder is a layer, and a layer
imports only layers below it. `LAYERS` is the order of the engine's folders, lowest first; what stands on the engine
may import in any direction that does not close a circle.
"""

from __future__ import annotations

import ast
import itertools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qkernels

pytestmark = pytest.mark.quick

ROOT = Path(qkernels.__file__).parent
# The engine, lowest first. `_version.py` holds one string and stands below everything.
LAYERS = ("_version", "core", "backends", "distributed", "objectives", "head", "autograd", "functional")
MOST_LAYERS = 11


def part_of(module: str) -> str:
    """The folder, or the file beside `__init__.py`, that a module such as "head.chunks" belongs to."""
    return module.split(".")[0]


def imports_of(tree: ast.AST) -> list[ast.ImportFrom]:
    """The imports that run: not those for type checkers, nor names that a module's `__getattr__` forwards."""
    found: list[ast.ImportFrom] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom):
            found.append(node)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        forwards = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        if not for_types and not forwards:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return found


def graph_of(root: Path) -> dict[str, dict[str, str]]:
    """Part -> the parts it imports, each with one file and line where it does."""
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    graph: dict[str, dict[str, str]] = {part_of(name): {} for name in modules if name != "__init__"}
    for name, path in modules.items():
        if name == "__init__":
            continue
        package = name.split(".")[:-1]
        for node in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                targets = [".".join([*base, *(node.module or "").split(".")]).strip(".")]
            elif (node.module or "").split(".")[0] == "qkernels":
                targets = [".".join(node.module.split(".")[1:])]  # type: ignore[union-attr]
            else:
                continue
            if targets == [""]:  # `from . import x`: each x is a module, or a name of the package's face
                targets = [alias.name for alias in node.names if alias.name in graph]
            for target in targets:
                if part_of(target) in graph and part_of(target) != part_of(name):
                    where = f"{path.relative_to(root.parent)}:{node.lineno}"
                    graph[part_of(name)].setdefault(part_of(target), where)
    return graph


def problems(root: Path) -> list[str]:
    """What breaks the rule, each with file and line; empty if nothing does."""
    graph = graph_of(root)
    found = [
        f"{where}: layer {part!r} imports {target!r}, which is above it"
        for part, targets in graph.items()
        for target, where in targets.items()
        if part in LAYERS and (target not in LAYERS or LAYERS.index(target) > LAYERS.index(part))
    ]
    try:
        order = list(TopologicalSorter({part: set(targets) for part, targets in graph.items()}).static_order())
    except CycleError as error:
        circle = error.args[1]
        steps = [f"{b} -> {a} ({graph[b][a]})" for a, b in itertools.pairwise(circle)]
        return [*found, "a circle of imports: " + ", ".join(steps)]
    height: dict[str, int] = {}
    for part in order:
        height[part] = 1 + max((height[target] for target in graph[part]), default=0)
    if max(height.values()) > MOST_LAYERS:
        top = max(height, key=lambda part: height[part])
        found.append(f"{height[top]} layers, of which {top!r} is the highest; at most {MOST_LAYERS}")
    return found


def test_arrows_point_down():
    assert problems(ROOT) == []


def test_every_folder_of_the_engine_is_a_layer():
    assert all((ROOT / layer).is_dir() for layer in LAYERS[1:])


@pytest.mark.parametrize(
    "file, line, message",
    [
        ("core/memory.py", "from ..functional import logits", "core/memory.py:1: layer 'core' imports 'functional'"),
        (
            "head/plan.py",
            "def f():\n    from ..autograd import head",
            "head/plan.py:2: layer 'head' imports 'autograd'",
        ),
        ("objectives/scores.py", "from ..search import beam", "layer 'objectives' imports 'search'"),
        ("search.py", "from .functional import logits\nfrom .decoding import x", "circle of imports"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, file, line, message):
    root = tmp_path / "qkernels"
    for layer in LAYERS[1:]:
        (root / layer).mkdir(parents=True)
        (root / layer / "__init__.py").touch()
    (root / "__init__.py").touch()
    (root / "decoding.py").write_text("from .search import left_padding\n")
    (root / "search.py").write_text("from .core import checks\n")
    assert problems(root) == []
    (root / file).write_text(line)
    (found,) = problems(root)
    assert message in found


def test_imports_for_types_and_forwarded_names_do_not_count(tmp_path):
    text = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .search import x\n"
        "def __getattr__(name):\n    from .search import y\n"
    )
    assert [node.module for node in imports_of(ast.parse(text))] == ["typing"]


def test_too_many_layers_are_found(tmp_path):
    root = tmp_path / "qkernels"
    root.mkdir()
    (root / "__init__.py").touch()
    (root / "a0.py").touch()
    for i in range(1, MOST_LAYERS + 1):
        (root / f"a{i}.py").write_text(f"from .a{i - 1} import x\n")
    assert problems(root) == [
        f"{MOST_LAYERS + 1} layers, of which 'a{MOST_LAYERS}' is the highest; at most {MOST_LAYERS}"
    ]


MOST_PARAMETERS, MOST_POSITIONAL, MOST_LINES = 8, 5, 60


def long_lists(root: Path, public: set[str]) -> list[str]:
    """Functions of the engine with too many parameters or lines, and calls with too many positional arguments.

    Public functions have the parameters that their users need, Triton kernels those of a launch, and
    `save_for_backward` takes tensors alone.
    """
    found = []
    for path in sorted(path for layer in LAYERS for path in (root / layer).rglob("*.py")):
        where, kernels = path.relative_to(root.parent), "triton" in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL and not kernels:
                name = ast.unparse(node.func)
                if name != "ctx.save_for_backward":
                    found.append(f"{where}:{node.lineno}: {name} is handed {len(node.args)} positional arguments")
            if isinstance(node, ast.FunctionDef) and not ast.unparse(node).startswith("@triton.jit"):
                arguments = node.args
                number = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
                if number > MOST_PARAMETERS and node.name not in public:
                    found.append(f"{where}:{node.lineno}: {node.name} takes {number} parameters")
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                if lines > MOST_LINES:
                    found.append(f"{where}:{node.lineno}: {node.name} has {lines} lines")
    return found


def test_argument_lists_and_bodies_of_the_engine_are_short():
    assert long_lists(ROOT, set(qkernels.__all__)) == []


def test_long_lists_are_found(tmp_path):
    (tmp_path / "qkernels/core").mkdir(parents=True)
    many = ", ".join(f"a{i}" for i in range(9))
    body = "\n".join(["    pass"] * 61)
    (tmp_path / "qkernels/core/x.py").write_text(f"def f({many}):\n{body}\n\n\nf({many})\n")
    assert [line.split(": ")[1] for line in long_lists(tmp_path / "qkernels", set())] == [
        "f takes 9 parameters",
        "f has 61 lines",
        "f is handed 9 positional arguments",
    ]
    assert len(long_lists(tmp_path / "qkernels", {"f"})) == 2
