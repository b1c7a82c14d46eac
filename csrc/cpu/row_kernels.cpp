// Row kernels for the CPU: per-row statistics and gradients of logits. Compiled once per instruction set.
//
// Memory traffic: `sum_segment` reads each logit once, `grad_segment` reads each logit once and writes each gradient
// once. Logits are widened in registers and used in place; only the block that holds the label (its entry is
// taken out of the sums) and the last one (padded with -inf) are copied to a buffer in the L1 cache.
//
// Sums are taken relative to the maximum of the blocks *before* the current one, whose own maximum is found in the
// same pass. So no pass is made for the maximum alone (but for the first block of a segment, which has nothing before
// it) and no term is rescaled one by one; afterwards the row's sums are rescaled to the new maximum. A block
// that raises the maximum by more than a factor of 4 in probability is summed again relative to its own.
//
// Aliasing: `out` of a gradient may be the logits themselves: each vector is read before the same vector is written.
// The reference is never written.
//
// Numerics: see core/softmax.h. Partial sums of at most kTerms terms each are kept in fp32, and added in double. So
// what a sum loses grows neither with the vocabulary nor with narrower vectors. The sum of exponentials has the same
// bits whatever else is accumulated and with or without the other model: cached reference log-probs equal those
// computed in the same call.
#include "row_kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../core/gradient.h"
#include "fill.h"
#include "simd.h"

