"""What a user may choose in `qkernels compare`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..score.options import DTYPES
from ..text.characters import PrintableError


class CompareError(PrintableError):
    """A comparison that cannot be made, for a reason that the user can mend; the text says which."""


@dataclass(frozen=True)
class CompareOptions:
    """The options of `qkernels compare`.

    engine: file of token ids with the log-probs that an engine gave (see docs/numerics.md).
    out: folder to create.
    model: folder of the model whose log-probs are compared with them.
    other: instead, a second file of the same tokens.
    tokenizer: folder of a tokenizer that shows tokens as text; by default the model's.
    temperature: divides the model's logits, as it divided the engine's.
    low, high: ratios outside of this range are counted.
    limit: only the first sequences.
    batch_tokens: padded tokens of a forward pass; None for 8192 on a GPU, 1024 on a CPU.
    device, dtype, trust_remote_code: of the model, as in `ScoreOptions`.
    overwrite: replace an earlier comparison in `out`.
    shown: the worst tokens in the report.
    """

    engine: Path
    out: Path
    model: str | None = None
    other: Path | None = None
    tokenizer: str | None = None
    temperature: float = 1.0
    low: float = 0.9
    high: float = 1.1
    limit: int | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    overwrite: bool = False
    shown: int = 20

    def check(self) -> None:
        """Raise `CompareError` naming the option, what came and what was expected."""
        if (self.model is None) == (self.other is None):
            raise CompareError("give either --model DIR or --other FILE: what the engine's log-probs are compared with")
        if not 0 < self.low < 1 < self.high:
            raise CompareError(f"--low and --high must enclose 1 and be above 0, got {self.low} and {self.high}")
        if not 0 < self.temperature < math.inf:
            raise CompareError(f"--temperature must be above 0 and finite, got {self.temperature}")
        if self.other is not None and self.temperature != 1:
            raise CompareError("--temperature is for --model; log-probs of --other are taken as they are")
        for name, value, least in (
            ("--batch-tokens", self.batch_tokens, 1), ("--limit", self.limit, 1), ("--shown", self.shown, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise CompareError(f"{name} must be {least} or more, got {value}")
        if self.dtype not in DTYPES:
            raise CompareError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
