"""Causal language models of transformers: log-probs without logits equal those of the model's own logits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qkernels import linear_token_logps, shift_labels, token_logps, token_stats

pytest.importorskip("transformers", reason="transformers is not installed")
import hf_models
from processes import Ranks
from qkernels.functional.results import TokenStats
from qkernels.integrations.transformers import (
    batch_labels,
    compute_token_logps,
    compute_token_stats,
    head_parameters,
    hidden_states,
    requests,
    unwrap,
)
from qkernels.integrations.transformers.hook import hook_of, install, run, uninstall
from qkernels.integrations.transformers.parameters import HiddenAndHead
from qkernels.integrations.transformers.requests import HeadCall, StatsRequest


def from_logits(model, batch, labels=None):
    """Log-probs from the model's own logits."""
    labels = shift_labels(batch["input_ids"], mask=batch.get("attention_mask")) if labels is None else labels
    logits = model(**batch, use_cache=False).logits
    return token_logps(logits[:, -labels.shape[1] :].float(), labels)


def assert_same(ours, other):
    """Of one model, by two GEMMs: torch's, and this package's where it is the faster one. A sum of 32 products in fp32
    may err by 32 * 2^-24 of the sum of their sizes, through two layers; logits are of the order of 5."""
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


def test_a_wrong_batch_and_a_missing_reference_are_told_in_the_callers_words():
    model = hf_models.model("llama")
    ids = torch.tensor([[3, 4, 5]])
    for wrong in (ids, "text", [ids]):
        with pytest.raises(TypeError, match=f"batch must be a mapping .* got {type(wrong).__name__}"):
            compute_token_logps(model, wrong)
    with pytest.raises(ValueError, match="need reference_model"):
        compute_token_stats(model, {"input_ids": ids}, outputs=("reference_logps",))
    with pytest.raises(ValueError, match="reference_model given, but none of the outputs"):
        compute_token_stats(model, {"input_ids": ids}, reference_model=model)


