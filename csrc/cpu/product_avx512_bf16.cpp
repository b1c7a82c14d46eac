// Two GEMMs of product.h with VDPBF16PS: the logits, out[i, j] = sum_k left[i, k] right[j, k] (+ bias[j]), and sums of
// dW over chunks, out[i, j] += sum_k left[k, i] right[k, j]. bf16 in, fp32 out.
//
// The instruction multiplies pairs of neighbours along k: 16 columns at once, one 32-bit pair of `left` broadcast to
// them. A tile of 12 rows x 32 columns keeps its 24 accumulators, 2 vectors of `right` and a broadcast in registers:
// 24 multiply-adds per 14 loads. `right` is repacked panel by panel, 32 columns and 512 of k at a time (32 KiB: it
// stays in the L1 cache while all rows pass), `left` once per call, so that the loop reads both from end to end. Sums
// of a panel's earlier k wait in a buffer of its own and meet `out` once.
//
// The sum over rows (dW) has its k along the rows of both matrices: pairs are made of two rows. There `right`, the
// hidden states, is packed once per call, and `left`, as large as the logits, a group of tiles and a block of k at a
// time; sums wait in `out`.
//
// Order: for each entry k ascends in pairs, pairs of a block in the accumulator, blocks after each other into the same
// accumulator. No entry's sum depends on where the tile begins. VDPBF16PS rounds to nearest and takes subnormals for 0.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "pairs.h"
#include "product.h"
#include "stream.h"
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

float* out_of(const GemmCall& call) { return static_cast<float*>(call.out); }

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Pairs [first, first + 16) of a row, 0 past its end.
__m512i load_pairs(const BFloat16* row, int64_t first, int64_t depth) {
  const int64_t left = std::clamp<int64_t>(depth - 2 * first, 0, 32);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + (left ? 2 * first : 0));
}

// packed[pair][32 columns] of one panel and one block of k; columns past the end are 0.
void pack_right(const GemmCall& call, int64_t panel, int64_t block, int64_t pairs, uint32_t* packed) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = panel * kColumns + half * 16;
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i)
        v[i] = first + i < call.columns
                   ? load_pairs(call.right.data + (first + i) * call.right.stride, block * kPairs + pair, call.depth)
                   : _mm512_setzero_si512();
      transpose(v);
      for (int64_t i = 0; i < std::min<int64_t>(16, pairs - pair); ++i)
        _mm512_store_si512(packed + (pair + i) * kColumns + half * 16, v[i]);
    }
  }
}

// packed[block of k][tile of rows][pair][12 rows]; rows past the end are 0.
void pack_left(const GemmCall& call, int64_t tile, int64_t tiles, uint32_t* packed) {
  const int64_t pairs = blocks_of(call.depth, 2);
  for (int64_t block = 0; block * kPairs < pairs; ++block) {
    const int64_t here = std::min(kPairs, pairs - block * kPairs);
    uint32_t* to = packed + (block * kPairs * tiles + tile * here) * kRows;
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = tile * kRows + i, k = 2 * block * kPairs;
      const BFloat16* from = call.left.data + row * call.left.stride + k;
      const int64_t whole = row < call.rows ? std::min(here, (call.depth - k) / 2) : 0;
      for (int64_t pair = 0; pair < whole; ++pair) std::memcpy(to + pair * kRows + i, from + 2 * pair, 4);
      for (int64_t pair = whole; pair < here; ++pair) {
        uint32_t value = 0;
        if (row < call.rows) std::memcpy(&value, from + 2 * pair, 2);  // the last of an odd depth
        to[pair * kRows + i] = value;
      }
    }
  }
}

// sums[12][32] += tile of left x panel of right; rows of sums lie `stride` apart.
void multiply(const uint32_t* left, const uint32_t* right, int64_t pairs, float* sums, int64_t stride) {
  __m512 acc[kRows][2];
#pragma GCC unroll 12
  for (int64_t i = 0; i < kRows; ++i) {
    acc[i][0] = _mm512_load_ps(sums + i * stride);
    acc[i][1] = _mm512_load_ps(sums + i * stride + 16);
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
    _mm512_store_ps(sums + i * stride, acc[i][0]);
    _mm512_store_ps(sums + i * stride + 16, acc[i][1]);
  }
}

// Pairs of two rows each of a matrix whose rows are k: `count` columns, as many as fit `lanes`; the other lanes are 0.
// Pair after pair lies `step` apart.
void pack_rows(const BFloat16* matrix, int64_t stride, int64_t count, int64_t lanes, int64_t depth, int64_t step,
               uint32_t* packed) {
  const __mmask16 here = static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, lanes)) - 1);
  const __mmask16 all = static_cast<__mmask16>((1u << lanes) - 1);
  if (here == 0) matrix = nullptr, stride = 0;  // nothing is read
  for (int64_t k = 0; k < depth; k += 2, matrix += 2 * stride, packed += step) {
    __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, matrix));
    if (k + 1 < depth) {
      const __m512i next = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, matrix + stride));
      pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(next, 16));
    }
    _mm512_mask_storeu_epi32(packed, all, pairs);
  }
}

