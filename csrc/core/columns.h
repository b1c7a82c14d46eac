// The order of the per-row results and coefficients: the C++ side of qkernels/rows.py.
#pragma once

#include <cstdint>

namespace qk {

enum Column : int {
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
  kColumnCount
};

constexpr const char* kColumnNames[kColumnCount] = {"row_max",
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

constexpr uint32_t bit(Column column) { return 1u << column; }

constexpr uint32_t kReadsReference = bit(kReferenceRowMax) | bit(kReferenceLogSum) | bit(kReferenceLogps) |
                                     bit(kReferenceLogsumexp) | bit(kKlReferencePolicy) | bit(kKlPolicyReference);

// Columns that need both models' rows jointly, in one pass over the two.
constexpr uint32_t kDivergences = bit(kKlReferencePolicy) | bit(kKlPolicyReference);

}  // namespace qk
