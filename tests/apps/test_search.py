"""Search and decoding-time processors against searches by hand: full forward passes, one sequence at a time."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from assertions import assert_within
from cases import generator
from qkernels import token_stats
from qkernels.decoding import CopyMixture, ImplicitRewardGuidance, ProxyTuning
from qkernels.decoding.inside import Watch
from qkernels.search import beam_search, best_of, scan_beta, score_completions
from qkernels.tabular import random_mdp
from toy_models import END, PAD, gpt2, llama, next_logps, tabular_models

PROMPTS = [[5, 2, 9, 4, 7], [3, 8], [6, 6, 11, 2]]


@pytest.fixture(scope="module")
def models():
    """Four models with one vocabulary."""
    return [llama(seed) for seed in range(1, 5)]


def padded(prompts=PROMPTS) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


Logps = Callable[[list[int]], Tensor]


def search_by_hand(logps: Logps, prompt: list[int], width: int, steps: int) -> list[tuple[float, list[int]]]:
    """Beam search by the sum of log-probs, one full forward per prefix; the ends that were among the best `width`."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for step in range(steps):
        grown = []
        for score, tokens in running:
            grown += [(score + x, [*tokens, a]) for a, x in enumerate(logps(prompt + tokens).tolist())]
        grown = sorted(grown, reverse=True)[: 2 * width]
        last = step == steps - 1
        ended += [beam for beam in grown[:width] if last or beam[1][-1] == END]
        ended = sorted(ended, reverse=True)[:width]
        running = [beam for beam in grown if beam[1][-1] != END][:width]
        if len(ended) == width and running[0][0] <= ended[-1][0]:
            break
    return ended


def assert_beams(found, logps: Logps, width: int, steps: int, prompts=PROMPTS) -> None:
    for b, prompt in enumerate(prompts):
        truth = search_by_hand(logps, prompt, width, steps)
        tokens = [found.completions[b, k][found.completion_mask[b, k]].tolist() for k in range(width)]
        assert tokens == [beam for _, beam in truth]
        assert_within(found.scores[b], torch.tensor([s for s, _ in truth]), 2e-5, "scores")


# --- beam search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 5])
def test_beams_are_those_of_a_search_by_hand(models, width):
    policy, reference = models[:2]
    ids, mask = padded()
    found = beam_search(policy, ids, mask, reference_model=reference, beta=0.3, num_beams=width, max_new_tokens=6)
    assert_beams(found, lambda tokens: next_logps(policy, tokens), width, 6)
    assert bool((found.finished == (found.completions.masked_fill(~found.completion_mask, -1) == END).any(-1)).all())
    assert found.finished.any() and (width < 5 or not found.finished.all())
    assert torch.equal(found.sequences[:, :, : ids.shape[1]], ids[:, None].expand(-1, width, -1))
    assert_within(found.scores, found.logps.double(), 2e-5, "the score is log pi")


def test_every_beam_has_its_numbers(models):
    """Per token: log-probs of both models, value and reward, from full forwards in float64; sums; plan values."""
    policy, reference = models[:2]
    ids, mask = padded()
    found = beam_search(policy, ids, mask, reference_model=reference, beta=0.3, num_beams=3, max_new_tokens=6)
    for b, prompt in enumerate(PROMPTS):
        for k in range(3):
            tokens = found.completions[b, k][found.completion_mask[b, k]].tolist()
            assert len(tokens) == found.lengths[b, k]
            logps, ref, values = [], [], []
            for t, token in enumerate(tokens):
                whole = torch.tensor([prompt + tokens[:t]])
                with torch.no_grad():
                    logits = [model(input_ids=whole).logits[0, -1].double() for model in (policy, reference)]
                logps.append(logits[0].log_softmax(-1)[token])
                ref.append(logits[1].log_softmax(-1)[token])
                values.append(0.3 * logits[0].logsumexp(-1))
            n = len(tokens)
            for name, truth in (("token_logps", logps), ("reference_token_logps", ref), ("token_values", values)):
                row = getattr(found, name)[b, k]
                assert_within(row[:n], torch.stack(truth), 1e-5, name)
                assert bool((row[n:] == 0).all())
            rewards = 0.3 * (torch.stack(logps) - torch.stack(ref))
            assert_within(found.token_rewards[b, k, :n], rewards, 1e-5, "token_rewards")
            assert_within(found.rewards[b, k], rewards.sum(), 1e-5, "rewards")
            assert_within(found.plan_values[b, k], values[0] + 0.3 * sum(logps), 1e-5, "plan value")


def test_prompts_as_a_tokenizer_returns_them_and_completions_as_text(models):
    ids, mask = padded()
    found = beam_search(models[0], {"input_ids": ids, "attention_mask": mask}, num_beams=2, max_new_tokens=4)
    assert torch.equal(found.sequences, beam_search(models[0], ids, mask, num_beams=2, max_new_tokens=4).sequences)
    assert len(repr(found).splitlines()) == 1 and "sequences=<int64 [" in repr(found)

    class Tokenizer:
        def batch_decode(self, rows, skip_special_tokens):
            assert skip_special_tokens
            return [" ".join(map(str, row.tolist())) for row in rows]

    texts = found.texts(Tokenizer())
    assert [len(beams) for beams in texts] == [2] * len(ids)
    assert texts[1][0] == " ".join(map(str, found.completions[1, 0].tolist()))