// A tile of `out` on its way to the accumulators and back.
void copy_tile(const GemmCall& call, int64_t row, int64_t column, float* sums, bool back) {
  const int64_t rows = std::min(kRows, call.rows - row);
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = column + half * 16, count = std::clamp<int64_t>(call.columns - first, 0, 16);
    if (count == 0) continue;
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t i = 0; i < rows; ++i) {
      float *out = out_of(call) + (row + i) * call.out_stride + first, *sum = sums + i * kColumns + half * 16;
      if (back)
        _mm512_mask_storeu_ps(out, mask, _mm512_load_ps(sum));
      else
        _mm512_store_ps(sum, _mm512_maskz_loadu_ps(mask, out));
    }
  }
}

constexpr int64_t kStreamedBytes = int64_t{32} << 20;  // a larger result bypasses the caches on its way to memory
// Panels that are written together: rows of `out` lie pages apart, so that each visit takes several of their lines.
constexpr int64_t kPanels = 4, kWidth = kPanels * kColumns;

// out = sums[row][kWidth] + bias for `panels` panels from the given one on.
void write_panels(const GemmCall& call, int64_t panel, int64_t panels, float* sums, bool stream) {
  const int64_t column = panel * kColumns, count = std::min(call.columns - column, panels * kColumns);
  for (int64_t row = 0; row < call.rows; ++row, sums += kWidth) {
    if (call.bias)
      for (int64_t j = 0; j < count; ++j) sums[j] += call.bias[column + j];
    copy_out(sums, count, out_of(call) + row * call.out_stride + column, stream);
  }
  finish_streams(stream);
}

void product(const GemmCall& call, int threads) {
  const int64_t tiles = blocks_of(call.rows, kRows), panels = blocks_of(call.columns, kColumns);
  const int64_t pairs = blocks_of(call.depth, 2);
  const Buffer<uint32_t> left = make_buffer<uint32_t>(tiles * kRows * pairs);
  parallel_for(tiles, threads, [&](int64_t tile) { pack_left(call, tile, tiles, left.get()); });
  const bool stream = call.rows * call.columns * static_cast<int64_t>(sizeof(float)) >= kStreamedBytes;
  // A few panels at a time: the buffers are made once for them.
  const int64_t step = std::clamp<int64_t>(panels / (4 * threads), 1, 16);
  parallel_for(blocks_of(panels, step), threads, [&](int64_t group) {
    const Buffer<uint32_t> right = make_buffer<uint32_t>(kPairs * kColumns);
    const Buffer<float> sums = make_buffer<float>(tiles * kRows * kWidth);
    const int64_t end = std::min(panels, (group + 1) * step);
    for (int64_t first = group * step; first < end; first += kPanels) {
      const int64_t together = std::min(kPanels, end - first);
      std::memset(sums.get(), 0, static_cast<size_t>(tiles * kRows * kWidth) * sizeof(float));
      for (int64_t panel = 0; panel < together; ++panel)
        for (int64_t block = 0; block * kPairs < pairs; ++block) {
          const int64_t here = std::min(kPairs, pairs - block * kPairs);
          pack_right(call, first + panel, block, here, right.get());
          for (int64_t tile = 0; tile < tiles; ++tile)
            multiply(left.get() + (block * kPairs * tiles + tile * here) * kRows, right.get(), here,
                     sums.get() + tile * kRows * kWidth + panel * kColumns, kWidth);
        }
      write_panels(call, first, together, sums.get(), stream);
    }
  });
}

void add_row_product(const GemmCall& call, int threads) {
  const int64_t tiles = blocks_of(call.rows, kRows), panels = blocks_of(call.columns, kColumns);
  const int64_t blocks = blocks_of(call.depth, kDepth);
  const Buffer<uint32_t> right = make_buffer<uint32_t>(blocks * panels * kPairs * kColumns);
  auto depth_of = [&](int64_t block) { return std::min(kDepth, call.depth - block * kDepth); };
  parallel_for(blocks * panels, threads, [&](int64_t i) {
    const int64_t block = i / panels, column = i % panels * kColumns;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = column + half * 16;
      pack_rows(call.right.data + block * kDepth * call.right.stride + std::min(first, call.columns), call.right.stride,
                call.columns - first, 16, depth_of(block), kColumns, right.get() + i * kPairs * kColumns + half * 16);
    }
  });
  // Tiles of a group fit the L2 cache together: each panel meets all of them.
  const int64_t step = std::clamp<int64_t>(tiles / (4 * threads), 1, 32);
  parallel_for(blocks_of(tiles, step), threads, [&](int64_t group) {
    const int64_t begin = group * step, end = std::min(tiles, begin + step);
    const Buffer<uint32_t> left = make_buffer<uint32_t>(step * kPairs * kRows);
    alignas(64) float sums[kRows * kColumns] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t pairs = blocks_of(depth_of(block), 2);
      for (int64_t tile = begin; tile < end; ++tile)
        pack_rows(call.left.data + block * kDepth * call.left.stride + tile * kRows, call.left.stride,
                  call.rows - tile * kRows, kRows, depth_of(block), kRows,
                  left.get() + (tile - begin) * kPairs * kRows);
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t tile = begin; tile < end; ++tile) {
          copy_tile(call, tile * kRows, panel * kColumns, sums, false);
          multiply(left.get() + (tile - begin) * kPairs * kRows,
                   right.get() + (block * panels + panel) * kPairs * kColumns, pairs, sums, kColumns);
          copy_tile(call, tile * kRows, panel * kColumns, sums, true);
        }
    }
  });
}

}  // namespace

void gemm_avx512_bf16(const GemmCall& call, int threads) {
  call.left.depth_first ? add_row_product(call, threads) : product(call, threads);
}

}  // namespace qk
