// The GEMMs of product.h in AMX tiles: TDPBF16PS multiplies a tile of 16 rows x 32 bf16 with one of 16 pairs along the
// depth x 16 columns and adds the result to a tile of 16 x 16 fp32.
//
// A block of the result is 2 x 2 tiles, so that 4 tile loads feed 4 multiplications. Both operands are packed into the
// layout of their tiles, one after the other in the order in which the loop reads them: loads run from end to end
// whatever the strides and alignment of the matrices are, and what lies beyond an edge is 0.
//
// The operand of more panels is *owned*: a task packs a batch of its panels, which stays in the L2 cache, and no other
// task reads it. The other operand is *shared*: all threads pack it once, as a whole or, where it is large (the weight
// in dX), some groups of the depth at a time. A task multiplies its batch with a few shared panels at a time; the sums
// of that region wait in a buffer from slab to slab, and in `out` from group to group.
//
//     panel   32 rows of the left or columns of the right operand: two tiles for each step of 32 along the depth
//     slab    so much of the depth that a panel and the one it meets fit the L1 cache
//     group   so much of the depth that a batch fits the L2 cache
//
// Numerics: of the 32 terms of a step the instruction adds the even and the odd ones in fp32, each in order, then both,
// then the result to the sum; steps follow one another. Nothing else is ever added (a bias comes last), so that no
// entry's bits depend on how the work is divided. Products of bf16 are exact in fp32; subnormal inputs and results
// count as 0, roundings are to nearest even.
//
// Compiled twice: for the processor's tiles, and with plain code in their place (QK_EMULATE_AMX) for tests elsewhere.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "pairs.h"
#include "product.h"
#include "thread_pool.h"

namespace qk {
namespace {

constexpr int64_t kTile = 16;                         // rows of a tile
constexpr int64_t kPanel = 2 * kTile;                 // rows and columns of a block of the result
constexpr int64_t kStep = 32;                         // bf16 entries of a tile's row: depth of an instruction
constexpr int64_t kTileElements = kTile * kStep;      // 1 KiB
constexpr int64_t kStepElements = 2 * kTileElements;  // of a panel

// Measured on a Xeon with 48 KiB of L1 and 2 MiB of L2 cache, one core, both panels in the L2 cache before: 1700
// GFLOP/s with slabs of 256 to 320, 1500 with 512, 1370 with 1024.
constexpr int64_t kSlabSteps = 10;                   // of two panels: 40 KiB
constexpr int64_t kWholeSteps = 48;                  // a depth up to this is one group,
constexpr int64_t kGroupSteps = 20;                  // a larger one several of these
constexpr int64_t kBatch = 8;                        // panels: up to 768 KiB
constexpr int64_t kTogether = 8;                     // shared panels that a batch meets at a time
constexpr int64_t kGroupedBatch = 4;                 // the same if there are several groups, so that the sums of a
constexpr int64_t kGroupedTogether = 64;             // region, up to 1 MiB, stay in the L2 cache from one to the next
constexpr int64_t kStreamedBytes = 4 * 1024 * 1024;  // a larger result bypasses the caches on its way to memory

#if defined(QK_EMULATE_AMX)

// What the instructions do, in plain code.
class Tiles {
 public:
  Tiles() = default;

  template <int t>
  void zero() {
    std::memset(tiles_[t], 0, sizeof tiles_[t]);
  }
  template <int t>
  void load(const void* from, int64_t stride) {
    for (int64_t i = 0; i < kTile; ++i) std::memcpy(tiles_[t][i], static_cast<const char*>(from) + i * stride, 64);
  }
  template <int t>
  void store(void* to, int64_t stride) const {
    for (int64_t i = 0; i < kTile; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles_[t][i], 64);
  }
  template <int to, int left, int right>
  void multiply() {
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t j = 0; j < kTile; ++j) {
        float sums[2] = {0, 0};
        for (int64_t pair = 0; pair < kTile; ++pair)
          for (int odd = 0; odd < 2; ++odd)
            sums[odd] = add_product(sums[odd], part(tiles_[left][i][pair], odd), part(tiles_[right][pair][j], odd));
        const float sum = flush(float_of(tiles_[to][i][j])) + flush(sums[0] + sums[1]);
        tiles_[to][i][j] = bits_of(flush(sum));
      }
  }

