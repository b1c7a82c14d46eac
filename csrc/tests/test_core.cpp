// The core on its own: every operation, element type and instruction set against sums in long double, on buffers that
// end where the data ends, so that the sanitizers see any step outside. Prints what it did; exits with 1 on a failure.
//
//   cmake -S csrc -B build/asan -G Ninja -DQK_TESTS=ON -DQK_SANITIZE=address,undefined && cmake --build build/asan
//   build/asan/test_core
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../core/fields.h"
#include "../core/pair_loss.h"
#include "../cpu/amx.h"
#include "../cpu/cpu.h"
#include "../cpu/fill.h"
#include "../cpu/product.h"
#include "../cpu/thread_pool.h"

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

int failures = 0, checks = 0;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

void expect_close(double got, double want, double tolerance, const std::string& what) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  expect(same || std::fabs(got - want) <= tolerance * std::fmax(1, std::fabs(want)),
         what + ": got " + std::to_string(got) + ", expected " + std::to_string(want));
}

size_t width(qk::DType dtype) { return dtype == qk::DType::kFloat32 ? 4 : 2; }

// Rows of logits that end exactly at the end of their allocation and start `offset` elements after its start.
class Logits {
 public:
  Logits(qk::DType dtype, qk::Shape shape, int64_t gap, int64_t offset) : dtype_(dtype) {
    inner_ = shape.vocab + gap;
    outer_ = shape.inner * inner_ + gap;
    const int64_t last = (shape.outer - 1) * outer_ + (shape.inner - 1) * inner_ + shape.vocab;
    // One allocation of just the bytes in use: malloc'd 16-byte lines plus an offset give any alignment.
    bytes_.resize(static_cast<size_t>(offset + last) * width(dtype));
    bytes_.shrink_to_fit();
    first_ = bytes_.data() + static_cast<size_t>(offset) * width(dtype);
  }
  qk::Rows rows() { return {first_, dtype_, outer_, inner_}; }
  int64_t index(const qk::Shape& shape, int64_t row, int64_t j) const {
    return (row / shape.inner) * outer_ + (row % shape.inner) * inner_ + j;
  }
  void set(int64_t i, float value) {
    if (dtype_ == qk::DType::kFloat32) reinterpret_cast<float*>(first_)[i] = value;
    if (dtype_ == qk::DType::kBFloat16) reinterpret_cast<qk::BFloat16*>(first_)[i] = qk::narrow<qk::BFloat16>(value);
    if (dtype_ == qk::DType::kFloat16) reinterpret_cast<qk::Float16*>(first_)[i] = qk::narrow<qk::Float16>(value);
  }
  float get(int64_t i) const {
    if (dtype_ == qk::DType::kFloat32) return reinterpret_cast<const float*>(first_)[i];
    if (dtype_ == qk::DType::kBFloat16) return qk::widen(reinterpret_cast<const qk::BFloat16*>(first_)[i]);
    return qk::widen(reinterpret_cast<const qk::Float16*>(first_)[i]);
  }

 private:
  qk::DType dtype_;
  int64_t inner_, outer_;
  std::vector<unsigned char> bytes_;
  unsigned char* first_;
};

struct Row {
  std::vector<long double> p, logp;
  long double max, log_sum;
};

Row softmax(const Logits& logits, const qk::Shape& shape, int64_t row, double temperature) {
  Row r;
  r.max = -INFINITY;
  for (int64_t j = 0; j < shape.vocab; ++j) r.max = std::fmax(r.max, logits.get(logits.index(shape, row, j)));
  long double sum = 0;
  for (int64_t j = 0; j < shape.vocab; ++j)
    sum += std::exp((logits.get(logits.index(shape, row, j)) - r.max) / temperature);
  r.log_sum = std::log(sum);
  for (int64_t j = 0; j < shape.vocab; ++j) {
    r.logp.push_back((logits.get(logits.index(shape, row, j)) - r.max) / temperature - r.log_sum);
    r.p.push_back(std::exp(r.logp.back()));
  }
  return r;
}

double ulp(qk::DType dtype, double x) {
  if (dtype == qk::DType::kFloat32) return 0;
  const int digits = dtype == qk::DType::kBFloat16 ? 7 : 10;
  const int smallest = dtype == qk::DType::kBFloat16 ? -126 : -14;
  return std::ldexp(1.0, std::max(std::ilogb(std::fabs(x) + 1e-300), smallest) - digits);
}

