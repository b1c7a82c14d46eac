// Stores that bypass the caches, for results that are larger than these and read much later: an ordinary store would
// read the line first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace qk {
namespace {

inline void copy_out(const float* sums, int64_t count, float* to, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if (stream) {
    // Whole cache lines, unaligned ends apart.
    const int64_t head = std::min<int64_t>(count, static_cast<int64_t>(-(reinterpret_cast<uintptr_t>(to) / 4) & 15));
    std::memcpy(to, sums, static_cast<size_t>(head) * sizeof(float));
    int64_t j = head;
    for (; j + 16 <= count; j += 16) _mm512_stream_ps(to + j, _mm512_loadu_ps(sums + j));
    std::memcpy(to + j, sums + j, static_cast<size_t>(count - j) * sizeof(float));
    return;
  }
#endif
  std::memcpy(to, sums, static_cast<size_t>(count) * sizeof(float));
}

// Before another thread is told that such stores are done: they are weakly ordered.
inline void finish_streams([[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if (stream) _mm_sfence();
#endif
}

}  // namespace
}  // namespace qk
