"""Preference training itself: TRL's DPO trainer with this package's losses, what it shows, how it may end.

`qkernels train` and every round of `qkernels self-improve` train by this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..report.progress import Progress
from ..text.characters import PrintableError


class TrainError(PrintableError):
    """A training that cannot start or go on, for a reason that the user can mend; the text says which."""


@contextlib.contextmanager
def _bad_options() -> Iterator[None]:
    """What a trainer's constructor says of its options, as an error of the user's."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise TrainError(str(error)) from error


class PreferenceTraining:
    """One training on pairs in tokens (`qkernels.score.rows`).

    Args:
        progress: where a bar is drawn, or lines are written.
        name: of what is shown there.
        kept: says what is kept of a training that has failed, for its message.
        given: the arguments of `TokenDPOTrainer`: model, args, train_dataset, processing_class ...

    Attributes:
        trainer: the `TokenDPOTrainer`.

    Raises:
        TrainError: the trainer refuses an option.
    """

    def __init__(self, progress: Progress, name: str, kept: Callable[[], str] = lambda: "", **given: Any):
        from transformers import PrinterCallback

        from .progress import TrainProgress
        from .trl import TokenDPOTrainer

        self._shown, self._kept = TrainProgress(progress, name), kept
        with _bad_options():
            self.trainer = TokenDPOTrainer(**given, callbacks=[self._shown])
        self.trainer.remove_callback(PrinterCallback)

    def run(self, checkpoint: str | None = None) -> None:
        """Train to the end, from a checkpoint if there is one.

        Raises:
            TrainError: it ends with weights that are not finite.
        """
        try:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            self._shown.close()
        # Not told by the loss: transformers leaves out those of steps that are not finite.
        if not all(map(_finite, self.trainer.model.parameters())):
            raise TrainError(
                "training diverged: its weights are not finite; a smaller --learning-rate or a larger --beta may help."
                f" {self._kept()}".rstrip()
            )


def _finite(parameter: Any) -> bool:
    """Whether a parameter that is trained has only finite entries; of a sharded one, this process's part."""
    part = parameter.detach()
    part = part.to_local() if hasattr(part, "to_local") else part
    return not parameter.requires_grad or bool(part.isfinite().all())
