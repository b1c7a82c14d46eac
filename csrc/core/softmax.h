// The online softmax of one row: partial sums, and how two partial sums merge. What follows from the whole: fields.h.
//
// With z the raw logits, T the temperature and m the running maximum of the z seen so far, let
//   t_j = (z_j - m) log2(e) / T <= 0,     e_j = 2^t_j = exp((z_j - m) / T).
// A row is summed in pieces, each relative to its own maximum. When the maximum changes from m to m', let d = (m - m')
// log2(e) / T <= 0: every t_j changes by d, every e_j is multiplied by 2^d, and the running sums are rescaled:
//   sum e        <- 2^d sum e
//   sum e t      <- 2^d (sum e t + d sum e)
//   sum e^2      <- 4^d sum e^2
//   sum e (t-t') <- 2^d (sum e (t-t') + (d - d') sum e)      (t', d' of the other model of the pair)
//
// The label's own term is left out of all sums and added in `finish` (fields.h). Then the sum over the other entries
// keeps its relative precision when the model is almost certain, and with it log pi(label) = -log1p(sum of the others).
//
// Differences are taken before anything is added back: the offset of the logits, however large, never meets the
// logarithm of the sum, except in `logsumexp` itself.
#pragma once

#include <cmath>
#include <limits>

#include "macros.h"

namespace qk {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The raw logits are summed in fp32 times this: a row of at most 2^30 finite logits then has a finite sum, also where
// most of its entries are masked with the lowest number of the type. A power of two: no sum gets other digits by it.
constexpr float kRawUnit = 0x1p-30f;

// Partial sums of one model over a piece of a row, without the label.
struct Sums {
  float max = -std::numeric_limits<float>::infinity();  // of the raw logits, the label included
  double exp = 0;                                       // sum e
  double exp_t = 0;                                     // sum e t
  double exp_sq = 0;                                    // sum e^2
  double cross = 0;                                     // sum e (t - t of the other model)
  double raw = 0;                                       // sum z kRawUnit, the label included
  int64_t max_at = 0;                                   // start of the block in which `max` first occurs
};

// Partial sums of a row under both models (the reference's stay empty when there is none).
struct RowSums {
  Sums policy, reference;
};

// d above: the change of all t when the maximum changes; 0 where nothing has been summed yet.
QK_HOST_DEVICE double rescale_exponent(float from, float to, double log2e_per_temperature) {
  if (from == to || from == -std::numeric_limits<float>::infinity()) return 0;
  return (static_cast<double>(from) - static_cast<double>(to)) * log2e_per_temperature;
}

// Rescale the running sums of one model by its own exponent and, for `cross`, the other model's.
QK_HOST_DEVICE void rescale(Sums& sums, double exponent, double other_exponent) {
  if (exponent == 0 && other_exponent == 0) return;
  const double factor = exp2(exponent);
  if (factor == 0) {  // also keeps an infinite `cross` from turning 0 * inf into NaN
    if (sums.exp == sums.exp) sums.exp = sums.exp_t = sums.exp_sq = sums.cross = 0;
    return;
  }
  if (sums.exp != 0) {
    sums.exp_t = factor * (sums.exp_t + exponent * sums.exp);
    sums.cross = factor * (sums.cross + (exponent - other_exponent) * sums.exp);
  }
  sums.exp_sq *= factor * factor;
  sums.exp *= factor;
}

// Rescale the running sums of both models from one pair of maxima to another. `max` of the sums is left as it is.
QK_HOST_DEVICE void rescale(RowSums& sums, float policy_from, float policy_to, float reference_from, float reference_to,
                            double log2e_per_temperature) {
  const double exponent = rescale_exponent(policy_from, policy_to, log2e_per_temperature);
  const double reference_exponent = rescale_exponent(reference_from, reference_to, log2e_per_temperature);
  rescale(sums.policy, exponent, reference_exponent);
  rescale(sums.reference, reference_exponent, exponent);
}

// Rescale the running sums of both models to new maxima.
QK_HOST_DEVICE void rescale(RowSums& sums, float policy_max, float reference_max, double log2e_per_temperature) {
  rescale(sums, sums.policy.max, policy_max, sums.reference.max, reference_max, log2e_per_temperature);
}

QK_HOST_DEVICE void add(Sums& a, const Sums& b) {
  a.exp += b.exp;
  a.exp_t += b.exp_t;
  a.exp_sq += b.exp_sq;
  a.cross += b.cross;
  a.raw += b.raw;
  if (b.max > a.max) {
    a.max = b.max;
    a.max_at = b.max_at;
  }
}

// a <- a and b, where b covers the entries that follow those of a.
QK_HOST_DEVICE void merge(RowSums& a, RowSums b, double log2e_per_temperature) {
  const float policy_max = fmaxf(a.policy.max, b.policy.max);
  const float reference_max = fmaxf(a.reference.max, b.reference.max);
  rescale(a, policy_max, reference_max, log2e_per_temperature);
  rescale(b, policy_max, reference_max, log2e_per_temperature);
  add(a.policy, b.policy);
  add(a.reference, b.reference);
}

}  // namespace qk
