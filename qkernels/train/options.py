"""What a user may choose in `qkernels train`: our options and every one of TRL's, as flags and as a YAML file."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..integrations.training import TrainError as TrainError

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..integrations.trl import TokenDPOConfig

# TRL's names, which its own command line and its YAML files use, and ours for the same.
ALIASES = {
    "model_name_or_path": "model",
    "output_dir": "out",
    "dataset_name": "data",
    "dataset_config": "data_config",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
}
# Of TRL's command line, what this one has no use for: accepted only with the value that means nothing.
_WITHOUT_MEANING = {"dataset_streaming": False, "ignore_bias_buffers": False, "streaming": False, "datasets": []}

DESCRIPTION = """\
Train a language model with preferences: TRL's DPO trainer with the losses, heads and reward monitor of qkernels.

Writes OUT: the trained model and its tokenizer, README.md (the model card), report.html, metrics.json, train.yaml (the
options, to repeat the run) and checkpoints. Every option of TRL's DPOConfig and ModelConfig is a flag, and a name in
the YAML file of --config; `--help-all` lists them. An interrupted run goes on with --resume. On many processes or
machines: accelerate launch -m qkernels train ..., or torchrun -m qkernels train ...
"""


@dataclass
class TrainOptions:
    """The options of `qkernels train` that TRL does not have.

    model: folder of a model in transformers format, or with a GGUF file; or OWNER/MODEL on the Hugging Face Hub.
    data: preference data (see `qkernels.data.open_preferences`).
    out: folder to create.
    split, data_config, skip_invalid: of `data`.
    eval_data, eval_split: data held out for the report instead of a part of `data`; another split of `data`.
    held_out: how many pairs of `data` are held out; None for a tenth, at most 200.
    limit: only the first pairs of `data`.
    sft_epochs, sft_steps, sft_learning_rate: supervised fine-tuning on the chosen answers before; 0 for none.
    monitor_pairs: held-out pairs that the reward monitor scores while training runs; 0 for none.
    monitor_every: steps from one of its observations to the next; None for ten over the run.
    prompt_format: "chat", "plain" or "auto", as `qkernels score` takes it.
    chat_template: file with a Jinja template that takes the place of the tokenizer's.
    shown: held-out pairs in the report.
    resume: go on from the last checkpoint in `out`.
    overwrite: replace what an earlier run has written to `out`.
    """

    model: str | None = field(
        default=None, metadata={"help": "folder of a model (transformers format, or a GGUF file), or OWNER/MODEL"}
    )
    data: str | None = field(default=None, metadata={"help": "preference pairs: a file, a folder, OWNER/NAME"})
    out: str | None = field(default=None, metadata={"help": "folder to create"})
    split: str | None = field(default=None, metadata={"help": "of --data (default: its only one, or train)"})
    data_config: str | None = field(default=None, metadata={"help": "of a hub data set that has several"})
    skip_invalid: bool = field(default=False, metadata={"help": "leave out records that cannot be used, and say why"})
    eval_data: str | None = field(default=None, metadata={"help": "held-out pairs (default: a part of --data)"})
    eval_split: str | None = field(default=None, metadata={"help": "the split of --eval-data, or of --data"})
    held_out: int | None = field(
        default=None, metadata={"help": "pairs of --data to hold out (default: a tenth, at most 200; 0: none)"}
    )
    limit: int | None = field(default=None, metadata={"help": "only the first N pairs of --data"})
    sft_epochs: float = field(
        default=0.0, metadata={"help": "first, passes of supervised fine-tuning on the chosen answers (default: none)"}
    )
    sft_steps: int = field(default=0, metadata={"help": "the same in steps"})
    sft_learning_rate: float = field(default=2e-5, metadata={"help": "its learning rate (default: 2e-5)"})
    monitor_pairs: int = field(
        default=32, metadata={"help": "held-out pairs that the reward monitor scores (default: 32; 0: none)"}
    )
    monitor_every: int | None = field(
        default=None, metadata={"help": "steps between its observations (default: ten observations)"}
    )
    prompt_format: str = field(default="auto", metadata={"help": "chat, plain or auto (default: auto)"})
    chat_template: str | None = field(
        default=None, metadata={"help": "file with a Jinja template in place of the tokenizer's"}
    )
    shown: int = field(default=8, metadata={"help": "held-out pairs in the report (default: 8)"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in OUT"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run has written to OUT"})

    def check(self) -> None:
        """Raise `TrainError` naming the option, what came and what was expected."""
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise TrainError(f"--{name} is missing: give it as a flag, or as `{name}:` in the file of --config")
        if self.resume and self.overwrite:
            raise TrainError("give either --resume or --overwrite, not both")
        for name, least in (
            ("held_out", 0),
            ("limit", 1),
            ("sft_steps", 0),
            ("sft_epochs", 0),
            ("monitor_pairs", 0),
            ("monitor_every", 1),
            ("shown", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
        if self.sft_epochs and self.sft_steps:
            raise TrainError("give either --sft-epochs or --sft-steps, not both")
        if not self.sft_learning_rate > 0:
            raise TrainError(f"--sft-learning-rate must be above 0, got {self.sft_learning_rate}")
        if self.prompt_format not in ("auto", "chat", "plain"):
            raise TrainError(f"--prompt-format must be one of auto, chat, plain; got {self.prompt_format!r}")
        if self.prompt_format == "plain" and self.chat_template is not None:
            raise TrainError("--prompt-format plain uses no chat template: leave out --chat-template, or the format")
        if self.held_out and (self.eval_data or self.eval_split):
            raise TrainError("give either --held-out or --eval-data / --eval-split, not both")

    @property
    def folder(self) -> Path:
        """The folder to create."""
        assert self.out is not None
        return Path(self.out)

    @property
    def wants_sft(self) -> bool:
        """Whether supervised fine-tuning comes first."""
        return bool(self.sft_epochs or self.sft_steps)


def parse(argv: Sequence[str]) -> tuple[TrainOptions, TokenDPOConfig, ModelConfig, dict[str, Any]]:
    """The options from the flags and the file of `--config`; flags count more.

    Returns:
        Ours, TRL's of training, TRL's of the model, and everything that was given by name, for `train.yaml`.

    Raises:
        TrainError: an option that does not exist, or a value that it cannot have.
        ImportError: no TRL that this package knows.
        SystemExit: after printing help.
    """
    from ..integrations.trl import require_trl

    require_trl()
    from trl import ModelConfig, TrlParser

    from ..integrations.trl import TokenDPOConfig

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise TrainError(message)

    kinds = (TrainOptions, TokenDPOConfig, ModelConfig)
    argv = [_without_alias(argument) for argument in argv]
    show_all = "--help-all" in argv
    if show_all or {"-h", "--help"} & set(argv):
        shown = TrlParser(kinds if show_all else kinds[:1], prog="qkernels train", description=DESCRIPTION)
        shown.formatter_class = argparse.RawDescriptionHelpFormatter
        shown.add_argument("--config", metavar="FILE", help="YAML file with any of the options, by name")
        shown.add_argument(
            "--help-all", action="store_true", help="also the options of TRL's DPOConfig and ModelConfig"
        )
        shown.parse_args(["--help"])
    parser = Parser(kinds, prog="qkernels train", add_help=False, allow_abbrev=False)
    argv, config = _config_file(argv)
    config = {ALIASES.get(name, name): value for name, value in config.items()}
    known = {action.dest for action in parser._actions}
    _check_names(config, known)
    for name in _WITHOUT_MEANING:
        config.pop(name, None)
    given = {**config, **_given(Parser(kinds, add_help=False, allow_abbrev=False), argv)}
    parser.set_defaults_with_config(**config)
    parser.set_defaults(**_defaults(given))
    if given.get("out"):
        parser.set_defaults(output_dir=given["out"])
    try:
        ours, args, model = parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, TypeError, ImportError, OSError) as error:
        text = str(error).strip()
        if isinstance(error, ImportError) and given.get("deepspeed"):  # of which transformers says "for The 'deepspeed"
            text = f"--deepspeed: its package cannot be used ({text}); pip install deepspeed, for ZeRO-2"
        raise TrainError(text) from error
    # A rank asks for LoRA; without one it is TRL's default.
    model.use_peft = model.use_peft or "lora_r" in given
    if args.resume_from_checkpoint:
        ours.resume = True
    return ours, args, model, given


def _without_alias(argument: str) -> str:
    """A flag by our name, whichever it was given by."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    ours = ALIASES.get(name[2:].replace("-", "_"))
    return f"--{ours.replace('_', '-')}{equals}{value}" if ours else argument


