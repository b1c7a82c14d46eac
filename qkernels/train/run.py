"""A training run from options to a finished folder: data, SFT if asked for, preference training, scores, report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .._version import __version__
from ..data import DataError
from ..integrations.training import PreferenceTraining
from ..report import folders
from ..report.progress import Progress, quiet_transformers
from ..score.encode import Encoder
from ..score.files import finite
from ..score.folder import RunLock
from ..score.models import fingerprint
from ..score.options import ScoreError
from ..text.characters import first_line, printable
from . import dataset, folder
from .model import Start, check_folder, from_gguf, load_start
from .options import TrainError, TrainOptions, as_yaml, is_main_process, machine_rank, parse, speaks
from .processes import check_launcher, check_sharding, fsdp_version, save_model, sharding_on_cpus

if TYPE_CHECKING:
    from ..monitor import RewardMonitor

# Options that a resumed run may change: where it writes to, what it shows, how often it saves.
_FREE = (
    "out", "resume", "overwrite", "shown", "model", "resume_from_checkpoint", "report_to", "run_name", "logging_dir",
    "disable_tqdm", "save_steps", "save_total_limit", "save_strategy", "dataloader_num_workers", "log_level",
)  # fmt: skip
# What the text of an error says when the disk is full: of safetensors, of torch.save.
_FULL = ("No space left", "PytorchStreamWriter", "unexpected pos", "Disk quota")
_LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "ProcessGroup")


def main(argv: Sequence[str]) -> int:
    """`qkernels train`: 0 on success, 2 on an error that the user can mend (its text on standard error), 130 when
    interrupted."""
    try:
        figures = run_train(argv)
    except (DataError, ScoreError, TrainError, ImportError) as error:
        rank = "" if is_main_process() else f"process {os.environ['RANK']}: "
        print(f"qkernels train: error: {rank}{printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nqkernels train: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    if is_main_process():
        print(printable(summary(figures), keep=" \n"))
    return 0


def run_train(argv: Sequence[str], stream: TextIO | None = None) -> dict[str, Any]:
    """Train as the command does.

    Args:
        argv: the flags of the command.
        stream: where progress goes; standard error of the main process by default.

    Returns:
        The contents of `metrics.json`.

    Raises:
        TrainError, ScoreError: an option, the folder, the model, its tokenizer or a pair stands in the way; the disk is
            full; a process was lost. Checkpoints stay, and `--resume` goes on from the last one.
        DataError: the preference data cannot be used.
        ImportError: TRL is missing, or one that is not known here.
    """
    _require_packages()
    with _quiet_warnings():
        options, args, model_args, given = parse(argv)
    options.check()
    _check_reports(args.report_to)
    check_sharding(args)
    assert options.model is not None
    gguf = check_folder(options.model)
    _check_out(options)
    progress = Progress(stream or speaks())
    _check_arguments(args)
    _spare_inputs(options, args)
    with (
        _locked(options.folder), quiet_transformers(), _quiet_warnings(), _errors(options.folder), sharding_on_cpus()
    ):  # fmt: skip
        return _Run(options, args, model_args, given, progress).run(gguf)


def _check_arguments(args: Any) -> None:
    """Refuse what transformers would refuse with a traceback, and only after the model has been loaded."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise TrainError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    checkpoint = _named_checkpoint(args)
    if checkpoint is not None and not (checkpoint / "trainer_state.json").is_file():
        raise TrainError(f"--resume-from-checkpoint {checkpoint}: no checkpoint; it has no trainer_state.json")


def _named_checkpoint(args: Any) -> Path | None:
    """The checkpoint to go on from, where the user has named one."""
    given = args.resume_from_checkpoint
    return Path(given) if isinstance(given, str) and given not in ("True", "true") else None


