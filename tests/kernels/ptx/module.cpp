// The bindings of csrc/cuda by themselves, as a Python module.
#include <pybind11/pybind11.h>

namespace lslpn {
void register_cuda(pybind11::module_& m);
}

PYBIND11_MODULE(ptx_kernels, m) {
  lslpn::register_cuda(m);
  m.attr("with_cuda") = true;
}
