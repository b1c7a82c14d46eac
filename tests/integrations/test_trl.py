"""TRL: our trainer gives TRL's numbers, does what TRL lacks, and the patch is put on and taken off cleanly.

Both trainers run for a few steps on a tiny model with equal seeds. Plain SGD, because Adam turns a rounding error in a
gradient near 0 into a full step.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import json
import math
import os
import sys
import types

import pytest
import torch
from torch import nn

from qkernels import fused_linear_token_dpo, shift_labels

pytest.importorskip("trl", reason="TRL is not installed")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer, utils

import hf_models
from processes import Ranks, as_launched
from qkernels.integrations import trl as integration
from qkernels.integrations.transformers import compute_token_logps, compute_token_stats, head_parameters, hidden_states
from qkernels.integrations.trl import (
    TokenDPOConfig,
    TokenDPOTrainer,
    TokenPreferenceCollator,
    add_token_head,
    patch_trl,
    require_trl,
    unpatch_trl,
)
from qkernels.integrations.trl import patch as trl_patch
from qkernels.integrations.trl.links import load_links
from qkernels.semiparametric import OSPO

disable_progress_bars()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PAIRS = Dataset.from_list(hf_models.preferences())
WEIGHTED = Dataset.from_list(hf_models.preferences(weights=True))
REFERENCE = hf_models.model(seed=7)


@pytest.fixture(autouse=True, scope="module")
def _little_garbage():
    """accelerate collects garbage after each training; what was there before needs no looking at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def train(trainer, tmp_path, *, model=None, ref_model="default", data=PAIRS, config=DPOConfig, steps=3,
          evaluate=True, extra=None, **options):  # fmt: skip
    """Train for a few steps and evaluate; returns the trainer."""
    options = {
        "per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "learning_rate": 0.05, "seed": 1,
        "optim": "sgd", "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "log_level": "error", "gradient_checkpointing": False, "bf16": False, **options,
    }  # fmt: skip
    made = trainer(
        model=hf_models.model() if model is None else model,
        ref_model=copy.deepcopy(REFERENCE) if ref_model == "default" else ref_model,
        args=config(output_dir=str(tmp_path), **options),
        train_dataset=data,
        eval_dataset=data.select(range(8)) if evaluate else None,
        **{"processing_class": hf_models.tokenizer(), **(extra or {})},
    )
    made.remove_callback(__import__("transformers").PrinterCallback)
    made.train()
    if evaluate:
        made.evaluate()
    return made


def numbers(trainer):
    """What a trainer has logged, without times."""
    timing = ("runtime", "per_second", "total_flos", "step_time")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timing)}
        for entry in trainer.state.log_history
    ]


def rewards_are_zero(logged, prefix):
    """Up to rounding."""
    return all(abs(logged[prefix + side]) < 1e-6 for side in ("chosen", "rejected"))


def assert_same(ours, theirs, tolerance=1e-4, names=True):
    """Equal logs, under equal names, and equal parameters."""
    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        if names:
            assert one.keys() == other.keys()
        for name in one.keys() & other.keys():
            if name.endswith("rewards/accuracies") and rewards_are_zero(other, name.removesuffix("accuracies")):
                continue  # policy and reference are equal: rounding alone says which reward is larger
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    mine, its = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    assert mine.keys() == its.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, its[name], rtol=tolerance, atol=tolerance)


_STOCK: dict = {}


def stock(tmp_path, **options):
    """TRL's own trainer; its runs with plain options are kept."""
    key = repr(sorted(options.items())) if not {"model", "extra", "data"} & options.keys() else None
    if key is None or key not in _STOCK:
        made = train(DPOTrainer, tmp_path, **options)
        if key is None:
            return made
        _STOCK[key] = made
    return _STOCK[key]


def test_a_length_that_leaves_no_pair_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"train_dataset has no pair left: .* max_length=2, and such pairs are left out"
    ):
        train(TokenDPOTrainer, tmp_path, max_length=2, evaluate=False)


# --- the same numbers as TRL ---------------------------------------------------------------------------------------

LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
          "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


# Each formula is held against the oracle in test_formulas.py; here, by kind: how the trainers call it.
@pytest.mark.nightly_except(loss=("sigmoid", "bco_pair", "aot", "discopop", "sft"))
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_trl(loss, tmp_path):
    options = {"loss_type": loss, "label_smoothing": 0.1 if loss in SMOOTHED else 0.0, "beta": 0.2}
    if loss in ("sppo_hard", "ipo"):
        options["learning_rate"] = 1e-3  # their gradients are large
    assert_same(train(TokenDPOTrainer, tmp_path, **options), stock(tmp_path, **options))


