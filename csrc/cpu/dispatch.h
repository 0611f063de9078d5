// The kernels, in the best instruction set that this processor has.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lslpn {

template <class A>
void masked_average_pool(const Pool<A>& args);
template <class A>
void masked_average_pool(const PoolBackward<A>& args);
template <class A>
void cosine_match(const Match<A>& args);
template <class A>
void cosine_match(const MatchBackward<A>& args);
template <class A>
void cosine_match(const MatchLoss<A>& args);

// The instruction sets that this processor has, the best last; the one in use; and another choice
// of it, for tests. Throws std::invalid_argument for one that is not there.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace lslpn
