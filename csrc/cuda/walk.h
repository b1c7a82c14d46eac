// How the threads of a block walk a row, and what each of them does on its way: the per-thread half of the kernels.
//
// Walking a row. A row (or a piece of one) of n elements is cut into a head that ends at the first 16-byte line
// computed from its *address*, vectors of whole lines, and a tail, so that every load and store of the loop is of 16
// bytes with any V, stride and base address. In a trip each thread of the block takes kVectors vectors, kThreads
// vectors apart: all of them are loaded before the first is used, and a trip of the block covers consecutive memory.
// The trip that holds the label and the last, incomplete one are taken with care, element by element where that is
// needed; the loop over the others compares no element with the label. Head and tail are fewer elements than threads,
// one each.
//
// Sums. Each thread keeps fp32 sums of what it has met relative to its own running maximum, by the rules of
// core/softmax.h: one exponential per element, and one per trip to restate the sums. The label's element is replaced by
// -inf before it is summed. There is no barrier: threads meet at the end of the row (kernels.cuh).
//
// The sum of exponentials is formed by the same operations in the same order whatever else is gathered and for either
// model. So cached and live log-probs of rows of the same type that lie alike relative to 16-byte lines have equal
// bits.
#pragma once

#include "../core/gradient.h"
#include "../core/softmax.h"
#include "lines.h"

namespace qk {
namespace cuda {

// --- where a row is cut ---------------------------------------------------------------------------------------------

struct Cut {
  int head = 0, vectors = 0;  // elements; vectors of `vector` elements
  int edges = 0;              // elements in head and tail
  int vector = 1;

