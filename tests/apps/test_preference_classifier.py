"""The Yes/No classifier against its definition, by probabilities of the whole next-token distribution."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import hf_models
from qkernels.demo.tokenizer import train_tokenizer
from qkernels.head import products
from qkernels.preference_classifier import PUBLISHED_TEMPLATES, PreferenceClassifier, yes_no_scores

TEMPLATE = "Q: {prompt} A: {response} Answer with just Yes/No"


def llama(vocabulary: int, seed: int = 0, **options) -> torch.nn.Module:
    return hf_models.model("llama", seed=seed, vocab_size=vocabulary, max_position_embeddings=512, **options)


def by_definition(logits: torch.Tensor, yes: list[int], no: list[int]) -> torch.Tensor:
    p = logits.double().softmax(-1)
    p_yes, p_no = p[..., yes].sum(-1), p[..., no].sum(-1)
    return p_yes / (p_yes + p_no)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("with_bias", "softcap", "logit_scale"),
    [(False, None, 1.0), (True, None, 1.0), (False, 2.0, 1.0), (True, 3.0, 0.25), (False, None, 4.0)],
)
def test_scores_are_the_definition(
    dtype: torch.dtype, with_bias: bool, softcap: float | None, logit_scale: float
) -> None:
    hidden, weight = torch.randn(2, 3, 16).to(dtype), (torch.randn(41, 16) / 2).to(dtype)
    bias = torch.randn(41).to(dtype) if with_bias else None
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    how = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "temperature": 0.8}
    got = yes_no_scores(hidden, weight, [3, 40, 7], [0, 5], **how)
    assert got.shape == (2, 3) and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(got.double(), by_definition(logits / 0.8, [3, 40, 7], [0, 5]), atol=2e-6)


def test_extremes_stay_probabilities() -> None:
    hidden = torch.tensor([[200.0], [-200.0], [0.0]])
    weight = torch.tensor([[1.0], [-1.0], [1e30]])  # the third column is no one's answer
    assert yes_no_scores(hidden, weight, [0], [1]).tolist() == [1.0, 0.0, 0.5]
    assert yes_no_scores(hidden[0], weight, [0], [1]).shape == ()


def test_ids_must_make_sense() -> None:
    hidden, weight = torch.randn(2, 4), torch.randn(9, 4)
    for yes, no, message in (
        ([], [1], "yes_ids must hold at least one"),
        ([1], [], "no_ids must hold at least one"),
        ([1, 1], [2], "yes_ids must not repeat"),
        ([1, 2], [2], r"share an id, both have \[2\]"),
        ([9], [2], r"yes_ids must be in \[0, 9\)"),
        ([1], [-1], r"no_ids must be in \[0, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            yes_no_scores(hidden, weight, yes, no)
    with pytest.raises(TypeError, match="integer"):
        yes_no_scores(hidden, weight, [0.9], [1])
    with pytest.raises(ValueError, match="weight must have shape"):
        yes_no_scores(hidden, weight.T, [1], [2])
    with pytest.raises(TypeError, match="weight must be a"):
        yes_no_scores(hidden, None, [1], [2])
    with pytest.raises(TypeError, match="must be float32"):
        yes_no_scores(hidden.long(), weight, [1], [2])
    with pytest.raises(ValueError, match="temperature"):
        yes_no_scores(hidden, weight, [1], [2], temperature=0.0)


# --- over a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked() -> tuple:
    tokenizer = train_tokenizer(["Answer with just Yes/No", "Yes yes No no", "Tell me about Peru."] * 3, 400)
    return llama(len(tokenizer)), tokenizer


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("chat", [True, False])
def test_a_model_is_asked_and_its_next_token_read(asked: tuple, batch_tokens: int, chat: bool) -> None:
    model, tokenizer = asked
    template, tokenizer.chat_template = tokenizer.chat_template, tokenizer.chat_template if chat else None
    try:
        classifier = PreferenceClassifier(model, tokenizer, template=TEMPLATE, batch_tokens=batch_tokens)
        prompts = ["Tell me about Peru.", "Why?", "{response}", "A much longer question about {prompt} and the world?"]
        responses = ["Lima.", "Because {prompt} is so.", "no", "yes"]
        got = classifier.scores(prompts, responses)
        expected = []
        for prompt, response in zip(prompts, responses, strict=True):
            text = f"Q: {prompt} A: {response} Answer with just Yes/No"
            text = f"<|user|>{text}<|end|><|assistant|>" if chat else text + "\n"
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            expected.append(by_definition(logits, classifier.yes_ids, classifier.no_ids))
    finally:
        tokenizer.chat_template = template
    assert torch.allclose(got.double(), torch.stack(expected), atol=2e-6)
    assert got.std() > 1e-5, "the questions must tell apart"
    assert {tokenizer.decode([i]).strip().lower() for i in classifier.yes_ids} == {"yes"}
    assert len(classifier.yes_ids) > 1  # several spellings add up


def test_pairs_are_compared(asked: tuple) -> None:
    classifier = PreferenceClassifier(*asked)
    chosen, rejected = classifier.compare(["Why?", "How?"], ["so", "thus"], ["no", "not thus"])
    assert torch.equal(chosen, classifier.scores(["Why?", "How?"], ["so", "thus"]))
    assert torch.equal(rejected, classifier.scores(["Why?", "How?"], ["no", "not thus"]))
    assert classifier.template.rstrip().endswith("answer with just Yes/No")
    assert classifier.scores([], []).shape == (0,)


def test_the_head_is_never_run_on_the_vocabulary(asked: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = asked
    classifier = PreferenceClassifier(model, tokenizer)
    shapes = []
    real = products.multiply

    def multiply(name: str, left: torch.Tensor, right: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        shapes.append(right.shape[1])
        return real(name, left, right, *more)

    monkeypatch.setattr(products, "multiply", multiply)
    classifier.scores(["Why?"], ["so"])
    assert shapes == [len(classifier.yes_ids) + len(classifier.no_ids)]


def test_what_cannot_be_asked(asked: tuple) -> None:
    model, tokenizer = asked
    with pytest.raises(ValueError, match=r"template must contain \{response\}"):
        PreferenceClassifier(model, tokenizer, template="{prompt}?")
    with pytest.raises(ValueError, match="no: none of 'Absolutely not' is a single token"):
        PreferenceClassifier(model, tokenizer, no=["Absolutely not"])
    with pytest.raises(TypeError, match="yes must be a sequence of spellings"):
        PreferenceClassifier(model, tokenizer, yes="Yes")
    with pytest.raises(ValueError, match="batch_tokens must be an int of 1 or more, got 0"):
        PreferenceClassifier(model, tokenizer, batch_tokens=0)
    for template, message in (({}, "got no category"), ({"code": "{prompt}"}, r"\{response\} \(of category 'code'\)")):
        with pytest.raises(ValueError, match=message):
            PreferenceClassifier(model, tokenizer, template=template)
    for length, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="max_length must be"):
            PreferenceClassifier(model, tokenizer, max_length=length)
    published = PreferenceClassifier.published(model, tokenizer)
    for category in (None, "law"):
        with pytest.raises(ValueError, match=f"category must be one of 'chat', .* got {category!r}"):
            published.scores(["a"], ["b"], None if category is None else [category])
    with pytest.raises(ValueError, match="categories must be a sequence of 2 names"):
        published.scores(["a", "b"], ["c", "d"], ["chat"])
    classifier = PreferenceClassifier(model, tokenizer)
    with pytest.raises(ValueError, match="got 1 prompts for 2 responses"):
        classifier.scores(["a"], ["b", "c"])
    with pytest.raises(TypeError, match="must be sequences of strings"):
        classifier.scores("a", "b")
    with pytest.raises(ValueError, match=r"question 1 has \d+ tokens, more than the 512"):
        classifier.scores(["a", "b"], ["c", "d" * 2000])


# --- the authors' questions -------------------------------------------------------------------------------------------


def authors_question(tokenizer, asked: str, instruction: str, response: str) -> list[int]:
    """As the authors' code writes and encodes it: an f-string over three lines, cut to 1024 tokens."""
    text = asked + "\n    User : " + instruction + "\n    Response : " + response + "\n    "
    return tokenizer.encode(text, max_length=1024, truncation=True)


