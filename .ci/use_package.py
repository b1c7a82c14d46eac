"""Uses the installed package: the compiled extension by itself and, where torch is there, a loss on two backends.

python .ci/use_package.py        (in the environment to check; by `make package`, `make wheel` and the release)
"""

from __future__ import annotations

import array
import importlib.util
import math
import sys
import sysconfig
from pathlib import Path


def use_extension() -> str:
    """The log-probability of one label, which needs no torch; says what the extension is."""
    (file,) = Path(sysconfig.get_path("platlib"), "qkernels").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("_C", file)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    logits, labels, out = array.array("f", [0.0, 1.0, 3.0]), array.array("q", [1]), array.array("f", [0.0])
    extension.row_stats(
        shape=(1, 1, 3),
        policy=(logits.buffer_info()[0], 0, 3, 3),
        reference=(0, 0, 0, 0),
        labels=labels.buffer_info()[0],
        ignore_index=-100,
        temperature=1.0,
        fields=1 << extension.field_names().index("logps"),
        out=out.buffer_info()[0],
        threads=1,
    )
    wanted = 1.0 - math.log(sum(map(math.exp, logits)))
    assert abs(out[0] - wanted) < 1e-6, (out[0], wanted)
    cuda = "no CUDA kernels"
    if extension.HAS_CUDA:
        here = extension.cuda_unavailable(0) or "they run here"
        cuda = f"kernels of CUDA {extension.CUDA_VERSION} for {extension.CUDA_ARCHITECTURES} ({here})"
    return f"Python {sys.version.split()[0]}, {extension.instruction_set()}, {cuda}"


def use_package() -> str:
    """A loss and its gradient, by the extension and by torch."""
    import torch

    import qkernels

    assert str(qkernels.__file__).startswith(sys.prefix), f"not the installed package: {qkernels.__file__}"
    assert qkernels.info()["backends"]["cpu"] == "available", qkernels.info()
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 101, requires_grad=True), torch.randint(0, 101, (4, 6))
    losses = []
    for backend in ("cpu", "torch"):
        out = qkernels.fused_token_dpo(logits, labels, reference_logits=torch.zeros(4, 6, 101), backend=backend)
        losses.append((out.loss.detach(), *torch.autograd.grad(out.loss, logits)))
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    return f"with torch {torch.__version__}"


if __name__ == "__main__":
    extension = use_extension()
    package = use_package() if importlib.util.find_spec("torch") else "its extension alone: torch is not installed"
    print(f"qkernels works as installed, {package}: {extension}")
