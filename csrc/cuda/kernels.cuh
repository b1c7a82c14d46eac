// What the kernels share on the device: how the threads of a block put their sums together, and how kernels are
// launched.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda.h"
#include "walk.h"

namespace qk {
namespace cuda {

// --- device ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ double down(double x, int offset) { return __shfl_down_sync(~0u, x, offset); }

// The sum over a warp of what `kGather` gathers, in lane 0. All lanes' sums are relative to the same maxima.
template <Gather kGather, bool kPair>
__device__ __forceinline__ void add_warp(Partial& p) {
  Sums &policy = p.sums.policy, &reference = p.sums.reference;
  QK_UNROLL
  for (int offset = 16; offset; offset /= 2) {
    policy.exp += down(policy.exp, offset);
    if (kGather != Gather::kExp) policy.exp_t += down(policy.exp_t, offset);
    if (kGather == Gather::kAll) {
      policy.exp_sq += down(policy.exp_sq, offset);
      policy.raw += down(policy.raw, offset);
    }
    if (kPair) {
      policy.cross += down(policy.cross, offset);
      reference.exp += down(reference.exp, offset);
      reference.cross += down(reference.cross, offset);
    }
  }
}

struct Maxima {
  float policy, reference, before;
};

template <Gather kGather, bool kPair>
__device__ __forceinline__ Maxima warp_maxima(Maxima m) {
  QK_UNROLL
  for (int offset = 16; offset; offset /= 2) {
    m.policy = fmaxf(m.policy, __shfl_xor_sync(~0u, m.policy, offset));
    if (kPair) m.reference = fmaxf(m.reference, __shfl_xor_sync(~0u, m.reference, offset));
    if (kGather == Gather::kAll) m.before = fmaxf(m.before, __shfl_xor_sync(~0u, m.before, offset));
  }
  return m;
}

// The sums of all kBlock threads of the block, in thread 0: each thread's restated relative to the maximum of the
// block, added within warps (the same tree each time) and then warp by warp.
template <Gather kGather, bool kPair, int kBlock>
__device__ __forceinline__ Partial add_block(Partial mine, double log2e_per_temperature) {
  constexpr int kWarps = kBlock / 32;
  __shared__ Maxima maxima[kWarps];
  // As bytes: shared variables have no constructors.
  __shared__ __align__(16) unsigned char memory[kWarps * sizeof(Partial)];
  Partial* partial = reinterpret_cast<Partial*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Maxima m = warp_maxima<kGather, kPair>({mine.sums.policy.max, mine.sums.reference.max, mine.before});
  if (lane == 0) maxima[warp] = m;
  __syncthreads();
  QK_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    m.policy = fmaxf(m.policy, maxima[w].policy);
    if (kPair) m.reference = fmaxf(m.reference, maxima[w].reference);
    if (kGather == Gather::kAll) m.before = fmaxf(m.before, maxima[w].before);
  }
  restate(mine.sums, m.policy, m.reference, log2e_per_temperature);
  add_warp<kGather, kPair>(mine);
  if (lane == 0) partial[warp] = mine;
  __syncthreads();
  Partial total;
  if (threadIdx.x != 0) return total;
  total.sums.policy.max = m.policy;
  total.sums.reference.max = m.reference;
  total.before = m.before;
  QK_NO_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    add(total.sums.policy, partial[w].sums.policy);
    if (kPair) add(total.sums.reference, partial[w].sums.reference);
  }
  return total;
}

// --- host -----------------------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it, lest the next launch be taken for the one that failed
  throw std::runtime_error(std::string("qkernels: ") + operation + " failed on the GPU: " + cudaGetErrorName(error) +
                           ": " + cudaGetErrorString(error));
}

// Makes a device the current one for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    moved_ = true;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// Blocks lie along x, which has room for 2^31 - 1 of them (y and z stop at 65535).
template <class... Parameters, class... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), int64_t blocks, int threads, const Launch& where,
            const Arguments&... arguments) {
  if (blocks <= 0) return;
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error(std::string("qkernels: ") + operation + ": too many rows for one launch");
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(where.stream)>>>(arguments...);
  check(cudaGetLastError(), operation);
}

inline void check_vocab(const Shape& shape) {
  if (shape.vocab > std::numeric_limits<int32_t>::max() / 2)
    throw std::runtime_error("qkernels: rows of more than 2^30 entries are not supported on a GPU");
}

// Calls f with a null pointer of the element type of that code.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<const float*>(nullptr));
    case DType::kBFloat16: return f(static_cast<const BFloat16*>(nullptr));
    case DType::kFloat16: return f(static_cast<const Float16*>(nullptr));
  }
}

template <class P>
using Pointee = std::remove_const_t<std::remove_pointer_t<P>>;

}  // namespace cuda
}  // namespace qk