namespace qk {
namespace QK_ISA {
namespace {

// Vectors in flight: a pair (see simd.h).
constexpr int kUnroll = 2;
constexpr int kStep = kUnroll * kLanes;
static_assert(kBlock % kStep == 0, "a block is a whole number of unrolled steps");

// Terms of an fp32 sum. Next to the maximum's own term, 1, each other one is rounded to a multiple of 2^-23: where they
// are all about that small, a lane loses up to kTerms 2^-24, and nearly as much in one direction.
constexpr int64_t kTerms = 64;
constexpr int64_t kRun = kTerms * kStep;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What t = (z - m) * scale is computed with; a maximum of -inf (nothing but -inf so far) shifts by 0.
struct Shift {
  Vec max, scale;
  Shift(float m, float scale_) : max(splat(m == kMinusInfinity ? 0.0f : m)), scale(splat(scale_)) {}
  Vec exponent(Vec z) const { return (z - max) * scale; }
};

template <int n>
double total(const Vec (&sums)[n]) {
  Vec all = sums[0];
  for (int u = 1; u < n; ++u) all += sums[u];
  return lane_sum(all);
}

template <int n>
float maximum(const Vec (&maxima)[n]) {
  Vec all = maxima[0];
  for (int u = 1; u < n; ++u) all = max_ignoring_nan_in_first(all, maxima[u]);
  return lane_max(all);
}

// A block copied as fp32 and padded with -inf to whole steps, in the order in which its pairs are loaded in place,
// so that sums have the same bits either way; or in its own order.
struct Copy {
  alignas(64) float values[kBlock];
  int64_t padded;
};

// Copy elements [start, start + n) of a row, without the label's if it is among them. Returns their maximum and the
// sum of z kRawUnit, the label's included.
struct CopyResult {
  float max = kMinusInfinity;
  double raw = 0;
};

// Blocks that cannot be summed in place.
bool must_copy(int64_t start, int64_t n, int64_t label) {
  return n % kStep != 0 || (label >= start && label < start + n);
}

template <bool kOwnOrder, class T>
CopyResult copy_block(const T* row, int64_t start, int64_t n, int64_t label, Copy& copy) {
  const T* source = row + start;
  copy.padded = (n + kStep - 1) / kStep * kStep;
  CopyResult result;
  Vec m[kUnroll] = {splat(kMinusInfinity), splat(kMinusInfinity)}, s[kUnroll] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Pair v = kOwnOrder ? Pair{widen(source + i), widen(source + i + kLanes)} : load_pair(source + i);
    store(copy.values + i, v.first);
    store(copy.values + i + kLanes, v.second);
    m[0] = max_ignoring_nan_in_first(v.first, m[0]);
    m[1] = max_ignoring_nan_in_first(v.second, m[1]);
    s[0] += v.first * kRawUnit;
    s[1] += v.second * kRawUnit;
  }
  result.max = maximum(m);
  result.raw = total(s);
  auto at = [&](int64_t element) -> float& {
    const int64_t step = element / kStep * kStep, within = element - step;
    const int64_t place = !kOwnOrder && kEvenOdd<T> ? within / 2 + (within % 2) * kLanes : within;
    return copy.values[step + place];
  };
  for (; i < n; ++i) {
    const float v = qk::widen(source[i]);
    at(i) = v;
    if (v > result.max) result.max = v;
    result.raw += v * kRawUnit;
  }
  for (; i < copy.padded; ++i) at(i) = kMinusInfinity;
  if (label >= start && label < start + n) at(label - start) = kMinusInfinity;
  return result;
}

template <bool kOwnOrder>
CopyResult copy_block(const Rows& rows, const Shape& shape, int64_t row, int64_t start, int64_t n, int64_t label,
                      Copy& copy) {
  CopyResult result;
  with_type(rows.dtype, [&](auto t) {
    result = copy_block<kOwnOrder>(row_of<Pointee<decltype(t)>>(rows, shape, row), start, n, label, copy);
  });
  return result;
}

// The maximum of a block, for the first one of a segment: cheaper than summing it relative to nothing, and again.
template <class T>
float max_of_block(const T* z, int64_t n) {
  Vec m[kUnroll];
  for (int u = 0; u < kUnroll; ++u) m[u] = splat(kMinusInfinity);
  for (int64_t i = 0; i < n; i += kStep) {
    const Pair v = load_pair(z + i);
    m[0] = max_ignoring_nan_in_first(v.first, m[0]);
    m[1] = max_ignoring_nan_in_first(v.second, m[1]);
  }
  return maximum(m);
}

// Sums of at most kRun elements of one model, and their maximum.
template <Gather kGather, class T>
Sums sum_run(const T* z, int64_t n, const Shift& shift) {
  const Exp2<5> exp2(1);
  Vec m[kUnroll], s[kUnroll] = {}, st[kUnroll] = {}, sq[kUnroll] = {}, raw[kUnroll] = {};
  for (int u = 0; u < kUnroll; ++u) m[u] = splat(kMinusInfinity);
  for (int64_t i = 0; i < n; i += kStep) {
    const Pair pair = load_pair(z + i);
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = u == 0 ? pair.first : pair.second;
      m[u] = max_ignoring_nan_in_first(v, m[u]);
      Vec t = shift.exponent(v);
      if (kGather != Gather::kExp) t = clamp_exponent(t);
      const Vec e = exp2(t);
      s[u] += e;
      if (kGather != Gather::kExp) st[u] += e * t;
      if (kGather == Gather::kAll) {
        sq[u] += e * e;
        raw[u] += v * kRawUnit;
      }
    }
  }
  Sums sums;
  sums.max = maximum(m);
  sums.exp = total(s);
  if (kGather != Gather::kExp) sums.exp_t = total(st);
  if (kGather == Gather::kAll) {
    sums.exp_sq = total(sq);
    sums.raw = total(raw);
  }
  return sums;
}

// The same of a block.
template <Gather kGather, class T>
Sums sum_block(const T* z, int64_t n, const Shift& shift) {
  Sums sums;
  for (int64_t i = 0; i < n; i += kRun) add(sums, sum_run<kGather>(z + i, std::min(kRun, n - i), shift));
  return sums;
}

// Sums of at most kRun elements of both models at once, with sum e (t - t of the other model) of each.
template <Gather kGather, class T>
RowSums sum_pair_run(const T* policy, const T* reference, int64_t n, const Shift& shift, const Shift& reference_shift) {
  Vec m[kUnroll], s[kUnroll] = {}, st[kUnroll] = {}, sq[kUnroll] = {}, raw[kUnroll] = {};
  Vec rm[kUnroll], rs[kUnroll] = {}, cross[kUnroll] = {}, rcross[kUnroll] = {};
  const Exp2<5> exp2(1);
  for (int u = 0; u < kUnroll; ++u) m[u] = rm[u] = splat(kMinusInfinity);
  for (int64_t i = 0; i < n; i += kStep) {
    const Pair pair = load_pair(policy + i), reference_pair = load_pair(reference + i);
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = u == 0 ? pair.first : pair.second, rv = u == 0 ? reference_pair.first : reference_pair.second;
      m[u] = max_ignoring_nan_in_first(v, m[u]);
      rm[u] = max_ignoring_nan_in_first(rv, rm[u]);
      const Vec t = shift.exponent(v), rt = reference_shift.exponent(rv);
      const Vec clamped = clamp_exponent(t);
      const Vec e = exp2(clamped), re = exp2(rt);
      s[u] += e;
      rs[u] += re;
      st[u] += e * clamped;
      cross[u] = add_weighted(cross[u], e, t - rt);
      rcross[u] = add_weighted(rcross[u], re, rt - t);
      if (kGather == Gather::kAll) {
        sq[u] += e * e;
        raw[u] += v * kRawUnit;
      }
    }
  }
  RowSums sums;
  sums.policy.max = maximum(m);
  sums.policy.exp = total(s);
  sums.policy.exp_t = total(st);
  sums.policy.cross = total(cross);
  if (kGather == Gather::kAll) {
    sums.policy.exp_sq = total(sq);
    sums.policy.raw = total(raw);
  }
  sums.reference.max = maximum(rm);
  sums.reference.exp = total(rs);
  sums.reference.cross = total(rcross);
  return sums;
}

