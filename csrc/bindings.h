// Conversions of the Python modules: from addresses, tuples and numbers to the structs of core/calls.h.
//
// Callers (qkernels/backends) have checked everything; here only the types are put right and the GIL is released. Every
// argument is passed by keyword: two numbers that change places would still be valid, and corrupt memory.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "core/calls.h"

namespace qk {
namespace bindings {

namespace py = pybind11;

using Address = std::uintptr_t;
using Sizes = std::tuple<int64_t, int64_t, int64_t>;      // outer, inner, vocab
using View = std::tuple<Address, int, int64_t, int64_t>;  // data, dtype code, outer stride, inner stride

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Rows rows_of(const View& view) {
  return {at<void>(std::get<0>(view)), static_cast<DType>(std::get<1>(view)), std::get<2>(view), std::get<3>(view)};
}

inline Shape shape_of(const Sizes& shape) { return {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)}; }

inline StatsCall stats_call(const Sizes& shape, const View& policy, const View& reference, Address labels,
                            int64_t ignore_index, double temperature, uint32_t fields, Address out) {
  return {shape_of(shape), rows_of(policy), rows_of(reference), {at<int64_t>(labels), ignore_index},
          temperature,     fields,          at<float>(out)};
}

inline GradCall grad_call(const Sizes& shape, const View& policy, const View& reference, Address labels,
                          int64_t ignore_index, double temperature, Address softmax, Address reference_softmax,
                          Address coefficients, int coefficient_count, Address upstream, const View& out,
                          bool out_is_zero) {
  return {shape_of(shape),
          rows_of(policy),
          rows_of(reference),
          {at<int64_t>(labels), ignore_index},
          temperature,
          at<float>(softmax),
          at<float>(reference_softmax),
          at<float>(coefficients),
          coefficient_count,
          at<float>(upstream),
          rows_of(out),
          out_is_zero};
}

inline PairCall pair_call(int64_t sequences, int64_t length, int64_t rows, Address offsets, Address labels,
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

// Binds a function whose arguments have these names and can only be passed by them.
template <class F, class... Names>
void def_by_keyword(py::module_& m, const char* name, F function, Names... names) {
  m.def(name, function, py::kw_only(), py::arg(names)...);
}

}  // namespace bindings
}  // namespace qk
