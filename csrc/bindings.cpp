// The Python module `qkernels._C`: the operations on raw addresses. Callers (qkernels/backends/cpu.py and cuda.py)
// have checked everything; here only the types are put right and the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "core/columns.h"
#include "cpu/cpu.h"
#include "cpu/product.h"
#include "cpu/thread_pool.h"
#if defined(QK_CUDA)
#include "cuda/cuda.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using View = std::tuple<Address, int, int64_t, int64_t>;  // data, dtype code, outer stride, inner stride

#if defined(QK_CUDA)
using Where = std::tuple<int, Address, int, Address>;  // device, stream, splits, scratch

template <class T>
T* at(Address address);

qk::cuda::Launch launch_of(const Where& where) {
  return {std::get<0>(where), at<void>(std::get<1>(where)), std::get<2>(where), at<void>(std::get<3>(where))};
}
#endif

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

qk::Rows rows_of(const View& view) {
  return {at<void>(std::get<0>(view)), static_cast<qk::DType>(std::get<1>(view)), std::get<2>(view), std::get<3>(view)};
}

qk::Shape shape_of(const std::tuple<int64_t, int64_t, int64_t>& shape) {
  return {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)};
}

qk::StatsCall stats_call(const std::tuple<int64_t, int64_t, int64_t>& shape, const View& policy, const View& reference,
                         Address labels, int64_t ignore_index, double temperature, uint32_t columns, Address out) {
  return {shape_of(shape), rows_of(policy), rows_of(reference), {at<int64_t>(labels), ignore_index},
          temperature,     columns,         at<float>(out)};
}

qk::GradCall grad_call(const std::tuple<int64_t, int64_t, int64_t>& shape, const View& policy, const View& reference,
                       Address labels, int64_t ignore_index, double temperature, Address state, Address reference_state,
                       Address coefficients, int coefficient_count, Address upstream, const View& out,
                       bool out_is_zero) {
  return {shape_of(shape),
          rows_of(policy),
          rows_of(reference),
          {at<int64_t>(labels), ignore_index},
          temperature,
          at<float>(state),
          at<float>(reference_state),
          at<float>(coefficients),
          coefficient_count,
          at<float>(upstream),
          rows_of(out),
          out_is_zero};
}

qk::PairCall pair_call(int64_t sequences, int64_t length, int64_t rows, Address offsets, Address labels,
                       int64_t ignore_index, Address weights, Address logps, Address reference, bool per_sequence,
                       double beta, double label_smoothing, Address loss, Address rewards, Address grad,
                       Address tokens) {
  return {sequences,
          length,
          rows,
          at<int32_t>(offsets),
          {at<int64_t>(labels), ignore_index},
          at<float>(weights),
          at<float>(logps),
          at<float>(reference),
          per_sequence,
          beta,
          label_smoothing,
          at<float>(loss),
          at<float>(rewards),
          at<float>(grad),
          at<float>(tokens)};
}

// Returns the flat index of the first bad label, or -1 when the rows were computed.
int64_t row_stats(std::tuple<int64_t, int64_t, int64_t> shape, View policy, View reference, Address labels,
                  int64_t ignore_index, double temperature, uint32_t columns, Address out, int threads) {
  const qk::StatsCall call = stats_call(shape, policy, reference, labels, ignore_index, temperature, columns, out);
  py::gil_scoped_release release;
  const int64_t bad = qk::find_bad_label(call.labels, call.shape);
  if (bad < 0) qk::row_stats(call, threads);
  return bad;
}

