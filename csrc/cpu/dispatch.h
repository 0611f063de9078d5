// The kernels, compiled for the best instruction set of this processor.
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

// The instruction sets of this processor, the best last; the one in use; and a way to select
// another one in tests, which throws std::invalid_argument if it is not available.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace lslpn
