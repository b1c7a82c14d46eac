// How a thread loads and stores a row: 128-bit vectors, the elements in them, and the few device instructions that need
// a counterpart on the host.
//
// Everything here also compiles for the host, where the emulation in csrc/tests/cuda_emulation runs the kernels.
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

#ifndef QK_CUDA_THREADS  // bench.gpu_check also builds with other numbers, to compare them on a GPU
#define QK_CUDA_THREADS 128
#endif
constexpr int kThreads = QK_CUDA_THREADS;  // of a block
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

struct alignas(16) Vector128 {
  uint32_t word[4];
};

#if !defined(__CUDA_ARCH__)
// A device faults on a misaligned 128-bit access.
inline void check_alignment(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) & 15) abort();
}
#endif

// For data that is read once: evicted first from the caches.
QK_HOST_DEVICE Vector128 load_streaming(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint4 v = __ldcs(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
#else
  check_alignment(address);
  Vector128 vector;
  memcpy(&vector, address, sizeof vector);
  return vector;
#endif
}

// For vectors that two threads read. Never through the read-only cache: the kernel may write to the same tensor.
QK_HOST_DEVICE Vector128 load_cached(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
#else
  return load_streaming(address);
#endif
}

QK_HOST_DEVICE void store_streaming(void* address, const Vector128& vector) {
#if defined(__CUDA_ARCH__)
  __stcs(static_cast<uint4*>(address), make_uint4(vector.word[0], vector.word[1], vector.word[2], vector.word[3]));
#else
  check_alignment(address);
  memcpy(address, &vector, sizeof vector);
#endif
}

// --- elements of a vector -------------------------------------------------------------------------------------------

// Element i of a vector, as fp32; i is a constant once loops are unrolled.
template <class T>
QK_HOST_DEVICE float element_of(const Vector128& vector, int i);

template <>
QK_HOST_DEVICE float element_of<float>(const Vector128& vector, int i) {
  return float_of(vector.word[i]);
}

template <>
QK_HOST_DEVICE float element_of<BFloat16>(const Vector128& vector, int i) {
  const uint32_t word = vector.word[i / 2];
  return float_of(i % 2 ? word & 0xffff0000u : word << 16);
}

template <>
QK_HOST_DEVICE float element_of<Float16>(const Vector128& vector, int i) {
  const uint32_t word = vector.word[i / 2];
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

// The maximum of two words, element by element; of a NaN and a number, the number.
template <class T>
QK_HOST_DEVICE uint32_t max_of_words(uint32_t a, uint32_t b) {
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
  const Vector128 x = {{a}}, y = {{b}};
  uint32_t word = 0;
  for (int i = 0; i < 2; ++i) {
    const bool keep = !(element_of<T>(y, i) > element_of<T>(x, i)) && element_of<T>(x, i) == element_of<T>(x, i);
    word |= (keep ? a : b) & (i ? 0xffff0000u : 0xffffu);
  }
  return word;
#endif
}

// Two fp32 numbers, each rounded to 16 bits, in one word.
template <class T>
QK_HOST_DEVICE uint32_t pack(float low, float high) {
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
    to->bits = static_cast<uint16_t>(pack<T>(x, 0.0f));
  else
    *to = x;
#else
  *to = narrow<T>(x);
#endif
}

// (high : low) shifted right by 0 or 16 bits.
QK_HOST_DEVICE uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t bits) {
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

// --- tiles: what a thread holds of a row in one iteration -----------------------------------------------------------

// Four 128-bit loads, not yet widened to fp32. kLoads of them make up one vector of kVector elements.
template <class T, int kLoads>
struct PackedTile {
  static constexpr int kPerLoad = 16 / sizeof(T);
  static constexpr int kVectors = 4 / kLoads, kVector = kLoads * kPerLoad, kCount = kVectors * kVector;
  Vector128 load[4];

  QK_HOST_DEVICE float operator[](int i) const { return element_of<T>(load[i / kPerLoad], i % kPerLoad); }

  QK_HOST_DEVICE float max() const {
    uint32_t top[4];
    QK_UNROLL
    for (int w = 0; w < 4; ++w) {
      top[w] = max_of_words<T>(load[0].word[w], load[1].word[w]);
      top[w] = max_of_words<T>(top[w], max_of_words<T>(load[2].word[w], load[3].word[w]));
    }
    const Vector128 rest = {{max_of_words<T>(max_of_words<T>(top[0], top[1]), max_of_words<T>(top[2], top[3]))}};
    return sizeof(T) == 4 ? element_of<T>(rest, 0) : fmaxf(element_of<T>(rest, 0), element_of<T>(rest, 1));
  }

  // Set an element to -inf: it then adds nothing to any sum.
  QK_HOST_DEVICE void mask(int i) {
    constexpr int kPerWord = 4 / sizeof(T);
    uint32_t& word = load[i / kPerLoad].word[i % kPerLoad / kPerWord];
    const uint32_t bits = kPerWord == 1 ? ~0u : i % 2 ? 0xffff0000u : 0xffffu;
    word = (word & ~bits) | (MinusInfinity<T>::word & bits);
  }

  QK_HOST_DEVICE void mask_vector(int u) {
    QK_UNROLL
    for (int w = 0; w < 4 * kLoads; ++w) load[u * kLoads + w / 4].word[w % 4] = MinusInfinity<T>::word;
  }
};

// The same as fp32 numbers, of logits of any type.
template <int kVectors_, int kVector_>
struct WidenedTile {
  static constexpr int kVectors = kVectors_, kVector = kVector_, kCount = kVectors * kVector;
  float z[kCount];

  QK_HOST_DEVICE float operator[](int i) const { return z[i]; }

  QK_HOST_DEVICE float max() const {
    float top = z[0];
    QK_UNROLL
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, z[i]);
    return top;
  }

  QK_HOST_DEVICE void mask(int i) { z[i] = -kInfinity; }

  QK_HOST_DEVICE void mask_vector(int u) {
    QK_UNROLL
    for (int i = 0; i < kVector; ++i) z[u * kVector + i] = -kInfinity;
  }
};

// --- rows -----------------------------------------------------------------------------------------------------------

// A row whose vectors begin at multiples of 16 bytes. A vector takes two loads where the gradient is half as wide as
// the logits: its 128-bit store then needs the elements of both.
template <class T, int kLoads = 1>
struct AlignedRow {
  using Tile = PackedTile<T, kLoads>;
  static constexpr int kMargin = 0;  // elements between the vectors and either end of the row
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
    for (int l = 0; l < kLoads; ++l) tile.load[u * kLoads + l] = load_streaming(data + at + l * Tile::kPerLoad);
  }
};