def _spare_inputs(options: TrainOptions, args: Any) -> None:
    """Not to delete what is to be read."""
    if not options.overwrite:
        return
    for flag, value in (
        ("--model", options.model),
        ("--data", options.data),
        ("--eval-data", options.eval_data),
        ("--resume-from-checkpoint", args.resume_from_checkpoint),
    ):
        if isinstance(value, str) and folders.lies_in(value, options.folder):
            raise TrainError(
                f"{flag} {value}: lies in --out {options.folder}, whose files --overwrite deletes; choose another --out"
            )


def _require_packages() -> None:
    missing = [
        name for name in ("transformers", "datasets", "accelerate", "pyarrow", "yaml") if find_spec(name) is None
    ]
    if missing:
        raise TrainError(f"training needs {' and '.join(missing)}: pip install 'qkernels[train]'")


def _check_reports(names: Sequence[str]) -> None:
    """Refuse what nothing here can report to, before anything is loaded."""
    from transformers.integrations import integration_utils

    available = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise TrainError(f"--report-to {name}: not known to transformers; known are {known}, all and none")
        if name not in available:
            installed = ", ".join(sorted(available)) or "none of them"
            raise TrainError(
                f"--report-to {name}: its package is not installed (pip install {name}; installed: {installed})"
            )


def _check_out(options: TrainOptions) -> None:
    """Refuse a folder that may not be touched, on every process at once.

    The main process looks, and the others take its word: one that looked for itself might come when the main process
    has begun to write, and take the run for an earlier one.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    refusal: list[str | None] = [None]
    if is_main_process():
        try:
            folder.refuse(options.folder, options.resume, options.overwrite)
            if options.resume and (options.folder / folder.METRICS).is_file():
                raise TrainError(f"--out {options.folder}: the run there is finished; there is nothing to resume")
        except TrainError as error:
            refusal = [str(error)]
    if PartialState().num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise TrainError(refusal[0])


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder, made and locked by the main process for as long as the run lasts."""
    if not is_main_process():
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"--out {out}: cannot be created ({error.strerror or error})") from None
    with RunLock(out) as lock:
        try:
            lock.acquire()
        except OSError as error:
            raise TrainError(f"--out {out}: cannot be written ({error.strerror or error})") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # nothing was written: leave no empty folder behind
                if [entry.name for entry in out.iterdir()] == [".lock"]:
                    (out / ".lock").unlink()
                    out.rmdir()


@contextlib.contextmanager
def _quiet_warnings() -> Iterator[None]:
    """Without what TRL and transformers say of each other, which no user of the command can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated and will be removed", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory", category=UserWarning)
        yield


@contextlib.contextmanager
def _errors(out: Path) -> Iterator[None]:
    """What ends a run from outside, told with what is kept."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"out of memory ({first_line(error)}); a smaller --per-device-train-batch-size with a larger"
            f" --gradient-accumulation-steps, a smaller --max-length or --lora-r 16 takes less. {_kept(out)}"
        ) from error
    except OSError as error:
        raise TrainError(f"--out {out}: cannot be written ({error.strerror or error}). {_kept(out)}") from error
    except (TrainError, ScoreError, DataError):
        raise
    except Exception as error:
        text = str(error)
        if any(sign in text for sign in _FULL):
            raise TrainError(f"--out {out}: cannot be written ({first_line(error)}). {_kept(out)}") from error
        if isinstance(error, RuntimeError) and "RANK" in os.environ and any(sign in text for sign in _LOST):
            raise TrainError(
                f"a process of the run was lost ({first_line(error)}). {_kept(out)} with the same number of processes"
            ) from error
        raise


def _kept(out: Path) -> str:
    checkpoint, _ = folder.last_checkpoint(out)
    if checkpoint is None:
        return "There is no checkpoint yet; --resume starts again"
    return f"{checkpoint.name} is kept, and --resume goes on from it"


