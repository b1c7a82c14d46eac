// The row kernels of one instruction set, as a table; `cpu.cpp` picks a table at run time.
#pragma once

#include "../core/calls.h"
#include "../core/fields.h"

namespace qk {

// A row is read in blocks that stay in the L1 cache (8 KiB of fp32) and cut into segments of 16 blocks. Segments
// are summed apart and merged in order, whether one thread or several read the row: the bits do not depend on it.
constexpr int64_t kBlock = 2048;
constexpr int64_t kSegment = 16 * kBlock;

inline int64_t segments_of(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

struct RowKernels {
  const char* name;
  // Sums of one segment of one row.
  void (*sum_segment)(const StatsCall&, int64_t row, int64_t segment, RowSums*);
  // Fields of a row from its merged sums.
  void (*finish_row)(const StatsCall&, int64_t row, const RowSums&);
  // Gradient of one segment of one row.
  void (*grad_segment)(const GradCall&, int64_t row, int64_t segment);
};

// Null where this build does not have the instruction set.
const RowKernels* baseline_kernels();
const RowKernels* avx2_kernels();
const RowKernels* avx512_kernels();
const RowKernels* avx512_bf16_kernels();

}  // namespace qk