void check_rows(std::mt19937& random, qk::DType dtype, qk::DType reference_dtype, qk::Shape shape, int64_t gap,
                int64_t offset, double temperature, double scale, bool masked, int threads) {
  std::normal_distribution<float> normal(0, 1);
  Logits policy(dtype, shape, gap, offset), reference(reference_dtype, shape, gap + 1, offset + 1);
  for (int64_t row = 0; row < shape.rows(); ++row)
    for (int64_t j = 0; j < shape.vocab; ++j) {
      const float z = normal(random) * static_cast<float>(scale);
      const bool out = masked && j % 3 == 1;
      policy.set(policy.index(shape, row, j), out ? -INFINITY : z);
      reference.set(reference.index(shape, row, j), out ? -INFINITY : z + 0.3f * normal(random));
    }
  std::vector<int64_t> labels(static_cast<size_t>(shape.rows()));
  for (size_t i = 0; i < labels.size(); ++i) {
    labels[i] = static_cast<int64_t>(random() % static_cast<unsigned>(shape.vocab)) / 3 * 3;
    if (i % 4 == 3) labels[i] = -100;
  }
  std::string name = qk::instruction_set() + " dtypes " + std::to_string(static_cast<int>(dtype)) + "/" +
                     std::to_string(static_cast<int>(reference_dtype)) + " rows " + std::to_string(shape.rows()) +
                     " V " + std::to_string(shape.vocab) + " gap " + std::to_string(gap) + " offset " +
                     std::to_string(offset) + " threads " + std::to_string(threads);

  const uint32_t all = (1u << qk::kFieldCount) - 1;
  const size_t rows = labels.size();
  std::vector<float> stats(rows * qk::kFieldCount, 777.f);
  qk::StatsCall call{shape, policy.rows(), reference.rows(), {labels.data(), -100}, temperature, all, stats.data()};
  expect(qk::find_bad_label(call.labels, shape) == -1, name + ": labels");
  qk::row_stats(call, threads);
  // A narrower request takes another path through the kernels and must give the same numbers.
  std::vector<float> few(rows * 3, 777.f);
  qk::StatsCall small = call;
  small.fields = qk::bit(qk::kLogps) | qk::bit(qk::kLogsumexp) | qk::bit(qk::kReferenceLogps);
  small.out = few.data();
  qk::row_stats(small, threads);

  std::vector<float> coefficients(rows * qk::kCoefficientCount);
  for (float& c : coefficients) c = normal(random);
  Logits gradient(dtype, shape, gap, offset), plain(dtype, shape, gap, offset);
  // As the kernels get them: four times too large, and a factor that makes up for it.
  std::vector<float> scaled(coefficients);
  for (float& c : scaled) c *= 4;
  const float upstream = 0.25f;
  qk::GradCall grad{shape,          policy.rows(),           reference.rows(), {labels.data(), -100}, temperature,
                    stats.data(),   stats.data() + 3 * rows, scaled.data(),    qk::kCoefficientCount, &upstream,
                    gradient.rows()};
  qk::row_grad(grad, threads);
  qk::GradCall simple = grad;
  simple.reference = {};
  simple.reference_softmax = nullptr;
  simple.coefficients = coefficients.data();
  simple.upstream = nullptr;
  simple.coefficient_count = 1;
  simple.out = plain.rows();
  qk::row_grad(simple, threads);

  for (size_t i = 0; i < rows; ++i) {
    auto got = [&](qk::Field field) { return stats[static_cast<size_t>(field) * rows + i]; };
    const int64_t row = static_cast<int64_t>(i), y = labels[i];
    if (y == -100) {
      for (int c = 0; c < qk::kFieldCount; ++c)
        expect(got(static_cast<qk::Field>(c)) == 0, name + ": ignored row is 0");
      for (int64_t j = 0; j < shape.vocab; ++j)
        expect(gradient.get(gradient.index(shape, row, j)) == 0, name + ": gradient of an ignored row is 0");
      continue;
    }
    const Row p = softmax(policy, shape, row, temperature), q = softmax(reference, shape, row, temperature);
    long double entropy = 0, forward = 0, backward = 0, squares = 0, mean = 0;
    for (size_t j = 0; j < p.p.size(); ++j) {
      squares += p.p[j] * p.p[j];
      mean += policy.get(policy.index(shape, row, static_cast<int64_t>(j))) / temperature;
      if (p.p[j] > 0) entropy -= p.p[j] * p.logp[j], forward += p.p[j] * (p.logp[j] - q.logp[j]);
      if (q.p[j] > 0) backward += q.p[j] * (q.logp[j] - p.logp[j]);
    }
    const size_t label = static_cast<size_t>(y);
    expect_close(got(qk::kRowMax), p.max, 0, name + ": row_max");
    expect_close(got(qk::kLogps), p.logp[label], 2e-6, name + ": logps");
    expect_close(got(qk::kReferenceLogps), q.logp[label], 2e-6, name + ": reference_logps");
    expect_close(got(qk::kLogsumexp), p.max / temperature + p.log_sum, 2e-6, name + ": logsumexp");
    expect_close(got(qk::kEntropy), entropy, 4e-6, name + ": entropy");
    expect_close(got(qk::kKlPolicyReference), forward, 4e-6, name + ": kl_policy_reference");
    expect_close(got(qk::kKlReferencePolicy), backward, 4e-6, name + ": kl_reference_policy");
    expect_close(got(qk::kLogSumSqProbs), std::log(squares), 4e-6, name + ": log_sum_sq_probs");
    expect_close(got(qk::kMeanLogits), mean / shape.vocab, 4e-6, name + ": mean_logits");
    int64_t first = 0;
    while (policy.get(policy.index(shape, row, first)) != p.max) ++first;
    expect(got(qk::kIsTop1) == (first == y ? 1 : 0), name + ": is_top1");
    expect(few[i] == got(qk::kLogps), name + ": the same logps from a narrower request");

    long double largest = 0, plain_largest = 0;
    std::vector<long double> want(p.p.size()), plain_want(p.p.size());
    auto c = [&](qk::Coefficient k) {
      return static_cast<long double>(coefficients[static_cast<size_t>(k) * rows + i]);
    };
    for (size_t j = 0; j < want.size(); ++j) {
      plain_want[j] = c(qk::kLabel) * ((j == label) - p.p[j]) / temperature;
      long double g = c(qk::kLabel) * ((j == label) - p.p[j]) - c(qk::kQ) * q.p[j];
      if (p.p[j] > 0) g += p.p[j] * (c(qk::kP) + c(qk::kPLogP) * p.logp[j] - c(qk::kPLogQ) * q.logp[j]);
      want[j] = g / temperature;
      largest = std::fmax(largest, std::fabs(want[j]));
      plain_largest = std::fmax(plain_largest, std::fabs(plain_want[j]));
    }
    for (size_t j = 0; j < want.size(); ++j) {
      const int64_t at = gradient.index(shape, row, static_cast<int64_t>(j));
      const double slack = 1e-5 * static_cast<double>(largest) + ulp(dtype, static_cast<double>(want[j]));
      expect(std::fabs(gradient.get(at) - want[j]) <= slack, name + ": gradient");
      const double plain_slack =
          1e-5 * static_cast<double>(plain_largest) + ulp(dtype, static_cast<double>(plain_want[j]));
      expect(std::fabs(plain.get(at) - plain_want[j]) <= plain_slack, name + ": plain gradient");
    }
  }

  // Over the logits themselves: the same bits.
  qk::GradCall in_place = grad;
  in_place.out = policy.rows();
  qk::row_grad(in_place, threads);
  bool same = true;
  for (int64_t row = 0; row < shape.rows(); ++row)
    for (int64_t j = 0; j < shape.vocab; ++j)
      same = same && policy.get(policy.index(shape, row, j)) == gradient.get(gradient.index(shape, row, j));
  expect(same, name + ": in place");
}