// The same of a block.
template <Gather kGather, class T>
RowSums sum_pair(const T* policy, const T* reference, int64_t n, const Shift& shift, const Shift& reference_shift) {
  RowSums sums;
  for (int64_t i = 0; i < n; i += kRun) {
    const RowSums run = sum_pair_run<kGather>(policy + i, reference + i, std::min(kRun, n - i), shift, reference_shift);
    add(sums.policy, run.policy);
    add(sums.reference, run.reference);
  }
  return sums;
}

// Terms may grow to 2^kHeadroom before a block is summed again. Not for the range of fp32 but for its digits: next to a
// term of 2^25, the rest of the row would be rounded away, and sum e t would cancel when it is rescaled.
constexpr double kHeadroom = 2;

// Whether sums relative to `base` are of no use for a block whose maximum is `max`.
bool out_of_reach(float base, float max, double log2e_per_temperature) {
  return base == kMinusInfinity ? max > base : rescale_exponent(max, base, log2e_per_temperature) > kHeadroom;
}

// Fold the segment [begin, end) of one model's row into `sums`.
template <Gather kGather, class T>
void fold_row(const Rows& rows, const StatsCall& call, int64_t row, int64_t begin, int64_t end, Sums& sums) {
  const double log2e_per_temperature = kLog2e / call.temperature;
  const float scale = static_cast<float>(log2e_per_temperature);
  const T* data = row_of<T>(rows, call.shape, row);
  const int64_t label = call.labels.data[row];
  Copy copy;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t n = std::min(kBlock, end - start);
    const bool copied = must_copy(start, n, label);
    CopyResult whole;
    if (copied) whole = copy_block<false>(data, start, n, label, copy);
    auto sum = [&](const Shift& shift) {
      if (!copied) return sum_block<kGather>(data + start, n, shift);
      Sums block = sum_block<kGather>(copy.values, copy.padded, shift);
      block.max = whole.max;
      block.raw = whole.raw;
      return block;
    };
    float base = sums.max;
    if (start == begin) base = copied ? whole.max : max_of_block(data + start, n);
    Sums block = sum(Shift(base, scale));
    const float max = std::max(base, block.max);
    if (out_of_reach(base, max, log2e_per_temperature)) {
      rescale(sums, rescale_exponent(base, max, log2e_per_temperature), 0);
      base = max;
      block = sum(Shift(base, scale));
    }
    block.max_at = start;
    add(sums, block);
    rescale(sums, rescale_exponent(base, max, log2e_per_temperature), 0);
  }
}

// Entries [start, start + n) of both models' rows, of one type.
template <class T>
class SameTypeBlock {
 public:
  SameTypeBlock(const StatsCall& call, int64_t row, int64_t start, int64_t n)
      : policy_(row_of<T>(call.policy, call.shape, row) + start),
        reference_(row_of<T>(call.reference, call.shape, row) + start),
        n_(n),
        copied_(must_copy(start, n, call.labels.data[row])) {
    if (!copied_) return;
    const int64_t label = call.labels.data[row] - start;
    policy_whole_ = copy_block<false>(policy_, 0, n, label, policy_copy_);
    reference_whole_ = copy_block<false>(reference_, 0, n, label, reference_copy_);
  }

  float policy_max() const { return copied_ ? policy_whole_.max : max_of_block(policy_, n_); }
  float reference_max() const { return copied_ ? reference_whole_.max : max_of_block(reference_, n_); }

