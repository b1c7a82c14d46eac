// Row kernels for the CPU: per-row statistics and gradients of logits. Compiled once per instruction set.
//
// Memory traffic: `sum_segment` reads each logit once from memory. A block is read twice, the second time from the L1
// cache: first for its maximum, then for the sums relative to the running maximum, so that no term is ever rescaled
// one by one. 16-bit logits are widened into an 8 KiB buffer on the first read; fp32 logits are used where they lie,
// but for the block that holds the label (its entry is taken out of the sums) and the last one (padded with -inf).
// `grad_segment` reads each logit once and writes each gradient once.
//
// Aliasing: `out` of a gradient may be the logits themselves. A block is read whole before any of it is written, and
// blocks do not overlap. The reference is never written.
//
// Numerics: see core/softmax.h. Within a block, 4 * kLanes partial sums of at most 2048 / (4 * kLanes) terms each are
// kept in fp32; blocks are added in double. So no fp32 sum has more than 128 terms (32 with AVX-512), and what a sum
// loses does not grow with the vocabulary. Products (z - m) * log2(e) / T keep their rounding error in the second
// operand of a fused multiply-add where the instruction set has one.
#include "row_kernels.h"

#include <algorithm>

#include "simd.h"

namespace qk {
namespace QK_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kLanes;
static_assert(kBlock % kStep == 0, "a block is a whole number of unrolled steps");

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class T>
const T* row_of(const Rows& rows, const Shape& shape, int64_t row) {
  return static_cast<const T*>(rows.data) + (row / shape.inner) * rows.outer_stride +
         (row % shape.inner) * rows.inner_stride;
}

float element(const Rows& rows, const Shape& shape, int64_t row, int64_t column) {
  switch (rows.dtype) {
    case DType::kFloat32: return row_of<float>(rows, shape, row)[column];
    case DType::kBFloat16: return qk::widen(row_of<BFloat16>(rows, shape, row)[column]);
    case DType::kFloat16: return qk::widen(row_of<Float16>(rows, shape, row)[column]);
  }
  return 0;
}

int64_t round_up(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// A block of a row as fp32, padded with -inf to a whole number of steps. `max` and `raw_sum` only where asked for.
struct Block {
  const float* values;
  int64_t padded;
  float max = kMinusInfinity;
  double raw_sum = 0;
};

enum class Gather { kNothing, kMax, kMaxAndSum };

// Read elements [start, start + n) of a row; find their maximum (and sum); take the label's entry out if it is there.
template <class T, Gather kGather>
Block stage(const T* row, int64_t start, int64_t n, int64_t label, float* buffer) {
  const T* source = row + start;
  Block block;
  block.padded = round_up(n);
  const bool holds_label = label >= start && label < start + n;
  const bool copy = sizeof(T) != 4 || block.padded != n || holds_label;
  block.values = copy ? buffer : reinterpret_cast<const float*>(source);
  if (!copy && kGather == Gather::kNothing) return block;

  Vec m[kUnroll], s[kUnroll];
  for (int u = 0; u < kUnroll; ++u) m[u] = splat(kMinusInfinity), s[u] = Vec{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = widen(source + i + u * kLanes);
      if (copy) store(buffer + i + u * kLanes, v);
      if (kGather != Gather::kNothing) m[u] = max_ignoring_nan_in_first(v, m[u]);
      if (kGather == Gather::kMaxAndSum) s[u] += v;
    }
  float tail_max = kMinusInfinity;
  double tail_sum = 0;
  for (; i < n; ++i) {  // copy is true here
    const float v = qk::widen(source[i]);
    buffer[i] = v;
    if (v > tail_max) tail_max = v;
    tail_sum += v;
  }
  for (; i < block.padded; ++i) buffer[i] = kMinusInfinity;
  if (kGather != Gather::kNothing)
    block.max = std::max(tail_max, lane_max(max_ignoring_nan_in_first(max_ignoring_nan_in_first(m[0], m[1]),
                                                                      max_ignoring_nan_in_first(m[2], m[3]))));
  if (kGather == Gather::kMaxAndSum) block.raw_sum = lane_sum((s[0] + s[1]) + (s[2] + s[3])) + tail_sum;
  if (holds_label) buffer[label - start] = kMinusInfinity;
  return block;
}

template <Gather kGather>
Block stage(const Rows& rows, const Shape& shape, int64_t row, int64_t start, int64_t n, int64_t label,
            float* buffer) {
  switch (rows.dtype) {
    case DType::kBFloat16: return stage<BFloat16, kGather>(row_of<BFloat16>(rows, shape, row), start, n, label, buffer);
    case DType::kFloat16: return stage<Float16, kGather>(row_of<Float16>(rows, shape, row), start, n, label, buffer);
    default: return stage<float, kGather>(row_of<float>(rows, shape, row), start, n, label, buffer);
  }
}

// What t = (z - m) * scale is computed with; a maximum of -inf (nothing but -inf so far) shifts by 0.
struct Shift {
  Vec max, scale;
  Shift(float m, float scale_) : max(splat(m == kMinusInfinity ? 0.0f : m)), scale(splat(scale_)) {}
  Vec exponent(Vec z) const { return (z - max) * scale; }
};

void fold_exp(const Block& block, const Shift& shift, Sums& sums) {
  Vec s[kUnroll] = {};
  for (int64_t i = 0; i < block.padded; i += kStep)
    for (int u = 0; u < kUnroll; ++u) s[u] += exp2_nonpositive(shift.exponent(load(block.values + i + u * kLanes)));
  sums.exp += lane_sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Also sum e t and sum e^2, for entropy and log sum p^2.
void fold_moments(const Block& block, const Shift& shift, Sums& sums) {
  Vec s[kUnroll] = {}, st[kUnroll] = {}, sq[kUnroll] = {};
  for (int64_t i = 0; i < block.padded; i += kStep)
    for (int u = 0; u < kUnroll; ++u) {
      const Vec t = clamp_exponent(shift.exponent(load(block.values + i + u * kLanes)));
      const Vec e = exp2_clamped(t);
      s[u] += e;
      st[u] += e * t;
      sq[u] += e * e;
    }
  sums.exp += lane_sum((s[0] + s[1]) + (s[2] + s[3]));
  sums.exp_t += lane_sum((st[0] + st[1]) + (st[2] + st[3]));
  sums.exp_sq += lane_sum((sq[0] + sq[1]) + (sq[2] + sq[3]));
}

// Both models at once: exponential sums, moments of the policy, and sum e (t - t of the other) of each.
void fold_pair(const Block& policy, const Block& reference, const Shift& policy_shift, const Shift& reference_shift,
               Sums& policy_sums, Sums& reference_sums) {
  constexpr int kPairUnroll = 2;
  Vec s[kPairUnroll] = {}, st[kPairUnroll] = {}, sq[kPairUnroll] = {}, cross[kPairUnroll] = {};
  Vec rs[kPairUnroll] = {}, rcross[kPairUnroll] = {};
  for (int64_t i = 0; i < policy.padded; i += kPairUnroll * kLanes)
    for (int u = 0; u < kPairUnroll; ++u) {
      const Vec t = policy_shift.exponent(load(policy.values + i + u * kLanes));
      const Vec rt = reference_shift.exponent(load(reference.values + i + u * kLanes));
      const Vec clamped = clamp_exponent(t);
      const Vec e = exp2_clamped(clamped), re = exp2_nonpositive(rt);
      s[u] += e;
      rs[u] += re;
      st[u] += e * clamped;
      sq[u] += e * e;
      const Vec difference = t - rt;
      cross[u] += where_positive(e, e * difference);
      rcross[u] -= where_positive(re, re * difference);
    }
  policy_sums.exp += lane_sum(s[0] + s[1]);
  policy_sums.exp_t += lane_sum(st[0] + st[1]);
  policy_sums.exp_sq += lane_sum(sq[0] + sq[1]);
  policy_sums.cross += lane_sum(cross[0] + cross[1]);
  reference_sums.exp += lane_sum(rs[0] + rs[1]);
  reference_sums.cross += lane_sum(rcross[0] + rcross[1]);
}

void raise_max(Sums& sums, const Block& block, int64_t start) {
  sums.raw += block.raw_sum;
  if (block.max > sums.max) {
    sums.max = block.max;
    sums.max_at = start;
  }
}

template <Gather kGather>
void sum_segment_of(const StatsCall& call, int64_t row, int64_t segment, RowSums& sums) {
  const double log2e_per_temperature = kLog2e / call.temperature;
  const float scale = static_cast<float>(log2e_per_temperature);
  const bool with_reference = call.reference.data && (call.columns & kReadsReference);
  const bool divergence = call.columns & (bit(kKlReferencePolicy) | bit(kKlPolicyReference));
  const bool moments = call.columns & (bit(kEntropy) | bit(kLogSumSqProbs));
  const int64_t label = call.labels.data[row];
  const int64_t end = std::min((segment + 1) * kSegment, call.shape.vocab);
  alignas(64) float policy_buffer[kBlock], reference_buffer[kBlock];
  for (int64_t start = segment * kSegment; start < end; start += kBlock) {
    const int64_t n = std::min(kBlock, end - start);
    const float old_max = sums.policy.max, old_reference_max = sums.reference.max;
    const Block policy = stage<kGather>(call.policy, call.shape, row, start, n, label, policy_buffer);
    raise_max(sums.policy, policy, start);
    const double shift = exponent_shift(old_max, sums.policy.max, log2e_per_temperature);
    const Shift policy_shift(sums.policy.max, scale);
    if (!with_reference) {
      rescale(sums.policy, shift, 0);
      if (moments)
        fold_moments(policy, policy_shift, sums.policy);
      else
        fold_exp(policy, policy_shift, sums.policy);
      continue;
    }
    const Block reference = stage<Gather::kMax>(call.reference, call.shape, row, start, n, label, reference_buffer);
    raise_max(sums.reference, reference, start);
    const double reference_shift = exponent_shift(old_reference_max, sums.reference.max, log2e_per_temperature);
    rescale(sums.policy, shift, reference_shift);
    rescale(sums.reference, reference_shift, shift);
    const Shift other_shift(sums.reference.max, scale);
    if (divergence) {
      fold_pair(policy, reference, policy_shift, other_shift, sums.policy, sums.reference);
    } else {
      if (moments)
        fold_moments(policy, policy_shift, sums.policy);
      else
        fold_exp(policy, policy_shift, sums.policy);
      fold_exp(reference, other_shift, sums.reference);
    }
  }
}

void sum_segment(const StatsCall& call, int64_t row, int64_t segment, RowSums* sums) {
  if (call.columns & bit(kMeanLogits))
    sum_segment_of<Gather::kMaxAndSum>(call, row, segment, *sums);
  else
    sum_segment_of<Gather::kMax>(call, row, segment, *sums);
}

// Whether the label is the first entry that equals the row's maximum.
bool is_top1(const StatsCall& call, int64_t row, const Sums& sums, int64_t label) {
  for (int64_t j = sums.max_at; j < label; ++j)
    if (element(call.policy, call.shape, row, j) == sums.max) return false;
  return element(call.policy, call.shape, row, label) == sums.max;
}

void finish_row(const StatsCall& call, int64_t row, const RowSums& sums) {
  const int64_t label = call.labels.data[row];
  const bool with_reference = call.reference.data && (call.columns & kReadsReference);
  float values[kColumnCount];
  const float policy_label = element(call.policy, call.shape, row, label);
  const float reference_label = with_reference ? element(call.reference, call.shape, row, label) : 0;
  const bool top1 = (call.columns & bit(kIsTop1)) && policy_label == sums.policy.max &&
                    is_top1(call, row, sums.policy, label);
  finish(sums, policy_label, reference_label, with_reference, call.shape.vocab, call.temperature, top1, values);
  float* out = call.out + row;
  for (int column = 0; column < kColumnCount; ++column)
    if (call.columns >> column & 1) {
      *out = values[column];
      out += call.shape.rows();
    }
}

// Coefficients of a row, in the units of the kernel.
struct RowCoefficients {
  float row_max, reference_max;
  double log_sum, reference_log_sum, logp;
  double label, p, p_logp, p_logq, q;
};

RowCoefficients coefficients_of(const GradCall& call, int64_t row) {
  const int64_t rows = call.shape.rows();
  RowCoefficients c = {};
  c.row_max = call.state[row];
  c.log_sum = call.state[rows + row];
  c.logp = call.state[2 * rows + row];
  c.label = call.coefficients[row];
  if (call.coefficient_count == kCoefficientCount) {
    c.p = call.coefficients[kP * rows + row];
    c.p_logp = call.coefficients[kPLogP * rows + row];
    c.p_logq = call.coefficients[kPLogQ * rows + row];
    c.q = call.coefficients[kQ * rows + row];
  }
  if (call.reference_state) {
    c.reference_max = call.reference_state[row];
    c.reference_log_sum = call.reference_state[rows + row];
  }
  return c;
}

// Gradient of a block into `out` (fp32). Plain: only the log-prob is differentiated, g = -label p.
void grad_plain(const Block& block, const Shift& shift, float factor, float* out) {
  const Vec f = splat(factor);
  for (int64_t i = 0; i < block.padded; i += kStep)
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * kLanes;
      store(out + at, f * exp2_nonpositive(shift.exponent(load(block.values + at))));
    }
}

void grad_full(const Block& policy, const Block* reference, const Shift& shift, const Shift& reference_shift,
               const RowCoefficients& c, double temperature, float* out) {
  const double p_scale = std::exp(-c.log_sum) / temperature;
  const Vec constant = splat(static_cast<float>(p_scale * (c.p - c.label - c.p_logp * c.log_sum +
                                                           (reference ? c.p_logq * c.reference_log_sum : 0))));
  const Vec slope = splat(static_cast<float>(p_scale * c.p_logp * kLn2));
  const Vec reference_slope = splat(static_cast<float>(p_scale * c.p_logq * kLn2));
  const Vec q_scale = splat(reference ? static_cast<float>(c.q * std::exp(-c.reference_log_sum) / temperature) : 0);
  for (int64_t i = 0; i < policy.padded; i += kLanes) {
    const Vec t = shift.exponent(load(policy.values + i));
    const Vec e = exp2_nonpositive(t);
    Vec factor = constant + slope * t;
    Vec g;
    if (reference) {
      const Vec rt = reference_shift.exponent(load(reference->values + i));
      if (c.p_logq != 0) factor -= reference_slope * rt;
      g = where_positive(e, e * factor) - q_scale * exp2_nonpositive(rt);
    } else {
      g = where_positive(e, e * factor);
    }
    store(out + i, g + (e - e));  // e - e brings a NaN of the policy back
  }
}

// The label's own entry, formed in double and rounded once.
double grad_at_label(const GradCall& call, const RowCoefficients& c, int64_t row, int64_t label) {
  const double p = std::exp(c.logp);
  double g = -c.label * std::expm1(c.logp);  // label (1 - p), with all digits when p -> 1
  if (call.coefficient_count == kCoefficientCount) {
    double factor = c.p + (c.p_logp == 0 ? 0 : c.p_logp * c.logp);
    if (call.reference_state) {
      const float z = element(call.reference, call.shape, row, label);
      const double logq =
          (static_cast<double>(z) - static_cast<double>(c.reference_max)) / call.temperature - c.reference_log_sum;
      if (c.p_logq != 0) factor -= c.p_logq * logq;
      g -= c.q * std::exp(logq);
    }
    if (p != 0) g += p * factor;
  }
  return g / call.temperature;
}

template <class T>
void write(const float* values, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) narrow(out + i, load(values + i));
  for (; i < n; ++i) out[i] = qk::narrow<T>(values[i]);
}

template <class T>
void zero(T* out, int64_t n) {
  memset(static_cast<void*>(out), 0, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
void grad_segment_of(const GradCall& call, int64_t row, int64_t segment) {
  const int64_t begin = segment * kSegment, end = std::min(begin + kSegment, call.shape.vocab);
  T* out = const_cast<T*>(row_of<T>(call.out, call.shape, row));
  const int64_t label = call.labels.data[row];
  const RowCoefficients c = coefficients_of(call, row);
  const bool silent = c.label == 0 && c.p == 0 && c.p_logp == 0 && c.p_logq == 0 && c.q == 0;
  if (label == call.labels.ignore_index || silent) {
    zero(out + begin, end - begin);
    return;
  }
  const float scale = static_cast<float>(kLog2e / call.temperature);
  const bool plain = c.p_logp == 0 && c.p_logq == 0 && c.q == 0;
  const Shift shift(c.row_max, scale), reference_shift(c.reference_max, scale);
  const float factor = static_cast<float>((c.p - c.label) * std::exp(-c.log_sum) / call.temperature);
  const T at_label = qk::narrow<T>(static_cast<float>(grad_at_label(call, c, row, label)));
  alignas(64) float policy_buffer[kBlock], reference_buffer[kBlock], grad_buffer[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t n = std::min(kBlock, end - start);
    Block policy = stage<Gather::kNothing>(call.policy, call.shape, row, start, n, -1, policy_buffer);
    // Whole fp32 blocks go straight to their place.
    const bool direct = sizeof(T) == 4 && policy.padded == n;
    float* target = direct ? reinterpret_cast<float*>(out + start) : grad_buffer;
    if (plain) {
      grad_plain(policy, shift, factor, target);
    } else if (call.reference_state) {
      const Block reference = stage<Gather::kNothing>(call.reference, call.shape, row, start, n, -1, reference_buffer);
      grad_full(policy, &reference, shift, reference_shift, c, call.temperature, target);
    } else {
      grad_full(policy, nullptr, shift, reference_shift, c, call.temperature, target);
    }
    if (!direct) write(grad_buffer, n, out + start);
  }
  if (label >= begin && label < end) out[label] = at_label;
}

void grad_segment(const GradCall& call, int64_t row, int64_t segment) {
  switch (call.out.dtype) {
    case DType::kFloat32: return grad_segment_of<float>(call, row, segment);
    case DType::kBFloat16: return grad_segment_of<BFloat16>(call, row, segment);
    case DType::kFloat16: return grad_segment_of<Float16>(call, row, segment);
  }
}

constexpr RowKernels kKernels = {QK_ISA_NAME, sum_segment, finish_row, grad_segment};

}  // namespace

const RowKernels* kernels() { return &kKernels; }

}  // namespace QK_ISA

const RowKernels* QK_ISA_ACCESSOR() { return QK_ISA::kernels(); }

}  // namespace qk
