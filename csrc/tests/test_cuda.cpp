// The CUDA kernels without a GPU: compiled for the host and run by the emulation in cuda_emulation/, with their own
// launches, shuffles and shared memory, and held against long double. Rows and scratch memory begin and end where their
// memory does, so that the address sanitizer sees an access beyond it; with the thread sanitizer the threads of a block
// are threads of the operating system, so that it sees what no barrier orders.
//
// What is not seen here: what the device's compiler makes of the kernels, and its own exp2.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../core/fields.h"
#include "../cuda/cuda.h"
#include "../cuda/dispatch.h"
#include "../cuda/row_tiling.h"
#include "cuda_emulation/emulation.h"

using namespace qk;
using namespace qk::cuda;

namespace {

int failures = 0;
long checks = 0;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok || ++failures > 40) return;
  std::printf("FAILED: %s\n", what.c_str());
}

void expect_close(long double got, long double want, double tolerance, double size, const std::string& what) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  expect(same || std::fabs(got - want) <= tolerance * std::fmax(1, std::fmax(std::fabs(want), size)),
         what + ": got " + std::to_string(got) + ", expected " + std::to_string(want));
}

int width(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// One row of n elements that begins `offset` bytes past a multiple of 16 and ends where its memory ends.
class Row {
 public:
  Row(DType dtype, int n, int offset) : dtype_(dtype), n_(n) {
    const size_t bytes = static_cast<size_t>(n * width(dtype));
    // malloc aligns to 16 bytes; a size of offset + bytes ends with the row.
    memory_ = static_cast<char*>(std::malloc(static_cast<size_t>(offset) + bytes));
    data_ = memory_ + offset;
  }
  ~Row() { std::free(memory_); }
  Row(const Row& other) : Row(other.dtype_, other.n_, static_cast<int>(other.data_ - other.memory_)) {
    memcpy(data_, other.data_, static_cast<size_t>(n_ * width(dtype_)));
  }
  Row& operator=(const Row&) = delete;

  void set(int i, float x) {
    switch (dtype_) {
      case DType::kFloat32: memcpy(data_ + 4 * i, &x, 4); break;
      case DType::kBFloat16: put(i, narrow<BFloat16>(x).bits); break;
      case DType::kFloat16: put(i, narrow<Float16>(x).bits); break;
    }
  }
  float get(int i) const {
    if (dtype_ == DType::kFloat32) {
      float x;
      memcpy(&x, data_ + 4 * i, 4);
      return x;
    }
    uint16_t bits;
    memcpy(&bits, data_ + 2 * i, 2);
    return dtype_ == DType::kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
  }
  Rows rows() const { return {data_, dtype_, n_, n_}; }
  DType dtype() const { return dtype_; }
  int size() const { return n_; }
  int past_16() const { return static_cast<int>(reinterpret_cast<uintptr_t>(data_) & 15); }
  bool operator==(const Row& other) const {
    for (int i = 0; i < n_; ++i)
      if (get(i) != other.get(i)) return false;
    return true;
  }

 private:
  void put(int i, uint16_t bits) { memcpy(data_ + 2 * i, &bits, 2); }
  DType dtype_;
  int n_;
  char* memory_;
  char* data_;
};

// --- calls ----------------------------------------------------------------------------------------------------------

void row_stats(const StatsCall& call, int splits) {
  // Of two models at most. Allocated by itself, so that it ends where its memory ends; aligned as malloc aligns.
  const size_t bytes = static_cast<size_t>(2 * call.shape.rows() * splits * partial_bytes());
  void* scratch = splits > 1 ? std::malloc(bytes) : nullptr;
  qk::cuda::row_stats(call, {0, nullptr, splits, scratch});
  std::free(scratch);
}

void row_grad(const GradCall& call, int splits) { qk::cuda::row_grad(call, {0, nullptr, splits, nullptr}); }

// --- reference values ------------------------------------------------------------------------------------------------

struct Softmax {
  std::vector<long double> p, logp;
  long double max = -INFINITY, log_sum = 0;
  Softmax(const Row& row, double temperature) {
    for (int j = 0; j < row.size(); ++j) max = std::fmax(max, static_cast<long double>(row.get(j)));
    long double sum = 0;
    for (int j = 0; j < row.size(); ++j) sum += std::exp((row.get(j) - max) / temperature);
    log_sum = std::log(sum);
    for (int j = 0; j < row.size(); ++j) {
      logp.push_back((row.get(j) - max) / temperature - log_sum);
      p.push_back(std::exp(logp.back()));
    }
  }
};

constexpr uint32_t kEverything = (1u << kFieldCount) - 1;

struct Case {
  int vocab;
  DType dtype, reference_dtype;
  int offset, reference_offset;  // bytes past a multiple of 16
  int label;
  double temperature = 1, scale = 3, common = 0;
  int masked = 0;  // so many first entries are -inf, in both models; the label is not
  int splits = 1;

  std::string name() const {
    std::string text = "V " + std::to_string(vocab) + " dtypes " + std::to_string(static_cast<int>(dtype)) + "/" +
                       std::to_string(static_cast<int>(reference_dtype)) + " offsets " + std::to_string(offset) + "/" +
                       std::to_string(reference_offset) + " label " + std::to_string(label);
    return text + " masked " + std::to_string(masked) + " splits " + std::to_string(splits);
  }
};

double ulp(DType dtype, double x) {
  if (dtype == DType::kFloat32) return 0;
  const int digits = dtype == DType::kBFloat16 ? 7 : 10, smallest = dtype == DType::kBFloat16 ? -126 : -14;
  return std::ldexp(1.0, std::max(std::ilogb(std::fabs(x) + 1e-300), smallest) - digits);
}

// As in tests/backends/test_cuda.py, whose formula the Triton kernels take.
void check_pieces() {
  const int cases[][3] = {{128256, 32, 4096}, {128256, 17, 8192}, {128256, 2, 65536}, {33003, 64, 520},
                          {7, 64, 8},         {16384, 8, 2048},   {16385, 8, 4096},   {128256, 1, 131072}};
  for (const auto& c : cases) {
    const qk::cuda::Split split = qk::cuda::split_row(c[0], c[1]);
    const std::string name = std::to_string(c[0]) + " over " + std::to_string(c[1]);
    expect(split.span == c[2], name + ": span");
    expect(split.count <= c[1] && split.length(split.count - 1, c[0]) > 0, name + ": no piece is empty");
    expect(split.start(split.count - 1) + split.length(split.count - 1, c[0]) == c[0], name + ": all of the row");
  }
}

void check_case(std::mt19937& random, const Case& c) {
  std::normal_distribution<float> normal(0, 1);
  Row policy(c.dtype, c.vocab, c.offset), reference(c.reference_dtype, c.vocab, c.reference_offset);
  for (int j = 0; j < c.vocab; ++j) {
    const float z = normal(random) * static_cast<float>(c.scale) + static_cast<float>(c.common);
    const bool out = j < c.masked && j != c.label;
    policy.set(j, out ? -INFINITY : z);
    reference.set(j, out ? -INFINITY : z + 0.3f * normal(random));
  }
  const int64_t label = c.label;
  float stats[kFieldCount], few[kFieldCount];
  for (float& x : stats) x = 777;
  StatsCall call{{1, 1, c.vocab}, policy.rows(), reference.rows(), {&label, -100}, c.temperature, kEverything, stats};
  const bool alike = c.dtype == c.reference_dtype && policy.past_16() == reference.past_16();
  const std::string name = c.name();
  row_stats(call, c.splits);

  const Softmax p(policy, c.temperature), q(reference, c.temperature);
  long double entropy = 0, forward = 0, backward = 0, squares = 0, mean = 0, size = 0, kl_size = 0;
  for (size_t j = 0; j < p.p.size(); ++j) {
    squares += p.p[j] * p.p[j];
    mean += policy.get(static_cast<int>(j)) / c.temperature;
    if (std::isfinite(policy.get(static_cast<int>(j))))
      size += std::fabs(policy.get(static_cast<int>(j)) / c.temperature);
    if (p.p[j] > 0) entropy -= p.p[j] * p.logp[j], forward += p.p[j] * (p.logp[j] - q.logp[j]);
    if (q.p[j] > 0) backward += q.p[j] * (q.logp[j] - p.logp[j]);
    if (p.p[j] > 0) kl_size += std::fmax(p.p[j], q.p[j]) * (std::fabs(p.logp[j]) + std::fabs(q.logp[j]));
  }
  const size_t y = static_cast<size_t>(c.label);
  int first = 0;
  while (policy.get(first) != p.max) ++first;
  const double klsize = static_cast<double>(kl_size);
  expect_close(stats[kRowMax], p.max, 0, 0, name + ": row_max");
  expect_close(stats[kLogSum], p.log_sum, 2e-6, 0, name + ": log_sum");
  expect_close(stats[kLogps], p.logp[y], 2e-6, 0, name + ": logps");
  expect_close(stats[kReferenceLogps], q.logp[y], 2e-6, 0, name + ": reference_logps");
  expect_close(stats[kReferenceRowMax], q.max, 0, 0, name + ": reference_row_max");
  expect_close(stats[kLogsumexp], p.max / c.temperature + p.log_sum, 5e-7, 0, name + ": logsumexp");
  expect_close(stats[kReferenceLogsumexp], q.max / c.temperature + q.log_sum, 5e-7, 0, name + ": reference_logsumexp");
  expect_close(stats[kEntropy], entropy, 1e-6, 0, name + ": entropy");
  expect_close(stats[kKlPolicyReference], forward, 1e-6, klsize, name + ": kl_policy_reference");
  expect_close(stats[kKlReferencePolicy], backward, 1e-6, klsize, name + ": kl_reference_policy");
  expect_close(stats[kLogSumSqProbs], std::log(squares), 2e-6, 0, name + ": log_sum_sq_probs");
  expect_close(stats[kMeanLogits], mean / c.vocab, 3e-7, static_cast<double>(size / c.vocab), name + ": mean_logits");
  expect(stats[kIsTop1] == (first == c.label ? 1 : 0), name + ": is_top1");

  // Whatever else is accumulated, and for either model: the same bits where rows have the same alignment.
  auto single = [&](uint32_t fields) {
    call.fields = fields;
    call.out = few;
    row_stats(call, c.splits);
  };
  single(bit(kLogps) | bit(kEntropy));
  const float with_entropy = few[0];
  expect_close(few[1], entropy, 1e-6, 0, name + ": entropy alone");
  single(bit(kLogps) | bit(kMeanLogits) | bit(kIsTop1));
  const float with_all = few[0];
  expect(few[2] == stats[kIsTop1], name + ": is_top1 of one model");
  single(bit(kRowMax) | bit(kLogSum) | bit(kLogps));
  expect(few[2] == with_entropy && few[2] == with_all, name + ": the same bits whatever is accumulated");
  expect_close(few[2], p.logp[y], 2e-6, 0, name + ": logps alone");
  if (alike) expect(few[2] == stats[kLogps], name + ": the same bits beside the reference");
  single(bit(kReferenceLogps));
  expect_close(few[0], q.logp[y], 2e-6, 0, name + ": reference_logps alone");
  if (alike) expect(few[0] == stats[kReferenceLogps], name + ": reference cached and computed in the same call");

  // Gradients: of the label alone and full, new and in place, from logits of another alignment.
  float coefficients[kCoefficientCount];
  for (float& x : coefficients) x = normal(random);
  float scaled[kCoefficientCount];  // as the kernel gets them, with a factor that undoes it
  for (int k = 0; k < kCoefficientCount; ++k) scaled[k] = 4 * coefficients[k];
  const float upstream = 0.25f;
  GradCall grad{{1, 1, c.vocab},
                policy.rows(),
                reference.rows(),
                {&label, -100},
                c.temperature,
                stats,
                stats + 3,
                scaled,
                kCoefficientCount,
                &upstream,
                {},
                false};
  std::vector<long double> wanted[3];
  long double largest[3] = {0, 0, 0};
  for (size_t j = 0; j < p.p.size(); ++j) {
    const long double hit = j == y ? 1 : 0, plain = coefficients[kLabel] * (hit - p.p[j]);
    const long double own = p.p[j] > 0 ? p.p[j] * (coefficients[kP] + coefficients[kPLogP] * p.logp[j]) : 0;
    long double both = plain + own - coefficients[kQ] * q.p[j];
    if (p.p[j] > 0) both -= p.p[j] * coefficients[kPLogQ] * q.logp[j];
    const long double g[3] = {plain / c.temperature, (plain + own) / c.temperature, both / c.temperature};
    for (int k = 0; k < 3; ++k) {
      wanted[k].push_back(g[k]);
      largest[k] = std::fmax(largest[k], std::fabs(g[k]));
    }
  }
  auto check_grad = [&](const Row& out, int form, const char* what) {
    for (int j = 0; j < c.vocab; ++j) {
      const double want = static_cast<double>(wanted[form][static_cast<size_t>(j)]);
      const double slack = 1e-5 * static_cast<double>(largest[form]) + ulp(out.dtype(), want) + 1e-40;
      ++checks;
      if (std::fabs(out.get(j) - want) <= slack) continue;
      expect(false, name + ": " + what + " at " + std::to_string(j) + " got " + std::to_string(out.get(j)) +
                        " expected " + std::to_string(want));
    }
  };
  for (int form = 0; form < 3; ++form) {
    GradCall g = grad;
    if (form == 0) g.coefficient_count = 1;
    if (form < 2) g.reference_softmax = nullptr;
    Row fast(policy), any(c.dtype, c.vocab, (c.offset + 2 * width(c.dtype)) % 16);
    g.out = g.policy = fast.rows();
    expect(is_vectorizable(g, form == 2) == (form < 2 || alike), name + ": which kernel");
    row_grad(g, c.splits);
    check_grad(fast, form, "gradient in place");
    g.policy = policy.rows();
    g.out = any.rows();
    row_grad(g, c.splits);
    check_grad(any, form, "gradient of another alignment");
    expect(any == fast, name + ": a new gradient equals the one in place");
    if (c.dtype != DType::kFloat32) continue;
    // From fp32 logits to 16 bits: the fp32 gradient rounded once, whatever it is made with.
    for (const DType narrow : {DType::kBFloat16, DType::kFloat16})
      for (const int elements : {0, 1, 4}) {  // difference in alignment; half a vector is none
        const int offset = (c.offset / 2 + 2 * elements) % 16;
        Row rounded(narrow, c.vocab, offset), expected(narrow, c.vocab, 0);
        for (int j = 0; j < c.vocab; ++j) expected.set(j, fast.get(j));
        g.out = rounded.rows();
        expect(is_vectorizable(g, form == 2) == (elements != 1 && (form < 2 || alike)),
               name + ": which kernel narrows");
        row_grad(g, c.splits);
        check_grad(rounded, form, "gradient rounded to 16 bits");
        expect(rounded == expected, name + ": rounded once");
      }
  }
  // Rows whose label is ignored or outside of the vocabulary.
  Row out(c.dtype, c.vocab, c.offset);
  for (const int64_t bad : {int64_t{-100}, int64_t{c.vocab}, int64_t{-1}}) {
    GradCall g = grad;
    g.labels.data = &bad;
    g.out = out.rows();
    row_grad(g, c.splits);
    bool good = true;
    for (int j = 0; j < c.vocab; ++j) good = good && (bad == -100 ? out.get(j) == 0 : std::isnan(out.get(j)));
    expect(good, name + ": a row that is filled");
  }
}

void check_special_rows() {
  const float inf = INFINITY, nan = NAN;
  for (int where = 0; where < 3; ++where)       // head or body, body, label
    for (const float bad : {nan, inf, -inf}) {  // -inf: all of the row
      const int n = 5000;
      Row row(DType::kBFloat16, n, 6), reference(DType::kBFloat16, n, 6);
      for (int j = 0; j < n; ++j)
        row.set(j, bad == -inf ? bad : 0.01f * static_cast<float>(j % 77)), reference.set(j, 1);
      const int64_t label = 4000;
      if (bad != -inf) row.set(where == 0 ? 1 : where == 1 ? 2600 : 4000, bad);
      float out[kFieldCount];
      StatsCall call{{1, 1, n}, row.rows(), reference.rows(), {&label, -100}, 1, kEverything, out};
      row_stats(call, 1);
      for (int field = 0; field < kFieldCount; ++field) {
        const bool of_reference = field == kReferenceRowMax || field == kReferenceLogSum || field == kReferenceLogps ||
                                  field == kReferenceLogsumexp;
        expect(std::isnan(out[field]) != of_reference, std::string("invalid row: ") + kFieldNames[field]);
      }
    }
  // A token that the reference alone masks: infinite; one that both mask: nothing.
  for (const bool both : {false, true}) {
    const int n = 3000;
    Row row(DType::kFloat32, n, 4), reference(DType::kFloat32, n, 4);
    for (int j = 0; j < n; ++j) row.set(j, 0.5f), reference.set(j, 0.5f);
    reference.set(1200, -inf);
    if (both) row.set(1200, -inf);
    const int64_t label = 7;
    float out[kFieldCount];
    StatsCall call{{1, 1, n}, row.rows(), reference.rows(), {&label, -100}, 1, kEverything, out};
    row_stats(call, 3);
    expect(both ? out[kKlPolicyReference] == 0 : out[kKlPolicyReference] == inf, "a token that the reference masks");
    expect(std::fabs(out[kKlReferencePolicy]) < 1e-3, "the other divergence stays finite");
  }
  // Masked by a finite number in one model alone, in any iteration: a divergence of that size, not infinite.
  for (const int first : {0, 9000, 30000})
    for (const bool of_policy : {false, true})
      for (const double temperature : {0.9, 1.3}) {
        const int n = 40000, masked = 8000;
        Row row(DType::kFloat32, n, 4), reference(DType::kFloat32, n, 4);
        for (int j = 0; j < n; ++j) row.set(j, 0.01f * static_cast<float>(j % 77)), reference.set(j, 0.5f);
        for (int j = first; j < first + masked; ++j) (of_policy ? row : reference).set(j, -3e38f);
        const int64_t label = 20000;
        float out[kFieldCount];
        StatsCall call{{1, 1, n}, row.rows(), reference.rows(), {&label, -100}, temperature, kEverything, out};
        row_stats(call, 1);
        const Softmax p(row, temperature), q(reference, temperature);
        const Softmax &free = of_policy ? q : p, &other = of_policy ? p : q;
        long double want = 0;
        for (size_t j = 0; j < n; ++j)
          if (free.p[j] > 0) want += free.p[j] * (free.logp[j] - other.logp[j]);
        expect_close(out[of_policy ? kKlReferencePolicy : kKlPolicyReference], want, 2e-6, 0, "a finite mask");
        const float small = out[of_policy ? kKlPolicyReference : kKlReferencePolicy];
        expect(small > 0 && small < 1, "the divergence of the masked model");
      }
}

// --- who writes what ------------------------------------------------------------------------------------------------

// Runs each block of a call by itself: `touched()` says which outputs differ from before, and each must be written by
// one block. Blocks run at the same time on a device: the same value twice is a race all the same.
template <class Run, class Touched>
void check_writers(int blocks, const Run& run, const Touched& touched, const std::string& name) {
  std::vector<int> writers;
  for (int block = 0; block < blocks; ++block) {
    emulation::run_only(block);
    run();
    const std::vector<bool> now = touched();
    writers.resize(now.size());
    for (size_t i = 0; i < now.size(); ++i) writers[i] += now[i];
  }
  emulation::run_only(-1);
  for (size_t i = 0; i < writers.size(); ++i)
    expect(writers[i] == 1, name + ": output " + std::to_string(i) + " has " + std::to_string(writers[i]) + " writers");
}

void check_one_writer() {
  constexpr int kRows = 4, kVocab = 70;
  constexpr float kUntouched = 776;  // a number of all types
  const int64_t labels[kRows] = {3, -100, kVocab, -1};
  for (const DType other : {DType::kBFloat16, DType::kFloat32})
    for (const int splits : {1, 3}) {
      Row policy(DType::kBFloat16, kRows * kVocab, 0), reference(other, kRows * kVocab, 0);
      for (int i = 0; i < kRows * kVocab; ++i) policy.set(i, 0.1f * static_cast<float>(i % 7)), reference.set(i, 1);
      const auto rows = [&](const Row& row) { return Rows{row.rows().data, row.dtype(), 0, kVocab}; };
      const uint32_t softmax = bit(kRowMax) | bit(kLogSum) | bit(kLogps), both = softmax | softmax << 3;
      const std::string name =
          "splits " + std::to_string(splits) + " types 1/" + std::to_string(static_cast<int>(other));
      for (const uint32_t fields : {softmax, both, bit(kReferenceLogps), kEverything}) {
        std::vector<float> out(static_cast<size_t>(kRows * __builtin_popcount(fields)));
        const StatsCall call{{1, kRows, kVocab}, rows(policy), rows(reference), {labels, -100}, 1, fields, out.data()};
        check_writers(
            2 * kRows * splits,
            [&] {
              out.assign(out.size(), kUntouched);
              row_stats(call, splits);
            },
            [&] {
              std::vector<bool> touched;
              for (const float x : out) touched.push_back(x != kUntouched);
              return touched;
            },
            "row_stats, fields " + std::to_string(fields) + ", " + name);
      }
      std::vector<float> saved(3 * kRows, 0.5f), coefficients(kCoefficientCount * kRows, 1);
      Row out(DType::kBFloat16, kRows * kVocab, 0);
      const GradCall call{{1, kRows, kVocab}, rows(policy), rows(reference),     {labels, -100},    1,
                          saved.data(),       saved.data(), coefficients.data(), kCoefficientCount, nullptr,
                          rows(out),          false};
      check_writers(
          kRows * splits,
          [&] {
            for (int i = 0; i < out.size(); ++i) out.set(i, kUntouched);
            row_grad(call, splits);
          },
          [&] {
            std::vector<bool> touched;
            for (int i = 0; i < out.size(); ++i) touched.push_back(out.get(i) != kUntouched);
            return touched;
          },
          "row_grad, " + name);
    }
}

// --- pair loss ------------------------------------------------------------------------------------------------------

void check_pair_loss(std::mt19937& random, int pairs, int length, bool packed, bool per_sequence, double smoothing) {
  std::normal_distribution<float> normal(-3, 1);
  const int sequences = 2 * pairs, rows = sequences * length;
  std::vector<float> logps, reference, weights, rewards(static_cast<size_t>(sequences)),
      grad(static_cast<size_t>(rows));
  for (int i = 0; i < rows; ++i) {
    logps.push_back(normal(random));
    weights.push_back(i % 5 == 2 ? 0 : 0.25f * static_cast<float>(1 + i % 4));
    if (weights.back() == 0) logps.back() = NAN;
  }
  for (int i = 0; i < (per_sequence ? sequences : rows); ++i) reference.push_back(normal(random));
  std::vector<int32_t> offsets;
  for (int s = 0; s <= sequences; ++s) offsets.push_back(s * length);
  if (packed && sequences > 2) offsets[1] = offsets[2];  // an empty sequence, and one of twice the length
  float loss = 0;
  std::vector<float> tokens(static_cast<size_t>(2 * rows));
  const PairCall call{sequences,
                      length,
                      rows,
                      packed ? offsets.data() : nullptr,
                      {},
                      weights.data(),
                      logps.data(),
                      reference.data(),
                      per_sequence,
                      0.1,
                      smoothing,
                      &loss,
                      rewards.data(),
                      grad.data(),
                      per_sequence ? nullptr : tokens.data()};
  qk::cuda::pair_loss(call, {});
  const std::string name = "pair loss of " + std::to_string(pairs) + " pairs of " + std::to_string(length);
  std::vector<double> sums;
  for (int s = 0; s < sequences; ++s) {
    double total = 0;
    for (int64_t i = call.begin(s); i < call.begin(s + 1); ++i) {
      const size_t at = static_cast<size_t>(i);
      if (weights[at] == 0) continue;
      total += static_cast<double>(weights[at]) * (per_sequence ? logps[at] : double{logps[at]} - reference[at]);
    }
    sums.push_back(per_sequence ? total - reference[static_cast<size_t>(s)] : total);
    expect_close(rewards[static_cast<size_t>(s)], 0.1 * sums.back(), 1e-6, 0, name + ": rewards");
  }
  double want = 0;
  for (int pair = 0; pair < pairs; ++pair) {
    const double x = 0.1 * (sums[static_cast<size_t>(pair)] - sums[static_cast<size_t>(pair + pairs)]);
    want += ((1 - smoothing) * std::log1p(std::exp(-x)) + smoothing * std::log1p(std::exp(x))) / pairs;
    const double slope = -0.1 * ((1 - smoothing) / (1 + std::exp(x)) - smoothing / (1 + std::exp(-x))) / pairs;
    for (const int s : {pair, pair + pairs})
      for (int64_t i = call.begin(s); i < call.begin(s + 1); ++i) {
        const size_t at = static_cast<size_t>(i);
        expect_close(grad[at], weights[at] == 0 ? 0 : (s == pair ? slope : -slope) * weights[at], 1e-7, 0,
                     name + ": slopes");
        if (per_sequence) continue;
        const double reward = weights[at] == 0 ? 0 : 0.1 * (double{logps[at]} - reference[at]);
        expect_close(tokens[at], reward, 1e-7, 0, name + ": token rewards");
        expect(tokens[at + static_cast<size_t>(rows)] == (weights[at] == 0 ? 0 : reference[at]), name + ": reference");
      }
  }
  expect_close(loss, want, 1e-6, 0, name + ": loss");
}

// One of each kind: threads of the operating system under a sanitizer are slow.
void check_a_few(std::mt19937& random) {
  check_case(random, {1003, DType::kBFloat16, DType::kBFloat16, 6, 6, 500});
  check_case(random, {9001, DType::kFloat32, DType::kFloat16, 4, 4, 8192, 0.7, 3, 0, 900, 3});
  check_case(random, {4100, DType::kFloat32, DType::kFloat32, 8, 8, 4, 1, 3, 0, 0, 2});
  check_pair_loss(random, 5, 33, true, false, 0.1);
  check_pair_loss(random, 300, 3, false, true, 0);
}

void check_everything(std::mt19937& random) {
  const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  auto label_of = [&](int vocab) { return static_cast<int>(random() % static_cast<unsigned>(vocab)); };
  for (const DType dtype : types) {
    const int step = width(dtype);
    // Each alignment with short rows, of both models the same and another.
    for (int offset = 0; offset < 16; offset += step)
      for (const int vocab : {1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 31, 33, 40, 47, 48, 64, 65, 1003}) {
        check_case(random, {vocab, dtype, dtype, offset, offset, label_of(vocab)});
        check_case(random, {vocab, dtype, dtype, offset, (offset + 3 * step) % 16, label_of(vocab), 0.7});
      }
    // The label in every part of a row: head, complete iterations, the incomplete one, tail.
    for (const int label : {0, 1, 5, 6, 7, 8, 1021, 2047, 4095, 8189, 8192, 8195, 16384, 16390, 20001, 20008, 20010})
      check_case(random, {20011, dtype, dtype, 4, 4, label});
    for (const int vocab : {2048, 4096, 4097, 8192, 8200, 5000, 33001})
      check_case(random, {vocab, dtype, dtype, 12, 12, label_of(vocab), 1.3, 10});
    for (const DType other : types) {
      check_case(random, {9001, dtype, other, 4, 8, label_of(9001), 0.7, 4});
      check_case(random, {2051, dtype, other, 0, 0, label_of(2051), 1, 4, 0, 900, 3});
    }
    for (const int splits : {2, 3, 7, 64})
      check_case(random, {33003, dtype, dtype, 4, 4, label_of(33003), 1, 3, 0, 9000, splits});
    check_case(random, {70, dtype, dtype, 4, 12, 69, 1, 3, 0, 0, 64});
    check_case(random, {20000, dtype, dtype, 0, 0, 17, 1, 200});          // rescaled again and again
    check_case(random, {9000, dtype, dtype, 0, 0, 8999, 1, 3, 0, 8999});  // a single token is left
  }
  check_case(random, {5003, DType::kFloat32, DType::kFloat32, 4, 4, 99, 0.7, 3, 1048576});
  check_case(random, {5003, DType::kFloat32, DType::kFloat32, 4, 8, 99, 0.7, 3, -1024});
  check_special_rows();
  check_pieces();
  for (const int pairs : {1, 2, 5, 16, 70})
    for (const int length : {1, 33, 200})
      for (const bool packed : {false, true})
        check_pair_loss(random, pairs, length, packed, pairs % 2 == 0, packed ? 0.1 : 0);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  if (QK_EMULATION_THREADS) {
    check_a_few(random);
  } else {
    check_one_writer();
    check_everything(random);
  }
  std::printf("%ld checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
