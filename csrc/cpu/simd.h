// A vector of fp32 lanes as wide as the instruction set this file is compiled for, and the few operations the row
// kernels need. GCC's and Clang's vector extensions carry the arithmetic; intrinsics appear where the compilers are
// known to miss an instruction. Everything is in a namespace of its own per instruction set, so that the linker
// cannot pick one set's copy of an inline function for another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../core/elements.h"

#if !defined(QK_ISA)
#error "compile with -DQK_ISA=<name of the instruction set>"
#endif

namespace qk {
namespace QK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * kLanes)));

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// max(a, b); b where a is NaN.
inline Vec max_ignoring_nan_in_first(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// sum + e * x where e > 0, else sum (also where e is NaN): 0 * inf adds nothing.
inline Vec add_weighted(Vec sum, Vec e, Vec x) {
#if defined(__AVX512F__)
  const __mmask16 positive = _mm512_cmp_ps_mask((__m512)e, _mm512_setzero_ps(), _CMP_GT_OQ);
  return (Vec)_mm512_mask3_fmadd_ps((__m512)e, (__m512)x, (__m512)sum, positive);
#else
  return sum + (Vec)((IntVec)(e * x) & (e > Vec{}));
#endif
}

// 2^t for t <= 0, in two steps, because sums of e t want the clamped t. Exactly 1 at 0, exactly 0 at the clamp (and for
// -inf), NaN for NaN. Relative error 1.5e-7: a polynomial of degree 5 over one octave with error 9.2e-8, and rounding.
#if defined(__AVX512F__)
// 2^-160 is 0 in fp32; scalef rounds results below 2^-126 to subnormals.
inline Vec clamp_exponent(Vec t) { return max_ignoring_nan_in_first(splat(-160.0f), t); }

inline Vec exp2_clamped(Vec t) {
  // f = t - floor(t) in one instruction; scalef multiplies by 2^floor(t).
  const Vec f = (Vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = splat(1.867130050e-3f);
  p = p * f + 9.017030708e-3f;
  p = p * f + 5.579991266e-2f;
  p = p * f + 2.401644439e-1f;
  p = p * f + 6.931512952e-1f;
  p = p * f + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)t);
}
#else
inline Vec clamp_exponent(Vec t) { return max_ignoring_nan_in_first(splat(-127.0f), t); }

inline Vec exp2_clamped(Vec t) {
  // Adding 1.5 * 2^23 + 127 rounds t to an integer n and leaves n + 127 in the low bits: the exponent of 2^n.
  const Vec magic = splat(12582912.0f + 127.0f);
  const Vec rounded = t + magic;
  const Vec f = t - (rounded - magic);
  Vec p = splat(1.326472731e-3f);
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  return p * (Vec)((UintVec)rounded << 23);
}
#endif

inline Vec exp2_nonpositive(Vec t) { return exp2_clamped(clamp_exponent(t)); }

inline Vec widen(const float* p) { return load(p); }

inline Vec widen(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Vec)((UintVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif defined(__AVX2__)
  return (Vec)((UintVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#elif defined(__SSE2__)
  return (Vec)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  ShortVec v;
  memcpy(&v, p, sizeof v);
  return (Vec)(__builtin_convertvector(v, UintVec) << 16);
#endif
}

inline Vec widen(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  ShortVec v;
  memcpy(&v, p, sizeof v);
  return half_to_float<Vec>(__builtin_convertvector(v, UintVec));
#endif
}

inline void narrow(float* p, Vec v) { store(p, v); }

inline void narrow(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh out = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &out, sizeof out);
#else
  // Round to nearest even. The NaNs that arise here are quiet and have room in their upper half.
  const UintVec u = (UintVec)v;
  const UintVec rounded = u + 0x7fffu + ((u >> 16) & 1u);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)(rounded >> 16)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)(rounded >> 16), _mm256_setzero_si256());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8)));
#elif defined(__SSE2__)
  const __m128i high = _mm_srai_epi32((__m128i)rounded, 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(high, high));
#else
  const ShortVec out = __builtin_convertvector(rounded >> 16, ShortVec);
  memcpy(p, &out, sizeof out);
#endif
#endif
}

inline void narrow(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const ShortVec out = __builtin_convertvector(float_to_half<Vec, UintVec>(v), ShortVec);
  memcpy(p, &out, sizeof out);
#endif
}

// Sum of the lanes in a fixed order (halves onto halves: short chains), in double.
inline double lane_sum(Vec v) {
  double lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = v[i];
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

inline float lane_max(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
  return lane[0];
}

}  // namespace QK_ISA
}  // namespace qk