void check_special_rows() {
  const float nan = NAN, inf = INFINITY;
  const std::vector<std::vector<float>> cases = {
      {-inf, -inf, -inf}, {1, nan, 2}, {1, inf, 2}, {-3.4e38f, -3.4e38f, -3.4e38f}, {-inf, 3.4e38f, -3.4e38f}};
  for (size_t i = 0; i < cases.size(); ++i) {
    std::vector<float> z = cases[i];
    const int64_t label = 1;
    float out[3];
    qk::StatsCall call{{1, 1, 3}, {z.data(), qk::DType::kFloat32, 3, 3},
                       {},        {&label, -100},
                       1,         qk::bit(qk::kLogps) | qk::bit(qk::kLogsumexp) | qk::bit(qk::kEntropy),
                       out};
    qk::row_stats(call, 1);
    const bool broken = i < 3;
    for (float value : out) expect(std::isnan(value) == broken, "special row " + std::to_string(i));
  }
  const int64_t labels[] = {0, -100, 7, 9};
  expect(qk::find_bad_label({labels, -100}, {1, 4, 8}) == 3, "the first label out of range is found");
}

void check_pair_loss() {
  const float logps[] = {-1, -2, -3, NAN, -INFINITY, -5}, reference[] = {-1.5f, -2, -2, NAN, -INFINITY, -7};
  const float weights[] = {1, 0.5f, 1, 0, 1, 1};
  const int64_t labels[] = {3, 1, 4, -100, 5, 9};
  const int32_t offsets[] = {0, 2, 2, 5, 6};
  float loss, rewards[4], grad[6], tokens[12];
  qk::PairCall call{4,     6,   6,   offsets, {labels, -100}, weights, logps, reference,
                    false, 0.5, 0.1, &loss,   rewards,        grad,    tokens};
  qk::pair_loss(call);
  // Ratios: 0.5, 0 | none | -1, (weight 0), both -inf -> 0 | 2
  const double r[] = {0.5, 0, -1, 2};
  double want = 0;
  for (int pair = 0; pair < 2; ++pair) {
    const double x = 0.5 * (r[pair] - r[pair + 2]);
    want += (0.9 * std::log1p(std::exp(-x)) + 0.1 * std::log1p(std::exp(x))) / 2;
    const double slope = -0.5 * (0.9 / (1 + std::exp(x)) - 0.1 / (1 + std::exp(-x))) / 2;
    if (pair == 0) expect_close(grad[0], slope, 1e-6, "pair_loss gradient, chosen");
    if (pair == 0) expect_close(grad[2], -slope, 1e-6, "pair_loss gradient, rejected");
  }
  expect_close(loss, want, 1e-6, "pair_loss");
  for (int s = 0; s < 4; ++s) expect_close(rewards[s], 0.5 * r[s], 1e-6, "pair_loss reward");
  expect(grad[3] == 0 && tokens[3] == 0 && tokens[9] == 0, "pair_loss of a zero weight");
  const float token_rewards[] = {0.25f, 0, -0.5f, 0, 0, 1};
  for (int i = 0; i < 6; ++i) {
    expect(tokens[i] == token_rewards[i], "pair_loss token rewards");
    if (i != 3) expect(tokens[6 + i] == reference[i], "pair_loss reference of tokens");
  }
  // Without weights the labels say what counts; without a reference its log-probs are 0.
  call.weights = call.reference = nullptr;
  call.logps = weights;
  qk::pair_loss(call);
  const double sums[] = {1.5, 0, 2, 1};
  for (int s = 0; s < 4; ++s) expect_close(rewards[s], 0.5 * sums[s], 1e-6, "pair_loss reward by labels");
  expect(grad[0] == grad[1] && grad[0] < 0 && grad[3] == 0, "pair_loss gradient by labels");
  for (int i = 0; i < 6; ++i) expect(tokens[i] == 0.5f * weights[i] && tokens[6 + i] == 0, "reference-free tokens");
}

