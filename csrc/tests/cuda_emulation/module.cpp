// The CUDA operations as a Python module that runs their kernels on the host: qkernels/backends/cuda.py takes it in
// place of `qkernels._C` where QKERNELS_CUDA_EMULATION names its file. For tests: correct, and slow.
#include "../../bindings_cuda.h"
#include "emulation.h"

PYBIND11_MODULE(_cuda_emulation, m) {
  m.doc() = "The CUDA kernels, emulated on the host. For tests.";
  m.attr("HAS_CUDA") = true;
  m.attr("CUDA_EMULATED") = true;
  qk::bindings::bind_cuda(m);
  m.def("run_only", &qk::emulation::run_only, pybind11::arg("block"),
        "Run only the blocks with this index from now on; -1: all.");
}
