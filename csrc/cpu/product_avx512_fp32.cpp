// GEMMs of product.h of fp32 matrices, on vectors of 512 bits.
#include "product_avx512.h"

namespace qk {
namespace {

struct Fp32 {
  using Element = float;
  static constexpr bool kBlocks = true;

  // Units [first, first + 16) of a row of `depth` elements, 0 past its end.
  static __m512i load(const float* row, int64_t first, int64_t depth) {
    const __mmask16 here = first_lanes(depth - first);
    return _mm512_maskz_loadu_epi32(here, row + (here ? first : 0));
  }

  static __m512i load_rows(const float* row, int64_t, int64_t, __mmask16 lanes) {
    return _mm512_maskz_loadu_epi32(lanes, row);
  }

  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

}  // namespace

void gemm_avx512_fp32(const GemmCall& call, int threads) { Gemm<Fp32>{call, threads}.run(); }

}  // namespace qk