class _Run:
    """One run, from its options on.

    Args:
        options: ours.
        args: TRL's `DPOConfig`, with this package's options.
        model_args: TRL's `ModelConfig`.
        given: what the user has set, by name.
        progress: where to say what happens.
    """

    def __init__(self, options: TrainOptions, args: Any, model_args: Any, given: dict[str, Any], progress: Progress):
        self.options, self.args, self.model_args, self.given = options, args, model_args, given
        self.progress, self.out = progress, options.folder
        self.began = time.monotonic()

    def run(self, gguf: Path | None) -> dict[str, Any]:
        """Everything; the contents of `metrics.json`."""
        from accelerate import PartialState

        self.state = PartialState()
        check_launcher(self.state.num_processes)
        is_first = not (self.out / folder.RUN).is_file()
        try:
            start = self._start(gguf)
            prepared, encoder = self._data(start)
            peft_config = self._peft_config()
            settings = self._settings(prepared)
        except BaseException:
            if is_first and self.state.is_main_process:
                folder.discard_preparations(self.out)
            raise
        if self.state.is_main_process:
            if self.options.resume and (self.out / folder.RUN).is_file():
                folder.check_same(self.out, settings)
            else:
                if self.options.overwrite:  # not before the new run's data are known to be usable
                    machines = {folder.data_of(self.out, i).name for i in range(self.state.num_processes)}
                    folder.clear(self.out, machines if gguf is None else {*machines, folder.BASE})
                folder.begin(self.out, settings)
            folder.write(self.out / folder.CONFIG, as_yaml(self.given))
        self.state.wait_for_everyone()
        first, sft_curve = start.model, list[dict[str, float]]()
        if self.options.wants_sft:
            first, sft_curve = self._sft(start, peft_config, prepared)
        trainer, watch = self._train(first, start, peft_config, prepared)
        return self._finish(trainer, watch, first, start, prepared, encoder, sft_curve)

    # --- what is trained on -------------------------------------------------------------------------------------------

    def _start(self, gguf: Path | None) -> Start:
        name = self.options.model
        assert name is not None
        if gguf is not None:
            with self.state.main_process_first():
                name = from_gguf(gguf, self.out, anew=self.options.overwrite and self.state.is_main_process)
        args, model_args = self.args, self.model_args
        given = dict(args.model_init_kwargs or {})
        given.setdefault("dtype", model_args.dtype)
        if model_args.attn_implementation is not None:
            given.setdefault("attn_implementation", model_args.attn_implementation)
        if not Path(name).is_dir():
            given.setdefault("revision", model_args.model_revision)
        args.model_init_kwargs = given
        start = load_start(
            name, self.options.chat_template, self.options.prompt_format, args.trust_remote_code,
            model_args.model_revision,
        )  # fmt: skip
        if start.limit is not None and args.max_length is not None and args.max_length > start.limit:
            if "max_length" in self.given:
                raise TrainError(
                    f"--max-length {args.max_length} is more than the {start.limit} tokens the model takes"
                )
            args.max_length = start.limit
        for note in start.notes:
            self.progress.say(note)
        return start

    def _data(self, start: Start) -> tuple[dataset.Prepared, Encoder]:
        """Tokenised by one process of each machine, the others wait."""
        from accelerate.utils import broadcast_object_list

        # Without a cut by TRL, what the model cannot take is refused.
        limit = start.limit if self.args.max_length is None else None
        encoder = Encoder(start.tokenizer, self.options.prompt_format, None, limit)
        place = folder.data_of(self.out, machine_rank())
        found: list[Any] = [None]
        with self.state.local_main_process_first():
            if self.state.is_local_main_process:
                self.progress.say(f"Reading and tokenising {self.options.data}")
                sources = dataset.open_sources(self.options)
                found = [dataset.prepare(self.options, sources, encoder, self.args.max_length, self.args.seed, place)]
        if self.state.num_processes > 1:
            broadcast_object_list(found)
        prepared = found[0]._replace(folder=place)
        for line in _data_lines(self.options, prepared, self.args.max_length):
            self.progress.say(line)
        return prepared, encoder

    def _peft_config(self) -> Any:
        from trl import get_peft_config

        if self.model_args.use_peft and find_spec("peft") is None:
            raise TrainError("LoRA needs peft: pip install peft")
        return get_peft_config(self.model_args)

    def _settings(self, prepared: dataset.Prepared) -> dict[str, Any]:
        """What the run's results depend on."""
        chosen = {name: value for name, value in self.given.items() if name not in _FREE}
        return {
            **chosen,
            "model (contents)": fingerprint(self.options.model),
            "data (contents)": prepared.digest,
            "processes": self.state.num_processes,
            # Checkpoints of one kind are not read by the other, and a launcher may have asked for it.
            **({} if (version := fsdp_version(self.args)) is None else {"FSDP version": version}),
        }

    # --- training -----------------------------------------------------------------------------------------------------

    def _sft(self, start: Start, peft_config: Any, prepared: dataset.Prepared) -> tuple[str, list[dict[str, float]]]:
        from .callbacks import TrainProgress
        from .sft import is_done, run_sft

        if self.options.resume and is_done(self.out):
            self.progress.say("1. Supervised fine-tuning: done before")
            return str(self.out / folder.SFT), []
        self.progress.say("1. Supervised fine-tuning on the chosen answers")
        return run_sft(
            self.options, self.args, start.model, start.tokenizer, peft_config, prepared.folder,
            TrainProgress(self.progress, "SFT"),
        )  # fmt: skip

    def _train(self, first: str, start: Start, peft_config: Any, prepared: dataset.Prepared) -> tuple[Any, Any]:
        from trl import get_quantization_config

        args = self.args
        args.output_dir = str(self.out)
        evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        held_out = dataset.load(prepared.folder / dataset.HELD_OUT) if prepared.held_out else None
        if held_out is not None and not len(held_out):
            held_out = None
        if evaluates and held_out is None:
            raise TrainError(
                "--eval-strategy needs held-out pairs, and "
                + ("max_length leaves no answer of any" if prepared.held_out else "--held-out 0 leaves none")
            )
        training = PreferenceTraining(
            self.progress,
            "training",
            lambda: _kept(self.out),
            model=first,
            args=args,
            train_dataset=dataset.load(prepared.folder / dataset.TRAIN),
            eval_dataset=held_out if evaluates else None,
            processing_class=start.tokenizer,
            peft_config=peft_config,
            quantization_config=get_quantization_config(self.model_args),
        )
        trainer = training.trainer
        if args.fsdp and not trainer.is_fsdp_enabled:
            raise TrainError("--fsdp: accelerate does not shard models on this device; leave it out")
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self.progress.say(
            f"{'2. ' if self.options.wants_sft else ''}Preference training: {type(trainer.model).__name__},"
            f" {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters trained, loss"
            f" {' + '.join(map(str, args.to_dict()['loss_type']))}, beta {args.beta:g}"
        )
        watch = self._watch(trainer, held_out)
        checkpoint = None
        if self.options.resume:
            checkpoint, broken = folder.last_checkpoint(self.out)
            if (named := _named_checkpoint(args)) is not None:
                checkpoint, broken = named, []
            for path in broken:
                self.progress.say(f"{path.name} is incomplete and left aside")
            self.progress.say("No checkpoint yet: from the start" if checkpoint is None else f"From {checkpoint.name}")
        training.run(None if checkpoint is None else str(checkpoint))
        return trainer, watch

    def _watch(self, trainer: Any, held_out: Any) -> Any:
        """The reward monitor, where there are pairs and a reference for it."""
        from ..integrations.transformers.wrappers import unwrap
        from .callbacks import Watch

        count = min(self.options.monitor_pairs, 0 if held_out is None else len(held_out))
        if not count:
            return None
        adapter = callable(getattr(trainer.model, "disable_adapter", None))
        if trainer.ref_model is None and not adapter:
            self.progress.say(
                "No reward monitor: with this loss, or with cached log-probs, no reference is in memory while training"
            )
            return None
        assert unwrap(trainer.model) is not None
        size = max(1, trainer.args.per_device_eval_batch_size)
        batches = []
        for begin in range(0, count, size):
            batch = dict(trainer.data_collator([held_out[i] for i in range(begin, min(count, begin + size))]))
            weights = batch.pop("token_weights", None)
            if weights is not None:
                batch["completion_mask"] = batch["completion_mask"] * (weights != 0)
            batches.append(batch)
        watch = Watch(batches, trainer.ref_model, trainer.args.beta, self.options.monitor_every, self.progress)
        watch.attach(trainer)
        often = self.options.monitor_every
        self.progress.say(
            f"Reward monitor: {count} held-out pairs, scored before the first step and"
            f" {f'every {often} steps' if often else 'ten times'} after it"
        )
        return watch

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(
        self, trainer: Any, watch: Any, first: str, start: Start, prepared: dataset.Prepared, encoder: Encoder,
        sft_curve: list[dict[str, float]],
    ) -> dict[str, Any]:  # fmt: skip
        from .card import write_card
        from .page import write_page

        trained = time.monotonic()
        save_model(trainer, self.out)
        table = None
        if prepared.held_out:
            self.progress.say("Scoring the held-out pairs, writing model and report")
            table = self._scores_if_they_fit(trainer, first, start, prepared, encoder)
        monitor: RewardMonitor | None = None if watch is None else watch.monitor
        metrics = {
            "results": None if table is None else _results(table),
            "options": {name: value for name, value in self.given.items() if name not in ("resume", "overwrite")},
            "training": {
                "model": self.options.model,
                "reference": first,
                "loss": self.args.to_dict()["loss_type"],
                "beta": self.args.beta,
                "learning_rate": self.args.learning_rate,
                "steps": trainer.state.global_step,
                "epochs": trainer.state.epoch,
                "pairs_a_step": self.args.train_batch_size * self.args.gradient_accumulation_steps
                * self.args.world_size,
                "max_length": self.args.max_length,
                "lora_rank": self.model_args.lora_r if self.model_args.use_peft else None,
                "chat_template": encoder.chat,
                "seed": self.args.seed,
            },
            "data": {
                "source": self.options.data,
                "train_pairs": prepared.train_pairs,
                "held_out_pairs": len(prepared.held_out),
                "split": prepared.split,
                "ignored_fields": list(prepared.ignored_fields),
                "skipped": prepared.skipped,
                "held_out_numbers": list(prepared.held_out),
                "held_out_unanswered": prepared.unanswered,
                "cut_pairs": prepared.longer,
                "dropped_pairs": prepared.dropped,
                "trajectories": prepared.trajectories,
            },
            "curves": {"sft": sft_curve, "log": trainer.state.log_history},
            "monitor": None if monitor is None else monitor.state_dict(),
            "versions": _versions(),
            "elapsed_seconds": {
                "training": round(trained - self.began, 1), "total": round(time.monotonic() - self.began, 1)
            },
        }  # fmt: skip
        if self.state.is_main_process:
            write_page(self.out / folder.REPORT, metrics, monitor, table, self.options.shown)
            write_card(self.out / folder.CARD, metrics, monitor)
            folder.write(self.out / folder.METRICS, json.dumps(finite(metrics), indent=1, default=str) + "\n")
        self.state.wait_for_everyone()
        if self.state.is_local_main_process:
            shutil.rmtree(prepared.folder, ignore_errors=True)
        self.state.wait_for_everyone()
        return {**metrics, "out": str(self.out)}

    def _scores_if_they_fit(
        self, trainer: Any, first: str, start: Start, prepared: dataset.Prepared, encoder: Encoder
    ) -> Any:
        """`_scores`; without them where a GPU's memory does not suffice, since the trained model is on disk by now."""
        import torch

        try:
            return self._scores(trainer, first, start, prepared, encoder)
        except torch.OutOfMemoryError as error:
            if trainer.is_fsdp_enabled:  # the others would wait for this process
                raise
            self.progress.say(
                f"out of memory while scoring ({first_line(error)}); the model is saved, the report has no scores:"
                f" qkernels score --model {self.out} --reference {first} --data {self.options.data} --out DIR"
            )
            return None

    def _scores(self, trainer: Any, first: str, start: Start, prepared: dataset.Prepared, encoder: Encoder) -> Any:
        """Every token of the held-out pairs; sharded models need all processes for it, others the main one alone."""
        from ..score.run import score_preferences

        if not (self.state.is_main_process or trainer.is_fsdp_enabled):
            return None
        model, reference = trainer.model, trainer.ref_model
        if reference is None:
            reference = model if callable(getattr(model, "disable_adapter", None)) else self._loaded(first, model)
        # The trainer has made autocast part of its model's forward, and a reference that is loaded here has none of it.
        with trainer.accelerator.autocast():
            return score_preferences(
                model,
                start.tokenizer,
                prepared.held_out.values(),
                reference=reference,
                beta=self.args.beta,
                max_length=self.args.max_length,
                prompt_format="chat" if encoder.chat else "plain",
                progress=self.progress.stream,
            )

    def _loaded(self, first: str, like: Any) -> Any:
        """The model that training started from, where the trainer has none in memory."""
        from transformers import AutoModelForCausalLM

        one = next(like.parameters())
        model = AutoModelForCausalLM.from_pretrained(
            first, dtype=one.dtype, trust_remote_code=self.args.trust_remote_code
        )
        return model.requires_grad_(False).eval().to(one.device)


