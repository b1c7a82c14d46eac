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

// t, not below the exponent of the first number that is 0: what sums of e t are made with, where e is 0 and t is not.
#if defined(__AVX512F__)
inline Vec clamp_exponent(Vec t) { return max_ignoring_nan_in_first(splat(-160.0f), t); }
#else
inline Vec clamp_exponent(Vec t) { return max_ignoring_nan_in_first(splat(-127.0f), t); }
#endif

// Polynomials p(f) = 2^f over one octave, by degree, lowest coefficient first. Largest relative errors: degree 5 9.2e-8
// (with its rounding 1.5e-7), degree 4 2.6e-6, degree 3 7.5e-5. Degree 5 has exactly 1 at f = 0: equal logits have a
// log-prob without error. The others serve gradients that are rounded to 11 or 8 bits afterwards.
template <int kDegree>
struct Octave;

#if defined(__AVX512F__)  // f in [0, 1)
template <>
struct Octave<5> {
  static constexpr float c[] = {1.0f,           6.931512952e-1f, 2.401644439e-1f, 5.579991266e-2f, 9.017030708e-3f,
                                1.867130050e-3f};
};
template <>
struct Octave<4> {
  static constexpr float c[] = {1.000002593f, 6.930038345e-1f, 2.414427568e-1f, 5.201146078e-2f, 1.353416785e-2f};
};
template <>
struct Octave<3> {
  static constexpr float c[] = {9.999252186e-1f, 6.958335427e-1f, 2.260671487e-1f, 7.802452726e-2f};
};
#else  // f in [-1/2, 1/2]
template <>
struct Octave<5> {
  static constexpr float c[] = {1.0f,           6.931470037e-1f, 2.402224243e-1f, 5.550733581e-2f, 9.671512991e-3f,
                                1.326472731e-3f};
};
template <>
struct Octave<4> {
  static constexpr float c[] = {9.999992614e-1f, 6.931218147e-1f, 2.402474483e-1f, 5.591786034e-2f, 9.570101863e-3f};
};
template <>
struct Octave<3> {
  static constexpr float c[] = {9.999280736e-1f, 6.932609847e-1f, 2.426111224e-1f, 5.517167233e-2f};
};
#endif

// factor * 2^t for t <= 0 (or not much more). Exactly 0 for -inf and wherever the result is too small for fp32, NaN for
// NaN. The factor costs nothing: it is in the coefficients.
template <int kDegree>
class Exp2 {
 public:
  explicit Exp2(float factor) {
    for (int i = 0; i <= kDegree; ++i) c_[i] = splat(factor * Octave<kDegree>::c[i]);
  }

  Vec operator()(Vec t) const {
#if defined(__AVX512F__)
    // f = t - floor(t) in one instruction, 0 for -inf; scalef multiplies by 2^floor(t), whatever its size.
    return (Vec)_mm512_scalef_ps((__m512)polynomial((Vec)_mm512_reduce_ps((__m512)t, kFloor)), (__m512)t);
#else
    t = clamp_exponent(t);
    // Adding 1.5 * 2^23 + 127 rounds t to an integer n and leaves n + 127 in the low bits: the exponent of 2^n.
    const Vec magic = splat(12582912.0f + 127.0f);
    const Vec rounded = t + magic;
    return polynomial(t - (rounded - magic)) * (Vec)((UintVec)rounded << 23);
#endif
  }

 private:
#if defined(__AVX512F__)
  static constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
#endif

  Vec polynomial(Vec f) const {
    Vec p = c_[kDegree];
    for (int i = kDegree - 1; i >= 0; --i) p = p * f + c_[i];
    return p;
  }

  Vec c_[kDegree + 1];
};

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

// 2 * kLanes elements as two vectors. Those of bf16 come apart as their memory has them, the even ones and the odd ones
// (a shift and a mask of whole vectors); others come as first half and second half. Where several rows meet element by
// element, all of them have to be taken apart in one way.
struct Pair {
  Vec first, second;
};

// Ask for what will be read a page on: the processor's own prefetching stops at the end of a page. Measured on an
// AMD EPYC (Zen 5), one core, rows of 128256: forward 1.65 -> 1.44 ns and backward 1.40 -> 1.15 ns per 16 entries of
// bf16, 2.3 -> 2.2 ns and 2.4 -> 2.1 ns of fp32.
template <class T>
inline void prefetch_pair(const T* p) {
  constexpr uintptr_t kAhead = 4096, kLine = 64;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + kAhead;
  for (uintptr_t byte = 0; byte < 2 * kLanes * sizeof(T); byte += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(at + byte));
}

template <class T>
constexpr bool kEvenOdd = false;
template <>
inline constexpr bool kEvenOdd<BFloat16> = true;

template <class T>
inline Pair load_pair(const T* p) {
  prefetch_pair(p);
  return {widen(p), widen(p + kLanes)};
}

template <>
inline Pair load_pair(const BFloat16* p) {
  prefetch_pair(p);
  UintVec u;
  memcpy(&u, p, sizeof u);
  return {(Vec)(u << 16), (Vec)(u & 0xffff0000u)};
}

// The index, among the 2 * kLanes elements of a pair, of element i of the two vectors written one after the other.
template <class T>
constexpr int64_t element_of_pair(int64_t i) {
  return kEvenOdd<T> ? (i < kLanes ? 2 * i : 2 * (i - kLanes) + 1) : i;
}

// Elements next to each other again, rounded to T.
template <bool kInterleave, class T>
inline void store_pair(T* p, Pair v) {
  static_assert(!kInterleave, "only bf16 is taken apart");
  narrow(p, v.first);
  narrow(p + kLanes, v.second);
}

#if defined(__AVX512BF16__)
template <>
inline void store_pair<false>(BFloat16* p, Pair v) {
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
  memcpy(p, &both, sizeof both);
}

template <>
inline void store_pair<true>(BFloat16* p, Pair v) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
}
#else
template <>
inline void store_pair<true>(BFloat16* p, Pair v) {
  // Round to nearest even. The NaNs that arise here are quiet and have room in their upper half.
  const UintVec even = (UintVec)v.first, odd = (UintVec)v.second;
  const UintVec low = (even + 0x7fffu + ((even >> 16) & 1u)) >> 16;
  const UintVec high = (odd + 0x7fffu + ((odd >> 16) & 1u)) & 0xffff0000u;
  const UintVec both = low | high;
  memcpy(p, &both, sizeof both);
}
#endif

// Sum of the lanes in a fixed order (halves onto halves: short chains), in double.
inline double lane_sum(Vec v) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
  const __m512d eight = _mm512_add_pd(low, high);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
  double lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = v[i];
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#endif
}

inline float lane_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
  return lane[0];
#endif
}

}  // namespace QK_ISA
}  // namespace qk