def gradients(values, model):
    """Of a weighted sum, for every parameter."""
    weights = torch.linspace(-1, 2, values.numel()).view(values.shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad((values * weights).sum(), parameters, allow_unused=True)


def check(model, batch=None, tolerance=1e-5):
    """Values and gradients of `compute_token_logps` against the model's own logits."""
    batch = hf_models.batch() if batch is None else batch
    torch.manual_seed(1)  # dropout
    got = compute_token_logps(model, batch)
    torch.manual_seed(1)
    expected = from_logits(model, batch)
    assert got.dtype == torch.float32 and got.shape == batch["input_ids"].shape
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(gradients(got, model), gradients(expected, model), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one / scale, other / scale, atol=10 * tolerance, rtol=0)
    assert "forward" not in unwrap(model).__dict__ or hook_of(unwrap(model)).installed


# --- families ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", hf_models.FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_family(family):
    try:
        model = hf_models.model(family)
    except (ValueError, KeyError, ImportError) as reason:
        pytest.skip(f"this transformers has no {family}: {reason}")
    batch = hf_models.batch()
    check(model, batch)
    hidden, head = hidden_states(model, **batch), head_parameters(model)
    labels = shift_labels(batch["input_ids"], mask=batch["attention_mask"])
    got = linear_token_logps(
        hidden, head.weight, labels, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    torch.testing.assert_close(got, from_logits(model, batch), atol=1e-5, rtol=1e-5)


def test_parameters_of_known_heads():
    assert head_parameters(hf_models.model("gemma2")).softcap == 5.0
    assert head_parameters(hf_models.model("gemma3")).softcap is None  # it has the entry, and does not apply it
    assert head_parameters(hf_models.model("cohere")).logit_scale == 0.25
    assert head_parameters(hf_models.model("granite")).logit_scale == pytest.approx(1 / 3)
    model = hf_models.model("phi")
    head = head_parameters(model)
    assert head.weight is model.lm_head.weight and head.bias is model.lm_head.bias
    tied = hf_models.model("gpt2")
    assert head_parameters(tied).weight is tied.transformer.wte.weight


# --- batches -------------------------------------------------------------------------------------------------------


def test_batch_of_one_and_one_token():
    model = hf_models.model()
    check(model, hf_models.batch(1))
    assert torch.equal(compute_token_logps(model, hf_models.batch(1, 1)), torch.zeros(1, 1))


def test_left_padding_scores_only_tokens_after_tokens():
    model = hf_models.model()
    right = hf_models.batch(1, 8)
    left = {name: nn.functional.pad(value, (3, 0)) for name, value in right.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    got = compute_token_logps(model, left)
    assert torch.equal(got[:, :3], torch.zeros(1, 3))
    torch.testing.assert_close(got[:, 3:], compute_token_logps(model, right), atol=1e-5, rtol=1e-5)
    del left["position_ids"]  # the mask alone says it too
    assert (batch_labels(left) != -100).tolist() == [[False] * 3 + [True] * 7 + [False]]


def test_packed_row_equals_its_sequences():
    model = hf_models.model()
    parts = [hf_models.batch(1, length, seed=length)["input_ids"] for length in (5, 1, 7)]
    packed = {
        "input_ids": torch.cat(parts, 1),
        "position_ids": torch.cat([torch.arange(part.shape[1]) for part in parts]).unsqueeze(0),
    }
    expected = torch.cat([compute_token_logps(model, {"input_ids": part}) for part in parts], 1)
    torch.testing.assert_close(compute_token_logps(model, packed), expected, atol=1e-5, rtol=1e-5)
    ends = {"cu_seq_lens_q": torch.tensor([0, 5, 6, 13], dtype=torch.int32)}
    by_ends = batch_labels({**packed, **ends, "labels": packed["input_ids"]})
    assert torch.equal(by_ends, batch_labels(packed))


def test_what_is_scored():
    batch = hf_models.batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    completion = torch.zeros_like(ids)
    completion[:, 5:] = 1
    by_mask = batch_labels({**batch, "completion_mask": completion})
    assert torch.equal(by_mask, shift_labels(ids, mask=completion * mask))
    labels = ids.masked_fill(completion == 0, -100)
    assert torch.equal(batch_labels({**batch, "labels": labels}), shift_labels(labels))
    assert torch.equal(batch_labels(batch, labels), shift_labels(labels))
    got = compute_token_logps(hf_models.model(), {**batch, "labels": labels})
    assert torch.equal(got != 0, shift_labels(labels) != -100)
    with pytest.raises(ValueError, match="neither labels nor input_ids"):
        batch_labels({"inputs_embeds": torch.zeros(1, 2, 3)})
    with pytest.raises(ValueError, match="completion_mask must have the shape"):
        batch_labels({**batch, "completion_mask": completion[:, 1:]})
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        batch_labels({"labels": ids[0]})


def test_statistics_and_reference():
    policy, reference = hf_models.model("gemma2"), hf_models.model("gemma2", seed=1)
    batch, names = hf_models.batch(), ("logps", "entropy", "kl_reference_policy", "kl_policy_reference", "is_top1")
    labels = shift_labels(batch["input_ids"], mask=batch["attention_mask"])
    got = compute_token_stats(policy, batch, outputs=names, reference_model=reference, temperature=0.7)
    expected = token_stats(
        policy(**batch).logits, labels, reference_logits=reference(**batch).logits, outputs=names, temperature=0.7
    )
    for name in names:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-5, rtol=1e-5)
    assert got.logsumexp is None and got.kl_reference_policy.requires_grad
    with pytest.raises(ValueError, match="no PEFT adapter to switch off"):
        compute_token_stats(policy, batch, outputs=names, reference_model=policy)
    with pytest.raises(ValueError, match="shape its logits as model does"):
        compute_token_stats(policy, batch, outputs=names, reference_model=hf_models.model())


# --- how the model runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, plain, batch = hf_models.model(train=True), hf_models.model(train=True), hf_models.batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    compute_token_logps(model, batch).sum().backward()
    from_logits(plain, batch).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_dropout_is_the_model_s_own():
    check(hf_models.model("gpt2", train=True))


def test_autocast_and_bf16():
    model, batch = hf_models.model(), hf_models.batch()
    exact = compute_token_logps(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = compute_token_logps(model, batch)
        hidden = hidden_states(model, **batch)
        head = head_parameters(model)
        outside = linear_token_logps(
            hidden, head.weight, shift_labels(batch["input_ids"], mask=batch["attention_mask"])
        )
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, atol=0.2, rtol=0)
    torch.testing.assert_close(outside, mixed, atol=1e-5, rtol=1e-5)
    mixed.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    half = hf_models.model().bfloat16()
    got = compute_token_logps(half, batch)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, atol=0.3, rtol=0)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_logits_are_never_stored():
    model = hf_models.model(vocab_size=5003, tie_word_embeddings=True)
    batch = hf_models.batch(2, 40)
    with _Largest() as seen:
        compute_token_logps(model, batch, max_chunk_bytes=8 * 5003 * 4).sum().backward()
    weight = model.lm_head.weight.numel()
    assert seen.largest <= weight < 2 * 40 * 5003 / 2
    with _Largest() as seen:
        from_logits(model, batch)
    assert seen.largest >= 2 * 40 * 5003  # the check can fail


def test_evaluation_needs_no_graph():
    model = hf_models.model()
    with torch.no_grad():
        assert not compute_token_logps(model, hf_models.batch()).requires_grad
    with torch.inference_mode():
        compute_token_logps(model, hf_models.batch())


@pytest.mark.nightly  # a snippet of docs/integrations.md compiles one, too
@pytest.mark.filterwarnings("ignore")
def test_compiled_model():
    model, counters = hf_models.model(num_hidden_layers=1), torch._dynamo.utils.counters
    compiled = torch.compile(model, backend="eager")  # Dynamo's graphs; of the operations in them see test_ops.py
    counters.clear()
    for rows, length in ((3, 12), (3, 10), (3, 9)):
        batch = hf_models.batch(rows, length)
        got = compute_token_logps(compiled, batch)
        expected = compute_token_logps(model, batch)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients(got, model), gradients(expected, model), atol=1e-4, rtol=1e-4)
    assert not counters["graph_break"]
    assert counters["frames"]["total"] <= 2  # one for the first length, one for any


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_ddp_synchronises_the_head(unused, tmp_path):
    """Through DDP's own forward, with the head's weight used inside and outside of it."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch has no distributed package")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, batch = hf_models.model(train=True), hf_models.batch()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        assert unwrap(wrapped) is model
        labels = shift_labels(batch["input_ids"], mask=batch["attention_mask"])
        from_logits(model, batch).sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        for step in (
            lambda: compute_token_logps(wrapped, batch),
            lambda: linear_token_logps(hidden_states(wrapped, **batch), head_parameters(wrapped).weight, labels),
        ):
            for _ in range(2):
                model.zero_grad()
                step().sum().backward()
                for p, g in zip(model.parameters(), expected, strict=True):
                    torch.testing.assert_close(p.grad, g, atol=1e-4, rtol=1e-4)
    finally:
        dist.destroy_process_group()


def on_a_rank(how):
    """Gradients of log-probs and of a divergence from a reference, sharded as the policy is, over this rank's batch."""
    dist = torch.distributed
    rank, ranks = dist.get_rank(), dist.get_world_size()
    names = ("logps", "kl_reference_policy")
    options = {
        "family": "qwen2" if how == "tied" else "llama",
        "num_hidden_layers": 1,
    }  # tied: head and embedding are one

    def spread(model):
        if how == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if how == "head by itself":
            fully_shard(model.lm_head, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward=how == "freed after the forward")

    plain, reference = hf_models.model(**options), hf_models.model(seed=3, **options)
    batches = [hf_models.batch(seed=number) for number in range(ranks)]
    for batch in batches:
        labels = shift_labels(batch["input_ids"], mask=batch["attention_mask"])
        with torch.no_grad():
            reference_logits = reference(**batch).logits
        stats = token_stats(plain(**batch).logits, labels, reference_logits=reference_logits, outputs=names)
        ((stats.logps.sum() + stats.kl_reference_policy.sum()) / ranks).backward()
    policy = spread(hf_models.model(**options))
    if how != "ddp":
        reference = spread(reference)
    for _ in range(2):
        policy.zero_grad()
        stats = compute_token_stats(policy, batches[rank], outputs=names, reference_model=reference)
        (stats.logps.sum() + stats.kl_reference_policy.sum()).backward()
        for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
            gradient = p.grad.full_tensor() if how != "ddp" else p.grad
            torch.testing.assert_close(gradient, q.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.nightly_except(number=(2,))
@pytest.mark.parametrize("number", [2, 4])
def test_spread_models(number):
    """DDP and FSDP2 over real processes: gradients are those of all batches in one process."""
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package")
    with Ranks(number) as ranks:
        for how in ("ddp", "root", "tied", "freed after the forward", "head by itself"):
            ranks.run(on_a_rank, how)


EVEN = hf_models.VOCAB + 1  # transformers 5.20 cuts no head into two parts of different sizes


def in_parts(folder):
    """transformers' own tensor parallelism: the head is a DTensor of rows, which nobody gathers."""
    import os

    dist = torch.distributed
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    plain, reference = (hf_models.model(vocab_size=EVEN, seed=seed) for seed in (0, 3))
    batch, names = hf_models.batch(), ("logps", "kl_reference_policy")
    found = []
    for policy, other in ((plain, reference), [
        type(plain).from_pretrained(folder / name, tp_plan="auto", dtype=torch.float32) for name in ("policy", "other")
    ]):  # fmt: skip
        stats = compute_token_stats(policy, batch, outputs=names, reference_model=other)
        (stats.logps.sum() + stats.kl_reference_policy.sum()).backward()
        found.append((policy, stats))
    (_, expected), (parts, got) = found
    # transformers 5.0 leaves the head whole on every rank.
    weight, whole = parts.lm_head.weight, plain.lm_head.weight
    assert type(weight).__name__ == "DTensor" or weight.shape == whole.shape
    for name in names:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    for p, q in zip(parts.parameters(), plain.parameters(), strict=True):
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(gradient, q.grad, atol=1e-4, rtol=1e-4)


def test_tensor_parallel_models(tmp_path):
    pytest.importorskip("torch.distributed.tensor", reason="torch has no distributed package")
    pytest.importorskip("accelerate", reason="accelerate, which transformers wants for this, is not installed")
    for name, seed in (("policy", 0), ("other", 3)):
        hf_models.model(vocab_size=EVEN, seed=seed).save_pretrained(tmp_path / name)
    with Ranks(2) as ranks:
        ranks.run(in_parts, tmp_path)


def test_the_model_is_left_as_it_was():
    model, batch = hf_models.model(), hf_models.batch()
    before = model(**batch).logits
    compute_token_logps(model, batch)
    with pytest.raises(IndexError):
        compute_token_logps(model, batch, labels=batch["input_ids"] + hf_models.VOCAB)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__
    assert torch.equal(model(**batch).logits, before)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    check(other)
    check(model)
    check(pickle.loads(pickle.dumps(model)))
    assert model.generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False).shape == (1, 14)


