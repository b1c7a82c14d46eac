// A thread's piece of a row: 16-byte lines, the numbers in them, and the few instructions that the host lacks.
//
// Everything here compiles for the host too, where csrc/tests/test_cuda_walk.cpp runs what the threads of a block do,
// one thread after the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../core/calls.h"

namespace qk {
namespace cuda {

constexpr int kThreads = 256;  // of a block
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^t of t <= 0, one instruction: relative error below 2^-22, results below 2^-126 are 0.
QK_HOST_DEVICE float exp2_approx(float t) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
#else
  return exp2f(t);
#endif
}

struct alignas(16) Line {
  uint32_t word[4];
};

QK_HOST_DEVICE bool on_line(const void* address) { return (reinterpret_cast<uintptr_t>(address) & 15) == 0; }

#if !defined(__CUDA_ARCH__)
// A device would fault.
inline void check_line(const void* address) {
  if (!on_line(address)) abort();
}
#endif

// For data that is read once: first in line to leave the caches.
QK_HOST_DEVICE Line load_streaming(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint4 v = __ldcs(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
#else
  check_line(address);
  Line line;
  memcpy(&line, address, sizeof line);
  return line;
#endif
}

// For lines that two threads read. Never through the read-only cache: the kernel may write to the same tensor.
QK_HOST_DEVICE Line load_line(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
#else
  return load_streaming(address);
#endif
}

QK_HOST_DEVICE void store_streaming(void* address, const Line& line) {
#if defined(__CUDA_ARCH__)
  __stcs(static_cast<uint4*>(address), make_uint4(line.word[0], line.word[1], line.word[2], line.word[3]));
#else
  check_line(address);
  memcpy(address, &line, sizeof line);
#endif
}

// --- elements in words ----------------------------------------------------------------------------------------------

// Element i of a line (a constant once loops are unrolled).
template <class T>
QK_HOST_DEVICE float lane(const Line& line, int i);

template <>
QK_HOST_DEVICE float lane<float>(const Line& line, int i) {
  return float_of(line.word[i]);
}

template <>
QK_HOST_DEVICE float lane<BFloat16>(const Line& line, int i) {
  const uint32_t word = line.word[i / 2];
  return float_of(i % 2 ? word & 0xffff0000u : word << 16);
}

template <>
QK_HOST_DEVICE float lane<Float16>(const Line& line, int i) {
  const uint32_t word = line.word[i / 2];
#if defined(__CUDA_ARCH__)
  float x;
  if (i % 2)
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(x) : "r"(word));
  else
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(x) : "r"(word));
  return x;
#else
  return widen(Float16{static_cast<uint16_t>(i % 2 ? word >> 16 : word)});
#endif
}

// Larger of the elements of two words, element by element; the other one where one is NaN.
template <class T>
QK_HOST_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if (sizeof(T) == 4)
    word = bits_of(fmaxf(float_of(a), float_of(b)));
  else if (std::is_same<T, BFloat16>::value)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#else
  if (sizeof(T) == 4) return bits_of(fmaxf(float_of(a), float_of(b)));
  const Line x = {{a}}, y = {{b}};
  uint32_t word = 0;
  for (int i = 0; i < 2; ++i) {
    const bool keep = !(lane<T>(y, i) > lane<T>(x, i)) && lane<T>(x, i) == lane<T>(x, i);
    word |= (keep ? a : b) & (i ? 0xffff0000u : 0xffffu);
  }
  return word;
#endif
}

// Two fp32 numbers rounded to 16 bits, or one as it is, as a word.
template <class T>
QK_HOST_DEVICE uint32_t packed(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if (std::is_same<T, BFloat16>::value)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#endif
}

template <class T>
QK_HOST_DEVICE void store_element(T* to, float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2)
    to->bits = static_cast<uint16_t>(packed<T>(x, 0.0f));
  else
    *to = x;
#else
  *to = narrow<T>(x);
#endif
}

// (high : low) shifted right by 0 or 16 bits.
QK_HOST_DEVICE uint32_t shifted_down(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return bits ? high << 16 | low >> 16 : low;
#endif
}