NIGHTLY = pytest.mark.nightly  # another case runs the same lines


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5]},
        pytest.param({"loss_type": ["ipo", "hinge"], "learning_rate": 1e-3}, marks=NIGHTLY),
        pytest.param({"f_divergence_type": "forward_kl"}, marks=NIGHTLY),
        pytest.param({"f_divergence_type": "js_divergence", "loss_type": "hinge"}, marks=NIGHTLY),
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"use_weighting": True},
        pytest.param({"ld_alpha": 0.4}, marks=NIGHTLY),
        {"ld_alpha": 0.4, "loss_type": ["sigmoid", "sft"], "precompute_ref_log_probs": True},
        pytest.param({"precompute_ref_log_probs": True}, marks=NIGHTLY),
        pytest.param({"gradient_checkpointing": True}, marks=NIGHTLY),
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        pytest.param({"max_length": 9}, marks=NIGHTLY),
        {"max_length": 9, "truncation_mode": "keep_end", "precompute_ref_log_probs": True},
        pytest.param({"pad_to_multiple_of": 8}, marks=NIGHTLY),
        {"per_device_train_batch_size": 1, "sync_ref_model": True, "ref_model_sync_steps": 2},
    ],
    ids=str,
)
def test_options_of_trl(options, tmp_path):
    assert_same(train(TokenDPOTrainer, tmp_path, **options), stock(tmp_path, **options))


def test_bf16_autocast(tmp_path):
    """TRL rounds logits to bf16 before the softmax, which is worth 3e-2 for each token."""
    ours, theirs = train(TokenDPOTrainer, tmp_path, bf16=True), stock(tmp_path, bf16=True)
    exact = stock(tmp_path)
    first = [numbers(trainer)[0] for trainer in (ours, theirs, exact)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=0.05)
    assert first[0]["loss"] != first[2]["loss"]
    assert_same(ours, theirs, tolerance=0.2)


def test_evaluation_metrics_of_the_user(tmp_path):
    extra = {"compute_metrics": lambda prediction: {"total": float(prediction.predictions.astype("float64").sum())}}
    ours = train(TokenDPOTrainer, tmp_path, extra=extra)
    assert_same(ours, stock(tmp_path, extra=extra))
    assert "eval_total" in numbers(ours)[-1]


def test_mixture_of_experts(tmp_path):
    def made():
        return hf_models.model("mixtral")

    options = {"router_aux_loss_coef": 0.1, "ref_model": hf_models.model("mixtral", seed=7)}
    theirs = stock(tmp_path, model=made(), **copy.deepcopy(options))
    assert_same(train(TokenDPOTrainer, tmp_path, model=made(), **copy.deepcopy(options)), theirs)
    with patch_trl():
        assert_same(train(DPOTrainer, tmp_path, model=made(), **copy.deepcopy(options)), theirs)
    assert numbers(theirs)[0]["aux_loss"] > 1


