// The bindings of csrc/cuda over the emulated kernels, for CPU tensors.
#include <pybind11/pybind11.h>

#include "emulation.h"

namespace lslpn {
void register_cuda(pybind11::module_& m);
}

PYBIND11_MODULE(emulated_kernels, m) {
  lslpn::register_cuda(m);
  m.attr("with_cuda") = true;
  namespace emulation = lslpn::cuda::emulation;
  m.def("launches", [] { return emulation::launches; });
  m.def("set_device", [](int multiprocessors, int shared_memory, std::int64_t workspace) {
    emulation::device = {multiprocessors, shared_memory, workspace};
  });
}