template <class T>
struct MinusInfinity;
template <>
struct MinusInfinity<float> {
  static constexpr uint32_t word = 0xff800000u;
};
template <>
struct MinusInfinity<BFloat16> {
  static constexpr uint32_t word = 0xff80ff80u;
};
template <>
struct MinusInfinity<Float16> {
  static constexpr uint32_t word = 0xfc00fc00u;
};

// --- what a thread holds of a row at once ---------------------------------------------------------------------------

// Four lines, not yet widened: vectors of kLines lines each.
template <class T, int kLines>
struct Packed {
  static constexpr int kPerLine = 16 / sizeof(T);
  static constexpr int kVectors = 4 / kLines, kVector = kLines * kPerLine, kCount = kVectors * kVector;
  Line line[4];

  QK_HOST_DEVICE float operator[](int i) const { return lane<T>(line[i / kPerLine], i % kPerLine); }

  QK_HOST_DEVICE float max() const {
    uint32_t top[4];
    QK_UNROLL
    for (int w = 0; w < 4; ++w) {
      top[w] = larger<T>(line[0].word[w], line[1].word[w]);
      top[w] = larger<T>(top[w], larger<T>(line[2].word[w], line[3].word[w]));
    }
    const Line rest = {{larger<T>(larger<T>(top[0], top[1]), larger<T>(top[2], top[3]))}};
    return sizeof(T) == 4 ? lane<T>(rest, 0) : fmaxf(lane<T>(rest, 0), lane<T>(rest, 1));
  }

  // Take an element out.
  QK_HOST_DEVICE void remove(int i) {
    constexpr int kPerWord = 4 / sizeof(T);
    uint32_t& word = line[i / kPerLine].word[i % kPerLine / kPerWord];
    const uint32_t mask = kPerWord == 1 ? ~0u : i % 2 ? 0xffff0000u : 0xffffu;
    word = (word & ~mask) | (MinusInfinity<T>::word & mask);
  }

  QK_HOST_DEVICE void remove_vector(int u) {
    QK_UNROLL
    for (int w = 0; w < 4 * kLines; ++w) line[u * kLines + w / 4].word[w % 4] = MinusInfinity<T>::word;
  }
};

// The same as numbers, whatever type they came in.
template <int kVectors_, int kVector_>
struct Widened {
  static constexpr int kVectors = kVectors_, kVector = kVector_, kCount = kVectors * kVector;
  float z[kCount];

  QK_HOST_DEVICE float operator[](int i) const { return z[i]; }

  QK_HOST_DEVICE float max() const {
    float top = z[0];
    QK_UNROLL
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, z[i]);
    return top;
  }

  QK_HOST_DEVICE void remove(int i) { z[i] = -kInfinity; }

  QK_HOST_DEVICE void remove_vector(int u) {
    QK_UNROLL
    for (int i = 0; i < kVector; ++i) z[u * kVector + i] = -kInfinity;
  }
};

// --- rows -----------------------------------------------------------------------------------------------------------

// A row whose vectors are lines of its own: a load for each line. Two lines are the vector where results of half the
// width are to fill one.
template <class T, int kLines = 1>
struct AlignedRow {
  using Tile = Packed<T, kLines>;
  static constexpr bool kInside = false;
  const T* data;

  QK_HOST_DEVICE int size() const { return sizeof(T); }
  QK_HOST_DEVICE uintptr_t address() const { return reinterpret_cast<uintptr_t>(data); }
  QK_HOST_DEVICE float operator[](int i) const { return widen(data[i]); }
  // Vectors of the tile, `step` elements apart, the first at element `at`.
  QK_HOST_DEVICE void read(Tile& tile, int64_t at, int step) const {
    QK_UNROLL
    for (int u = 0; u < Tile::kVectors; ++u) read_vector(tile, u, at + static_cast<int64_t>(u) * step);
  }
  QK_HOST_DEVICE void read_vector(Tile& tile, int u, int64_t at) const {
    QK_UNROLL
    for (int l = 0; l < kLines; ++l) tile.line[u * kLines + l] = load_streaming(data + at + l * Tile::kPerLine);
  }
};

