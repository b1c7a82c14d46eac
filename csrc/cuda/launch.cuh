// How the host launches a kernel: the device, the stream, and the errors of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "../core/calls.h"
#include "cuda.h"

namespace qk {
namespace cuda {

inline void check(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that it is not taken for an error of the next launch
  throw std::runtime_error(std::string("qkernels: ") + operation + " failed on the GPU: " + cudaGetErrorName(error) +
                           ": " + cudaGetErrorString(error));
}

// Makes a device the current one during its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class T>
struct Identity {
  using type = T;
};

// Blocks are numbered along x, which has room for 2^31 - 1 of them (y and z stop at 65535). Arguments have the types of
// the kernel's parameters, which alone are deduced.
template <class... Parameters>
void launch(const char* operation, void (*kernel)(Parameters...), int64_t blocks, int threads, const Launch& where,
            const typename Identity<Parameters>::type&... arguments) {
  if (blocks <= 0) return;
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error(std::string("qkernels: ") + operation + ": too many rows for one launch");
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), addresses,
                         0, static_cast<cudaStream_t>(where.stream)),
        operation);
}

// Positions within a row are 32-bit numbers, and the last iteration may reach beyond its end.
inline void check_vocab(const Shape& shape) {
  if (shape.vocab > int64_t{1} << 30)
    throw std::runtime_error("qkernels: rows of more than 2^30 entries are not supported on a GPU, got " +
                             std::to_string(shape.vocab));
}

}  // namespace cuda
}  // namespace qk
