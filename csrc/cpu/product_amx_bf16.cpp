// The GEMMs of product.h in AMX tiles: TDPBF16PS multiplies a tile of 16 rows x 32 bf16 with one of 16 pairs along the
// depth x 16 columns and adds the result to a tile of 16 x 16 fp32.
//
// A block of the result is 2 x 2 tiles, so that 4 tile loads feed 4 multiplications. Both operands are packed into the
// layout of their tiles, one after the other in the order in which the loop reads them: loads run from end to end
// whatever the strides and alignment of the matrices are, and what lies beyond an edge is 0.
//
//     panel   32 rows of the left or columns of the right operand: two tiles for each step of 32 along the depth
//     slab    so much of the depth that two panels fit the L1 cache
//     region  panels of both operands whose sums stay in the L2 cache from slab to slab
//
// Where the result is large (logits, dW), the operand of fewer panels, the hidden states, is *shared*: all threads pack
// it once, as a whole. Tasks divide the other one: each packs a batch of its panels, which stays in the L2 cache, and
// multiplies it with a few shared panels at a time. Where the depth is large (dX, over the vocabulary), each task has a
// region of the result and packs both operands slab by slab: as many times as there are regions beside one another, but
// into its own L2 cache, and no thread waits for another.
//
// Numerics: of the 32 terms of a step the instruction adds the even and the odd ones in fp32, each in order, then both,
// then the result to the sum; steps follow one another. Nothing else is ever added (a bias comes last), so that no
// entry's bits depend on how the work is divided. Products of bf16 are exact in fp32; subnormal inputs and results
// count as 0, roundings are to nearest even.
//
// Compiled twice: for the processor's tiles, and with plain code in their place (QK_EMULATE_AMX) for tests elsewhere.
// (tests/amx_instructions.cpp runs the first one elsewhere, too.)
#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "buffer.h"
#include "pairs.h"
#include "plain_tiles.h"
#include "product.h"
#include "stream.h"
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
constexpr int64_t kWholeSteps = 48;                  // a batch is packed for a depth up to this at once,
constexpr int64_t kGroupSteps = 20;                  // for a larger one in groups of these
constexpr int64_t kBatch = 8;                        // panels: up to 768 KiB
constexpr int64_t kTogether = 8;                     // shared panels that a batch meets at a time
constexpr int64_t kGroupedBatch = 4;                 // the same if there are several groups, so that the sums of a
constexpr int64_t kGroupedTogether = 64;             // region, up to 1 MiB, stay in the L2 cache from one to the next
constexpr int64_t kRegionBlocks = 256;               // of a task that packs both operands: 1 MiB of sums
constexpr int64_t kStreamedBytes = 4 * 1024 * 1024;  // a larger result bypasses the caches on its way to memory

#if defined(QK_EMULATE_AMX)

class Tiles {
 public:
  template <int t>
  void zero() {
    tiles_[t].zero();
  }
  template <int t>
  void load(const void* from, int64_t stride) {
    tiles_[t].load(from, stride);
  }
  template <int t>
  void store(void* to, int64_t stride) const {
    tiles_[t].store(to, stride);
  }
  template <int to, int left, int right>
  void multiply() {
    tiles_[to].add_products(tiles_[left], tiles_[right]);
  }