  // Position of the e-th of the elements outside of the vectors.
  QK_HOST_DEVICE int edge(int e) const { return e < head ? e : e + vectors * vector; }
  // The vector that holds an element; -1 if none does.
  QK_HOST_DEVICE int vector_of(int at) const {
    const int past = at - head;
    return past < 0 || past >= vectors * vector ? -1 : past / vector;
  }
};

// `inside` keeps the vectors 8 elements away from either end, so that the lines around a vector belong to the row.
QK_HOST_DEVICE Cut cut(uintptr_t address, int size, int n, int vector, bool inside) {
  Cut c;
  c.vector = vector;
  const int margin = inside ? 8 : 0;
  c.head = static_cast<int>((16 - (address & 15)) & 15) / size + margin;
  c.vectors = n - c.head - margin > 0 ? (n - c.head - margin) / vector : 0;
  if (c.vectors == 0) c.head = 0;
  c.edges = n - c.vectors * vector;
  return c;
}
// With margins: 7 or less before the first line, 8, 8, and less than a vector.
constexpr int kMaxEdges = 7 + 8 + 8 + 7;
static_assert(kMaxEdges < kThreads, "a thread takes at most one element of head and tail");

// The trip in which the threads of one warp meet the label's vector, or -1. For a whole warp, lest its threads part
// ways for the rest of the row; for the whole block if all of it has to take notice.
QK_HOST_DEVICE int trip_of(int vector, int kVectors, int thread, bool for_all) {
  if (vector < 0) return -1;
  const bool mine = for_all || vector % kThreads / 32 == thread / 32;
  return mine ? vector / (kVectors * kThreads) : -1;
}

// plain(g) for all whole trips but `touched`; careful(g) for that one and for the incomplete one at the end.
template <class Plain, class Careful>
QK_HOST_DEVICE void for_trips(int whole, int touched, Plain plain, Careful careful) {
  int g = 0;
  do {
    const int stop = touched >= g && touched < whole ? touched : whole;
    for (; g < stop; ++g) plain(g);
    careful(g++);
  } while (g <= whole);
}

// --- sums -----------------------------------------------------------------------------------------------------------

// `cross` of a thread is kept in the unit of the logits times this. Then every finite logit, also the -3e38 by which some
// mask, gives a finite sum of the 2^10 terms and more that a thread meets; exponents of such logits overflow.
constexpr float kCrossUnit = 0x1p-12f;

// One thread's sums of one model; the fields are those of `Sums`, but for the unit of `cross`.
struct LaneSums {
  float max = -kInfinity;
  float exp = 0, exp_t = 0, exp_sq = 0, cross = 0, raw = 0;
};

struct LaneRow {
  LaneSums policy, reference;
  float before = -kInfinity;  // the largest of the policy's logits before the label; only with Gather::kAll
};

QK_HOST_DEVICE Sums widened(const LaneSums& lane, double log2e_per_temperature) {
  Sums sums;
  sums.max = lane.max;
  sums.exp = lane.exp;
  sums.exp_t = lane.exp_t;
  sums.exp_sq = lane.exp_sq;
  sums.cross = lane.cross * (log2e_per_temperature / kCrossUnit);
  sums.raw = lane.raw;
  return sums;
}

// What a new maximum does to a thread's sums: the exponents' fall, in the unit of `cross` too. While nothing but -inf was
// met exponents are relative to 0, and all sums are 0.
struct Move {
  float base, shift, cross_shift, factor;
};

QK_HOST_DEVICE Move move_max(float& max, float top, float scale) {
  const float now = fmaxf(max, top);
  const float base = now == -kInfinity ? 0.0f : now;
  const float fall = max - base, shift = fall * scale;
  max = now;
  return {base, shift, fall * kCrossUnit, exp2_approx(shift)};
}

// sum e x after the move, without the tile's own terms. A factor of 0 forgets, also infinities.
QK_HOST_DEVICE float moved(float sum, float shift, float exp, float factor) {
  return factor == 0 ? 0.0f : factor * fmaf(shift, exp, sum);
}

// Below this exponent e is 0; t is bounded where it multiplies e, for 0 * -inf is not 0.
constexpr float kNothing = -200.0f;

template <Gather kGather, class Tile>
QK_HOST_DEVICE void fold(const Tile& z, float scale, LaneSums& sums) {
  const Move move = move_max(sums.max, z.max(), scale);
  float exp = 0, exp_t = 0, exp_sq = 0;
  QK_UNROLL
  for (int u = 0; u < Tile::kVectors; ++u) {
    float part = 0;
    QK_UNROLL
    for (int j = 0; j < Tile::kVector; ++j) {
      const float t = (z[u * Tile::kVector + j] - move.base) * scale;
      const float e = exp2_approx(t);
      part += e;
      if (kGather != Gather::kExp) exp_t = fmaf(e, fmaxf(t, kNothing), exp_t);
      if (kGather == Gather::kAll) exp_sq = fmaf(e, e, exp_sq);
    }
    exp += part;
  }
  if (kGather != Gather::kExp) sums.exp_t = moved(sums.exp_t, move.shift, sums.exp, move.factor) + exp_t;
  if (kGather == Gather::kAll) sums.exp_sq = fmaf(move.factor * move.factor, sums.exp_sq, exp_sq);
  sums.exp = fmaf(move.factor, sums.exp, exp);
}

// The same of both models in step, with sum e (t - t of the other model) of each.
template <Gather kGather, class Tile>
QK_HOST_DEVICE void fold_pair(const Tile& z, const Tile& rz, float scale, LaneRow& row) {
  LaneSums &p = row.policy, &q = row.reference;
  const Move move = move_max(p.max, z.max(), scale), r_move = move_max(q.max, rz.max(), scale);
  float exp = 0, exp_t = 0, exp_sq = 0, cross = 0, r_exp = 0, r_cross = 0;
  QK_UNROLL
  for (int u = 0; u < Tile::kVectors; ++u) {
    float part = 0, r_part = 0;
    QK_UNROLL
    for (int j = 0; j < Tile::kVector; ++j) {
      const float below = z[u * Tile::kVector + j] - move.base, r_below = rz[u * Tile::kVector + j] - r_move.base;
      const float t = below * scale, e = exp2_approx(t), re = exp2_approx(r_below * scale);
      part += e;
      r_part += re;
      const float d = (below - r_below) * kCrossUnit;  // infinite, or NaN, where models forbid the token by -inf
      if (e > 0) cross = fmaf(e, d, cross);
      if (re > 0) r_cross = fmaf(re, -d, r_cross);
      if (kGather != Gather::kExp) exp_t = fmaf(e, fmaxf(t, kNothing), exp_t);
      if (kGather == Gather::kAll) exp_sq = fmaf(e, e, exp_sq);
    }
    exp += part;
    r_exp += r_part;
  }
  if (kGather != Gather::kExp) p.exp_t = moved(p.exp_t, move.shift, p.exp, move.factor) + exp_t;
  if (kGather == Gather::kAll) p.exp_sq = fmaf(move.factor * move.factor, p.exp_sq, exp_sq);
  p.cross = moved(p.cross, move.cross_shift - r_move.cross_shift, p.exp, move.factor) + cross;
  q.cross = moved(q.cross, r_move.cross_shift - move.cross_shift, q.exp, r_move.factor) + r_cross;
  p.exp = fmaf(move.factor, p.exp, exp);
  q.exp = fmaf(r_move.factor, q.exp, r_exp);
}

// sum z kRawUnit of a vector.
template <class Tile>
QK_HOST_DEVICE float sum_of_vector(const Tile& z, int u) {
  float sum = 0;
  QK_UNROLL
  for (int j = 0; j < Tile::kVector; ++j) sum = fmaf(z[u * Tile::kVector + j], kRawUnit, sum);
  return sum;
}

// What one thread gathers of a row (or a piece) of n elements. The label's position is relative to its start and may
// lie outside. kPair: both models in step; else only `policy` is read. Rows of one call have the same type and, with
// AlignedRow, lie alike.
template <Gather kGather, bool kPair, class Row>
QK_HOST_DEVICE void walk_row(const Row& policy, const Row& reference, int n, int label, float scale, int thread,
                             LaneRow& sums) {
  using Tile = typename Row::Tile;
  constexpr int kVectors = Tile::kVectors, kVector = Tile::kVector;
  constexpr int kStep = kThreads * kVector;  // elements between two vectors of a thread
  constexpr bool kAll = kGather == Gather::kAll;
  const Cut c = cut(policy.address(), policy.size(), n, kVector, Row::kInside);
  const int at_label = c.vector_of(label);
  const int64_t first = c.head + thread * kVector;
  auto fold_tiles = [&](const Tile& z, const Tile& rz) {
    if (kPair)
      fold_pair<kGather>(z, rz, scale, sums);
    else
      fold<kGather>(z, scale, sums.policy);
  };
  for_trips(
      c.vectors / (kVectors * kThreads), trip_of(at_label, kVectors, thread, kAll),
      [&](int g) {
        Tile z, rz;
        policy.read(z, first + static_cast<int64_t>(g) * kVectors * kStep, kStep);
        if (kPair) reference.read(rz, first + static_cast<int64_t>(g) * kVectors * kStep, kStep);
        if (kAll) {
          QK_UNROLL
          for (int u = 0; u < kVectors; ++u) sums.policy.raw += sum_of_vector(z, u);
        }
        fold_tiles(z, rz);
      },
      [&](int g) {
        Tile z, rz;
        float before = sums.policy.max;
        QK_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          const int vector = (g * kVectors + u) * kThreads + thread;
          const int start = c.head + vector * kVector;
          if (vector < c.vectors) {
            policy.read_vector(z, u, start);
            if (kPair) reference.read_vector(rz, u, start);
            if (kAll) sums.policy.raw += sum_of_vector(z, u);
          } else {
            z.remove_vector(u);
            if (kPair) rz.remove_vector(u);
          }
          QK_UNROLL
          for (int j = 0; j < kVector; ++j) {
            const int i = u * kVector + j;
            if (kAll && start + j < label) before = fmaxf(before, z[i]);
            if (start + j == label) {
              z.remove(i);
              if (kPair) rz.remove(i);
            }
          }
        }
        if (kAll && at_label >= 0 && at_label / (kVectors * kThreads) == g) sums.before = before;
        fold_tiles(z, rz);
      });
  // A label in the tail: all vectors lie before it.
  if (kAll && label >= c.head + c.vectors * kVector) sums.before = sums.policy.max;
  if (thread >= c.edges) return;
  const int i = c.edge(thread);
  Widened<1, 1> z = {{policy[i]}}, rz = {{kPair ? reference[i] : 0.0f}};
  if (kAll) sums.policy.raw = fmaf(z[0], kRawUnit, sums.policy.raw);
  if (kAll && i < label) sums.before = fmaxf(sums.before, z[0]);
  if (i == label) return;
  if (kPair)
    fold_pair<kGather>(z, rz, scale, sums);
  else
    fold<kGather>(z, scale, sums.policy);
}

// --- gradients ------------------------------------------------------------------------------------------------------

// What the entries of a gradient row need.
enum class Form {
  kPlain,  // constant e
  kFull,   // five coefficients, no reference
  kPair    // and the reference
};

// Made once per row and given to all of its threads.
struct RowGrad {
  GradFactors factors;
  float row_max, reference_max, scale;
  float at_label;
  float fill;  // what all entries are where the row is not `computed`
  bool computed;
};

QK_HOST_DEVICE RowGrad row_grad_of(const GradCall& call, int64_t row) {
  RowGrad r = {};
  const int64_t label = call.labels.data[row];
  const RowCoefficients c = coefficients_of(call, row);
  if (label == call.labels.ignore_index || c.silent()) return r;
  if (label < 0 || label >= call.shape.vocab) {
    r.fill = std::numeric_limits<float>::quiet_NaN();
    return r;
  }
  const bool both = call.reference_state && call.coefficient_count == kCoefficientCount;
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

// One entry, the label's excepted. `r_floor` bounds the reference's exponent where it must not matter.
template <Form kForm>
QK_HOST_DEVICE float grad_entry(const RowGrad& r, float r_floor, float z, float rz) {
  const float t = (z - r.row_max) * r.scale;
  const float e = exp2_approx(t);
  if (kForm == Form::kPlain) return r.factors.constant * e;
  float factor = fmaf(r.factors.slope, fmaxf(t, kNothing), r.factors.constant);
  if (kForm == Form::kFull) return e * factor;
  const float rt = (rz - r.reference_max) * r.scale;
  factor = fmaf(r.factors.reference_slope, fmaxf(rt, r_floor), factor);
  const float own = e == 0 ? 0.0f : e * factor;
  return fmaf(r.factors.q_scale, exp2_approx(rt), own);
}

// Where gradients go: a row of 16-byte lines, its type known here or at run time.
template <class T>
struct AlignedOut {
  T* data;
  QK_HOST_DEVICE int size() const { return sizeof(T); }
  QK_HOST_DEVICE uintptr_t address() const { return reinterpret_cast<uintptr_t>(data); }
  QK_HOST_DEVICE void put(int i, float g) const { store_element(data + i, g); }
  // The kVector numbers g[0], g[1] ... at element `at`, which begins a line.
  QK_HOST_DEVICE void put_vector(int64_t at, const float* g) const {
    Line line;
    if constexpr (sizeof(T) == 4) {
      QK_UNROLL
      for (int w = 0; w < 4; ++w) line.word[w] = bits_of(g[w]);
    } else {
      QK_UNROLL
      for (int w = 0; w < 4; ++w) line.word[w] = packed<T>(g[2 * w], g[2 * w + 1]);
    }
    store_streaming(data + at, line);
  }
};

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

// What one thread writes of a gradient row (or piece) of n elements. Lines are those of `out`; `policy` may be the same
// memory: each thread reads what it writes, before it writes it. `reference` is read with Form::kPair only, and only if
// `with_reference`.
template <Form kForm, class Row, class Out>
QK_HOST_DEVICE void walk_grad(const Row& policy, const Row& reference, bool with_reference, const Out& out, int n,
                              int label, const RowGrad& r, int thread) {
  using Tile = typename Row::Tile;
  constexpr int kVectors = Tile::kVectors, kVector = Tile::kVector;
  constexpr int kStep = kThreads * kVector;
  const Cut c = cut(out.address(), out.size(), n, kVector, Row::kInside);
  const float r_floor = r.factors.sloped() ? -kInfinity : kNothing;
  const int64_t first = c.head + thread * kVector;
  const bool reads_reference = kForm == Form::kPair && with_reference;
  for_trips(
      c.vectors / (kVectors * kThreads), trip_of(c.vector_of(label), kVectors, thread, false),
      [&](int g) {
        const int64_t at = first + static_cast<int64_t>(g) * kVectors * kStep;
        Tile z, rz;
        policy.read(z, at, kStep);
        if (reads_reference) reference.read(rz, at, kStep);
        QK_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          float entries[kVector];
          QK_UNROLL
          for (int j = 0; j < kVector; ++j) {
            const int i = u * kVector + j;
            entries[j] = grad_entry<kForm>(r, r_floor, z[i], reads_reference ? rz[i] : 0.0f);
          }
          out.put_vector(at + static_cast<int64_t>(u) * kStep, entries);
        }
      },
      [&](int g) {
        QK_NO_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          const int vector = (g * kVectors + u) * kThreads + thread;
          if (vector >= c.vectors) return;
          const int at = c.head + vector * kVector;
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
  if (thread >= c.edges) return;
  const int i = c.edge(thread);
  const float z = policy[i], rz = reads_reference ? reference[i] : 0.0f;
  out.put(i, i == label ? r.at_label : grad_entry<kForm>(r, r_floor, z, rz));
}

// n elements, all the same.
QK_HOST_DEVICE void walk_fill(const AnyOut& out, int n, float value, int thread) {
  const Cut c = cut(out.address(), out.size(), n, 8, false);
  float entries[8];
  QK_UNROLL
  for (int j = 0; j < 8; ++j) entries[j] = value;
  for (int vector = thread; vector < c.vectors; vector += kThreads)
    out.put_vector(c.head + static_cast<int64_t>(vector) * 8, entries);
  if (thread < c.edges) out.put(c.edge(thread), value);
}

// --- which kernel ---------------------------------------------------------------------------------------------------

inline bool same_type(const Rows& a, const Rows& b) { return a.dtype == b.dtype; }

// Where a tensor begins in memory, counted in its elements.
inline int64_t first_element(const Rows& rows) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data) / (rows.dtype == DType::kFloat32 ? 4 : 2));
}

