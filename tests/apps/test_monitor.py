"""The reward monitor: its numbers against sums written out, and each finding on a course of its own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from assertions import assert_within
from cases import IGNORE, generator, make_pairs, pack
from qkernels import fused_token_dpo, token_stats
from qkernels.monitor import PairRewards, RewardMonitor, RewardStats, concatenate, measure_rewards, pair_rewards

KLS = ("kl_reference_policy", "kl_policy_reference")


# --- the numbers ------------------------------------------------------------------------------------------------------


def measured(batch, beta=0.3):
    stats = token_stats(
        batch.logits, batch.labels, reference_logits=batch.reference, outputs=("logps", "reference_logps", *KLS)
    )
    return pair_rewards(
        batch.labels, stats.logps, stats.reference_logps, beta=beta, cu_seqlens=batch.cu_seqlens,
        kl_reference_policy=stats.kl_reference_policy, kl_policy_reference=stats.kl_policy_reference,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_pair_rewards_are_sums_over_the_sequences(packed):
    batch = make_pairs(3, 9, 20, torch.float64, key=(4,))
    pairs = measured(pack(batch) if packed else batch)
    log_p, log_q = batch.logits.log_softmax(-1), batch.reference.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    for i in range(3):
        largest = 0.0
        for side, row in (("chosen", i), ("rejected", 3 + i)):
            reward = tokens = forward = backward = 0.0
            for t, label in enumerate(batch.labels[row].tolist()):
                if label == IGNORE:
                    continue
                ratio = (log_p - log_q)[row, t, label].item()
                reward, tokens, largest = reward + 0.3 * ratio, tokens + 1, max(largest, abs(ratio))
                forward += (q * (log_q - log_p))[row, t].sum().item()
                backward += (p * (log_p - log_q))[row, t].sum().item()
            assert getattr(pairs, f"{side}_rewards")[i].item() == pytest.approx(reward, abs=1e-9)
            assert getattr(pairs, f"{side}_tokens")[i].item() == tokens
            assert getattr(pairs, f"{side}_kl_reference_policy")[i].item() == pytest.approx(forward, abs=1e-9)
            assert getattr(pairs, f"{side}_kl_policy_reference")[i].item() == pytest.approx(backward, abs=1e-9)
        assert pairs.largest_log_ratio[i].item() == pytest.approx(largest, abs=1e-9)


def test_rewards_are_those_of_the_loss():
    batch = make_pairs(3, 9, 20, torch.float32, key=(4,))
    out = fused_token_dpo(batch.logits, batch.labels, reference_logits=batch.reference, beta=0.3)
    pairs = pair_rewards(batch.labels, out.token_logps, out.reference_token_logps, beta=0.3)
    assert_within(out.chosen_rewards, pairs.chosen_rewards, 1e-6, "chosen")
    assert_within(out.rejected_rewards, pairs.rejected_rewards, 1e-6, "rejected")
    assert pairs.chosen_kl_reference_policy is None
    stats = RewardStats.of(7, pairs)
    assert stats.step == 7 and stats.pairs == 3 and stats.chosen_kl_policy_reference is None
    assert stats.margin == pytest.approx((out.chosen_rewards - out.rejected_rewards).mean().item(), abs=1e-6)
    assert stats.accuracy == (out.chosen_rewards > out.rejected_rewards).double().mean().item()


def test_statistics_of_several_batches():
    a, b = measured(make_pairs(3, 9, 20, torch.float64, key=(1,))), measured(make_pairs(2, 6, 20, torch.float64))
    both = RewardStats.of(0, concatenate([a, b]))
    margins = torch.cat([a.chosen_rewards - a.rejected_rewards, b.chosen_rewards - b.rejected_rewards])
    differences = torch.cat([a.chosen_tokens - a.rejected_tokens, b.chosen_tokens - b.rejected_tokens])
    assert both.pairs == 5 and both.margin == pytest.approx(margins.mean().item())
    assert both.length_correlation == pytest.approx(torch.corrcoef(torch.stack([margins, differences]))[0, 1].item())
    tokens = torch.cat([a.chosen_tokens, b.chosen_tokens]).sum()
    kl = torch.cat([a.chosen_kl_reference_policy, b.chosen_kl_reference_policy]).sum()
    assert both.chosen_kl_reference_policy == pytest.approx((kl / tokens).item())
    assert both.chosen_token_reward == pytest.approx(
        (torch.cat([a.chosen_rewards, b.chosen_rewards]).sum() / tokens).item()
    )
    with pytest.raises(ValueError, match="all or none"):
        concatenate([a, b._replace(chosen_kl_reference_policy=None)])
    with pytest.raises(ValueError, match="no batch"):
        concatenate([])


# --- the findings -----------------------------------------------------------------------------------------------------


def pairs_of(chosen: float, rejected: float, *, n=40, length_effect=0.0, largest=0.5, kl=0.02, seed=0) -> PairRewards:
    """Pairs with these mean rewards; `length_effect` reward per token of length difference, beside some noise."""
    g = generator(seed, n)
    tokens = torch.randint(5, 25, (2, n), generator=g).double()
    noise = 0.3 * torch.randn(2, n, generator=g, dtype=torch.float64)
    noise -= noise.mean(1, keepdim=True)
    gain = length_effect * (tokens - tokens.mean(1, keepdim=True))
    rewards = torch.tensor([[chosen], [rejected]], dtype=torch.float64) + noise + gain
    return PairRewards(
        rewards[0], rewards[1], tokens[0], tokens[1], torch.full((n,), largest, dtype=torch.float64),
        kl * tokens[0], kl * tokens[1], kl * tokens[0], kl * tokens[1],
    )  # fmt: skip


ZERO = PairRewards(*(torch.zeros(40, dtype=torch.float64),) * 2, *(torch.arange(40.0).double(),) * 2, torch.zeros(40))

# Chosen and rejected mean rewards at steps 10, 20, ...; step 0 has rewards of 0.
COURSES = {
    "healthy": [(0.1, -0.1), (0.3, -0.2), (0.5, -0.4), (0.8, -0.6), (1.0, -0.8), (1.1, -0.9)],
    "falling_together": [(-0.02, -0.1), (-0.1, -0.4), (-0.3, -0.9), (-0.5, -1.6), (-0.8, -2.2), (-0.9, -2.5)],
    "falling without learning": [(-0.1, -0.1), (-0.3, -0.3), (-0.5, -0.52), (-0.7, -0.7), (-0.9, -0.88), (-1.0, -1.0)],
    "rejected_alone": [(0.01, -0.2), (0.02, -0.5), (0.0, -0.9), (0.05, -1.3), (-0.04, -1.6), (0.03, -1.9)],
}


def run(course, monitor=None, **kwargs):
    monitor = monitor or RewardMonitor(beta=0.1)
    monitor.observe(0, ZERO)
    for i, (chosen, rejected) in enumerate(course, 1):
        monitor.observe(10 * i, pairs_of(chosen, rejected, **kwargs))
    return monitor


@pytest.mark.parametrize("name", COURSES)
def test_each_course_has_its_finding_and_no_other(name):
    monitor = run(COURSES[name])
    expected = {"healthy": [], "falling without learning": ["falling_together"]}.get(name, [name])
    assert [finding.name for finding in monitor.findings] == expected, monitor.report()
    if name == "falling_together":
        (finding,) = monitor.findings
        assert finding.severity == "note" and finding.step == 40
        for words in (
            "expected after supervised fine-tuning",
            "eq. 16",
            "reward of -0.002 there",
            "SFT term",
            "nothing need be done",
        ):
            assert words in finding.text, finding.text
    if name == "falling without learning":
        assert monitor.findings[0].severity == "warning" and "without learning" in monitor.findings[0].text
    if name == "rejected_alone":
        assert "what to avoid" in monitor.findings[0].text and monitor.findings[0].severity == "note"


def test_patience_and_reporting_once():
    monitor = run(COURSES["rejected_alone"] * 3)
    assert len(monitor.findings) == 1 and monitor.findings[0].step == 30
    assert not run(COURSES["rejected_alone"][:2]).findings
    assert run(COURSES["rejected_alone"][:2], RewardMonitor(patience=2)).findings[0].step == 20
    again = run([*COURSES["rejected_alone"], *COURSES["healthy"], *COURSES["rejected_alone"]])
    assert [f.name for f in again.findings] == ["rejected_alone"] * 2, "a situation that comes back is reported again"


@pytest.mark.parametrize("sign", [1, -1])
def test_length_bias(sign):
    monitor = run(COURSES["healthy"], length_effect=0.05 * sign)
    (finding,) = monitor.findings
    assert finding.name == "length_bias" and finding.severity == "warning"
    assert ("Longer answers gain" if sign > 0 else "Shorter answers gain") in finding.text
    assert "sigmoid_norm" in finding.text
    assert not run(COURSES["healthy"], length_effect=0.05 * sign, n=15).findings, "too few pairs to tell"
    assert not run(COURSES["healthy"], length_effect=0.004 * sign).findings, "too weak to tell"


def test_length_bias_needs_three_standard_errors():
    """r = 0.4 is chance among 30 pairs and not among 200."""
    for n, expected in ((30, 0), (200, 1)):
        x = torch.linspace(-1, 1, n, dtype=torch.float64)
        y = torch.cos(7 * math.pi * x)
        y = y - y.mean() - (x * y).sum() / x.square().sum() * x
        margin = 0.4 * x / x.norm() + math.sqrt(1 - 0.16) * y / y.norm() + 1.0
        pairs = PairRewards(margin, 0 * margin, 100 + 50 * x, 100 + 0 * x, 0 * x)
        monitor = RewardMonitor()
        for step in (1, 2, 3):
            monitor.observe(step, pairs)
        assert monitor.history[0].length_correlation == pytest.approx(0.4)
        assert sum(f.name == "length_bias" for f in monitor.findings) == expected


def test_reference_mismatch():
    for largest, expected in ((0.0, 0), (5e-4, 0), (0.03, 1), (float("nan"), 1)):
        monitor = RewardMonitor()
        new = monitor.observe(0, ZERO._replace(largest_log_ratio=torch.full((40,), largest)))
        assert [f.name for f in new] == ["reference_mismatch"] * expected
        if expected:
            assert (
                "dropout" in new[0].text and new[0].severity == "warning" and str(new[0]).startswith("step 0, warning")
            )
    later = RewardMonitor()
    assert not later.observe(5, ZERO._replace(largest_log_ratio=torch.full((40,), 3.0))), "training has begun"


def test_reports_and_logs():
    monitor = run(COURSES["falling_together"])
    text = monitor.report()
    for words in ("step 0 -> 60, 40 pairs", "+0.000 -> -0.900", "margin", "KL per token", "note: chosen and rejected"):
        assert words in text
    logs = monitor.logs()
    assert logs["qkernels/chosen_reward"] == pytest.approx(-0.9) and "qkernels/step" not in logs
    assert RewardMonitor().report() == "no observations yet" and RewardMonitor().logs() == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 0}, ValueError, "beta must be finite"),
        ({"patience": 0}, ValueError, "patience must be 1 or more"),
        ({"patience": 1.0}, TypeError, "patience must be an int"),
        ({"least_pairs": 3}, ValueError, "least_pairs must be 4 or more"),
        ({"share_band": -1.0}, ValueError, "share_band must be finite"),
        ({"mismatch_tolerance": "x"}, TypeError, "mismatch_tolerance must be a number"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        RewardMonitor(**options)


def test_errors():
    monitor = run(COURSES["healthy"])
    with pytest.raises(ValueError, match="step 3 comes after step 60"):
        monitor.observe(3, ZERO)
    with pytest.raises(ValueError, match="no pairs"):
        monitor.observe(70, PairRewards(*(torch.zeros(0),) * 5))
    labels = torch.ones(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected an even number"):
        pair_rewards(labels, torch.zeros(3, 4), torch.zeros(3, 4), beta=0.1)
    with pytest.raises(ValueError, match="token_logps must have shape"):
        pair_rewards(labels[:2], torch.zeros(2, 3), torch.zeros(2, 4), beta=0.1)
    with pytest.raises(ValueError, match=r"labels must have shape \[2B, T\]"):
        pair_rewards(labels[0], torch.zeros(4), torch.zeros(4), beta=0.1)


# --- models and the trainer -------------------------------------------------------------------------------------------


@pytest.fixture
def probe():
    """Two batches of pairs with prompts and padding, as TRL's collator makes them."""
    batches = []
    for key in (1, 2):
        g = generator(key)
        ids = torch.randint(2, 13, (6, 8), generator=g)
        attended = torch.ones_like(ids)
        for row, padding in enumerate(torch.randint(0, 3, (6,), generator=g).tolist()):
            attended[row, 8 - padding :] = 0
        completion = attended.clone()
        completion[:, :3] = 0
        batches.append({"input_ids": ids * attended, "attention_mask": attended, "completion_mask": completion})
    return batches


