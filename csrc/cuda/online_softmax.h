// The online softmax of one thread: what it accumulates of a row.
//
// Each thread keeps fp32 sums of the elements it has seen, relative to their maximum, by the rules of core/softmax.h:
// one exponential per element, and one per iteration to rescale the running sums. The label's element is masked before
// it is accumulated. There is no barrier: the sums of the threads are added at the end of the row (block_reduce.cuh).
//
// The sum of exponentials is formed by the same operations in the same order whatever else is accumulated, and for
// either model. So cached and recomputed log-probs of rows of the same type and the same alignment modulo 16 bytes have
// equal bits.
#pragma once

#include "../core/fields.h"
#include "row_tiling.h"

namespace qk {
namespace cuda {

// `cross` of a thread is kept in the unit of the logits times this. Then every finite logit, also the -3e38 that some
// use as a mask, gives a finite sum of the 2^10 terms and more of a thread; as exponents such logits would overflow.
constexpr float kCrossUnit = 0x1p-12f;

// One thread's sums of one model; the members are those of `Sums`, but for the unit of `cross`.
struct ThreadSums {
  float max = -kInfinity;
  float exp = 0, exp_t = 0, exp_sq = 0, cross = 0, raw = 0;
};

// One thread's sums of a row under both models (the reference's stay empty when there is none).
struct ThreadRowSums {
  ThreadSums policy, reference;
  float max_before_label = -kInfinity;  // of the policy's logits before the label; only with Gather::kAll
};

// Sums of a thread, a warp, a block or a piece of a row: what a split row leaves in the scratch buffer.
struct PartialSums {
  RowSums sums;
  float max_before_label = -kInfinity;
};

QK_HOST_DEVICE Sums widen_sums(const ThreadSums& thread, double log2e_per_temperature) {
  Sums sums;
  sums.max = thread.max;
  sums.exp = thread.exp;
  sums.exp_t = thread.exp_t;
  sums.exp_sq = thread.exp_sq;
  sums.cross = thread.cross * (log2e_per_temperature / kCrossUnit);
  sums.raw = thread.raw;
  return sums;
}

QK_HOST_DEVICE PartialSums partial_sums(const ThreadRowSums& thread, double log2e_per_temperature) {
  PartialSums partial;
  partial.sums.policy = widen_sums(thread.policy, log2e_per_temperature);
  partial.sums.reference = widen_sums(thread.reference, log2e_per_temperature);
  partial.max_before_label = thread.max_before_label;
  return partial;
}

// How a new maximum rescales a thread's sums: the exponent d of core/softmax.h, the same in the unit of `cross`, and
// factor = 2^d. `base` is the maximum; or 0 as long as only -inf was seen, when all sums are 0.
struct MaxUpdate {
  float base, exponent, cross_exponent, factor;
};

QK_HOST_DEVICE MaxUpdate update_max(float& max, float tile_max, float scale) {
  const float now = fmaxf(max, tile_max);
  const float base = now == -kInfinity ? 0.0f : now;
  const float difference = max - base, exponent = difference * scale;
  max = now;
  return {base, exponent, difference * kCrossUnit, exp2_approx(exponent)};
}

// sum e x, rescaled, without the tile's own terms. A factor of 0 leaves 0, also of an infinite sum.
QK_HOST_DEVICE float rescaled(float sum, float exponent, float exp, float factor) {
  return factor == 0 ? 0.0f : factor * fmaf(exponent, exp, sum);
}

// Below this exponent e is 0. Where t multiplies e it is bounded by it, because 0 * -inf is not 0.
constexpr float kExponentFloor = -200.0f;

template <Gather kGather, class Tile>
QK_HOST_DEVICE void accumulate(const Tile& z, float scale, ThreadSums& sums) {
  const MaxUpdate update = update_max(sums.max, z.max(), scale);
  float exp = 0, exp_t = 0, exp_sq = 0;
  QK_UNROLL
  for (int u = 0; u < Tile::kVectors; ++u) {
    float part = 0;
    QK_UNROLL
    for (int j = 0; j < Tile::kVector; ++j) {
      const float t = (z[u * Tile::kVector + j] - update.base) * scale;
      const float e = exp2_approx(t);
      part += e;
      if (kGather != Gather::kExp) exp_t = fmaf(e, fmaxf(t, kExponentFloor), exp_t);
      if (kGather == Gather::kAll) exp_sq = fmaf(e, e, exp_sq);
    }
    exp += part;
  }
  if (kGather != Gather::kExp) sums.exp_t = rescaled(sums.exp_t, update.exponent, sums.exp, update.factor) + exp_t;
  if (kGather == Gather::kAll) sums.exp_sq = fmaf(update.factor * update.factor, sums.exp_sq, exp_sq);
  sums.exp = fmaf(update.factor, sums.exp, exp);
}

// The same of both models jointly, with sum e (t - t of the other model) of each.
template <Gather kGather, class Tile>
QK_HOST_DEVICE void accumulate_jointly(const Tile& z, const Tile& rz, float scale, ThreadRowSums& row) {
  ThreadSums &p = row.policy, &q = row.reference;
  const MaxUpdate update = update_max(p.max, z.max(), scale), r_update = update_max(q.max, rz.max(), scale);
  float exp = 0, exp_t = 0, exp_sq = 0, cross = 0, r_exp = 0, r_cross = 0;
  QK_UNROLL
  for (int u = 0; u < Tile::kVectors; ++u) {
    float part = 0, r_part = 0;
    QK_UNROLL
    for (int j = 0; j < Tile::kVector; ++j) {
      const float below = z[u * Tile::kVector + j] - update.base, r_below = rz[u * Tile::kVector + j] - r_update.base;
      const float t = below * scale, e = exp2_approx(t), re = exp2_approx(r_below * scale);
      part += e;
      r_part += re;
      const float d = (below - r_below) * kCrossUnit;  // infinite, or NaN, where a model masks the token with -inf
      if (e > 0) cross = fmaf(e, d, cross);
      if (re > 0) r_cross = fmaf(re, -d, r_cross);
      if (kGather != Gather::kExp) exp_t = fmaf(e, fmaxf(t, kExponentFloor), exp_t);
      if (kGather == Gather::kAll) exp_sq = fmaf(e, e, exp_sq);
    }
    exp += part;
    r_exp += r_part;
  }
  if (kGather != Gather::kExp) p.exp_t = rescaled(p.exp_t, update.exponent, p.exp, update.factor) + exp_t;
  if (kGather == Gather::kAll) p.exp_sq = fmaf(update.factor * update.factor, p.exp_sq, exp_sq);
  p.cross = rescaled(p.cross, update.cross_exponent - r_update.cross_exponent, p.exp, update.factor) + cross;
  q.cross = rescaled(q.cross, r_update.cross_exponent - update.cross_exponent, q.exp, r_update.factor) + r_cross;
  p.exp = fmaf(update.factor, p.exp, exp);
  q.exp = fmaf(r_update.factor, q.exp, r_exp);
}

// sum z kRawUnit of a vector.
template <class Tile>
QK_HOST_DEVICE float raw_sum(const Tile& z, int u) {
  float sum = 0;
  QK_UNROLL
  for (int j = 0; j < Tile::kVector; ++j) sum = fmaf(z[u * Tile::kVector + j], kRawUnit, sum);
  return sum;
}

// What one thread accumulates of a row (or a piece) of n elements. The label's position is relative to its start and
// may be outside of it. kPair: both models jointly; else only `policy` is read. Both rows have the same type and, with
// AlignedRow, the same alignment modulo 16 bytes.
template <Gather kGather, bool kPair, class Row>
QK_HOST_DEVICE void accumulate_row(const Row& policy, const Row& reference, int n, int label, float scale, int thread,
                                   ThreadRowSums& sums) {
  using Tile = typename Row::Tile;
  constexpr int kVectors = Tile::kVectors, kVector = Tile::kVector;
  constexpr int kStep = kThreads * kVector;  // elements between two vectors of a thread
  constexpr bool kAll = kGather == Gather::kAll;
  const RowTiling tiling = tile_row(policy.address(), policy.size(), n, kVector, Row::kMargin);
  const int label_vector = tiling.vector_of(label);
  const int64_t first = tiling.head + thread * kVector;
  auto accumulate_tiles = [&](const Tile& z, const Tile& rz) {
    if (kPair)
      accumulate_jointly<kGather>(z, rz, scale, sums);
    else
      accumulate<kGather>(z, scale, sums.policy);
  };
  for_each_iteration(
      tiling.vectors / (kVectors * kThreads), label_iteration(label_vector, kVectors, thread, kAll),
      [&](int i) {
        Tile z, rz;
        policy.read(z, first + static_cast<int64_t>(i) * kVectors * kStep, kStep);
        if (kPair) reference.read(rz, first + static_cast<int64_t>(i) * kVectors * kStep, kStep);
        if (kAll) {
          QK_UNROLL
          for (int u = 0; u < kVectors; ++u) sums.policy.raw += raw_sum(z, u);
        }
        accumulate_tiles(z, rz);
      },
      [&](int i) {
        const bool holds_label = kAll && label_vector >= 0 && label_vector / (kVectors * kThreads) == i;
        if (i * kVectors * kThreads + thread >= tiling.vectors) {  // no vector is left for this thread
          if (holds_label) sums.max_before_label = sums.policy.max;
          return;
        }
        Tile z, rz;
        float before = sums.policy.max;
        QK_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          const int vector = (i * kVectors + u) * kThreads + thread;
          const int start = tiling.head + vector * kVector;
          if (vector < tiling.vectors) {
            policy.read_vector(z, u, start);
            if (kPair) reference.read_vector(rz, u, start);
            if (kAll) sums.policy.raw += raw_sum(z, u);
          } else {
            z.mask_vector(u);
            if (kPair) rz.mask_vector(u);
          }
          QK_UNROLL
          for (int j = 0; j < kVector; ++j) {
            const int k = u * kVector + j;
            if (kAll && start + j < label) before = fmaxf(before, z[k]);
            if (start + j == label) {
              z.mask(k);
              if (kPair) rz.mask(k);
            }
          }
        }
        if (holds_label) sums.max_before_label = before;
        accumulate_tiles(z, rz);
      });
  // A label in the tail: all vectors are before it.
  if (kAll && label >= tiling.head + tiling.vectors * kVector) sums.max_before_label = sums.policy.max;
  if (thread >= tiling.edges) return;
  const int i = tiling.edge(thread);
  WidenedTile<1, 1> z = {{policy[i]}}, rz = {{kPair ? reference[i] : 0.0f}};
  if (kAll) sums.policy.raw = fmaf(z[0], kRawUnit, sums.policy.raw);
  if (kAll && i < label) sums.max_before_label = fmaxf(sums.max_before_label, z[0]);
  if (i == label) return;
  if (kPair)
    accumulate_jointly<kGather>(z, rz, scale, sums);
  else
    accumulate<kGather>(z, scale, sums.policy);
}

}  // namespace cuda
}  // namespace qk
