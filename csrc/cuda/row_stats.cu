// row_stats: which kernels a call needs, and the one that combines the pieces of split rows. See row_stats.cuh.
#include "dispatch.h"
#include "row_stats.cuh"

namespace qk {
namespace cuda {
namespace {

// One thread per piece of a row; one block per row (and per model, as in the first kernel). The sums and the label come
// from memory at the same time, the label's logit while the sums are added.
template <Gather kGather, bool kPair>
__global__ void __launch_bounds__(kMaxSplits, 1)
    combine_kernel(const __grid_constant__ StatsCall call, Split split, int models, bool of_reference,
                   const PartialSums* scratch) {
  of_reference = models == 2 ? blockIdx.x % 2 : of_reference;
  const int64_t row = blockIdx.x / static_cast<unsigned>(models);
  PartialSums mine;
  const int piece = static_cast<int>(threadIdx.x);
  if (piece < split.count) mine = scratch[(row * split.count + piece) * models + of_reference * (models - 1)];
  if (write_ignored_or_invalid(call, row, !of_reference)) return;
  LabelLogits at_label;
  if (threadIdx.x == 0) at_label = load_label_logits<kPair>(call, row, of_reference);
  const PartialSums total = add_block<kGather, kPair, kMaxSplits>(mine, quotient(kLog2e, call.temperature));
  if (threadIdx.x == 0) finish_row<fields_of(kGather, kPair)>(call, row, at_label, total, of_reference);
}

template <bool kPair>
void launch_combine(const StatsCall& call, const Launch& where, const Split& split, Gather gather, int models,
                    bool of_reference) {
  if (split.count == 1) return;
  auto launch_for = [&](auto kernel) {
    launch("row_stats", kernel, call.shape.rows() * models, kMaxSplits, where, call, split, models, of_reference,
           static_cast<const PartialSums*>(where.scratch));
  };
  switch (gather) {
    case Gather::kExp: return launch_for(combine_kernel<Gather::kExp, kPair>);
    case Gather::kEntropy: return launch_for(combine_kernel<Gather::kEntropy, kPair>);
    case Gather::kAll: return launch_for(combine_kernel<Gather::kAll, kPair>);
  }
}

// What has to be accumulated for these fields.
Gather gather_for(uint32_t fields) {
  if (fields & (bit(kLogSumSqProbs) | bit(kMeanLogits) | bit(kIsTop1))) return Gather::kAll;
  return fields & bit(kEntropy) ? Gather::kEntropy : Gather::kExp;
}

}  // namespace

int partial_bytes() { return sizeof(PartialSums); }

void row_stats(const StatsCall& call, const Launch& where) {
  if (call.shape.rows() == 0) return;
  check_vocab(call.shape);
  const DeviceGuard guard(where.device);
  const Split split = split_row(call.shape.vocab, where.splits);
  const Gather gather = gather_for(call.fields);
  const bool two = call.reference.data && (call.fields & kReadsReference);
  // Separately, models of different types take a launch each, and twice as many where rows are split; jointly they take
  // two launches then.
  const bool separately = same_type(call.policy, call.reference) || split.count == 1;
  if (two && ((call.fields & kDivergences) || !separately)) {
    if (same_type(call.policy, call.reference) && same_alignment(call.policy, call.reference, call.shape))
      launch_stats_both(call, where, split, gather);
    else
      launch_stats_any(call, where, split);
    launch_combine<true>(call, where, split, gather, 1, false);
  } else if (two && same_type(call.policy, call.reference)) {
    launch_stats_one(call, where, split, gather, 2, false);
    launch_combine<false>(call, where, split, gather, 2, false);
  } else {
    launch_stats_one(call, where, split, gather, 1, false);
    launch_combine<false>(call, where, split, gather, 1, false);
    if (!two) return;
    launch_stats_one(call, where, split, Gather::kExp, 1, true);
    launch_combine<false>(call, where, split, Gather::kExp, 1, true);
  }
}

}  // namespace cuda
}  // namespace qk
