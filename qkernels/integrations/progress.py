"""What is shown while a Trainer runs: a bar with loss, rewards and margins, or lines of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from ..report.progress import Progress, can_redraw


class TrainProgress(TrainerCallback):
    """A bar on a terminal; elsewhere a line for each log entry.

    Args:
        progress: where to draw.
        name: of the phase.
    """

    def __init__(self, progress: Progress, name: str):
        self._progress, self._name, self._phase, self._note = progress, name, None, ""
        self._start, self._began_at = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._began_at = time.monotonic(), state.global_step
        if can_redraw(self._progress.stream):
            self._phase = self._progress.phase(self._name, state.max_steps)  # type: ignore[assignment]
            if state.global_step:
                self._phase.step(steps=state.global_step)  # type: ignore[attr-defined]
        elif state.is_world_process_zero:
            resumed = f" from step {state.global_step}" if state.global_step else ""
            self._progress.say(f"  {self._name}: {state.max_steps} steps{resumed}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._phase is not None:
            self._phase.step(self._note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._note = described(logs)
        if self._phase is None:
            done = state.global_step - self._began_at
            pace = f"{(time.monotonic() - self._start) / max(1, done):.2g} s a step"
            self._progress.say(f"  {self._name} {state.global_step}/{state.max_steps}  {self._note}  {pace}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar."""
        if self._phase is not None:
            self._phase.__exit__()
            self._phase = None


def described(logs: Mapping[str, Any]) -> str:
    """A log entry in few words."""
    parts = [f"loss {float(logs['loss']):.3f}"]
    for name, label, form in (
        ("rewards/chosen", "chosen", "+.3f"),
        ("rewards/rejected", "rejected", "+.3f"),
        ("rewards/margins", "margin", "+.3f"),
        ("rewards/accuracies", "ranked right", ".0%"),
    ):
        if name in logs:
            parts.append(f"{label} {float(logs[name]):{form}}")
    return ", ".join(parts)
