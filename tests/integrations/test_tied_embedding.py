"""The gradient of a tied input embedding in the rows that were read: the same bits, and none as large as the head."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")

import hf_models
from qkernels.integrations.tied_embedding import gradient_of_read_rows


class Dense(TorchDispatchMode):
    """How many rows each gradient of an embedding has."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.rows.append(args[2])
        return func(*args, **(kwargs or {}))


def step(model, *, within, batches=1, **loss):
    """Gradients of a few forwards and one backward, and how many rows gradients of embeddings had."""
    context = gradient_of_read_rows(model) if within else torch.enable_grad()
    with Dense() as seen, context:
        total = sum(model(**hf_models.batch(seed=seed)).logits.float().square().mean() for seed in range(batches))
        total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, seen.rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])  # the latter scales what it reads
def test_gradients_are_the_same_bits(family, dtype):
    model = hf_models.model(family, tie_word_embeddings=True, train=True).to(dtype)
    embedding = model.get_input_embeddings()
    assert embedding.weight is model.get_output_embeddings().weight
    wanted, rows = step(model, within=False)
    assert rows == [hf_models.VOCAB]
    model.zero_grad()
    got, rows = step(model, within=True)
    assert len(rows) == 1 and rows[0] < hf_models.VOCAB
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert "forward" not in vars(embedding) and embedding.weight is model.get_output_embeddings().weight


def test_two_forwards_and_a_gradient_that_is_there():
    model = hf_models.model("qwen2", train=True)
    wanted, _ = step(model, within=False, batches=2)
    got, rows = step(model, within=True, batches=2)  # on top of the first
    assert len(rows) == 2
    for name in wanted:
        torch.testing.assert_close(got[name], 2 * wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("padding", [0, 5, None])
def test_padding_has_no_gradient_of_the_embedding(padding):
    model = hf_models.model("qwen2", train=True)
    embedding = model.get_input_embeddings()
    embedding.padding_idx = padding
    ids = torch.tensor([[5, 6, 5, 7]])
    for within in (False, True):
        model.zero_grad()
        with gradient_of_read_rows(model) if within else torch.enable_grad():
            model(input_ids=ids).logits.square().mean().backward()
        if not within:
            wanted = embedding.weight.grad.clone()
    assert torch.equal(embedding.weight.grad, wanted) and embedding.padding_idx == padding


def test_without_a_gradient_it_is_left_alone():
    model = hf_models.model("qwen2")
    with gradient_of_read_rows(model), torch.no_grad():
        inside = model(**hf_models.batch()).logits
    assert torch.equal(inside, model(**hf_models.batch()).logits) and model.get_input_embeddings().weight.grad is None


def test_an_error_leaves_the_model_as_it_was():
    model = hf_models.model("qwen2", train=True)
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    with pytest.raises(IndexError), gradient_of_read_rows(model):
        model(input_ids=torch.tensor([[hf_models.VOCAB]]))
    assert embedding.weight is weight and "forward" not in vars(embedding) and weight.grad is None


def changed(how):
    model = hf_models.model("qwen2" if how != "not tied" else "llama", train=True)
    embedding = model.get_input_embeddings()
    if how == "frozen":
        embedding.weight.requires_grad_(False)
    elif how == "sparse":
        embedding.sparse = True
    elif how == "hook of the gradient":
        embedding.weight.register_hook(lambda grad: grad)
    elif how == "hook after the gradient":
        embedding.weight.register_post_accumulate_grad_hook(lambda weight: None)
    elif how == "compiled":
        model.compile()
    elif how == "somebody else's":
        embedding.forward = embedding.forward
    return model


@pytest.mark.parametrize(
    "how",
    ["not tied", "frozen", "sparse", "hook of the gradient", "hook after the gradient", "compiled", "somebody else's"],
)
def test_others_are_left_alone(how):
    model = changed(how)
    embedding = model.get_input_embeddings()
    before = vars(embedding).get("forward")
    with gradient_of_read_rows(model):
        assert vars(embedding).get("forward") is before
