// The Python module `qkernels._C`: the operations on raw addresses. Its callers are qkernels/backends.
#include "bindings.h"

#include <string>
#include <vector>

#include "core/fields.h"
#include "cpu/amx.h"
#include "cpu/cpu.h"
#include "cpu/product.h"
#include "cpu/thread_pool.h"
#if defined(QK_CUDA)
#include "bindings_cuda.h"
#endif

namespace {

using namespace qk::bindings;

// Returns the flat index of the first invalid label, or -1 when the rows were computed.
int64_t row_stats(const Sizes& shape, const View& policy, const View& reference, Address labels, int64_t ignore_index,
                  double temperature, uint32_t fields, Address out, int threads) {
  const qk::StatsCall call = stats_call(shape, policy, reference, labels, ignore_index, temperature, fields, out);
  py::gil_scoped_release release;
  const int64_t bad = qk::find_bad_label(call.labels, call.shape);
  if (bad < 0) qk::row_stats(call, threads);
  return bad;
}

void row_grad(const Sizes& shape, const View& policy, const View& reference, Address labels, int64_t ignore_index,
              double temperature, Address softmax, Address reference_softmax, Address coefficients,
              int coefficient_count, Address upstream, const View& out, bool out_is_zero, int threads) {
  const qk::GradCall call = grad_call(shape, policy, reference, labels, ignore_index, temperature, softmax,
                                      reference_softmax, coefficients, coefficient_count, upstream, out, out_is_zero);
  py::gil_scoped_release release;
  qk::row_grad(call, threads);
}

void pair_loss(int64_t sequences, int64_t length, int64_t rows, Address offsets, Address labels, int64_t ignore_index,
               Address weights, Address logps, Address reference, bool per_sequence, double beta,
               double label_smoothing, Address loss, Address rewards, Address grad, Address tokens) {
  const qk::PairCall call = pair_call(sequences, length, rows, offsets, labels, ignore_index, weights, logps, reference,
                                      per_sequence, beta, label_smoothing, loss, rewards, grad, tokens);
  py::gil_scoped_release release;
  qk::pair_loss(call);
}

using Operand = std::tuple<Address, int64_t, bool>;  // data, stride, whether the depth comes first

qk::Operand operand_of(const Operand& operand) {
  return {at<void>(std::get<0>(operand)), std::get<1>(operand), std::get<2>(operand)};
}

void gemm(int64_t rows, int64_t columns, int64_t depth, int in_type, Operand left, Operand right, Address bias,
          Address out, int out_type, int64_t out_stride, bool accumulate, int threads) {
  const qk::GemmCall call{rows,
                          columns,
                          depth,
                          static_cast<qk::DType>(in_type),
                          operand_of(left),
                          operand_of(right),
                          at<float>(bias),
                          at<void>(out),
                          out_stride,
                          static_cast<qk::DType>(out_type),
                          accumulate};
  py::gil_scoped_release release;
  qk::gemm(call, threads);
}

std::string gemm_kernel(int in_type, bool left_depth_first, bool right_depth_first, int out_type, bool accumulate) {
  return qk::gemm_kernel(static_cast<qk::DType>(in_type), left_depth_first, right_depth_first,
                         static_cast<qk::DType>(out_type), accumulate);
}

int64_t gemm_depth_group(int in_type) { return qk::gemm_depth_group(static_cast<qk::DType>(in_type)); }

template <size_t n>
std::vector<std::string> names(const char* const (&list)[n]) {
  return {list, list + n};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled row operations. Knows nothing of torch; its callers are in qkernels/backends.";
  def_by_keyword(m, "row_stats", &row_stats, "shape", "policy", "reference", "labels", "ignore_index", "temperature",
                 "fields", "out", "threads");
  def_by_keyword(m, "row_grad", &row_grad, "shape", "policy", "reference", "labels", "ignore_index", "temperature",
                 "softmax", "reference_softmax", "coefficients", "coefficient_count", "upstream", "out", "out_is_zero",
                 "threads");
  def_by_keyword(m, "pair_loss", &pair_loss, "sequences", "length", "rows", "offsets", "labels", "ignore_index",
                 "weights", "logps", "reference", "per_sequence", "beta", "label_smoothing", "loss", "rewards", "grad",
                 "tokens");
  def_by_keyword(m, "gemm", &gemm, "rows", "columns", "depth", "in_type", "left", "right", "bias", "out", "out_type",
                 "out_stride", "accumulate", "threads");
  m.def("gemm_kernel", &gemm_kernel, py::arg("in_type"), py::arg("left_depth_first"), py::arg("right_depth_first"),
        py::arg("out_type"), py::arg("accumulate"),
        "The kernel of the instruction set in use for such a GEMM; empty if none.");
  m.def("gemm_depth_group", &gemm_depth_group, py::arg("in_type"),
        "Terms that are added to one another before they meet the sum.");
  m.def("amx_unavailable", &qk::amx_unavailable, "Why AMX cannot be used; empty if it can.");
  m.def("cpu_vendor", &qk::cpu_vendor, "As the processor names its maker; empty where that is not known.");
  m.def("instruction_set", &qk::instruction_set, "The instruction set in use.");
  m.def("instruction_sets", &qk::instruction_sets, "Those compiled in that this machine supports, best last.");
  m.def("use_instruction_set", &qk::use_instruction_set, py::arg("name"),
        "Use another one; False if it is not available.");
  m.def("use_own_threads", &qk::use_own_threads, "Never borrow an OpenMP team in this process.");
  m.def("thread_source", [] { return std::string(qk::thread_source()); });
  m.def("field_names", [] { return names(qk::kFieldNames); });
  m.def("coefficient_names", [] { return names(qk::kCoefficientNames); });
  m.def("compiler", [] { return std::string(QK_COMPILER); });
#if defined(QK_CUDA)
  m.attr("HAS_CUDA") = true;
  m.attr("CUDA_VERSION") = QK_CUDA_VERSION;
  m.attr("CUDA_ARCHITECTURES") = QK_CUDA_ARCHITECTURES;
  bind_cuda(m);
#else
  m.attr("HAS_CUDA") = false;
#endif
}
