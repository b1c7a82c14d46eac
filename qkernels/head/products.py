"""The language-model head on a chunk of rows: hidden states in, exact logits out, and the two products of its backward.

Logits reach the softmax in fp32 (fp64 from fp64 inputs): rounded to 16 bits they would err by 3e-2 in a log-prob,
while a token's reward early in training is of the order of 1e-2. How a 16-bit product yields fp32:

- on a GPU, torch's own product with `out_dtype` (the accumulator of the matrix unit, not rounded), also of the backward
  in fp16, where a scale is still to come;
- on a CPU with AMX or AVX-512 BF16, a GEMM of our own (`csrc/cpu/product_amx_bf16.cpp`, `product_avx512_bf16.cpp`);
  torch has none with an fp32 result there;
- on other CPUs and for fp16, an fp32 product of inputs widened block by block (exact, and for fp16 many times faster
  than torch's fp16 product on CPUs without instructions for it).

GEMMs of fp32 are torch's, but for one case: MKL, which torch calls, runs AVX2 code on processors that are not Intel's.
Where these have AVX-512 a GEMM of our own (`product_avx512_fp32.cpp`) takes its place, twice as fast on Zen 5.

The products of the backward take dL/dlogits rounded once to the inputs' dtype, as any training in that dtype does, or
fp32 for fp16 on a CPU. dW is summed over chunks in fp32 that nothing has rounded before, by the same three ways. On
CPUs without bf16 instructions they run in fp32 on inputs widened block by block, and dX and dW are rounded once:
torch's bf16 product, which such a CPU has no kernel for, is a plain loop, about a hundred times slower.

Where a batch has few rows (`qkernels.head.waiting`), their gradients wait in bf16 until the last chunk is done, and dW
is one GEMM: the fp32 sums, which every chunk reads and writes whole, would take more memory than they do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from ..backends import cpu
from ..core import devices
from ..core.compile import constant_when_compiled
from ..core.fields import stats_dtype
from ..core.memory import block_elements, empty

# Rows that torch's product on a CPU has at least. MKL takes other kernels for fewer (with AVX2 and up to 8 threads: for
# 1 to 11), and a row's bits would depend on how many rows the call or the last chunk happens to have.
_FEWEST_ROWS = 16
# Rows of the weight that are widened, or whose gradient is held, at a time: 16 MiB of fp32 at H = 1024.
_BLOCK = 4096


def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all products run in fp32 on widened inputs: fp16 on a CPU."""
    return devices.on_cpu(device) and dtype == torch.float16


def gradient_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which dL/dlogits enters the products of the backward."""
    return torch.float32 if _widens(device, dtype) else dtype


@constant_when_compiled
def _torch_multiplies_bf16() -> bool:
    """Whether torch has a kernel for products of bf16 matrices on this CPU, rather than a plain loop."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widens_backward(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether dX and dW are products in fp32 of widened bf16 inputs: on CPUs without bf16 instructions."""
    return devices.on_cpu(device) and dtype == torch.bfloat16 and not _torch_multiplies_bf16()


def block_bytes(
    device: torch.device, dtype: torch.dtype, vocab: int, hidden: int, *, rows: int, sums: bool, trains: bool
) -> int:
    """Memory for what a GEMM widens or packs.

    Args:
        device, dtype: of the GEMMs.
        vocab, hidden: of the weight, rows of which are widened.
        rows: of a chunk.
        sums: whether dW is summed over chunks, for which columns of the gradient are widened.
        trains: whether there is a backward at all.
    """
    if not devices.on_cpu(device):
        return 0
    if own_kernel("logits", device, dtype):
        # Packed parts of both operands, and sums, for each thread; for dX a stretch of the vocabulary, and of bf16 its
        # fp32 sums.
        stretch = min(max(2**22, 2**10 * hidden), dtype.itemsize * vocab * hidden)
        if dtype == torch.float32:
            return _threads() * 2**19 + trains * stretch
        return _threads() * 2**21 + trains * (stretch + rows * hidden * torch.float32.itemsize)
    if dtype in (torch.float32, torch.float64):
        return 0
    block = min(vocab, _BLOCK)
    widened = block * hidden
    if trains and widens_backward(device, dtype):  # a block of the gradient, and one of the weight or of dW
        widened += (block + hidden) * rows
    elif sums and not _widens(device, dtype):
        widened = max(widened, (block + hidden) * rows)
    return widened * torch.float32.itemsize