def test_soft_capped_model(tmp_path):
    def made():
        return hf_models.model("gemma2")

    reference = hf_models.model("gemma2", seed=7)
    theirs = stock(tmp_path, model=made(), ref_model=copy.deepcopy(reference))
    assert_same(train(TokenDPOTrainer, tmp_path, model=made(), ref_model=copy.deepcopy(reference)), theirs)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_pictures(options, tmp_path):
    """A vision-language model: the text head's configuration, TRL's own collator."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    pairs = hf_models.vision_preferences()
    options = {"steps": 2, "data": Dataset.from_list(pairs), "max_length": None, **options}
    ours, theirs = (
        train(trainer, tmp_path, model=hf_models.vision_model(), ref_model=hf_models.vision_model(7),
              extra={"processing_class": hf_models.vision_processor()}, **options)
        for trainer in (TokenDPOTrainer, DPOTrainer)
    )  # fmt: skip
    assert "pixel_values" in next(iter(ours.get_train_dataloader()))
    assert_same(ours, theirs)
    options["data"] = Dataset.from_list([{**pair, "chosen_token_weights": [1.0]} for pair in pairs])
    with pytest.raises(ValueError, match="token weights and a vision data set do not go together"):
        train(TokenDPOTrainer, tmp_path, model=hf_models.vision_model(), ref_model=hf_models.vision_model(7),
              extra={"processing_class": hf_models.vision_processor()}, **options)  # fmt: skip


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.nightly  # what is compiled is tested in test_linear_compile.py and test_transformers.py
def test_compiled(tmp_path):
    counters = torch._dynamo.utils.counters
    counters.clear()
    small, options = {"num_hidden_layers": 1}, {"evaluate": False, "steps": 2}
    ours, theirs = (
        train(trainer, tmp_path, model=hf_models.model(**small), ref_model=hf_models.model(seed=7, **small),
              **options, **compiled)
        for trainer, compiled in ((TokenDPOTrainer, COMPILED), (DPOTrainer, {}))
    )  # fmt: skip
    assert not counters["graph_break"] and counters["frames"]["ok"] >= 2
    assert_same(ours, theirs)


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def config(*targets, **options):
        return peft.LoraConfig(r=4, lora_alpha=32, target_modules=list(targets), task_type="CAUSAL_LM", **options)

    config.peft = peft
    return config


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str)
def test_adapter_off_is_the_reference(lora, options, tmp_path):
    options = {"ref_model": None, "learning_rate": 0.5, **options}
    ours = train(TokenDPOTrainer, tmp_path, extra={"peft_config": lora("q_proj", "v_proj")}, **options)
    theirs = stock(tmp_path, extra={"peft_config": lora("q_proj", "v_proj")}, **options)
    assert_same(ours, theirs)
    assert numbers(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if not options.get("precompute_ref_log_probs"):  # caches are made of other batches, which round differently
        assert numbers(ours)[0]["rewards/margins"] == 0


def test_adapter_that_exists_is_copied_as_the_reference(lora, tmp_path):
    def made():
        model = lora.peft.get_peft_model(hf_models.model(), lora("q_proj"))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1)
        return model

    options = {"ref_model": None, "learning_rate": 0.5}
    assert_same(train(TokenDPOTrainer, tmp_path, model=made(), **options), stock(tmp_path, model=made(), **options))


def test_other_kinds_of_adapter(lora, tmp_path):
    options = {"ref_model": None, "learning_rate": 0.1}
    for config in (
        lora("q_proj", modules_to_save=["lm_head"]),
        lora.peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        ours = train(TokenDPOTrainer, tmp_path, extra={"peft_config": copy.deepcopy(config)}, **options)
        assert_same(ours, stock(tmp_path, extra={"peft_config": copy.deepcopy(config)}, **options))


def test_adapter_on_the_head(lora, tmp_path):
    """TRL refuses it. Here the reference for the numbers is plain DPO on the model's own logits."""
    options = {"ref_model": None, "learning_rate": 0.5, "evaluate": False}
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        train(DPOTrainer, tmp_path, extra={"peft_config": lora("lm_head")}, **options)
    ours = train(TokenDPOTrainer, tmp_path, extra={"peft_config": lora("q_proj", "lm_head")}, **options)
    with patch_trl():
        patched = train(DPOTrainer, tmp_path, extra={"peft_config": lora("q_proj", "lm_head")}, **options)
    assert_same(ours, patched)
    trained = [p for name, p in ours.model.named_parameters() if "lm_head.lora_B" in name]
    assert trained and float(trained[0].abs().max()) > 1e-3

    model = ours.model.eval()
    batch = next(iter(ours.get_eval_dataloader(ours.train_dataset)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = shift_labels(batch["input_ids"], mask=batch["completion_mask"])

    def logps():
        found = torch.log_softmax(model(**inputs).logits, -1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(labels == -100, 0.0, found).sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference = logps()
    margins = (logps() - reference).view(2, -1)
    expected = -torch.nn.functional.logsigmoid(0.1 * (margins[0] - margins[1])).mean()
    got = ours.compute_loss(model, batch)
    assert float(got) == pytest.approx(float(expected), abs=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


# --- what TRL lacks ------------------------------------------------------------------------------------------------


def test_token_weights(tmp_path):
    """Ones change nothing; others are the weights of the loss on hidden states."""
    ones = [
        {**pair, **{name: [1.0] * len(pair[name]) for name in pair if name.endswith("_weights")}}
        for pair in hf_models.preferences(weights=True)
    ]
    plain = Dataset.from_list([{k: v for k, v in pair.items() if not k.endswith("_weights")} for pair in ones])
    assert_same(
        train(TokenDPOTrainer, tmp_path, data=Dataset.from_list(ones)), stock(tmp_path, data=plain), tolerance=1e-4
    )
    trainer = train(TokenDPOTrainer, tmp_path, data=WEIGHTED, steps=1)
    batch = next(iter(trainer.get_eval_dataloader()))
    labels = shift_labels(batch["input_ids"], mask=batch["completion_mask"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    policy, reference = trainer.model, trainer.ref_model
    expected = fused_linear_token_dpo(
        hidden_states(policy, **inputs), head_parameters(policy).weight, labels,
        reference_hidden=hidden_states(reference, **inputs), reference_weight=head_parameters(reference).weight,
        token_weights=nn.functional.pad(batch["token_weights"][:, 1:], (0, 1)),
    )  # fmt: skip
    assert float(trainer.compute_loss(policy, batch)) == pytest.approx(float(expected.loss), abs=1e-5)
    assert float(batch["token_weights"].max()) == 2.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "ipo", "learning_rate": 1e-3},
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "use_weighting": False},
        {"loss_type": "tdpo2"},
        {"max_length": 9, "precompute_ref_log_probs": True},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_packed_equals_padded(options, tmp_path):
    packed = train(TokenDPOTrainer, tmp_path, data=WEIGHTED, padding_free=True, **options)
    assert_same(packed, train(TokenDPOTrainer, tmp_path, data=WEIGHTED, **options))
    batch = next(iter(packed.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    assert packed.padding_free and packed.args.padding_free


@pytest.mark.nightly
def test_packed_and_compiled(tmp_path):
    options = {"padding_free": True, "evaluate": False, "steps": 1}
    compiled, plain = (
        train(TokenDPOTrainer, tmp_path, model=hf_models.model(num_hidden_layers=1), **options, **more)
        for more in (COMPILED, {})
    )
    assert_same(compiled, plain)


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_tdpo(loss, tmp_path):
    trainer = train(TokenDPOTrainer, tmp_path, loss_type=loss, steps=1)
    first = numbers(trainer)[0]
    assert first["kl/chosen"] > 0 and first["kl/rejected"] > 0
    policy, batch = hf_models.model(), next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = fused_linear_token_dpo(
        hidden_states(policy, **inputs), policy.lm_head.weight,
        shift_labels(batch["input_ids"], mask=batch["completion_mask"]),
        reference_hidden=hidden_states(REFERENCE, **inputs), reference_weight=REFERENCE.lm_head.weight, loss_type=loss,
    )  # fmt: skip
    with torch.no_grad():
        trainer.model.load_state_dict(policy.state_dict())
        assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(float(expected.loss), abs=1e-5)


def test_options_of_losses(tmp_path):
    """tdpo2 with alpha 0 is DPO; a function can be the loss; simpo loads no reference."""
    plain = stock(tmp_path)
    ours = train(TokenDPOTrainer, tmp_path, config=TokenDPOConfig, loss_type="tdpo2", loss_kwargs={"alpha": 0.0})
    assert_same(ours, plain, names=False)
    ours = train(TokenDPOTrainer, tmp_path, config=TokenDPOConfig, loss_type=hinge_with_margin, max_chunk_bytes=4000)
    assert_same(ours, stock(tmp_path, loss_type="hinge"))
    ours.args.to_json_string()
    simpo = train(
        TokenDPOTrainer, tmp_path, config=TokenDPOConfig, ref_model=None, loss_type="simpo", beta=2.0,
        loss_kwargs={"gamma": 1.0},
    )  # fmt: skip
    assert simpo.ref_model is None
    first = numbers(simpo)[0]
    assert first["rewards/chosen"] == pytest.approx(2.0 * first["logps/chosen"], rel=1e-5)


LEARNED = {
    "ospo": {"memory": 12, "warm_up": 8, "bandwidth": 0.7},
    "pspo": {"memory": 12, "warm_up": 8, "refit": 2},
    "pspo on the data": {"warm_up": 8, "refit": 2, "refit_on": "data"},
}


@pytest.mark.parametrize("name", LEARNED)
def test_learned_links_by_name_and_resumed(name, tmp_path):
    """By name with options; a run that stops after 3 of 6 steps and goes on is the uninterrupted one to the bit."""
    options = {
        "config": TokenDPOConfig, "loss_type": name[:4], "loss_kwargs": LEARNED[name], "learning_rate": 0.02,
        "evaluate": False, "beta": 1.0, "max_steps": 6,
    }  # fmt: skip
    whole = train(TokenDPOTrainer, tmp_path / "whole", save_strategy="steps", save_steps=3, **options)
    assert json.loads(whole.args.to_json_string())["loss_type"] == [name[:4]]
    (link,) = whole.learned_links
    assert link.seen == 24 and len(link.past) == min(24, link.memory) and link.sign == 1.0
    if name == "ospo":
        assert link.bandwidth == 0.7
    else:
        assert link.knots is not None
    made = []

    class Resumed(TokenDPOTrainer):
        def train(self):
            made.append(self)
            return super().train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))

    again = train(Resumed, tmp_path / "again", **options)
    assert made == [again] and again.state.global_step == 6
    for (key, value), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    states = [trainer.learned_links[0].state_dict() for trainer in (whole, again)]
    assert torch.equal(states[0].pop("past"), states[1].pop("past")) and states[0] == states[1]
    plain = train(TokenDPOTrainer, tmp_path / "plain", **{**options, "loss_type": "sigmoid", "loss_kwargs": None})
    lost = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    dpo = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert lost[:2] == pytest.approx(dpo[:2], rel=1e-5), "plain DPO until 8 pairs are seen"
    assert lost[2] != pytest.approx(dpo[2], rel=1e-3), "and not after"
    (tmp_path / "whole/checkpoint-3/loss_state_0.pt").unlink()
    with pytest.warns(UserWarning, match="begins with an empty memory"):
        load_links(again.learned_links, str(tmp_path / "whole/checkpoint-3"), 0)


def test_a_link_is_fitted_to_the_whole_data_set(tmp_path):
    """The t of the fit are those of every pair of the training data under the policy before the step, once each."""
    fitted = []

    class Watching(TokenDPOTrainer):
        def training_step(self, *args, **kwargs):
            (link,) = self.learned_links
            before, weights = link.knots, copy.deepcopy(self.model.state_dict())
            result = super().training_step(*args, **kwargs)
            if link.knots != before:
                fitted.append((link.knots, weights))
            return result

    data = PAIRS.select(range(10))
    trainer = train(
        Watching, tmp_path, data=data, config=TokenDPOConfig, loss_type="pspo", beta=0.7, evaluate=False, steps=4,
        loss_kwargs={"refit_on": "data", "warm_up": 8, "refit": 2}, per_device_eval_batch_size=4, learning_rate=0.02,
    )  # fmt: skip
    ((knots, weights),) = fitted
    policy = hf_models.model()
    policy.load_state_dict(weights)
    batch = trainer.data_collator(list(trainer.train_dataset))
    stats = compute_token_stats(
        policy.eval(), {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")},
        outputs=("logps", "reference_logps"), reference_model=REFERENCE.eval(),
    )  # fmt: skip
    chosen, rejected = (stats.logps - stats.reference_logps).double().sum(1).chunk(2)
    where, levels = trainer.learned_links[0].fit((0.7 * (chosen - rejected)).tolist())
    assert knots[1] == pytest.approx(levels, abs=1e-9) and knots[0] == pytest.approx(where, abs=1e-4)
    assert len(chosen) == 10 and len(levels) > 2


def test_a_wrong_sign_is_announced(tmp_path):
    class Reversed(TokenDPOTrainer):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            (link,) = self.learned_links
            link.past = -link.past.abs() - 1
            return result

    with pytest.warns(UserWarning, match="OSPO: the implicit rewards of chosen answers are below"):
        train(Reversed, tmp_path, loss_type="ospo", steps=1, evaluate=False)


def test_objects_that_are_losses_have_a_name_in_json(tmp_path):
    config = TokenDPOConfig(str(tmp_path), loss_type=[OSPO(), "sft"], use_cpu=True, bf16=False, report_to=[])
    assert json.loads(config.to_json_string())["loss_type"] == ["OSPO", "sft"]
    with pytest.raises(
        ValueError, match=r"\['band'\] unknown to loss_type OSPO; .*by name in a trainer: \['bandwidth'"
    ):
        train(TokenDPOTrainer, tmp_path, config=TokenDPOConfig, loss_type="ospo", loss_kwargs={"band": 1})
    with pytest.raises(ValueError, match="bandwidth must be"):
        train(TokenDPOTrainer, tmp_path, config=TokenDPOConfig, loss_type="ospo", loss_kwargs={"bandwidth": -1.0})
    streamed = PAIRS.to_iterable_dataset()
    with pytest.raises(ValueError, match='refit_on="data" needs a map-style Dataset'):
        train(TokenDPOTrainer, tmp_path, config=TokenDPOConfig, loss_type="pspo", data=streamed, evaluate=False,
              loss_kwargs={"refit_on": "data"})  # fmt: skip


def hinge_with_margin(scores, beta, margin=1.0):
    return torch.relu(margin - beta * scores.margins)


def test_token_caches(tmp_path):
    """A log-prob for each token, NaN where the answer is cut off; those that a data set has are used."""
    trainer = train(TokenDPOTrainer, tmp_path, precompute_ref_log_probs=True, max_length=9)
    data = trainer.train_dataset
    model = copy.deepcopy(REFERENCE)
    for example in list(data)[:4]:
        ids = torch.tensor([example["prompt_ids"] + example["rejected_ids"]])[:, :9]
        start = len(example["prompt_ids"])
        expected = compute_token_logps(model, {"input_ids": ids})[0, start - 1 : -1]
        cached = torch.tensor(example["ref_rejected_token_logps"])
        assert cached.shape == (len(example["rejected_ids"]),)
        torch.testing.assert_close(cached[: len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert bool(cached[len(expected) :].isnan().all())
    shifted = [
        {
            **{name: example[name] for name in ("prompt", "chosen", "rejected")},
            **{name: [0.0] * len(example[name]) for name in example if name.endswith("_token_logps")},
        }
        for example in data
    ]
    given = train(
        TokenDPOTrainer, tmp_path, data=Dataset.from_list(shifted), precompute_ref_log_probs=True, evaluate=False
    )
    first = numbers(given)[0]
    assert first["rewards/chosen"] == pytest.approx(0.1 * first["logps/chosen"], rel=1e-5)
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    assert chosen.shape == rejected.shape == (4,)


def test_token_caches_without_the_whole_prompt_are_not_taken_for_those_with_it(tmp_path):
    """Where the prompt is cut off whole, the first token of the answer has no log-prob; later it is one of many."""
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [12, 13, 14, 15]}] * 4
    cut = {"max_length": 4, "truncation_mode": "keep_end"}
    trainer = train(TokenDPOTrainer, tmp_path, data=Dataset.from_list(rows), precompute_ref_log_probs=True, steps=1,
                    evaluate=False, **cut)  # fmt: skip
    cached = trainer.train_dataset[0]["ref_chosen_token_logps"]
    assert math.isnan(cached[0]) and not any(map(math.isnan, cached[1:]))
    with pytest.raises(ValueError, match="lack tokens that this batch scores"):
        train(TokenDPOTrainer, tmp_path, data=trainer.train_dataset, precompute_ref_log_probs=True, steps=1,
              evaluate=False, max_length=32)  # fmt: skip


def test_collator():
    tokens = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]}
    other = {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [10, 11]}
    weights = {"chosen_token_weights": [1.0, 2.0, 0.5], "rejected_token_weights": [0.0]}
    caches = {"ref_chosen_token_logps": [-1.0, -2.0, None], "ref_rejected_token_logps": [-3.0]}
    first = {**tokens, **weights, **caches}
    second = {
        **other, "chosen_token_weights": [3.0], "rejected_token_weights": [4.0, 5.0],
        "ref_chosen_token_logps": [-1.0], "ref_rejected_token_logps": [-1.5, -2.5],
    }  # fmt: skip
    batch = TokenPreferenceCollator(pad_token_id=0, max_length=4)([first, second])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 7, 0, 0], [5, 6, 10, 0], [5, 10, 11, 0]]
    assert batch["token_weights"].tolist() == [[0, 0, 1, 2], [0, 3, 0, 0], [0, 0, 0, 0], [0, 4, 5, 0]]
    assert batch["ref_token_logps"].tolist() == [[0, 0, -1, -2], [0, -1, 0, 0], [0, 0, -3, 0], [0, -1.5, -2.5, 0]]
    packed = TokenPreferenceCollator(pad_token_id=0, max_length=4, packed=True)([first, second])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 5, 7, 5, 6, 10, 5, 10, 11]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert packed["cu_seqlens"].tolist() == [0, 4, 6, 9, 12] and packed["cu_seqlens"].dtype == torch.int32
    assert packed["token_weights"].tolist() == [[0, 0, 1, 2, 0, 3, 0, 0, 0, 0, 4, 5]]
    with pytest.raises(ValueError, match="lack tokens that this batch scores"):
        TokenPreferenceCollator(pad_token_id=0)([first, second])
    with pytest.raises(ValueError, match="chosen_token_weights has 1 numbers and the answer 3 tokens"):
        TokenPreferenceCollator(pad_token_id=0)([{**first, "chosen_token_weights": [1.0]}])
    with pytest.raises(ValueError, match="chosen_token_weights is None in an example"):
        TokenPreferenceCollator(pad_token_id=0)([{**first, "chosen_token_weights": None}])
    with pytest.raises(ValueError, match="needs both of"):
        TokenPreferenceCollator(pad_token_id=0)([{**tokens, "chosen_token_weights": [1.0] * 3}])
    for bad in (-1.0, float("nan"), None):
        with pytest.raises(ValueError, match="chosen_token_weights must be finite numbers, 0 or more"):
            TokenPreferenceCollator(pad_token_id=0)([{**first, "chosen_token_weights": [1.0, bad, 1.0]}])