# --- best of n --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 4])
def test_the_best_of_n_is_first(models, batch_size):
    """Ranked by each rule, as the sums of full forwards say; the samples do not depend on the rule."""
    policy, reference, sampler, _ = models
    ids, mask = padded()
    drawn = {}
    for by in ("logp", "reward", lambda found: -found.lengths.float()):
        torch.manual_seed(3)
        found = best_of(
            policy, reference, ids, mask, n=5, by=by, sampler=sampler, beta=0.3, max_new_tokens=6, batch_size=batch_size
        )
        truth = {"logp": found.logps, "reward": found.rewards}.get(by, -found.lengths)
        assert found.completions.shape[:2] == (3, 5) and torch.equal(found.scores, truth)
        assert bool((found.scores.diff(dim=1) <= 0).all())
        assert_within(found.logps, found.token_logps.double().sum(2), 1e-5, "the numbers follow their sample")
        ended = (found.completions == END) & found.completion_mask
        assert torch.equal(ended.any(2), found.finished) and int(ended.sum(2).max()) == 1
        assert bool((found.completions[~found.completion_mask] == PAD).all())
        drawn[str(by)] = [sorted(map(str, rows)) for rows in found.completions.tolist()]
    assert len(set(map(str, drawn.values()))) == 1
    for b, prompt in enumerate(PROMPTS):  # by length: the shortest first
        tokens = found.completions[b, 0][found.completion_mask[b, 0]].tolist()
        policys, references = (
            sum(next_logps(model, prompt + tokens[:t])[a] for t, a in enumerate(tokens))
            for model in (policy, reference)
        )
        assert_within(found.logps[b, 0], policys, 3e-5, "logp")
        assert_within(found.rewards[b, 0], 0.3 * (policys - references), 1e-5, "reward")


def test_samples_come_from_the_sampler(models):
    """A sampler that always writes one word; the policy ranks, and the reference may be left out."""
    policy = models[0]
    stubborn = llama(3)
    stubborn.register_forward_hook(lambda m, a, out: (out.logits.__setitem__((..., 7), 1e4), out)[1])
    ids, mask = padded()
    progress = io.StringIO()
    found = best_of(policy, None, ids, mask, n=2, sampler=stubborn, max_new_tokens=3, progress=progress)
    assert bool((found.completions == 7).all()) and found.rewards is None and not found.finished.any()
    truth = sum(next_logps(policy, [*PROMPTS[1], *[7] * t])[7] for t in range(3))
    assert_within(found.logps[1, 0], truth, 2e-5, "the policy's log-prob")
    assert "sampling 6/6" in progress.getvalue()


def combined(policy, reference, exponent: float) -> Logps:
    """log of pi_ref^(1 - exponent) pi^exponent, by full forwards."""
    return lambda ids: ((1 - exponent) * next_logps(reference, ids) + exponent * next_logps(policy, ids)).log_softmax(
        -1
    )


@pytest.mark.parametrize("sign, batch_size", [(1, 16), (-1, 4)])
def test_strengths_after_training(models, sign, batch_size):
    """Every token of every sample has the divergence of the mixture, by full forwards, and the means are theirs."""
    policy, reference = models[:2]
    ids, mask = padded()
    torch.manual_seed(5)
    scan = scan_beta(
        policy, reference, ids, mask, strengths=(0.5, 50.0), sign=sign, n=2, max_new_tokens=4,
        batch_size=batch_size, judge=lambda found: found.lengths.float(),
    )  # fmt: skip
    assert scan.strengths == (0.5, 50.0) and scan.divergences.shape == (2,)
    assert scan.divergences[1] < 0.1 < scan.divergences[0], "nearer to the reference"
    for i, strength in enumerate(scan.strengths):
        mixture, found = combined(policy, reference, sign / strength), scan.found[i]
        sums = []
        for b, prompt in enumerate(PROMPTS):
            for k in range(2):
                tokens = found.completions[b, k][found.completion_mask[b, k]].tolist()
                total = 0.0
                for t in range(len(tokens)):
                    logps, base = mixture(prompt + tokens[:t]), next_logps(reference, prompt + tokens[:t])
                    total += float((logps.exp() * (logps - base)).sum())
                sums.append(total)
        sums = torch.tensor(sums, dtype=torch.float64)
        assert_within(scan.divergences[i], sums.mean(), 1e-4, "divergence")
        assert_within(scan.divergence_errors[i], sums.std() / 6**0.5, 1e-4, "its standard error")
        lengths = found.lengths.double()
        assert_within(scan.scores[i], lengths.mean(), 1e-6, "score")
        assert_within(scan.score_errors[i], lengths.flatten().std() / 6**0.5, 1e-6, "its standard error")
    assert scan.within(1e9) == int(scan.divergences.argmax()) and scan.within(0.1) == 1
    with pytest.raises(ValueError, match="no strength has a divergence of at most 1e-09; the least is"):
        scan.within(1e-9)