@constant_when_compiled
def _threads() -> int:
    return torch.get_num_threads()


@constant_when_compiled
def _torch_multiplies_fp32_slowly() -> bool:
    """Whether torch's fp32 GEMM leaves the widest vectors unused: MKL's does on processors that are not Intel's."""
    return torch.backends.mkl.is_available() and cpu.vendor not in ("GenuineIntel", "")


def own_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The kernel of the extension that runs a GEMM, rather than torch's own; None where torch's does."""
    if not devices.on_cpu(device) or (dtype == torch.float32 and not _torch_multiplies_fp32_slowly()):
        return None
    return cpu.gemm_kernel(name, dtype)


# GEMM kernels of the extension, by the name of their instruction set.
_KERNELS = {
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_emulated": "emulated AMX BF16",
}


@constant_when_compiled
def logits_product(device: torch.device, dtype: torch.dtype) -> str:
    """How logits come about, in words; for `info()` and plans."""
    if kernel := own_kernel("logits", device, dtype):
        return f"{_KERNELS[kernel]} kernel, fp32 result"
    if dtype in (torch.float32, torch.float64):
        if device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
            return "torch, float32 inputs rounded to TF32"
        return f"torch, {str(dtype)[6:]}"
    if not devices.on_cpu(device):
        return "torch, 16-bit inputs, fp32 result"
    return f"{_fp32_gemm(device)}, inputs widened to fp32 block by block"


def _fp32_gemm(device: torch.device) -> str:
    """Whose GEMM multiplies inputs that were widened to fp32, in words."""
    kernel = own_kernel("logits", device, torch.float32)
    return f"{_KERNELS[kernel]} kernel" if kernel else "torch"


def gradient_products(device: torch.device, dtype: torch.dtype) -> str:
    """How dX and dW come about, in words; for `info()`."""
    if _widens(device, dtype):
        return logits_product(device, dtype)
    usual = f"torch, {str(dtype)[6:]}"
    if widens_backward(device, dtype):
        usual = f"{_fp32_gemm(device)}, inputs widened to fp32 block by block"
    kernels = {name: own_kernel(name, device, dtype) for name in ("dX", "dW", "dW of a chunk")}
    words = {name: f"{_KERNELS[kernel]} kernel" if kernel else usual for name, kernel in kernels.items()}
    if words["dX"] == words["dW"] == words["dW of a chunk"]:
        return words["dX"]
    return "; ".join(f"{name}: {how}" for name, how in words.items())


def why_this_kernel() -> str:
    """Why GEMMs run on a CPU as they do; for `info()`."""
    facts = cpu.describe()
    if not facts["available"]:
        return "the compiled extension is missing"
    maker = f", vendor {facts['vendor']}" if "vendor" in facts else ""
    amx = "" if facts["amx"] == "available" else f"; AMX: {facts['amx']}"
    return f"instruction set {facts['instruction_set']}{maker}{amx}"


def _own_gemm(name: str, operand: Tensor) -> bool:
    """Whether a GEMM of the extension takes this operand."""
    return own_kernel(name, operand.device, operand.dtype) is not None


def _show_product(left: Tensor, right: Tensor) -> None:
    """Let modes that watch torch's operations (its flop counter) see a product that torch does not run."""
    if _python_dispatch.is_in_torch_dispatch_mode():
        torch.mm(torch.empty_like(left, device="meta"), torch.empty_like(right, device="meta"))


