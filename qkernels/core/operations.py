"""torch.library ops whose schema is derived from the NamedTuple of their arguments.

A schema knows no structures: a field that is itself a NamedTuple stands in it with all of its fields, in order. Those
of an optional one get its name in front, and are optional too.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.autograd import _profiler_enabled
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_TYPES = {
    Tensor: "Tensor",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    list[bool]: "bool[]",
}

# The ops' namespace: the name of this package, which is another one in a copy that is loaded beside it.
NAMESPACE = __name__.partition(".")[0]

_PLAIN = (Tensor, torch.nn.Parameter)

Call = TypeVar("Call", bound=tuple[Any, ...])


class Traits(NamedTuple):
    """What the NamedTuple of an operation does not say by itself.

    mutates: name of a tensor that the operation writes to.
    symbolic: names of ints that torch.compile may keep symbolic.
    left_out: names of fields that compiled code does not have; the op runs with None.
    """

    mutates: str = ""
    symbolic: Collection[str] = ()
    left_out: Collection[str] = ()


_NONE = Traits()


class _Leaf(NamedTuple):
    """An argument in a schema: where it lies in the NamedTuple, its name, its type, and whether it may be None."""

    path: tuple[int, ...]
    name: str
    kind: str
    optional: bool
    default: str

    def written(self, mutates: str) -> str:
        """As torch.library writes it."""
        kind = "Tensor(a!)" if self.name == mutates else self.kind
        return f"{kind}{'?' if self.optional else ''} {self.name}{self.default}"


def _leaves(arguments: Any, traits: Traits) -> list[_Leaf]:
    found: list[_Leaf] = []
    for i, (name, annotation) in enumerate(get_type_hints(arguments).items()):
        if name in traits.left_out:
            continue
        options = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        optional, kind = types.NoneType in options, options[0]
        if hasattr(kind, "_fields"):
            for leaf in _leaves(kind, traits):
                inner = f"{name}_{leaf.name}" if optional else leaf.name
                found.append(leaf._replace(path=(i, *leaf.path), name=inner, optional=optional or leaf.optional))
            continue
        written = "SymInt" if name in traits.symbolic else _TYPES[kind]
        default = "=None" if arguments._field_defaults.get(name, ...) is None else ""
        found.append(_Leaf((i,), name, written, optional, default))
    return found


def _assemble(arguments: Any, left_out: Collection[str], values: list[Any]) -> Any:
    """The NamedTuple whose leaves have these values, in order; they are taken off the list."""
    fields: list[Any] = []
    for name, annotation in get_type_hints(arguments).items():
        options = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        if name in left_out:
            fields.append(None)
        elif hasattr(options[0], "_fields"):
            inner = _assemble(options[0], left_out, values)
            fields.append(None if types.NoneType in options and inner[0] is None else inner)
        else:
            fields.append(values.pop(0))
    return arguments(*fields)


class Operation(Generic[Call]):
    """One operation on a NamedTuple of arguments: the op that torch sees, and the function it runs.

    Args:
        library: where the op is defined.
        name: of the op in `torch.ops.qkernels` (`NAMESPACE`).
        arguments: the NamedTuple.
        returns: as torch.library writes it.
        run: what it does.
        fake: what it returns for tensors without values.
        traits: see there.
    """

    def __init__(
        self, library: torch.library.Library, name: str, arguments: type[Call], returns: str, *,
        run: Callable[[Call], Any], fake: Callable[[Call], Any], traits: Traits = _NONE,
    ):  # fmt: skip
        self.run = run
        leaves = _leaves(arguments, traits)
        self._paths = tuple(leaf.path for leaf in leaves)
        self.schema = f"{name}({', '.join(leaf.written(traits.mutates) for leaf in leaves)}) -> {returns}"
        missing = [None] * len(leaves)

        def call_of(values: tuple[Any, ...]) -> Call:
            # torch leaves out trailing arguments that have their default.
            result: Call = _assemble(arguments, traits.left_out, [*values, *missing[len(values) :]])
            return result

        library.define(self.schema)
        library.impl(name, lambda *values: run(call_of(values)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *values: fake(call_of(values)), lib=library)
        self.op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def as_op(self, call: Call) -> Any:
        """Run it as the op that torch sees. An op has no gradient of its own: its tensors are constants to torch."""
        values: list[Any] = []
        recorded = torch.is_grad_enabled()
        for path in self._paths:
            value: Any = call
            for i in path:
                value = None if value is None else value[i]
            values.append(value.detach() if recorded and isinstance(value, Tensor) and value.requires_grad else value)
        return self.op(*values)

    def __call__(self, call: Call) -> Any:
        """As an op where something looks on, else what the op runs, at half of the host's time."""
        # Torch has to see a call: compilers, modes, transforms, traces, profilers, tensors of a class of their own.
        watched = (
            torch.compiler.is_compiling()
            or type(call[0]) not in _PLAIN
            or is_in_torch_dispatch_mode()
            or _are_functorch_transforms_active()
            or _is_tracing()
            or _profiler_enabled()
        )
        return self.as_op(call) if watched else self.run(call)
