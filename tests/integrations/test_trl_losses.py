"""TRL's GRPO, KTO, CPO and ORPO trainers on this package's losses: TRL's numbers, for every loss and option.

All of them run for a few steps on a tiny model with equal seeds and plain SGD.
"""

from __future__ import annotations

import copy
import functools
import os

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import hf_models
from assertions import refuses
from processes import Ranks, as_launched
from qkernels.integrations.trl import TokenCPOTrainer, TokenGRPOTrainer, TokenKTOTrainer, TokenORPOTrainer

disable_progress_bars()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_PAIRS = hf_models.preferences(8)
PROMPTS = Dataset.from_list([{"prompt": pair["prompt"]} for pair in _PAIRS])
ANSWERS = Dataset.from_list(
    [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in _PAIRS
        for side in ("chosen", "rejected")
    ]
)


def reward(completions, **_):
    """A number of the text; equal for the first prompt's completions, whose advantages are 0 then."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def half(prompts, completions, **_):
    """As `reward`, and 0 for every second prompt: its completions have no advantage."""
    return [r * (sum(map(ord, p)) % 2) for r, p in zip(reward(completions), prompts, strict=True)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model in a folder: from a name or path TRL makes a reference of its own."""
    folder = tmp_path_factory.mktemp("model")
    hf_models.model().save_pretrained(folder)
    return str(folder)


def train(trainer, config, data, tmp_path, *, steps=2, extra=None, model=None, **options):
    options = {
        "per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "learning_rate": 0.05, "seed": 1,
        "optim": "sgd", "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "log_level": "error", "gradient_checkpointing": False, "bf16": False, **options,
    }  # fmt: skip
    made = trainer(
        model=hf_models.model() if model is None else model,
        args=config(output_dir=str(tmp_path), **options),
        train_dataset=data,
        processing_class=hf_models.tokenizer(),
        **(extra or {}),
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return made


def numbers(trainer):
    """What a trainer has logged, without times."""
    timing = ("runtime", "per_second", "total_flos", "step_time")
    return [{k: v for k, v in e.items() if not any(w in k for w in timing)} for e in trainer.state.log_history]


def assert_same(ours, theirs, tolerance=1e-4):
    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            exact = other[name]  # None where a metric has no value
            exact = exact if exact is None else pytest.approx(exact, rel=tolerance, abs=tolerance, nan_ok=True)
            assert one[name] == exact, name
    mine, its = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    for name, value in mine.items():
        torch.testing.assert_close(value, its[name], rtol=tolerance, atol=tolerance)
    start = hf_models.model().state_dict()
    start |= {name: torch.zeros_like(value) for name, value in mine.items() if "lora_B" in name}
    moved = [name for name in mine if name in start and not torch.equal(start[name], mine[name])]
    assert moved, "nothing was trained"


def grpo(trainer, tmp_path, reward_function=reward, **options):
    options = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.9, **options}
    return train(trainer, GRPOConfig, PROMPTS, tmp_path, extra={"reward_funcs": reward_function}, **options)


GRPO = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "iterations": {"num_iterations": 2, "delta": 1.1, "epsilon": 0.01, "epsilon_high": 0.02, "steps": 4},
    "kl": {"beta": 0.2, "num_iterations": 2, "model": ...},
    "corrected kl": {"beta": 0.2, "use_bias_correction_kl": True, "num_iterations": 2, "model": ...},
    "entropy": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "entropy, accumulation": {"entropy_coef": 0.1, "gradient_accumulation_steps": 2, "loss_type": "dapo"},
    "high entropy": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 1e-4, "num_iterations": 2},
    "truncated": {"mask_truncated_completions": True},
    "fp32 head": {"cast_lm_head_to_fp32": True},
    # What runs by day has every option at least once, so these have two that do not meet in one line.
    "cispo, high entropy": {"loss_type": "cispo", "top_entropy_quantile": 0.5, "steps": 1},
    "sapo, off-policy mask": {"loss_type": "sapo", "off_policy_mask_threshold": 1e-4, "num_iterations": 2},
}
QUICK = ("vespo", "gspo", "entropy, accumulation", "kl", "cispo, high entropy", "sapo, off-policy mask")


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=name, marks=() if name in QUICK else pytest.mark.nightly) for name, o in GRPO.items()],
)
def test_grpo(options, tmp_path, saved):
    options = {**options, "model": saved} if "model" in options else options
    assert_same(grpo(TokenGRPOTrainer, tmp_path, **options), grpo(GRPOTrainer, tmp_path, **options))


