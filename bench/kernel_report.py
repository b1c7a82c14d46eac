"""What the GPU kernels became: registers, spills, load widths and instructions, read from their machine code.

    python -m bench.kernel_report                          print the table
    python -m bench.kernel_report --write                  write it to bench/results/machine-code.md, the estimates to
                                                           kernel-estimates.md beside it, and what they come to in
                                                           docs/kernels.md between the markers

Needs no GPU. Every variant of the Triton kernels is compiled ahead of time, for NVIDIA and for AMD, where triton is
installed; the CUDA kernels (csrc/cuda) are compiled to cubins where there is an nvcc. Machine code for NVIDIA is read
with cuobjdump and nvdisasm, of the CUDA toolkit or of the triton wheel. The estimates are
those of `kernel_estimate`, no measurements.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import kernel_estimate
from .kernel_estimate import NEAR, Estimate, Kernel, Work

ROWS, VOCAB = 8192, 128256
# What estimates are printed for: rows, and the vocabularies of Llama 2, SmolLM2, Llama 3, Qwen 2.5, Qwen 3.5, Gemma 3.
BATCHES, VOCABULARIES = (16, 512, 8192), (32000, 49152, 128256, 151936, 248320, 262144)
MOST_SPLITS = 64  # kMaxSplits of csrc/cuda/cuda.h

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"
# Targets that are not in the table; the tests compile for them where the compilers know them.
NEWER, NEWER_AMD = ("sm_103", "sm_120"), "gfx950"
BEGIN, END = "<!-- kernel_report: begin -->", "<!-- kernel_report: end -->"
DETAILS, ESTIMATES = Path("bench/results/machine-code.md"), Path("bench/results/kernel-estimates.md")
PAGE = Path("docs/kernels.md")

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Variant:
    """A kernel as one kind of call compiles it.

    name: what the call does.
    kernel: "row_stats", "combine", "row_grad" or "pair_loss".
    dtype, reference: element types of the two models' logits; no reference read if `reference` is "".
    flags: the compile-time parameters that differ from call to call.
    gradient: element type that the kernel writes for each logit; "" if it does not.
    registers: the most registers per thread that the planned occupancy allows on sm_90 and sm_100 (see `PLAN`).
    symbol: of a CUDA kernel, what its mangled name begins with (a regular expression); "" for Triton's.
    """

    name: str
    kernel: str
    dtype: str = "bf16"
    reference: str = ""
    flags: tuple[tuple[str, Any], ...] = ()
    gradient: str = ""
    registers: int = 255
    symbol: str = ""

    @property
    def compiler(self) -> str:
        """Who compiles it: "CUDA" or "Triton"."""
        return "CUDA" if self.symbol else "Triton"

    @property
    def bytes_per_logit(self) -> int:
        """Bytes moved per entry of a policy row."""
        return sum(_SIZES[dtype] for dtype in (self.dtype, self.reference, self.gradient) if dtype)


# 65536 registers per processor and 128 threads per program: what a number of registers leaves (they are granted in
# steps of 8). At 4.3 TB/s and 800 ns of latency, 26 KiB have to be under way per processor of an H200. A thread has up
# to four 16-byte loads under way, on average half of that, so 7 programs (28 KiB) are enough and 9 leave room; that is
# the plan for what runs at the speed of the memory. All fields of two models are bound by their instructions, 6 will
# do, and 5 for loads of 2 bytes, which do not reach the memory's speed anyway. An A100 (sm_80) needs 13 KiB: 5
# programs. How many registers a kernel takes within the plan is up to ptxas, and differs between the ones that come
# with triton 3.6, 3.7 and 3.9: on sm_90 52, 52 and 39 for the gradient of log-probs, and 48, 62 and 48 for five
# coefficients. These are planned with 64, for 8 programs (32 KiB under way): they only run for losses that
# differentiate an entropy or a divergence.
PLAN = {56: 9, 64: 8, 72: 7, 80: 6, 96: 5}
SM_80_REGISTERS = 96


def _stats(name: str, registers: int, dtype: str = "bf16", reference: str = "", **flags: Any) -> Variant:
    return Variant(name, "row_stats", dtype, reference, tuple(flags.items()), "", registers)


def _grad(
    name: str, registers: int, dtype: str = "bf16", reference: str = "", gradient: str = "", **flags: Any
) -> Variant:
    return Variant(name, "row_grad", dtype, reference, tuple(flags.items()), gradient or dtype, registers)


VARIANTS: tuple[Variant, ...] = (
    _stats("log-probs", 56),
    _stats("log-probs, fp32", 56, "fp32"),
    _stats("log-probs, fp16", 56, "fp16"),
    _stats("log-probs, split rows", 56, SPLIT=True),
    _stats("with entropy", 56, ENTROPY=True),
    _stats("all fields without reference", 64, ENTROPY=True, EXTRAS=True),
    _stats("all fields without reference, fp32", 64, "fp32", ENTROPY=True, EXTRAS=True),
    _stats("log-probs of both models", 56, reference="bf16", REFERENCE=1),
    _stats("with KLs", 72, reference="bf16", REFERENCE=2),
    _stats("all fields", 80, reference="bf16", REFERENCE=2, ENTROPY=True, EXTRAS=True),
    _stats("all fields, fp32", 80, "fp32", "fp32", REFERENCE=2, ENTROPY=True, EXTRAS=True),
    _stats("with KLs, fp32", 72, "fp32", "fp32", REFERENCE=2),
    _stats("with KLs, fp32 reference", 72, reference="fp32", REFERENCE=2),
    _stats("with KLs, reference aligned otherwise", 96, reference="bf16", REFERENCE=2, ALIGNED=False),
    Variant("combine split rows", "combine", reference="bf16", flags=(("REFERENCE", 2), ("ENTROPY", True))),
    _grad("gradient of log-probs", 56),
    _grad("gradient of log-probs, fp32", 56, "fp32"),
    _grad("gradient of log-probs, fp16", 56, "fp16"),
    _grad("gradient of log-probs, fp32 to bf16", 56, "fp32", gradient="bf16"),
    _grad("gradient, five coefficients", 64, FULL=True),
    _grad("gradient with KLs", 72, reference="bf16", FULL=True, WITH_REFERENCE=True),
    _grad("gradient with KLs, fp32", 72, "fp32", "fp32", FULL=True, WITH_REFERENCE=True),
    _grad("gradient with KLs, fp32 to bf16", 72, "fp32", "fp32", "bf16", FULL=True, WITH_REFERENCE=True),
    _grad("gradient of log-probs, input aligned otherwise", 56, ALIGNED=False),
    Variant("pair loss", "pair_loss", "fp32", flags=(("PACKED", True),)),
)


# Of CUDA kernels: threads of a block, and `__launch_bounds__` as registers. 65536 registers and 128 threads per block
# leave room for 8 blocks of 64 registers, or 6 of 80. A thread has four 16-byte loads of each stream under way, half of
# that on average: 32 KiB per processor for one stream and 48 KiB for two, of the 26 KiB that an H200 needs.
CUDA_THREADS = 128
CUDA_PLAN = {64: 8, 80: 6}
# Entries per trip of a kernel for any types, whose loop holds the loads of each of them.
ANY_ELEMENTS = 16
_MANGLED = {"fp32": "f", "bf16": "NS_8BFloat16E", "fp16": "NS_7Float16E", "any": "v"}


def _cuda_stats(
    name: str, registers: int, gather: int, reads: int, dtype: str = "bf16", reference: str = ""
) -> Variant:
    typed = _MANGLED["any" if reads == 2 else dtype]
    symbol = rf"_ZN2qk4cuda16row_stats_kernelI{typed}LNS_6GatherE{gather}ELNS0_5ReadsE{reads}EE"
    flags = (("elements", ANY_ELEMENTS),) if reads == 2 else ()
    return Variant(name, "row_stats", dtype, reference, flags, "", registers, symbol)


def _cuda_grad(
    name: str, registers: int, form: int, dtype: str = "bf16", reference: str = "", gradient: str = "",
    any: bool = False,
) -> Variant:  # fmt: skip
    typed, written = _MANGLED["any" if any else dtype], gradient or dtype
    # The second type's name repeats the first one's: of a class as a reference to what was named before.
    second = _MANGLED[written] if written != dtype else typed if len(typed) == 1 else r"S\d*_"
    symbol = rf"_ZN2qk4cuda\w*15row_grad_kernelI{typed}{second}LNS0_4FormE{form}EE"
    flags = (("elements", ANY_ELEMENTS),) if any else ()
    return Variant(name, "row_grad", dtype, reference, flags, written, registers, symbol)


CUDA_VARIANTS: tuple[Variant, ...] = (
    _cuda_stats("log-probs", 64, 0, 0),
    _cuda_stats("log-probs, fp32", 64, 0, 0, "fp32"),
    _cuda_stats("log-probs, fp16", 64, 0, 0, "fp16"),
    _cuda_stats("with entropy", 64, 1, 0),
    _cuda_stats("all fields without reference", 64, 2, 0),
    _cuda_stats("with KLs", 80, 1, 1, reference="bf16"),
    _cuda_stats("with KLs, fp32", 80, 1, 1, "fp32", "fp32"),
    _cuda_stats("all fields", 80, 2, 1, reference="bf16"),
    _cuda_stats("all fields, any types and alignments", 80, 2, 2, reference="bf16"),
    Variant("combine split rows", "combine", symbol=r"_ZN2qk4cuda\w*14combine_kernelILNS_6GatherE2ELb1EE"),
    _cuda_grad("gradient of log-probs", 64, 0),
    _cuda_grad("gradient of log-probs, fp32", 64, 0, "fp32"),
    _cuda_grad("gradient of log-probs, fp16", 64, 0, "fp16"),
    _cuda_grad("gradient of log-probs, fp32 to bf16", 64, 0, "fp32", gradient="bf16"),
    _cuda_grad("gradient of log-probs, fp32 to fp16", 64, 0, "fp32", gradient="fp16"),
    _cuda_grad("gradient, five coefficients", 64, 1),
    _cuda_grad("gradient with KLs", 80, 2, reference="bf16"),
    _cuda_grad("gradient with KLs, fp32", 80, 2, "fp32", "fp32"),
    _cuda_grad("gradient with KLs, fp32 to bf16", 80, 2, "fp32", "fp32", "bf16"),
    _cuda_grad("gradient, any types and alignments", 80, 2, reference="bf16", any=True),
    Variant("pair loss", "pair_loss", "fp32", symbol=r"_ZN2qk4cuda\w*16pair_loss_kernel"),
)


@dataclass
class Loop:
    """The innermost loop that moves the most bytes: per trip of one thread.

    elements: entries of the policy's row.
    instructions, exponentials: machine instructions, and those of them that are EX2.
    loads, stores: width in bytes -> how many.
    """

    elements: float = 0
    instructions: int = 0
    exponentials: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements if self.elements else 0.0


@dataclass
class Facts:
    """What was read from the machine code of one compiled kernel."""

    registers: int
    stack: int
    spills: int
    shared: int
    loop: Loop


def unavailable(compiler: str) -> str | None:
    """Why there is nothing to report about the kernels of "Triton" or "CUDA" here; None if there is."""
    if compiler == "CUDA":
        if _nvcc() is None:
            return "there is no nvcc"
        if not SOURCES.is_dir():
            return "csrc/ lies in the source tree only"
    else:
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        from qkernels.backends.triton import common

        if common.INTERPRETED:
            return "TRITON_INTERPRET=1 replaces the compiler by an interpreter"
    missing = [name for name in ("cuobjdump", "nvdisasm") if _tool(name) is None]
    return f"there is no {' and no '.join(missing)}, nor a triton that brings them" if missing else None


SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, or the copy of it in the triton wheel: the newer toolkit reads more targets."""
    found = [shutil.which(name), shutil.which(f"/usr/local/cuda/bin/{name}")]
    if spec := importlib.util.find_spec("triton"):
        assert spec.origin is not None
        found.append(shutil.which(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)))
    return next(filter(None, found), None)


