"""The step of a pretrained model on real pairs, for `python -m bench.trl_step --model DIR`; and its floor.

All contenders share one policy, its gradients and one reference: copies of the modules around the same parameters. The
floor is what no loss head can save: the bodies of both models forward, the policy's body backward, and the four bare
GEMMs of the head over the answers' tokens (logits of both models, gradients of hidden states and of the weight), into
memory that is there already.

Memory is what a step takes at its peak beyond the models and the gradients, which exist before it; no optimiser is
made. Freed memory is given back to the system before each measurement, so that no contender inherits another's.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import contenders, measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAIRS, LONGEST = 2, 384  # of a batch; tokens of a sequence
_FLOOR_ROWS = 256  # of the floor's GEMMs at a time


class Step(NamedTuple):
    """A contender: `run` does one step and returns the loss."""

    name: str
    run: Callable[[], float]


def records(path: Path | None, tokenizer: Any, pairs: int, longest: int) -> list[dict[str, Any]]:
    """The pairs of a step as TRL takes them: those of the file whose longer sequence comes closest to `longest` tokens
    without being longer, or, without a file, of the demo's generated ones."""
    from qkernels.data import read_preferences
    from qkernels.demo import synthetic
    from qkernels.score.encode import Encoder

    found = read_preferences(path).pairs if path is not None else synthetic.generate(64, 1, 0).train
    encoder = Encoder(tokenizer)
    if not encoder.chat:
        found = [pair for pair in found if len(pair.prompt) == 1]
    lengths = [max(a.length for a in sides) for sides in encoder.pairs(dict(enumerate(found)))]
    fitting = sorted((i for i, length in enumerate(lengths) if length <= longest), key=lambda i: (-lengths[i], i))
    if len(fitting) < pairs:
        raise SystemExit(f"{path}: {len(fitting)} pairs have at most {longest} tokens, the step takes {pairs}")
    taken = [found[i] for i in sorted(fitting[:pairs])]
    if not encoder.chat:
        return [{"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in taken]
    return [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in p.prompt],
            "chosen": [{"role": "assistant", "content": p.chosen}],
            "rejected": [{"role": "assistant", "content": p.rejected}],
        }
        for p in taken
    ]


def _around_the_same_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules that has the very parameters and buffers of `model`."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Setup(NamedTuple):
    """A model twice, a batch as the trainers collate it, and the trainers' steps."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    batch: dict[str, torch.Tensor]
    steps: list[Step]
    absent: dict[str, str]


def prepare(
    folder: Path, dtype: torch.dtype, data: Sequence[dict[str, Any]], longest: int, out: str,
    trainers: dict[str, Callable[..., Any]], checkpointing: bool = False,
) -> Setup:  # fmt: skip
    """Load the models and make the trainers."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2))
    policy.requires_grad_(True)
    with torch.no_grad():  # a policy that equals its reference has one loss whatever the head computes
        for parameter in policy.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1.02)
    reference.requires_grad_(False).eval()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    steps, absent, batch = [], {}, {}
    for name, make in trainers.items():
        liger = "Liger" in name
        refusal = _liger_refusal() if liger else None
        if refusal is not None:
            absent[name] = refusal
            continue
        trainer = make(
            model=_around_the_same_parameters(policy),
            ref_model=_around_the_same_parameters(reference),
            args=DPOConfig(
                out, use_cpu=True, report_to=[], bf16=False, disable_tqdm=True, log_level="error",
                gradient_checkpointing=checkpointing, max_length=longest,
            ),
            train_dataset=Dataset.from_list(list(data)),
            processing_class=tokenizer,
        )  # fmt: skip
        if liger:  # as its train() does; but the rotary embedding would be replaced for every model of the process
            from transformers.integrations.liger import apply_liger_kernel

            for model in (trainer.model, trainer.ref_model):
                apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "rope": False})
        batch = dict(trainer.data_collator(list(trainer.train_dataset)))
        trainer.current_gradient_accumulation_steps = 1  # as the training loop has it
        steps.append(Step(name, _runner(trainer, batch)))
    return Setup(policy, reference, batch, steps, absent)