def test_results_of_every_step(tmp_path):
    seen = []

    class Watching(TokenDPOTrainer):
        def on_token_results(self, results):
            seen.append(results)
            self._metrics[results.mode]["rewards/lowest_token"].append(float(results.token_rewards.min()))

    trainer = train(Watching, tmp_path, steps=2)
    assert [results.mode for results in seen] == ["train", "train", "eval"]
    assert {"rewards/lowest_token"} <= numbers(trainer)[0].keys()
    assert "eval_rewards/lowest_token" in numbers(trainer)[-1]
    first = seen[0]
    scored = first.labels != -100
    assert torch.equal(first.logps != 0, scored) and not first.loss.requires_grad
    rewards = (first.token_weights * first.token_rewards).sum(1)
    torch.testing.assert_close(torch.cat([first.chosen_rewards, first.rejected_rewards]), rewards)
    torch.testing.assert_close(first.token_rewards, 0.1 * (first.logps - first.reference_logps))
    batch = next(iter(trainer.get_train_dataloader()))
    logits = hf_models.model()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    expected = torch.where(scored, logits.logsumexp(-1), 0.0)
    torch.testing.assert_close(first.logsumexp, expected, atol=1e-5, rtol=1e-5)
    assert numbers(trainer)[0]["rewards/chosen"] == pytest.approx(float(first.chosen_rewards.mean()), rel=1e-5)
    packed = train(Watching, tmp_path, steps=1, padding_free=True, evaluate=False)
    last = seen[-1]
    assert last.logps.dim() == 1 and last.cu_seqlens[-1] == last.logps.shape[0]
    assert numbers(packed)[0]["rewards/lowest_token"] == pytest.approx(numbers(trainer)[0]["rewards/lowest_token"])


