// row_stats: all per-row results of one or two models, in one read of their logits.
//
// Maths. core/softmax.h; online_softmax.h for what one thread accumulates.
//
// Blocks. One block of 128 threads per row; two where log-probs of both models are asked for but no divergence (one
// block per model, in the same launch where their types agree). Divergences take one block per row, which reads both
// models' rows jointly. Few rows are split into pieces, whose sums go to a scratch buffer of the caller (empty sums of
// rows that are not read); a second kernel adds them up in order and finishes the row. No atomics: the same bits from
// run to run.
//
// Memory traffic. Each logit is read once, by 128-bit loads whatever V, strides and addresses are, and is evicted first
// from the caches; the label's logit is read once more. Rows whose label is ignored or outside of the vocabulary are
// not read. Written: 4 bytes per field and row, each by one block. If the rows of the two models differ in type or in
// alignment modulo 16 bytes, one kernel for all types and alignments (AnyRow) reads them jointly, by 128-bit loads as
// well.
//
// Aliasing. Nothing that is written is read, except the scratch buffer by the second kernel.
//
// Numerics. Per element fp32, per row fp64. exp2((z - m) k), never exp2(z k - m k): the difference of two close numbers
// is exact, so a common offset of the logits costs nothing. ex2.approx errs by 2^-22 at most, of either sign.
#pragma once

#include "block_reduce.cuh"
#include "finish_row.h"
#include "launch.cuh"

namespace qk {
namespace cuda {

enum class Reads {
  kOne,          // one row of one model
  kBothJointly,  // the rows of both models, of the same type and alignment
  kAnyJointly    // the rows of both models, of any types and alignments
};

// Blocks per SM for which `__launch_bounds__` leaves registers. An H200 needs 26 KiB in flight per SM; a thread has at
// most four 128-bit loads of each model in flight, half of that on average.
constexpr int blocks_of(Reads reads) { return (reads == Reads::kOne ? 8 : 6) * 128 / kThreads; }

// Whether the label of a row is ignored or outside of the vocabulary. Such a row is not read: all of its fields are 0
// or NaN. Of the blocks that work on the row (one per piece and model, in either kernel) the one with `writes` stores
// them.
__device__ __forceinline__ bool write_ignored_or_invalid(const StatsCall& call, int64_t row, bool writes) {
  const int64_t label = call.labels.data[row];
  if (label >= 0 && label < call.shape.vocab && label != call.labels.ignore_index) return false;
  const float value = label == call.labels.ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  if (writes && threadIdx.x < __popc(call.fields)) call.out[threadIdx.x * call.shape.rows() + row] = value;
  return true;
}

// `models`: blocks per piece. `of_reference`: with one block per piece, that it reads the reference's row only.
template <class T, Gather kGather, Reads kReads>
__global__ void __launch_bounds__(kThreads, blocks_of(kReads))
    row_stats_kernel(const __grid_constant__ StatsCall call, Split split, int models, bool of_reference,
                     PartialSums* scratch) {
  constexpr bool kPair = kReads != Reads::kOne;
  unsigned block = blockIdx.x;
  if (models == 2) {
    of_reference = block % 2;
    block /= 2;
  }
  const int64_t row = block / static_cast<unsigned>(split.count);
  const int piece = static_cast<int>(block % static_cast<unsigned>(split.count));
  PartialSums* to = scratch ? scratch + static_cast<int64_t>(block) * models + of_reference * (models - 1) : nullptr;
  if (write_ignored_or_invalid(call, row, !scratch && !of_reference)) {
    if (scratch && threadIdx.x == 0) *to = PartialSums();
    return;
  }
  const int start = split.start(piece), n = split.length(piece, call.shape.vocab);
  const int label = static_cast<int>(call.labels.data[row]) - start;
  const double log2e_per_temperature = quotient(kLog2e, call.temperature);
  const float scale = static_cast<float>(log2e_per_temperature);
  ThreadRowSums sums;
  if constexpr (kReads == Reads::kAnyJointly) {
    auto any = [&](const Rows& rows) {
      const int64_t size = rows.dtype == DType::kFloat32 ? 4 : 2;
      return AnyRow{static_cast<const char*>(rows.data) + (offset_of(rows, call.shape, row) + start) * size,
                    rows.dtype};
    };
    accumulate_row<kGather, true>(any(call.policy), any(call.reference), n, label, scale, threadIdx.x, sums);
  } else {
    const AlignedRow<T> policy = {row_of<T>(of_reference ? call.reference : call.policy, call.shape, row) + start};
    const AlignedRow<T> reference = {kPair ? row_of<T>(call.reference, call.shape, row) + start : nullptr};
    accumulate_row<kGather, kPair>(policy, reference, n, label, scale, threadIdx.x, sums);
  }
  // On their way while the threads' sums are added; the kernel for all types has no registers for them then.
  constexpr bool kEarly = kReads != Reads::kAnyJointly;
  LabelLogits at_label;
  if (kEarly && !scratch && threadIdx.x == 0) at_label = load_label_logits<kPair>(call, row, of_reference);
  const PartialSums total =
      add_block<kGather, kPair, kThreads>(partial_sums(sums, log2e_per_temperature), log2e_per_temperature);
  if (threadIdx.x != 0) return;
  if (scratch) {
    *to = total;
    return;
  }
  if (!kEarly) at_label = load_label_logits<kPair>(call, row, of_reference);
  finish_row<fields_of(kGather, kPair)>(call, row, at_label, total, of_reference);
}

template <class T, Gather kGather, Reads kReads>
void launch_stats(const StatsCall& call, const Launch& where, const Split& split, int models, bool of_reference) {
  launch("row_stats", row_stats_kernel<T, kGather, kReads>, call.shape.rows() * split.count * models, kThreads, where,
         call, split, models, of_reference, split.count > 1 ? static_cast<PartialSums*>(where.scratch) : nullptr);
}

// Defined in a file each, so that they compile in parallel.
void launch_stats_one(const StatsCall&, const Launch&, const Split&, Gather, int models, bool of_reference);
void launch_stats_both(const StatsCall&, const Launch&, const Split&, Gather);
void launch_stats_any(const StatsCall&, const Launch&, const Split&);

}  // namespace cuda
}  // namespace qk