// Whether a 16-byte line begins in each row of `b` where one begins in the same row of `a`; for the same element type
// this holds in both directions. `a` is not wider than `b`.
inline bool lie_alike(const Rows& a, const Rows& b, const Shape& shape) {
  const int64_t vector = b.dtype == DType::kFloat32 ? 4 : 8;  // a line of `a` is one of `b`, or two
  const int64_t base = first_element(a) - first_element(b);
  return base % vector == 0 && (shape.outer == 1 || (a.outer_stride - b.outer_stride) % vector == 0) &&
         (shape.inner == 1 || (a.inner_stride - b.inner_stride) % vector == 0);
}

// Whether a kernel for one type of logits and one of gradients can do a call: gradients of the logits' type, or of 16
// bits for fp32 logits, and each line that is written met by whole lines that are read.
inline bool in_lines(const GradCall& call, bool pair) {
  auto reads = [&](const Rows& rows) { return same_type(rows, call.policy) && lie_alike(call.out, rows, call.shape); };
  return (same_type(call.out, call.policy) || call.policy.dtype == DType::kFloat32) && reads(call.policy) &&
         (!pair || reads(call.reference));
}

// --- pieces ---------------------------------------------------------------------------------------------------------

// A row spread over `count` blocks.
struct Split {
  int count = 1;
  int span = 0;  // elements of a piece; a multiple of 8, so that pieces lie alike in memory