def test_samples_of_a_strength_follow_its_distribution(models):
    """400 first tokens against the mixture, by a chi-square test."""
    policy, reference = models[:2]
    torch.manual_seed(7)
    found = scan_beta(
        policy, reference, torch.tensor([[5, 2, 9]]), strengths=(2.0,), n=400, max_new_tokens=1, batch_size=400
    ).found[0]
    expected = 400 * combined(policy, reference, 0.5)([5, 2, 9]).exp()
    counts = torch.bincount(found.completions[0, :, 0], minlength=13).double()
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1)).sum().item()
    assert chi_square < 40, "13 cells; above 40 once in 10,000 times"


def test_scan_errors(models):
    policy, reference = models[:2]
    ids, mask = padded()
    for arguments, message in (
        ({"strengths": ()}, "strengths must hold at least one"),
        ({"strengths": (1.0, 0.0)}, r"strengths\[1\] must be"),
        ({"sign": 0.5}, "sign must be 1 or -1"),
        ({"judge": lambda found: found.lengths[0].float()}, r"judge must return one number per sample"),
        ({"num_beams": 2}, "num_beams is scan_beta's own"),
        ({"reference": policy}, "no PEFT model"),
    ):
        with pytest.raises(ValueError, match=message):
            scan_beta(**{"policy": policy, "reference": reference, "input_ids": ids, "attention_mask": mask,
                         "max_new_tokens": 2, **arguments})  # fmt: skip


def test_best_of_errors(models):
    policy, reference = models[:2]
    ids, mask = padded()
    for arguments, error, message in (
        ({"n": 0}, ValueError, "n must be 1 or more"),
        ({"by": "likelihood"}, ValueError, 'by must be "logp", "reward" or a function'),
        ({"by": "reward", "reference": None}, ValueError, 'by="reward" needs a reference'),
        ({"by": lambda found: found.lengths[0]}, ValueError, r"\[B, n\] = \(3, 2\); got \(2,\)"),
        ({"by": lambda found: found.logps * float("nan")}, ValueError, "none of them NaN"),
        ({"by": lambda found: [0.0]}, TypeError, r"by\(...\) must be a torch.Tensor"),
        ({"do_sample": False}, ValueError, "do_sample is best_of's own"),
        ({"sampler": torch.nn.Linear(2, 2).eval()}, TypeError, "has no generate"),
        ({"sampler": llama(3).train()}, ValueError, "sampler is in training mode"),
    ):
        with pytest.raises(error, match=message):
            best_of(**{"policy": policy, "reference": reference, "input_ids": ids, "attention_mask": mask,
                       "n": 2, "max_new_tokens": 2, **arguments})  # fmt: skip


def test_a_policy_that_is_its_reference_has_no_reward(models):
    policy = models[0]
    ids, mask = padded()
    twin = llama(1)
    found = beam_search(policy, ids, mask, reference_model=twin, num_beams=2, max_new_tokens=4)
    assert bool((found.token_rewards == 0).all())
    without = beam_search(policy, ids, mask, num_beams=2, max_new_tokens=4)
    assert without.rewards is without.token_rewards is without.reference_token_logps is None
    assert torch.equal(without.logps, found.logps)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_beam_as_wide_as_the_tree_finds_the_best_plan(steps):
    """(12), (13) through generate: the order of all sequences is that of the plans' values, exactly solved."""
    greedy_misses = 0
    for seed in range(8):
        mdp = random_mdp(3, 4, 0.8, generator(seed))
        policy, reference = tabular_models(mdp)
        prompt = torch.tensor([[3]])
        shared = {"reference_model": reference, "beta": mdp.beta, "max_new_tokens": steps, "use_cache": False}
        found = beam_search(policy, prompt, num_beams=3**steps, batch_size=100, **shared)
        sequences = found.completions[0]
        values = mdp.plan_values(sequences)
        every = mdp.plan_values(mdp.sequences(steps)).sort(descending=True).values
        assert_within(values, every, 2e-6, "plans in the order in which they were found")
        assert_within(found.plan_values[0], every, 1e-5, "value of the plan, read off the beams")
        implicit = mdp.along(mdp.implicit_rewards, sequences)
        assert_within(found.token_rewards[0], implicit, 1e-5, "implicit rewards")
        assert_within(found.token_values[0], mdp.along(mdp.V, sequences), 1e-5, "V")
        greedy = beam_search(policy, prompt, num_beams=1, **shared)
        greedy_misses += greedy.completions[0, 0].tolist() != sequences[0].tolist()
    assert greedy_misses > 0 or steps == 2


def test_beams_that_do_not_exist_are_marked():
    """81 beams over 9 sequences."""
    policy, reference = tabular_models(random_mdp(3, 4, 0.8, generator(3)))
    found = beam_search(
        policy, torch.tensor([[3]]), reference_model=reference, num_beams=12, max_new_tokens=2, use_cache=False
    )
    assert found.scores.isfinite().sum() == 9 and bool((found.scores[0, 9:] == -torch.inf).all())
    assert bool((found.logps[0, 9:] == -torch.inf).all()) and not found.completion_mask[0, 9:].any()
    assert len({tuple(row) for row in found.completions[0, :9].tolist()}) == 9


