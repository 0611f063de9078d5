// Threads, and the workspace of a call.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "kernels.h"
#include "simd.h"

LSLPN_BEGIN
namespace cpu {

// Calls f(unit, state) for every unit; each thread gets its state from start(thread).
//
// Each thread has a range of consecutive units, whose data it can reuse; when it has finished, it
// takes units from the ranges of other threads. So the assignment of units to threads varies, and
// results must not depend on it.
template <class Start, class F>
inline void parallel(std::int64_t units, int threads, Start start, F f) {
  if (threads > units) threads = static_cast<int>(units);
#if defined(_OPENMP)
  if (threads > 1) {
    struct alignas(64) Run {
      std::int64_t next, end;
    };
    Run runs[kMaxThreads];
    for (int t = 0; t < threads; ++t) runs[t] = {units * t / threads, units * (t + 1) / threads};
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      auto state = start(me);
      for (int k = 0; k < threads; ++k) {
        Run& run = runs[(me + k) % threads];
        for (;;) {
          const std::int64_t unit = __atomic_fetch_add(&run.next, 1, __ATOMIC_RELAXED);
          if (unit >= run.end) break;
          f(unit, state);
        }
      }
    }
    return;
  }
#endif
  auto state = start(0);
  for (std::int64_t unit = 0; unit < units; ++unit) f(unit, state);
}

// With fewer multiplications than this, one thread is used.
constexpr double kMinParallelWork = 2e5;

// Adds up the memory that is needed (while `base` is null), then hands out pieces of it.
//
// AddressSanitizer knows only the whole allocation. If it is compiled in
// (tests/kernels/sanitizers), a poisoned gap follows each piece, so that overruns into the next one
// are detected.
struct Arena {
  char* base = nullptr;
  std::int64_t used = 0;

  template <class T>
  T* take(std::int64_t n) {
    char* p = base ? base + used : nullptr;
    const std::int64_t size = n * static_cast<std::int64_t>(sizeof(T));
#if defined(__SANITIZE_ADDRESS__)
    const std::int64_t room = (size + 127) / 64 * 64;
    if (base) __asan_poison_memory_region(p + size, room - size);
#else
    const std::int64_t room = (size + 63) / 64 * 64;
#endif
    used += room;
    return reinterpret_cast<T*>(p);
  }
};

// The workspace of a call: a part shared by all threads and one for each thread, laid out by
// Shared(Arena&, problem) and Scratch(Arena&, problem).
template <class Shared, class Scratch>
class Memory {
 public:
  template <class Problem>
  Memory(const Problem& problem, int threads) {
    Arena size, each;
    Shared(size, problem);
    Scratch(each, problem);
    // No two threads share a cache line or a page.
    per_thread_ = (each.used + 4095) / 4096 * 4096 + 128;
    size_ = size.used + threads * per_thread_;
    data_ = static_cast<char*>(allocate_memory(size_));
#if defined(__SANITIZE_ADDRESS__)
    std::memset(data_, 0xff, size_);  // NaN, so that nothing relies on cleared memory
#endif
    scratch_ = data_ + size.used;
    Arena arena{data_};
    shared_ = Shared(arena, problem);
  }
  ~Memory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(data_, size_);
#endif
    free_memory(data_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const Shared& shared() const { return shared_; }

  // The `start` of parallel().
  template <class Problem>
  auto scratch(const Problem& problem) const {
    return [this, &problem](int thread) {
      Arena arena{scratch_ + thread * per_thread_};
      return Scratch(arena, problem);
    };
  }

 private:
  char* data_;
  char* scratch_;
  std::int64_t size_, per_thread_;
  Shared shared_;
};

}  // namespace cpu
LSLPN_END