// A GEMM with operands that end where their last element lies, whatever their stride, and a result that ends there,
// too.
struct GemmCase {
  int64_t rows, columns, depth;
  bool left_depth_first, right_depth_first;
  qk::DType out_type = qk::DType::kFloat32;
  bool accumulate = false, with_bias = false;
  int64_t gap = 0, offset = 0;  // elements between the rows of each matrix, and before the first
  int threads = 2;
};

template <class Element>
constexpr qk::DType kTypeOf = std::is_same_v<Element, float> ? qk::DType::kFloat32 : qk::DType::kBFloat16;

template <class Element>
void check_gemm(std::mt19937& random, const GemmCase& c) {
  constexpr qk::DType in_type = kTypeOf<Element>;
  if (qk::gemm_kernel(in_type, c.left_depth_first, c.right_depth_first, c.out_type, c.accumulate).empty()) return;
  const std::string name = qk::instruction_set() + " GEMM of type " + std::to_string(static_cast<int>(in_type)) + " " +
                           std::to_string(c.rows) + " x " + std::to_string(c.columns) + " x " +
                           std::to_string(c.depth) + " gap " + std::to_string(c.gap) + " layout " +
                           std::to_string(c.left_depth_first) + std::to_string(c.right_depth_first);
  std::normal_distribution<float> normal(0, 1);
  auto operand = [&](int64_t size, bool depth_first, std::vector<Element>& memory) {
    const int64_t outer = depth_first ? c.depth : size, inner = depth_first ? size : c.depth;
    memory.resize(static_cast<size_t>(c.offset + (outer - 1) * (inner + c.gap) + inner));
    for (Element& value : memory) value = qk::narrow<Element>(normal(random));
    memory.shrink_to_fit();
    return qk::Operand{memory.data() + c.offset, inner + c.gap, depth_first};
  };
  std::vector<Element> left_memory, right_memory;
  const qk::Operand left = operand(c.rows, c.left_depth_first, left_memory);
  const qk::Operand right = operand(c.columns, c.right_depth_first, right_memory);
  std::vector<float> bias(static_cast<size_t>(c.columns));
  for (float& value : bias) value = normal(random);
  const int64_t stride = c.columns + c.gap;
  const bool fp32 = c.out_type == qk::DType::kFloat32;
  auto run = [&](int threads) {
    const size_t count = static_cast<size_t>((c.rows - 1) * stride + c.columns);
    std::vector<float> wide(fp32 ? count : 0, 3.f);
    std::vector<qk::BFloat16> narrow(fp32 ? 0 : count, qk::narrow<qk::BFloat16>(3.f));
    void* const out = fp32 ? static_cast<void*>(wide.data()) : narrow.data();
    qk::gemm({c.rows, c.columns, c.depth, in_type, left, right, c.with_bias ? bias.data() : nullptr, out, stride,
              c.out_type, c.accumulate},
             threads);
    for (qk::BFloat16 value : narrow) wide.push_back(qk::widen(value));
    return wide;
  };
  const std::vector<float> out = run(c.threads);
  expect(out == run(1), name + ": the same bits from one thread");
  auto entry = [](const qk::Operand& from, int64_t i, int64_t k) {
    return static_cast<double>(
        qk::widen(from.as<Element>()[from.depth_first ? k * from.stride + i : i * from.stride + k]));
  };
  bool right_values = true, untouched = true;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.columns; ++j) {
      double want = c.accumulate ? 3 : c.with_bias ? bias[static_cast<size_t>(j)] : 0, size = std::fabs(want);
      for (int64_t k = 0; k < c.depth; ++k) {
        const double term = entry(left, i, k) * entry(right, j, k);
        want += term;
        size += std::fabs(term);
      }
      const float got = out[static_cast<size_t>(i * stride + j)];
      right_values = right_values && std::fabs(got - want) <= 1e-6 * size + (fp32 ? 0 : 0x1p-8 * std::fabs(want));
    }
    for (int64_t j = c.columns; i + 1 < c.rows && j < stride; ++j)
      untouched = untouched && out[static_cast<size_t>(i * stride + j)] == 3.f;
  }
  expect(right_values, name + ": values");
  expect(untouched, name + ": written between rows");
}

