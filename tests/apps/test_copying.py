"""The copy mixture by the formulas of LargePiG's authors, what it takes from `generate`, and texts under processors."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from transformers import LogitsProcessorList, TemperatureLogitsWarper

import tiny_models
from assertions import assert_within
from cases import generator
from qkernels.decoding import CopyMixture, ProxyTuning, mark_source
from qkernels.decoding.auxiliary import Auxiliary, last_attention
from qkernels.decoding.inside import _Hook, copying_heads
from qkernels.search import score_completions
from toy_models import END, PAD, gpt2, llama, next_logps

PROMPT = [5, 2, 9, 4, 7, 1, 3]
SMALL = 0.3  # a scale at which the divergences of these random models stay below the cap


def authors(model, ids: Tensor, prompt: int, span: tuple[int, int], scale: float, normalised: bool) -> Tensor:
    """The authors' mixture at the last token of one sequence, `[V]`, in float64.

    (1 - c) softmax(z_N) + c * pointer, with c = clamp(scale * max_j (K(z_N) + K(z_j)) / 2, 0, 1/2), K(z) the mean over
    the vocabulary of M log(M / softmax(z)), M the mean of softmax(z_N) and softmax(z_j), z_j the head on the raw hidden
    state of the layers that are even and not in the lower half; the pointer is the last layer's attention of the last
    token, mean over heads, over the span, without pad, begin and end tokens, added up by id.
    """
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        out = model(input_ids=ids[None], output_hidden_states=True, output_attentions=True)
    last = out.logits[0, -1]
    layers = range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers)
    divergences = []
    for layer in (layer for layer in layers if layer % 2 == 0):
        early = model.lm_head(out.hidden_states[layer][0, -1])
        middle = 0.5 * (last.softmax(0) + early.softmax(0))
        kl = [(middle * (middle.log() - z.log_softmax(0))).mean() for z in (last, early)]
        divergences.append(0.5 * sum(kl))
    c = (scale * torch.stack(divergences).max()).clamp(0, 0.5)
    places = torch.arange(*span)
    config = model.config
    marks = [i for i in (config.pad_token_id, config.bos_token_id, config.eos_token_id) if i is not None]
    pointer = out.attentions[-1][0, :, -1].mean(0)[places] * ~torch.isin(ids[places], torch.tensor(marks))
    if normalised:
        pointer = pointer + 1e-7
        pointer = pointer / pointer.sum()
    copied = torch.zeros_like(last).scatter_add_(0, ids[places], pointer)
    assert prompt <= len(ids)
    return (1 - c) * last.softmax(0) + c * copied


def distributions(model, prompt: Tensor, processor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """What a processor made of each step of a greedy `generate`: ids so far, and its scores."""
    seen = []

    def noted(ids: Tensor, scores: Tensor) -> Tensor:
        scores = processor(ids, scores)
        seen.append((ids[0].clone(), scores[0].clone()))
        return scores

    model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=steps,
        min_new_tokens=0, logits_processor=LogitsProcessorList([noted]),
    )  # fmt: skip
    return seen


@pytest.mark.nightly_cases(layers=(4,), normalised=(True,))
@pytest.mark.nightly_cases(layers=(6,), normalised=(False,))
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("layers", [4, 6])
@pytest.mark.parametrize("span", [None, (1, 6)])
def test_the_preset_is_the_authors_rule(layers, normalised, span):
    """Over the steps of a generation; the scale leaves c below its cap in half of the cases."""
    model = llama(layers, vocab=40, layers=layers, end=None)
    model.config.eos_token_id = END  # a mark in the prompt that ends nothing
    prompt = torch.tensor([PROMPT])
    mask = None
    if span is not None:
        mask = torch.zeros_like(prompt, dtype=torch.bool)
        mask[:, span[0] : span[1]] = True
    for scale in (SMALL, 100.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the span covers a mark
            processor = CopyMixture(model, mask, preset="largepig", scale=scale, normalise=normalised)
            seen = distributions(model, prompt, processor, 5)
        assert len(seen) == 5
        for ids, scores in seen:
            truth = authors(model, ids, len(PROMPT), span or (0, len(PROMPT)), scale, normalised)
            assert_within(scores.exp(), truth, 1e-5, "the mixture")
        if scale == SMALL:
            assert bool((processor.copy_probabilities < 0.5).all())
    assert CopyMixture(model, preset="largepig").scale == 100 and CopyMixture(model, preset="largepig").cap == 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_the_preset_is_the_authors_rule_on_real_models(name):
    """QKERNELS_MODELS is a folder with pretrained models under these names."""
    folder = os.path.join(os.environ.get("QKERNELS_MODELS", ""), name)
    if not os.environ.get("QKERNELS_MODELS") or not os.path.isdir(folder):
        pytest.skip("QKERNELS_MODELS names no folder with this model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Ottoline Varga founded the bakery. It was founded by", return_tensors="pt")["input_ids"]
    for normalised in (False, True):
        processor = CopyMixture(model, preset="largepig", normalise=normalised)
        for ids, scores in distributions(model, prompt, processor, 4):
            truth = authors(model, ids, prompt.shape[1], (0, prompt.shape[1]), 100.0, normalised)
            assert_within(scores.exp(), truth, 1e-5, "the mixture")


def test_a_rule_that_is_one_percent_off_is_seen(monkeypatch):
    model = llama(2, vocab=40, layers=4, end=None)
    prompt = torch.tensor([PROMPT])
    plain = CopyMixture._divergence
    monkeypatch.setattr(CopyMixture, "_divergence", lambda self, step: 1.01 * plain(self, step))
    ((ids, scores),) = distributions(model, prompt, CopyMixture(model, preset="largepig", scale=SMALL), 1)
    truth = authors(model, ids, len(PROMPT), (0, len(PROMPT)), SMALL, False)
    with pytest.raises(AssertionError):
        assert_within(scores.exp(), truth, 1e-5, "the mixture")


# --- from the inside of generate's own forward ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("preset", ["calibrated", "largepig"])
def test_no_forward_is_added(make, preset):
    """As many passes as plain `generate`, with beams, and the results of a processor that runs the model itself."""
    model = make(1)
    ids = torch.tensor([[5, 2, 9, 4, 7], [PAD, PAD, PAD, 3, 8]])
    mask = (ids != PAD).long()
    shared = {"attention_mask": mask, "do_sample": False, "num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4}
    processor = CopyMixture(model, preset=preset, attention_mask=mask)
    alone = CopyMixture(model, preset=preset, attention_mask=mask)
    alone._watch.take = lambda *_: None
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = []
    for each in (processor, alone):
        calls.clear()
        outputs.append(model.generate(input_ids=ids, logits_processor=LogitsProcessorList([each]), **shared))
        assert len(calls) == (4 if each is processor else 8)
    handle.remove()
    assert torch.equal(*outputs)
    assert_within(processor.copy_probabilities, alone.copy_probabilities.double(), 1e-6, "copy probabilities")


def test_what_another_call_left_is_not_taken():
    """A forward of other rows with the same last token and length, then the processor by hand."""
    model = llama(1)
    processor = CopyMixture(model)
    ids, other = torch.tensor([[5, 2, 9]]), torch.tensor([[7, 7, 9]])
    scores = next_logps(model, [5, 2, 9]).float()[None]
    fresh = CopyMixture(model)(ids, scores)
    with torch.no_grad():
        model(input_ids=other)
    assert_within(processor(ids, scores), fresh.double(), 1e-6, "the caught rows are others")
    with torch.no_grad():
        model(input_ids=ids)
    assert processor._watch.take(ids, scores) is not None and processor._watch.take(ids, scores) is None
    model(input_ids=ids)  # with gradients: nothing is caught
    assert processor._watch.take(ids, scores) is None


def test_hooks_end_with_the_processor_and_do_not_travel():
    """Into a copy of the model, or a file; transformers leaves hooks of its own."""
    model = llama(1)

    def hooks(module) -> list[_Hook]:
        found = [h for m in module.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        return [hook for hook in found if isinstance(hook, _Hook)]

    processor = CopyMixture(model)
    assert len(hooks(model)) > 2
    twin = copy.deepcopy(model)
    assert hooks(twin) == []
    with torch.no_grad():
        twin(input_ids=torch.tensor([[5, 2, 9]]))
    assert processor._watch._caught is None
    assert pickle.loads(pickle.dumps(hooks(model)[0]))(model, (), {}) is None
    del processor
    gc.collect()
    assert hooks(model) == []


def test_the_heads_that_copy_are_found():
    """A model of which one head looks at what followed, another one half the time."""

    class Made(torch.nn.Linear):
        config = SimpleNamespace(
            vocab_size=2000, bos_token_id=7, is_encoder_decoder=False, get_text_config=lambda: Made.config
        )

        def get_output_embeddings(self):
            return self

        def forward(self, input_ids, attention_mask, output_attentions, return_dict):
            rows, length = input_ids.shape
            assert bool((input_ids[:, 0] == 7).all()) and torch.equal(input_ids[:, 1:25], input_ids[:, 25:])
            attentions = torch.zeros(2, rows, 3, length, length)
            for t in range(25, length - 1):
                attentions[1, :, 2, t, t - 23] = 1.0
                attentions[0, :, 1, t, t - 23] = 0.5
                attentions[0, :, 0, t, t - 24] = 1.0  # the token itself, where it stood before
            return SimpleNamespace(attentions=tuple(attentions))

    auxiliary = Auxiliary(Made(2, 2).eval(), "model", True)
    assert copying_heads(auxiliary, 1) == [(1, 2)]
    assert copying_heads(auxiliary, 2) == [(1, 2), (0, 1)]
    model = llama(1)
    assert CopyMixture(model, heads=2).heads == copying_heads(Auxiliary(model, "model", True), 2)
    assert CopyMixture(model, heads=[(0, 1)]).heads == [(0, 1)]


def test_a_sliding_window_is_aligned_to_the_end():
    weights = torch.rand(2, 3, 4, 5)
    whole = last_attention(weights, 8)
    assert whole.shape == (2, 3, 8) and bool((whole[..., :3] == 0).all())
    assert torch.equal(whole[..., 3:], weights[:, :, -1])


def test_a_mask_over_the_template_warns_once():
    model = llama(1)
    ids, scores = torch.tensor([[END, 2, 9, 4]]), torch.zeros(1, 13)
    processor = CopyMixture(model, torch.ones_like(ids, dtype=torch.bool))
    with pytest.warns(UserWarning, match=r"source_mask covers tokens of the template \(ids \[1\]"):
        covered = processor(ids, scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(ids, scores)
        clean = torch.tensor([[False, True, True, True]])
        assert torch.equal(CopyMixture(model, clean)(ids, scores), covered)
    with pytest.warns(UserWarning, match="source_mask covers"):
        fewer = CopyMixture(model, clean, special_ids=[9])(ids, scores)
    assert fewer[0, 9] < covered[0, 9]


def test_a_source_is_marked():
    tokenizer = tiny_models.tokenizer(["The court sits in Aldersund. Who sits there?"] * 3)
    prompts = ["Text: The court sits in Aldersund. Who?", "Who? In Aldersund"]
    inputs, mask = mark_source(tokenizer, prompts, ["The court sits in Aldersund.", "Aldersund"])
    assert inputs["input_ids"].shape == mask.shape == inputs["attention_mask"].shape
    for row, source in enumerate(("The court sits in Aldersund.", "Aldersund")):
        assert tokenizer.decode(inputs["input_ids"][row][mask[row]]).strip() == source
        assert tokenizer.decode(inputs["input_ids"][row][inputs["attention_mask"][row] != 0]) == prompts[row]
    assert bool((inputs["attention_mask"][:, -1] == 1).all()) and not mask[inputs["attention_mask"] == 0].any()
    for arguments, error, message in (
        (("a", ["a"]), TypeError, "must be sequences of strings"),
        ((["a"], ["a", "b"]), ValueError, "got 1 prompts and 2 sources"),
        ((["a"], ["b"]), ValueError, "prompt 0 does not contain its source 'b'"),
        ((["a"], [""]), ValueError, "prompt 0 does not contain"),
    ):
        with pytest.raises(error, match=message):
            mark_source(tokenizer, *arguments)
    with pytest.raises(ValueError, match="load the fast one"):
        mark_source(SimpleNamespace(is_fast=False), ["a"], ["a"])


# --- given texts under processors -------------------------------------------------------------------------------------


def test_given_texts_under_processors():
    """Per token, against a full forward and the processors' definitions; padding on both sides."""
    base, proxy, reference = llama(1), llama(2), llama(3)
    prompts, completions = [[5, 2, 9], [3, 8]], [[4, 7], [6, 6, 11]]
    ids = torch.tensor([[5, 2, 9, 4, 7, PAD], [PAD, 3, 8, 6, 6, 11]])
    attention = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    scored = torch.tensor([[True, True, False], [True, True, True]])
    shared = {"reference_model": reference, "beta": 0.3}
    plain = score_completions(base, ids, attention, scored, **shared)

    def tuned(tokens: list[int]) -> Tensor:
        logps = next_logps(base, tokens) + 1.5 * (next_logps(proxy, tokens) - next_logps(reference, tokens))
        return (logps.log_softmax(0) / 0.7).log_softmax(0)

    found = score_completions(
        base, ids, attention, scored, batch_size=1, **shared,
        processors=[ProxyTuning(proxy, reference, 1.5), TemperatureLogitsWarper(0.7)],
    )  # fmt: skip
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        truth = [tuned(prompt + completion[:t])[token] for t, token in enumerate(completion)]
        assert_within(found.token_logps[row, : len(completion)], torch.stack(truth), 2e-5, "log-probs")
        assert_within(found.logps[row], torch.stack(truth).sum(), 4e-5, "their sum")
    assert bool((found.token_logps[0, 2:] == 0).all())
    # GEMMs of a batch of another size may sum in another order.
    for name in ("token_values", "token_rewards", "reference_token_logps", "rewards"):
        assert_within(getattr(found, name), getattr(plain, name).double(), 1e-5, name)
    none = score_completions(base, ids, attention, scored, processors=[], **shared)
    assert torch.equal(none.logps, plain.logps)
    same = score_completions(base, ids, attention, scored, processors=[lambda ids, scores: scores], **shared)
    assert_within(same.token_logps, plain.token_logps.double(), 1e-5, "a processor that does nothing")


