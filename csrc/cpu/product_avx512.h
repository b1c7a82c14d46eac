// The GEMMs of product.h on vectors of 512 bits, for any arithmetic whose operands are units of 32 bits along the
// depth: one fp32 number, or a pair of bf16. product_avx512_fp32.cpp and product_avx512_bf16.cpp give the arithmetic.
//
// A tile of 12 rows x 32 columns keeps its 24 accumulators, 2 vectors of `right` and a broadcast of `left` in
// registers: 24 multiply-adds per 14 loads. Both operands are repacked, so that the loop reads them from end to end: a
// panel of `right` is 32 columns and 256 units of depth (32 KiB: it stays in the L1 cache while tiles of rows pass), a
// tile of `left` 12 rows and as much depth (12 KiB). What is packed once, and what for how many others, depends on
// which sizes are large:
//
//     logits   columns are many, the depth is short: `left` once per call, `right` once for 672 rows; sums of a panel
//              wait in a buffer and meet `out` once
//     dX       the depth is long: a stretch of it at a time, of `right` for all threads; sums wait in `out`
//     dW       rows are many, the depth is short: `right` once per call, `left` once; sums wait in a buffer
//
// Order of a sum: units ascend, in an accumulator of one entry's own, so that no entry depends on where a tile begins.
// Where `Arithmetic::kBlocks`, an accumulator starts from 0 every 256 units and is then added to the sum, whose
// rounding error grows with depth / 256 instead of the depth.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "pairs.h"
#include "product.h"
#include "stream.h"
#include "thread_pool.h"

namespace qk {
namespace {

constexpr int64_t kRows = 12, kColumns = 32, kDepth = kFp32DepthGroup;  // of a tile, and its depth in units
constexpr int64_t kStreamedBytes = int64_t{32} << 20;  // a larger result bypasses the caches on its way to memory
constexpr int64_t kPanel = kDepth * kColumns, kTile = kDepth * kRows;

float* out_of(const GemmCall& call, int64_t row, int64_t column) {
  return static_cast<float*>(call.out) + row * call.out_stride + column;
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }

template <class Arithmetic>
struct Gemm {
  using Element = typename Arithmetic::Element;
  static constexpr int64_t kPerUnit = 4 / sizeof(Element);

  const GemmCall& call;
  const int threads;
  const int64_t tiles = blocks_of(call.rows, kRows), panels = blocks_of(call.columns, kColumns);
  const int64_t units = blocks_of(call.depth, kPerUnit), blocks = blocks_of(units, kDepth);

  // How far operands are fetched ahead of being packed, in units and in rows of the depth. Processors do it by
  // themselves for a few streams within a page, not for 16, nor from page to page.
  static constexpr int64_t kAhead = 48, kRowsAhead = 16;

  int64_t units_of(int64_t block) const { return std::min(kDepth, units - block * kDepth); }

  // Up to 16 rows from `first` on, of `size`, and `count` units from `unit` on, for an operand with adjacent entries
  // along the depth: `width` rows side by side, unit after unit `step` apart. What lies past an end is 0.
  void pack_transposed(const Operand& operand, int64_t first, int64_t size, int64_t unit, int64_t count, int64_t width,
                       int64_t step, uint32_t* packed) const {
    const __mmask16 lanes = first_lanes(width);
    const int64_t rows = std::min(width, size - first);
    for (int64_t u = 0; u < count; u += 16) {
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i) {
        const Element* const row = operand.as<Element>() + (first + i) * operand.stride;
        v[i] = i < rows ? Arithmetic::load(row, unit + u, call.depth) : _mm512_setzero_si512();
        if (i < rows) __builtin_prefetch(row + (unit + u + kAhead) * kPerUnit);
      }
      transpose(v);
      for (int64_t i = 0; i < std::min<int64_t>(16, count - u); ++i)
        _mm512_mask_storeu_epi32(packed + (u + i) * step, lanes, v[i]);
    }
  }

