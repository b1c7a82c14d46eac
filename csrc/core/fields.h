// The per-row results, each with its place in the output and its formula, and the order of the coefficients: the C++
// side of qkernels/core/fields.py and coefficients.py. The sums that the formulas start from are in softmax.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "softmax.h"

namespace qk {

enum Field : int {
  kRowMax,
  kLogSum,
  kLogps,
  kReferenceRowMax,
  kReferenceLogSum,
  kReferenceLogps,
  kLogsumexp,
  kReferenceLogsumexp,
  kEntropy,
  kKlReferencePolicy,
  kKlPolicyReference,
  kLogSumSqProbs,
  kMeanLogits,
  kIsTop1,
  kFieldCount
};

constexpr const char* kFieldNames[kFieldCount] = {"row_max",
                                                  "log_sum",
                                                  "logps",
                                                  "reference_row_max",
                                                  "reference_log_sum",
                                                  "reference_logps",
                                                  "logsumexp",
                                                  "reference_logsumexp",
                                                  "entropy",
                                                  "kl_reference_policy",
                                                  "kl_policy_reference",
                                                  "log_sum_sq_probs",
                                                  "mean_logits",
                                                  "is_top1"};

// Entry j of a gradient row, times the temperature:
//   label * (1[j = y] - p_j) + p_j (p + p_logp log p_j - p_logq log q_j) - q q_j
enum Coefficient : int { kLabel, kP, kPLogP, kPLogQ, kQ, kCoefficientCount };

constexpr const char* kCoefficientNames[kCoefficientCount] = {"label", "p", "p_logp", "p_logq", "q"};

// What is accumulated of each entry besides e (see softmax.h).
enum class Gather {
  kExp,      // nothing
  kEntropy,  // e t
  kAll       // e t, e^2 and z
};

constexpr uint32_t bit(Field field) { return 1u << field; }

constexpr uint32_t kReadsReference = bit(kReferenceRowMax) | bit(kReferenceLogSum) | bit(kReferenceLogps) |
                                     bit(kReferenceLogsumexp) | bit(kKlReferencePolicy) | bit(kKlPolicyReference);

// Fields that need both models' rows jointly, in one pass over the two.
constexpr uint32_t kDivergences = bit(kKlReferencePolicy) | bit(kKlPolicyReference);

// The label's logit under one model, and the sums with its term added.
struct Completed {
  double t, e, exp, log_sum, logp;
};

QK_HOST_DEVICE Completed complete(const Sums& sums, float label_logit, double log2e_per_temperature) {
  Completed c;
  c.t = (static_cast<double>(label_logit) - static_cast<double>(sums.max)) * log2e_per_temperature;
  c.e = exp2(c.t);
  c.exp = sums.exp + c.e;
  c.log_sum = label_logit == sums.max ? log_one_plus(sums.exp) : log(c.exp);
  // Nothing but -inf, or a +inf: no softmax.
  if (sums.max - sums.max != 0) c.log_sum = std::numeric_limits<double>::quiet_NaN();
  c.logp = c.t * kLn2 - c.log_sum;
  return c;
}

// e * x with 0 * inf = 0.
QK_HOST_DEVICE double weighted(double e, double x) { return e == 0 ? 0 : e * x; }

QK_HOST_DEVICE double at_least_zero(double x) { return x < 0 ? 0 : x; }

// All fields of a row from its complete sums. `values` has kFieldCount entries; `top1` is decided by the caller, who
// can read the row again. Fields whose sums were not accumulated hold meaningless numbers.
QK_HOST_DEVICE void finish(const RowSums& sums, float label_logit, float reference_label_logit, bool has_reference,
                           int64_t vocab, double temperature, bool top1, float* values) {
  const double log2e_per_temperature = quotient(kLog2e, temperature);
  const Completed p = complete(sums.policy, label_logit, log2e_per_temperature);
  const double invalid = p.log_sum - p.log_sum;  // NaN if there is no softmax, else 0
  values[kRowMax] = static_cast<float>(sums.policy.max + invalid);
  values[kLogSum] = static_cast<float>(p.log_sum);
  values[kLogps] = static_cast<float>(p.logp);
  values[kLogsumexp] = static_cast<float>(quotient(sums.policy.max, temperature) + p.log_sum);
  const double mean_t = quotient(sums.policy.exp_t + weighted(p.e, p.t), p.exp);
  values[kEntropy] = static_cast<float>(at_least_zero(p.log_sum - kLn2 * mean_t));
  values[kLogSumSqProbs] = static_cast<float>(log(sums.policy.exp_sq + p.e * p.e) - 2 * p.log_sum);
  values[kMeanLogits] = static_cast<float>(
      quotient(quotient(sums.policy.raw * (1.0 / kRawUnit), static_cast<double>(vocab)), temperature) + invalid);
  values[kIsTop1] = static_cast<float>((top1 ? 1.0 : 0.0) + invalid);
  if (!has_reference) return;
  const Completed q = complete(sums.reference, reference_label_logit, log2e_per_temperature);
  values[kReferenceRowMax] = static_cast<float>(sums.reference.max + (q.log_sum - q.log_sum));
  values[kReferenceLogSum] = static_cast<float>(q.log_sum);
  values[kReferenceLogps] = static_cast<float>(q.logp);
  values[kReferenceLogsumexp] = static_cast<float>(quotient(sums.reference.max, temperature) + q.log_sum);
  const double forward = quotient(sums.policy.cross + weighted(p.e, p.t - q.t), p.exp);
  const double backward = quotient(sums.reference.cross + weighted(q.e, q.t - p.t), q.exp);
  values[kKlPolicyReference] = static_cast<float>(at_least_zero(kLn2 * forward - p.log_sum + q.log_sum));
  values[kKlReferencePolicy] = static_cast<float>(at_least_zero(kLn2 * backward - q.log_sum + p.log_sum));
}

}  // namespace qk
