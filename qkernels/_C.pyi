"""The compiled extension: operations on raw addresses. See csrc/bindings.cpp."""

_Shape = tuple[int, ...]  # outer, inner, vocab
_View = tuple[int, int, int, int]  # address, dtype code, outer stride, inner stride
_Where = tuple[int, int, int, int]  # device, stream, splits, scratch

HAS_CUDA: bool
# The rest is there only where HAS_CUDA.
CUDA_VERSION: str
CUDA_ARCHITECTURES: str
CUDA_MAX_SPLITS: int
CUDA_PARTIAL_BYTES: int

def cuda_unavailable(device: int) -> str: ...
def cuda_row_stats(
    *,
    shape: _Shape,
    policy: _View,
    reference: _View,
    labels: int,
    ignore_index: int,
    temperature: float,
    fields: int,
    out: int,
    where: _Where,
) -> None: ...
def cuda_row_grad(
    *,
    shape: _Shape,
    policy: _View,
    reference: _View,
    labels: int,
    ignore_index: int,
    temperature: float,
    softmax: int,
    reference_softmax: int,
    coefficients: int,
    coefficient_count: int,
    upstream: int,
    out: _View,
    where: _Where,
) -> None: ...
def cuda_pair_loss(
    *,
    sequences: int,
    length: int,
    rows: int,
    offsets: int,
    labels: int,
    ignore_index: int,
    weights: int,
    logps: int,
    reference: int,
    per_sequence: bool,
    beta: float,
    label_smoothing: float,
    loss: int,
    rewards: int,
    grad: int,
    tokens: int,
    where: _Where,
) -> None: ...
def row_stats(
    *,
    shape: _Shape,
    policy: _View,
    reference: _View,
    labels: int,
    ignore_index: int,
    temperature: float,
    fields: int,
    out: int,
    threads: int,
) -> int: ...
def row_grad(
    *,
    shape: _Shape,
    policy: _View,
    reference: _View,
    labels: int,
    ignore_index: int,
    temperature: float,
    softmax: int,
    reference_softmax: int,
    coefficients: int,
    coefficient_count: int,
    upstream: int,
    out: _View,
    out_is_zero: bool,
    threads: int,
) -> None: ...
def pair_loss(
    *,
    sequences: int,
    length: int,
    rows: int,
    offsets: int,
    labels: int,
    ignore_index: int,
    weights: int,
    logps: int,
    reference: int,
    per_sequence: bool,
    beta: float,
    label_smoothing: float,
    loss: int,
    rewards: int,
    grad: int,
    tokens: int,
) -> None: ...
def gemm(
    *,
    rows: int,
    columns: int,
    depth: int,
    in_type: int,
    left: tuple[int, int, bool],
    right: tuple[int, int, bool],
    bias: int,
    out: int,
    out_type: int,
    out_stride: int,
    accumulate: bool,
    threads: int,
) -> None: ...
def gemm_kernel(
    in_type: int, left_depth_first: bool, right_depth_first: bool, out_type: int, accumulate: bool
) -> str: ...
def gemm_depth_group(in_type: int) -> int: ...
def amx_unavailable() -> str: ...
def cpu_vendor() -> str: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> bool: ...
def use_own_threads() -> None: ...
def thread_source() -> str: ...
def field_names() -> list[str]: ...
def coefficient_names() -> list[str]: ...
def compiler() -> str: ...
