"""`qkernels self-improve`: loads a model from disk and runs the rounds."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..text.characters import first_line
from .files import read_prompts
from .options import SelfPreferenceError
from .rounds import Improvement, improve

JUDGES = ("own", "published")


def run_self_improve(
    *,
    model: str,
    prompts: Path,
    out: Path,
    judge: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    **options: Any,
) -> Improvement:
    """Run the command.

    Args:
        model: folder of a causal language model in transformers format, with its tokenizer; or OWNER/MODEL on the hub.
        prompts: see `read_prompts`.
        out, options: of `improve`.
        judge: "own" for `PreferenceClassifier(model, tokenizer)`, "published" for the questions of the authors' code by
            category.
        device, dtype: of torch; "auto" for a GPU where there is one, for what the weights were saved in.
        trust_remote_code: whether code that comes with a model is run.

    Raises:
        SelfPreferenceError: what cannot be loaded or done; says what to do.
    """
    missing = [name for name in ("transformers", "trl", "datasets") if find_spec(name) is None]
    if missing:
        raise SelfPreferenceError(f"self-improve needs {' and '.join(missing)}: pip install 'qkernels[trl]'")
    if judge not in JUDGES:
        raise SelfPreferenceError(f"--judge must be one of {', '.join(JUDGES)}, got {judge!r}")
    asked = read_prompts(prompts)
    loaded, tokenizer = _load(model, device, dtype, trust_remote_code)
    from ..preference_classifier import PreferenceClassifier

    chosen = PreferenceClassifier.published if judge == "published" else None
    try:
        return improve(loaded, tokenizer, asked, out, judge=chosen, progress=sys.stderr, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, SelfPreferenceError):
            raise
        raise SelfPreferenceError(str(error)) from error


def _load(name: str, device: str, dtype: str, trust: bool) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) != 2):
        raise SelfPreferenceError(f"--model {name}: no such folder (a model of the hub is named OWNER/MODEL)")
    if (path / "adapter_config.json").is_file():
        raise SelfPreferenceError(f"--model {name} is a PEFT adapter: merge it into its base first (merge_and_unload)")
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust
        )
        model.to(where)
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise SelfPreferenceError(f"--model {name}: cannot be loaded ({first_line(error)})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def summary(found: Improvement) -> str:
    """What the command prints at the end."""
    lines = ["round  pairs  skipped  mean score  mean gap"]
    lines += [
        f"{row.number:>5}  {row.pairs:>5}  {row.skipped:>7}  {row.mean_score:>10.3f}  {row.mean_gap:>8.3f}"
        for row in found.rounds
    ]
    last = found.folder / f"round-{len(found.rounds)}"
    return "\n".join(
        [
            *lines,
            "(scores are the model's own, of the answers that it wrote before the round's training)",
            f"model: {last / 'model'}",
            f"its last pairs: {last / 'pairs.jsonl'}",
        ]
    )