def _liger_refusal() -> str | None:
    """Why Liger's layers cannot run here; None if they can."""
    if not contenders.installed("liger_kernel"):
        return "liger-kernel is not installed"
    try:
        from liger_kernel.transformers import LigerRMSNorm

        LigerRMSNorm(8)(torch.randn(2, 8))
    except Exception as error:  # of Triton: "0 active drivers", without a GPU
        return f"its Triton kernels do not run on this device ({type(error).__name__}: {error})"
    return None


def _runner(trainer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    model = trainer.accelerator.prepare_model(trainer.model)

    def run() -> float:
        model.train()
        return float(trainer.training_step(model, dict(batch)))

    return run


class Floor:
    """The bodies and the bare GEMMs of a step, each timed by itself."""

    def __init__(self, setup: Setup, now: Callable[[], float]):
        self.now = now
        self.peak_bytes: int | None = None  # of the policy's body, forward and backward
        self.policy, self.reference = setup.policy, setup.reference
        self.inputs = {name: setup.batch[name] for name in ("input_ids", "attention_mask")}
        rows = setup.batch["completion_mask"][:, 1:] != 0
        self.rows = int(rows.sum())
        weight = self.policy.get_output_embeddings().weight
        self.vocab, self.width = weight.shape
        n = min(_FLOOR_ROWS, self.rows)
        self.x = torch.randn(n, self.width).to(weight.dtype)
        self.logits = torch.randn(n, self.vocab).to(weight.dtype)
        self.dx, self.dw = torch.empty_like(self.x), torch.empty_like(weight)

    def seconds(self) -> dict[str, float]:
        """Time of each part."""
        self.policy.train()
        found: dict[str, float] = {}
        with _timed(found, self.now, "reference body, forward"), torch.no_grad():
            self.reference.base_model(**self.inputs, use_cache=False)
        _give_back()
        self.peak_bytes = measure.peak_memory(lambda: self._policy_body(found))
        with _timed(found, self.now, "GEMMs of the head"):
            self._products()
        return found

    def _policy_body(self, found: dict[str, float]) -> None:
        with _timed(found, self.now, "policy body, forward"):
            hidden = self.policy.base_model(**self.inputs, use_cache=False).last_hidden_state
        with _timed(found, self.now, "policy body, backward"):
            hidden.backward(torch.full_like(hidden, 1e-3))

    @torch.no_grad()
    def _products(self) -> None:
        weight, other = (m.get_output_embeddings().weight.detach() for m in (self.policy, self.reference))
        for start in range(0, self.rows, len(self.x)):
            n = min(len(self.x), self.rows - start)
            x, logits, dx = self.x[:n], self.logits[:n], self.dx[:n]
            torch.mm(x, other.t(), out=logits)
            torch.mm(x, weight.t(), out=logits)
            torch.mm(logits, weight, out=dx)
            if start == 0:
                torch.mm(logits.t(), x, out=self.dw)
            else:
                self.dw.addmm_(logits.t(), x)


@contextlib.contextmanager
def _timed(found: dict[str, float], now: Callable[[], float], name: str) -> Iterator[None]:
    start = now()
    yield
    found[name] = now() - start


def _give_back() -> None:
    """Give freed memory back to the system: torch's garbage, this package's scratch buffers, glibc's heap."""
    from qkernels.core import memory

    gc.collect()
    memory._scratch.clear()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _with_gradients(policy: torch.nn.Module) -> None:
    """Gradients of 0, as a step in the middle of an accumulation finds them; written, hence resident."""
    for parameter in policy.parameters():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.fill_(0.0)


def compare(
    folder: Path,
    dtype: str,
    data: Path | None,
    rounds: int,
    trainers: dict[str, Callable[..., Any]],
    *,
    clock: str = "wall",
    pairs: int = PAIRS,
    longest: int = LONGEST,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Times and peaks of the contenders and times of the floor, in turn, round after round.

    Args:
        folder: the model.
        dtype: "fp32" or "bf16", of weights and gradients.
        data: preference pairs; None for generated ones.
        rounds: how many; what starts with the first call of all is in the first round of the floor.
        trainers: by name.
        clock: "wall", or "cpu" for the processor time of this process, on a machine that others use too.
        pairs, longest: of the batch; tokens of a sequence.
        checkpointing: whether the policy's layers keep their inputs alone and run again in the backward, as TRL has it
            unless told otherwise; the floor's too.
    """
    from transformers import AutoTokenizer

    chosen = records(data, AutoTokenizer.from_pretrained(folder), pairs, longest)
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    with tempfile.TemporaryDirectory() as out:
        setup = prepare(folder, DTYPES[dtype], chosen, longest, out, trainers, checkpointing)
        floor = Floor(setup, now)
        found: dict[str, Any] = {
            "model": folder.name,
            "dtype": dtype,
            "checkpointing": checkpointing,
            "clock": clock,
            "vocab": floor.vocab,
            "hidden": floor.width,
            "tokens": int(setup.batch["attention_mask"].sum()),
            "positions": setup.batch["input_ids"].numel(),
            "scored": floor.rows,
            "absent": setup.absent,
            "losses": {},
            "seconds": {step.name: [] for step in setup.steps},
            "peak_bytes": {step.name: [] for step in setup.steps},
            "floor_seconds": [],
            "body_peak_bytes": [],
        }
        for _ in range(rounds):
            _with_gradients(setup.policy)
            found["floor_seconds"].append(floor.seconds())
            found["body_peak_bytes"].append(floor.peak_bytes)
            for step in setup.steps:
                _with_gradients(setup.policy)
                _give_back()
                start = now()
                peak = measure.peak_memory(lambda step=step: _noted(found["losses"], step))
                found["seconds"][step.name].append(now() - start)
                found["peak_bytes"][step.name].append(peak)
            _check_losses(found["losses"], dtype)
    return found


def _noted(losses: dict[str, float], step: Step) -> float:
    losses[step.name] = step.run()
    return losses[step.name]


def _check_losses(losses: dict[str, float], dtype: str) -> None:
    """In bf16 TRL's logits are rounded before the softmax, by up to 2^-9 of a logit, in sums of hundreds of tokens."""
    allowed = 1e-3 if dtype == "fp32" else 0.2
    if max(losses.values()) - min(losses.values()) > allowed:
        raise RuntimeError(f"the contenders disagree on the loss: {losses}")


def table(found: dict[str, Any]) -> str:
    """One comparison as lines of text."""
    floor = statistics.median(sum(parts.values()) for parts in found["floor_seconds"])
    stock = statistics.median(found["seconds"]["TRL"])
    peaks = {name: max((p for p in all_ if p is not None), default=None) for name, all_ in found["peak_bytes"].items()}
    lines = [
        f"{found['model']}, {found['dtype']}: V = {found['vocab']}, H = {found['hidden']}, {found['positions']}"
        f" positions ({found['tokens']} tokens), {found['scored']} scored"
        + (", gradient checkpointing" if found["checkpointing"] else ""),
        f"  {found['clock'] + ' time':16} {'median':>9} {'of floor':>9} {'of TRL':>7} {'peak':>10} {'of TRL':>7}",
    ]
    for name, times in found["seconds"].items():
        median, peak = statistics.median(times), peaks[name]
        memory = f"{'-':>10} {'-':>7}"
        if peak is not None and peaks["TRL"]:
            memory = f"{peak / 2**20:6.0f} MiB {peak / peaks['TRL']:7.2f}"
        lines.append(f"  {name:16} {median:7.2f} s {median / floor:9.2f} {median / stock:7.2f} {memory}")
    parts = {name: statistics.median(p[name] for p in found["floor_seconds"]) for name in found["floor_seconds"][0]}
    lines.append(f"  {'floor':16} {floor:7.2f} s: " + ", ".join(f"{name} {s:.2f} s" for name, s in parts.items()))
    if None not in found["body_peak_bytes"]:
        lines.append(f"  {'peak of the body':16} {max(found['body_peak_bytes']) / 2**20:.0f} MiB, without a head")
    lines += [f"  {name}: left out, {why}" for name, why in found["absent"].items()]
    return "\n".join(lines)
