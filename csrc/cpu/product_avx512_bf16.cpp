// GEMMs of product.h with VDPBF16PS, which multiplies pairs of neighbours along the depth and adds both products to an
// fp32 sum: the logits, dX, and sums of dW over chunks. It rounds to nearest and takes subnormals for 0.
#include "product_avx512.h"

namespace qk {
namespace {

struct Bf16Pairs {
  using Element = BFloat16;
  static constexpr bool kBlocks = false;

  // Units [first, first + 16) of a row of `depth` elements, 0 past its end.
  static __m512i load(const BFloat16* row, int64_t first, int64_t depth) {
    const int64_t left = std::clamp<int64_t>(depth - 2 * first, 0, 32);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + (left ? 2 * first : 0));
  }

  // Pairs of this row and the next, which is 0 if only one is left.
  static __m512i load_rows(const BFloat16* row, int64_t stride, int64_t left, __mmask16 lanes) {
    const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row));
    if (left == 1) return pairs;
    const __m512i next = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row + stride));
    return _mm512_or_si512(pairs, _mm512_slli_epi32(next, 16));
  }

  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)a);
  }
};

// out[0, count) = wide[0, count), rounded to nearest.
void round_row(const float* wide, int64_t count, BFloat16* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    _mm256_mask_storeu_epi16(out + i, lanes, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, wide + i)));
  }
}

}  // namespace

void gemm_avx512_bf16(const GemmCall& call, int threads) {
  if (call.out_type == DType::kFloat32) return Gemm<Bf16Pairs>{call, threads}.run();
  // Of dX, which is small beside its operands, the sums exist in fp32 as a whole.
  const Buffer<float> wide = make_buffer<float>(call.rows * call.columns);
  GemmCall in_fp32 = call;
  in_fp32.out = wide.get();
  in_fp32.out_stride = call.columns;
  in_fp32.out_type = DType::kFloat32;
  Gemm<Bf16Pairs>{in_fp32, threads}.run();
  parallel_for(call.rows, threads, [&](int64_t row) {
    round_row(wide.get() + row * call.columns, call.columns, static_cast<BFloat16*>(call.out) + row * call.out_stride);
  });
}

}  // namespace qk