  template <Gather kGather>
  RowSums sum(const Shift& shift, const Shift& reference_shift) const {
    if (!copied_) return sum_pair<kGather>(policy_, reference_, n_, shift, reference_shift);
    RowSums sums =
        sum_pair<kGather>(policy_copy_.values, reference_copy_.values, policy_copy_.padded, shift, reference_shift);
    sums.policy.max = policy_whole_.max;
    sums.policy.raw = policy_whole_.raw;
    sums.reference.max = reference_whole_.max;
    return sums;
  }

 private:
  const T* policy_;
  const T* reference_;
  const int64_t n_;
  const bool copied_;
  Copy policy_copy_, reference_copy_;
  CopyResult policy_whole_, reference_whole_;
};

// The same of rows of different types, `T` of the policy: fp32 copies of both, in their own order. The sum of
// exponentials of a bf16 row is taken once more, in the order in which its vectors are loaded: it has the same bits
// with and without the other model.
template <class T>
class MixedTypeBlock {
 public:
  MixedTypeBlock(const StatsCall& call, int64_t row, int64_t start, int64_t n)
      : call_(call), row_(row), start_(start), n_(n) {
    policy_whole_ = copy<true>(call.policy, policy_copy_);
    reference_whole_ = copy<true>(call.reference, reference_copy_);
  }

  float policy_max() const { return policy_whole_.max; }
  float reference_max() const { return reference_whole_.max; }

  template <Gather kGather>
  RowSums sum(const Shift& shift, const Shift& reference_shift) const {
    RowSums sums =
        sum_pair<kGather>(policy_copy_.values, reference_copy_.values, policy_copy_.padded, shift, reference_shift);
    sums.policy.max = policy_whole_.max;
    sums.policy.raw = policy_whole_.raw;
    sums.reference.max = reference_whole_.max;
    if (kEvenOdd<T>)
      sums.policy.exp = sum_exp_in_load_order(call_.policy, shift);
    else if (call_.reference.dtype == DType::kBFloat16)
      sums.reference.exp = sum_exp_in_load_order(call_.reference, reference_shift);
    return sums;
  }

 private:
  template <bool kOwnOrder>
  CopyResult copy(const Rows& rows, Copy& to) const {
    return copy_block<kOwnOrder>(rows, call_.shape, row_, start_, n_, call_.labels.data[row_], to);
  }

  double sum_exp_in_load_order(const Rows& rows, const Shift& shift) const {
    Copy ordered;
    copy<false>(rows, ordered);
    return sum_block<Gather::kExp>(ordered.values, ordered.padded, shift).exp;
  }

  const StatsCall& call_;
  const int64_t row_, start_, n_;
  Copy policy_copy_, reference_copy_;
  CopyResult policy_whole_, reference_whole_;
};

// Fold the segment [begin, end) of both models' rows into `sums`, block by block.
template <Gather kGather, class Block>
void fold_pair(const StatsCall& call, int64_t row, int64_t begin, int64_t end, RowSums& sums) {
  const double log2e_per_temperature = kLog2e / call.temperature;
  const float scale = static_cast<float>(log2e_per_temperature);
  for (int64_t start = begin; start < end; start += kBlock) {
    const Block block(call, row, start, std::min(kBlock, end - start));
    float base = sums.policy.max, reference_base = sums.reference.max;
    if (start == begin) {
      base = block.policy_max();
      reference_base = block.reference_max();
    }
    RowSums added = block.template sum<kGather>(Shift(base, scale), Shift(reference_base, scale));
    const float max = std::max(base, added.policy.max);
    const float reference_max = std::max(reference_base, added.reference.max);
    const bool far = out_of_reach(base, max, log2e_per_temperature);
    const bool reference_far = out_of_reach(reference_base, reference_max, log2e_per_temperature);
    if (far || reference_far) {
      // Each model by itself, so that its sums have the bits they have without the other model.
      const float new_base = far ? max : base, new_reference_base = reference_far ? reference_max : reference_base;
      rescale(sums, base, new_base, reference_base, new_reference_base, log2e_per_temperature);
      base = new_base;
      reference_base = new_reference_base;
      added = block.template sum<kGather>(Shift(base, scale), Shift(reference_base, scale));
    }
    added.policy.max_at = start;
    add(sums.policy, added.policy);
    add(sums.reference, added.reference);
    rescale(sums, base, max, reference_base, reference_max, log2e_per_temperature);
  }
}