 private:
  static float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }
  // A fused multiplication and addition. Products of bf16 are exact in fp32 unless they are subnormal.
  static float add_product(float sum, float a, float b) {
    const float product = a * b;
    if (std::fabs(product) >= std::numeric_limits<float>::min()) return flush(sum + product);
    return flush(std::fma(a, b, sum));
  }
  static float part(uint32_t pair, int odd) { return flush(float_of(odd ? pair & 0xffff0000u : pair << 16)); }

  uint32_t tiles_[8][kTile][16];
};

#define QK_GEMM gemm_amx_emulated

#else

// The instructions as assembly: compilers that do not know them yet will do, if the assembler does. All memory counts
// as read, since an operand of 1 KiB in rows of any stride cannot be named.
class Tiles {
 public:
  // Tiles 0 to 7 of 16 rows of 64 bytes. They are this thread's until the object goes.
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int t>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int t>
  void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  void store(void* to, int64_t stride) const {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int to, int left, int right>
  void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(to), "i"(left), "i"(right));
  }
};

#define QK_GEMM gemm_amx_bf16

#endif

int64_t divide_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

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

// As many buffers as there are threads, for tasks to borrow: pages are touched for the first time once per call.
class Workspaces {
 public:
  Workspaces(int count, int64_t elements) {
    for (int i = 0; i < count; ++i) {
      buffers_.push_back(make_buffer<BFloat16>(elements));
      free_.push_back(buffers_.back().get());
    }
  }
  BFloat16* take() {
    std::lock_guard<std::mutex> lock(mutex_);
    BFloat16* buffer = free_.back();
    free_.pop_back();
    return buffer;
  }
  void give_back(BFloat16* buffer) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(buffer);
  }

 private:
  std::mutex mutex_;
  std::vector<Buffer<BFloat16>> buffers_;
  std::vector<BFloat16*> free_;
};

// One tile of an operand: 16 entries of its size from `first`, 32 of the depth from `k`; 0 beyond the edges. The left
// operand's tile has an entry in each row, the right one's a pair along the depth.
void pack_tile(const Operand& operand, bool is_left, int64_t first, int64_t size, int64_t k, int64_t depth,
               BFloat16* to) {
  uint32_t (&tile)[16][16] = *reinterpret_cast<uint32_t (*)[16][16]>(to);
  const int64_t count = std::clamp<int64_t>(size - first, 0, kTile), here = std::min(depth - k, kStep);
  const int64_t filled = operand.depth_first ? (here + 1) / 2 : count;  // rows
  if (count == 0 || filled < kTile) std::memset(tile, 0, sizeof tile);
  if (count == 0) return;
  if (operand.depth_first) {
    const BFloat16* from = operand.data + k * operand.stride + first;
    for (int64_t pair = 0; pair < filled; ++pair, from += 2 * operand.stride)
      interleave(from, 2 * pair + 1 < here ? from + operand.stride : nullptr, count, tile[pair]);
  } else {
    const BFloat16* from = operand.data + first * operand.stride + k;
    for (int64_t i = 0; i < count; ++i, from += operand.stride) copy_row(from, here, tile[i]);
  }
  if (operand.depth_first == is_left) transpose(tile);
}

// Where a packed step of a panel is. Within a group of the depth: `together` panels at a time, their slabs in order.
struct Packing {
  int64_t panels, together, steps, slab;

  int64_t at(int64_t panel, int64_t step) const {
    const int64_t first = panel / together * together, here = std::min(together, panels - first);
    const int64_t begin = step / slab * slab, length = std::min(slab, steps - begin);
    return (first * steps + here * begin + (panel - first) * length + step - begin) * kStepElements;
  }
};

