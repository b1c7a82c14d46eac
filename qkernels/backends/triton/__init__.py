"""Row operations as Triton kernels: one file per operation, its launch beside it. See `qkernels.ops` for contracts."""
from .row_stats_kernel import row_stats
