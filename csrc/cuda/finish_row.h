// From the complete sums of a row to its fields.
#pragma once

#include "online_softmax.h"

namespace qk {
namespace cuda {

// The fields that these sums suffice for. A kernel computes no others.
constexpr uint32_t fields_of(Gather gather, bool pair) {
  const uint32_t always = bit(kRowMax) | bit(kLogSum) | bit(kLogps) | bit(kLogsumexp);
  const uint32_t entropy = gather == Gather::kExp ? 0 : bit(kEntropy);
  const uint32_t all = gather == Gather::kAll ? bit(kLogSumSqProbs) | bit(kMeanLogits) | bit(kIsTop1) : 0;
  return always | entropy | all | (pair ? kReadsReference : 0);
}

// The index of a field in the output: the number of fields before it that were asked for.
QK_HOST_DEVICE int slot_of(uint32_t fields, int field) {
  const uint32_t before = fields & ((1u << field) - 1);
#if defined(__CUDA_ARCH__)
  return __popc(before);
#else
  return __builtin_popcount(before);
#endif
}

// The label's logit under the model whose row is read, and under the reference where both are: bits of their types.
struct LabelLogits {
  uint32_t own = 0, reference = 0;
};

template <bool kPair>
QK_HOST_DEVICE LabelLogits load_label_logits(const StatsCall& call, int64_t row, bool of_reference) {
  const int64_t label = call.labels.data[row];
  return {element_bits(of_reference ? call.reference : call.policy, call.shape, row, label),
          kPair ? element_bits(call.reference, call.shape, row, label) : 0};
}

// Stores the row's fields among `kFields` from its complete sums, from which the label is still left out.
// `of_reference`: the sums are the reference's, accumulated on their own, and so are the fields.
template <uint32_t kFields>
QK_HOST_DEVICE void finish_row(const StatsCall& call, int64_t row, LabelLogits at_label, PartialSums total,
                               bool of_reference) {
  constexpr bool kPair = (kFields & kDivergences) != 0;
  const float z = number_of(at_label.own, of_reference ? call.reference.dtype : call.policy.dtype);
  const float rz = kPair ? number_of(at_label.reference, call.reference.dtype) : 0;
  RowSums of_label;
  of_label.policy.max = z;
  of_label.reference.max = rz;
  const bool top1 = z >= total.sums.policy.max && total.max_before_label < z;
  merge(total.sums, of_label, quotient(kLog2e, call.temperature));
  float values[kFieldCount];
  finish(total.sums, z, rz, kPair, call.shape.vocab, call.temperature, top1, values);
  const int64_t rows = call.shape.rows();
  auto put = [&](int field, float value) {
    if (call.fields >> field & 1) call.out[slot_of(call.fields, field) * rows + row] = value;
  };
  if (of_reference) {
    put(kReferenceRowMax, values[kRowMax]);
    put(kReferenceLogSum, values[kLogSum]);
    put(kReferenceLogps, values[kLogps]);
    put(kReferenceLogsumexp, values[kLogsumexp]);
    return;
  }
  QK_UNROLL
  for (int field = 0; field < kFieldCount; ++field)
    if (kFields >> field & 1) put(field, values[field]);
}

}  // namespace cuda
}  // namespace qk
