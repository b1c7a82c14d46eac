// The gradient of one row: from the coefficients to the factors of its entries, and the label's entry.
//
// With the coefficients a (label), b (p), c (p_logp), d (p_logq), h (q) of fields.h, z the raw logits, T the
// temperature, t = (z - row_max) log2(e) / T, e = 2^t, log p = t ln 2 - log_sum, primes for the reference, entry j != y
// of dL/dz is
//   g_j = e (constant + slope t + reference_slope t') + q_scale e'
//   constant = exp(-log_sum) (b - a - c log_sum + d log_sum') / T     slope           =  exp(-log_sum) c ln 2 / T
//   q_scale  = -h exp(-log_sum') / T                                  reference_slope = -exp(-log_sum) d ln 2 / T
// The four factors are computed once per row in double. Where only a and b are not 0 it is constant * e.
//
// The label's entry is computed separately, in double from its saved log-prob: -a expm1(logp) = a (1 - p) keeps its
// relative precision when p -> 1. It is rounded once.
#pragma once

#include <cmath>

#include "calls.h"
#include "fields.h"

namespace qk {

// What the forward saved of a row, and the row's coefficients.
struct RowCoefficients {
  float row_max, reference_max;
  double log_sum, reference_log_sum, logp;
  double label, p, p_logp, p_logq, q;

  QK_HOST_DEVICE bool has_zero_gradient() const { return label == 0 && p == 0 && is_multiple_of_p(); }
  // Every entry but the label's is the same multiple of p_j.
  QK_HOST_DEVICE bool is_multiple_of_p() const { return p_logp == 0 && p_logq == 0 && q == 0; }
};

QK_HOST_DEVICE RowCoefficients coefficients_of(const GradCall& call, int64_t row) {
  const int64_t rows = call.shape.rows();
  const double upstream = call.upstream ? static_cast<double>(*call.upstream) : 1;
  RowCoefficients c = {};
  c.row_max = call.softmax[row];
  c.log_sum = call.softmax[rows + row];
  c.logp = call.softmax[2 * rows + row];
  c.label = upstream * call.coefficients[row];
  if (call.coefficient_count == kCoefficientCount) {
    c.p = upstream * call.coefficients[kP * rows + row];
    c.p_logp = upstream * call.coefficients[kPLogP * rows + row];
    c.p_logq = upstream * call.coefficients[kPLogQ * rows + row];
    c.q = upstream * call.coefficients[kQ * rows + row];
  }
  if (call.reference_softmax) {
    c.reference_max = call.reference_softmax[row];
    c.reference_log_sum = call.reference_softmax[rows + row];
  }
  return c;
}

struct GradFactors {
  float constant, slope, reference_slope, q_scale;

  // Whether the reference's t is used: it may be infinite, and must not be multiplied by a coefficient of 0.
  QK_HOST_DEVICE bool uses_reference_exponent() const { return reference_slope != 0; }
};

QK_HOST_DEVICE GradFactors grad_factors(const RowCoefficients& c, double temperature) {
  const double p_scale = quotient(exp(-c.log_sum), temperature);
  const double constant = c.p - c.label - c.p_logp * c.log_sum + c.p_logq * c.reference_log_sum;
  return {static_cast<float>(p_scale * constant), static_cast<float>(p_scale * c.p_logp * kLn2),
          static_cast<float>(-p_scale * c.p_logq * kLn2),
          static_cast<float>(quotient(-c.q * exp(-c.reference_log_sum), temperature))};
}

// `grad_factors().constant` of a row whose gradient `is_multiple_of_p`.
QK_HOST_DEVICE float multiple_of_p(const RowCoefficients& c, double temperature) {
  return static_cast<float>(quotient((c.p - c.label) * exp(-c.log_sum), temperature));
}

// The label's entry. `reference_label` is the reference's logit of it, read only if `with_reference`.
QK_HOST_DEVICE double grad_at_label(const RowCoefficients& c, bool with_reference, float reference_label,
                                    double temperature) {
  const double p = exp(c.logp);
  double g = -c.label * expm1(c.logp);
  double factor = c.p + (c.p_logp == 0 ? 0 : c.p_logp * c.logp);
  if (with_reference) {
    const double logq =
        quotient(static_cast<double>(reference_label) - static_cast<double>(c.reference_max), temperature) -
        c.reference_log_sum;
    if (c.p_logq != 0) factor -= c.p_logq * logq;
    g -= c.q * exp(logq);
  }
  if (p != 0 && factor != 0) g += p * factor;
  return quotient(g, temperature);
}

}  // namespace qk