def _data_lines(options: TrainOptions, prepared: dataset.Prepared, max_length: int | None) -> Iterator[str]:
    ignored = f"; ignored fields: {', '.join(prepared.ignored_fields)}" if prepared.ignored_fields else ""
    yield (
        f"Data: {prepared.train_pairs} training pairs, {len(prepared.held_out)} held out ({prepared.split}), from"
        f" {options.data}{ignored}"
    )
    if prepared.skipped:
        yield f"--skip-invalid {prepared.skipped}"
    if prepared.trajectories:
        yield "Some answers have several turns: only what the assistant said in them is trained"
    if prepared.longer:
        yield f"{prepared.longer} pairs are longer than max_length={max_length} and are cut to it (--truncation-mode)"
    if prepared.dropped:
        yield f"Left out {prepared.dropped} pairs: their prompt alone has max_length={max_length} tokens or more"
    if prepared.unanswered:
        yield (
            f"{prepared.unanswered} of the held-out pairs have prompts of max_length={max_length} tokens or more: they"
            " are left out of evaluation and reward monitor"
        )


def _results(table: Any) -> dict[str, Any]:
    from ..score.summary import Overview

    overview = Overview()
    overview.add(table)
    return overview.figures()


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")}
    return {"qkernels": __version__, "python": platform.python_version(), **packages}


