// Threads and the memory of a call.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"
#include "simd.h"

LSLPN_BEGIN
namespace cpu {

// Calls f(unit, thread) for every unit. Which thread gets a unit is left to chance: no result may
// depend on it.
template <class F>
inline void parallel(std::int64_t units, int threads, F f) {
  if (threads > units) threads = static_cast<int>(units);
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t unit = 0; unit < units; ++unit) f(unit, omp_get_thread_num());
    return;
  }
#endif
  for (std::int64_t unit = 0; unit < units; ++unit) f(unit, 0);
}

// Not worth a second thread below this many multiplications.
constexpr double kWorthThreads = 2e5;

// Adds up what memory is needed (while `base` is null), then deals it out.
struct Arena {
  char* base = nullptr;
  std::int64_t used = 0;

  template <class T>
  T* take(std::int64_t n) {
    char* p = base ? base + used : nullptr;
    used += (n * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
};

// The memory of one call: a part that all threads share, and one for each thread, laid out by
// Shared(Arena&, problem) and Scratch(Arena&, problem).
template <class Shared, class Scratch>
class Memory {
 public:
  template <class Problem>
  Memory(const Problem& problem, int threads) {
    Arena size, each;
    Shared(size, problem);
    Scratch(each, problem);
    // A thread's part is kept off the cache lines, and pages, of the others.
    per_thread_ = (each.used + 4095) / 4096 * 4096 + 128;
    data_ = static_cast<char*>(take_memory(size.used + threads * per_thread_));
    scratch_ = data_ + size.used;
    Arena arena{data_};
    shared_ = Shared(arena, problem);
  }
  ~Memory() { give_back_memory(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const Shared& shared() const { return shared_; }
  template <class Problem>
  Scratch scratch(const Problem& problem, int thread) const {
    Arena arena{scratch_ + thread * per_thread_};
    return Scratch(arena, problem);
  }

 private:
  char* data_;
  char* scratch_;
  std::int64_t per_thread_;
  Shared shared_;
};

}  // namespace cpu
LSLPN_END
