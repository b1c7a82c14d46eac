// Which elements of a row a thread of a block works on.
//
// A row (or one piece of a split row) of n elements is divided into a head that ends at the first multiple of 16 bytes,
// computed from the row's *address*, vectors, and a tail. So every load and store of the main loop is 128 bits wide
// with any V, stride and base address. In an iteration each thread takes kVectors vectors, kThreads vectors apart: all
// of them are loaded before the first is used, and an iteration of the block covers consecutive memory.
//
// The iteration that holds the label and the last, incomplete one take the boundary path, which compares each element
// with the label and each vector with the number of vectors. All others take the fast path, which compares nothing.
// Head and tail have fewer elements than the block has threads: one element per thread.
#pragma once

#include "vector_io.h"

namespace qk {
namespace cuda {

struct RowTiling {
  int head = 0, vectors = 0;  // elements; vectors of `vector` elements
  int edges = 0;              // elements in head and tail together
  int vector = 1;

  // Position of the e-th element of head and tail.
  QK_HOST_DEVICE int edge(int e) const { return e < head ? e : e + vectors * vector; }
  // The vector that holds an element; -1 if none does.
  QK_HOST_DEVICE int vector_of(int element) const {
    const int past = element - head;
    return past < 0 || past >= vectors * vector ? -1 : past / vector;
  }
};

// `margin`: elements between the vectors and either end of the row.
QK_HOST_DEVICE RowTiling tile_row(uintptr_t address, int element_size, int n, int vector, int margin) {
  RowTiling tiling;
  tiling.vector = vector;
  tiling.head = static_cast<int>((16 - (address & 15)) & 15) / element_size + margin;
  tiling.vectors = n - tiling.head - margin > 0 ? (n - tiling.head - margin) / vector : 0;
  if (tiling.vectors == 0) tiling.head = 0;
  tiling.edges = n - tiling.vectors * vector;
  return tiling;
}
// With margins: 7 or less before the first multiple of 16 bytes, 8, 8, and less than a vector.
constexpr int kMaxEdges = 7 + 8 + 8 + 7;
static_assert(kMaxEdges < kThreads, "a thread takes at most one element of head and tail");

// The iteration in which the threads of one warp take the boundary path because of the label's vector, or -1. It is the
// same for a whole warp, so that its threads do not diverge, and for the whole block if `for_block`.
QK_HOST_DEVICE int label_iteration(int vector, int vectors_per_thread, int thread, bool for_block) {
  if (vector < 0) return -1;
  const bool mine = for_block || vector % kThreads / 32 == thread / 32;
  return mine ? vector / (vectors_per_thread * kThreads) : -1;
}

// Calls fast(i) for all complete iterations but that of the label; boundary(i) for that one and for the incomplete one
// at the end.
template <class Fast, class Boundary>
QK_HOST_DEVICE void for_each_iteration(int complete, int of_label, Fast fast, Boundary boundary) {
  int i = 0;
  do {
    const int stop = of_label >= i && of_label < complete ? of_label : complete;
    for (; i < stop; ++i) fast(i);
    boundary(i++);
  } while (i <= complete);
}

// A row split over `count` blocks.
struct Split {
  int count = 1;
  int span = 0;  // elements of a piece; a multiple of 8, so that all pieces have the same alignment modulo 16 bytes

  QK_HOST_DEVICE int start(int piece) const { return piece * span; }
  QK_HOST_DEVICE int length(int piece, int64_t vocab) const {
    const int left = static_cast<int>(vocab) - start(piece);
    return left < span ? left : span;
  }
};

// At most `count` pieces. Pieces of more than half an iteration of 16-bit elements are whole iterations: a part of one
// waits for the memory as long as a whole one.
inline Split split_row(int64_t vocab, int count) {
  constexpr int64_t kIteration = 4 * 8 * kThreads;
  const int64_t least = (vocab + count - 1) / count, step = least > kIteration / 2 ? kIteration : 8;
  const int64_t span = (least + step - 1) / step * step;
  return {static_cast<int>((vocab + span - 1) / span), static_cast<int>(span)};
}

}  // namespace cuda
}  // namespace qk