// Steps [first, last) from depth `k` on of the panels [begin, begin + packing.panels) of an operand.
void pack(const Operand& operand, bool is_left, int64_t size, int64_t depth, int64_t k, int64_t begin, int64_t end,
          int64_t first, int64_t last, const Packing& packing, int64_t base, BFloat16* packed) {
  auto one = [&](int64_t panel, int64_t step) {
    BFloat16* to = packed + packing.at(panel - base, step);
    for (int64_t half = 0; half < 2; ++half)
      pack_tile(operand, is_left, panel * kPanel + half * kTile, size, k + step * kStep, depth,
                to + half * kTileElements);
  };
  if (operand.depth_first) {  // either way the matrix is read row by row
    const int64_t bytes = (std::min(end * kPanel, size) - begin * kPanel) * static_cast<int64_t>(sizeof(BFloat16));
    for (int64_t step = first; step < last; ++step) {
      // Short pieces of rows that lie far apart: the processor does not see the next ones coming.
      const int64_t next = k + (step + 1) * kStep, rows = step + 1 < last ? std::min(kStep, depth - next) : 0;
      for (int64_t i = 0; i < rows; ++i) {
        const char* row = reinterpret_cast<const char*>(operand.data + (next + i) * operand.stride + begin * kPanel);
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 3);
      }
      for (int64_t panel = begin; panel < end; ++panel) one(panel, step);
    }
  } else {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t step = first; step < last; ++step) one(panel, step);
  }
}

// sums += left right^T over `steps`, or without `resume` sums = ...; `next` is memory to fetch into the L2 cache
// meanwhile, `lines` of 64 bytes per step.
template <int left_tiles, int right_tiles>
void multiply_block(Tiles& tiles, const BFloat16* left, const BFloat16* right, int64_t steps, bool resume, float* sums,
                    int64_t stride, const char* next, int64_t lines) {
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(float)), lower = kTile * stride;
  if (resume) {
    tiles.load<0>(sums, row_bytes);
    if (right_tiles > 1) tiles.load<1>(sums + kTile, row_bytes);
    if (left_tiles > 1) tiles.load<2>(sums + lower, row_bytes);
    if (left_tiles > 1 && right_tiles > 1) tiles.load<3>(sums + lower + kTile, row_bytes);
  } else {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
  }
  for (int64_t step = 0; step < steps; ++step, left += kStepElements, right += kStepElements) {
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    tiles.load<4>(left, 64);
    tiles.load<6>(right, 64);
    tiles.multiply<0, 4, 6>();
    if (right_tiles > 1) {
      tiles.load<7>(right + kTileElements, 64);
      tiles.multiply<1, 4, 7>();
    }
    if (left_tiles > 1) {
      tiles.load<5>(left + kTileElements, 64);
      tiles.multiply<2, 5, 6>();
      if (right_tiles > 1) tiles.multiply<3, 5, 7>();
    }
  }
  tiles.store<0>(sums, row_bytes);
  if (right_tiles > 1) tiles.store<1>(sums + kTile, row_bytes);
  if (left_tiles > 1) tiles.store<2>(sums + lower, row_bytes);
  if (left_tiles > 1 && right_tiles > 1) tiles.store<3>(sums + lower + kTile, row_bytes);
}

void copy_out(const float* sums, int64_t count, float* to, [[maybe_unused]] bool stream) {
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

void copy_out(const float* sums, int64_t count, BFloat16* to, [[maybe_unused]] bool stream) {
  alignas(64) BFloat16 line[32];
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) {
    for (int64_t i = 0; i < 32; ++i) line[i] = narrow<BFloat16>(sums[j + i]);
#if defined(__AVX512F__)
    if (stream && reinterpret_cast<uintptr_t>(to + j) % 64 == 0) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + j), _mm512_load_si512(line));
      continue;
    }
#endif
    std::memcpy(to + j, line, sizeof line);
  }
  for (; j < count; ++j) to[j] = narrow<BFloat16>(sums[j]);
}

void fill_empty_sum(const GemmCall& call) {
  for (int64_t i = 0; i < call.rows; ++i)
    for (int64_t j = 0; j < call.columns; ++j) {
      const float value = call.bias ? call.bias[j] : 0;
      if (call.out_type == DType::kBFloat16)
        static_cast<BFloat16*>(call.out)[i * call.out_stride + j] = narrow<BFloat16>(value);
      else
        static_cast<float*>(call.out)[i * call.out_stride + j] = value;
    }
}

