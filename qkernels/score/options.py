"""What a user may choose in `qkernels score`, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..text.characters import PrintableError

DTYPES = ("auto", "float32", "bfloat16", "float16")
_MIN_LENGTH = 8


class ScoreError(PrintableError):
    """A run that cannot start or go on, for a reason that the user can mend; the text says which."""


@dataclass(frozen=True)
class ScoreOptions:
    """The options of `qkernels score`.

    model: folder (or hub name) of the policy, or of a PEFT adapter.
    data: preference file, folder or data set (see `qkernels.data`).
    out: folder to create.
    reference: folder of the reference. Without it, and without `reference_logps`, the adapter of `model` is switched
        off; a model that has none is refused.
    reference_logps: instead, a results folder or Parquet file of an earlier run over the same data, whose
        `reference_logps` are taken.
    beta: strength of the KL constraint the policy was trained with.
    outputs: columns beside the log-probs and rewards that every run writes; None for all that can be had.
    batch_tokens: padded tokens of a forward pass; None for 8192 on a GPU, 1024 on a CPU.
    max_length: longer sequences are cut to it; None refuses what the model cannot take.
    prompt_format: "auto", "chat" or "plain"; see `qkernels.score.encode`.
    chat_template: file with a Jinja template that takes the place of the tokenizer's.
    device: of torch; "auto" is a GPU where there is one.
    dtype: of the weights; "auto" is what they were saved in.
    limit: only the first pairs of the data.
    resume: go on with what an interrupted run left in `out`.
    overwrite: replace an earlier run's results in `out`.
    shown: pairs in the report.
    split, data_config: of a folder or a data set of the hub; see `qkernels.data.open_preferences`.
    skip_invalid: leave out records that cannot be used, and say how many.
    trust_remote_code: run Python code that comes with a model's folder or repository; without it, such a model is
        refused.
    """

    model: str
    data: Path
    out: Path
    reference: str | None = None
    reference_logps: Path | None = None
    beta: float = 0.1
    outputs: Sequence[str] | None = None
    batch_tokens: int | None = None
    max_length: int | None = None
    prompt_format: str = "auto"
    chat_template: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    resume: bool = False
    overwrite: bool = False
    shown: int = 12
    trust_remote_code: bool = False
    split: str | None = None
    data_config: str | None = None
    skip_invalid: bool = False

    def check(self) -> None:
        """Raise `ScoreError` naming the option, what came and what was expected."""
        if self.reference is not None and self.reference_logps is not None:
            raise ScoreError("give either --reference or --reference-logps, not both")
        if self.resume and self.overwrite:
            raise ScoreError("give either --resume or --overwrite, not both")
        if self.prompt_format == "plain" and self.chat_template is not None:
            raise ScoreError("--prompt-format plain uses no chat template: leave out --chat-template, or the format")
        for name, value, least in (
            ("--batch-tokens", self.batch_tokens, 1),
            ("--max-length", self.max_length, _MIN_LENGTH),
            ("--limit", self.limit, 1),
            ("--shown", self.shown, 0),
        ):
            if value is not None and value < least:
                raise ScoreError(f"{name} must be {least} or more, got {value}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ScoreError(f"--beta must be finite and above 0, got {self.beta}")
        if self.dtype not in DTYPES:
            raise ScoreError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
