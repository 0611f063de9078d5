// The parallel regions of OpenMP on threads that ThreadSanitizer knows.
//
// libgomp is not compiled for ThreadSanitizer: it would not see how libgomp starts its threads and
// waits for them, and take everything that they share for a race. So the kernels are compiled with
// -fopenmp, as they are shipped, but linked with this in place of libgomp: gcc turns the only
// construct that they use, `omp parallel num_threads(n)`, into a call of GOMP_parallel.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

thread_local int number = 0;
std::atomic<long> regions{0};

}  // namespace

long parallel_regions() {
  return regions;
}

extern "C" int omp_get_thread_num() {
  return number;
}

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::mutex mutex;
  std::condition_variable arrived;
  unsigned waiting = 0;
  const auto run = [&](int me) {
    number = me;
    {
      // They begin together. Else one of them may have done all the work before the next is there,
      // and nothing is left to race for.
      std::unique_lock<std::mutex> lock(mutex);
      if (++waiting == threads) arrived.notify_all();
      arrived.wait(lock, [&] { return waiting == threads; });
    }
    body(data);
    number = 0;
  };
  std::vector<std::thread> others;
  for (unsigned t = 1; t < threads; ++t) others.emplace_back(run, static_cast<int>(t));
  run(0);
  for (std::thread& other : others) other.join();
  if (threads > 1) ++regions;
}
