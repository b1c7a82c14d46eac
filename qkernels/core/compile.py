"""What torch.compile has to know about our Python, without importing the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])
P = ParamSpec("P")
R = TypeVar("R")


def constant_when_compiled(function: F) -> F:
    """Let torch.compile call the function while it traces and take the result as a constant.

    The same as `torch.compiler.assume_constant_result`, which imports the whole compiler (and triton, where installed)
    only to set this attribute: two seconds that `import qkernels` must not cost.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def eager_with_groups(function: Callable[P, R]) -> Callable[P, R]:
    """Take a public function out of torch.compile's graphs when it is called with a process group.

    The compiler orders what does not depend on each other by what it makes of memory and sizes, which differ from rank
    to rank where parts are uneven. Two all-reduces that change places on one rank hang, or give wrong numbers.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if (kwargs.get("tp_group") is not None or kwargs.get("sp_group") is not None) and torch.compiler.is_compiling():
            result: R = _run_eagerly(function, args, kwargs)
            return result
        return function(*args, **kwargs)

    return call


def _run_eagerly(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    import torch._dynamo  # in a process that compiles it is there

    return torch._dynamo.disable(function)(*args, **kwargs)


# As `torch.compiler.disable` marks functions, which imports the compiler: a break of the graph here, or with
# fullgraph=True an error that gives this reason.
_run_eagerly._torchdynamo_disable = True  # type: ignore[attr-defined]
_run_eagerly._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "qkernels with tp_group or sp_group runs between compiled graphs, not inside of one: compile without"
    " fullgraph=True, or compile the model and call the loss outside"
)
