"""What ranks compare of a call: every fact, by words of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch

from qkernels.distributed.fingerprint import NOTHING, CallFingerprint, Fingerprint, SequencesFingerprint, digest, words
from qkernels.functional.head_inputs import HeadFingerprint
from qkernels.functional.policy_loss import PolicyFingerprint
from qkernels.functional.preference import LossFingerprint
from qkernels.functional.results import OutputsFingerprint
from qkernels.functional.rows import RowsFingerprint
from qkernels.functional.sequence_loss import SequenceFingerprint

pytestmark = pytest.mark.quick

LOSSES = (
    OutputsFingerprint(outputs=("logps",)),
    LossFingerprint(loss=("ipo",), beta=0.1, reduction="mean", packed=False, has_model=False),
    PolicyFingerprint(loss=("grpo",), num_items=None),
    SequenceFingerprint(loss=("kto",), beta_and_reduction=(0.1, "mean"), kl=0.5),
)


def calls(options: Fingerprint) -> list[Fingerprint]:
    """A fingerprint of each kind, with numbers where arguments can be numbers."""
    arguments = {"kl": 0.5, "num_items_in_batch": 12, "reference_logps": 0.0, "valid_rows": torch.tensor([3])}
    call: dict[str, Any] = {
        "call": "a function", "options": options, "labels": torch.tensor([1, 2, 3]), "arguments": arguments,
    }  # fmt: skip
    return [
        RowsFingerprint(**call, dtype=torch.float32, reference=False, temperature_and_ignore_index=(1.0, -100)),
        HeadFingerprint(
            **call, plan="auto", hidden_name="hidden", hidden_size=8, dtype=torch.float32, reference=False,
            needs=(True, True, False), numbers=(1.0, None, 1.0, False, -100), max_chunk_bytes=None,
        ),
        SequencesFingerprint(sequences=4, dtype=torch.float32, options=options),
    ]  # fmt: skip


def changed(value: Any) -> Any:
    """Another value of a fact."""
    if isinstance(value, Fingerprint):
        first = fields(value)[0].name
        return replace(value, **{first: changed(getattr(value, first))})
    if isinstance(value, torch.Tensor):
        return value + 1
    if isinstance(value, dict):
        return {**value, "kl": 0.6}
    return "another"


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: type(options).__name__)
def test_each_fact_is_compared(options):
    for fingerprint in (*calls(options), options):
        known = digest({**fingerprint.facts(), **fingerprint.checksums()})
        for one in fields(fingerprint):
            other = replace(fingerprint, **{one.name: changed(getattr(fingerprint, one.name))})
            assert digest({**other.facts(), **other.checksums()}) != known, f"{type(fingerprint).__name__}.{one.name}"


def test_facts_have_words():
    facts = calls(NOTHING)[1].facts()
    assert facts["the call"] == "a function" and facts["hidden.shape[-1]"] == 8 and facts["labels.shape"] == (3,)
    assert facts["labels"] == "int64 of shape (3,)" and facts["kl"] == 0.5 and "options" not in facts


def test_two_facts_by_the_same_words_are_an_error():
    @dataclass(frozen=True, kw_only=True)
    class Twice(Fingerprint):
        one: int = 1
        other: int = field(default=2, metadata=words("one"))

    @dataclass(frozen=True, kw_only=True)
    class Temperature(Fingerprint):
        temperature: float = 1.0

    with pytest.raises(AssertionError, match="two facts by the same words"):
        Twice().facts()
    call = CallFingerprint(
        call="f", options=Temperature(), labels=torch.tensor([1]), arguments={"temperature": torch.ones(1)}
    )
    with pytest.raises(AssertionError, match="two facts by the same words"):
        call.facts()
