"""`qkernels train`: from a model and preferences to a trained model, a report and a model card. TRL trains.

    options.py    the options: ours, and those of TRL's dataclasses, from flags and one YAML file
    folder.py     the output folder: who writes to it, what an earlier run left, what --overwrite may delete
    model.py      the model's folder before anything is loaded: weights, GGUF, tokenizer, length
    dataset.py    pairs to token ids in Arrow files; which of them are held out
    processes.py  launchers of several processes, FSDP2 on CPUs
    callbacks.py  what is shown while it runs, and the reward monitor
    sft.py        supervised fine-tuning on the chosen answers, before
    run.py        the run (the training itself is `qkernels.integrations.training`)
    page.py       report.html
    card.py       README.md

Importing this package imports neither TRL nor transformers; `run_train` does, when it is called.
"""

from .options import TrainError, TrainOptions
from .run import main, run_train

__all__ = ["TrainError", "TrainOptions", "main", "run_train"]
