// DPO with label smoothing: the arithmetic of the `pair_loss` operation, on a pair and on the rows of its sequences.
#pragma once

#include <cmath>

#include "calls.h"
#include "macros.h"

namespace qk {

// log pi - log pi_ref; 0 where both are -inf: a token that both models mask says nothing about the reward.
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

// The weight of a row in its sequence's sums. Nothing else of a row of weight 0 is read.
QK_HOST_DEVICE float weight_of(const PairCall& call, int64_t row) {
  if (call.weights) return call.weights[row];
  return call.labels.data[row] == call.labels.ignore_index ? 0.0f : 1.0f;
}

// A row's log-ratio; its log-prob where the reference comes per sequence.
QK_HOST_DEVICE double value_of(const PairCall& call, int64_t row) {
  return call.reference && !call.per_sequence ? log_ratio(call.logps[row], call.reference[row]) : call.logps[row];
}

// The sum of a sequence's weighted values over every `step`-th of its rows.
QK_HOST_DEVICE double partial_sum(const PairCall& call, int64_t sequence, int first, int step) {
  double total = 0;
  const int64_t end = call.begin(sequence + 1);
  for (int64_t row = call.begin(sequence) + first; row < end; row += step) {
    const float weight = weight_of(call, row);
    if (weight != 0) total += weight * value_of(call, row);
  }
  return total;
}

// The sequence's log-ratio from the sum over all of its rows. Stores its reward.
QK_HOST_DEVICE double store_reward(const PairCall& call, int64_t sequence, double total) {
  const double ratio = call.per_sequence ? log_ratio(total, call.reference[sequence]) : total;
  call.rewards[sequence] = static_cast<float>(call.beta * ratio);
  return ratio;
}

// Stores what belongs to the same rows: dloss/dlogps and, as tokens, their reward and the reference's log-prob.
QK_HOST_DEVICE void store_rows(const PairCall& call, int64_t sequence, double slope, int first, int step) {
  const int64_t end = call.begin(sequence + 1);
  for (int64_t row = call.begin(sequence) + first; row < end; row += step) {
    const float weight = weight_of(call, row);
    call.grad[row] = weight == 0 ? 0 : static_cast<float>(slope * weight);
    if (!call.tokens) continue;
    // In fp32, as torch would: whatever computes a token's reward, it has the same bits.
    call.tokens[row] = weight == 0 ? 0 : static_cast<float>(call.beta) * static_cast<float>(value_of(call, row));
    call.tokens[call.rows + row] = weight == 0 || !call.reference ? 0 : call.reference[row];
  }
}

}  // namespace qk