def test_installed_head():
    """As trainers use it: the keyword stays, copies have a head of their own, and it can be taken away."""
    model, batch = hf_models.model(), hf_models.batch()
    expected = compute_token_logps(model, batch)
    install(model, lambda self, *args, **kwargs: hook_of(self).forward(*args, **kwargs))
    labels, logps = batch_labels(batch), StatsRequest(("logps",))
    assert torch.equal(model(**batch, labels=labels, qkernels=HeadCall(logps)).stats.logps, expected)
    assert torch.equal(compute_token_logps(model, batch), expected)
    assert model(**batch).logits.shape == (3, 12, hf_models.VOCAB)
    assert model.generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False).shape == (1, 14)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    assert not torch.equal(run(other, batch, logps, labels).stats.logps, expected)
    assert torch.equal(compute_token_logps(model, batch), expected)
    replaced = model.lm_head
    model.set_output_embeddings(nn.Linear(32, hf_models.VOCAB, bias=False))
    assert_same(compute_token_logps(model, batch), from_logits(model, batch))
    assert "forward" not in replaced.__dict__
    uninstall(model)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_head_that_does_something_else_is_refused(monkeypatch):
    model, batch = hf_models.model(), hf_models.batch()
    model.config.final_logit_softcapping = 30.0  # of which Llama knows nothing
    with pytest.raises(ValueError, match="does something to its logits that is not known here: with softcap 30"):
        compute_token_logps(model, batch)
    model = hf_models.model("gemma2")
    check(model)
    model.config.final_logit_softcapping = 2.0  # edited after the first call
    check(model)
    model.config.final_logit_softcapping = None
    check(model)
    model = hf_models.model()
    own = type(model).forward

    def masks_a_token(self, *args, **kwargs):
        outputs = own(self, *args, **kwargs)
        outputs.logits[..., 5] = -1e9
        return outputs

    monkeypatch.setattr(type(model), "forward", masks_a_token)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\.forward does something to its logits"):
        compute_token_logps(model, batch)


