// Stands for the CUDA toolkit's header of this name where the kernels are compiled for the host: the part of CUDA that
// csrc/cuda uses, on the emulation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emulation.h"

// --- the language
// -----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One copy for each block in progress: fibers share that of their thread, threads the only one.
#if QK_EMULATION_THREADS
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#define threadIdx ::qk::emulation::thread_index
#define blockIdx ::qk::emulation::block_index

inline void __syncthreads() { ::qk::emulation::sync_block(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  T result;
  qk::emulation::exchange(&value, &result, sizeof value,
                          (threadIdx.x % qk::emulation::kWarp) ^ static_cast<unsigned>(mask));
  return result;
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const unsigned lane = threadIdx.x % qk::emulation::kWarp, source = lane + static_cast<unsigned>(offset);
  T result;
  qk::emulation::exchange(&value, &result, sizeof value, source < qk::emulation::kWarp ? source : lane);
  return result;
}

inline unsigned __popc(unsigned x) { return static_cast<unsigned>(__builtin_popcount(x)); }

// --- the runtime
// ------------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
struct cudaFuncAttributes {};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

template <class... Parameters, size_t... i>
void emulated_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                     std::index_sequence<i...>) {
  qk::emulation::run(grid.x, block.x, [&] { kernel(*static_cast<Parameters*>(arguments[i])...); });
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  emulated_launch(kernel, grid, block, arguments, std::index_sequence_for<Parameters...>());
  return cudaSuccess;
}