 private:
  PlainTile tiles_[8];
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
    const BFloat16* from = operand.as<BFloat16>() + k * operand.stride + first;
    for (int64_t pair = 0; pair < filled; ++pair, from += 2 * operand.stride)
      interleave(from, 2 * pair + 1 < here ? from + operand.stride : nullptr, count, tile[pair]);
  } else {
    const BFloat16* from = operand.as<BFloat16>() + first * operand.stride + k;
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
  // Pieces of rows that are far apart: the processor does not see the next ones coming.
  if (!side.operand.depth_first) {  // either way the matrix is read row by row
    const int64_t from = k + steps.begin * kStep, to = std::min(k + steps.end * kStep, side.depth);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t next = (panel + 1) * kPanel, end = panel + 1 < panels.end ? std::min(next + kPanel, side.size) : 0;
      for (int64_t row = next; row < end; ++row)
        for (int64_t at = from; at < to; at += kStep)
          __builtin_prefetch(side.operand.as<BFloat16>() + row * side.operand.stride + at, 0, 3);
      for (int64_t step = steps.begin; step < steps.end; ++step) one(panel, step);
    }
    return;
  }
  const int64_t first = panels.begin * kPanel, count = std::min(panels.end * kPanel, side.size) - first;
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    const int64_t next = k + (step + 1) * kStep, rows = step + 1 < steps.end ? std::min(kStep, side.depth - next) : 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t at = 0; at < count; at += kStep)
        __builtin_prefetch(side.operand.as<BFloat16>() + (next + i) * side.operand.stride + first + at, 0, 3);
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
      : call_(call),
        threads_(std::max(threads, 1)),
        left_{call.left, call.rows, call.depth, divide_up(call.rows, kPanel), true},
        right_{call.right, call.columns, call.depth, divide_up(call.columns, kPanel), false},
        steps_(divide_up(call.depth, kStep)),
        stream_(call.rows * call.columns * 4 >= kStreamedBytes) {}

  void run() {
    // Sums that go to memory and back cost 8 bytes each, entries of operands 2: beyond this depth the result is small.
    const int64_t deep = 4 * call_.rows * call_.columns / (call_.rows + call_.columns);
    if (call_.depth > std::max(deep, kWholeSteps * kStep))
      run_by_regions();
    else
      run_by_batches();
  }

 private:
  // Rows and columns of the result.
  struct Region {
    int64_t row, column, rows, columns;
  };

  Region region_of(Range rows, Range columns) const {
    const int64_t row = rows.begin * kPanel, column = columns.begin * kPanel;
    return {row, column, std::min(rows.end * kPanel, call_.rows) - row,
            std::min(columns.end * kPanel, call_.columns) - column};
  }

  // Each task has a region of the result and packs both operands, a slab at a time.
  void run_by_regions() {
    int64_t rows = left_.panels, columns = right_.panels;
    auto tasks = [&] { return divide_up(left_.panels, rows) * divide_up(right_.panels, columns); };
    while (rows * columns > kRegionBlocks || (tasks() < 2 * threads_ && rows * columns > 16))
      (rows >= columns ? rows : columns) = divide_up(std::max(rows, columns), 2);
    const int64_t left_elements = rows * kSlabSteps * kStepElements,
                  right_elements = columns * kSlabSteps * kStepElements;
    const int64_t stride = columns * kPanel + 16;
    Workspaces workspaces(threads_, left_elements + right_elements + 2 * rows * kPanel * stride);
    const int64_t across = divide_up(right_.panels, columns);
    parallel_for(tasks(), threads_, [&](int64_t task) {
      BFloat16* const left = workspaces.take();
      BFloat16* const right = left + left_elements;
      const int64_t row = task / across * rows, column = task % across * columns;
      const Range height{row, std::min(left_.panels, row + rows)};
      const Range width{column, std::min(right_.panels, column + columns)};
      multiply_region(height, width, left, right, reinterpret_cast<float*>(right + right_elements), stride);
      workspaces.give_back(left);
    });
  }

  void multiply_region(Range rows, Range columns, BFloat16* left, BFloat16* right, float* sums, int64_t stride) {
    const Region region = region_of(rows, columns);
    Tiles tiles;
    if (call_.accumulate) read(region, sums, stride);
    for (int64_t step = 0; step < steps_; step += kSlabSteps) {
      const int64_t steps = std::min(kSlabSteps, steps_ - step);
      const Packing down{rows.end - rows.begin, rows.end - rows.begin, steps, steps};
      const Packing across{columns.end - columns.begin, columns.end - columns.begin, steps, steps};
      pack(left_, step * kStep, rows, {0, steps}, down, rows.begin, left);
      pack(right_, step * kStep, columns, {0, steps}, across, columns.begin, right);
      for (int64_t i = 0; i < down.panels; ++i)
        for (int64_t j = 0; j < across.panels; ++j)
          multiply(tiles, region, i * kPanel, j * kPanel, left + down.at(i, 0), right + across.at(j, 0), steps,
                   step > 0 || call_.accumulate, sums, stride, left, 0);
    }
    write(region, {0, region.rows}, sums, stride);
    finish_streams(stream_);
  }

  // Tasks pack batches of the operand of more panels; the other one is packed before, for all of them.
  void run_by_batches() {
    owns_left_ = left_.panels >= right_.panels;
    const Side& shared = owns_left_ ? right_ : left_;
    const int64_t owned_panels = std::max(left_.panels, right_.panels);
    groups_ = steps_ <= kWholeSteps ? 1 : divide_up(steps_, kGroupSteps);
    group_steps_ = divide_up(steps_, groups_);
    slab_ = divide_up(group_steps_, divide_up(group_steps_, kSlabSteps));
    together_ = std::min(shared.panels, groups_ == 1 ? kTogether : kGroupedTogether);
    const int64_t batch =
        std::clamp<int64_t>(divide_up(owned_panels, 2 * threads_), 1, groups_ == 1 ? kBatch : kGroupedBatch);
    const int64_t batch_elements = batch * group_steps_ * kStepElements;
    const int64_t stride = (owns_left_ ? together_ : batch) * kPanel + 16;  // spreads rows over the sets of the cache
    packed_ = make_buffer<BFloat16>(shared.panels * groups_ * group_steps_ * kStepElements);
    pack_shared(shared);
    Workspaces workspaces(threads_, batch_elements + 2 * (owns_left_ ? batch : together_) * kPanel * stride);
    parallel_for(divide_up(owned_panels, batch), threads_, [&](int64_t task) {
      BFloat16* const workspace = workspaces.take();
      multiply_batch({task * batch, std::min(owned_panels, (task + 1) * batch)}, workspace,
                     reinterpret_cast<float*>(workspace + batch_elements), stride);
      workspaces.give_back(workspace);
    });
  }

  int64_t steps_of(int64_t group) const { return std::clamp<int64_t>(steps_ - group * group_steps_, 0, group_steps_); }

  // A task for each step of the depth where that runs along the rows of the matrix, for each panel elsewhere.
  void pack_shared(const Side& shared) {
    const bool by_step = shared.operand.depth_first;
    const int64_t parts = by_step ? group_steps_ : shared.panels;
    parallel_for(groups_ * parts, threads_, [&](int64_t i) {
      const int64_t group = i / parts, part = i % parts, steps = steps_of(group);
      if (by_step && part >= steps) return;
      const Range one{part, part + 1};
      pack(shared, group * group_steps_ * kStep, by_step ? Range{0, shared.panels} : one,
           by_step ? one : Range{0, steps}, {shared.panels, together_, steps, slab_}, 0, group_of(shared, group));
    });
  }

  BFloat16* group_of(const Side& shared, int64_t group) const {
    return packed_.get() + group * shared.panels * group_steps_ * kStepElements;
  }

  void multiply_batch(Range panels, BFloat16* batch, float* sums, int64_t stride) {
    const Side &owned = owns_left_ ? left_ : right_, &shared = owns_left_ ? right_ : left_;
    const int64_t count = panels.end - panels.begin;
    int64_t packed_group = -1;
    Tiles tiles;
    for (int64_t other = 0; other < shared.panels; other += together_) {
      const Range others{other, std::min(shared.panels, other + together_)};
      const Region region = owns_left_ ? region_of(panels, others) : region_of(others, panels);
      if (call_.accumulate) read(region, sums, stride);
      for (int64_t group = 0; group < groups_; ++group) {
        const int64_t steps = steps_of(group);
        const Packing mine{count, kBatch, steps, slab_}, theirs{shared.panels, together_, steps, slab_};
        if (packed_group != group)
          pack(owned, group * group_steps_ * kStep, panels, {0, steps}, mine, panels.begin, batch);
        packed_group = group;
        for (int64_t step = 0; step < steps; step += slab_) {
          const int64_t here = std::min(slab_, steps - step);
          const bool resume = group > 0 || step > 0 || call_.accumulate;
          for (int64_t s = 0; s < others.end - other; ++s) {
            const BFloat16* const panel = group_of(shared, group) + theirs.at(other + s, step);
            // The next shared panel, as a rule, comes to the L2 cache meanwhile, a part with each panel of the batch.
            const int64_t lines = divide_up(2 * kStepElements / 64, count);
            for (int64_t o = 0; o < count; ++o) {
              const BFloat16 *const my_panel = batch + mine.at(o, step), *next = panel + here * kStepElements;
              multiply(tiles, region, (owns_left_ ? o : s) * kPanel, (owns_left_ ? s : o) * kPanel,
                       owns_left_ ? my_panel : panel, owns_left_ ? panel : my_panel, here, resume, sums, stride,
                       next + o * lines * here * kStep, lines);
            }
            // While these rows are in the L1 cache.
            if (!owns_left_ && group + 1 == groups_ && step + slab_ >= steps)
              write(region, {s * kPanel, std::min(region.rows, (s + 1) * kPanel)}, sums, stride);
          }
        }
      }
      if (owns_left_) write(region, {0, region.rows}, sums, stride);
    }
    finish_streams(stream_);
  }

  // The block at (row, column) of a region.
  void multiply(Tiles& tiles, const Region& region, int64_t row, int64_t column, const BFloat16* left,
                const BFloat16* right, int64_t steps, bool resume, float* sums, int64_t stride, const BFloat16* next,
                int64_t lines) const {
    const bool two_left = region.rows - row > kTile, two_right = region.columns - column > kTile;
    const auto kernel = two_left    ? two_right ? multiply_block<2, 2> : multiply_block<2, 1>
                        : two_right ? multiply_block<1, 2>
                                    : multiply_block<1, 1>;
    kernel(tiles, left, right, steps, resume, sums + row * stride + column, stride, reinterpret_cast<const char*>(next),
           lines);
  }

  // What the sums of a region begin with.
  void read(const Region& region, float* sums, int64_t stride) const {
    for (int64_t i = 0; i < region.rows; ++i)
      std::memcpy(sums + i * stride,
                  static_cast<const float*>(call_.out) + (region.row + i) * call_.out_stride + region.column,
                  static_cast<size_t>(region.columns) * sizeof(float));
  }

  // Some rows of a region: bias added, rounded to the result's type.
  void write(const Region& region, Range rows, float* sums, int64_t stride) const {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      float* const row = sums + i * stride;
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
  const Side left_, right_;
  const int64_t steps_;  // of the depth
  const bool stream_;
  // By batches:
  bool owns_left_ = false;                           // whether batches are of the left operand
  int64_t groups_ = 0, group_steps_ = 0, slab_ = 0;  // groups of the depth, of about equal length, and slabs of these
  int64_t together_ = 0;                             // panels of the shared operand in a region
  Buffer<BFloat16> packed_;                          // the shared operand
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