  // The same for an operand whose rows are the depth.
  void pack_rows(const Operand& operand, int64_t first, int64_t size, int64_t unit, int64_t count, int64_t width,
                 int64_t step, uint32_t* packed) const {
    const __mmask16 here = first_lanes(std::min(width, size - first)), lanes = first_lanes(width);
    const int64_t end = std::min(call.depth, (unit + count) * kPerUnit);
    const Element* row = here ? operand.as<Element>() + unit * kPerUnit * operand.stride + first : nullptr;
    const int64_t stride = here ? operand.stride : 0;  // nothing is read without lanes
    for (int64_t k = unit * kPerUnit; k < end; k += kPerUnit, row += kPerUnit * stride, packed += step) {
      _mm512_mask_storeu_epi32(packed, lanes, Arithmetic::load_rows(row, stride, end - k, here));
      for (int64_t i = 0; i < kPerUnit; ++i) __builtin_prefetch(row + (kRowsAhead + i) * stride);
    }
  }

  void pack(const Operand& operand, int64_t first, int64_t size, int64_t unit, int64_t count, int64_t width,
            int64_t step, uint32_t* packed) const {
    operand.depth_first ? pack_rows(operand, first, size, unit, count, width, step, packed)
                        : pack_transposed(operand, first, size, unit, count, width, step, packed);
  }

  // packed[unit][32 columns] of one panel and one block of the depth.
  void pack_right(int64_t panel, int64_t block, uint32_t* packed) const {
    for (int64_t half = 0; half < kColumns; half += 16)
      pack(call.right, panel * kColumns + half, call.columns, block * kDepth, units_of(block), 16, kColumns,
           packed + half);
  }

  // packed[unit][12 rows] of one tile and one block of the depth.
  void pack_left(int64_t tile, int64_t block, uint32_t* packed) const {
    pack(call.left, tile * kRows, call.rows, block * kDepth, units_of(block), kRows, kRows, packed);
  }

