// Lets one source serve the host and the device.
//
// On the host always inlined, which is more than a matter of speed: these functions are compiled once per instruction
// set, and an out-of-line copy would be shared by all of them, on a machine that may lack the one it was compiled for.
#pragma once

#if defined(__CUDACC__)
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QK_HOST_DEVICE inline __attribute__((always_inline))
#endif
