// How the threads of pair_loss' one block are dealt out: compiles for the host too (csrc/tests/test_cuda_walk.cpp).
//
// `group_of` threads work on each sequence; pairs are taken in rounds of as many as there are groups for.
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

}  // namespace cuda
}  // namespace qk
