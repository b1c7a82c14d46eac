// GEMMs of bf16 or fp32 matrices with fp32 sums: the three of a language-model head, where a library would round, or
// would be slow.
//
//     logits   Z = X W^T (+ bias)   both operands have adjacent entries along the depth H
//     dX       = G W                 the right one has them along its columns; the depth is V
//     dW      (+)= G^T X             both have them along rows and columns of the result; the depth is the chunk
//
// torch rounds the product of two bf16 matrices to bf16 on a CPU (an error of 3e-2 in a log-prob, where a token's
// reward is 1e-2); these kernels keep the fp32 in which the processor has accumulated it anyway. Its fp32 GEMM, MKL's,
// runs AVX2 code on a processor that is not Intel's, at half of the speed of AVX-512 on Zen 5.
#pragma once

#include <cstdint>
#include <string>

#include "../core/elements.h"

namespace qk {

// An operand of a GEMM: [size, depth] with adjacent entries along the depth or, `depth_first`, [depth, size].
struct Operand {
  const void* data = nullptr;
  int64_t stride = 0;  // elements between consecutive rows of the matrix as it is stored
  bool depth_first = false;

  template <class Element>
  const Element* as() const {
    return static_cast<const Element*>(data);
  }
};

struct GemmCall {
  int64_t rows = 0, columns = 0, depth = 0;
  DType in_type = DType::kBFloat16;  // of both operands: bf16 or fp32
  Operand left, right;               // of sizes `rows` and `columns`
  const float* bias = nullptr;       // [columns], or null
  void* out = nullptr;               // [rows, columns], fp32 or bf16 (rounded once)
  int64_t out_stride = 0;
  DType out_type = DType::kFloat32;
  bool accumulate = false;  // out += ..., fp32 only and without a bias
};

// out = left right^T + bias, or out += left right^T, on the instruction set in use, which `gemm_kernel` has to name.
//
// Every entry is summed in the same order, wherever it lies: its bits depend neither on the other rows and columns of
// the call nor on the number of threads. Sums over several calls (`accumulate`) of operands that both have the depth
// first have the bits of one call if all of them but the last have a depth that is a multiple of `gemm_depth_group`.
void gemm(const GemmCall& call, int threads);

// The kernel that serves such a GEMM on the instruction set in use; empty if none does.
std::string gemm_kernel(DType in_type, bool left_depth_first, bool right_depth_first, DType out_type, bool accumulate);

// Consecutive terms of a sum that a kernel adds to one another before it adds them to the sum.
int64_t gemm_depth_group(DType in_type);
constexpr int64_t kFp32DepthGroup = 256;

// The kernels; see the file of each.
void gemm_avx512_fp32(const GemmCall& call, int threads);
void gemm_avx512_bf16(const GemmCall& call, int threads);
void gemm_amx_bf16(const GemmCall& call, int threads);
// The AMX kernel with plain code in place of the tile instructions, of the same bits; runs on any processor.
void gemm_amx_emulated(const GemmCall& call, int threads);

}  // namespace qk