@pytest.mark.parametrize(
    "data, options",
    [(PAIRS, {}), (WEIGHTED, {"padding_free": True}), (WEIGHTED, {"precompute_ref_log_probs": True})],
    ids=["dense", "packed", "cached"],
)
def test_monitor_in_a_trainer(data, options, tmp_path):
    """On the trainer's own batches; before the first step its rewards are those of plain log-probs."""
    from qkernels.integrations.monitor import RewardMonitorCallback

    trainer = train(TokenDPOTrainer, tmp_path, data=data, steps=1, evaluate=False, **options)
    pairs = list(trainer.train_dataset)[:4]

    def reward(prompt, answer):
        ids = torch.tensor([prompt + answer])
        scored = (torch.arange(ids.shape[1]) >= len(prompt)).unsqueeze(0)
        batch = {"input_ids": ids, "completion_mask": scored}
        return 0.1 * float((compute_token_logps(trainer.model, batch) - compute_token_logps(REFERENCE, batch)).sum())

    chosen, rejected = (
        sum(reward(pair["prompt_ids"], pair[answer]) for pair in pairs) for answer in ("chosen_ids", "rejected_ids")
    )
    margin = (chosen - rejected) / len(pairs)
    probe = [trainer.data_collator(pairs)]
    watch = RewardMonitorCallback(probe).attach(trainer)
    trainer.train()
    assert watch.monitor.history[0].margin == pytest.approx(margin, abs=1e-5)
    assert "qkernels/margin" in trainer.state.log_history[-1]


