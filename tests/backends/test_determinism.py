"""The same bits from run to run, from thread count to thread count, in forked workers and beside other threads."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

import oracle
from cases import Rows, make_pairs, make_rows, normal
from comparisons import check_logps
from qkernels import fused_token_dpo, token_logps, token_stats
from runnable import runnable_backends

PLAIN = (torch.float32, torch.bfloat16)


def everything(backend, rows: Rows) -> list[torch.Tensor]:
    """All outputs and gradients of these rows, from the plain path and from the one with all outputs."""
    plain = rows.logits.clone().requires_grad_()
    logps = token_logps(plain, rows.labels, temperature=rows.temperature, backend=backend.name)
    logps.backward(torch.linspace(-1, 2, logps.numel(), device=logps.device).view_as(logps))
    full = rows.logits.clone().requires_grad_()
    stats = token_stats(
        full, rows.labels, reference_logits=rows.reference, outputs=oracle.STATS, temperature=rows.temperature,
        backend=backend.name,
    )  # fmt: skip
    sum(getattr(stats, name).sum() for name in oracle.WITH_GRADIENT).backward()
    inplace = rows.logits.clone().requires_grad_()
    token_logps(
        inplace, rows.labels, temperature=rows.temperature, inplace_backward=True, backend=backend.name
    ).sum().backward()
    return [logps.detach(), plain.grad, full.grad, inplace.grad, *(value.detach() for value in stats)]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shape, vocab", [((7,), 4099), ((2, 5), 1003), ((1,), 32001)])
def test_same_bits_from_run_to_run(backend, dtype, shape, vocab):
    rows = make_rows(shape, vocab, dtype, backend.device, temperature=0.9)
    first = everything(backend, rows)
    for _ in range(3):
        assert same_bits(everything(backend, rows), first)


@pytest.mark.dtypes(*PLAIN)
def test_loss_has_the_same_bits_from_run_to_run(backend, dtype):
    batch = make_pairs(8, 40, 50, dtype, backend.device)

    def run(loss_type):
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(
            leaf, batch.labels, reference_logits=batch.reference, loss_type=loss_type, backend=backend.name
        )
        out.loss.backward()
        return [out.loss.detach(), out.chosen_rewards, out.rejected_rewards, out.token_rewards, leaf.grad]

    for loss_type in ("sigmoid", "tdpo1"):
        first = run(loss_type)
        assert all(same_bits(run(loss_type), first) for _ in range(3))


# A single row, a few rows, more rows than threads; one segment of the vocabulary and many.
SHAPES = [((1,), 1), ((1,), 128256), ((2,), 128257), ((3,), 40000), ((5,), 4097), ((33,), 515), ((64,), 7)]


@pytest.mark.only_backends("cpu")
@pytest.mark.dtypes(*PLAIN)
@pytest.mark.parametrize("shape, vocab", SHAPES)
def test_same_bits_for_any_number_of_threads(backend, dtype, shape, vocab):
    rows = make_rows(shape, vocab, dtype, temperature=0.9)
    rows.labels[0] = vocab // 2
    results = []
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        results.append(everything(backend, rows))
    assert all(same_bits(result, results[0]) for result in results[1:])
    check_logps(backend, rows)


@pytest.mark.only_backends("cpu")
@pytest.mark.dtypes(*PLAIN)
def test_loss_has_the_same_bits_for_any_number_of_threads(backend, dtype):
    batch = make_pairs(4, 30, 300, dtype)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        leaf = batch.logits.clone().requires_grad_()
        out = fused_token_dpo(leaf, batch.labels, reference_logits=batch.reference, backend="cpu")
        out.loss.backward()
        results.append([out.loss.detach(), out.token_rewards, out.chosen_rewards, leaf.grad])
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_a_row_does_not_depend_on_its_neighbours(backend, dtype):
    """The same row alone, first of many, last of many: the same bits."""
    if backend.name == "torch" and backend.device.type != "cpu":
        pytest.skip("torch's reductions on a GPU are divided by the number of rows")
    rows = make_rows((9,), 5003, dtype, backend.device)
    rows.labels.fill_(4321)
    together = token_logps(rows.logits, rows.labels, backend=backend.name)
    for i in range(9):
        alone = token_logps(rows.logits[i : i + 1], rows.labels[i : i + 1], backend=backend.name)
        assert torch.equal(alone[0], together[i])


@pytest.mark.not_backends("torch")
def test_results_do_not_depend_on_alignment(backend, dtype):
    """Wide loads may start anywhere, sums may not: the kernels have one summation order per row.

    (Torch's own sums, which the reference uses, do not promise that.)
    """
    rows = make_rows((3,), 4099, dtype, backend.device)
    expected = token_logps(rows.logits, rows.labels, backend=backend.name)
    for offset in range(1, 8):
        memory = torch.zeros(3 * 4099 + offset, dtype=dtype, device=backend.device)
        view = memory[offset:].view(3, 4099)
        view.copy_(rows.logits)
        assert torch.equal(token_logps(view, rows.labels, backend=backend.name), expected)


# --- processes and threads --------------------------------------------------------------------------------------------

FORK = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
needs_fork = pytest.mark.skipif(not FORK, reason="the fork start method is missing")


def on_cpu(backend):
    if torch.cuda.is_available():
        pytest.skip("a forked process can use neither CUDA nor an autograd that has threads for it")
    return backend


def logps_and_grad(backend_name: str, vocab: int) -> list[torch.Tensor]:
    leaf = normal(6, vocab).requires_grad_()
    labels = torch.arange(6) % vocab
    logps = token_logps(leaf, labels, backend=backend_name)
    logps.sum().backward()
    return [logps.detach(), leaf.grad]


def in_child(backend_name: str, threads: int, queue) -> None:
    torch.set_num_threads(threads)
    queue.put([value.numpy() for value in logps_and_grad(backend_name, 9001)])


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_call_the_kernels(backend):
    """The parent's worker threads do not exist in the child; a pool that waits for them would hang."""
    on_cpu(backend)
    threads = 1 if backend.name == "torch" else 3  # OpenMP, which torch's own operations use, does not survive a fork
    expected = logps_and_grad(backend.name, 9001)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(backend.name, threads, queue), daemon=True)
    child.start()
    reader = threading.Thread(target=lambda: results.extend(queue.get()), daemon=True)
    results: list = []
    reader.start()
    reader.join(60)
    if not results:
        child.kill()
        pytest.fail("the forked process gave no answer in 60 s")
    child.join(60)
    assert child.exitcode == 0
    for value, truth in zip(results, expected, strict=True):
        assert torch.equal(torch.from_numpy(value), truth)
    assert same_bits(logps_and_grad(backend.name, 9001), expected), "the parent after its child"


