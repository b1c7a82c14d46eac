"""The model's folder before anything is loaded: its weights, a GGUF file, its tokenizer, how long sequences may be."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..score.models import is_adapter, read_template, weights_problem
from ..score.options import ScoreError
from ..text.characters import first_line
from ..text.hub import is_hub_name
from ..text.lengths import position_limit
from .folder import BASE
from .options import TrainError


class Start(NamedTuple):
    """What training starts from.

    model: folder or hub name, in transformers format.
    tokenizer: with the chat template asked for.
    limit: most tokens of a sequence that the model takes; None if it does not say.
    notes: what the user should know of it.
    """

    model: str
    tokenizer: Any
    limit: int | None
    notes: list[str]


def check_folder(name: str) -> Path | None:
    """The GGUF file, if the model is one; refuse what is no model.

    Raises:
        TrainError: no such folder, no weights in it, a PEFT adapter, or a GGUF file without the package to read it.
    """
    path = Path(name)
    if not path.exists():
        if is_hub_name(name):
            return None
        raise TrainError(f"--model {name}: no such folder (a model of the Hugging Face Hub is named OWNER/MODEL)")
    if not path.is_dir():
        raise TrainError(f"--model {name}: expected the folder of a model, found a file")
    if is_adapter(name):
        raise TrainError(
            f"--model {name}: a PEFT adapter, whose reference would be the adapter itself; merge it into its base"
            " first (peft: model.merge_and_unload().save_pretrained(DIR)), and train that"
        )
    gguf = sorted(path.glob("*.gguf"))
    problem = weights_problem(path, " or a GGUF file")
    if problem is None:
        if not (path / "config.json").is_file():
            raise TrainError(f"--model {name}: the folder has weights and no config.json")
        return None
    if not gguf:
        raise TrainError(f"--model {name}: {problem}")
    if len(gguf) > 1:
        raise TrainError(
            f"--model {name}: expected one GGUF file, found {', '.join(file.name for file in gguf[:5])}; put the one"
            " that is meant into a folder of its own"
        )
    if find_spec("gguf") is None:
        raise TrainError(f"--model {name}: reading {gguf[0].name} needs the package gguf: pip install gguf")
    return gguf[0]


def from_gguf(file: Path, out: Path, anew: bool) -> str:
    """A GGUF file as a folder in transformers format, which training and its reference are loaded from.

    anew: in place of the folder that an earlier run has left.
    """
    import transformers

    folder = out / BASE
    if not anew and (folder / "config.json").is_file():
        return str(folder)
    partial = out / f"{BASE}.partial"
    try:
        beside = {} if (file.parent / "tokenizer.json").is_file() else {"gguf_file": file.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **beside)
        how: dict[str, Any] = {"gguf_file": file.name, "dtype": "float32"}
        if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights quantised unless told otherwise
            how["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **how)
    except TrainError:
        raise
    except Exception as error:
        raise TrainError(f"--model {file}: cannot be loaded ({first_line(error)})") from error
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise TrainError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    return str(folder)


def load_start(name: str, chat_template: str | None, prompt_format: str, trusted: bool, revision: str) -> Start:
    """Tokenizer and configuration; the weights are TRL's to load.

    Raises:
        TrainError: one of them cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    how = {"trust_remote_code": trusted, **({} if Path(name).is_dir() else {"revision": revision})}
    try:
        config = AutoConfig.from_pretrained(name, **how)
    except Exception as error:
        raise TrainError(f"--model {name}: its config.json cannot be used ({_reason(error)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
    except Exception as error:
        raise TrainError(f"--model {name}: its tokenizer cannot be loaded ({_reason(error)})") from error
    notes = []
    if chat_template is not None:
        try:
            tokenizer.chat_template = read_template(Path(chat_template))
        except ScoreError as error:
            raise TrainError(str(error)) from None
    elif not getattr(tokenizer, "chat_template", None) and prompt_format == "auto":
        notes.append(
            "The tokenizer has no chat template: prompt, answer and end token are written one after the other."
            " --chat-template FILE gives it one"
        )
    if tokenizer.eos_token is None:
        raise TrainError(f"--model {name}: its tokenizer has no end token (eos_token), which ends an answer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Start(name, tokenizer, position_limit(SimpleNamespace(config=config)), notes)


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own, which runs only with --trust-remote-code"
    return first_line(error)
