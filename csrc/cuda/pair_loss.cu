// pair_loss: DPO with label smoothing from per-row log-probs: loss, rewards, dloss/dlogps and token rewards, in one
// launch.
//
// Maths. core/pair_loss.h.
//
// Blocks. One: 16 bytes per token are negligible beside the logits that the tokens come from, and a single block needs
// no atomics, no counter to reset and no second launch. Pairs are taken in rounds; in each round a thread sums part of
// a sequence, the parts are added by a fixed tree, the first thread of a pair computes its loss and slope, and the same
// threads write the rows. Losses are added up in the order of threads at the end.
//
// Memory traffic. Per token the weight (4 bytes; the label's 8 where there are no weights) and the log-probs of both
// models are read, twice, and 12 bytes written. Log-probs of rows of weight 0 are not read, and may be NaN.
//
// Aliasing. None. Numerics. All but the tokens in fp64, rounded once at the end. Only cu_seqlens says where sequences
// begin.
#include "launch.cuh"
#include "pair_loss_schedule.h"

namespace qk {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kPairThreads, 1) pair_loss_kernel(const __grid_constant__ PairCall call) {
  __shared__ double shared[kPairThreads];
  constexpr int kHalf = kPairThreads / 2;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t pairs = call.sequences / 2;
  const int group = threads_per_sequence(call.sequences), lane = thread % group;
  double loss = 0;
  for (int64_t first = 0; first < pairs; first += kHalf / group) {
    const int64_t sequence = sequence_of(pairs, first, thread, group);
    shared[thread] = sequence < 0 ? 0 : partial_sum(call, sequence, lane, group);
    for (int width = group / 2; width; width /= 2) {
      __syncthreads();
      if (lane < width) shared[thread] += shared[thread + width];
    }
    if (lane == 0 && sequence >= 0) shared[thread] = store_reward(call, sequence, shared[thread]);
    __syncthreads();
    if (lane == 0 && thread < kHalf && sequence >= 0) {
      const PairResult result = qk::pair_loss(shared[thread], shared[thread + kHalf], call.beta, call.label_smoothing);
      loss += result.loss;
      shared[thread] = quotient(result.slope, static_cast<double>(pairs));
    }
    __syncthreads();
    const double slope = shared[thread % kHalf - lane];
    if (sequence >= 0) store_rows(call, sequence, thread < kHalf ? slope : -slope, lane, group);
    __syncthreads();  // before the next round overwrites the slopes
  }
  shared[thread] = loss;
  for (int width = kPairThreads / 2; width; width /= 2) {
    __syncthreads();
    if (thread < width) shared[thread] += shared[thread + width];
  }
  if (thread == 0) *call.loss = static_cast<float>(quotient(shared[0], static_cast<double>(pairs)));
}

}  // namespace

void pair_loss(const PairCall& call, const Launch& where) {
  const DeviceGuard guard(where.device);
  launch("pair_loss", pair_loss_kernel, 1, kPairThreads, where, call);
}

std::string unavailable(int device) {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (driver / 1000 < runtime / 1000)
    return "the driver supports CUDA " + version(driver) + ", the extension was built with CUDA " + version(runtime);
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    // Fails where none of the architectures that were compiled serves this device.
    check(cudaFuncGetAttributes(&attributes, pair_loss_kernel), "looking for kernels for this device");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace cuda
}  // namespace qk