def test_a_trained_model_is_a_model(tmp_path):
    trainer = train(TokenDPOTrainer, tmp_path, steps=1, evaluate=False)
    ids = torch.tensor([[5, 6, 7]])
    assert trainer.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] <= 5
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        compute_token_logps(loaded, {"input_ids": ids}), compute_token_logps(trainer.model, {"input_ids": ids})
    )


def test_models_by_name_and_data_that_stream(tmp_path):
    """As most people start: names instead of models, and a stream instead of a table."""
    hf_models.model().save_pretrained(tmp_path / "policy")
    name = str(tmp_path / "policy")
    streamed = WEIGHTED.to_iterable_dataset()
    options = {"model": name, "ref_model": None, "evaluate": False, "steps": 2}
    trainer = train(TokenDPOTrainer, tmp_path, data=streamed, **options)
    assert trainer.ref_model is not None
    assert numbers(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    simpo = train(TokenDPOTrainer, tmp_path, data=streamed, loss_type="simpo", **options)
    assert simpo.ref_model is None


def train_on_a_rank(folder, options):
    """What one of two processes logs and ends with."""
    as_launched(2)
    batches = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "ddp_backend": "gloo"}
    trainer = train(TokenDPOTrainer, folder, data=WEIGHTED, **batches, **options)
    assert trainer.accelerator.num_processes == 2
    return numbers(trainer), [p.detach().numpy() for p in trainer.model.parameters()]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    all_options = [
        {"padding_free": True, "precompute_ref_log_probs": True},
        {"loss_type": "tdpo1", "gradient_checkpointing": True},
    ]
    with Ranks(2) as ranks:
        results = [ranks.run(train_on_a_rank, tmp_path, options) for options in all_options]
    for options, of_ranks in zip(all_options, results, strict=True):
        alone = train(TokenDPOTrainer, tmp_path, data=WEIGHTED, **options)
        for logged, parameters in of_ranks:
            for one, other in zip(logged, numbers(alone), strict=True):
                for name in one.keys() - {"epoch"}:
                    assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
            for one, other in zip(parameters, alone.model.parameters(), strict=True):
                torch.testing.assert_close(torch.from_numpy(one), other.detach(), atol=1e-4, rtol=1e-4)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "tdpo1", "precompute_ref_log_probs": True}, "needs the whole distribution of the reference"),
        ({"loss_type": "simpo", "ref_model": None, "sync_ref_model": True}, "has no meaning for loss_type"),
        ({"loss_type": "nonsense"}, "loss_type 'nonsense' is unknown"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning"),
        ({"config": TokenDPOConfig, "loss_kwargs": {"ld_alpha": 0.5}}, "is the option ld_alpha of the configuration"),
        ({"config": TokenDPOConfig, "loss_kwargs": {"gamma": 0.5}}, "'gamma'] unknown to loss_type"),
        (
            {"padding_free": True, "extra": {"data_collator": lambda examples: {}}},
            "packs in the trainer's own collator",
        ),
        ({"padding_free": True, "model": "mamba", "ref_model": "mamba"}, "MambaForCausalLM does not"),
        ({"loss_type": "tdpo1", "model": "llama", "ref_model": "gemma2"}, "shape its logits as model does"),
        ({"config": TokenDPOConfig, "backend": "abacus"}, "abacus"),
    ],
)
def test_contradictions(options, message, tmp_path):
    for name in ("model", "ref_model"):
        if isinstance(options.get(name), str):
            options = {**options, name: hf_models.model(options[name])}
    before = dict(vars(dpo_trainer))
    with pytest.raises((ValueError, TypeError), match=message.replace("[", r"\[").replace("]", r"\]")):
        train(TokenDPOTrainer, tmp_path, steps=1, **options)
    assert dict(vars(dpo_trainer)) == before


