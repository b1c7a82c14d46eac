"""Tree search against exact plans of tabular MDPs, against beams, and against full forwards of what it returns."""

from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("transformers")

from assertions import assert_within
from cases import generator
from qkernels.search import beam_search, tree_search
from qkernels.tabular import random_mdp
from toy_models import END, PAD, gpt2, llama, next_logps, tabular_models

PROMPT = torch.tensor([[3]])
IDS = torch.tensor([[5, 2, 9, 4, 7], [PAD, PAD, PAD, 3, 8], [PAD, 6, 6, 11, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])


def rewards_of(mdp):
    """The true reward of the leaves' tokens so far, as a user's reward function; and V* as a value function."""

    def reward(leaves):
        tokens = [row[mask] for row, mask in zip(leaves.sequences[:, 1:], leaves.completion_mask, strict=True)]
        return torch.stack([mdp.along(mdp.rewards, row[None]).sum() for row in tokens])

    def value(leaves):
        tokens = [row[mask] for row, mask in zip(leaves.sequences[:, 1:], leaves.completion_mask, strict=True)]
        return torch.stack([mdp.value_after(row[None])[0] for row in tokens])

    return reward, value


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("rollout", [None, 0, 1])
def test_tree_beam_and_exact_plan_agree(steps, rollout):
    """(12) = (13): the best plans by the policy alone, by the true rewards with V*, by a wide beam, by dynamic
    programming over the table."""
    surprises = 0
    for seed in range(1, 4):
        mdp = random_mdp(3, 4, 0.8, generator(seed))
        policy, reference = tabular_models(mdp)
        reward, value = rewards_of(mdp)
        every = mdp.plan_values(mdp.sequences(steps)).sort(descending=True)
        best = mdp.sequences(steps)[every.indices[:3]]
        shared = {"beta": mdp.beta, "max_new_tokens": steps}
        beams = beam_search(policy, PROMPT, num_beams=3**steps, batch_size=100, use_cache=False, **shared)
        assert torch.equal(beams.completions[0, :3], best)
        shared.update(simulations=3**steps, num_return_sequences=3, rollout=rollout, parallel=1, width=3)
        tree = tree_search(policy, PROMPT, **shared)
        assert tree.proven.all() and torch.equal(tree.beams.completions[0], best)
        assert_within(tree.beams.scores[0], every.values[:3], 3e-6, "values of the plans")
        assert_within(tree.beams.plan_values[0], every.values[:3], 1e-5, "read off the beams")
        surprises += int(tree.simulations) > 1
        given = {"reference_model": reference, "reward": reward, "value": value}
        for outside in (given, *([{**given, "value": "policy"}] if steps < mdp.horizon else [])):  # no table after it
            tree = tree_search(policy, PROMPT, **{**shared, "simulations": 200}, **outside)
            assert torch.equal(tree.beams.completions[0], best) and not tree.proven.any()
            assert_within(tree.beams.scores[0], every.values[:3], 3e-6, "values by true rewards")
    assert surprises > 0, "greedy is not always best"


@pytest.mark.parametrize("make", [llama, gpt2], ids=["rotary", "learned positions"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_what_is_found_is_what_full_forwards_say(make, parallel):
    """In a batch with padding: scores, numbers, order; the same without a cache; proven results are those of beams."""
    policy, reference = make(1), make(2)
    given = {"reference_model": reference, "beta": 0.3, "max_new_tokens": 5, "num_return_sequences": 2, "width": 13}
    found = tree_search(policy, IDS, MASK, simulations=400, parallel=parallel, **given)
    again = tree_search(policy, IDS, MASK, simulations=400, parallel=parallel, use_cache=False, **given)
    assert torch.equal(found.beams.sequences, again.beams.sequences) and torch.equal(found.forwards, again.forwards)
    assert found.proven.all()
    beams = beam_search(policy, IDS, MASK, beta=0.3, num_beams=60, num_return_sequences=2, max_new_tokens=5)
    assert_within(found.beams.logps, beams.logps.double(), 2e-5, "no beam is better")
    for b in range(3):
        prompt = IDS[b][MASK[b].bool()].tolist()
        for k in range(2):
            tokens = found.beams.completions[b, k][found.beams.completion_mask[b, k]].tolist()
            assert END not in tokens[:-1] and len(tokens) <= 5
            assert found.beams.finished[b, k] == (tokens[-1] == END)
            logps = sum(next_logps(policy, prompt + tokens[:t])[a] for t, a in enumerate(tokens))
            with torch.no_grad():
                value = 0.3 * policy(torch.tensor([prompt])).logits[0, -1].double().logsumexp(-1)
            assert_within(found.beams.scores[b, k], value + 0.3 * logps, 1e-5, "V(s_0) + beta log pi")
    assert torch.equal(found.beams.sequences[:, 0, :5], IDS)


def test_a_sliding_window_and_every_token_read_once():
    """The pool keeps all positions, the model's masks say which it sees; positions run are prompt and forwards."""
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = MistralConfig(
            vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.5, sliding_window=3, pad_token_id=PAD, eos_token_id=END,
            bos_token_id=None, max_position_embeddings=64, attn_implementation="eager",
        )  # fmt: skip
        policy = MistralForCausalLM(config).eval()
    positions = []
    handle = policy.register_forward_pre_hook(
        lambda m, a, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = tree_search(policy, IDS, MASK, simulations=12, max_new_tokens=5, width=6)
    handle.remove()
    assert positions[0] == IDS.numel() and sum(positions[1:-1]) == int(found.forwards.sum()), "the last one scores"
    again = tree_search(policy, IDS, MASK, simulations=12, max_new_tokens=5, width=6, use_cache=False)
    assert torch.equal(found.beams.sequences, again.beams.sequences)
    assert_within(found.beams.scores, again.beams.scores.double(), 1e-5, "with and without a cache")


def test_a_reward_from_outside_guides():
    """A reward for one token: the best completion by r + beta log pi_ref over all there are; without a reference the
    policy stands for it."""
    policy, reference = llama(1, vocab=5, end=None), llama(2, vocab=5, end=None)
    prompt = torch.tensor([[3, 2]])

    def reward(leaves):
        return ((leaves.sequences[:, 2:] == 4) & leaves.completion_mask).sum(1) * 0.9

    def nothing(leaves):
        return torch.zeros(len(leaves.prompts))

    for base in (reference, None):
        found = tree_search(
            policy, prompt, reference_model=base, reward=reward, value=nothing, beta=0.5, simulations=40,
            max_new_tokens=2, width=5,
        )  # fmt: skip
        values = []
        for i in range(25):
            tokens = [i // 5, i % 5]
            logps = sum(
                next_logps(policy if base is None else base, [3, 2, *tokens[:t]])[a] for t, a in enumerate(tokens)
            )
            values.append((0.5 * logps + 0.9 * tokens.count(4), tokens))
        best, tokens = max(values)
        assert found.beams.completions[0, 0].tolist() == tokens
        assert_within(found.beams.scores[0, 0], best, 1e-5, "value")


def test_limits_and_progress():
    """A budget of forwards, after the first completion; fewer completions than asked for; a bar."""
    policy = llama(1)
    progress = io.StringIO()
    found = tree_search(policy, IDS, MASK, simulations=50, max_forwards=12, max_new_tokens=6, progress=progress)
    assert int(found.forwards.max()) <= 12 + 4 and "simulations 150/150" in progress.getvalue()
    assert found.beams.completions.shape[:2] == (3, 1) and found.beams.rewards is None
    few = tree_search(policy, IDS, MASK, simulations=1, max_new_tokens=2, num_return_sequences=30, width=13)
    assert few.simulations.tolist() == [1, 1, 1] and not few.proven.any()
    exists = few.beams.scores > -torch.inf
    assert exists.sum(1).tolist() == [14, 14, 14], "an end after the prompt, or any token after the likeliest"
    assert torch.equal(few.beams.completion_mask.any(2), exists) and not few.beams.finished[~exists].any()


def test_ends_are_known_without_a_forward():
    """Every prefix that was read is a completion with its end, and so is any token at the last place: by hand over the
    path of the likeliest tokens, which is all that one simulation reads. Not so with values from outside."""
    policy = llama(1)
    prompt, path, expected = [4], [], []
    for depth in range(5):
        logps = next_logps(policy, prompt + path).tolist()
        so_far = sum(next_logps(policy, prompt + path[:t]).tolist()[a] for t, a in enumerate(path))
        last = range(13) if depth == 4 else [END]
        expected += [(so_far + logps[token], [*path, token]) for token in last]
        path.append(logps.index(max(logps)))
    expected.sort(reverse=True)
    found = tree_search(
        policy, torch.tensor([prompt]), beta=1.0, simulations=1, max_new_tokens=5, num_return_sequences=17, width=13
    )
    assert found.forwards.tolist() == [4] and found.beams.scores.isfinite().all()
    for k, (logp, tokens) in enumerate(expected):
        assert found.beams.completions[0, k][found.beams.completion_mask[0, k]].tolist() == tokens
        assert_within(found.beams.logps[0, k], torch.tensor(logp), 1e-5, "log pi of an end")
    outside = tree_search(
        policy, torch.tensor([prompt]), beta=1.0, simulations=1, max_new_tokens=5, num_return_sequences=17, width=13,
        value=lambda leaves: leaves.prompts * 0.0,
    )  # fmt: skip
    assert outside.beams.scores.isfinite().sum() == 1


def test_errors():
    policy = llama(1)
    for arguments, error, message in (
        ({"simulations": 0}, ValueError, "simulations must be 1 or more"),
        ({"max_forwards": 0}, ValueError, "max_forwards must be 1 or more"),
        ({"rollout": -1}, ValueError, "rollout must be 1 or more"),
        ({"rollout": 1.5}, TypeError, "rollout must be an int"),
        ({"value": "critic"}, ValueError, 'value must be "policy" or a function of Leaves'),
        ({"reward": "none"}, ValueError, 'reward must be "implicit" or a function of Leaves'),
        ({"exploration": -1.0}, ValueError, "exploration must be a finite number"),
        (
            {"reward": lambda leaves: 1.0},
            ValueError,
            r"reward must return one number per leaf.*\[S\] = \(3,\); got float",
        ),
        ({"value": lambda leaves: leaves.prompts[:1] + float("nan")}, ValueError, "value must return one number"),
        ({"reference_model": llama(2).train()}, ValueError, "reference_model is in training mode"),
        ({"reference_model": policy}, ValueError, "is model itself, which has no PEFT adapter"),
        (
            {"reference_model": policy, "reward": lambda leaves: torch.zeros(leaves.prompts.shape)},
            ValueError,
            "is model itself, which has no PEFT adapter",
        ),
        ({"attention_mask": MASK.flip(1)}, ValueError, "padded on the left"),
    ):
        given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 2, "simulations": 2, **arguments}
        with pytest.raises(error, match=message):
            tree_search(policy, **given)
