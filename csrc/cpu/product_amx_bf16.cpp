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
// of that region wait in a buffer from slab to slab, and in `out` from one packing of the shared operand to the next.
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

// An operand, its size and depth, and the side of the GEMM it is on.
struct Side {
  Operand operand;
  int64_t size, depth, panels;
  bool is_left;
};

// One tile of an operand: 16 entries of its size from `first`, 32 of the depth from `k`; 0 beyond the edges. The left
// operand's tile has an entry in each row, the right one's a pair along the depth.
void pack_tile(const Side& side, int64_t first, int64_t k, BFloat16* to) {
  const Operand& operand = side.operand;
  uint32_t (&tile)[16][16] = *reinterpret_cast<uint32_t (*)[16][16]>(to);
  const int64_t count = std::clamp<int64_t>(side.size - first, 0, kTile), here = std::min(side.depth - k, kStep);
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
  if (operand.depth_first == side.is_left) transpose(tile);
}

// Where the steps of packed panels are, within a group of the depth: `together` panels at a time, their slabs in order.
struct Packing {
  int64_t panels, together, steps, slab;

  int64_t at(int64_t panel, int64_t step) const {
    const int64_t first = panel / together * together, here = std::min(together, panels - first);
    const int64_t begin = step / slab * slab, length = std::min(slab, steps - begin);
    return (first * steps + here * begin + (panel - first) * length + step - begin) * kStepElements;
  }
};

struct Range {
  int64_t begin, end;
};

// Packs `panels` of a side, the first of which is panel 0 of the packing less `origin`, and `steps` of the group that
// begins at depth `k`.
void pack(const Side& side, int64_t k, Range panels, Range steps, const Packing& packing, int64_t origin,
          BFloat16* packed) {
  auto one = [&](int64_t panel, int64_t step) {
    BFloat16* to = packed + packing.at(panel - origin, step);
    for (int64_t half = 0; half < 2; ++half)
      pack_tile(side, panel * kPanel + half * kTile, k + step * kStep, to + half * kTileElements);
  };
  if (!side.operand.depth_first) {  // either way the matrix is read row by row
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      for (int64_t step = steps.begin; step < steps.end; ++step) one(panel, step);
    return;
  }
  const int64_t first = panels.begin * kPanel, count = std::min(panels.end * kPanel, side.size) - first;
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    // Short pieces of rows that are far apart: the processor does not see the next ones coming.
    const int64_t next = k + (step + 1) * kStep, rows = step + 1 < steps.end ? std::min(kStep, side.depth - next) : 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t at = 0; at < count; at += kStep)
        __builtin_prefetch(side.operand.data + (next + i) * side.operand.stride + first + at, 0, 3);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) one(panel, step);
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

// One call: how the work is divided, and the parts of it. See the top of the file for the words.
class Gemm {
 public:
  Gemm(const GemmCall& call, int threads)
      : call_(call), threads_(std::max(threads, 1)), all_steps_(divide_up(call.depth, kStep)) {
    const Side left{call.left, call.rows, call.depth, divide_up(call.rows, kPanel), true};
    const Side right{call.right, call.columns, call.depth, divide_up(call.columns, kPanel), false};
    owns_left_ = left.panels >= right.panels;
    owned_ = owns_left_ ? left : right;
    shared_ = owns_left_ ? right : left;

    groups_ = all_steps_ <= kWholeSteps ? 1 : divide_up(all_steps_, kGroupSteps);
    group_steps_ = divide_up(all_steps_, groups_);
    slab_ = divide_up(group_steps_, divide_up(group_steps_, kSlabSteps));
    // Groups whose shared operand is packed at a time: enough that the way of the sums to memory and back, 8 bytes
    // each, costs no more than the operands' way to the processor, 2 bytes each.
    const int64_t worthwhile = 4 * call.rows * call.columns / (call.rows + call.columns);
    at_a_time_ = std::clamp<int64_t>(worthwhile / (group_steps_ * kStep), 1, groups_);
    together_ = std::min(shared_.panels, groups_ == 1 ? kTogether : kGroupedTogether);
    batch_ = std::clamp<int64_t>(divide_up(owned_.panels, 2 * threads_), 1, groups_ == 1 ? kBatch : kGroupedBatch);
    sums_stride_ = (owns_left_ ? together_ : batch_) * kPanel + 16;  // spreads rows over the sets of the cache
    stream_ = at_a_time_ == groups_ && call.rows * call.columns * 4 >= kStreamedBytes;

    waiting_ = static_cast<float*>(call.out);
    waiting_stride_ = call.out_stride;
    if (call.out_type == DType::kBFloat16 && at_a_time_ < groups_) {
      waiting_buffer_ = make_buffer<float>(call.rows * call.columns);
      waiting_ = waiting_buffer_.get();
      waiting_stride_ = call.columns;
    }
    packed_ = make_buffer<BFloat16>(at_a_time_ * group_elements());
  }

