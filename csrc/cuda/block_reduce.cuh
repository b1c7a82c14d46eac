// How the threads of a block add their sums up.
#pragma once

#include <cuda_runtime.h>

#include "online_softmax.h"

namespace qk {
namespace cuda {

__device__ __forceinline__ double shuffle_down(double x, int offset) { return __shfl_down_sync(~0u, x, offset); }

// The sum over a warp of what `kGather` accumulates, in lane 0. The sums of all lanes are relative to the same maxima.
template <Gather kGather, bool kPair>
__device__ __forceinline__ void add_warp(PartialSums& p) {
  Sums &policy = p.sums.policy, &reference = p.sums.reference;
  QK_UNROLL
  for (int offset = 16; offset; offset /= 2) {
    policy.exp += shuffle_down(policy.exp, offset);
    if (kGather != Gather::kExp) policy.exp_t += shuffle_down(policy.exp_t, offset);
    if (kGather == Gather::kAll) {
      policy.exp_sq += shuffle_down(policy.exp_sq, offset);
      policy.raw += shuffle_down(policy.raw, offset);
    }
    if (kPair) {
      policy.cross += shuffle_down(policy.cross, offset);
      reference.exp += shuffle_down(reference.exp, offset);
      reference.cross += shuffle_down(reference.cross, offset);
    }
  }
}

struct Maxima {
  float policy, reference, before_label;
};

// The maxima over a warp, in all of its lanes.
template <Gather kGather, bool kPair>
__device__ __forceinline__ Maxima warp_maxima(Maxima m) {
  QK_UNROLL
  for (int offset = 16; offset; offset /= 2) {
    m.policy = fmaxf(m.policy, __shfl_xor_sync(~0u, m.policy, offset));
    if (kPair) m.reference = fmaxf(m.reference, __shfl_xor_sync(~0u, m.reference, offset));
    if (kGather == Gather::kAll) m.before_label = fmaxf(m.before_label, __shfl_xor_sync(~0u, m.before_label, offset));
  }
  return m;
}

// The sums of all kBlock threads of the block, in thread 0: those of each thread are rescaled to the maximum of the
// block, added within warps (always by the same tree) and then warp by warp.
template <Gather kGather, bool kPair, int kBlock>
__device__ __forceinline__ PartialSums add_block(PartialSums mine, double log2e_per_temperature) {
  constexpr int kWarps = kBlock / 32;
  __shared__ Maxima maxima[kWarps];
  // As bytes: shared variables have no constructors.
  __shared__ __align__(16) unsigned char memory[kWarps * sizeof(PartialSums)];
  PartialSums* partial = reinterpret_cast<PartialSums*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Maxima m = warp_maxima<kGather, kPair>({mine.sums.policy.max, mine.sums.reference.max, mine.max_before_label});
  if (lane == 0) maxima[warp] = m;
  __syncthreads();
  QK_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    m.policy = fmaxf(m.policy, maxima[w].policy);
    if (kPair) m.reference = fmaxf(m.reference, maxima[w].reference);
    if (kGather == Gather::kAll) m.before_label = fmaxf(m.before_label, maxima[w].before_label);
  }
  rescale(mine.sums, m.policy, m.reference, log2e_per_temperature);
  add_warp<kGather, kPair>(mine);
  if (lane == 0) partial[warp] = mine;
  __syncthreads();
  PartialSums total;
  if (threadIdx.x != 0) return total;
  total.sums.policy.max = m.policy;
  total.sums.reference.max = m.reference;
  total.max_before_label = m.before_label;
  QK_NO_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    add(total.sums.policy, partial[w].sums.policy);
    if (kPair) add(total.sums.reference, partial[w].sums.reference);
  }
  return total;
}

}  // namespace cuda
}  // namespace qk