def unknown(compiler: str, architecture: str) -> str | None:
    """Why the compiler at hand does not compile for a target; None if it does."""
    if compiler == "CUDA":
        listed = _run_tool([str(_nvcc()), "--list-gpu-code"]).split()
        return None if architecture in listed else f"this nvcc compiles for {', '.join(listed)}"
    from triton.backends import amd, nvidia

    if not architecture.startswith("sm_"):
        named = "".join(path.read_text(encoding="utf-8") for path in Path(amd.__file__).parent.glob("*.py"))
        return None if re.search(rf"\b{architecture}\b", named) else "this triton does not name it"
    bundled = Path(nvidia.__file__).parent / "bin"
    newest = bundled / "ptxas-blackwell"
    ptxas = newest if int(architecture[3:]) >= 100 and newest.exists() else bundled / "ptxas"
    return None if architecture in _run_tool([str(ptxas), "--help"]) else "this triton's ptxas does not list it"


def _run_tool(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def source_of(variant: Variant, architecture: str) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """The kernel function, its signature, compile-time values and options, as the launch would choose them."""
    from qkernels.backends.triton import common, pair_loss_kernel, row_grad_kernel, row_stats_kernel

    flags = dict(variant.flags)
    vector = 16 // min(_SIZES[dtype] for dtype in (variant.dtype, variant.reference, variant.gradient) if dtype)
    tile = {"LANES": common.WARPS * _target(architecture).warp_size, "VEC": vector}
    pointers = {"logits": variant.dtype, "reference": variant.reference or variant.dtype, "labels": "i64"}
    options = common.OPTIONS
    if variant.kernel in ("row_stats", "combine"):
        accumulated = {"REFERENCE": 0, "ENTROPY": False, "EXTRAS": False}
        values = {**accumulated, **flags}
        pointers |= {"out": "fp32", "partial": "fp32"}
        if variant.kernel == "combine":
            function, options = row_stats_kernel.combine_kernel, common.COMBINE
            values |= {"MAX_SPLITS": common.MAX_SPLITS}
        else:
            function = row_stats_kernel.row_stats_kernel
            values = {"ALIGNED": True, "SPLIT": False, **values, **tile, "R_VEC": vector}
            values["UNROLL"] = row_stats_kernel.UNROLL[values["REFERENCE"]]
    elif variant.kernel == "row_grad":
        function = row_grad_kernel.row_grad_kernel
        values = {"FULL": False, "SCALED": True, "WITH_REFERENCE": False, "ALIGNED": True, "R_ALIGNED": True}
        values |= {**flags, **tile}
        values["UNROLL"] = row_grad_kernel.UNROLL[values["WITH_REFERENCE"]]
        pointers |= {"out": variant.gradient}
        pointers |= dict.fromkeys(("softmax", "r_softmax", "coefficients", "upstream"), "fp32")
    else:
        function, options = pair_loss_kernel.pair_loss_kernel, pair_loss_kernel.OPTIONS
        values = {"REFERENCE": 1, "WEIGHTED": False, "PACKED": False, **flags}
        values |= {name: getattr(pair_loss_kernel, name) for name in ("BLOCK", "PAIRS", "TOKENS")}
        pointers = dict.fromkeys(("logps", "reference", "weights", "loss", "rewards", "grad", "tokens"), "fp32")
        pointers |= {"offsets": "i32", "labels": "i64"}
    signature = {}
    for parameter in function.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        elif parameter.name in pointers:
            signature[parameter.name] = f"*{pointers[parameter.name]}"
        else:
            signature[parameter.name] = parameter.annotation_type
    return function, signature, values, options


def planned_registers(variant: Variant, architecture: str) -> int:
    """The most registers per thread that the planned occupancy allows."""
    if variant.compiler == "CUDA":
        return variant.registers
    return max(variant.registers, SM_80_REGISTERS) if architecture == "sm_80" else variant.registers


@functools.cache
def compiled(variant: Variant, architecture: str) -> Any:
    """The variant, compiled; no hint about divisibility of any argument is given, as in a launch."""
    import triton
    from triton.compiler import ASTSource

    function, signature, values, options = source_of(variant, architecture)
    names = list(signature)
    source = ASTSource(
        fn=function, signature=signature, constexprs={(names.index(name),): value for name, value in values.items()}
    )
    return triton.compile(source, target=_target(architecture), options=dict(options))


@functools.cache
def facts(variant: Variant, architecture: str) -> Facts:
    """What the machine code says."""
    element = _SIZES[variant.dtype] + (_SIZES[variant.reference] if variant.reference else 0)
    if variant.kernel == "row_stats" and dict(variant.flags).get("REFERENCE") == 1:
        element = _SIZES[variant.dtype]  # each model by itself: the loop walks one row
    if variant.compiler == "CUDA":
        matching = [code for name, code in _cuda_code(architecture).items() if re.match(variant.symbol, name)]
        if len(matching) != 1:
            raise RuntimeError(f"{len(matching)} kernels are named {variant.symbol}")
        found = _nvidia_facts(*matching[0], element)
        found.loop.elements = dict(variant.flags).get("elements", found.loop.elements)
        return found
    kernel = compiled(variant, architecture)
    if not architecture.startswith("sm_"):
        return _amd_facts(kernel, element)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (code,) = _read_cubin(file.name).values()
    return _nvidia_facts(*code, element, kernel.metadata.shared)


@functools.cache
def _cuda_code(architecture: str) -> dict[str, tuple[str, str]]:
    """Every kernel of csrc/cuda by its mangled name: resource usage and assembly. Compiled as the build does.

    It takes half a minute, so the cubins of these sources, this compiler and this target are kept in build/.
    """
    nvcc = _nvcc()
    assert nvcc is not None
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch={architecture}", "-cubin"]
    digest = hashlib.sha256(_run_tool([nvcc, "--version"]).encode() + " ".join(flags).encode())
    for path in sorted(path for folder in ("cuda", "core") for path in (SOURCES.parent / folder).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    kept = SOURCES.parents[1] / "build" / "cubins" / f"{architecture}-{digest.hexdigest()[:16]}"
    kept.mkdir(parents=True, exist_ok=True)
    found = {}
    for source in sorted(SOURCES.glob("*.cu")):
        cubin = kept / f"{source.stem}.cubin"
        if not cubin.exists():
            with tempfile.TemporaryDirectory(dir=kept) as part:  # several processes may do the same
                made = Path(part, cubin.name)
                subprocess.run([nvcc, *flags, "-o", str(made), str(source)], check=True)
                made.replace(cubin)
        found |= _read_cubin(str(cubin))
    return found


def _read_cubin(path: str) -> dict[str, tuple[str, str]]:
    """The kernels of a cubin by name: what cuobjdump says of their resources, and their assembly."""
    usage = dict(re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", _run("cuobjdump", "--dump-resource-usage", path)))
    found = {}
    for section in re.split(r"(?m)^\s*\.section\s+", _run("nvdisasm", "-c", path)):
        name = re.match(r"\.text\.([^\s,]+)", section)
        if name and name[1] in usage:
            found[name[1]] = (usage[name[1]], section)
    return found


def _nvidia_facts(usage: str, assembly: str, element: int, shared: int | None = None) -> Facts:
    """`shared`: bytes of shared memory, where the machine code does not say (Triton's is dynamic)."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump names no registers:\n{usage}")
    instructions, labels = [], {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loop = _main_loop(instructions, labels, r"\bBRA\b.*?(\.L_x_\d+)", _nvidia_width, "EX2", element)
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", instruction)) for instruction in instructions)
    return Facts(int(found[1]), int(found[2]), spills, int(found[3]) if shared is None else shared, loop)


def _nvidia_width(instruction: str) -> tuple[str, int] | None:
    """Whether an instruction loads or stores global memory, and how many bytes."""
    found = re.search(r"\b(LDGSTS|LDG|STG)\.E([A-Z0-9.]*)", instruction)
    if not found:
        return None
    width = re.search(r"\.(128|64|U16|S16|U8|S8)", found[2])
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return "stores" if found[1] == "STG" else "loads", sizes[width[1]] if width else 4


def _amd_facts(kernel: Any, element: int) -> Facts:
    assembly = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        if not found:
            raise RuntimeError(f"no {pattern} in the AMD assembly")
        return int(found[1])

    instructions, labels = [], {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+([vs]_|global_|buffer_|ds_)(.*)", line):
            instructions.append(instruction[1] + instruction[2])
    loop = _main_loop(instructions, labels, r"s_c?branch\w*\s+(\.LBB\d+_\d+)", _amd_width, "v_exp_f32", element)
    spills = number(r"\.vgpr_spill_count:\s*(\d+)") + number(r"\.sgpr_spill_count:\s*(\d+)")
    return Facts(
        number(r"\.vgpr_count:\s*(\d+)"), number(r"\.private_segment_fixed_size:\s*(\d+)"), spills,
        kernel.metadata.shared, loop,
    )  # fmt: skip


def _amd_width(instruction: str) -> tuple[str, int] | None:
    found = re.match(r"(?:global|buffer)_(load|store)_(\w+)", instruction)
    if not found:
        return None
    for name, size in (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4), ("short", 2), ("byte", 1)):
        if name in found[2]:
            return f"{found[1]}s", size
    return None


def _main_loop(
    instructions: list[str], labels: dict[str, int], branch: str, width: Any, exp: str, element: int
) -> Loop:
    """The innermost loop whose trip loads the most bytes."""
    spans = []
    for end, instruction in enumerate(instructions):
        target = re.search(branch, instruction)
        if target and labels.get(target[1], end + 1) <= end:
            spans.append((labels[target[1]], end + 1))
    innermost = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    best, most = Loop(), 0
    for start, end in innermost:
        body = instructions[start:end]
        loop = Loop(instructions=len(body), exponentials=sum(exp in instruction for instruction in body))
        for instruction in body:
            if access := width(instruction):
                counts = getattr(loop, access[0])
                counts[access[1]] = counts.get(access[1], 0) + 1
        loaded = sum(size * count for size, count in loop.loads.items())
        loop.elements = loaded / element
        if loaded > most:
            best, most = loop, loaded
    return best


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_tool(tool)), *arguments], capture_output=True, text=True, check=True).stdout


def kernel_of(variant: Variant, architecture: str = "sm_90") -> Kernel:
    """What `kernel_estimate` needs to know of a row kernel."""
    found = facts(variant, architecture)
    if variant.compiler == "CUDA":
        threads = CUDA_THREADS
    else:
        from qkernels.backends.triton import common

        threads = 32 * common.OPTIONS["num_warps"]
    loads = sum(size * count for size, count in found.loop.loads.items())
    kernel = Kernel(threads, found.registers, found.shared, loads, found.loop.per_element)
    counted = kernel_estimate.counts().get(variant.compiler, {})
    if variant.name not in counted or architecture != "sm_90":
        return kernel
    own, whole, split = (counted[name] for name in (variant.name, "log-probs", "log-probs, split rows"))
    return replace(
        kernel,
        ptx_per_entry=own["slots_per_entry"],
        ptx_per_row=own["slots_per_row"],
        ptx_longest=own["longest_warp_per_row"],
        ptx_combine=max(0.0, split["longest_warp_per_row"] - whole["longest_warp_per_row"]),
    )


def work_of(variant: Variant, rows: int, vocab: int) -> Work:
    """A call on an H200, its rows split as the backend does."""
    from qkernels.backends.pieces import span_of

    if variant.compiler == "CUDA":
        from qkernels.backends import cuda

        splits = cuda.splits_for(rows, vocab, kernel_estimate.SMS, MOST_SPLITS)
    else:
        from qkernels.backends.triton import common

        splits = common.splits_for(rows, vocab, kernel_estimate.SMS)
    span = span_of(vocab, splits)
    each_by_itself = dict(variant.flags).get("REFERENCE") == 1
    loaded = _SIZES[variant.dtype] + (_SIZES[variant.reference] if variant.reference and not each_by_itself else 0)
    moved = loaded if each_by_itself else variant.bytes_per_logit
    pieces = -(-vocab // span)
    combined = variant.kernel == "row_stats"
    return Work(rows, vocab, moved, loaded, pieces, span if pieces > 1 else 0, 2 if each_by_itself else 1, combined)


# What the kernels were written to reach on an H200 with bf16 logits: work, aim, the variants that do it, rows, V.
_STEP = ("log-probs", "gradient of log-probs")
AIMS: tuple[tuple[str, str, tuple[str, ...], int, int], ...] = (
    ("forward, cached reference", "0.55 ms", ("log-probs",), ROWS, VOCAB),
    ("the same with entropy", "10 % more", ("with entropy",), ROWS, VOCAB),
    ("forward with reference logits", "1.1 ms", ("log-probs", "log-probs"), ROWS, VOCAB),
    ("the same with KLs", "", ("with KLs",), ROWS, VOCAB),
    ("backward in place", "1.05 ms", ("gradient of log-probs",), ROWS, VOCAB),
    ("loss and gradient, cached reference", "1.6 ms", _STEP, ROWS, VOCAB),
    ("the same at V = 128257", "5 % more", _STEP, ROWS, VOCAB + 1),
    ("forward, 16 rows", "3 x the copy", ("log-probs",), 16, VOCAB),
)


def _named(compiler: str) -> dict[str, Variant]:
    return {variant.name: variant for variant in (*CUDA_VARIANTS, *VARIANTS) if variant.compiler == compiler}


def estimated(compiler: str, names: Sequence[str], rows: int, vocab: int) -> tuple[float, float]:
    """Milliseconds on sm_90 for variants of a compiler one after the other, and for moving their bytes alone."""
    named = _named(compiler)
    found = [kernel_estimate.estimate(kernel_of(named[name]), work_of(named[name], rows, vocab)) for name in names]
    return 1e3 * sum(each.seconds for each in found), 1e3 * sum(each.floor for each in found)


def estimates(compilers: Sequence[str]) -> dict[tuple[str, str, int, int], Estimate]:
    """(compiler, variant, rows, V) -> the estimate, of every variant whose instructions were counted."""
    found = {}
    for compiler in compilers:
        named = _named(compiler)
        for name in kernel_estimate.counts().get(compiler, {}):
            if name not in named or "split" in name:
                continue
            kernel = kernel_of(named[name])
            for rows in BATCHES:
                for vocab in VOCABULARIES:
                    work = work_of(named[name], rows, vocab)
                    found[compiler, name, rows, vocab] = kernel_estimate.estimate(kernel, work)
    return found


def estimate_tables(compilers: Sequence[str]) -> str:
    """Markdown: microseconds and the multiple of the copy, a table per number of rows."""
    found = estimates(compilers)
    lines = []
    for rows in BATCHES:
        lines += [f"## {rows} rows", "", "| kernel | compiler | " + " | ".join(f"V = {v}" for v in VOCABULARIES) + " |"]
        lines += ["|---|---|" + "--:|" * len(VOCABULARIES)]
        for compiler, name in dict.fromkeys((c, n) for c, n, *_ in found):
            each = [found[compiler, name, rows, vocab] for vocab in VOCABULARIES]
            cells = [
                f"{1e6 * e.seconds:.0f} us, {e.ratio:.2f} x{'' if e.at_the_floor else f' ({e.bound})'}" for e in each
            ]
            lines.append(f"| {name} | {compiler} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def off_the_floor(compilers: Sequence[str]) -> str:
    """A line per number of rows: how many estimates are at the memory's floor, and the farthest that are not."""
    found = estimates(compilers)
    lines = []
    for rows in BATCHES:
        here = {key: e for key, e in found.items() if key[2] == rows}
        off = sorted((e.ratio, key, e.bound) for key, e in here.items() if not e.at_the_floor)
        line = f"- {rows} rows: {len(here) - len(off)} of {len(here)} within {100 * (NEAR - 1):.0f} % of the copy"
        if off:
            shortest, (compiler, name, _, vocab), bound = off[-1]
            line += f"; farthest is {name} of {compiler} at V = {vocab}, {shortest:.2f} x, bound by {bound}"
        lines.append(line)
    return "\n".join(lines)


def aims(compilers: Sequence[str]) -> str:
    """The aims beside estimates from the machine code for sm_90, as Markdown."""
    estimates = " | ".join(f"*estimate*, ms, {name}" for name in (*compilers, "copy"))
    lines = [f"| work | aim | {estimates} |", "|---|---|" + "--:|" * (len(compilers) + 1)]
    for work, aim, names, rows, vocab in AIMS:
        found = [estimated(compiler, names, rows, vocab) for compiler in compilers]
        digits = 2 if rows == ROWS else 4
        cells = [f"{time:.{digits}f}" for time in (*(time for time, _ in found), found[0][1])]
        lines.append(f"| {' | '.join([work, aim, *cells])} |")
    return "\n".join(lines)


def _counts(widths: dict[int, int]) -> str:
    narrow = sum(count for size, count in widths.items() if size < 16)
    return f"{widths.get(16, 0)} + {narrow}"


def _in_flight(variant: Variant, architecture: str) -> str:
    return f"{kernel_of(variant, architecture).in_flight >> 10} KiB" if architecture.startswith("sm_") else ""


def table(architectures: Sequence[str], variants: Sequence[Variant]) -> str:
    """The report as Markdown."""
    lines = [
        "| kernel | compiler | target | registers | stack | spills | shared bytes | loads 16 B + narrower | stores"
        " | EX2 | instructions per element | bytes per logit | bytes in flight per SM |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for variant in variants:
        for architecture in architectures:
            if variant.compiler == "CUDA" and not architecture.startswith("sm_"):
                continue
            f = facts(variant, architecture)
            loop = f.loop
            streams = variant.kernel in ("row_stats", "row_grad")
            cells: list[object] = [
                variant.name, variant.compiler, architecture, f.registers, f.stack, f.spills, f.shared,
                _counts(loop.loads) if streams else "", _counts(loop.stores) if variant.kernel == "row_grad" else "",
                loop.exponentials if streams else "", f"{loop.per_element:.1f}" if streams else "",
                variant.bytes_per_logit if streams else "",
                _in_flight(variant, architecture) if streams else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def report(architectures: Sequence[str] = (*ARCHITECTURES, AMD)) -> str:
    """The table of all kernels that can be compiled here, and how to read it."""
    variants, compilers = [], []
    if unavailable("CUDA") is None:
        variants += CUDA_VARIANTS
        version = subprocess.run([str(_nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"V([\d.]+)", version)
        compilers.append(f"nvcc {release[1] if release else ''}")
    if unavailable("Triton") is None:
        import triton

        variants += VARIANTS
        compilers.append(f"triton {triton.__version__}")
    return (
        "# Machine code of the GPU kernels\n\nWritten by `python -m bench.kernel_report --write`.\n\n"
        f"Compiled with {' and '.join(compilers)}. Loads, stores, EX2 and instructions are those of one iteration of"
        " the main loop of one thread. Bytes in flight: half of the loads of an iteration, of as many threads as the"
        " registers, the threads and the shared memory of an SM of an H200 leave room for; it takes 26 KiB to cover"
        " 800 ns at 4.3 TB/s. Of the kernels for any types and alignments the loop holds the loads for each type, and"
        " not all of its instructions are executed.\n\n" + table(architectures, variants) + "\n"
    )


def estimates_page() -> str:
    """The estimates for all sizes, and what they rest on."""
    assumed = (
        f"{kernel_estimate.LATENCY * 1e9:.0f} ns until a load comes back from the memory and"
        f" {kernel_estimate.CACHE_LATENCY * 1e9:.0f} ns from the L2 cache, {kernel_estimate.DEPENDENT_CLOCKS} clocks"
        f" between two instructions of a warp that wait for each other and {kernel_estimate.LOOP_CLOCKS} between those"
        " of a main loop,"
        f" {kernel_estimate.NEXT_KERNEL * 1e6:.0f} us from a kernel to the one that waits for it"
    )
    return (
        "# Estimated times of the GPU kernels\n\nWritten by `python -m bench.kernel_report --write`.\n\n"
        "No measurement: the model of `bench/kernel_estimate.py` for an H200 (4.3 TB/s, 132 SMs at 1.8 GHz), in"
        " microseconds and as a multiple of a copy of the same bytes. It rests on the"
        " [machine code](machine-code.md) for sm_90, on what a row costs besides its main loop, counted by an emulator"
        f" in `instruction-counts.json` (`python -m bench.instruction_counts`), and on assumptions: {assumed}. The"
        " launch from the host is not in it. In brackets, beyond 10 % of the copy: what the time is bound by.\n\n"
        + estimate_tables(_compilers())
    )


def _compilers() -> list[str]:
    return [name for name in ("CUDA", "Triton") if unavailable(name) is None]


def summary() -> str:
    """The estimates beside the aims, and how many of all are at the memory's floor."""
    return (
        f"Estimates beside what the kernels were written to reach (N = {ROWS}, V = {VOCAB}, bf16, an H200;"
        " 'copy': the same bytes at 4.3 TB/s). They include what a row costs besides its main loop, and not the launch"
        " from the host. Times, host overhead of a launch (aim: 80 us for the whole loss on a tiny input) and other"
        " packages (aim: 1.3 x TRL's Triton kernel) can only be measured: not measured yet.\n\n"
        + aims(_compilers())
        + "\n\n"
        + "All kernels at six vocabularies from 32000 to 262144 entries, by the same model"
        + " ([table](../bench/results/kernel-estimates.md)):\n\n"
        + off_the_floor(_compilers())
    )


def write(path: Path, text: str) -> None:
    """Put `text` between the markers of a file."""
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{path} must hold the lines {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help=f"write {DETAILS}, {ESTIMATES} and the marked section of {PAGE}"
    )
    parser.add_argument("--targets", nargs="+", default=[*ARCHITECTURES, AMD], help="sm_80, sm_90, sm_100, gfx942 ...")
    options = parser.parse_args()
    reasons = {compiler: unavailable(compiler) for compiler in ("CUDA", "Triton")}
    for compiler, reason in reasons.items():
        if reason:
            print(f"nothing about the {compiler} kernels: {reason}", file=sys.stderr)
    if all(reasons.values()):
        return 1
    if options.write:
        DETAILS.write_text(report(options.targets), encoding="utf-8")
        ESTIMATES.write_text(estimates_page(), encoding="utf-8")
        write(PAGE, summary())
    else:
        print(report(options.targets), estimates_page(), summary(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
