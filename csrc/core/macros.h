// Lets one source serve the host and the device.
//
// On the host always inlined, which is more than a matter of speed: these functions are compiled once per instruction
// set, and an out-of-line copy would be shared by all of them, on a machine that may lack the one it was compiled for.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QK_HOST_DEVICE inline __attribute__((always_inline))
#endif

// For loops whose indices must be constants on a device.
#if defined(__CUDACC__)
#define QK_UNROLL _Pragma("unroll")
#define QK_NO_UNROLL _Pragma("unroll 1")
#else
#define QK_UNROLL
#define QK_NO_UNROLL
#endif

// a / b for b > 0. On a device without the subroutine that a division in fp64 becomes, which costs a stack frame and
// registers around it: an estimate of 1 / b, two steps of Newton, and the remainder put right (within an ulp).
QK_HOST_DEVICE double quotient(double a, double b) {
#if defined(__CUDA_ARCH__)
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(b));
  r = fma(r, fma(-b, r, 1.0), r);
  r = fma(r, fma(-b, r, 1.0), r);
  if (b - b != 0) r = b == b ? 0 : b;  // infinite, or NaN
  const double q = a * r, better = fma(fma(-b, q, a), r, q);
  return better - better == 0 ? better : q;
#else
  return a / b;
#endif
}

// log(1 + x) of x >= 0, to the last digits of x. The device library's own is a subroutine as well; log(u) / (u - 1)
// hardly depends on the rounding of u.
QK_HOST_DEVICE double log_one_plus(double x) {
#if defined(__CUDA_ARCH__)
  const double u = 1 + x;
  return u == 1 ? x : log(u) * quotient(x, u - 1);
#else
  return log1p(x);
#endif
}