def test_the_generation_config_does_not_change_the_search(models):
    """Checkpoints come with sampling and repetition penalties in their configuration."""
    ids, mask = padded()
    plain = beam_search(models[0], ids, mask, num_beams=3, max_new_tokens=5)
    other = llama(1)
    other.generation_config.update(do_sample=True, temperature=0.5, top_k=3, repetition_penalty=1.8, length_penalty=2.0)
    assert torch.equal(beam_search(other, ids, mask, num_beams=3, max_new_tokens=5).sequences, plain.sequences)
    longer = beam_search(models[0], ids, mask, num_beams=3, max_new_tokens=5, length_penalty=3.0)
    assert longer.lengths[:, 0].sum() >= plain.lengths[:, 0].sum() and not torch.equal(longer.scores, plain.scores)


def test_samples_come_with_their_numbers(models):
    """With do_sample and no beams, K draws a prompt, of the policy itself; a stopped sequence ends where it stopped."""
    policy, reference = models[:2]
    ids, mask = padded()
    torch.manual_seed(0)
    found = beam_search(
        policy, ids, mask, reference_model=reference, num_beams=1, num_return_sequences=4, do_sample=True,
        max_new_tokens=8,
    )  # fmt: skip
    assert found.sequences.shape[:2] == (3, 4) and torch.equal(found.scores, found.logps)
    again = score_completions(
        policy, found.sequences.flatten(0, 1),
        torch.cat([mask.repeat_interleave(4, 0), found.completion_mask.flatten(0, 1).long()], 1),
        found.completion_mask.flatten(0, 1), reference_model=reference, batch_size=5,
    )  # fmt: skip
    assert_within(again.rewards.view(3, 4), found.rewards.double(), 1e-6, "rewards")

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 7

    torch.manual_seed(0)
    stopped = beam_search(
        policy, ids, mask, num_beams=1, num_return_sequences=4, do_sample=True, max_new_tokens=8,
        stopping_criteria=StoppingCriteriaList([Stop()]),
    )  # fmt: skip
    for tokens, keep in zip(stopped.completions.flatten(0, 1), stopped.completion_mask.flatten(0, 1), strict=True):
        row = tokens[keep].tolist()
        assert 7 not in row[:-1] and END not in row[:-1]


# --- processors -------------------------------------------------------------------------------------------------------


def tuned(base, numerator, denominator, scale) -> Logps:
    """The definition, one prefix at a time."""
    return lambda ids: (
        next_logps(base, ids) + scale * (next_logps(numerator, ids) - next_logps(denominator, ids))
    ).log_softmax(-1)


def processors(models) -> dict[str, tuple[Callable, Logps]]:
    base, proxy, reference, _ = models
    return {
        "eq. 14": (lambda **k: ProxyTuning(proxy, reference, 1.5, **k), tuned(base, proxy, reference, 1.5)),
        "reward of others": (
            lambda **k: ImplicitRewardGuidance(proxy, reference, weight=5.0, beta=0.2, **k),
            tuned(base, proxy, reference, 1.0),
        ),
        "base is the reference": (
            lambda **k: ImplicitRewardGuidance(policy=proxy, weight=7.0, beta=0.1, **k),
            tuned(base, proxy, base, 0.7),
        ),
        "base is the policy": (
            lambda **k: ImplicitRewardGuidance(reference=reference, weight=3.0, beta=0.1, **k),
            tuned(base, base, reference, 0.3),
        ),
        "copying": (lambda **k: CopyMixture(base, scale=2.0, **k), copying(base, 2.0)),
    }


NAMES = ("eq. 14", "reward of others", "base is the reference", "base is the policy", "copying")


def copying(model, scale: float, layers=(1,), source: Callable[[list[int]], list[int]] | None = None) -> Logps:
    """The calibrated rule by its definition: one full forward, loops over the vocabulary and the prompt.

    The prompt is told from the completion by `PROMPTS`, one of which each prefix begins with. The vocabulary is smaller
    than the number of candidates, so all tokens are compared.
    """
    heads = CopyMixture(model).heads

    def logps(ids: list[int]) -> Tensor:
        prompt = next(p for p in PROMPTS if ids[: len(p)] == p)
        places = [i for i, t in enumerate(prompt) if t not in (PAD, END)] if source is None else source(prompt)
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
            read = [model.lm_head(model.model.norm(out.hidden_states[j][0, -1])).double().softmax(-1) for j in layers]
        last = out.logits[0, -1].double().softmax(-1)
        divergences = []
        for other in read:
            middle = (last + other) / 2
            divergences.append(0.5 * ((last * (last / middle).log()).sum() + (other * (other / middle).log()).sum()))
        c = min(max(scale * float(sum(divergences)) / len(divergences) / math.log(2), 0.0), 0.5)
        attention = torch.stack([out.attentions[layer][0, head, -1] for layer, head in heads]).double().mean(0)
        places = [i for i in places if i != len(ids) - 1]
        mixed = (1 - c * float(sum(attention[i] for i in places))) * last
        for i in places:
            mixed[ids[i]] += c * attention[i]
        return mixed.log()

    return logps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 4])