def test_weights_that_would_get_lost(tmp_path):
    collator = dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    with pytest.raises(ValueError, match="the batch has no token_weights"):
        train(TokenDPOTrainer, tmp_path, data=WEIGHTED, extra={"data_collator": collator})
    trainer = train(TokenDPOTrainer, tmp_path, data=WEIGHTED, steps=1, evaluate=False)
    with pytest.raises(ValueError, match="the evaluation data lack the columns"):
        trainer.evaluate(PAIRS.select(range(4)))
    with pytest.raises(ValueError, match="the batch has no ref_token_logps"):
        train(TokenDPOTrainer, tmp_path, precompute_ref_log_probs=True, extra={"data_collator": collator})


def test_label_smoothing_of_dpo_is_announced(tmp_path):
    with pytest.warns(UserWarning, match="cDPO"):
        train(TokenDPOTrainer, tmp_path, label_smoothing=0.1, steps=1, evaluate=False)


@pytest.mark.parametrize(
    "version, message",
    [("1.15.2", "TRL 1.15.2 is too old"), ("0.9.4", "too old"), ("2.0.0", "major version that this release"),
     ("unknown", "too old")],
)  # fmt: skip
def test_versions(version, message, monkeypatch):
    own = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "trl" else own(name))
    with pytest.raises(ImportError, match=message) as raised:
        patch_trl()
    assert "1.16" in str(raised.value) and version in str(raised.value)
    with pytest.raises(ImportError, match=message):
        add_token_head(hf_models.model())


def test_missing_plug_points(monkeypatch):
    monkeypatch.delattr(utils, "add_fused_lm_head")
    with pytest.raises(ImportError, match=r"lacks trl\.trainer\.utils\.add_fused_lm_head"):
        require_trl()
    monkeypatch.undo()
    monkeypatch.delattr(DPOTrainer, "_compute_loss")
    with pytest.raises(ImportError, match=r"lacks DPOTrainer\._compute_loss"):
        require_trl()


