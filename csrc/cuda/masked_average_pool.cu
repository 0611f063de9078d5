#include "plain_pool.h"
namespace lslpn::cuda {
bool pool_is_tiled(const Pool&) {
  return false;
}
std::int64_t pool_workspace(const Pool&, bool, bool) {
  return 0;
}
std::string pool_forward(const Pool& c, Stream s, bool) {
  return with_type(c.features.dtype, [&](auto t) { return plain_pool<decltype(t)>(c, s, false); });
}
std::string pool_backward(const Pool& c, Stream s, bool) {
  return with_type(c.features.dtype, [&](auto t) { return plain_pool<decltype(t)>(c, s, true); });
}
}  // namespace lslpn::cuda
