// The CUDA operations as functions of a Python module: of `qkernels._C`, and of the module in which tests run the
// kernels on the host (csrc/tests/cuda_emulation).
#pragma once

#include "bindings.h"
#include "cuda/cuda.h"

namespace qk {
namespace bindings {

using Where = std::tuple<int, Address, int, Address>;  // device, stream, splits, scratch

inline cuda::Launch launch_of(const Where& where) {
  return {std::get<0>(where), at<void>(std::get<1>(where)), std::get<2>(where), at<void>(std::get<3>(where))};
}

inline void cuda_row_stats(const Sizes& shape, const View& policy, const View& reference, Address labels,
                           int64_t ignore_index, double temperature, uint32_t fields, Address out, const Where& where) {
  const StatsCall call = stats_call(shape, policy, reference, labels, ignore_index, temperature, fields, out);
  py::gil_scoped_release release;
  cuda::row_stats(call, launch_of(where));
}

inline void cuda_row_grad(const Sizes& shape, const View& policy, const View& reference, Address labels,
                          int64_t ignore_index, double temperature, Address softmax, Address reference_softmax,
                          Address coefficients, int coefficient_count, Address upstream, const View& out,
                          const Where& where) {
  const GradCall call = grad_call(shape, policy, reference, labels, ignore_index, temperature, softmax,
                                  reference_softmax, coefficients, coefficient_count, upstream, out, false);
  py::gil_scoped_release release;
  cuda::row_grad(call, launch_of(where));
}

inline void cuda_pair_loss(int64_t sequences, int64_t length, int64_t rows, Address offsets, Address labels,
                           int64_t ignore_index, Address weights, Address logps, Address reference, bool per_sequence,
                           double beta, double label_smoothing, Address loss, Address rewards, Address grad,
                           Address tokens, const Where& where) {
  const PairCall call = pair_call(sequences, length, rows, offsets, labels, ignore_index, weights, logps, reference,
                                  per_sequence, beta, label_smoothing, loss, rewards, grad, tokens);
  py::gil_scoped_release release;
  cuda::pair_loss(call, launch_of(where));
}

inline void bind_cuda(py::module_& m) {
  m.attr("CUDA_MAX_SPLITS") = static_cast<int>(cuda::kMaxSplits);
  m.attr("CUDA_PARTIAL_BYTES") = cuda::partial_bytes();
  m.def("cuda_unavailable", &cuda::unavailable, py::arg("device"),
        "Why the CUDA kernels cannot run on a device; empty if they can.");
  def_by_keyword(m, "cuda_row_stats", &cuda_row_stats, "shape", "policy", "reference", "labels", "ignore_index",
                 "temperature", "fields", "out", "where");
  def_by_keyword(m, "cuda_row_grad", &cuda_row_grad, "shape", "policy", "reference", "labels", "ignore_index",
                 "temperature", "softmax", "reference_softmax", "coefficients", "coefficient_count", "upstream", "out",
                 "where");
  def_by_keyword(m, "cuda_pair_loss", &cuda_pair_loss, "sequences", "length", "rows", "offsets", "labels",
                 "ignore_index", "weights", "logps", "reference", "per_sequence", "beta", "label_smoothing", "loss",
                 "rewards", "grad", "tokens", "where");
}

}  // namespace bindings
}  // namespace qk
