"""What the trainers of this package share of a training step."""

from __future__ import annotations

from typing import Any

from ..linears import faster_linears


class FasterSteps:
    """A mixin for trainers: linear layers of a model in fp32 on a CPU by this package's GEMM, where it is faster."""

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; forward and backward of the step within `faster_linears`."""
        with faster_linears(model):
            return super().training_step(model, *args, **kwargs)  # type: ignore[misc]