  void run() {
    Workspaces workspaces(threads_, batch_elements() + 2 * (owns_left_ ? batch_ : together_) * kPanel * sums_stride_);
    for (int64_t begin = 0; begin < groups_; begin += at_a_time_) {
      const Range groups{begin, std::min(groups_, begin + at_a_time_)};
      pack_shared(groups);
      parallel_for(divide_up(owned_.panels, batch_), threads_, [&](int64_t task) {
        BFloat16* const workspace = workspaces.take();
        multiply_batch(groups, {task * batch_, std::min(owned_.panels, (task + 1) * batch_)}, workspace);
        workspaces.give_back(workspace);
      });
    }
  }

 private:
  // Rows and columns of the result that a batch and some shared panels make.
  struct Region {
    int64_t row, column, rows, columns;
  };

  int64_t group_elements() const { return shared_.panels * group_steps_ * kStepElements; }
  int64_t batch_elements() const { return batch_ * group_steps_ * kStepElements; }
  int64_t depth_of(int64_t group) const { return group * group_steps_ * kStep; }
  int64_t steps_of(int64_t group) const {
    return std::clamp<int64_t>(all_steps_ - group * group_steps_, 0, group_steps_);
  }
  Packing shared_packing(int64_t group) const { return {shared_.panels, together_, steps_of(group), slab_}; }

  // A task for each step of the depth where that runs along the rows of the matrix, for each panel elsewhere.
  void pack_shared(Range groups) {
    const bool by_step = shared_.operand.depth_first;
    const int64_t parts = by_step ? group_steps_ : shared_.panels;
    parallel_for((groups.end - groups.begin) * parts, threads_, [&](int64_t i) {
      const int64_t group = groups.begin + i / parts, part = i % parts, steps = steps_of(group);
      if (by_step && part >= steps) return;
      const Range one{part, part + 1};
      pack(shared_, depth_of(group), by_step ? Range{0, shared_.panels} : one, by_step ? one : Range{0, steps},
           shared_packing(group), 0, packed_.get() + (group - groups.begin) * group_elements());
    });
  }

  void multiply_batch(Range groups, Range panels, BFloat16* workspace) {
    float* const sums = reinterpret_cast<float*>(workspace + batch_elements());
    const int64_t count = panels.end - panels.begin;
    int64_t packed_group = -1;
    Tiles tiles;
    for (int64_t other = 0; other < shared_.panels; other += together_) {
      const int64_t others = std::min(together_, shared_.panels - other);
      Region region{panels.begin * kPanel, other * kPanel, count * kPanel, others * kPanel};
      if (!owns_left_) region = {region.column, region.row, region.columns, region.rows};
      region.rows = std::min(region.rows, call_.rows - region.row);
      region.columns = std::min(region.columns, call_.columns - region.column);
      if (resumes(groups))
        for (int64_t i = 0; i < region.rows; ++i)
          std::memcpy(sums + i * sums_stride_, waiting_ + (region.row + i) * waiting_stride_ + region.column,
                      static_cast<size_t>(region.columns) * sizeof(float));
      for (int64_t group = groups.begin; group < groups.end; ++group) {
        const int64_t steps = steps_of(group);
        const Packing packing{count, kBatch, steps, slab_};
        if (packed_group != group) pack(owned_, depth_of(group), panels, {0, steps}, packing, panels.begin, workspace);
        packed_group = group;
        for (int64_t step = 0; step < steps; step += slab_) {
          const bool is_first = group == groups.begin && step == 0;
          const bool is_last = group + 1 == groups.end && step + slab_ >= steps;
          for (int64_t s = 0; s < others; ++s) {
            const BFloat16* theirs =
                packed_.get() + (group - groups.begin) * group_elements() + shared_packing(group).at(other + s, step);
            multiply_strip(tiles, region, s, count, workspace, packing, theirs, step, !is_first || resumes(groups),
                           sums);
            // While these rows are in the L1 cache.
            if (is_last && !owns_left_)
              write(region, {s * kPanel, std::min(region.rows, (s + 1) * kPanel)}, groups.end == groups_, sums);
          }
        }
      }
      if (owns_left_) write(region, {0, region.rows}, groups.end == groups_, sums);
    }
#if defined(__AVX512F__)
    if (stream_) _mm_sfence();  // streamed results are weakly ordered
#endif
  }

