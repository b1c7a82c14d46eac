// DPO with label smoothing on one pair, and its derivative: the arithmetic of the `pair_loss` operation.
#pragma once

#include <cmath>

#include "macros.h"

namespace qk {

// log pi - log pi_ref; 0 where both are -inf: a token that both models forbid tells nothing about the reward.
QK_HOST_DEVICE double log_ratio(double logp, double reference) {
  return logp == reference && logp == -INFINITY ? 0 : logp - reference;
}

QK_HOST_DEVICE double log_sigmoid(double x) { return x < 0 ? x - log_one_plus(exp(x)) : -log_one_plus(exp(-x)); }

QK_HOST_DEVICE double sigmoid(double x) { return quotient(1, 1 + exp(-x)); }

struct PairResult {
  double loss;
  double slope;  // dloss / d(chosen log-ratio); the rejected side has the opposite sign
};

// -(1 - eps) log sigma(beta D) - eps log sigma(-beta D), with D the difference of the log-ratio sums.
QK_HOST_DEVICE PairResult pair_loss(double chosen, double rejected, double beta, double label_smoothing) {
  const double x = beta * (chosen - rejected);
  const double keep = 1 - label_smoothing;
  const double flipped = label_smoothing == 0 ? 0 : label_smoothing * log_sigmoid(-x);
  return {-keep * log_sigmoid(x) - flipped, -beta * (keep * sigmoid(-x) - label_smoothing * sigmoid(x))};
}

}  // namespace qk
