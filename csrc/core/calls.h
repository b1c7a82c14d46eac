// The operations of the extension as plain structs: sizes, strides and pointers, nothing of Python or torch.
#pragma once

#include <cstdint>

#include "elements.h"
#include "macros.h"

namespace qk {

// [outer, inner, vocab] elements with a contiguous last dimension; row r is (r / inner, r % inner).
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t outer_stride = 0, inner_stride = 0;  // in elements
};

struct Shape {
  int64_t outer = 0, inner = 0, vocab = 0;
  QK_HOST_DEVICE int64_t rows() const { return outer * inner; }
};

// Offset of a row, in elements. A launch on a device has fewer than 2^31 rows, and 64-bit division is a subroutine.
QK_HOST_DEVICE int64_t offset_of(const Rows& rows, const Shape& shape, int64_t row) {
#if defined(__CUDA_ARCH__)
  const uint32_t inner = static_cast<uint32_t>(shape.inner), r = static_cast<uint32_t>(row);
  return static_cast<int64_t>(r / inner) * rows.outer_stride + static_cast<int64_t>(r % inner) * rows.inner_stride;
#else
  return (row / shape.inner) * rows.outer_stride + (row % shape.inner) * rows.inner_stride;
#endif
}

template <class T>
QK_HOST_DEVICE const T* row_of(const Rows& rows, const Shape& shape, int64_t row) {
  return static_cast<const T*>(rows.data) + offset_of(rows, shape, row);
}

// An element as it lies in memory, not yet a number: where a load is to be under way while other work is done.
QK_HOST_DEVICE uint32_t element_bits(const Rows& rows, const Shape& shape, int64_t row, int64_t column) {
  if (rows.dtype == DType::kFloat32) return bits_of(row_of<float>(rows, shape, row)[column]);
  return row_of<BFloat16>(rows, shape, row)[column].bits;  // the width of either 16-bit type
}

QK_HOST_DEVICE float number_of(uint32_t element_bits, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return float_of(element_bits);
    case DType::kBFloat16: return widen(BFloat16{static_cast<uint16_t>(element_bits)});
    case DType::kFloat16: return widen(Float16{static_cast<uint16_t>(element_bits)});
  }
  return 0;
}

QK_HOST_DEVICE float element(const Rows& rows, const Shape& shape, int64_t row, int64_t column) {
  return number_of(element_bits(rows, shape, row, column), rows.dtype);
}

struct Labels {
  const int64_t* data = nullptr;  // [outer * inner]
  int64_t ignore_index = -100;
};

struct StatsCall {
  Shape shape;
  Rows policy, reference;  // reference.data is null when there is none
  Labels labels;
  double temperature = 1;
  uint32_t fields = 0;
  float* out = nullptr;  // [number of fields, rows]
};

struct GradCall {
  Shape shape;
  Rows policy, reference;
  Labels labels;
  double temperature = 1;
  const float* softmax = nullptr;            // softmax statistics [3, rows]: row_max, log_sum, logps
  const float* reference_softmax = nullptr;  // the same of the reference, or null
  const float* coefficients = nullptr;       // [coefficient_count, rows]
  int coefficient_count = 1;
  const float* upstream = nullptr;  // [1], which all coefficients are multiplied by; null for 1
  Rows out;                         // may be `policy` itself; of its dtype, or 16 bits wide for fp32 logits
  bool out_is_zero = false;         // `out` holds zeros already: rows with a zero gradient need not be written
};

struct PairCall {
  int64_t sequences = 0, length = 0, rows = 0;
  const int32_t* offsets = nullptr;  // [sequences + 1], or null for dense [sequences, length]
  Labels labels;                     // [rows]
  const float* weights = nullptr;    // [rows], 0 where the label is ignored; null for 1 everywhere else
  const float* logps = nullptr;      // [rows]
  const float* reference = nullptr;  // [rows], or [sequences] when per_sequence; null for log-probs of 0
  bool per_sequence = false;
  double beta = 0.1, label_smoothing = 0;
  float* loss = nullptr;     // [1]
  float* rewards = nullptr;  // [sequences]
  float* grad = nullptr;     // [rows]
  float* tokens = nullptr;   // [2, rows]: token rewards, reference; null when per_sequence

  // First row of a sequence; its last row is the one before the next sequence's first.
  QK_HOST_DEVICE int64_t begin(int64_t sequence) const { return offsets ? offsets[sequence] : sequence * length; }
};

}  // namespace qk