  QK_HOST_DEVICE int start(int piece) const { return piece * span; }
  QK_HOST_DEVICE int length(int piece, int64_t vocab) const {
    const int left = static_cast<int>(vocab) - start(piece);
    return left < span ? left : span;
  }
};

inline Split split_of(int64_t vocab, int count) {
  const int64_t span = (vocab + count * 8 - 1) / (count * 8) * 8;
  return {static_cast<int>((vocab + span - 1) / span), static_cast<int>(span)};
}

// Sums of a thread, a warp or a block on their way to those of a row; what a split row leaves in the scratch buffer.
struct Partial {
  RowSums sums;
  float before = -kInfinity;  // the largest of the policy's logits before the label
};

QK_HOST_DEVICE Partial partial_of(const LaneRow& lane, double log2e_per_temperature) {
  Partial p;
  p.sums.policy = widened(lane.policy, log2e_per_temperature);
  p.sums.reference = widened(lane.reference, log2e_per_temperature);
  p.before = lane.before;
  return p;
}

// The columns that sums gathered in this way can give. What is not asked of a kernel need not be computed in it.
constexpr uint32_t columns_of(Gather gather, bool pair) {
  const uint32_t always = bit(kRowMax) | bit(kLogSum) | bit(kLogps) | bit(kLogsumexp);
  const uint32_t entropy = gather == Gather::kExp ? 0 : bit(kEntropy);
  const uint32_t all = gather == Gather::kAll ? bit(kLogSumSqProbs) | bit(kMeanLogits) | bit(kIsTop1) : 0;
  return always | entropy | all | (pair ? kReadsReference : 0);
}