def summary(figures: Mapping[str, Any]) -> str:
    """What a run has come to, in a few lines for the terminal."""
    out, results, training = Path(figures["out"]), figures["results"], figures["training"]
    rows = [("trained", f"{training['steps']} steps of {training['pairs_a_step']} pairs, beta {training['beta']:g}")]
    if results is not None:
        rows += [
            ("held-out pairs", f"{results['pairs']} ({results['tokens']} answer tokens)"),
            (
                "ranked right",
                f"{results['pair_accuracy']:.1%} by reward; {results['pair_accuracy_of_reference_logps']:.1%} by the"
                " log-prob of the model that training started from",
            ),
            (
                "mean margin",
                f"{results['mean_margin']:+.3f} (chosen {results['mean_chosen_reward']:+.3f}, rejected"
                f" {results['mean_rejected_reward']:+.3f})",
            ),
        ]
    monitor = figures["monitor"]
    if monitor is not None:
        found = monitor["findings"]
        rows.append(("monitor", "; ".join(one["name"].replace("_", " ") for one in found) or "no finding"))
    rows += [
        ("time", f"{figures['elapsed_seconds']['total']:.0f} s"),
        ("model", f"{out}  (its reference: {training['reference']})"),
        ("report", str(out / folder.REPORT)),
        ("card", str(out / folder.CARD)),
    ]
    return "\n".join(f"{name:<15} {text}" for name, text in rows)