  // sums[12][32] += tile of left x panel of right; rows of sums lie `stride` apart. Where `fresh`, the accumulators
  // start from 0.
  template <bool fresh>
  static void multiply(const uint32_t* left, const uint32_t* right, int64_t count, float* sums, int64_t stride) {
    __m512 acc[kRows][2];
#pragma GCC unroll 12
    for (int64_t i = 0; i < kRows; ++i) {
      acc[i][0] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * stride);
      acc[i][1] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * stride + 16);
    }
    for (int64_t unit = 0; unit < count; ++unit, left += kRows, right += kColumns) {
      const __m512i b0 = _mm512_load_si512(right), b1 = _mm512_load_si512(right + 16);
#pragma GCC unroll 12
      for (int64_t i = 0; i < kRows; ++i) {
        const __m512i a = _mm512_set1_epi32(static_cast<int>(left[i]));
        acc[i][0] = Arithmetic::multiply_add(acc[i][0], a, b0);
        acc[i][1] = Arithmetic::multiply_add(acc[i][1], a, b1);
      }
    }
#pragma GCC unroll 12
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t half = 0; half < 2; ++half) {
        float* const sum = sums + i * stride + half * 16;
        _mm512_storeu_ps(sum, fresh ? _mm512_add_ps(_mm512_loadu_ps(sum), acc[i][half]) : acc[i][half]);
      }
    }
  }

  // `out` from a row and column on, rows x columns as far as it goes, to sums and back; rows of sums lie `stride`
  // apart.
  void load_sums(int64_t row, int64_t rows, int64_t column, int64_t columns, float* sums, int64_t stride) const {
    const int64_t count = std::min(columns, call.columns - column);
    for (int64_t i = 0; i < std::min(rows, call.rows - row); ++i)
      std::memcpy(sums + i * stride, out_of(call, row + i, column), static_cast<size_t>(count) * sizeof(float));
  }

  // The `last` time with the bias, and past the caches if the result is large.
  void store_sums(int64_t row, int64_t rows, int64_t column, int64_t columns, float* sums, int64_t stride,
                  bool last) const {
    const int64_t count = std::min(columns, call.columns - column);
    const bool stream =
        last && !call.accumulate && call.rows * call.columns * static_cast<int64_t>(sizeof(float)) >= kStreamedBytes;
    for (int64_t i = 0; i < std::min(rows, call.rows - row); ++i, sums += stride) {
      if (last && call.bias)
        for (int64_t j = 0; j < count; ++j) sums[j] += call.bias[column + j];
      copy_out(sums, count, out_of(call, row + i, column), stream);
    }
    finish_streams(stream);
  }

  void run() const {
    if (call.rows == 0 || call.columns == 0) return;
    if (call.left.depth_first && call.depth > 0)
      many_rows();
    else if (!call.right.depth_first || call.depth == 0)
      many_columns();
    else
      long_depth();
  }

  void many_columns() const {
    // Tiles of rows whose part of `left` fits an L2 cache of 1 MiB while panels pass; panels that are written together:
    // rows of `out` lie pages apart, so that each visit takes several of their lines.
    constexpr int64_t kTiles = 56, kPanels = 4, kWidth = kPanels * kColumns;
    const Buffer<uint32_t> left = make_buffer<uint32_t>(tiles * kRows * units);
    auto left_of = [&](int64_t tile, int64_t block) {
      return left.get() + (block * kDepth * tiles + tile * units_of(block)) * kRows;
    };
    parallel_for(tiles, threads, [&](int64_t tile) {
      for (int64_t block = 0; block < blocks; ++block) pack_left(tile, block, left_of(tile, block));
    });
    // Blocks of rows of one size: `right` is read and packed for each of them.
    const int64_t row_blocks = blocks_of(tiles, kTiles), block_tiles = blocks_of(tiles, row_blocks);
    // A few panels at a time: the buffers are made once for them.
    const int64_t step = std::clamp<int64_t>(row_blocks * panels / (4 * threads), 1, 16);
    const int64_t groups = blocks_of(panels, step);
    parallel_for(groups * row_blocks, threads, [&](int64_t item) {
      const int64_t begin = item / groups * block_tiles, count = std::min(block_tiles, tiles - begin);
      const int64_t end = std::min(panels, (item % groups + 1) * step);
      const Buffer<uint32_t> right = make_buffer<uint32_t>(kPanel);
      const Buffer<float> sums = make_buffer<float>(count * kRows * kWidth);
      for (int64_t first = item % groups * step; first < end; first += kPanels) {
        const int64_t together = std::min(kPanels, end - first);
        const int64_t row = begin * kRows, column = first * kColumns;
        std::memset(sums.get(), 0, static_cast<size_t>(count * kRows * kWidth) * sizeof(float));
        if (call.accumulate) load_sums(row, count * kRows, column, together * kColumns, sums.get(), kWidth);
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t panel = 0; panel < together; ++panel) {
            pack_right(first + panel, block, right.get());
            for (int64_t tile = 0; tile < count; ++tile)
              multiply<Arithmetic::kBlocks>(left_of(begin + tile, block), right.get(), units_of(block),
                                            sums.get() + tile * kRows * kWidth + panel * kColumns, kWidth);
          }
        store_sums(row, count * kRows, column, together * kColumns, sums.get(), kWidth, true);
      }
    });
  }

  void long_depth() const {
    const int64_t stretch = std::clamp<int64_t>((int64_t{1} << 20) / (panels * kPanel), 1, blocks);  // 4 MiB
    const Buffer<uint32_t> right = make_buffer<uint32_t>(stretch * panels * kPanel);
    constexpr int64_t kTiles = 4;  // that meet a panel while it is in the L1 cache
    const int64_t groups = blocks_of(tiles, kTiles);
    // Where there are few rows, threads share them column by column.
    const int64_t parts = std::clamp<int64_t>(blocks_of(4 * threads, groups), 1, panels);
    const int64_t width = blocks_of(panels, parts);
    for (int64_t start = 0; start < blocks; start += stretch) {
      const int64_t here = std::min(stretch, blocks - start);
      parallel_for(here * panels, threads,
                   [&](int64_t i) { pack_right(i % panels, start + i / panels, right.get() + i * kPanel); });
      parallel_for(groups * parts, threads, [&](int64_t item) {
        const int64_t begin = item / parts * kTiles, end = std::min(tiles, begin + kTiles);
        const int64_t last = std::min(panels, (item % parts + 1) * width);
        const Buffer<uint32_t> left = make_buffer<uint32_t>(kTiles * kTile);
        alignas(64) float sums[kRows * kColumns] = {};
        for (int64_t block = 0; block < here; ++block) {
          const bool first = start + block == 0;
          for (int64_t tile = begin; tile < end; ++tile)
            pack_left(tile, start + block, left.get() + (tile - begin) * kTile);
          for (int64_t panel = item % parts * width; panel < last; ++panel)
            for (int64_t tile = begin; tile < end; ++tile) {
              const int64_t row = tile * kRows, column = panel * kColumns;
              if (first && !call.accumulate)
                std::memset(sums, 0, sizeof sums);
              else
                load_sums(row, kRows, column, kColumns, sums, kColumns);
              multiply<Arithmetic::kBlocks>(left.get() + (tile - begin) * kTile,
                                            right.get() + (block * panels + panel) * kPanel, units_of(start + block),
                                            sums, kColumns);
              store_sums(row, kRows, column, kColumns, sums, kColumns, start + block + 1 == blocks);
            }
        }
      });
    }
  }

  void many_rows() const {
    const Buffer<uint32_t> right = make_buffer<uint32_t>(blocks * panels * kPanel);
    parallel_for(blocks * panels, threads,
                 [&](int64_t i) { pack_right(i % panels, i / panels, right.get() + i * kPanel); });
    // Tiles of a group whose part of `left` fits the L2 cache: each panel meets all of them.
    const int64_t step = std::clamp<int64_t>(std::min(tiles / (4 * threads), 32 / blocks), 1, 8);
    parallel_for(blocks_of(tiles, step), threads, [&](int64_t group) {
      const int64_t begin = group * step, count = std::min(tiles, begin + step) - begin, row = begin * kRows;
      const Buffer<uint32_t> left = make_buffer<uint32_t>(blocks * count * kTile);
      const Buffer<float> buffer = make_buffer<float>(count * kRows * kColumns);
      for (int64_t i = 0; i < blocks * count; ++i) pack_left(begin + i % count, i / count, left.get() + i * kTile);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kColumns;
        // Sums of a short depth are formed where they lie.
        const bool in_place =
            blocks == 1 && call.accumulate && row + count * kRows <= call.rows && column + kColumns <= call.columns;
        float* const sums = in_place ? out_of(call, row, column) : buffer.get();
        const int64_t stride = in_place ? call.out_stride : kColumns;
        if (!in_place) {
          std::memset(sums, 0, static_cast<size_t>(count * kRows * kColumns) * sizeof(float));
          if (call.accumulate) load_sums(row, count * kRows, column, kColumns, sums, stride);
        }
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t tile = 0; tile < count; ++tile) {
            if (in_place)  // those of the next panel
              for (int64_t i = tile * kRows; i < (tile + 1) * kRows; ++i)
                for (int64_t j = kColumns; j < 2 * kColumns; j += 16) __builtin_prefetch(sums + i * stride + j, 1);
            multiply<Arithmetic::kBlocks>(left.get() + (block * count + tile) * kTile,
                                          right.get() + (block * panels + panel) * kPanel, units_of(block),
                                          sums + tile * kRows * stride, stride);
          }
        if (!in_place) store_sums(row, count * kRows, column, kColumns, sums, stride, true);
      }
    });
  }
};

}  // namespace
}  // namespace qk
