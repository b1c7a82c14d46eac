// Pairs of bf16 along the depth, as the dot-product instructions take them: from two rows of a matrix, and transposed.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../core/elements.h"

namespace qk {
namespace {

#if defined(__AVX512F__)

// Row i of `v` becomes column i.
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

inline void transpose(uint32_t (&tile)[16][16]) {
  __m512i v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(tile[i]);
  transpose(v);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile[i], v[i]);
}

// pairs[i] = (even[i], odd[i]) for i < count <= 16, and 0 beyond; `odd` may be null.
inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t count, uint32_t* pairs) {
  const __mmask16 here = static_cast<__mmask16>((1u << count) - 1);
  __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, even));
  if (odd)
    both = _mm512_or_si512(both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, odd)), 16));
  _mm512_storeu_si512(pairs, both);
}

// to[i] = from[i] for i < count <= 32, and 0 beyond.
inline void copy_row(const BFloat16* from, int64_t count, uint32_t* to) {
  const __mmask32 here = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(here, from));
}

#else

inline void transpose(uint32_t (&tile)[16][16]) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) std::swap(tile[i][j], tile[j][i]);
}

inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t count, uint32_t* pairs) {
  for (int64_t i = 0; i < 16; ++i)
    pairs[i] = i < count ? even[i].bits | (odd ? static_cast<uint32_t>(odd[i].bits) << 16 : 0) : 0;
}

inline void copy_row(const BFloat16* from, int64_t count, uint32_t* to) {
  std::memset(to, 0, 64);
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(BFloat16));
}

#endif

}  // namespace
}  // namespace qk
