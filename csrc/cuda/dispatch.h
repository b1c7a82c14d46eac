// Which kernel can do a call: what the host knows of the types and addresses of its tensors.
#pragma once

#include "../core/calls.h"

namespace qk {
namespace cuda {

inline bool same_type(const Rows& a, const Rows& b) { return a.dtype == b.dtype; }

// The address of a tensor, in elements.
inline int64_t first_element(const Rows& rows) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data) / (rows.dtype == DType::kFloat32 ? 4 : 2));
}

// Whether each row of `b` has the same alignment modulo 16 bytes as the same row of `a`, or, where the elements of `a`
// are half as wide, a vector of `a` is two aligned vectors of `b`. `a` is not wider than `b`.
inline bool same_alignment(const Rows& a, const Rows& b, const Shape& shape) {
  const int64_t vector = b.dtype == DType::kFloat32 ? 4 : 8;
  const int64_t base = first_element(a) - first_element(b);
  return base % vector == 0 && (shape.outer == 1 || (a.outer_stride - b.outer_stride) % vector == 0) &&
         (shape.inner == 1 || (a.inner_stride - b.inner_stride) % vector == 0);
}

// Whether a kernel for one type of logits and one of gradients can do a call: gradients of the logits' type, or of 16
// bits for fp32 logits, and every 128-bit vector that is written comes from aligned 128-bit vectors that are read.
inline bool is_vectorizable(const GradCall& call, bool pair) {
  auto reads = [&](const Rows& rows) {
    return same_type(rows, call.policy) && same_alignment(call.out, rows, call.shape);
  };
  return (same_type(call.out, call.policy) || call.policy.dtype == DType::kFloat32) && reads(call.policy) &&
         (!pair || reads(call.reference));
}

}  // namespace cuda
}  // namespace qk
