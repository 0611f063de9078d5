// The bindings of csrc/cuda over the emulated kernels, for CPU tensors.
#include <pybind11/pybind11.h>

namespace lslpn {
void register_cuda(pybind11::module_& m);
}

PYBIND11_MODULE(emulated_kernels, m) {
  lslpn::register_cuda(m);
  m.attr("with_cuda") = true;
}