// A row that may lie anywhere relative to the lines that cut it, and of any type. A vector of 8 elements that begins
// within a line is put together from that line and the next one (which the neighbouring thread needs as well), so
// loads are of 16 bytes all the same. Lines may reach 14 bytes past either end of the vector: callers keep as far
// from the ends of the row.
struct AnyRow {
  using Tile = Widened<2, 8>;
  static constexpr bool kInside = true;
  const void* data;
  DType dtype;

  QK_HOST_DEVICE int size() const { return dtype == DType::kFloat32 ? 4 : 2; }
  QK_HOST_DEVICE uintptr_t address() const { return reinterpret_cast<uintptr_t>(data); }
  QK_HOST_DEVICE float operator[](int i) const {
    switch (dtype) {
      case DType::kFloat32: return static_cast<const float*>(data)[i];
      case DType::kBFloat16: return widen(static_cast<const BFloat16*>(data)[i]);
      case DType::kFloat16: return widen(static_cast<const Float16*>(data)[i]);
    }
    return 0;
  }
  QK_HOST_DEVICE void read(Tile& tile, int64_t at, int step) const {
    const char* first = static_cast<const char*>(data) + at * size();
    const int64_t stride = static_cast<int64_t>(step) * size();
    if (dtype == DType::kFloat32) {
      uint32_t a[8], b[8];
      words_of<8>(first, a);
      words_of<8>(first + stride, b);
      QK_UNROLL
      for (int i = 0; i < 8; ++i) tile.z[i] = float_of(a[i]), tile.z[8 + i] = float_of(b[i]);
      return;
    }
    uint32_t a[4], b[4];
    words_of<4>(first, a);
    words_of<4>(first + stride, b);
    widen_words(a, tile.z);
    widen_words(b, tile.z + 8);
  }
  QK_HOST_DEVICE void read_vector(Tile& tile, int u, int64_t at) const {
    const char* first = static_cast<const char*>(data) + at * size();
    if (dtype == DType::kFloat32) {
      uint32_t words[8];
      words_of<8>(first, words);
      QK_UNROLL
      for (int i = 0; i < 8; ++i) tile.z[u * 8 + i] = float_of(words[i]);
    } else {
      uint32_t words[4];
      words_of<4>(first, words);
      widen_words(words, tile.z + u * 8);
    }
  }

 private:
  // n words that begin at any even address.
  template <int n>
  QK_HOST_DEVICE static void words_of(const char* address, uint32_t* out) {
    const uint32_t past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) & 15);
    const char* line = address - past;
    uint32_t all[n + 4];
    QK_UNROLL
    for (int i = 0; i < n; i += 4) {
      const Line l = load_line(line + 4 * i);
      QK_UNROLL
      for (int w = 0; w < 4; ++w) all[i + w] = l.word[w];
    }
    if (past) {
      const Line l = load_line(line + 4 * n);
      QK_UNROLL
      for (int w = 0; w < 4; ++w) all[n + w] = l.word[w];
    } else {
      QK_UNROLL
      for (int w = 0; w < 4; ++w) all[n + w] = 0;
    }
    uint32_t two[n + 2], one[n + 1];
    QK_UNROLL
    for (int i = 0; i < n + 2; ++i) two[i] = past & 8 ? all[i + 2] : all[i];
    QK_UNROLL
    for (int i = 0; i < n + 1; ++i) one[i] = past & 4 ? two[i + 1] : two[i];
    QK_UNROLL
    for (int i = 0; i < n; ++i) out[i] = shifted_down(one[i], one[i + 1], (past & 2) * 8);
  }

  QK_HOST_DEVICE void widen_words(const uint32_t* words, float* z) const {
    const Line line = {{words[0], words[1], words[2], words[3]}};
    if (dtype == DType::kBFloat16) {
      QK_UNROLL
      for (int i = 0; i < 8; ++i) z[i] = lane<BFloat16>(line, i);
    } else {
      QK_UNROLL
      for (int i = 0; i < 8; ++i) z[i] = lane<Float16>(line, i);
    }
  }
};

template <class T>
constexpr DType dtype_of() {
  return std::is_same<T, float>::value      ? DType::kFloat32
         : std::is_same<T, BFloat16>::value ? DType::kBFloat16
                                            : DType::kFloat16;
}

}  // namespace cuda
}  // namespace qk