def test_without_trl(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"pip install 'qkernels\[trl\]'"):
        integration.__getattr__("TokenDPOTrainer")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        integration.__getattr__("nothing")


# --- the patch -----------------------------------------------------------------------------------------------------


def test_patched_trainer(tmp_path):
    with patch_trl():
        ours = train(DPOTrainer, tmp_path, use_weighting=True)
    assert_same(ours, stock(tmp_path, use_weighting=True))


def test_a_patch_that_comes_too_late_says_so():
    unpatch_trl()
    model = hf_models.model()
    utils.add_fused_lm_head(model)
    with pytest.warns(UserWarning, match="too late for [0-9]+ model.* keep TRL's own head"), patch_trl():
        pass
    del model
    others = trl_patch._models_with_head_of(utils.add_fused_lm_head)  # of other tests, if anything still holds them
    model = hf_models.model()
    with patch_trl():
        utils.add_fused_lm_head(model)
    assert trl_patch._models_with_head_of(utils.add_fused_lm_head) == others


def test_patch_is_taken_off_exactly():
    def state():
        return [dict(vars(module)) for module in (utils, dpo_trainer)]

    before = state()
    patch_trl()
    patched = state()
    assert patched[0]["add_fused_lm_head"].func is add_token_head
    patch_trl()  # changes nothing
    assert state() == patched
    late = types.ModuleType("trl.trainer.imported_later")
    late.add_fused_lm_head = utils.add_fused_lm_head
    sys.modules[late.__name__] = late
    try:
        unpatch_trl()
    finally:
        del sys.modules[late.__name__]
    assert state() == before and late.add_fused_lm_head is utils.add_fused_lm_head
    unpatch_trl()
    for _ in range(2):
        patch = patch_trl()
        assert state() != before
        patch.undo()
        assert state() == before
    with patch_trl() as outer:
        with patch_trl() as inner:
            assert outer is not inner
        assert state() == patched or utils.add_fused_lm_head.func is add_token_head  # the inner one undid nothing
    assert state() == before
    with pytest.raises(RuntimeError), patch_trl():
        raise RuntimeError
    assert state() == before


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("family", ["llama", "cohere", "gemma2", "phi"])
def test_head_equals_trl_s_head(family, cast):
    """All outputs of TRL's head and their gradients, the entropy's included, as GRPO uses them."""
    theirs, ours, batch = hf_models.model(family), hf_models.model(family), hf_models.batch()
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    options = {"temperature": 0.8, "cast_lm_head_to_fp32": cast, "outputs": outputs}
    utils.add_fused_lm_head(theirs, **options)
    add_token_head(ours, **options)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    results = []
    for model in (ours, theirs):
        out = model(**batch, labels=labels, fused_lm_head=True, num_items_in_batch=7)
        (out.loss + (out.entropy * torch.linspace(0, 1, out.entropy.numel()).view_as(out.entropy)).sum()).backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (one, mine), (other, its) = results
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-4)
    for p, q in zip(mine, its, strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)
    shifted = shift_labels(labels)
    pair = [model(**batch, shift_labels=shifted, fused_lm_head=True).log_probs.detach() for model in (ours, theirs)]
    assert pair[0].shape == (3, 12)
    torch.testing.assert_close(*pair, atol=2e-5, rtol=1e-4)
    assert ours(**batch).logits.shape[-1] == hf_models.VOCAB
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        ours(**batch, fused_lm_head=True)
    with pytest.raises(ValueError, match="outputs must be of"):
        add_token_head(hf_models.model(), outputs=("logits",))


@pytest.mark.parametrize("name", ["SFT", "KTO", "GRPO", "RLOO"])
def test_other_trainers_on_the_patched_head(name, tmp_path):
    """They use the same head; losses, metrics and parameters stay theirs."""
    import trl

    pairs, data, options, more = hf_models.preferences(), [], {}, {}
    for number, pair in enumerate(pairs):
        if name == "SFT":
            data.append({"text": pair["prompt"] + pair["chosen"]})
        elif name == "KTO":
            data.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": number % 2 == 0})
        else:
            data.append({"prompt": pair["prompt"]})
    if name == "KTO":
        more["ref_model"] = copy.deepcopy(REFERENCE)
    elif name != "SFT":
        options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.0, "temperature": 0.9}
        more["reward_funcs"] = lambda completions, **_: [float(len(set(text.split()))) for text in completions]

    def trained():
        trainer = getattr(trl, f"{name}Trainer")(
            model=hf_models.model(),
            args=getattr(trl, f"{name}Config")(
                str(tmp_path), max_steps=2, per_device_train_batch_size=4, optim="sgd", seed=1, learning_rate=0.05,
                logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, save_strategy="no",
                log_level="error", gradient_checkpointing=False, **options,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=hf_models.tokenizer(),
            **more,
        )  # fmt: skip
        trainer.remove_callback(__import__("transformers").PrinterCallback)
        trainer.train()
        return trainer

    theirs = trained()
    with patch_trl():
        ours = trained()
    assert_same(ours, theirs)