  // A slab of one shared panel, number `s` of its region, times that of each panel of the batch.
  void multiply_strip(Tiles& tiles, const Region& region, int64_t s, int64_t count, const BFloat16* batch,
                      const Packing& packing, const BFloat16* theirs, int64_t step, bool resume, float* sums) {
    const int64_t steps = std::min(slab_, packing.steps - step);
    // The next shared panel, as a rule, comes to the L2 cache meanwhile, a part with each panel of the batch.
    const char* next = reinterpret_cast<const char*>(theirs + steps * kStepElements);
    const int64_t lines = divide_up(2 * kStepElements / 64, count);
    for (int64_t o = 0; o < count; ++o, next += lines * steps * 64) {
      const BFloat16* const mine = batch + packing.at(o, step);
      const int64_t i = (owns_left_ ? o : s) * kPanel, j = (owns_left_ ? s : o) * kPanel;
      const bool two_left = region.rows - i > kTile, two_right = region.columns - j > kTile;
      const auto multiply = two_left    ? two_right ? multiply_block<2, 2> : multiply_block<2, 1>
                            : two_right ? multiply_block<1, 2>
                                        : multiply_block<1, 1>;
      multiply(tiles, owns_left_ ? mine : theirs, owns_left_ ? theirs : mine, steps, resume,
               sums + i * sums_stride_ + j, sums_stride_, next, lines);
    }
  }

  bool resumes(Range groups) const { return groups.begin > 0 || call_.accumulate; }

  // Sums of some rows of a region, to the result or to where they wait.
  void write(const Region& region, Range rows, bool is_result, float* sums) const {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      float* const row = sums + i * sums_stride_;
      if (!is_result) {
        copy_out(row, region.columns, waiting_ + (region.row + i) * waiting_stride_ + region.column, false);
        continue;
      }
      if (call_.bias)
        for (int64_t j = 0; j < region.columns; ++j) row[j] += call_.bias[region.column + j];
      const int64_t at = (region.row + i) * call_.out_stride + region.column;
      if (call_.out_type == DType::kBFloat16)
        copy_out(row, region.columns, static_cast<BFloat16*>(call_.out) + at, stream_);
      else
        copy_out(row, region.columns, static_cast<float*>(call_.out) + at, stream_);
    }
  }

  const GemmCall& call_;
  const int threads_;
  const int64_t all_steps_;  // of the depth
  bool owns_left_;
  Side owned_, shared_;
  int64_t groups_, group_steps_, slab_;     // groups of the depth, of about equal length, and slabs of these
  int64_t at_a_time_;                       // groups
  int64_t batch_, together_, sums_stride_;  // a region: panels of the owned and the shared operand
  bool stream_;
  // Where sums wait until the next groups have been packed: in `out`, or in a buffer where that is bf16.
  float* waiting_;
  int64_t waiting_stride_;
  Buffer<float> waiting_buffer_;
  Buffer<BFloat16> packed_;
};

}  // namespace

void QK_GEMM(const GemmCall& call, int threads) {
  if (call.rows == 0 || call.columns == 0) return;
  if (call.depth > 0)
    Gemm(call, threads).run();
  else if (!call.accumulate)
    fill_empty_sum(call);
}

}  // namespace qk