class Scored(torch.utils.data.Dataset):
    """A data set that scores its items with the kernels, as offline reward labelling does."""

    def __init__(self, backend_name: str):
        self.backend_name = backend_name

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        logits = normal(4, 3001, key=(i,))
        return token_logps(logits, torch.arange(4), backend=self.backend_name)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_workers_can_call_the_kernels(backend):
    on_cpu(backend)
    data = Scored(backend.name)
    expected = torch.stack([data[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_spawned_process_starts_its_own_threads(backend):
    """A child whose parent never used the kernels, and a parent that first uses them after forking."""
    on_cpu(backend)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=in_child, args=(backend.name, 1, queue), daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    answers: list = []
    reader = threading.Thread(target=lambda: answers.extend([queue.get(), queue.get()]), daemon=True)
    reader.start()
    reader.join(60)
    for child in children:
        child.kill() if not answers else child.join(60)
    assert len(answers) == 2
    for value, truth in zip(answers[0], answers[1], strict=True):
        assert (value == truth).all()


def test_concurrent_python_threads_get_right_results(backend):
    """The kernels run without the GIL: calls overlap, each on its own data and from its own thread."""
    cases = [make_rows((1 + i,), 3001 + 500 * i, torch.float32, backend.device, key=(i,)) for i in range(6)]
    expected = [everything(backend, rows) for rows in cases]
    wrong: list[object] = []
    start = threading.Barrier(len(cases))

    def work(i: int) -> None:
        torch.set_num_threads(1 if backend.name == "torch" else 1 + i % 3)
        start.wait()
        try:
            for _ in range(8):
                if not same_bits(everything(backend, cases[i]), expected[i]):
                    wrong.append(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    assert wrong == []


def test_errors_in_one_thread_do_not_disturb_another(backend):
    if backend.device.type != "cpu":
        pytest.skip("IndexError is the CPU's promise")
    rows = make_rows((5,), 4099, torch.float32)
    expected = token_logps(rows.logits, rows.labels, backend=backend.name)
    bad = torch.full_like(rows.labels, 4099)
    problems: list[object] = []

    def work(fail: bool) -> None:
        for _ in range(20):
            try:
                result = token_logps(rows.logits, bad if fail else rows.labels, backend=backend.name)
                if fail or not torch.equal(result, expected):
                    problems.append(result)
            except IndexError as error:
                if not fail or "labels[0] = 4099" not in str(error):
                    problems.append(error)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []


def test_a_process_that_used_the_kernels_ends():
    """Worker threads must not keep the interpreter from exiting, or crash it while it does."""
    runs = "".join(
        f"x = torch.randn(8, 9001, device={str(backend.device)!r}, requires_grad=True)\n"
        f"y = torch.ones(8, dtype=torch.int64, device={str(backend.device)!r})\n"
        f"token_logps(x, y, backend={backend.name!r}).sum().backward()\n"
        for backend in runnable_backends()
    )
    code = f"import torch; torch.set_num_threads(4); from qkernels import token_logps\n{runs}print('done')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    quiet = done.stderr if not torch.cuda.is_available() else ""  # drivers and compilers of GPUs may warn
    assert (done.returncode, done.stdout, quiet) == (0, "done\n", ""), done.stderr