def test_completions_without_advantage_cost_no_backward(tmp_path):
    ours = grpo(TokenGRPOTrainer, tmp_path, half, steps=2, scale_rewards="none")
    assert_same(ours, grpo(GRPOTrainer, tmp_path, half, steps=2, scale_rewards="none"))
    assert ours.last_idle_rows is not None and ours.last_idle_rows > 0


def grpo_on_a_rank(folder, options):
    """Both trainers on one of two processes."""
    as_launched(2)
    ours, theirs = (grpo(trainer, folder, ddp_backend="gloo", **options) for trainer in (TokenGRPOTrainer, GRPOTrainer))
    assert ours.accelerator.num_processes == 2
    assert_same(ours, theirs)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_the_tokens_of_highest_entropy_are_those_of_all_processes(tmp_path):
    with Ranks(2) as ranks:
        ranks.run(grpo_on_a_rank, tmp_path, {"top_entropy_quantile": 0.3, "entropy_coef": 0.1, "loss_type": "grpo"})


def kto(trainer, tmp_path, **options):
    extra = {} if "model" in options else {"ref_model": copy.deepcopy(hf_models.model(seed=7))}
    return train(trainer, KTOConfig, ANSWERS, tmp_path, extra=extra, **options)


KTO = {
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.4},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "model": ...},
}
QUICK_KTO = ("kto", "precomputed")


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=name, marks=() if name in QUICK_KTO else pytest.mark.nightly) for name, o in KTO.items()],
)
def test_kto(options, tmp_path, saved):
    options = {**options, "model": saved} if "model" in options else options
    assert_same(kto(TokenKTOTrainer, tmp_path, **options), kto(KTOTrainer, tmp_path, **options))


EXPERTS = {"model": "mixtral", "output_router_logits": True}
CPO = {
    "sigmoid": {"label_smoothing": 0.1, "cpo_alpha": 0.5, "eval_strategy": "steps", "eval_steps": 1},
    "hinge": {"loss_type": "hinge", "beta": 0.01},
    "ipo": {"loss_type": "ipo", "beta": 0.3, "gradient_accumulation_steps": 2},
    "simpo": {"loss_type": "simpo", "simpo_gamma": 0.8, "beta": 2.0, "label_smoothing": 0.2, **EXPERTS},
    "simpo without likelihood": {"loss_type": "simpo", "cpo_alpha": 0.0},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0},
    "alphapo with likelihood": {"loss_type": "simpo", "alpha": -0.5, "cpo_alpha": 1.5},
    "ipo on rewards of alphapo": {"loss_type": "ipo", "alpha": 0.1, "beta": 0.5},
    "hinge on rewards of alphapo": {"loss_type": "hinge", "alpha": 0.01, "beta": 0.2},
    "softcap": {"model": "gemma2"},
    "tied, experts": {**EXPERTS, "tie_word_embeddings": True},
    "adapter on the head": {"targets": ["q_proj", "lm_head"]},
}
ORPO = {
    "softcap": {"beta": 0.7, "eval_strategy": "steps", "eval_steps": 1, "model": "gemma2"},
    "accumulation, cut": {"gradient_accumulation_steps": 2, "max_length": 14},
    "scaled": {"model": "granite"},
}


