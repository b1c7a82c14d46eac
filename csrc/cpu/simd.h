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

// x where condition > 0, else 0 (0 too where condition is NaN).
inline Vec where_positive(Vec condition, Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)condition, _mm512_setzero_ps(), _CMP_GT_OQ), (__m512)x);
#else
  return (Vec)((IntVec)x & (condition > Vec{}));
#endif
}

// Below this exponent 2^t is 0. NaN stays NaN.
inline Vec clamp_exponent(Vec t) { return max_ignoring_nan_in_first(splat(-127.0f), t); }

// 2^t for -127 <= t <= 0. Exactly 1 at 0, exactly 0 at -127, NaN for NaN. Relative error 1.2e-7: a polynomial of
// degree 5 on [-1/2, 1/2] with error 9.2e-8, and the rounding of its last step.
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

inline Vec exp2_nonpositive(Vec t) { return exp2_clamped(clamp_exponent(t)); }

inline Vec widen(const float* p) { return load(p); }

inline Vec widen(const BFloat16* p) {
  ShortVec v;
  memcpy(&v, p, sizeof v);
  return (Vec)(__builtin_convertvector(v, UintVec) << 16);
}

inline Vec widen(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float out[kLanes];
  for (int i = 0; i < kLanes; ++i) out[i] = qk::widen(p[i]);
  return load(out);
#endif
}

inline void narrow(float* p, Vec v) { store(p, v); }

inline void narrow(BFloat16* p, Vec v) {
  // Round to nearest even. The NaNs that arise here are quiet and have room in their upper half.
  const UintVec u = (UintVec)v;
  const ShortVec out = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, ShortVec);
  memcpy(p, &out, sizeof out);
}

inline void narrow(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  float in[kLanes];
  store(in, v);
  for (int i = 0; i < kLanes; ++i) p[i] = qk::narrow<Float16>(in[i]);
#endif
}

// Sum of the lanes in a fixed order, in double.
inline double lane_sum(Vec v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline float lane_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

}  // namespace QK_ISA
}  // namespace qk
