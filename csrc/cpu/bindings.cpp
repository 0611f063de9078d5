#include "../binding.h"
namespace lslpn { void register_cpu(py::module_&) {} }
