#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

// The functions of each compilation of the kernels.
#define LSLPN_DECLARE(isa)                               \
  namespace lslpn {                                      \
  namespace isa {                                        \
  namespace cpu {                                        \
  void masked_average_pool(const Pool<float>&);          \
  void masked_average_pool(const Pool<double>&);         \
  void masked_average_pool(const PoolBackward<float>&);  \
  void masked_average_pool(const PoolBackward<double>&); \
  void cosine_match(const Match<float>&);                \
  void cosine_match(const Match<double>&);               \
  void cosine_match(const MatchBackward<float>&);        \
  void cosine_match(const MatchBackward<double>&);       \
  void cosine_match(const MatchLoss<float>&);            \
  void cosine_match(const MatchLoss<double>&);           \
  }                                                      \
  }                                                      \
  }

LSLPN_DECLARE(plain)
#if defined(LSLPN_X86)
LSLPN_DECLARE(avx2)
LSLPN_DECLARE(avx512)
#endif

namespace lslpn {
namespace {

enum Level { kPlain, kAvx2, kAvx512 };
const char* const kNames[] = {"plain", "avx2", "avx512"};

Level best_level() {
#if defined(LSLPN_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPlain;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  return kAvx2;
#else
  return kPlain;
#endif
}

const Level kBest = best_level();
std::atomic<int> current{kBest};

}  // namespace

std::vector<std::string> instruction_sets() {
  return std::vector<std::string>(kNames, kNames + kBest + 1);
}

std::string instruction_set() {
  return kNames[current];
}

void use_instruction_set(const std::string& name) {
  for (int level = kPlain; level <= kBest; ++level) {
    if (name == kNames[level]) {
      current = level;
      return;
    }
  }
  throw std::invalid_argument("this processor has no instruction set " + name);
}

#if defined(LSLPN_X86)
#define LSLPN_DISPATCH(operation)                    \
  switch (current.load(std::memory_order_relaxed)) { \
    case kAvx512:                                    \
      return avx512::cpu::operation(args);           \
    case kAvx2:                                      \
      return avx2::cpu::operation(args);             \
    default:                                         \
      return plain::cpu::operation(args);            \
  }
#else
#define LSLPN_DISPATCH(operation) return plain::cpu::operation(args);
#endif

template <class A>
void masked_average_pool(const Pool<A>& args) {
  LSLPN_DISPATCH(masked_average_pool)
}
template <class A>
void masked_average_pool(const PoolBackward<A>& args) {
  LSLPN_DISPATCH(masked_average_pool)
}
template <class A>
void cosine_match(const Match<A>& args) {
  LSLPN_DISPATCH(cosine_match)
}
template <class A>
void cosine_match(const MatchBackward<A>& args) {
  LSLPN_DISPATCH(cosine_match)
}
template <class A>
void cosine_match(const MatchLoss<A>& args) {
  LSLPN_DISPATCH(cosine_match)
}

template void masked_average_pool(const Pool<float>&);
template void masked_average_pool(const Pool<double>&);
template void masked_average_pool(const PoolBackward<float>&);
template void masked_average_pool(const PoolBackward<double>&);
template void cosine_match(const Match<float>&);
template void cosine_match(const Match<double>&);
template void cosine_match(const MatchBackward<float>&);
template void cosine_match(const MatchBackward<double>&);
template void cosine_match(const MatchLoss<float>&);
template void cosine_match(const MatchLoss<double>&);

// ---- memory -----------------------------------------------------------------------------------

namespace {

constexpr std::size_t kKept = std::size_t{16} << 20;

// The memory of this thread's last call, kept for the next one, since new pages can cost more than
// the call itself. At most kKept is kept.
struct SavedPixels {
  void* memory = nullptr;
  std::size_t size = 0;
  bool lent = false;
  ~SavedPixels() { std::free(memory); }
};
thread_local SavedPixels kept;

void* allocate(std::size_t size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 4096, size)) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* allocate_memory(std::int64_t bytes) {
  const std::size_t size = (static_cast<std::size_t>(bytes) + 4095) / 4096 * 4096;
  if (size > kKept || kept.lent) return allocate(size);
  if (kept.size < size) {
    std::free(kept.memory);
    kept.memory = nullptr;
    kept.size = 0;
    kept.memory = allocate(size);
    kept.size = size;
  }
  kept.lent = true;
  return kept.memory;
}

void free_memory(void* memory) {
  if (memory == kept.memory) {
    kept.lent = false;
  } else {
    std::free(memory);
  }
}

}  // namespace lslpn
