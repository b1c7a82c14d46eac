"""Vocabulary and positions split over real processes: results and gradients are those of one process.

The checks themselves run on the ranks: `distributed_checks.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import distributed_checks as checks
from processes import Ranks
from qkernels.core.fields import COMBINED

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
# What four ranks do otherwise than two does not depend on the dtype.
four_in_fp32 = pytest.mark.nightly_cases(ranks=(4,), dtype=(torch.bfloat16, torch.float64))


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(params=[2, 4])
def ranks(request, two, four):
    return two if request.param == 2 else four


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the vocabulary, from logits -------------------------------------------------------------------------------------


@four_in_fp32
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("vocab", [13, 67])
def test_rows_of_logits(ranks, dtype, vocab):
    ranks.run(checks.rows_of_logits, dtype, "auto", vocab)


def test_rows_of_logits_on_each_backend(two, backend):
    if backend.device.type != "cpu":
        pytest.skip("these ranks have CPU tensors")
    two.run(checks.rows_of_logits, torch.float32, backend.name, 67)


def test_rows_of_logits_in_place(two):
    two.run(checks.rows_of_logits, torch.bfloat16, "auto", 67, True)


# Others and label of each model and what combines by a sum of its own, but is_top1, which is 0 or 1; then what the
# backward takes.
SUMS = [0, 1, 2, 3, *(4 + i for i, name in enumerate(COMBINED) if name != "is_top1")]


@pytest.mark.parametrize("changed", [*map(str, SUMS), "softmax", "coefficients"])
def test_every_sum_is_checked(two, changed):
    for error in two.run(checks.perturbed_rows, changed):
        assert "values are wrong" in error


def test_hard_rows(ranks, backend):
    if backend.device.type != "cpu":
        pytest.skip("these ranks have CPU tensors")
    ranks.run(checks.hard_rows, backend.name)


LOSSES = [
    ("sigmoid", False, "live", {}, {}),
    ("sigmoid", True, "token", {}, {"label_smoothing": 0.1, "token_weights": True}),
    ("ipo", False, "sequence", {}, {"reduction": "none"}),
    ("tdpo2", False, "live", {}, {"temperature": 0.7, "reduction": "sum"}),
    ("simpo", True, "none", {}, {}),
    (["sigmoid", "sft"], False, "token", {"ld_alpha": 0.4, "use_weighting": True}, {"loss_weights": [1.0, 0.5]}),
    ("sigmoid_norm", True, "token", {"ld_alpha": 0.4}, {"token_weights": True}),
    ("aot", False, "live", {}, {}),
]  # fmt: skip


def named(loss) -> str:
    loss_type, packed, reference, kwargs, options = loss
    return "-".join(map(str, (loss_type, "packed" if packed else "dense", reference, *kwargs, *options)))


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_losses_from_logits(two, loss):
    two.run(checks.losses_from_logits, *loss)


# --- the vocabulary, from hidden states ------------------------------------------------------------------------------


@four_in_fp32
@pytest.mark.nightly_cases(chunks=(False,), dtype=(torch.bfloat16, torch.float64))
@pytest.mark.parametrize("plan", ["frozen_head", "pair_chunks", "recompute"])
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("chunks", [False, True], ids=["one chunk", "chunks"])
def test_losses_from_hidden(ranks, plan, dtype, chunks):
    ranks.run(checks.losses_from_hidden, dtype, plan, {"temperature": 0.8}, {}, True, chunks)


@pytest.mark.parametrize("plan", ["pair_chunks", "recompute"])
def test_losses_from_hidden_with_everything(two, plan):
    options = {"softcap": 5.0, "logit_scale": 1.2, "temperature": 0.8}
    two.run(checks.losses_from_hidden, torch.float32, plan, options, {"loss_type": "tdpo1"}, True, True)


def test_losses_from_hidden_without_a_live_reference(two):
    loss = {"loss_type": "aot_unpaired", "reduction": "sum"}
    two.run(checks.losses_from_hidden, torch.float32, "recompute", {}, loss, False, False)


@four_in_fp32
@pytest.mark.nightly_cases(chunks=(False,), dtype=(torch.bfloat16, torch.float64))
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("chunks", [False, True], ids=["one chunk", "chunks"])
def test_stats_from_hidden(ranks, dtype, chunks):
    ranks.run(checks.stats_from_hidden, dtype, chunks)


@pytest.mark.parametrize("named", [False, True], ids=["implied", "named"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_head_is_a_dtensor(ranks, uneven, named):
    ranks.run(checks.weight_is_dtensor, uneven, named)


def test_dtensors_that_cannot_be_used(four):
    for found in four.run(checks.dtensors_that_cannot_be_used):
        assert found["other dimension"].startswith("TypeError: weight is a DTensor with placements (Shard(dim=1),)")
        assert (
            found["two dimensions"].startswith("TypeError: weight is a DTensor")
            and "1-D mesh" in found["two dimensions"]
        )
        assert found["hidden"].startswith("TypeError: hidden is a DTensor") and "replicated" in found["hidden"]
        assert found["whole"].startswith("ValueError: weight is whole on every rank")
        assert found["another group"].startswith("ValueError: weight is sharded over another group")
        # What FSDP shards has the same placement; only the data tell.
        assert "disagree: the checksum of labels" in found["data of its own"] and "FSDP" in found["data of its own"]


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly_cases(ranks=(4,), loss=LOSSES[1:-1])
@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_losses_of_positions(ranks, loss):
    ranks.run(checks.losses_of_positions, *loss)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize(
    "plan, loss, live",
    [
        ("frozen_head", {}, True),
        ("recompute", {"loss_type": "tdpo1"}, True),
        ("recompute", {"loss_type": "sft"}, False),
    ],
    ids=["frozen_head", "tdpo1", "sft"],
)
def test_head_losses_of_positions(two, dtype, plan, loss, live):
    two.run(checks.head_losses_of_positions, dtype, plan, loss, live)


@pytest.mark.parametrize("how", ["tp", "sp"])
def test_numbers_of_rows_known_beforehand(two, how):
    two.run(checks.numbers_known_beforehand, how)


def test_vocabulary_and_positions_at_once(four):
    four.run(checks.both_groups, 2)


# --- data parallelism ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["inside", "unshard", "outside", "ddp"])
def test_sharded_model(ranks, how):
    ranks.run(checks.sharded_model, how)


def test_sharded_model_with_split_vocabulary(four):
    four.run(checks.sharded_model, "with tp")


def test_inside_torch_compile(two):
    for found in two.run(checks.compiled):
        assert "tp_group or sp_group runs between compiled graphs" in found["fullgraph"]


# --- what is sent, what is documented --------------------------------------------------------------------------------


def test_messages(two):
    for found in two.run(checks.messages):
        (valid,) = found["valid"]
        agreement, small = [32], [4 * valid, 2 * 8 * valid]
        gradient = [4 * 12 * valid]
        assert 0 < valid < 42
        assert found["frozen_head"] == found["recompute"] == agreement + small
        assert found["frozen_head, backward"] == found["recompute, backward"] == gradient
        assert found["pair_chunks"] == agreement + small + gradient and found["pair_chunks, backward"] == []
        assert found["logits"] == [*agreement, 4 * 42, 2 * 8 * 42] and found["logits, backward"] == []
        assert found["positions"] == [*agreement, 4 * 6 * 8] and found["positions, backward"] == []
        assert found["one process"] == found["one process, backward"] == []


EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize("number", range(3))
def test_documented_examples(two, number):
    assert len(EXAMPLES) == 3
    two.run(checks.example, EXAMPLES[number])


# --- GPUs ------------------------------------------------------------------------------------------------------------

nccl = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def gpus():
    with Ranks(2, "nccl") as ranks:
        yield ranks


@nccl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_rows_on_gpus(gpus, dtype):
    gpus.run(checks.rows_on_gpu, dtype)


@nccl
@pytest.mark.parametrize("plan", ["frozen_head", "pair_chunks", "recompute"])
def test_losses_from_hidden_on_gpus(gpus, plan):
    gpus.run(checks.head_on_gpu, torch.bfloat16, plan)


# --- errors ----------------------------------------------------------------------------------------------------------

# What every rank hears, or what the last rank hears and the others do.
MISTAKES = {
    "shapes": "ValueError: the ranks of tp_group disagree: labels.shape is (4, 6) on rank 0 and (4, 5) on rank 1",
    "labels": "ValueError: the ranks of tp_group disagree: the checksum of labels",
    "options": "disagree: temperature, ignore_index is (1.0, -100) on rank 0 and (2.0, -100) on rank 1",
    "weights": "disagree: the checksum of token_weights",
    "shape of weights": "disagree: token_weights is 'float32 of shape (4, 6)' on rank 0 and 'float32 of shape (24,)'",
    "weights with a gradient": "and 'float32 of shape (4, 6), requires grad' on rank 1",
    "constant reference": "disagree: reference_logps is 0.0 on rank 0 and 0.5 on rank 1",
    "constant kl": "disagree: kl as a number is 0.0 on rank 0 and 0.5 on rank 1",
    "functions": "disagree: the call is 'token_logps' on rank 0 and 'fused_token_dpo' on rank 1",
    "requires_grad": "disagree: requires_grad of hidden states, weight, bias is (True, False, False) on rank 0",
    "hidden size": "disagree: hidden.shape[-1] is 12 on rank 0 and 11 on rank 1",
    "label beyond": "IndexError: labels[0, 0] = 21 is outside [0, 21) and is not ignore_index; the ranks of tp_group",
    "label beyond, from logits": "is outside [0, 21)",
    "uncovered": "is outside [0, 20) and is not ignore_index; the ranks of tp_group hold 9, 11 columns",
    "own error": "labels must be int64, got torch.float32",
    "no columns": "weight must have shape [V, H] with H = 12",
    "sequences": "ValueError: the ranks of sp_group disagree: number of sequences is 2 on rank 0 and 4 on rank 1",
    "loss": "ValueError: the ranks of sp_group disagree: the loss is",
    "label of one position": "= 99 is outside [0, 21)",
    "numbers": "ValueError: the ranks of tp_group disagree: the checksum of valid_rows",
    "wrong numbers": "ValueError: valid_rows is 1, but ",
    "numbers of one position": "valid_rows[2] is ",
    "reference of one position": "reference_logps must have shape",
}
ONLY_ON_THE_LAST = (
    "own error", "no columns", "label of one position", "numbers of one position", "reference of one position",
)  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_errors_reach_every_rank(two, case):
    first, last = two.run(checks.wrong_calls, case)
    assert MISTAKES[case] in first and MISTAKES[case] in last, (first, last)
    if case in ONLY_ON_THE_LAST:
        assert first.startswith("RuntimeError: rank 1 of ") and not last.startswith("RuntimeError")
    else:
        assert first == last


def test_groups_that_cannot_be_used(two):
    first, second = two.run(checks.wrong_groups)
    for found in (first, second):
        assert (
            found["type"] == "TypeError: tp_group must be a torch.distributed.ProcessGroup or a 1-D DeviceMesh, got str"
        )
        assert (
            found["mesh"]
            == "ValueError: tp_group must be a process group or a 1-D DeviceMesh, got a mesh of 2 dimensions"
        )
        assert found["backend"] == "ValueError: tp_group cannot send tensors on cpu: it has gloo for cuda"
        assert found["device"].startswith("ValueError: tp_group cannot send tensors on meta: it has gloo for cpu")
    assert second["member"] == "ValueError: tp_group: rank 1 is not a member of this process group"
    assert first["alone"] == "nothing was raised"


def test_a_group_needs_processes():
    import qkernels

    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tp_group needs torch.distributed: call .*init_process_group first"):
        qkernels.token_logps(logits, labels, tp_group="world")


# --- policy losses and plain sequences -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["grpo", "gspo", "grpo, frozen head", "kto", "logits"])
def test_unit_losses(two, how):
    two.run(checks.unit_losses, how)


@pytest.mark.parametrize("how", ["dapo", "grpo", "gspo, frozen_head", "vespo", "kto", "logits", "high entropy"])
def test_unit_losses_of_positions(two, how):
    two.run(checks.unit_losses_of_positions, how)


def test_the_highest_entropy_of_all_processes(two):
    two.run(checks.entropy_of_other_sequences)
