// The compiled half of the package, lslpn_kernels._native.
#include <pybind11/pybind11.h>

namespace lslpn {
void register_cpu(pybind11::module_& m);
void register_cuda(pybind11::module_& m);
}  // namespace lslpn

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of lslpn_kernels; call them through lslpn_kernels.backends.";
  lslpn::register_cpu(m);
#ifdef LSLPN_WITH_CUDA
  lslpn::register_cuda(m);
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