def paired(trainer, config, tmp_path, model="llama", targets=None, **options):
    own = {name: options.pop(name) for name in ("output_router_logits", "tie_word_embeddings") if name in options}
    extra = {"eval_dataset": Dataset.from_list(_PAIRS[:5])} if "eval_steps" in options else {}
    if targets is not None:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian")
    return train(
        trainer, config, Dataset.from_list(_PAIRS), tmp_path, model=hf_models.model(model, **own), extra=extra,
        learning_rate=0.02, remove_unused_columns=False, **{"max_length": 32, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=name, marks=() if name == "simpo" else pytest.mark.nightly) for name, o in CPO.items()],
)
def test_cpo(options, tmp_path):
    ours = paired(TokenCPOTrainer, CPOConfig, tmp_path, **options)
    assert_same(ours, paired(CPOTrainer, CPOConfig, tmp_path, **options))


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=name, marks=() if name == "softcap" else pytest.mark.nightly) for name, o in ORPO.items()],
)
def test_orpo(options, tmp_path):
    ours = paired(TokenORPOTrainer, ORPOConfig, tmp_path, **options)
    assert_same(ours, paired(ORPOTrainer, ORPOConfig, tmp_path, **options))


@pytest.mark.parametrize("trainer", [TokenCPOTrainer, TokenORPOTrainer])
def test_what_cpo_and_orpo_do_not_take(trainer, tmp_path):
    from peft import PromptTuningConfig
    from transformers import T5Config, T5ForConditionalGeneration

    config = {TokenCPOTrainer: CPOConfig, TokenORPOTrainer: ORPOConfig}[trainer]
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=hf_models.VOCAB, **sizes))
    arguments = {"train_dataset": Dataset.from_list(_PAIRS[:2]), "processing_class": hf_models.tokenizer()}
    args = config(str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    stock = trainer.__name__.removeprefix("Token")
    refuses(ValueError, "encoder-decoder", trainer.__name__, stock, call=lambda: trainer(t5, args, **arguments))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refuses(
        ValueError, "prompt-learning", trainer.__name__,
        call=lambda: trainer(hf_models.model(), args, **arguments, peft_config=prompts),
    )  # fmt: skip


def test_orpo_names_a_collator_whose_answers_have_gaps(tmp_path):
    trainer = paired(TokenORPOTrainer, ORPOConfig, tmp_path, steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    longest = int((batch["chosen_labels"] != -100).sum(1).argmax())
    batch["chosen_labels"][longest, (batch["chosen_labels"][longest] != -100).nonzero()[1]] = -100
    refuses(
        ValueError, "data_collator", "ORPOTrainer", call=lambda: trainer.get_batch_loss_metrics(trainer.model, batch)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["kto", "cpo", "orpo"])
def test_one_percent_is_seen(name, tmp_path, monkeypatch):
    run, ours, theirs = {
        "kto": (functools.partial(kto, beta=0.4), TokenKTOTrainer, KTOTrainer),
        "cpo": (functools.partial(paired, config=CPOConfig), TokenCPOTrainer, CPOTrainer),
        "orpo": (functools.partial(paired, config=ORPOConfig), TokenORPOTrainer, ORPOTrainer),
    }[name]
    exact = run(theirs, tmp_path=tmp_path)
    from qkernels.head import chunks

    known = chunks.coefficients_of
    monkeypatch.setattr(chunks, "coefficients_of", lambda *a: 1.01 * known(*a))
    with pytest.raises(AssertionError):
        assert_same(run(ours, tmp_path=tmp_path), exact)


def test_a_method_that_trl_lacks_is_named():
    from qkernels.integrations.trl.version import require_methods

    require_methods(KTOTrainer, "_compute_loss")
    refuses(ImportError, "KTOTrainer._loss_of_tomorrow", "1.16", call=lambda: require_methods(
        KTOTrainer, "_loss_of_tomorrow"))  # fmt: skip
