#include "plain_match.h"
namespace lslpn::cuda {
bool match_is_tiled(const Match&) {
  return false;
}
std::int64_t match_workspace(const Match& c, bool b, bool) {
  return plain_match_workspace(c, b);
}
std::string match_forward(const Match& c, Stream s, bool) {
  return with_type(c.features.dtype, [&](auto t) { return plain_match<decltype(t)>(c, s, false); });
}
std::string match_backward(const Match& c, Stream s, bool) {
  return with_type(c.features.dtype, [&](auto t) { return plain_match<decltype(t)>(c, s, true); });
}
}  // namespace lslpn::cuda
