"""What is shown while training runs: a bar with rewards and margins, and what the reward monitor finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..integrations.monitor import RewardMonitorCallback
from ..integrations.progress import TrainProgress
from ..report.progress import Progress

__all__ = ["TrainProgress", "Watch"]

_OBSERVATIONS = 10


class Watch(RewardMonitorCallback):
    """The reward monitor, ten observations over the run unless told otherwise, its findings said at once.

    Args:
        batches: of held-out pairs.
        reference_model, beta, every: as `RewardMonitorCallback` takes them.
        progress: where findings are said.
    """

    def __init__(
        self, batches: Sequence[Mapping[str, Any]], reference_model: Any, beta: float, every: int | None,
        progress: Progress,
    ):  # fmt: skip
        super().__init__(batches, reference_model, beta=beta, every=every)
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every is None:
            self.every = max(1, state.max_steps // _OBSERVATIONS)
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def report_findings(self, findings: Sequence[Any]) -> None:
        for finding in findings:
            self._progress.say(f"  reward monitor: {finding}")
