// pair_loss, as the threads of its one block do it: compiles for the host too (csrc/tests/test_cuda_walk.cpp).
//
// Threads are dealt out to sequences, `group_of` to each; pairs are taken in rounds of as many as there are groups for.
#pragma once

#include "../core/calls.h"
#include "../core/pair_loss.h"

namespace qk {
namespace cuda {

constexpr int kPairThreads = 512;

// Threads per sequence, a power of two: all of them at work if there are few sequences.
QK_HOST_DEVICE int group_of(int64_t sequences) {
  int group = 32;
  while (group < kPairThreads / 2 && group * 2 * sequences <= kPairThreads) group *= 2;
  return group;
}

// The sequence of a group of threads in the round that begins with pair `first`: chosen ones in the first half of the
// block, their rejected ones in the second. -1 where there is none.
QK_HOST_DEVICE int64_t sequence_of(int64_t pairs, int64_t first, int thread, int group) {
  const int half = kPairThreads / 2;
  const int64_t pair = first + thread % half / group;
  return pair < pairs ? pair + (thread < half ? 0 : pairs) : -1;
}

// One thread's share of the sum of a sequence's weighted log-ratios (log-probs where the reference comes per sequence).
QK_HOST_DEVICE double share_of(const PairCall& call, int64_t sequence, int lane, int group) {
  double total = 0;
  const int64_t end = call.begin(sequence + 1);
  for (int64_t row = call.begin(sequence) + lane; row < end; row += group) {
    if (call.weights[row] == 0) continue;
    const double value = call.per_sequence ? call.logps[row] : log_ratio(call.logps[row], call.reference[row]);
    total += call.weights[row] * value;
  }
  return total;
}

// From the whole sum to the sequence's log-ratio; its reward is stored.
QK_HOST_DEVICE double ratio_of(const PairCall& call, int64_t sequence, double total) {
  const double ratio = call.per_sequence ? log_ratio(total, call.reference[sequence]) : total;
  call.rewards[sequence] = static_cast<float>(call.beta * ratio);
  return ratio;
}

// dloss/dlogps of one thread's rows.
QK_HOST_DEVICE void put_slopes(const PairCall& call, int64_t sequence, double slope, int lane, int group) {
  const int64_t end = call.begin(sequence + 1);
  for (int64_t row = call.begin(sequence) + lane; row < end; row += group)
    call.grad[row] = call.weights[row] == 0 ? 0 : static_cast<float>(slope * call.weights[row]);
}

}  // namespace cuda
}  // namespace qk
