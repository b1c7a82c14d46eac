"""What a user may choose in the demo, checked, and the sizes that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..objectives import OBJECTIVES, STATEFUL, LossSpec, create, resolve
from ..text.characters import PrintableError

# Label smoothing of the losses that do not exist without it; the value of the EXO paper.
_SMOOTHING = {"exo_pair": 1e-3}
_MIN_LENGTH = 16
LOSSES = tuple(sorted({*OBJECTIVES, *STATEFUL}))
# Below this there is nothing to learn from, and nothing to hold out.
MIN_PAIRS = 8


class DemoError(PrintableError):
    """A run that cannot start or go on, for a reason that the user can mend; the text says which."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of `qkernels demo`; None leaves a size to the data.

    out: folder to create.
    data: preference file, folder or data set (see `qkernels.data`); None for the generated pairs with planted errors.
    overwrite: replace an earlier demo's folder at `out`, once the new run has succeeded.
    seed: of the generated data, the split, the initial weights and the order of the batches.
    sft_steps, steps: optimiser steps of supervised fine-tuning and of preference training.
    batch_size: pairs per step.
    beta: strength of the KL constraint.
    loss: a name of `qkernels.objectives.OBJECTIVES` or `STATEFUL`.
    sft_weight: factor of the chosen answers' mean negative log-likelihood, added to the loss.
    max_length: most tokens of prompt and answer together.
    threads: of the CPU. Matrices as small as the generated data's mean thousands of short parallel stretches, and on a
        machine with other work the threads wait for each other: with two, the default run took 37 s on two idle cores
        and 423 s on busy ones; with one, 60 s and 70 s. So their default is 1; with other data it is torch's.
    tiny: a run of seconds that shows that everything works, not that it learns.
    split, data_config: of a folder or a data set of the hub.
    skip_invalid: leave out records that cannot be used, and say how many.
    """

    out: Path
    data: Path | None = None
    overwrite: bool = False
    seed: int = 0
    sft_steps: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    beta: float = 0.1
    loss: str = "sigmoid"
    sft_weight: float = 1.0
    max_length: int | None = None
    threads: int | None = None
    tiny: bool = False
    split: str | None = None
    data_config: str | None = None
    skip_invalid: bool = False

    def check(self) -> None:
        """Raise `DemoError` naming the option, what came and what was expected."""
        for name, value, least in (
            ("--seed", self.seed, 0),
            ("--sft-steps", self.sft_steps, 0),
            ("--steps", self.steps, 1),
            ("--batch-size", self.batch_size, 1),
            ("--max-length", self.max_length, _MIN_LENGTH),
            ("--threads", self.threads, 1),
        ):
            if value is not None and value < least:
                raise DemoError(f"{name} must be {least} or more, got {value}")
        if self.seed >= 2**63:
            raise DemoError(f"--seed must be below 2**63, got {self.seed}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise DemoError(f"--beta must be finite and above 0, got {self.beta}")
        if not (math.isfinite(self.sft_weight) and self.sft_weight >= 0):
            raise DemoError(f"--sft-weight must be finite and 0 or more, got {self.sft_weight}")
        if self.loss not in LOSSES:
            raise DemoError(f"--loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")
        try:
            self.plan()
        except ValueError as error:
            raise DemoError(f"--loss {self.loss} cannot run in the demo: {error}") from None

    @property
    def label_smoothing(self) -> float:
        """What the loss needs; 0 for all that do without."""
        return _SMOOTHING.get(self.loss, 0.0)

    @property
    def terms(self) -> dict[str, float]:
        """The losses that are added up, with their factors."""
        terms = {self.loss: 1.0}
        if self.sft_weight and self.loss != "sft":
            terms["sft"] = self.sft_weight
        return terms

    def loss_types(self) -> list[str | Callable[..., Tensor]]:
        """The losses in the order of `terms`, to be made once for a run: some keep a memory."""
        return [create(name) for name in self.terms]

    def plan(self) -> LossSpec:
        """The loss as `qkernels.objectives` sees it; raises ValueError if it cannot be had."""
        return resolve(self.loss_types(), list(self.terms.values()), self.label_smoothing)

    def base_sizes(self) -> Sizes:
        """The sizes before the data is known: how much to generate, the vocabulary."""
        return _TINY if self.tiny else _SYNTHETIC if self.data is None else _OWN_DATA

    def sizes(self, pairs: int, longest: int) -> Sizes:
        """The sizes of the run.

        Args:
            pairs: number of training pairs.
            longest: tokens of the longest sequence, before any cut.

        Raises:
            DemoError: more pairs per step than there are.
        """
        sizes = self.base_sizes()
        if self.batch_size is not None and self.batch_size > pairs:
            raise DemoError(f"--batch-size must not exceed the {pairs} training pairs, got {self.batch_size}")
        batch_size = self.batch_size or min(sizes.batch_size, pairs)
        sft_steps, steps = sizes.sft_steps, sizes.steps
        if self.data is not None:
            # A small set is passed over a few times; the size's own steps bound the time that a large one takes.
            passes = math.ceil(_PASSES * pairs / batch_size)
            sft_steps, steps = min(sft_steps, passes), min(steps, passes)
        return replace(
            sizes,
            max_length=self.max_length or min(longest, sizes.max_length),
            batch_size=batch_size,
            sft_steps=sft_steps if self.sft_steps is None else self.sft_steps,
            steps=steps if self.steps is None else self.steps,
        )


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data, the model and the training.

    train_pairs, held_out_pairs: how many pairs to generate; of a user's own pairs, at most as many are held out.
    vocabulary_size: most tokens.
    hidden_size, layers, heads: of the model.
    batch_size: pairs per step of preference training; supervised fine-tuning takes twice as many chosen answers, which
        is as many sequences.
    sft_steps, steps, sft_lr, lr: optimiser steps and peak learning rates of the two phases.
    max_length: tokens of prompt and answer together.
    evaluations: how often the held-out pairs are scored during training, after the start.
    shown_pairs: held-out pairs in the report.
    """

    train_pairs: int
    held_out_pairs: int
    vocabulary_size: int
    hidden_size: int
    layers: int
    heads: int
    batch_size: int
    sft_steps: int
    steps: int
    sft_lr: float
    lr: float
    max_length: int
    evaluations: int
    shown_pairs: int


_PASSES = 3

_SYNTHETIC = Sizes(
    train_pairs=8000,
    held_out_pairs=200,
    vocabulary_size=1600,
    hidden_size=128,
    layers=2,
    heads=4,
    batch_size=32,
    sft_steps=160,
    steps=200,
    sft_lr=5e-3,
    lr=4e-4,
    max_length=256,
    evaluations=10,
    shown_pairs=12,
)
_OWN_DATA = replace(
    _SYNTHETIC, vocabulary_size=3000, batch_size=8, sft_steps=120, steps=120, max_length=512, shown_pairs=6
)
_TINY = replace(
    _SYNTHETIC,
    train_pairs=64,
    held_out_pairs=16,
    vocabulary_size=500,
    hidden_size=32,
    layers=1,
    heads=2,
    batch_size=4,
    sft_steps=8,
    steps=8,
    max_length=128,
    evaluations=2,
    shown_pairs=4,
)
