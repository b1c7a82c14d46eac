"""What a user may choose in `qkernels judge`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..score.options import DTYPES
from ..text.characters import PrintableError


class JudgeError(PrintableError):
    """A comparison that cannot start or go on, for a reason that the user can mend; the text says which."""


@dataclass(frozen=True)
class JudgeOptions:
    """The options of `qkernels judge`.

    a, b: the two sides: a folder of a model (answers are generated) or a file of answers (see docs/judge.md).
    out: folder to create.
    prompts: prompts to answer and to judge; without it, those of the files of answers.
    scorer: "module:function" or "file.py:function", which scores an answer, or compares two.
    judge: folder of a model that judges; needs a tokenizer, better also a chat template.
    verdicts: file of verdicts that somebody else has made. With neither, the questions are written and nothing is
        judged.
    template: file with the question for `judge`, with {prompt} and {response} in it.
    max_new_tokens, temperature, seed, batch_size: of generated answers; temperature 0 is greedy.
    resamples, level: of the bootstrap.
    limit: only the first prompts.
    batch_tokens: padded tokens of a forward pass of `judge`; None for 8192 on a GPU, 1024 on a CPU.
    device, dtype, trust_remote_code: of the models, as in `ScoreOptions`.
    resume: go on with what an interrupted run left in `out`.
    overwrite: replace an earlier run's results in `out`.
    shown: prompts in the report.
    """

    a: str
    b: str
    out: Path
    prompts: Path | None = None
    scorer: str | None = None
    judge: str | None = None
    verdicts: Path | None = None
    template: Path | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8
    resamples: int = 2000
    level: float = 0.95
    limit: int | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False
    shown: int = 12

    def check(self) -> None:
        """Raise `JudgeError` naming the option, what came and what was expected."""
        given = [n for n in ("scorer", "judge", "verdicts") if getattr(self, n) is not None]
        if len(given) > 1:
            raise JudgeError(
                f"give one of --scorer, --judge and --verdicts, got {' and '.join('--' + n for n in given)}"
            )
        if self.resume and self.overwrite:
            raise JudgeError("give either --resume or --overwrite, not both")
        if self.template is not None and self.judge is None:
            raise JudgeError("--template is the question to --judge, which was not given")
        for name, value, least in (
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--batch-size", self.batch_size, 1),
            ("--resamples", self.resamples, 100),
            ("--batch-tokens", self.batch_tokens, 1),
            ("--limit", self.limit, 1),
            ("--shown", self.shown, 0),
        ):
            if value is not None and value < least:
                raise JudgeError(f"{name} must be {least} or more, got {value}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise JudgeError(f"--temperature must be finite and 0 or more, got {self.temperature}")
        if not 0.5 <= self.level < 1:
            raise JudgeError(f"--level must lie in [0.5, 1), got {self.level}")
        if self.dtype not in DTYPES:
            raise JudgeError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
