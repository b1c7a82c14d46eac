// Whole calls on the CPU: choice of instruction set, division of the work among threads, the pair loss.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../core/pair_loss.h"
#include "amx.h"
#include "product.h"
#include "row_kernels.h"
#include "thread_pool.h"

namespace qk {

#if defined(QK_NO_AVX2)
const RowKernels* avx2_kernels() { return nullptr; }
#endif
#if defined(QK_NO_AVX512)
const RowKernels* avx512_kernels() { return nullptr; }
#endif
#if defined(QK_NO_AVX512_BF16)
const RowKernels* avx512_bf16_kernels() { return nullptr; }
void gemm_avx512_bf16(const GemmCall&, int) {}
#endif
#if !defined(QK_AMX_SOURCES)  // a build of the row kernels alone, without cpu/amx.cpp and cpu/product_amx_bf16.cpp
const std::string& amx_unavailable() {
  static const std::string reason = "this build does not have it";
  return reason;
}
void gemm_amx_bf16(const GemmCall&, int) {}
void gemm_amx_emulated(const GemmCall&, int) { throw std::logic_error("this build has no GEMM of bf16 matrices"); }
#elif defined(QK_NO_AMX)
void gemm_amx_bf16(const GemmCall&, int) {}
#endif

namespace {

#if defined(__x86_64__)
// By hand: older Clangs do not know the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

bool machine_has(const char* name) {
  const std::string set = name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == "avx512") return avx512;
  if (set == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
  if (set == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  return set == "baseline";
}

// The kernels of an instruction set.
struct InstructionSet {
  const char* name;
  const RowKernels* rows;
  void (*gemm_fp32)(const GemmCall&, int) = nullptr;  // of fp32 matrices, or null
  void (*gemm_bf16)(const GemmCall&, int) = nullptr;  // of bf16 matrices, or null
  int64_t depth_group = 1;                            // of bf16; see gemm_depth_group
};

// Compiled in and understood by this machine, best last.
const std::vector<InstructionSet>& usable() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
    for (const RowKernels* rows : {baseline_kernels(), avx2_kernels(), avx512_kernels(), avx512_bf16_kernels()})
      if (rows && machine_has(rows->name)) found.push_back({rows->name, rows});
#if !defined(QK_NO_AVX512)
    for (InstructionSet& set : found)
      if (std::string(set.name).rfind("avx512", 0) == 0) set.gemm_fp32 = gemm_avx512_fp32;
#endif
    if (found.back().name == std::string("avx512_bf16")) {
      InstructionSet& best = found.back();
      best.gemm_bf16 = gemm_avx512_bf16;
      best.depth_group = 2;
      if (amx_unavailable().empty()) found.push_back({"amx_bf16", best.rows, best.gemm_fp32, gemm_amx_bf16, 32});
    }
    return found;
  }();
  return sets;
}

// Everywhere, but only by name: the packing and loops of the AMX kernel for tests.
const InstructionSet& emulated() {
  static const InstructionSet set{"amx_emulated", usable().back().rows, usable().back().gemm_fp32, gemm_amx_emulated,
                                  32};
  return set;
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> chosen{&usable().back()};
  return chosen;
}

// The fp32 kernel serves everything in fp32. Of bf16 matrices, VDPBF16PS serves the logits, dX and sums of dW (torch's
// own kernel is as fast for a dW that is one GEMM), and tiles everything but sums in bf16.
bool serves(const InstructionSet& set, DType in_type, bool left_depth_first, bool right_depth_first, DType out_type,
            bool accumulate) {
  const bool fp32 = out_type == DType::kFloat32;
  if (in_type == DType::kFloat32) return set.gemm_fp32 && fp32;
  if (in_type != DType::kBFloat16 || !set.gemm_bf16) return false;
  if (set.gemm_bf16 == gemm_avx512_bf16) {
    if (!left_depth_first && right_depth_first) return !accumulate;
    return fp32 && left_depth_first == right_depth_first && left_depth_first == accumulate;
  }
  return fp32 || (out_type == DType::kBFloat16 && !accumulate);
}

// Rows of a small vocabulary are handed out several at a time: an index should be worth some 10 microseconds.
constexpr int64_t kGrain = 64 * kBlock;

}  // namespace

int64_t find_bad_label(const Labels& labels, const Shape& shape) {
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const int64_t label = labels.data[row];
    if ((label < 0 || label >= shape.vocab) && label != labels.ignore_index) return row;
  }
  return -1;
}