def test_measuring_models(probe):
    pytest.importorskip("transformers")
    from toy_models import llama

    policy, reference = llama(1, attention_dropout=0.5).train(), llama(2)
    policy.model.layers[0].eval()
    pairs = measure_rewards(policy, reference, probe, beta=0.2)
    assert policy.training and not policy.model.layers[0].training and policy.model.layers[1].training
    policy.eval()
    rewards = []
    for batch in probe:
        with torch.no_grad():
            log_p, log_q = (
                m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
                for m in (policy, reference)
            )
        taken = (log_p - log_q)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        rewards.append(0.2 * (taken * batch["completion_mask"][:, 1:]).sum(1))
    assert_within(pairs.chosen_rewards, torch.cat([r[:3] for r in rewards]), 1e-5, "chosen")
    assert_within(pairs.rejected_rewards, torch.cat([r[3:] for r in rewards]), 1e-5, "rejected")
    assert bool((pairs.chosen_kl_policy_reference > 0).all())
    equal = measure_rewards(policy, llama(1), probe, beta=0.2)
    assert bool((equal.largest_log_ratio == 0).all())


def test_the_callback_by_hand(probe, caplog):
    pytest.importorskip("transformers")
    from qkernels.integrations.monitor import RewardMonitorCallback
    from toy_models import llama

    policy, reference = llama(1), llama(1)
    callback = RewardMonitorCallback(probe, reference)
    args = SimpleNamespace(beta=0.5, logging_steps=2)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[])
    with pytest.raises(ValueError, match="before training begins"):
        _ = callback.monitor
    callback.on_train_begin(args, state, None, model=policy)
    assert callback.monitor.beta == 0.5 and not callback.monitor.findings
    with torch.no_grad():
        policy.lm_head.weight.add_(0.1)
    for step in (1, 2, 3, 4):
        state.global_step = step
        callback.on_step_end(args, state, None, model=policy)
    assert [stats.step for stats in callback.monitor.history] == [0, 2, 4]
    logs = {"loss": 1.0}
    state.log_history.append(dict(logs))
    callback.on_log(args, state, None, logs=logs)
    assert logs == state.log_history[-1] and logs["qkernels/margin"] == callback.monitor.history[-1].margin
    state.global_step = 5  # not observed: an entry of this step must not show the numbers of another
    logs = {"loss": 0.5}
    state.log_history.append(dict(logs))
    callback.on_log(args, state, None, logs=logs)
    assert logs == state.log_history[-1] == {"loss": 0.5}
    state.global_step = 4
    callback.on_train_begin(args, state, None, model=policy)
    assert len(callback.monitor.history) == 3, "the same step is not observed twice"

    wrong = RewardMonitorCallback(probe, llama(2), every=1)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[])
    with caplog.at_level("WARNING"):
        wrong.on_train_begin(args, state, None, model=policy)
    assert "differ before the first update" in caplog.text

    with pytest.raises(ValueError, match="batches is empty"):
        RewardMonitorCallback([])
    with pytest.raises(ValueError, match=r"batches\[1\] must hold the tensor input_ids or labels, .*'prompt'"):
        RewardMonitorCallback([probe[0], {"prompt": "a"}])
    with pytest.raises(TypeError, match=r"batches\[0\] must be a mapping of tensors, got str"):
        RewardMonitorCallback("ab")
    with pytest.raises(ValueError, match="every must be"):
        RewardMonitorCallback(probe, every=0)
    with pytest.raises(ValueError, match="needs reference_model="):
        RewardMonitorCallback(probe).on_train_begin(args, state, None, model=policy)
    with pytest.raises(ValueError, match="needs beta="):
        RewardMonitorCallback(probe, reference).on_train_begin(SimpleNamespace(), state, None, model=policy)