class _Odd(nn.Module):
    """A model that calls its head a given number of times."""

    def __init__(self, head, calls=1):
        super().__init__()
        self.embedding, self.head, self.calls = nn.Embedding(10, 4), head, calls

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        logits = hidden @ self.embedding.weight.t()
        for _ in range(self.calls):
            logits = self.head(hidden)
        return (logits,)


def test_models_that_are_not_known():
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert compute_token_logps(_Odd(nn.Linear(4, 10)), batch).shape == (
        1,
        3,
    )  # no config, no keyword arguments, a tuple
    with pytest.raises(ValueError, match="does not call the Linear"):
        compute_token_logps(_Odd(nn.Linear(4, 10), 0), batch)
    with pytest.raises(ValueError, match="more than once"):
        compute_token_logps(_Odd(nn.Linear(4, 10), 2), batch)
    with pytest.raises(TypeError, match=r"the head is a .*Sequential; expected torch.nn.Linear"):
        compute_token_logps(_Odd(nn.Sequential(nn.Linear(4, 10))), batch)
    quantised = nn.Linear(4, 10)
    quantised.weight = nn.Parameter(torch.zeros(10, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch\.int8; a quantised head"):
        head_parameters(_Odd(quantised))
    with pytest.raises(ValueError, match="no single language model head"):
        head_parameters(_Odd(None))
    with pytest.raises(ValueError, match="meta device"):
        head_parameters(_Odd(nn.Linear(4, 10, device="meta")))
    with pytest.raises(TypeError, match="DataParallel"):
        head_parameters(nn.DataParallel(_Odd(nn.Linear(4, 10))))
    with pytest.raises(TypeError, match=r"Linear has no get_output_embeddings\(\)"):
        head_parameters(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch\.nn.Module, got str"):
        hidden_states("gpt2")
    with pytest.raises(ValueError, match="takes no labels"):
        hidden_states(_Odd(nn.Linear(4, 10)), labels=batch["input_ids"])
    translator = _Odd(nn.Linear(4, 10))
    translator.config = type("Config", (), {"is_encoder_decoder": True})()
    with pytest.raises(ValueError, match="encoder-decoder"):
        head_parameters(translator)


# --- PEFT ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def adapted(peft, *targets, seed=3, **options):
    """A model with LoRA whose B is not 0."""
    made = peft.get_peft_model(
        hf_models.model(**options.pop("model", {})),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **options),
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return made


@pytest.mark.filterwarnings("ignore")
def test_lora(peft):
    check(adapted(peft, "q_proj"))
    model, batch = adapted(peft, "q_proj", "lm_head"), hf_models.batch()
    check(model)
    head, labels = head_parameters(model), batch_labels(batch)
    merged = linear_token_logps(hidden_states(model, **batch), head.weight, labels)
    torch.testing.assert_close(merged, compute_token_logps(model, batch), atol=1e-5, rtol=1e-5)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients(head.weight, model))
    with model.disable_adapter():
        off = compute_token_logps(model, batch)
        assert_same(off, from_logits(model, batch))
    assert not torch.allclose(off, merged)
    stats = compute_token_stats(model, batch, outputs=("reference_logps", "kl_reference_policy"), reference_model=model)
    assert_same(stats.reference_logps, off)
    model.merge_adapter()
    assert_same(compute_token_logps(model, batch), from_logits(model, batch))
    with model.disable_adapter():  # PEFT takes the merged adapter out again
        torch.testing.assert_close(compute_token_logps(model, batch), off, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lora_dropout_and_bias_on_the_head(peft):
    model = adapted(peft, "q_proj", "lm_head", lora_dropout=0.4, lora_bias=True).train()
    check(model)
    with pytest.raises(ValueError, match="dropout, which has no merged weight"):
        head_parameters(model)
    head_parameters(model.eval())
    check(model)


@pytest.mark.filterwarnings("ignore")
def test_lora_on_a_16_bit_head_is_not_rounded_away(peft):
    """bf16 cannot hold base + delta for a small delta; the adapter's gradient and effect must be PEFT's own."""
    model = adapted(peft, "lm_head").bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.05)
        batch = hf_models.batch()
        got = compute_token_logps(model, batch)
        with model.disable_adapter():
            off = compute_token_logps(model, batch)
        exact = copy.deepcopy(model).float()
        with exact.disable_adapter():
            exact_off = compute_token_logps(exact, batch)
        change = compute_token_logps(exact, batch) - exact_off
    assert float(((got - off) - change).abs().mean()) < 0.1 * float(change.abs().mean())


@pytest.mark.filterwarnings("ignore")
def test_other_adapters(peft):
    check(adapted(peft, "q_proj", modules_to_save=["lm_head"]))
    saved = adapted(peft, "q_proj", modules_to_save=["lm_head"])
    with torch.no_grad():
        saved.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    with saved.disable_adapter():
        assert_same(compute_token_logps(saved, hf_models.batch()), from_logits(saved, hf_models.batch()))
    check(saved)
    tokens = adapted(peft, "q_proj", trainable_token_indices=[3, 5], model={"family": "qwen2"})
    check(tokens)
    two = adapted(peft, "q_proj", "lm_head")
    two.add_adapter("other", two.peft_config["default"])
    two.set_adapter("other")
    check(two)
    check(peft.get_peft_model(hf_models.model(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")))


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_no_sum_of_weights(peft):
    with pytest.raises(ValueError, match="'default' on the head is DoRA"):
        compute_token_logps(adapted(peft, "lm_head", use_dora=True), hf_models.batch())
    other = peft.get_peft_model(hf_models.model(), peft.LoHaConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(TypeError, match="only LoRA"):
        head_parameters(other)


def test_requests_and_results_change_devices_whole():
    """The head of a model that is spread over several devices has another one than the labels."""
    head = HiddenAndHead(torch.zeros(1, 2, 3), torch.zeros(5, 3), None)
    request = requests.LossRequest(
        2, ("logps",), token_weights=torch.ones(1, 2), reference=head, options={"beta": 0.1, "scale": torch.ones(())}
    )
    moved = requests.on_device(request, torch.device("meta"))
    assert type(moved) is requests.LossRequest and type(moved.reference) is HiddenAndHead
    tensors = (moved.token_weights, moved.reference.hidden, moved.reference.weight, moved.options["scale"])
    assert all(tensor.device.type == "meta" for tensor in tensors) and moved.reference.bias is None
    assert (moved.length, moved.outputs, moved.options["beta"]) == (2, ("logps",), 0.1)
    stats = TokenStats(*(torch.zeros(1, 2) if name == "logps" else None for name in TokenStats._fields))
    result = requests.on_device(requests.HeadResult(stats=stats), torch.device("meta"))
    assert result.stats.logps.device.type == "meta" and result.stats.entropy is None and result.loss is None
    assert requests.on_device(stats, torch.device("cpu")).logps is stats.logps


def test_results_come_back_to_the_device_of_the_labels(monkeypatch):
    """Labels on one device, the head on another: computed at the head."""
    seen = []

    def on_device(value, device):
        seen.append((type(value).__name__, device.type))
        return value

    monkeypatch.setattr(requests, "on_device", on_device)
    monkeypatch.setattr(requests, "_results", lambda request, head, labels, transform: labels.device.type)
    head = HiddenAndHead(torch.zeros(1, 2, 3, device="meta"), torch.zeros(5, 3, device="meta"), None)
    labels = torch.zeros(1, 2, dtype=torch.int64)
    request = requests.StatsRequest(("logps",))
    assert requests.compute_at_head(request, head.hidden, head, labels, None) == "meta"
    assert seen == [("StatsRequest", "meta"), ("str", "cpu")]
