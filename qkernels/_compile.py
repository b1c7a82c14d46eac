"""What torch.compile has to know about our Python, without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Let torch.compile call the function while it traces and take the result as a constant.

    The same as `torch.compiler.assume_constant_result`, which imports the whole compiler (and triton, where installed)
    only to set this attribute: two seconds that `import qkernels` must not cost.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
