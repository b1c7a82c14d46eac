// row_stats: every per-row number of one or two models, in one read of their logits.
//
// Maths. core/softmax.h; walk.h for what a thread sums.
//
// Blocks. One of 256 threads per row; two where log-probs of both models are asked for but no divergence (one each, in
// the same launch where their types agree). Divergences walk both rows in step. Few rows are split into pieces of a
// row, whose sums go to a scratch buffer of the caller; a second kernel adds them up in order and finishes the row. No
// atomics: the same bits from run to run.
//
// Memory traffic. Each logit is read once, 16 bytes at a time whatever V, strides and addresses are, and leaves the
// caches first; the label's logit once more. Rows with an ignored label are not read, nor are those with a label
// outside the vocabulary. Written: 4 bytes per column and row. Two models that lie differently relative to 16-byte
// lines, or differ in type, are walked in step by one kernel for all types (walk_any), whose loads are of 16 bytes as
// well.
//
// Aliasing. Nothing that is written is read, except the scratch buffer by the second kernel.
//
// Numerics. Per element fp32, per row fp64. exp2((z - m) k), never exp2(z k - m k): the difference of two close numbers
// is exact, so a common offset of the logits costs nothing. ex2.approx errs by 2^-22 at most, of either sign.
#pragma once

#include "kernels.cuh"

namespace qk {
namespace cuda {

enum class Reads {
  kOne,         // a block walks one row of one model
  kBothInStep,  // both models' rows, alike in type and alignment
  kAnyInStep    // both, whatever they are
};

// Blocks per processor: what the registers of a kernel must leave room for. 26 KiB have to be under way per processor
// of an H200; a thread has four lines of 16 bytes of each model under way at most, half of that on average.
constexpr int blocks_of(Gather gather, Reads reads) {
  return reads == Reads::kOne ? (gather == Gather::kAll ? 3 : 4) : 3;
}

// Whether the label of a row is ignored or outside of the vocabulary. Such a row is not read: all of its columns are 0
// or NaN. Of the blocks that meet it (pieces, models, both kernels) the one with `writes` stores them.
__device__ __forceinline__ bool write_ignored_or_invalid(const StatsCall& call, int64_t row, bool writes) {
  const int64_t label = call.labels.data[row];
  if (label >= 0 && label < call.shape.vocab && label != call.labels.ignore_index) return false;
  const float value = label == call.labels.ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  if (writes && threadIdx.x < __popc(call.columns)) call.out[threadIdx.x * call.shape.rows() + row] = value;
  return true;
}

// `models`: blocks per piece. `of_reference`: the only model's row that is walked is the reference's.
template <class T, Gather kGather, Reads kReads>
__global__ void __launch_bounds__(kThreads, blocks_of(kGather, kReads))
    row_stats_kernel(const __grid_constant__ StatsCall call, Split split, int models, bool of_reference,
                     Partial* scratch) {
  constexpr bool kPair = kReads != Reads::kOne;
  unsigned block = blockIdx.x;
  if (models == 2) {
    of_reference = block % 2;
    block /= 2;
  }
  const int64_t row = block / static_cast<unsigned>(split.count);
  const int piece = static_cast<int>(block % static_cast<unsigned>(split.count));
  if (write_ignored_or_invalid(call, row, !scratch && !of_reference)) return;
  const int start = split.start(piece), n = split.length(piece, call.shape.vocab);
  const int label = static_cast<int>(call.labels.data[row]) - start;
  const double log2e_per_temperature = quotient(kLog2e, call.temperature);
  const float scale = static_cast<float>(log2e_per_temperature);
  LaneRow lane;
  if constexpr (kReads == Reads::kAnyInStep) {
    auto any = [&](const Rows& rows) {
      const int64_t size = rows.dtype == DType::kFloat32 ? 4 : 2;
      return AnyRow{static_cast<const char*>(rows.data) + (offset_of(rows, call.shape, row) + start) * size,
                    rows.dtype};
    };
    walk_row<kGather, true>(any(call.policy), any(call.reference), n, label, scale, threadIdx.x, lane);
  } else {
    const AlignedRow<T> policy = {row_of<T>(of_reference ? call.reference : call.policy, call.shape, row) + start};
    const AlignedRow<T> reference = {kPair ? row_of<T>(call.reference, call.shape, row) + start : nullptr};
    walk_row<kGather, kPair>(policy, reference, n, label, scale, threadIdx.x, lane);
  }
  const Partial total = add_block<kGather, kPair, kThreads>(partial_of(lane, log2e_per_temperature), log2e_per_temperature);
  if (threadIdx.x != 0) return;
  if (scratch)
    scratch[static_cast<int64_t>(block) * models + of_reference * (models - 1)] = total;
  else
    finish_row<columns_of(kGather, kPair)>(call, row, total, of_reference);
}

template <class T, Gather kGather, Reads kReads>
void launch_stats(const StatsCall& call, const Launch& where, const Split& split, int models, bool of_reference) {
  launch("row_stats", row_stats_kernel<T, kGather, kReads>, call.shape.rows() * split.count * models, kThreads, where,
         call, split, models, of_reference, split.count > 1 ? static_cast<Partial*>(where.scratch) : nullptr);
}

// Defined in a file each, to compile side by side.
void launch_stats_one(const StatsCall&, const Launch&, const Split&, Gather, int models, bool of_reference);
void launch_stats_both(const StatsCall&, const Launch&, const Split&, Gather);
void launch_stats_any(const StatsCall&, const Launch&, const Split&);

}  // namespace cuda
}  // namespace qk