def test_processors_under_greedy_and_beam_search(models, name, width):
    """Tokens and scores of a batch with padding, by caches that follow the beams."""
    make, definition = processors(models)[name]
    ids, mask = padded()
    found = beam_search(models[0], ids, mask, num_beams=width, max_new_tokens=6, logits_processor=[make()])
    if width == 1:  # the scores are then those of the generating model
        for b, prompt in enumerate(PROMPTS):
            (_, tokens), *_ = search_by_hand(definition, prompt, 1, 6)
            assert found.completions[b, 0][found.completion_mask[b, 0]].tolist() == tokens
    else:
        assert_beams(found, definition, width, 6)
    again = beam_search(
        models[0], ids, mask, num_beams=width, max_new_tokens=6, logits_processor=[make(use_cache=False)]
    )
    assert torch.equal(again.sequences, found.sequences)
    assert_within(again.scores, found.scores.double(), 1e-5, "with and without a cache")
    plain = beam_search(models[0], ids, mask, num_beams=width, max_new_tokens=6)
    assert not torch.equal(plain.scores, found.scores)


@pytest.mark.parametrize("name", NAMES)
def test_processors_under_sampling(models, name):
    """Every distribution that generate drew from, at every row and step."""
    make, definition = processors(models)[name]
    ids, mask = padded()
    torch.manual_seed(1)
    out = models[0].generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=2, max_new_tokens=5,
        output_scores=True, return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([make(attention_mask=mask)]),
    )  # fmt: skip
    seen = 0
    for row, sequence in enumerate(out.sequences):
        prompt = PROMPTS[row // 2]
        tokens = sequence[ids.shape[1] :].tolist()
        for t, scores in enumerate(out.scores):
            if END in tokens[:t]:
                break
            assert_within(scores[row], definition(prompt + tokens[:t]), 2e-5, f"row {row}, step {t}")
            assert scores[row].double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
            seen += 1
    assert seen > 15


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_count_tokens_and_not_padding(use_cache):
    """With learned absolute positions, in the search, in the auxiliary models and in the numbers that come with it."""
    base, proxy, reference = (gpt2(seed) for seed in (1, 2, 3))
    ids, mask = padded()
    processor = ProxyTuning(proxy, reference, 1.5, use_cache=use_cache)
    found = beam_search(
        base, ids, mask, reference_model=reference, num_beams=3, max_new_tokens=5, logits_processor=[processor]
    )
    assert_beams(found, tuned(base, proxy, reference, 1.5), 3, 5)
    for b, prompt in enumerate(PROMPTS):
        tokens = found.completions[b, 0][found.completion_mask[b, 0]].tolist()
        for model, name in ((base, "token_logps"), (reference, "reference_token_logps")):
            truth = torch.stack([next_logps(model, prompt + tokens[:t])[a] for t, a in enumerate(tokens)])
            assert_within(getattr(found, name)[b, 0, : len(tokens)], truth, 2e-5, name)


class Counting:
    """How many positions a model was run on."""

    def __init__(self, model):
        self.positions, self.calls = 0, 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.positions += kwargs["input_ids"].numel()
        self.calls += 1


@pytest.mark.parametrize("width", [1, 3])
def test_a_step_is_one_pass_of_the_kernels_over_all_rows(models, width, monkeypatch):
    base, proxy, reference, _ = models
    ids, mask = padded()
    shapes = []

    def counted(logits, *args, **kwargs):
        shapes.append(tuple(logits.shape))
        return token_stats(logits, *args, **kwargs)

    monkeypatch.setattr("qkernels.decoding.auxiliary.token_stats", counted)
    base.generate(
        input_ids=ids, attention_mask=mask, num_beams=width, max_new_tokens=4, do_sample=False, eos_token_id=-1,
        logits_processor=LogitsProcessorList([ProxyTuning(proxy, reference, attention_mask=mask)]),
    )  # fmt: skip
    assert shapes == [(len(ids) * width, 13)] * 4


def test_the_cache_saves_the_prefix(models):
    """One pass over each prompt, not over each beam of it, and one position per beam and step."""
    base, proxy, reference, _ = models
    ids, mask = padded()
    counts = {}
    for use_cache in (True, False):
        counting = Counting(proxy)
        processor = ProxyTuning(proxy, reference, use_cache=use_cache)
        beam_search(base, ids, mask, num_beams=4, max_new_tokens=6, logits_processor=[processor], eos_token_id=-1)
        counting.handle.remove()
        counts[use_cache] = counting.positions
    assert counts[True] == 3 * 5 + 5 * 12
    assert counts[False] > 4 * counts[True]


def test_a_processor_serves_one_prompt_after_another(models):
    """Its cache must not outlive the rows it belongs to: other prompts, longer by one token, in other numbers."""
    base, proxy, reference, _ = models
    processor = ProxyTuning(proxy, reference, 1.5)
    definition = tuned(base, proxy, reference, 1.5)
    for prompts in ([[5, 2]], [[5, 2, 4]], [[7, 2, 4], [7, 2, 4]], [[9, 9, 3, 1], [5, 2]]):
        ids, mask = padded(prompts)
        found = beam_search(base, ids, mask, num_beams=3, max_new_tokens=4, logits_processor=[processor])
        assert_beams(found, definition, 3, 4, prompts)
    processor.reset()
    assert processor._numerator._cache is None
    with torch.no_grad():  # beam_search says that a new prompt begins, so no cache of other weights is left
        proxy = llama(2)
        processor = ProxyTuning(proxy, reference, 1.5)
        ids, mask = padded([[5, 2, 4]])
        whole = beam_search(base, ids, mask, num_beams=1, max_new_tokens=2, logits_processor=[processor])
        proxy.lm_head.weight.mul_(-1.0)
        proxy.model.embed_tokens.weight.mul_(-1.0)
        longer = whole.sequences[0]
        found = beam_search(base, longer, num_beams=3, max_new_tokens=3, logits_processor=[processor])
    assert_beams(found, tuned(base, proxy, reference, 1.5), 3, 3, longer.tolist())


def test_equal_ids_with_other_padding_are_other_rows(models):
    """A pad token that is also a word: rows that differ only in what is padding have caches of their own."""
    base, proxy, reference, _ = models
    ids = torch.tensor([[PAD, 4, 5], [PAD, 4, 5]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    processor = ProxyTuning(proxy, reference)
    found = beam_search(base, ids, mask, num_beams=3, max_new_tokens=4, logits_processor=[processor])
    for row, prompt in enumerate([[4, 5], [PAD, 4, 5]]):
        truth = search_by_hand(tuned(base, proxy, reference, 1.0), prompt, 3, 4)
        assert_within(found.scores[row], torch.tensor([s for s, _ in truth]), 2e-5, "scores")


def test_padding_is_found_by_the_pad_token(models):
    """Without a mask, leading pad tokens are padding; where they could be text, it is an error."""
    base, proxy, reference, _ = models
    ids, mask = padded()
    shared = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    told, found = (
        base.generate(input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([processor]), **shared)
        for processor in (ProxyTuning(proxy, reference, attention_mask=mask), ProxyTuning(proxy, reference))
    )
    assert torch.equal(told, found)
    unclear = llama(2, end=PAD)
    with pytest.raises(ValueError, match="pads as well as begins or ends"):
        ProxyTuning(unclear, reference)(ids, torch.zeros(3, 13))
    assert ProxyTuning(unclear, reference)(ids[:1], torch.zeros(1, 13)).isfinite().all()
    with pytest.raises(ValueError, match="another batch"):
        ProxyTuning(proxy, reference, attention_mask=mask)(ids[:2], torch.zeros(2, 13))


def test_what_is_forbidden_stays_forbidden(models):
    """By the base or a processor before: never revived, also where the proxy forbids it too; by the proxy: forbidden;
    by the reference alone: no reward."""
    _, proxy, reference, _ = models
    ids = torch.tensor([[5, 2]])
    scores = torch.zeros(1, 13)
    scores[0, 3] = -torch.inf

    def forbid(model, tokens):
        copy = llama({id(proxy): 2, id(reference): 3}[id(model)])
        copy.register_forward_hook(lambda m, a, out: (out.logits.__setitem__((..., tokens), -torch.inf), out)[1])
        return copy

    plain = ProxyTuning(proxy, reference)(ids, scores)
    assert plain[0, 3] == -torch.inf and plain.isfinite().sum() == 12
    both = ProxyTuning(forbid(proxy, [3, 4]), forbid(reference, [4, 5]))(ids, scores)
    assert both[0, 3] == -torch.inf
    expected = plain[0].exp()
    ratio = next_logps(proxy, [5, 2]) - next_logps(reference, [5, 2])
    weights = ratio.exp()
    weights[3], weights[4], weights[5] = 0, 1, 1
    assert_within(plain[0, 6:], (ratio - torch.logsumexp(ratio[torch.arange(13) != 3], 0))[6:], 1e-5, "plain")
    shared = both[0, 4] - both[0, 5]
    assert shared.item() == pytest.approx(0.0, abs=1e-6), "no reward where the reference forbids"
    assert expected.sum().item() == pytest.approx(1.0, abs=1e-5)
    copied = CopyMixture(models[0])(ids, scores)
    assert copied[0, 3] == -torch.inf and copied[0].exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_plausibility_and_shared_vocabulary(models):
    base, proxy, reference, _ = models
    ids = torch.tensor([[5, 2, 8]])
    scores = next_logps(base, [5, 2, 8]).float()[None]
    out = ProxyTuning(proxy, reference, 2.0, plausibility=0.2)(ids, scores)
    likely = scores[0] >= scores[0].max() + torch.log(torch.tensor(0.2))
    assert torch.equal(out[0].isfinite(), likely) and 1 <= likely.sum() < 13
    whole = (scores[0].double() + 2 * (next_logps(proxy, [5, 2, 8]) - next_logps(reference, [5, 2, 8])))[likely]
    assert_within(out[0][likely], whole.log_softmax(0), 1e-5, "plausible tokens")

    wide = llama(1, vocab=16)
    wide_scores = next_logps(wide, [5, 2, 8]).float()[None]
    with pytest.raises(ValueError, match="shared_vocab"):
        ProxyTuning(proxy, reference)(ids, wide_scores)
    out = ProxyTuning(proxy, reference, shared_vocab=12)(ids, wide_scores)
    assert bool((out[0, 12:] == -torch.inf).all())
    truth = wide_scores[0, :12].double() + (next_logps(proxy, [5, 2, 8]) - next_logps(reference, [5, 2, 8]))[:12]
    assert_within(out[0, :12], truth.log_softmax(0), 1e-5, "shared tokens")
    with pytest.raises(ValueError, match=r"shared_vocab must lie in \[1, 13\]"):
        ProxyTuning(proxy, reference, shared_vocab=14)(ids, wide_scores)


def test_an_adapter_can_be_its_own_reference(models):
    """The part of PEFT's interface that is used: disable_adapter()."""
    base, proxy, _, _ = models

    class Adapted(type(proxy)):
        @contextlib.contextmanager
        def disable_adapter(self):
            kept = self.lm_head.weight.data
            self.lm_head.weight.data = self.original
            yield
            self.lm_head.weight.data = kept

    adapted = llama(2)
    adapted.__class__ = Adapted
    adapted.original = adapted.lm_head.weight.data.clone()
    adapted.lm_head.weight.data += 0.3 * torch.randn(13, 16, generator=generator(1))
    ids, mask = padded()
    processor = ProxyTuning(adapted, adapted, 1.2, adapter_off=True)
    found = beam_search(base, ids, mask, num_beams=3, max_new_tokens=4, logits_processor=[processor])
    assert_beams(found, tuned(base, adapted, proxy, 1.2), 3, 4)


def test_copying_from_a_given_source(models):
    """source_mask and layers, against the definition; the copy probability is shown."""
    model = models[0]
    ids, mask = padded()
    source = torch.zeros_like(ids, dtype=torch.bool)
    source[:, -2:] = True
    processor = CopyMixture(model, source, scale=0.8, layers=[0, 1])
    found = beam_search(model, ids, mask, num_beams=3, max_new_tokens=4, logits_processor=[processor])
    definition = copying(model, 0.8, (0, 1), lambda prompt: [len(prompt) - 2, len(prompt) - 1])
    assert_beams(found, definition, 3, 4)
    assert processor.copy_probabilities.shape == (9,)
    assert bool(((processor.copy_probabilities > 0) & (processor.copy_probabilities <= 0.5)).all())
    assert len(set(processor.copy_probabilities.tolist())) > 3
    nothing = CopyMixture(model, torch.zeros_like(source), attention_mask=mask)
    scores = torch.randn(3, 13, generator=generator(1))
    assert_within(nothing(ids, scores), scores.double().log_softmax(-1), 1e-6, "nothing to copy")


class Only:
    """Leaves one token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, torch.tensor([self.token]), scores[:, [self.token]])


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_beams_that_do_not_exist_are_none_under_a_length_penalty(models, penalty):
    options = {"num_beams": 3, "max_new_tokens": 16, "length_penalty": penalty, "logits_processor": [Only(5)]}
    found = beam_search(models[0], torch.tensor([[2, 3, 4]]), eos_token_id=None, **options)
    assert found.lengths.tolist() == [[16, 0, 0]] and found.scores.isinf().tolist() == [[False, True, True]]


def test_groups_of_prompts_have_their_own_source(models):
    """best_of generates for some prompts at a time; the mask is of all of them."""
    ids = torch.randint(2, 13, (4, 6), generator=generator(3))
    source = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(4):
        source[row, row : row + 2] = True

    class Greedy:
        def __call__(self, ids, scores):
            return torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0).log()

    def texts(batch_size):
        copying = CopyMixture(models[0], source, normalise=True, scale=100.0, cap=1.0)
        options = {"n": 3, "max_new_tokens": 5, "batch_size": batch_size, "logits_processor": [copying, Greedy()]}
        return best_of(models[0], None, ids, **options).sequences

    whole = texts(12)
    assert all(len(set(map(tuple, samples.tolist()))) == 1 for samples in whole)
    for batch_size in (6, 3, 2):
        assert torch.equal(texts(batch_size), whole)
    with pytest.raises(ValueError, match="source_mask has 3 rows"):
        best_of(models[0], None, ids, n=1, max_new_tokens=1, batch_size=1,
                logits_processor=[CopyMixture(models[0], source[:3])])  # fmt: skip


@pytest.mark.parametrize("option", [{"min_p": 0.9}, {"typical_p": 0.01}, {"epsilon_cutoff": 0.3}])
def test_a_models_own_truncation_is_off(models, option):
    model, ids = models[0], torch.tensor([[2, 3, 4]])
    own = model.generation_config
    found = []
    for changed in ({}, option):
        model.generation_config = type(own)(**{**own.to_diff_dict(), **changed})
        try:
            torch.manual_seed(0)
            found.append(best_of(model, None, ids, n=16, max_new_tokens=2).sequences)
        finally:
            model.generation_config = own
    assert torch.equal(*found)


def test_what_would_change_the_scanned_distribution_is_refused(models):
    arguments = (models[0], models[1], torch.tensor([[2, 3, 4]]))
    for option in ({"temperature": 0.3}, {"top_k": 5}, {"min_p": 0.1}, {"logits_processor": [Only(5)]}):
        with pytest.raises(ValueError, match=f"which these would change: {next(iter(option))}"):
            scan_beta(*arguments, strengths=(1.0,), n=2, max_new_tokens=2, **option)
    scan_beta(*arguments, strengths=(1.0,), n=2, max_new_tokens=2, temperature=1.0)
    with pytest.raises(TypeError, match="strengths must be a sequence"):
        scan_beta(*arguments, strengths=0.5, n=2, max_new_tokens=2)


def test_no_end_token_means_none(models):
    """`generate` goes on then, past the model's own."""
    model, ids = models[0], torch.tensor([[2, 3, 4]])
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = 5
    try:
        found = best_of(model, None, ids, n=2, max_new_tokens=6, eos_token_id=None, logits_processor=[Only(5)])
    finally:
        model.generation_config.eos_token_id = own
    assert found.lengths.tolist() == [[6, 6]] and not found.finished.any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_a_last_hidden_state_that_is_not_what_the_head_reads(models, monkeypatch, size):
    """Refused whatever the size of the logits; an error as of a GEMM in bf16 is not."""
    real = Watch.try_out
    moved = {"by": 0.0}

    def try_out(self, model):
        hidden, logits = real(self, model)
        return hidden * size, logits * size + moved["by"] * size * logits.abs().max()

    monkeypatch.setattr(Watch, "try_out", try_out)
    for accepted in (0.0, 0.01):
        moved["by"] = accepted
        CopyMixture(models[0])
    moved["by"] = 0.05
    with pytest.raises(ValueError, match="does not give its logits by the head alone"):
        CopyMixture(models[0])


def test_errors(models):
    base, proxy, reference, _ = models
    ids, mask = padded()
    for arguments, error, message in (
        ({"input_ids": ids.int()}, TypeError, "input_ids must be int64"),
        ({"input_ids": ids[0]}, ValueError, r"input_ids must have shape \[B, P\]"),
        ({"attention_mask": mask[:, 1:]}, ValueError, "must have the shape of input_ids"),
        ({"attention_mask": mask.flip(1)}, ValueError, "padded on the left"),
        ({"beta": 0.0}, ValueError, "beta must be finite"),
        ({"num_beams": 0}, ValueError, "num_beams must be 1 or more"),
        ({"logits_processor": torch.relu}, TypeError, "logits_processor must be a list of processors"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an int"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "has no generate"),
        ({"output_scores": True}, ValueError, "output_scores is beam_search's own"),
        ({"reference_model": llama(3).train()}, ValueError, "reference_model is in training mode"),
    ):
        with pytest.raises(error, match=message):
            beam_search(**{"model": base, "input_ids": ids, "attention_mask": mask, **arguments})
    completion = mask[:, 1:].bool()
    for arguments, message in (
        ({"sequences": ids[0]}, r"sequences must be int64 \[S, L\]"),
        ({"attention_mask": mask[:, 1:]}, "attention_mask must have the shape of sequences"),
        ({"completion_mask": mask.bool()}, "completion_mask must have shape"),
        ({"completion_mask": completion[1:]}, "completion_mask must have shape"),
    ):
        given = {"sequences": ids, "attention_mask": mask, "completion_mask": completion, **arguments}
        with pytest.raises(ValueError, match=message):
            score_completions(base, **given)
    scores = torch.zeros(1, 13)
    for make, error, message in (
        (lambda: ProxyTuning("proxy", reference), TypeError, r"proxy must be a torch\.nn\.Module"),
        (lambda: ProxyTuning(proxy, reference, float("nan")), ValueError, "gamma must be finite"),
        (lambda: ProxyTuning(proxy, reference, True), TypeError, "gamma must be a number"),
        (lambda: ProxyTuning(proxy, reference, adapter_off=True), ValueError, "no PEFT model"),
        (lambda: ProxyTuning(proxy, reference, plausibility=1.5), ValueError, "plausibility must lie"),
        (lambda: ProxyTuning(proxy, reference, shared_vocab=2.0), TypeError, "shared_vocab must be an int"),
        (lambda: ProxyTuning(proxy, reference, attention_mask=mask.flip(1)), ValueError, "padded on the left"),
        (lambda: ImplicitRewardGuidance(weight=1.0), ValueError, "give a policy, a reference or both"),
        (lambda: ImplicitRewardGuidance(proxy, weight=1.0, adapter_off=True), ValueError, "there is none"),
        (lambda: CopyMixture(base, scale=-1.0), ValueError, "scale must be 0 or more"),
        (lambda: CopyMixture(base, layers=[2]), ValueError, "layers must name some of 0 to 1"),
        (lambda: CopyMixture(base, torch.ones(2, 3)), ValueError, "source_mask must be bool"),
        (lambda: ProxyTuning(llama(5).train(), reference)(ids[:1], scores), ValueError, "proxy is in training mode"),
        (lambda: CopyMixture(llama(1, attn_implementation="sdpa")), ValueError, "attn_implementation='eager'"),
        (
            lambda: CopyMixture(llama(1, attn_implementation="sdpa"), preset="largepig"),
            ValueError,
            "attn_implementation='eager'",
        ),
        (lambda: CopyMixture(llama(1).train()), ValueError, "model is in training mode"),
        (lambda: CopyMixture(base, preset="best"), ValueError, "preset must be one of 'calibrated', 'largepig'"),
        (lambda: CopyMixture(base, cap=1.5), ValueError, "cap must lie in"),
        (lambda: CopyMixture(base, heads=0), ValueError, "heads must be 1 or more"),
        (lambda: CopyMixture(base, heads=5), ValueError, "heads must be at most the 4 heads"),
        (lambda: CopyMixture(base, heads=[(2, 0)]), ValueError, "heads must be pairs of a layer below 2"),
        (lambda: CopyMixture(base, mask.bool())(ids[:2], scores.expand(2, -1)), ValueError, "another batch"),
    ):
        with pytest.raises(error, match=message):
            make()