// A row of the result: bias added, rounded to the result's type.
void write_row(const GemmCall& call, int64_t row, int64_t column, int64_t count, float* sums, bool stream) {
  if (call.bias)
    for (int64_t j = 0; j < count; ++j) sums[j] += call.bias[column + j];
  const int64_t at = row * call.out_stride + column;
  if (call.out_type == DType::kBFloat16)
    copy_out(sums, count, static_cast<BFloat16*>(call.out) + at, stream);
  else
    copy_out(sums, count, static_cast<float*>(call.out) + at, stream);
}

}  // namespace

void QK_GEMM(const GemmCall& call, int threads) {
  if (call.rows == 0 || call.columns == 0) return;
  if (call.depth == 0) {
    if (!call.accumulate) fill_empty_sum(call);
    return;
  }
  threads = std::max(threads, 1);
  const int64_t row_panels = divide_up(call.rows, kPanel), column_panels = divide_up(call.columns, kPanel);
  const bool owns_left = row_panels >= column_panels;
  const Operand &owned = owns_left ? call.left : call.right, &shared = owns_left ? call.right : call.left;
  const int64_t owned_size = owns_left ? call.rows : call.columns, shared_size = owns_left ? call.columns : call.rows;
  const int64_t owned_panels = std::max(row_panels, column_panels), shared_panels = std::min(row_panels, column_panels);

  // Groups of the depth, of about equal length, and slabs of these.
  const int64_t all_steps = divide_up(call.depth, kStep);
  const int64_t groups = all_steps <= kWholeSteps ? 1 : divide_up(all_steps, kGroupSteps);
  const int64_t group_steps = divide_up(all_steps, groups);
  auto steps_of = [&](int64_t group) { return std::clamp<int64_t>(all_steps - group * group_steps, 0, group_steps); };
  const int64_t slab = divide_up(group_steps, divide_up(group_steps, kSlabSteps));
  const int64_t group_elements = shared_panels * group_steps * kStepElements;
  // Groups whose shared operand is packed at a time: enough that the way of the sums to memory and back, 8 bytes each,
  // costs no more than the operands' way to the processor, 2 bytes each.
  const int64_t worthwhile = 4 * call.rows * call.columns / (call.rows + call.columns);
  const int64_t at_a_time = std::clamp<int64_t>(worthwhile / (group_steps * kStep), 1, groups);
  // A region: a batch and some panels of the shared operand.
  const int64_t together = std::min(shared_panels, groups == 1 ? kTogether : kGroupedTogether);
  const int64_t batch =
      std::clamp<int64_t>(divide_up(owned_panels, 2 * threads), 1, groups == 1 ? kBatch : kGroupedBatch);
  const int64_t batch_elements = batch * group_steps * kStepElements;
  const int64_t stride = (owns_left ? together : batch) * kPanel + 16;  // spreads rows over the sets of the cache

  const Buffer<BFloat16> packed = make_buffer<BFloat16>(at_a_time * group_elements);
  Workspaces workspaces(threads, batch_elements + 2 * (owns_left ? batch : together) * kPanel * stride);

  // Sums wait in `out` until the next groups have been packed, or in a buffer where that is bf16.
  float* waiting = static_cast<float*>(call.out);
  int64_t waiting_stride = call.out_stride;
  Buffer<float> buffer;
  if (call.out_type == DType::kBFloat16 && at_a_time < groups) {
    buffer = make_buffer<float>(call.rows * call.columns);
    waiting = buffer.get();
    waiting_stride = call.columns;
  }
  const bool stream = at_a_time == groups && call.rows * call.columns * 4 >= kStreamedBytes;

  for (int64_t begin = 0; begin < groups; begin += at_a_time) {
    const int64_t end = std::min(groups, begin + at_a_time);
    auto packing_of = [&](int64_t group) { return Packing{shared_panels, together, steps_of(group), slab}; };
    // A task for each step of the depth where that runs along the rows of the matrix, for each panel elsewhere.
    const bool by_step = shared.depth_first;
    const int64_t parts = by_step ? group_steps : shared_panels;
    parallel_for((end - begin) * parts, threads, [&](int64_t i) {
      const int64_t group = begin + i / parts, part = i % parts, steps = steps_of(group);
      if (by_step && part >= steps) return;
      pack(shared, !owns_left, shared_size, call.depth, group * group_steps * kStep, by_step ? 0 : part,
           by_step ? shared_panels : part + 1, by_step ? part : 0, by_step ? part + 1 : steps, packing_of(group), 0,
           packed.get() + (group - begin) * group_elements);
    });

    const bool resume = begin > 0 || call.accumulate, is_last = end == groups;
    parallel_for(divide_up(owned_panels, batch), threads, [&](int64_t task) {
      const int64_t first = task * batch, count = std::min(batch, owned_panels - first);
      BFloat16* const mine = workspaces.take();
      float* const sums = reinterpret_cast<float*>(mine + batch_elements);
      int64_t packed_group = -1;
      Tiles tiles;
      for (int64_t other = 0; other < shared_panels; other += together) {
        const int64_t others = std::min(together, shared_panels - other);
        const int64_t row = (owns_left ? first : other) * kPanel, column = (owns_left ? other : first) * kPanel;
        const int64_t rows = std::min((owns_left ? count : others) * kPanel, call.rows - row);
        const int64_t columns = std::min((owns_left ? others : count) * kPanel, call.columns - column);
        if (resume)
          for (int64_t i = 0; i < rows; ++i)
            std::memcpy(sums + i * stride, waiting + (row + i) * waiting_stride + column,
                        static_cast<size_t>(columns) * sizeof(float));
        auto write_rows = [&](int64_t i, int64_t last) {
          for (; i < last; ++i)
            if (is_last)
              write_row(call, row + i, column, columns, sums + i * stride, stream);
            else
              copy_out(sums + i * stride, columns, waiting + (row + i) * waiting_stride + column, false);
        };
        for (int64_t group = begin; group < end; ++group) {
          const int64_t steps = steps_of(group);
          const Packing my_packing{count, kBatch, steps, slab}, their_packing = packing_of(group);
          if (packed_group != group)
            pack(owned, owns_left, owned_size, call.depth, group * group_steps * kStep, first, first + count, 0, steps,
                 my_packing, first, mine);
          packed_group = group;
          const BFloat16* const theirs = packed.get() + (group - begin) * group_elements;
          for (int64_t step = 0; step < steps; step += slab) {
            const int64_t here = std::min(slab, steps - step);
            const int64_t lines = divide_up(kStepElements * 2 / 64, count);
            for (int64_t s = 0; s < others; ++s) {
              const BFloat16* const their_panel = theirs + their_packing.at(other + s, step);
              const char* next = reinterpret_cast<const char*>(their_panel + here * kStepElements);
              for (int64_t o = 0; o < count; ++o, next += lines * here * 64) {
                const BFloat16* const my_panel = mine + my_packing.at(o, step);
                const int64_t i = (owns_left ? o : s) * kPanel, j = (owns_left ? s : o) * kPanel;
                const bool two_left = rows - i > kTile, two_right = columns - j > kTile;
                (two_left    ? two_right ? multiply_block<2, 2> : multiply_block<2, 1>
                 : two_right ? multiply_block<1, 2>
                             : multiply_block<1, 1>)(tiles, owns_left ? my_panel : their_panel,
                                                     owns_left ? their_panel : my_panel, here,
                                                     resume || group > begin || step > 0, sums + i * stride + j, stride,
                                                     next, lines);
              }
              // While these rows are in the L1 cache.
              if (!owns_left && group + 1 == end && step + slab >= steps)
                write_rows(s * kPanel, std::min(rows, (s + 1) * kPanel));
            }
          }
        }
        if (owns_left) write_rows(0, rows);
      }
      workspaces.give_back(mine);
    });
  }
}

}  // namespace qk
