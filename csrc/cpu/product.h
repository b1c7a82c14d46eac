// Products of bf16 matrices whose result is fp32: logits from hidden states before anything has rounded them, and sums
// of the head's gradient over chunks.
//
// Libraries round the product of two bf16 matrices to bf16 on a CPU (an error of 3e-2 in a log-prob, where a token's
// reward is 1e-2); this keeps the fp32 in which the processor has accumulated it anyway.
#pragma once

#include <cstdint>

#include "../core/elements.h"

namespace qk {

struct ProductCall {
  int64_t rows = 0, columns = 0, depth = 0;
  const BFloat16* left = nullptr;   // [rows, depth], contiguous last dimension, as `right`
  const BFloat16* right = nullptr;  // [columns, depth]
  int64_t left_stride = 0, right_stride = 0;
  const float* bias = nullptr;  // [columns], or null
  float* out = nullptr;         // [rows, columns]
  int64_t out_stride = 0;
};

// out = left right^T + bias. Every entry is summed in the same order, wherever it lies and whoever computes it: the
// bits depend neither on the other rows of the call nor on the number of threads.
void product(const ProductCall& call, int threads);

// out += left^T right, of left [depth, rows] and right [depth, columns]; the bias is not read. The same promise: the
// terms of an entry are added in order, one pair of them after the other, so that (but for a pair that a chunk's end
// divides) the bits do not tell how many calls the rows came in.
void add_row_product(const ProductCall& call, int threads);

// Whether this machine and this build have the instruction for it (AVX-512 BF16).
bool has_product();

// The kernels themselves, of a translation unit compiled for that instruction; see product_avx512_bf16.cpp.
void product_avx512_bf16(const ProductCall& call, int threads);
void add_row_product_avx512_bf16(const ProductCall& call, int threads);

}  // namespace qk