template <Gather kGather>
void fold_one(const Rows& rows, const StatsCall& call, int64_t row, int64_t begin, int64_t end, Sums& sums) {
  with_type(rows.dtype, [&](auto t) { fold_row<kGather, Pointee<decltype(t)>>(rows, call, row, begin, end, sums); });
}

template <Gather kGather>
void fold_both(const StatsCall& call, int64_t row, int64_t begin, int64_t end, RowSums& sums) {
  with_type(call.policy.dtype, [&](auto t) {
    using T = Pointee<decltype(t)>;
    if (call.reference.dtype == call.policy.dtype)
      fold_pair<kGather, SameTypeBlock<T>>(call, row, begin, end, sums);
    else
      fold_pair<kGather, MixedTypeBlock<T>>(call, row, begin, end, sums);
  });
}

void sum_segment(const StatsCall& call, int64_t row, int64_t segment, RowSums* sums) {
  const int64_t begin = segment * kSegment, end = std::min(begin + kSegment, call.shape.vocab);
  const bool everything = call.fields & (bit(kLogSumSqProbs) | bit(kMeanLogits));
  if (call.fields & kDivergences) {
    if (everything)
      fold_both<Gather::kAll>(call, row, begin, end, *sums);
    else
      fold_both<Gather::kEntropy>(call, row, begin, end, *sums);
    return;
  }
  if (everything)
    fold_one<Gather::kAll>(call.policy, call, row, begin, end, sums->policy);
  else if (call.fields & bit(kEntropy))
    fold_one<Gather::kEntropy>(call.policy, call, row, begin, end, sums->policy);
  else
    fold_one<Gather::kExp>(call.policy, call, row, begin, end, sums->policy);
  if (call.reference.data && (call.fields & kReadsReference))
    fold_one<Gather::kExp>(call.reference, call, row, begin, end, sums->reference);
}

// Whether the label is the first entry that equals the row's maximum.
bool is_top1(const StatsCall& call, int64_t row, const Sums& sums, int64_t label) {
  for (int64_t j = sums.max_at; j < label; ++j)
    if (element(call.policy, call.shape, row, j) == sums.max) return false;
  return element(call.policy, call.shape, row, label) == sums.max;
}

void finish_row(const StatsCall& call, int64_t row, const RowSums& sums) {
  const int64_t label = call.labels.data[row];
  const bool with_reference = call.reference.data && (call.fields & kReadsReference);
  float values[kFieldCount];
  const float policy_label = element(call.policy, call.shape, row, label);
  const float reference_label = with_reference ? element(call.reference, call.shape, row, label) : 0;
  const bool top1 =
      (call.fields & bit(kIsTop1)) && policy_label == sums.policy.max && is_top1(call, row, sums.policy, label);
  finish(sums, policy_label, reference_label, with_reference, call.shape.vocab, call.temperature, top1, values);
  float* out = call.out + row;
  for (int field = 0; field < kFieldCount; ++field)
    if (call.fields >> field & 1) {
      *out = values[field];
      out += call.shape.rows();
    }
}

// Degree of the polynomial that a gradient of one term needs, by its type: an error of 0.02 ulp of bf16, 0.005 of fp16.
template <class T>
constexpr int kDegree = 5;
template <>
constexpr int kDegree<BFloat16> = 3;
template <>
constexpr int kDegree<Float16> = 4;

// out[i] = g(policy vector, reference vector) for a whole segment. Both rows are of one type, or the reference's values
// do not matter. What is left at the end goes through vectors of its own.
template <class P, class T, class G>
void map_vectors(const P* policy, const P* reference, int64_t n, T* out, G g) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Pair p = load_pair(policy + i), r = load_pair(reference + i);
    store_pair<kEvenOdd<P>>(out + i, {g(p.first, r.first), g(p.second, r.second)});
  }
  if (i == n) return;
  P last[kStep] = {}, reference_last[kStep] = {};
  T result[kStep];
  memcpy(static_cast<void*>(last), policy + i, static_cast<size_t>(n - i) * sizeof(P));
  memcpy(static_cast<void*>(reference_last), reference + i, static_cast<size_t>(n - i) * sizeof(P));
  for (int64_t j = 0; j < n - i; j += kLanes) narrow(result + j, g(widen(last + j), widen(reference_last + j)));
  memcpy(static_cast<void*>(out + i), result, static_cast<size_t>(n - i) * sizeof(T));
}