template <class Element>
void check_gemms(std::mt19937& random) {
  // Blocks are 12 x 32 or 32 x 32; along the depth 256, 512, or 32, 320, 640 and 1536.
  constexpr qk::DType fp32 = qk::DType::kFloat32, narrow = kTypeOf<Element>;
  const GemmCase logits{13, 33, 0, false, false}, sums{13, 33, 0, true, true, fp32, true};
  const GemmCase input{13, 33, 0, false, true, narrow}, weight{13, 33, 0, true, true, narrow};
  const GemmCase input_sums{13, 33, 0, false, true, fp32, true};
  for (GemmCase c : {logits, sums, input, input_sums, weight}) {
    for (int64_t depth : {1, 2, 7, 32, 33, 64, 255, 256, 257, 321, 511, 512, 513, 1030, 1601}) {
      c.depth = depth;
      c.with_bias = !c.accumulate;
      check_gemm<Element>(random, c);
    }
    c.gap = 3;
    c.offset = 1;
    c.threads = 3;
    c.rows = 47;  // several panels on both sides where both are packed slab by slab
    c.columns = 70;
    check_gemm<Element>(random, c);
    c.depth = 37;
    for (int64_t rows : {1, 11, 12, 25, 47})
      for (int64_t columns : {1, 15, 16, 17, 31, 32, 70}) {
        c.rows = rows;
        c.columns = columns;
        c.with_bias = !c.accumulate && rows != 11;
        check_gemm<Element>(random, c);
      }
    for (auto [rows, columns] : {std::pair<int64_t, int64_t>{3, 1500}, {1500, 3}}) {  // many panels on one side
      c.rows = rows;
      c.columns = columns;
      check_gemm<Element>(random, c);
    }
  }
  GemmCase large{33, 33000, 3, false, false};  // bypasses the caches on its way to memory, where a kernel does that
  for (int64_t gap : {0, 1}) {
    large.gap = gap;
    check_gemm<Element>(random, large);
  }
}