// Where a column lies in the output: after the ones before it that were asked for.
QK_HOST_DEVICE int slot_of(uint32_t columns, int column) {
  const uint32_t before = columns & ((1u << column) - 1);
#if defined(__CUDA_ARCH__)
  return __popc(before);
#else
  return __builtin_popcount(before);
#endif
}

// The row's columns among `kColumns` from its complete sums, the label's logits still left out. `of_reference`: the
// sums are the reference's, gathered by themselves, and so are the columns.
template <uint32_t kColumns>
QK_HOST_DEVICE void finish_row(const StatsCall& call, int64_t row, Partial total, bool of_reference) {
  constexpr bool kPair = (kColumns & kDivergences) != 0;
  const int64_t label = call.labels.data[row];
  const float z = element(of_reference ? call.reference : call.policy, call.shape, row, label);
  const float rz = kPair ? element(call.reference, call.shape, row, label) : 0;
  RowSums of_label;
  of_label.policy.max = z;
  of_label.reference.max = rz;
  const bool top1 = z >= total.sums.policy.max && total.before < z;
  merge(total.sums, of_label, quotient(kLog2e, call.temperature));
  float values[kColumnCount];
  finish(total.sums, z, rz, kPair, call.shape.vocab, call.temperature, top1, values);
  const int64_t rows = call.shape.rows();
  auto put = [&](int column, float value) {
    if (call.columns >> column & 1) call.out[slot_of(call.columns, column) * rows + row] = value;
  };
  if (of_reference) {
    put(kReferenceRowMax, values[kRowMax]);
    put(kReferenceLogSum, values[kLogSum]);
    put(kReferenceLogps, values[kLogps]);
    put(kReferenceLogsumexp, values[kLogsumexp]);
    return;
  }
  QK_UNROLL
  for (int column = 0; column < kColumnCount; ++column)
    if (kColumns >> column & 1) put(column, values[column]);
}

}  // namespace cuda
}  // namespace qk