void row_grad(std::tuple<int64_t, int64_t, int64_t> shape, View policy, View reference, Address labels,
              int64_t ignore_index, double temperature, Address state, Address reference_state, Address coefficients,
              int coefficient_count, Address upstream, View out, bool out_is_zero, int threads) {
  const qk::GradCall call = grad_call(shape, policy, reference, labels, ignore_index, temperature, state,
                                      reference_state, coefficients, coefficient_count, upstream, out, out_is_zero);
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

void product(int64_t rows, int64_t columns, int64_t depth, Address left, int64_t left_stride, Address right,
             int64_t right_stride, Address bias, Address out, int64_t out_stride, int threads) {
  qk::ProductCall call{rows,        columns,      depth,           at<qk::BFloat16>(left), at<qk::BFloat16>(right),
                       left_stride, right_stride, at<float>(bias), at<float>(out),         out_stride};
  py::gil_scoped_release release;
  qk::product(call, threads);
}

void add_row_product(int64_t rows, int64_t columns, int64_t depth, Address left, int64_t left_stride, Address right,
                     int64_t right_stride, Address out, int64_t out_stride, int threads) {
  qk::ProductCall call{rows,        columns,      depth,   at<qk::BFloat16>(left), at<qk::BFloat16>(right),
                       left_stride, right_stride, nullptr, at<float>(out),         out_stride};
  py::gil_scoped_release release;
  qk::add_row_product(call, threads);
}

#if defined(QK_CUDA)
void cuda_row_stats(std::tuple<int64_t, int64_t, int64_t> shape, View policy, View reference, Address labels,
                    int64_t ignore_index, double temperature, uint32_t columns, Address out, Where where) {
  const qk::StatsCall call = stats_call(shape, policy, reference, labels, ignore_index, temperature, columns, out);
  py::gil_scoped_release release;
  qk::cuda::row_stats(call, launch_of(where));
}

void cuda_row_grad(std::tuple<int64_t, int64_t, int64_t> shape, View policy, View reference, Address labels,
                   int64_t ignore_index, double temperature, Address state, Address reference_state,
                   Address coefficients, int coefficient_count, Address upstream, View out, Where where) {
  const qk::GradCall call = grad_call(shape, policy, reference, labels, ignore_index, temperature, state,
                                      reference_state, coefficients, coefficient_count, upstream, out, false);
  py::gil_scoped_release release;
  qk::cuda::row_grad(call, launch_of(where));
}

void cuda_pair_loss(int64_t sequences, int64_t length, int64_t rows, Address offsets, Address labels,
                    int64_t ignore_index, Address weights, Address logps, Address reference, bool per_sequence,
                    double beta, double label_smoothing, Address loss, Address rewards, Address grad, Address tokens,
                    Where where) {
  const qk::PairCall call = pair_call(sequences, length, rows, offsets, labels, ignore_index, weights, logps, reference,
                                      per_sequence, beta, label_smoothing, loss, rewards, grad, tokens);
  py::gil_scoped_release release;
  qk::cuda::pair_loss(call, launch_of(where));
}
#endif

template <size_t n>
std::vector<std::string> names(const char* const (&list)[n]) {
  return {list, list + n};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled row operations. Knows nothing of torch; see qkernels/backends/cpu.py and cuda.py.";
  m.def("row_stats", &row_stats);
  m.def("row_grad", &row_grad);
  m.def("pair_loss", &pair_loss);
  m.def("product", &product);
  m.def("add_row_product", &add_row_product);
  m.def("has_product", &qk::has_product, "Whether the instruction set in use multiplies bf16 into fp32.");
  m.def("instruction_set", &qk::instruction_set, "The instruction set in use.");
  m.def("instruction_sets", &qk::instruction_sets, "Those compiled in that this machine understands, best last.");
  m.def("use_instruction_set", &qk::use_instruction_set, py::arg("name"), "Use another one; False if it is not there.");
  m.def("use_own_threads", &qk::use_own_threads, "Never borrow an OpenMP team in this process.");
  m.def("thread_source", [] { return std::string(qk::thread_source()); });
  m.def("column_names", [] { return names(qk::kColumnNames); });
  m.def("coefficient_names", [] { return names(qk::kCoefficientNames); });
  m.def("compiler", [] { return std::string(QK_COMPILER); });
#if defined(QK_CUDA)
  m.attr("HAS_CUDA") = true;
  m.attr("CUDA_VERSION") = QK_CUDA_VERSION;
  m.attr("CUDA_ARCHITECTURES") = QK_CUDA_ARCHITECTURES;
  m.attr("CUDA_MAX_SPLITS") = static_cast<int>(qk::cuda::kMaxSplits);
  m.attr("CUDA_PARTIAL_BYTES") = qk::cuda::partial_bytes();
  m.def("cuda_unavailable", &qk::cuda::unavailable, "Why the CUDA kernels cannot run on a device; empty if they can.");
  m.def("cuda_row_stats", &cuda_row_stats);
  m.def("cuda_row_grad", &cuda_row_grad);
  m.def("cuda_pair_loss", &cuda_pair_loss);
#else
  m.attr("HAS_CUDA") = false;
#endif
}