void check_fill() {
  for (size_t bytes : {0, 1, 63, 64, 5000, 100001})
    for (size_t offset : {0, 1, 40}) {
      std::vector<unsigned char> memory(bytes + offset, 1);
      qk::fill_zero(memory.data() + offset, bytes);
      bool good = true;
      for (size_t i = 0; i < memory.size(); ++i) good = good && memory[i] == (i < offset ? 1 : 0);
      expect(good, "fill_zero of " + std::to_string(bytes) + " bytes");
    }
}

void check_pool(bool with_fork) {
  auto sum = [](int threads) {
    std::vector<int> hits(1000, 0);
    qk::parallel_for(1000, threads, [&](int64_t i) { hits[static_cast<size_t>(i)] += 1; });
    for (int hit : hits)
      if (hit != 1) return false;
    return true;
  };
  for (int threads : {1, 2, 7}) expect(sum(threads), "each index once with " + std::to_string(threads) + " threads");
  std::vector<std::thread> callers;
  std::atomic<int> good{0};
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int n = 0; n < 20; ++n) good += sum(3);
    });
  for (std::thread& caller : callers) caller.join();
  expect(good == 80, "several callers at once");
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)
  if (!with_fork) return;
  const pid_t child = fork();
  if (child == 0) _exit(sum(4) ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child can use the pool");
#else
  (void)with_fork;
#endif
}

}  // namespace

// With "--no-fork" nothing is forked, for emulators that cannot.
int main(int count, char** arguments) {
  std::mt19937 random(1);
  const qk::DType types[] = {qk::DType::kFloat32, qk::DType::kBFloat16, qk::DType::kFloat16};
  for (const std::string& set : qk::instruction_sets()) {
    expect(qk::use_instruction_set(set), "instruction set " + set);
    if (set != "amx_bf16") {  // its row kernels are those of avx512_bf16
      for (qk::DType dtype : types) {
        for (int64_t vocab : {1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 1003, 2047, 2048, 2049, 4111})
          check_rows(random, dtype, dtype, {2, 3, vocab}, vocab % 5, vocab % 7, 1, 3, false, 1);
        for (qk::DType reference : types) check_rows(random, dtype, reference, {1, 4, 2500}, 3, 1, 0.7, 4, true, 2);
        check_rows(random, dtype, dtype, {1, 2, 33001}, 0, 3, 1.3, 10, false, 3);  // more than one segment, shared
        check_rows(random, dtype, dtype, {3, 100, 11}, 2, 0, 1, 1, false, 2);      // many short rows
        check_rows(random, dtype, dtype, {1, 2, 5000}, 0, 0, 1, 300, false, 1);    // sums rescaled again and again
      }
      check_special_rows();
    }
    check_gemms<float>(random);
    check_gemms<qk::BFloat16>(random);
    std::printf("%s: ok so far, %d checks\n", set.c_str(), checks);
  }
  if (!qk::amx_unavailable().empty()) std::printf("no AMX: %s\n", qk::amx_unavailable().c_str());
  expect(qk::use_instruction_set("amx_emulated"), "emulated tiles");
  check_gemms<qk::BFloat16>(random);
  expect(qk::use_instruction_set(qk::instruction_sets().back()), "back to the best");
  check_pair_loss();
  check_fill();
  check_pool(count < 2 || std::string(arguments[1]) != "--no-fork");
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