// Where only the log-prob (and logsumexp) is differentiated: g = (p coefficient - label coefficient) p.
template <class P, class T>
void grad_plain(const GradCall& call, const RowCoefficients& c, const P* policy, int64_t n, T* out) {
  const Shift shift(c.row_max, static_cast<float>(kLog2e / call.temperature));
  const Exp2<kDegree<T>> scaled(multiple_of_p(c, call.temperature));
  map_vectors(policy, policy, n, out, [&](Vec z, Vec) { return scaled(shift.exponent(z)); });
}

// The general case. `reference` is ignored unless kReference.
template <bool kReference, class P, class T>
void grad_full(const GradCall& call, const RowCoefficients& c, const P* policy, const P* reference, int64_t n, T* out) {
  const float scale = static_cast<float>(kLog2e / call.temperature);
  const Shift shift(c.row_max, scale), reference_shift(c.reference_max, scale);
  const GradFactors f = grad_factors(c, call.temperature);
  const Vec constant = splat(f.constant), slope = splat(f.slope);
  const Vec reference_slope = splat(f.reference_slope);
  const bool sloped = f.uses_reference_exponent();
  const Exp2<5> exp2(1), q_scaled(f.q_scale);  // whatever T is: the terms may cancel
  map_vectors(policy, reference, n, out, [&](Vec z, Vec rz) {
    const Vec t = shift.exponent(z);
    const Vec e = exp2(t);
    Vec factor = constant + slope * t;
    Vec g = e - e;  // 0, or the NaN that add_weighted would leave out
    if (kReference) {
      const Vec rt = reference_shift.exponent(rz);
      if (sloped) factor += reference_slope * rt;
      g += q_scaled(rt);
    }
    return add_weighted(g, e, factor);
  });
}

// P: element type of the logits, T: of the gradient.
template <class P, class T>
void grad_segment_of(const GradCall& call, int64_t row, int64_t segment) {
  const int64_t begin = segment * kSegment, n = std::min(kSegment, call.shape.vocab - begin);
  T* out = const_cast<T*>(row_of<T>(call.out, call.shape, row)) + begin;
  const int64_t label = call.labels.data[row];
  const RowCoefficients c = coefficients_of(call, row);
  if (label == call.labels.ignore_index || c.has_zero_gradient()) {
    if (!call.out_is_zero) fill_zero(out, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  const bool both = call.reference_softmax && call.coefficient_count == kCoefficientCount;
  const float reference_label = both ? element(call.reference, call.shape, row, label) : 0;
  const T at_label = qk::narrow<T>(static_cast<float>(grad_at_label(c, both, reference_label, call.temperature)));
  const P* policy = row_of<P>(call.policy, call.shape, row) + begin;
  if (c.is_multiple_of_p())
    grad_plain(call, c, policy, n, out);
  else if (!call.reference_softmax)
    grad_full<false>(call, c, policy, policy, n, out);
  else if (call.reference.dtype == call.policy.dtype)
    grad_full<true>(call, c, policy, row_of<P>(call.reference, call.shape, row) + begin, n, out);
  else
    for (int64_t start = 0; start < n; start += kBlock) {
      Copy copy, reference;
      const int64_t block = std::min(kBlock, n - start);
      copy_block<true>(call.policy, call.shape, row, begin + start, block, -1, copy);
      copy_block<true>(call.reference, call.shape, row, begin + start, block, -1, reference);
      grad_full<true>(call, c, copy.values, reference.values, block, out + start);
    }
  if (label >= begin && label < begin + n) out[label - begin] = at_label;
}

// The gradient has the dtype of the logits, or is narrower than fp32 logits.
void grad_segment(const GradCall& call, int64_t row, int64_t segment) {
  const bool wide = call.policy.dtype == DType::kFloat32;
  switch (call.out.dtype) {
    case DType::kFloat32: return grad_segment_of<float, float>(call, row, segment);
    case DType::kBFloat16:
      return wide ? grad_segment_of<float, BFloat16>(call, row, segment)
                  : grad_segment_of<BFloat16, BFloat16>(call, row, segment);
    case DType::kFloat16:
      return wide ? grad_segment_of<float, Float16>(call, row, segment)
                  : grad_segment_of<Float16, Float16>(call, row, segment);
  }
}

constexpr RowKernels kKernels = {QK_ISA_NAME, sum_segment, finish_row, grad_segment};

}  // namespace

const RowKernels* kernels() { return &kKernels; }

}  // namespace QK_ISA

const RowKernels* QK_ISA_ACCESSOR() { return QK_ISA::kernels(); }

}  // namespace qk
