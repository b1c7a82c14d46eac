// The entries of a gradient row: the factors that are computed once per row, and what one thread writes.
#pragma once

#include "../core/gradient.h"
#include "online_softmax.h"

namespace qk {
namespace cuda {

// What the entries of a gradient row need.
enum class Form {
  kPlain,  // constant e
  kFull,   // five coefficients, no reference
  kPair    // five coefficients and the reference
};

// Computed once per row, for all of its threads.
struct RowGrad {
  GradFactors factors;
  float row_max, reference_max, scale;
  float at_label;
  float fill;  // the value of all entries unless `computed`: 0, or NaN in an invalid row
  bool computed;
};

QK_HOST_DEVICE RowGrad prepare_row_grad(const GradCall& call, int64_t row) {
  RowGrad r = {};
  const int64_t label = call.labels.data[row];
  const RowCoefficients c = coefficients_of(call, row);
  if (label == call.labels.ignore_index || c.has_zero_gradient()) return r;
  if (label < 0 || label >= call.shape.vocab) {
    r.fill = std::numeric_limits<float>::quiet_NaN();
    return r;
  }
  const bool both = call.reference_softmax && call.coefficient_count == kCoefficientCount;
  const float reference_label = both ? element(call.reference, call.shape, row, label) : 0;
  r.factors = grad_factors(c, call.temperature);
  if (!both) r.factors.reference_slope = r.factors.q_scale = 0;
  r.at_label = static_cast<float>(grad_at_label(c, both, reference_label, call.temperature));
  r.row_max = c.row_max;
  r.reference_max = c.reference_max;
  r.scale = static_cast<float>(quotient(kLog2e, call.temperature));
  r.computed = true;
  return r;
}

// One entry, the label's excepted. `r_floor` bounds the reference's exponent where that is not used.
template <Form kForm>
QK_HOST_DEVICE float grad_entry(const RowGrad& r, float r_floor, float z, float rz) {
  const float t = (z - r.row_max) * r.scale;
  const float e = exp2_approx(t);
  if (kForm == Form::kPlain) return r.factors.constant * e;
  float factor = fmaf(r.factors.slope, fmaxf(t, kExponentFloor), r.factors.constant);
  if (kForm == Form::kFull) return e * factor;
  const float rt = (rz - r.reference_max) * r.scale;
  factor = fmaf(r.factors.reference_slope, fmaxf(rt, r_floor), factor);
  const float own = e == 0 ? 0.0f : e * factor;
  return fmaf(r.factors.q_scale, exp2_approx(rt), own);
}

// A gradient row of a type that is known at compile time.
template <class T>
struct AlignedOut {
  T* data;
  QK_HOST_DEVICE int size() const { return sizeof(T); }
  QK_HOST_DEVICE uintptr_t address() const { return reinterpret_cast<uintptr_t>(data); }
  QK_HOST_DEVICE void put(int i, float g) const { store_element(data + i, g); }
  // The kVector numbers g[0], g[1] ... at element `at`, whose address is a multiple of 16.
  QK_HOST_DEVICE void put_vector(int64_t at, const float* g) const {
    Vector128 vector;
    if constexpr (sizeof(T) == 4) {
      QK_UNROLL
      for (int w = 0; w < 4; ++w) vector.word[w] = bits_of(g[w]);
    } else {
      QK_UNROLL
      for (int w = 0; w < 4; ++w) vector.word[w] = pack<T>(g[2 * w], g[2 * w + 1]);
    }
    store_streaming(data + at, vector);
  }
};

// A gradient row of a type that is known at run time.
struct AnyOut {
  void* data;
  DType dtype;
  QK_HOST_DEVICE int size() const { return dtype == DType::kFloat32 ? 4 : 2; }
  QK_HOST_DEVICE uintptr_t address() const { return reinterpret_cast<uintptr_t>(data); }
  QK_HOST_DEVICE void put(int i, float g) const {
    switch (dtype) {
      case DType::kFloat32: return AlignedOut<float>{static_cast<float*>(data)}.put(i, g);
      case DType::kBFloat16: return AlignedOut<BFloat16>{static_cast<BFloat16*>(data)}.put(i, g);
      case DType::kFloat16: return AlignedOut<Float16>{static_cast<Float16*>(data)}.put(i, g);
    }
  }
  QK_HOST_DEVICE void put_vector(int64_t at, const float* g) const {
    if (dtype == DType::kFloat32) {
      AlignedOut<float>{static_cast<float*>(data)}.put_vector(at, g);
      AlignedOut<float>{static_cast<float*>(data)}.put_vector(at + 4, g + 4);
    } else if (dtype == DType::kBFloat16) {
      AlignedOut<BFloat16>{static_cast<BFloat16*>(data)}.put_vector(at, g);
    } else {
      AlignedOut<Float16>{static_cast<Float16*>(data)}.put_vector(at, g);
    }
  }
};

// What one thread writes of a gradient row (or piece) of n elements. The tiling is that of `out`; `policy` may be the
// same memory: each thread reads what it writes before it writes it. `reference` is read with Form::kPair only, and
// only if `with_reference`.
template <Form kForm, class Row, class Out>
QK_HOST_DEVICE void write_grad_row(const Row& policy, const Row& reference, bool with_reference, const Out& out, int n,
                                   int label, const RowGrad& r, int thread) {
  using Tile = typename Row::Tile;
  constexpr int kVectors = Tile::kVectors, kVector = Tile::kVector;
  constexpr int kStep = kThreads * kVector;
  const RowTiling tiling = tile_row(out.address(), out.size(), n, kVector, Row::kMargin);
  const float r_floor = r.factors.uses_reference_exponent() ? -kInfinity : kExponentFloor;
  const int64_t first = tiling.head + thread * kVector;
  const bool reads_reference = kForm == Form::kPair && with_reference;
  for_each_iteration(
      tiling.vectors / (kVectors * kThreads), label_iteration(tiling.vector_of(label), kVectors, thread, false),
      [&](int i) {
        const int64_t at = first + static_cast<int64_t>(i) * kVectors * kStep;
        Tile z, rz;
        policy.read(z, at, kStep);
        if (reads_reference) reference.read(rz, at, kStep);
        QK_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          float entries[kVector];
          QK_UNROLL
          for (int j = 0; j < kVector; ++j) {
            const int k = u * kVector + j;
            entries[j] = grad_entry<kForm>(r, r_floor, z[k], reads_reference ? rz[k] : 0.0f);
          }
          out.put_vector(at + static_cast<int64_t>(u) * kStep, entries);
        }
      },
      [&](int i) {
        QK_NO_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          const int vector = (i * kVectors + u) * kThreads + thread;
          if (vector >= tiling.vectors) return;
          const int at = tiling.head + vector * kVector;
          Tile z, rz;
          policy.read_vector(z, 0, at);
          if (reads_reference) reference.read_vector(rz, 0, at);
          float entries[kVector];
          QK_UNROLL
          for (int j = 0; j < kVector; ++j) {
            entries[j] = grad_entry<kForm>(r, r_floor, z[j], reads_reference ? rz[j] : 0.0f);
            if (at + j == label) entries[j] = r.at_label;
          }
          out.put_vector(at, entries);
        }
      });
  if (thread >= tiling.edges) return;
  const int i = tiling.edge(thread);
  const float z = policy[i], rz = reads_reference ? reference[i] : 0.0f;
  out.put(i, i == label ? r.at_label : grad_entry<kForm>(r, r_floor, z, rz));
}

// What one thread writes of a row of n equal elements.
QK_HOST_DEVICE void fill_row(const AnyOut& out, int n, float value, int thread) {
  const RowTiling tiling = tile_row(out.address(), out.size(), n, 8, 0);
  float entries[8];
  QK_UNROLL
  for (int j = 0; j < 8; ++j) entries[j] = value;
  for (int vector = thread; vector < tiling.vectors; vector += kThreads)
    out.put_vector(tiling.head + static_cast<int64_t>(vector) * 8, entries);
  if (thread < tiling.edges) out.put(tiling.edge(thread), value);
}

}  // namespace cuda
}  // namespace qk
