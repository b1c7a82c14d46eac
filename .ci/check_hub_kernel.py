"""Writes the Hub kernel and loads it offline as `kernels` does: by path and by name, beside the installed package.

.venv/bin/python .ci/check_hub_kernel.py        (`make hub-kernel` writes build/hub and runs this)
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

USE = """
import sys
from pathlib import Path

import torch
from kernels import get_kernel, get_local_kernel

import qkernels

hub = Path(sys.argv[1])
by_path = get_local_kernel(hub, backend="cpu")
by_name = get_kernel("somebody/qkernels", version=1, backend="cpu")
assert by_path is by_name and by_path is not qkernels, (by_path, by_name)
assert "build" in Path(by_path.__file__).parts, by_path.__file__
assert set(by_path.__all__) == set(qkernels.__all__)
torch.manual_seed(0)
logits = torch.randn(4, 6, 101, requires_grad=True)
hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(101, 16, requires_grad=True)
labels, reference = torch.randint(0, 101, (4, 6)), torch.randn(4, 6, 101)
for backend in ("auto", "torch"):
    results = []
    for package in (by_path, qkernels):
        out = package.fused_token_dpo(logits, labels, reference_logits=reference, backend=backend)
        head = package.fused_linear_token_dpo(
            hidden, weight, labels, reference_hidden=hidden.detach(), reference_weight=weight.detach(), backend=backend
        )
        gradients = torch.autograd.grad(out.loss + head.loss, (logits, hidden, weight))
        results.append((out.loss, out.token_logps, head.loss, *gradients))
    assert all(torch.equal(one, other) for one, other in zip(*results)), f"{backend}: not equal to the bit"
loss = by_path.layers.ForCausalLMLoss()
stock = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
torch.testing.assert_close(loss(logits=logits, labels=labels), stock, rtol=1e-5, atol=1e-6)
made = (hidden @ weight.T)[:, :-1].flatten(0, 1)
stock = torch.nn.functional.cross_entropy(made, labels[:, 1:].flatten())
ours = loss(labels=labels, hidden_states=hidden, lm_head_weight=weight)
torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
print("the Hub kernel", by_path.__name__, "equals the package to the bit")
"""


def main() -> None:
    out = ROOT / "build" / "hub"
    subprocess.run([sys.executable, str(ROOT / "hub" / "make.py"), str(out)], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch, "environment")
        venv.create(environment, with_pip=True)
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
        python = environment / "bin" / "python"
        install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([python, *install, "kernels>=0.17"], check=True)
        names = {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"somebody/qkernels={out}"}
        script = Path(scratch, "use.py")
        script.write_text(USE, encoding="utf-8")
        subprocess.run([python, str(script), str(out)], check=True, cwd=scratch, env={**os.environ, **names})


if __name__ == "__main__":
    main()