// A row of any type and any alignment. A vector of 8 elements that does not begin at a multiple of 16 bytes is
// assembled from the aligned 128-bit vectors that contain it (the last of which the neighbouring thread needs as well),
// so all loads are aligned 128-bit loads. They may reach 14 bytes past either end of the vector: hence the margin.
struct AnyRow {
  using Tile = WidenedTile<2, 8>;
  static constexpr int kMargin = 8;
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
  // n words from any even address on.
  template <int n>
  QK_HOST_DEVICE static void words_of(const char* address, uint32_t* out) {
    const uint32_t past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) & 15);
    const char* aligned = address - past;
    uint32_t all[n + 4];
    QK_UNROLL
    for (int i = 0; i < n; i += 4) {
      const Vector128 v = load_cached(aligned + 4 * i);
      QK_UNROLL
      for (int w = 0; w < 4; ++w) all[i + w] = v.word[w];
    }
    if (past) {
      const Vector128 v = load_cached(aligned + 4 * n);
      QK_UNROLL
      for (int w = 0; w < 4; ++w) all[n + w] = v.word[w];
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
    for (int i = 0; i < n; ++i) out[i] = funnel_shift_right(one[i], one[i + 1], (past & 2) * 8);
  }

  QK_HOST_DEVICE void widen_words(const uint32_t* words, float* z) const {
    const Vector128 vector = {{words[0], words[1], words[2], words[3]}};
    if (dtype == DType::kBFloat16) {
      QK_UNROLL
      for (int i = 0; i < 8; ++i) z[i] = element_of<BFloat16>(vector, i);
    } else {
      QK_UNROLL
      for (int i = 0; i < 8; ++i) z[i] = element_of<Float16>(vector, i);
    }
  }
};

}  // namespace cuda
}  // namespace qk