def test_given_texts_under_a_copy_mixture():
    model = llama(2, vocab=40, layers=4, end=None)
    completion = [9, 4, 30]
    ids = torch.tensor([[*PROMPT, *completion], [*PROMPT, 4, 9, 30]])
    scored = torch.ones(2, 3, dtype=torch.bool)
    processor = CopyMixture(model, preset="largepig", normalise=True, scale=SMALL)
    found = score_completions(model, ids, torch.ones_like(ids), scored, processors=[processor])
    for row in range(2):
        for t in range(3):
            whole = ids[row, : len(PROMPT) + t]
            truth = authors(model, whole, len(PROMPT), (0, len(PROMPT)), SMALL, True)
            assert_within(found.token_logps[row, t], truth[ids[row, len(PROMPT) + t]].log(), 2e-5, "log-prob")


def test_what_cannot_be_scored_under_processors():
    model = llama(1)
    ids = torch.tensor([[5, 2, 9, 4]])
    nothing = [lambda ids, scores: scores]
    scored = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="must not have gaps"):
        score_completions(model, ids, torch.tensor([[1, 1, 0, 1]]), scored, processors=nothing)
    with pytest.raises(ValueError, match="padded on the left"):
        score_completions(model, ids, torch.tensor([[1, 0, 1, 1]]), scored, processors=nothing)
    empty = score_completions(model, ids, torch.ones_like(ids), scored & False, processors=nothing)
    assert bool((empty.token_logps == 0).all())


def test_the_mixture_is_a_distribution_and_copies(capsys):
    """The calibrated rule: sums to 1; only tokens of the source gain; the pointer can be normalised."""
    model = llama(1)
    ids = torch.tensor([[5, 2, 9, 4, 5]])
    scores = torch.randn(1, 13, generator=generator(2))
    base = scores.log_softmax(-1)
    for normalise in (False, True):
        processor = CopyMixture(model, normalise=normalise, cap=1.0, scale=1.0)
        mixed = processor(ids, scores)
        assert mixed.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        gained = set((mixed > base)[0].nonzero()[:, 0].tolist())
        assert gained and gained <= {5, 2, 9, 4}
        c = processor.copy_probabilities[0]
        assert_within(mixed[0, 7], base[0, 7].double() + torch.log1p(-c.double()), 1e-6, "what is not in the source")