def multiply(name: str, left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = left right + bias, or out += left right for a part of a sum: one of the GEMMs of `qkernels.backends.cpu`.

    All in one dtype: by a GEMM of the extension where one is the faster, otherwise by torch's.
    """
    if _own_gemm(name, left):
        _show_product(left, right)
        cpu.gemm(name, left, right, out, bias)
    elif cpu.GEMMS[name].accumulate:
        torch.addmm(out, left, right, out=out)  # addmm_ would not be seen by torch's flop counter
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)
    return out


def _multiply_wide(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = left right, or out += left right, in fp32 that nothing has rounded, of 16-bit matrices. Not on CPUs."""
    if not add:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    elif not _python_dispatch.is_in_torch_dispatch_mode() and _adds_wide(out.device):  # a flop counter cannot read it
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    else:
        for start in range(0, out.shape[0], _BLOCK):
            rows = out[start : start + _BLOCK]
            rows.add_(torch.mm(left[start : start + _BLOCK], right, out_dtype=out.dtype))
    return out


@functools.lru_cache(maxsize=64)
def _adds_wide(device: torch.device) -> bool:
    """Whether this torch adds a product of 16-bit matrices to fp32, and not to sums of their own dtype alone."""
    sums, factor = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.ops.aten.addmm.dtype_out(sums, factor, factor, sums.dtype, out=sums)
    except RuntimeError:
        return False
    return True


class Head(NamedTuple):
    """Weight `[V, H]` and bias `[V]` of one model's head, in the dtype of its products, and what shapes its logits.

    z = softcap * tanh(logit_scale * l / softcap), l = x W^T + b. Without a softcap `logits` leaves the scale out: the
    caller folds it into the temperature, which costs nothing. With `rounded`, l and the capped z are rounded to the
    dtype of the weight, as an engine's head with a 16-bit result does; the gradient takes no notice of it.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    rounded: bool = False

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Write the logits of rows `x` `[n, H]` to `out` `[n, V]`, fp32 or fp64."""
        n, w, b = x.shape[0], self.weight, self.bias
        if 0 < n < _FEWEST_ROWS and devices.on_cpu(x.device) and not _own_gemm("logits", x):
            padded = x.new_zeros(_FEWEST_ROWS, x.shape[1])
            padded[:n] = x
            self.logits(padded, wide := out.new_empty(_FEWEST_ROWS, self.vocab))
            out.copy_(wide[:n])
            return
        if x.dtype == out.dtype:
            multiply("logits", x, w.t(), out, b)
        elif not devices.on_cpu(x.device):
            _multiply_wide(x, w.t(), out)
            if b is not None:
                out.add_(b)
        elif _own_gemm("logits", x):
            _show_product(x, w.t())
            cpu.gemm("logits", x, w.t(), out, None if b is None else b.float())
        else:
            wide = x.to(out.dtype)
            for start in range(0, self.vocab, _BLOCK):
                block = slice(start, start + _BLOCK)
                multiply("logits", wide, w[block].to(out.dtype).t(), out[:, block])
            if b is not None:
                out.add_(b)
        self._round(out)
        if self.softcap is not None:
            out.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)
            self._round(out)

    def _round(self, out: Tensor) -> None:
        """Round logits `[n, V]` to the dtype of the weight where that is asked for, a block at a time."""
        if self.rounded and self.weight.dtype != out.dtype:
            for block in out.split(max(1, block_elements(out.device) // max(1, self.vocab))):
                block.copy_(block.to(self.weight.dtype))

    def uncap(self, capped: Tensor, grad: Tensor, out: Tensor) -> None:
        """dL/dz in `grad` -> dL/dl in `out`, given the capped logits z; both are overwritten."""
        assert self.softcap is not None
        slope = capped.square_().mul_(-self.logit_scale / self.softcap**2).add_(self.logit_scale)
        if out is grad:
            grad.mul_(slope)
        else:
            out.copy_(grad.mul_(slope))  # mul into a narrower `out` would take a wide copy of it on a CPU

    def input_grad(self, g: Tensor) -> Tensor:
        """dL/dx = g W, `[n, H]`: in the dtype of g, or in fp32 for fp16, whose scale is still to come."""
        if g.dtype == torch.float16:  # (on a CPU the GEMMs of the backward have no fp16)
            return _multiply_wide(g, self.weight, torch.empty(g.shape[0], self.weight.shape[1], device=g.device))
        wide = torch.float32 if widens_backward(g.device, g.dtype) else g.dtype
        if wide == self.weight.dtype or (g.dtype == self.weight.dtype and _own_gemm("dX", g)):
            return multiply("dX", g, self.weight, g.new_empty(g.shape[0], self.weight.shape[1]))
        result = g.new_zeros(g.shape[0], self.weight.shape[1], dtype=wide)
        for start in range(0, self.vocab, _BLOCK):
            block = slice(start, start + _BLOCK)
            multiply("dX of a block", g[:, block].to(wide), self.weight[block].to(wide), result)
        return result.to(g.dtype)


def _column_sums(g: Tensor, scale: Tensor | None) -> Tensor:
    """Sum over the rows of g `[n, V]`, each times its `scale` `[n]` if there is one, in fp32 or fp64: `[V]`."""
    wide = stats_dtype(g.dtype)
    if scale is None and (g.dtype == wide or not devices.on_cpu(g.device)):
        return g.sum(0, dtype=wide)
    # Block by block: torch would widen all of g first.
    step = max(1, block_elements(g.device) // max(1, g.shape[0]))
    blocks = (g[:, start : start + step].to(wide) for start in range(0, g.shape[1], step))
    return torch.cat([block.sum(0) if scale is None else scale.to(wide) @ block for block in blocks])


class WeightGrad:
    """dW = sum over chunks of g^T x, `[V, H]`, and db = sum of g: one product, or fp32 sums of one for each chunk."""

    def __init__(self, head: Head, weight: bool, bias: bool, chunks: int):
        self.head, self.with_weight, self.with_bias = head, weight, bias
        self.single = chunks <= 1
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, g: Tensor, x: Tensor, bias_scale: Tensor | None = None, weight_scale: Tensor | None = None) -> None:
        """Add a chunk: g `[n, V]`, x `[n, H]`.

        fp16 only: the rows of g times `bias_scale` `[n]` are the gradient, and dW is to be multiplied by
        `weight_scale` `[]`, which the rows of x leave over.
        """
        if self.with_bias:
            db = _column_sums(g, bias_scale)
            self.bias = db if self.bias is None else self.bias.add_(db)
        if not self.with_weight:
            return
        x = x.to(g.dtype)
        wide = stats_dtype(g.dtype)
        if weight_scale is not None:
            self._add_scaled(g, x, weight_scale)
        elif self.single and widens_backward(g.device, g.dtype) and not _own_gemm("dW", g):
            self.weight = empty(self.head.weight.shape, g.dtype, g.device)
            x = x.to(wide)
            for start in range(0, self.head.vocab, _BLOCK):
                rows = self.weight[start : start + _BLOCK]
                wide_block = g[:, start : start + _BLOCK].to(wide)
                rows.copy_(multiply("dW", wide_block.t(), x, torch.empty(rows.shape, dtype=wide)))
        elif self.single or (self.weight is None and g.dtype == wide):
            self.weight = multiply("dW", g.t(), x, empty(self.head.weight.shape, g.dtype, g.device))
        elif g.dtype == wide:
            assert self.weight is not None
            multiply("dW of a chunk", g.t(), x, self.weight)
        else:
            if self.weight is None:
                self.weight = torch.zeros(self.head.weight.shape, dtype=wide, device=g.device)
            if not devices.on_cpu(g.device):
                _multiply_wide(g.t(), x, self.weight, add=True)
            elif _own_gemm("dW of a chunk", g):
                _show_product(g.t(), x)
                cpu.gemm("dW of a chunk", g.t(), x, self.weight)
            else:
                x = x.to(wide)
                for start in range(0, self.head.vocab, _BLOCK):
                    rows = self.weight[start : start + _BLOCK]
                    multiply("dW of a chunk", g[:, start : start + _BLOCK].to(wide).t(), x, rows)

    def _add_scaled(self, g: Tensor, x: Tensor, scale: Tensor) -> None:
        if self.weight is None:
            self.weight = torch.zeros(self.head.weight.shape, dtype=torch.float32, device=g.device)
        for start in range(0, self.head.vocab, _BLOCK):
            rows = self.weight[start : start + _BLOCK]
            part = _multiply_wide(g[:, start : start + _BLOCK].t(), x, torch.empty_like(rows))
            rows.add_(part.mul_(scale))

    def result(
        self, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """dW and db in the dtypes of the parameters; zeros when no chunk was added."""
        w, b = self.weight, self.bias
        if self.with_weight and w is None:
            w = torch.zeros(self.head.weight.shape, dtype=weight_dtype, device=self.head.weight.device)
        if self.with_bias and b is None:
            b = torch.zeros(self.head.vocab, dtype=bias_dtype, device=self.head.weight.device)
        return (None if w is None else w.to(weight_dtype)), (None if b is None else b.to(bias_dtype))
