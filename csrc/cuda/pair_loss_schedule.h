// Which sequence each thread of the one block of `pair_loss` works on.
//
// `threads_per_sequence` threads share each sequence. Pairs are taken in rounds of as many pairs as there are threads
// for.
#pragma once

#include "../core/calls.h"
#include "../core/pair_loss.h"

namespace qk {
namespace cuda {

constexpr int kPairThreads = 512;

// A power of two: if there are few sequences, all threads have work.
QK_HOST_DEVICE int threads_per_sequence(int64_t sequences) {
  int group = 32;
  while (group < kPairThreads / 2 && group * 2 * sequences <= kPairThreads) group *= 2;
  return group;
}

// The sequence of a thread in the round that begins with pair `first`: chosen sequences in the first half of the block,
// their rejected ones in the second. -1 where there is none.
QK_HOST_DEVICE int64_t sequence_of(int64_t pairs, int64_t first, int thread, int group) {
  const int half = kPairThreads / 2;
  const int64_t pair = first + thread % half / group;
  return pair < pairs ? pair + (thread < half ? 0 : pairs) : -1;
}

}  // namespace cuda
}  // namespace qk