def test_the_callback_in_a_trainer(probe, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from qkernels.integrations.monitor import RewardMonitorCallback
    from qkernels.integrations.transformers import compute_token_logps
    from toy_models import llama

    reference = llama(1)

    class Preference(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            sums = compute_token_logps(model, inputs).sum(1)
            with torch.no_grad():
                cached = compute_token_logps(reference, inputs).sum(1)
            chosen, rejected = (sums - cached).chunk(2)
            return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    class Batches(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return probe[i % 2]

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, logging_steps=2, per_device_train_batch_size=1, report_to=[],
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = Preference(
        model=llama(1), args=arguments, train_dataset=Batches(), data_collator=lambda items: items[0],
        callbacks=[Reporter()],
    )  # fmt: skip
    trainer.ref_model = reference
    callback = RewardMonitorCallback(probe, beta=0.1).attach(trainer)
    assert callback.reference_model is reference
    trainer.train()
    history = callback.monitor.history
    assert [stats.step for stats in history] == [0, 2, 4] and history[-1].margin > history[0].margin == 0
    logged = [entry["qkernels/margin"] for entry in trainer.state.log_history if "qkernels/margin" in entry]
    assert logged[:2] == [history[1].margin, history[2].margin]
    assert [entry["qkernels/margin"] for entry in reported[:2]] == logged[:2], "reporters see it"


def test_measuring_is_found_where_it_was():
    pytest.importorskip("transformers")
    from qkernels import monitor
    from qkernels.integrations.monitor import measure_rewards as moved

    assert monitor.measure_rewards is moved
    with pytest.raises(AttributeError, match="no attribute 'measure'"):
        _ = monitor.measure
