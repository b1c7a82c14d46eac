"""Supervised fine-tuning on the chosen answers, before: TRL's SFTTrainer with this package's head."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from .dataset import CHOSEN, load
from .folder import SFT, last_checkpoint
from .options import TrainOptions
from .processes import save_model

_DONE, _ADAPTER = "qkernels_sft_done", "adapter"


def is_done(out: Path) -> bool:
    """Whether an earlier run has finished it."""
    return (out / SFT / _DONE).is_file()


def sft_arguments(options: TrainOptions, args: Any) -> Any:
    """The configuration of SFT: that of preference training, but for how long and how fast."""
    from transformers import TrainingArguments
    from trl import SFTConfig

    shared = {one.name: getattr(args, one.name) for one in fields(TrainingArguments) if one.init}
    shared |= {"max_length": args.max_length, "trust_remote_code": args.trust_remote_code}
    shared |= {
        "output_dir": str(options.folder / SFT),
        "learning_rate": options.sft_learning_rate,
        "num_train_epochs": options.sft_epochs or 1.0,
        "max_steps": options.sft_steps or -1,
        "resume_from_checkpoint": None,
        "load_best_model_at_end": False,
        "eval_strategy": "no",
        "push_to_hub": False,
        "hub_model_id": None,
    }
    return SFTConfig(**shared)


def run_sft(
    options: TrainOptions, args: Any, model: str, tokenizer: Any, peft_config: Any, data: Path, callback: Any
) -> tuple[str, list[dict[str, float]]]:
    """Train, and save the model that preference training starts from.

    Args:
        options, args: of the run.
        model: folder or hub name to start from.
        tokenizer: its tokenizer.
        peft_config: for LoRA, whose adapter is merged at the end; None for all weights.
        data: folder with the Arrow files.
        callback: for progress.

    Returns:
        The folder of the result, and the curve: step, loss.
    """
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from ..core.memory import collect
    from ..integrations.trl import patch_trl

    config = sft_arguments(options, args)
    config.model_init_kwargs = args.model_init_kwargs
    with patch_trl():
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=load(data / CHOSEN),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[callback],
        )
    trainer.remove_callback(PrinterCallback)
    checkpoint, _ = last_checkpoint(Path(config.output_dir)) if options.resume else (None, [])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    folder = Path(config.output_dir)
    if peft_config is not None:
        merged = _merged(trainer, folder / _ADAPTER)
        if merged is not None:
            merged.save_pretrained(folder)
    else:
        save_model(trainer, folder)
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(folder)
        (folder / _DONE).touch()
    trainer.accelerator.wait_for_everyone()
    curve = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    del trainer
    collect()
    return str(folder), curve


def _merged(trainer: Any, adapter: Path) -> Any:
    """The model with its adapter in its weights, on the main process; None on others.

    Args:
        trainer: of SFT, after training.
        adapter: folder for the adapter of a sharded model, whose weights no process has as a whole.
    """
    main = trainer.accelerator.is_main_process
    if not trainer.is_fsdp_enabled:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        return merged if main else None
    from peft import AutoPeftModelForCausalLM

    save_model(trainer, adapter)
    if not main:
        return None
    how = {"dtype": next(trainer.model.parameters()).dtype, "trust_remote_code": trainer.args.trust_remote_code}
    return AutoPeftModelForCausalLM.from_pretrained(adapter, **how).merge_and_unload()