def test_the_published_questions_token_for_token(asked: tuple) -> None:
    """No chat template, no newline, the tokenizer's own begin token, cut at 1024; " Yes" and " No" alone count."""
    model, tokenizer = asked
    classifier = PreferenceClassifier.published(model, tokenizer)
    assert tokenizer.chat_template
    assert classifier.yes_ids == tokenizer(" Yes", add_special_tokens=False)["input_ids"]
    assert classifier.no_ids == tokenizer(" No", add_special_tokens=False)["input_ids"]
    starts = {
        "chat": "Below is a question, along",
        "code": "Below is a coding",
        "math": "Below is a math",
        "safety": "Ins",
    }
    assert set(PUBLISHED_TEMPLATES) == set(starts)
    for category, start in starts.items():
        sentence = PUBLISHED_TEMPLATES[category].partition("\n")[0]
        assert sentence.startswith(start) and sentence.rstrip(".").endswith("Yes/No")
        for response in ("Lima {prompt}.", "word " * 900):
            expected = authors_question(tokenizer, sentence, "Capital of Peru?", response)
            assert classifier.question("Capital of Peru?", response, category) == expected
            assert len(expected) <= 1024


def test_the_published_scores(asked: tuple) -> None:
    """The probabilities of " Yes" and " No" in the whole softmax, one question after another."""
    _, tokenizer = asked
    model = llama(len(tokenizer), seed=3)
    classifier = PreferenceClassifier.published(model, tokenizer, batch_tokens=100_000)
    prompts, responses, categories = (
        ["Why?", "How?", "Tell me."],
        ["so", "thus " * 20, "no"],
        ["chat", "math", "safety"],
    )
    expected = []
    for prompt, response, category in zip(prompts, responses, categories, strict=True):
        ids = authors_question(tokenizer, PUBLISHED_TEMPLATES[category].partition("\n")[0], prompt, response)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        expected.append(by_definition(logits, classifier.yes_ids, classifier.no_ids))
    got = classifier.scores(prompts, responses, categories)
    assert torch.allclose(got.double(), torch.stack(expected), atol=2e-6) and got.std() > 1e-5
    better, worse = classifier.compare(prompts, responses, responses[::-1], categories)
    assert torch.equal(better, got) and better[1] == worse[1]


@pytest.mark.nightly
def test_the_published_scores_of_a_real_model() -> None:
    """QKERNELS_MODELS is a folder that holds an instruction-tuned model as `smollm2`."""
    folder = os.path.join(os.environ.get("QKERNELS_MODELS", ""), "smollm2")
    if not os.environ.get("QKERNELS_MODELS") or not os.path.isdir(folder):
        pytest.skip("QKERNELS_MODELS names no folder with this model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt, responses = "What is the capital of Peru?", ["Lima.", "Quito.", "The capital of Peru is Lima.", "Blue."]
    expected = []
    for response in responses:
        ids = authors_question(tokenizer, PUBLISHED_TEMPLATES["chat"].partition("\n")[0], prompt, response)
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        yes, no = (sum(p[i] for i in tokenizer.encode(word, add_special_tokens=False)) for word in (" Yes", " No"))
        expected.append(yes / (yes + no))
    got = PreferenceClassifier.published(model, tokenizer).scores([prompt] * 4, responses, ["chat"] * 4)
    assert torch.allclose(got.double(), torch.stack(expected), atol=1e-5)
    print([round(float(score), 3) for score in got])
