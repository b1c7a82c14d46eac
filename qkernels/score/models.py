"""Loading policy, reference and tokenizer for `qkernels score`, and whether they fit together."""

from __future__ import annotations

import filecmp
import hashlib
import io
import itertools
import json
import math
import pickle
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch

from ..text.characters import first_line
from ..text.hub import is_hub_name
from ..text.lengths import position_limit
from .files import read_json
from .options import ScoreError, ScoreOptions

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
_ADAPTER = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin")
_TRAINING_ARGUMENTS, _LARGEST_ARGUMENTS = "training_args.bin", 1 << 20
_BLOCK, _BLOCKS = 4096, 16
_LARGEST_HEADER = 1 << 27  # of a safetensors file, bytes; its library refuses more than 100 MB


class LoadOptions(Protocol):
    """What options say of how models are loaded."""

    @property
    def dtype(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...


class Loaded(NamedTuple):
    """What a run works with.

    model: the policy.
    reference: another model; the policy itself if its adapter is switched off for the reference; None with cached
        log-probs.
    tokenizer: of the policy, with the chat template asked for.
    other_tokenizer: the reference's, if it has one of its own.
    limit: most tokens of a sequence that both models take; None if they do not say.
    """

    model: Any
    reference: Any
    tokenizer: Any
    other_tokenizer: Any
    limit: int | None


def require_packages(options: ScoreOptions) -> None:
    """Say what to install rather than fail on an import."""
    needed = ["transformers", "tokenizers", "numpy", "pyarrow"] + (["peft"] if is_adapter(options.model) else [])
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ScoreError(f"scoring needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def is_adapter(name: str) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(name) / _ADAPTER).is_file()


class Tokenizers(NamedTuple):
    """The policy's, with the chat template asked for, and the reference's, if it has one of its own."""

    model: Any
    other: Any


def load_tokenizers(options: ScoreOptions) -> Tokenizers:
    """Load the tokenizers, from disk (or the hub): seconds, where weights take minutes.

    Raises:
        ScoreError: what cannot be loaded, or does not fit; names the option.
    """
    refuse_absent("--model", options.model)
    refuse_absent("--reference", options.reference)
    tokenizer = load_tokenizer("--model", tokenizer_folder(options.model), options.trust_remote_code)
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(options.chat_template)
    if options.reference is None and options.reference_logps is None and not is_adapter(options.model):
        raise ScoreError(
            f"--model {options.model} is no PEFT adapter that could be switched off: give --reference DIR (the model"
            " that training started from), or --reference-logps DIR (results of an earlier run with it)"
        )
    other = None
    if options.reference is not None:
        folder = tokenizer_folder(options.reference, needed=False)
        other = None if folder is None else load_tokenizer("--reference", folder, options.trust_remote_code)
        if other is not None:
            _same_vocabulary(tokenizer, other)
    return Tokenizers(tokenizer, other)


def read_template(path: Path) -> str:
    """The chat template that `--chat-template` names.

    Raises:
        ScoreError: it cannot be read, or is blank: transformers take a blank one for none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScoreError(f"--chat-template {path}: cannot be read ({error})") from None
    if not text.strip():
        raise ScoreError(f"--chat-template {path}: the file is blank; expected a chat template in Jinja")
    return text


def load(options: ScoreOptions, tokenizers: Tokenizers) -> Loaded:
    """Load the models, from disk (or the hub).

    Raises:
        ScoreError: what cannot be loaded, or does not fit; names the option.
    """
    device = device_of(options.device)
    model = load_model("--model", options.model, options, device)
    if options.reference is not None:
        reference = load_model("--reference", options.reference, options, device)
    else:
        reference = model if options.reference_logps is None else None
    limits = [position_limit(m) for m in (model, reference) if m is not None]
    return Loaded(model, reference, *tokenizers, min((n for n in limits if n), default=None))


def refuse_absent(option: str, name: str | None) -> None:
    """A mistyped path must not be looked for on the hub, whose names are "owner/model"; nor a folder without weights
    found out when hours of work are done."""
    if name is None:
        return
    folder = Path(name)
    if not folder.exists():
        if not is_hub_name(name):
            raise ScoreError(f"{option} {name}: no such folder (a model of the Hugging Face Hub is named OWNER/MODEL)")
    elif folder.is_dir():
        if is_adapter(name):
            read_json(folder / _ADAPTER, "save the adapter again")
        if problem := weights_problem(folder):
            raise ScoreError(f"{option} {name}: {problem}")


def weights_problem(folder: Path, others: str = "") -> str | None:
    """What is wrong with the weights in a model's folder, from the names of its files and their headers alone.

    Args:
        folder: of a model or a PEFT adapter.
        others: what else could hold weights, for the message, such as " or a GGUF file".

    Returns:
        In words: there are none, some are missing, a file is not whole. None if nothing is.
    """
    import safetensors

    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
        what = f"the folder has no weights (model.safetensors, pytorch_model.bin{others})"
        return f"{what}, only {held}" if held else f"{what}; it is empty"
    for index in folder.glob("*.safetensors.index.json"):
        named = read_json(index, "save the model again").get("weight_map")
        files = set(named.values()) if isinstance(named, dict) else set()
        missing = sorted(str(file) for file in files if not (folder / str(file)).is_file())
        if missing:
            return f"{index.name} names weights that the folder lacks: {', '.join(missing[:5])}"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "pt"):
                pass
        except Exception as error:  # SafetensorError, or OSError
            return f"{file.name} cannot be loaded ({first_line(error)}); copy or download it again"
    return None


def device_of(name: str) -> torch.device:
    """The device that `--device` names; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # an unknown name, a device that is not there
        raise ScoreError(f"--device {name}: {first_line(error)}") from None
    return device


def tokenizer_folder(name: str, needed: bool = True) -> str | None:
    """Where a model's tokenizer is: with it, or with an adapter's base."""
    folder = Path(name)
    if not folder.is_dir() or any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return name  # a name on the hub, or a folder with a tokenizer
    if (base := _base(name)) is not None:
        return tokenizer_folder(base, needed)
    if needed:
        raise ScoreError(f"--model {name}: the folder has no tokenizer; save it there with tokenizer.save_pretrained")
    return None


def _base(name: str) -> str | None:
    """The model that an adapter was trained on; None if the folder holds no adapter, or it does not say."""
    if not is_adapter(name):
        return None
    base = read_json(Path(name) / _ADAPTER, "save the adapter again").get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def load_tokenizer(option: str, name: str | None, trusted: bool) -> Any:
    """A tokenizer; ScoreError names the option."""
    from transformers import AutoTokenizer

    try:
        # False rather than left out: transformers would ask on the terminal, and take any "y" on standard input.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    except Exception as error:
        raise ScoreError(f"{option} {name}: its tokenizer cannot be loaded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own, which runs only with --trust-remote-code"
    return first_line(error)


def load_model(option: str, name: str, options: LoadOptions, device: torch.device) -> Any:
    """A causal language model, or a PEFT adapter on its base, frozen, in eval mode, on the device.

    Raises:
        ScoreError: it cannot be loaded, or does not fit; names the option.
    """
    from transformers import AutoModelForCausalLM

    if Path(name).exists() and not Path(name).is_dir():
        raise ScoreError(f"{option} {name}: expected the folder of a model, found a file")
    how: dict[str, Any] = {
        "dtype": options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        "trust_remote_code": options.trust_remote_code,
    }
    try:
        if is_adapter(name):
            from peft import AutoPeftModelForCausalLM

            with warnings.catch_warnings():
                # PEFT looks on the hub for a tokenizer that the folder lacks, and reads an attribute by its old name.
                warnings.filterwarnings("ignore", message="Unable to fetch remote file", category=UserWarning)
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                model = AutoPeftModelForCausalLM.from_pretrained(name, **how)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **how)
    except Exception as error:
        raise ScoreError(f"{option} {name}: cannot be loaded ({_reason(error)})") from error
    try:
        return model.requires_grad_(False).eval().to(device)
    except torch.OutOfMemoryError as error:
        raise ScoreError(f"{option} {name}: does not fit {device} ({first_line(error)})") from error


def _same_vocabulary(tokenizer: Any, other: Any) -> None:
    ours, its = tokenizer.get_vocab(), other.get_vocab()
    if ours == its:
        return
    token = min(set(ours.items()) ^ set(its.items()), key=lambda item: (item[1], item[0]))[0]
    places = [f"{vocabulary[token]}" if token in vocabulary else "absent" for vocabulary in (ours, its)]
    raise ScoreError(
        f"the tokenizers of --model and --reference differ ({len(ours)} and {len(its)} tokens; {token!r} is"
        f" {places[0]} and {places[1]}): their log-probs cannot be compared"
    )


def check_heads(vocabularies: list[int], tokenizer: Any) -> str | None:
    """What to tell of heads of different sizes; refuse a difference that is not padding.

    Raises:
        ScoreError: a head without a column for some token.
    """
    if len(set(vocabularies)) == 1:
        return None
    common, tokens = min(vocabularies), max(tokenizer.get_vocab().values()) + 1
    if common < tokens:
        raise ScoreError(
            f"the heads of --model and --reference have {vocabularies[0]} and {vocabularies[1]} columns, and the"
            f" tokenizer has {tokens} tokens: that is more than a difference of padding"
        )
    return (
        f"The heads have {vocabularies[0]} and {vocabularies[1]} columns for {tokens} tokens: scored over the first"
        f" {common}, which both have; probabilities are over these"
    )


def check_difference(options: ScoreOptions) -> str | None:
    """What to tell of a reference that is the model itself: its folder was given twice, or training changed nothing."""
    model, reference = options.model, options.reference
    if reference is None or fingerprint(reference) != fingerprint(model):
        return None
    if Path(model).is_dir() and Path(reference).is_dir() and not _same_files(model, reference):
        return None  # samples of the files are equal, and not all of them
    return f"The files of --model {options.model} and --reference {options.reference} are the same: every reward is 0."


def check_beta(options: ScoreOptions) -> str | None:
    """What to tell of a beta that is not the one in the training arguments which a trainer left beside the model."""
    trained = _trained_beta(Path(options.model) / _TRAINING_ARGUMENTS)
    if trained is None or math.isclose(trained, options.beta, rel_tol=1e-6):
        return None
    return (
        f"The training arguments beside the model ({_TRAINING_ARGUMENTS}) say beta = {trained:g}, and the rewards are"
        f" in units of --beta {options.beta:g}: their order is the same, their size is not."
    )


def _trained_beta(path: Path) -> float | None:
    """`beta` in the arguments that transformers' Trainer saves; None if there are none, or they say nothing of it.

    The file is a pickle, of which only plain values are read: every class and function in it is replaced by `_Inert`.
    """
    try:
        if path.stat().st_size > _LARGEST_ARGUMENTS:
            return None
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if archive.getinfo(name).file_size > _LARGEST_ARGUMENTS:
                return None
            found = _InertUnpickler(io.BytesIO(archive.read(name))).load()
        beta = vars(found).get("beta")
    except Exception:  # whatever a file that somebody made up can raise; it is only asked for a hint
        return None
    return float(beta) if type(beta) in (int, float) and math.isfinite(beta) and beta > 0 else None


class _Inert:
    """Stands for any object or function of a pickle: keeps its attributes and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> _Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, key: Any) -> Any:
        return None


def fingerprint(name: str | None) -> str | None:
    """What tells a model's folder from another: names and sizes of its files and samples of their contents.

    Of each tensor of a safetensors file 16 blocks of 4 KiB are read, of other files as many in all: training may
    change a few tensors alone. An adapter's files are followed by those of its base. A name that is no folder stands
    for itself.
    """
    if name is None or not Path(name).is_dir():
        return name
    digest = hashlib.sha256()
    for file in itertools.chain.from_iterable(map(_model_files, _with_bases(name))):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            for begin, end in _parts(file, content):
                for i in range(_BLOCKS):
                    content.seek(begin + max(0, end - begin - _BLOCK) * i // (_BLOCKS - 1))
                    digest.update(content.read(min(_BLOCK, end - begin)))
    return digest.hexdigest()[:16]


def _with_bases(name: str) -> list[Path]:
    """A model's folder and, after an adapter's, that of its base, if it is a folder too."""
    found: list[Path] = []
    base: str | None = name
    while base is not None and Path(base).is_dir() and Path(base) not in found:
        found.append(Path(base))
        try:
            base = _base(base)
        except ScoreError:  # a damaged adapter: loading it says what is wrong
            break
    return found


def _model_files(folder: Path) -> list[Path]:
    suffixes = (".json", ".safetensors", ".bin", ".model", ".jinja")
    return [file for file in sorted(folder.iterdir()) if file.suffix in suffixes and file.is_file()]


def _parts(file: Path, content: BinaryIO) -> list[tuple[int, int]]:
    """Where the tensors of a safetensors file lie in it, from byte to byte; the whole of any other file."""
    size = file.stat().st_size
    whole = [(0, size)]
    if file.suffix != ".safetensors":
        return whole
    try:
        start = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(start) if start <= _LARGEST_HEADER else b"")
        tensors = [tensor["data_offsets"] for name, tensor in sorted(header.items()) if name != "__metadata__"]
        parts = [(0, 8 + start), *((8 + start + int(begin), 8 + start + int(end)) for begin, end in tensors)]
        return parts if all(0 <= begin <= end <= size for begin, end in parts) else whole
    except (ValueError, KeyError, TypeError, AttributeError):  # a broken file: loading it says what is wrong
        return whole


def _same_files(one: str, other: str) -> bool:
    """Whether two folders hold the same models, byte for byte."""
    files, others = _model_files(Path(one)), _model_files(Path(other))
    return [file.name for file in files] == [file.name for file in others] and all(
        filecmp.cmp(file, twin, shallow=False) for file, twin in zip(files, others, strict=True)
    )
