// out[i, j] = sum_k left[i, k] right[j, k] (+ bias[j]), bf16 in, fp32 out, with VDPBF16PS.
//
// The instruction multiplies pairs of neighbours along k: 16 columns at once, one 32-bit pair of `left` broadcast to
// them. A tile of 12 rows x 32 columns keeps its 24 accumulators, 2 vectors of `right` and a broadcast in registers:
// 24 multiply-adds per 14 loads. `right` is repacked panel by panel, 32 columns and 512 of k at a time (32 KiB: it
// stays in the L1 cache while all rows pass), `left` once per call, so that the loop reads both from end to end. Sums
// of a panel's earlier k wait in a buffer of its own and meet `out` once.
//
// Order: for each entry k ascends in pairs, pairs of a block in the accumulator, blocks after each other into the same
// accumulator. No entry's sum depends on where the tile begins. VDPBF16PS rounds to nearest and takes subnormals for 0.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "product.h"
#include "thread_pool.h"

namespace qk {
namespace {

constexpr int64_t kRows = 12, kColumns = 32, kDepth = 512;  // of a tile; depth in elements
constexpr int64_t kPairs = kDepth / 2;

constexpr std::align_val_t kCacheLine{64};

struct Free {
  void operator()(void* p) const { ::operator delete(p, kCacheLine); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> make_buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kCacheLine)));
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Pairs [first, first + 16) of a row, 0 past its end.
__m512i load_pairs(const BFloat16* row, int64_t first, int64_t depth) {
  const int64_t left = std::clamp<int64_t>(depth - 2 * first, 0, 32);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + (left ? 2 * first : 0));
}

// 16 x 16 pairs: row i of `v` becomes column i.
void transpose(__m512i (&v)[16]) {
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

// packed[pair][32 columns] of one panel and one block of k; columns past the end are 0.
void pack_right(const ProductCall& call, int64_t panel, int64_t block, int64_t pairs, uint32_t* packed) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = panel * kColumns + half * 16;
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i)
        v[i] = first + i < call.columns
                   ? load_pairs(call.right + (first + i) * call.right_stride, block * kPairs + pair, call.depth)
                   : _mm512_setzero_si512();
      transpose(v);
      for (int64_t i = 0; i < std::min<int64_t>(16, pairs - pair); ++i)
        _mm512_store_si512(packed + (pair + i) * kColumns + half * 16, v[i]);
    }
  }
}

// packed[block of k][tile of rows][pair][12 rows]; rows past the end are 0.
void pack_left(const ProductCall& call, int64_t tile, int64_t tiles, uint32_t* packed) {
  const int64_t pairs = blocks_of(call.depth, 2);
  for (int64_t block = 0; block * kPairs < pairs; ++block) {
    const int64_t here = std::min(kPairs, pairs - block * kPairs);
    uint32_t* to = packed + (block * kPairs * tiles + tile * here) * kRows;
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = tile * kRows + i;
      for (int64_t pair = 0; pair < here; ++pair) {
        const int64_t k = 2 * (block * kPairs + pair);
        uint32_t value = 0;
        if (row < call.rows) std::memcpy(&value, call.left + row * call.left_stride + k, k + 1 < call.depth ? 4 : 2);
        to[pair * kRows + i] = value;
      }
    }
  }
}

// sums[12][32] += tile of left x panel of right.
void multiply(const uint32_t* left, const uint32_t* right, int64_t pairs, float* sums) {
  __m512 acc[kRows][2];
#pragma GCC unroll 12
  for (int64_t i = 0; i < kRows; ++i) {
    acc[i][0] = _mm512_load_ps(sums + i * kColumns);
    acc[i][1] = _mm512_load_ps(sums + i * kColumns + 16);
  }
  for (int64_t pair = 0; pair < pairs; ++pair, left += kRows, right += kColumns) {
    const __m512bh b0 = (__m512bh)_mm512_load_si512(right), b1 = (__m512bh)_mm512_load_si512(right + 16);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kRows; ++i) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[i]));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], b0, a);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], b1, a);
    }
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < kRows; ++i) {
    _mm512_store_ps(sums + i * kColumns, acc[i][0]);
    _mm512_store_ps(sums + i * kColumns + 16, acc[i][1]);
  }
}

}  // namespace

void product_avx512_bf16(const ProductCall& call, int threads) {
  const int64_t tiles = blocks_of(call.rows, kRows), panels = blocks_of(call.columns, kColumns);
  const int64_t pairs = blocks_of(call.depth, 2);
  const Buffer<uint32_t> left = make_buffer<uint32_t>(tiles * kRows * pairs);
  parallel_for(tiles, threads, [&](int64_t tile) { pack_left(call, tile, tiles, left.get()); });
  // A few panels at a time: the buffers are made once for them.
  const int64_t step = std::clamp<int64_t>(panels / (4 * threads), 1, 16);
  parallel_for(blocks_of(panels, step), threads, [&](int64_t group) {
    const Buffer<uint32_t> right = make_buffer<uint32_t>(kPairs * kColumns);
    const Buffer<float> sums = make_buffer<float>(tiles * kRows * kColumns);
    for (int64_t panel = group * step; panel < std::min(panels, (group + 1) * step); ++panel) {
      std::memset(sums.get(), 0, static_cast<size_t>(tiles * kRows * kColumns) * sizeof(float));
      for (int64_t block = 0; block * kPairs < pairs; ++block) {
        const int64_t here = std::min(kPairs, pairs - block * kPairs);
        pack_right(call, panel, block, here, right.get());
        for (int64_t tile = 0; tile < tiles; ++tile)
          multiply(left.get() + (block * kPairs * tiles + tile * here) * kRows, right.get(), here,
                   sums.get() + tile * kRows * kColumns);
      }
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = panel * kColumns + half * 16;
        const int64_t count = std::clamp<int64_t>(call.columns - first, 0, 16);
        const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
        const __m512 bias =
            call.bias ? _mm512_maskz_loadu_ps(mask, call.bias + (count ? first : 0)) : _mm512_setzero_ps();
        if (count == 0) continue;
        for (int64_t row = 0; row < call.rows; ++row)
          _mm512_mask_storeu_ps(call.out + row * call.out_stride + first, mask,
                                _mm512_add_ps(_mm512_load_ps(sums.get() + row * kColumns + half * 16), bias));
      }
    }
  });
}

}  // namespace qk