def _config_file(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The flags without `--config`, and what its file holds."""
    rest = list(argv)
    path = None
    for i, argument in enumerate(rest):
        if argument == "--config":
            if i + 1 == len(rest):
                raise TrainError("--config needs the name of a YAML file")
            path = rest[i + 1]
            del rest[i : i + 2]
            break
        if argument.startswith("--config="):
            path = argument.partition("=")[2]
            del rest[i]
            break
    if path is None:
        return rest, {}
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise TrainError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise TrainError(f"--config {path}: expected options by name, found {type(config).__name__}")
    environment = config.pop("env", {})
    if not isinstance(environment, dict):
        raise TrainError(f"--config {path}: expected `env` to hold variables by name")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return rest, {str(name).replace("-", "_"): value for name, value in config.items()}


def _check_names(config: dict[str, Any], known: set[str]) -> None:
    for name, value in config.items():
        if name in known or (name in _WITHOUT_MEANING and value == _WITHOUT_MEANING[name]):
            continue
        if name in _WITHOUT_MEANING:
            raise TrainError(f"{name}: {value!r} is an option of TRL's own command that this one does not have")
        close = difflib.get_close_matches(name, known, 1)
        raise TrainError(f"{name}: there is no such option" + (f"; did you mean {close[0]}?" if close else ""))


def _given(parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """The options that the flags name."""
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_args(argv))


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults other than TRL's: CPUs and fp32 where there is no accelerator, our bar instead of one for each part."""
    import torch

    changed: dict[str, Any] = {"disable_tqdm": True}
    if not torch.accelerator.is_available():
        changed["use_cpu"] = True  # accelerate does not join the processes of a launcher without it
        if not given.get("fp16"):
            changed["bf16"] = False
    return {name: value for name, value in changed.items() if name not in given}


def as_yaml(given: dict[str, Any]) -> str:
    """What was given, as a file for `--config`."""
    import yaml

    left = {name: value for name, value in given.items() if name not in ("resume", "overwrite", "out")}
    order = [one.name for one in fields(TrainOptions)]
    names = sorted(left, key=lambda name: (order.index(name) if name in order else len(order), name))
    text = "# qkernels train --config train.yaml --out OUT\n"
    return text + yaml.safe_dump({name: left[name] for name in names}, sort_keys=False, allow_unicode=True)


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes, known before anything distributed is set up."""
    return int(os.environ.get("RANK", "0") or 0) == 0


def machine_rank() -> int:
    """The number of this process's machine, from 0: as torchrun and accelerate say it."""
    if "GROUP_RANK" in os.environ:
        return int(os.environ["GROUP_RANK"])
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0)
    return int(os.environ.get("RANK", "0") or 0) // each if each else 0


def speaks() -> Any:
    """Where progress goes: standard error of the main process, and nowhere of the others."""
    return sys.stderr if is_main_process() else open(os.devnull, "w", encoding="utf-8")