void row_stats(const StatsCall& call, int threads) {
  const RowKernels& kernels = *current().load()->rows;
  const int64_t rows = call.shape.rows(), segments = segments_of(call.shape.vocab);
  const double log2e_per_temperature = kLog2e / call.temperature;
  auto ignored = [&](int64_t row) { return call.labels.data[row] == call.labels.ignore_index; };
  auto clear = [&](int64_t row) {
    float* out = call.out + row;
    for (uint32_t left = call.fields; left; left &= left - 1, out += rows) *out = 0;
  };
  const bool split = threads > 1 && segments > 1 && rows < 4 * static_cast<int64_t>(threads);
  if (!split) {
    const int64_t grain = std::max<int64_t>(1, kGrain / call.shape.vocab);
    parallel_for((rows + grain - 1) / grain, threads, [&](int64_t chunk) {
      for (int64_t row = chunk * grain; row < std::min(rows, (chunk + 1) * grain); ++row) {
        if (ignored(row)) {
          clear(row);
          continue;
        }
        RowSums total;
        for (int64_t segment = 0; segment < segments; ++segment) {
          RowSums sums;
          kernels.sum_segment(call, row, segment, &sums);
          merge(total, sums, log2e_per_temperature);
        }
        kernels.finish_row(call, row, total);
      }
    });
    return;
  }
  // Few rows: threads share a row, segment by segment. Merged in the same order, so with the same bits.
  std::vector<RowSums> partial(static_cast<size_t>(rows * segments));
  parallel_for(rows * segments, threads, [&](int64_t i) {
    if (!ignored(i / segments)) kernels.sum_segment(call, i / segments, i % segments, &partial[static_cast<size_t>(i)]);
  });
  for (int64_t row = 0; row < rows; ++row) {
    if (ignored(row)) {
      clear(row);
      continue;
    }
    RowSums total;
    for (int64_t segment = 0; segment < segments; ++segment)
      merge(total, partial[static_cast<size_t>(row * segments + segment)], log2e_per_temperature);
    kernels.finish_row(call, row, total);
  }
}

void row_grad(const GradCall& call, int threads) {
  const RowKernels& kernels = *current().load()->rows;
  const int64_t segments = segments_of(call.shape.vocab), items = call.shape.rows() * segments;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(call.shape.vocab, kSegment));
  // Few rows: the segments are the grains.
  const int64_t step = items < 4 * grain * threads ? 1 : grain;
  parallel_for((items + step - 1) / step, threads, [&](int64_t chunk) {
    for (int64_t i = chunk * step; i < std::min(items, (chunk + 1) * step); ++i)
      kernels.grad_segment(call, i / segments, i % segments);
  });
}

void pair_loss(const PairCall& call) {
  const int64_t pairs = call.sequences / 2;
  double loss = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double ratio[2];
    for (int side = 0; side < 2; ++side)
      ratio[side] = store_reward(call, pair + side * pairs, partial_sum(call, pair + side * pairs, 0, 1));
    const PairResult result = pair_loss(ratio[0], ratio[1], call.beta, call.label_smoothing);
    loss += result.loss;
    const double slope = result.slope / static_cast<double>(pairs);
    store_rows(call, pair, slope, 0, 1);
    store_rows(call, pair + pairs, -slope, 0, 1);
  }
  *call.loss = static_cast<float>(loss / static_cast<double>(pairs));
}

void gemm(const GemmCall& call, int threads) {
  const InstructionSet& set = *current();
  // Another thread may have changed the instruction set since the caller asked: then the best one of fp32, and the
  // emulated tiles, which serve all of bf16.
  if (call.in_type == DType::kFloat32) return (set.gemm_fp32 ? set : usable().back()).gemm_fp32(call, threads);
  const bool served =
      serves(set, call.in_type, call.left.depth_first, call.right.depth_first, call.out_type, call.accumulate);
  (served ? set.gemm_bf16 : gemm_amx_emulated)(call, threads);
}

std::string gemm_kernel(DType in_type, bool left_depth_first, bool right_depth_first, DType out_type, bool accumulate) {
  const InstructionSet& set = *current();
  if (!serves(set, in_type, left_depth_first, right_depth_first, out_type, accumulate)) return "";
  return in_type == DType::kFloat32 ? "avx512" : set.name;
}

int64_t gemm_depth_group(DType in_type) {
  return in_type == DType::kFloat32 ? kFp32DepthGroup : current().load()->depth_group;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : usable()) names.emplace_back(set.name);
  return names;
}

std::string cpu_vendor() {
#if defined(__x86_64__)
  unsigned highest, name[3];
  if (__get_cpuid(0, &highest, &name[0], &name[2], &name[1])) return {reinterpret_cast<const char*>(name), sizeof name};
#endif
  return "";
}

std::string instruction_set() { return current().load()->name; }

bool use_instruction_set(const std::string& name) {
  if (name == emulated().name) {
    current() = &emulated();
    return true;
  }
  for (const InstructionSet& set : usable())
    if (name == set.name) {
      current() = &set;
      return true;
    }
  return false;
}

}  // namespace qk
