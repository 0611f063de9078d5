// The fibers behind emulation.h. Compiled without instrumentation also under a sanitizer: what
// goes on in here is no business of the kernels.
#include "emulation.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#ifdef LSLPN_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

#ifdef __x86_64__
// Keeps what a called function must, changes stacks, and goes on where the other one left off.
// The C library's swapcontext does the same with two system calls.
extern "C" void lslpn_change_stack(void** leave, void* enter);
asm(R"(
.text
.type lslpn_change_stack, @function
lslpn_change_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lslpn_change_stack, .-lslpn_change_stack
)");
#endif

namespace lslpn::cuda {
namespace emulation {
namespace {

#ifdef __x86_64__
// Where a fiber, or the scheduler, left off.
struct Context {
  void* stack = nullptr;

  void prepare(char* memory, std::size_t size, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(memory + size) & ~std::uintptr_t{15};
    void** word = reinterpret_cast<void**>(top);
    *--word = nullptr;  // nothing to return to
    *--word = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--word = nullptr;
    stack = word;
  }
  void change_to(Context& other) { lslpn_change_stack(&stack, other.stack); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* memory, std::size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = memory;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void change_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

constexpr std::size_t kStack = 256 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  void* sanitizer = nullptr;
  Collective waits = Collective::none;
  bool done = false;
  unsigned meetings = 0;
  std::vector<Copy> copies;
};

struct Warp {
  Exchange exchange[2][kWarp];
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Context scheduler;
  void* sanitizer = nullptr;
  int current = 0;
  int threads = 0;
  std::int64_t block = 0, block_y = 0;
  char* shared = nullptr;
  void (*body)(const void*) = nullptr;
  const void* parameters = nullptr;
  char launch_sync = 0, block_sync = 0;
  std::vector<char> warp_sync;
} machine;

#ifdef LSLPN_THREAD_SANITIZER
void release(void* point) {
  __tsan_release(point);
}
void acquire(void* point) {
  __tsan_acquire(point);
}
void enter(void* fiber) {
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
void* new_fiber() {
  return __tsan_create_fiber(0);
}
void* this_fiber() {
  return __tsan_get_current_fiber();
}
#else
void release(void*) {}
void acquire(void*) {}
void enter(void*) {}
void* new_fiber() {
  return nullptr;
}
void* this_fiber() {
  return nullptr;
}
#endif

void to_scheduler() {
  Fiber& fiber = *machine.fibers[machine.current];
  enter(machine.sanitizer);
  fiber.context.change_to(machine.scheduler);
}

// A fiber lives on from block to block and launch to launch.
void live() {
  for (;;) {
    acquire(&machine.launch_sync);
    machine.body(machine.parameters);
    Fiber& fiber = *machine.fibers[machine.current];
    if (!fiber.copies.empty()) {
      std::fprintf(stderr, "emulation: an asynchronous copy was never waited for\n");
      std::abort();
    }
    release(&machine.launch_sync);
    fiber.done = true;
    to_scheduler();
  }
}

void resume(int thread) {
  machine.current = thread;
  Fiber& fiber = *machine.fibers[thread];
  enter(fiber.sanitizer);
  machine.scheduler.change_to(fiber.context);
}

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::none:
      return "running";
    case Collective::block_barrier:
      return "a block barrier";
    case Collective::warp_barrier:
      return "a warp barrier";
    case Collective::shuffle:
      return "a shuffle";
    case Collective::matrix:
      return "a matrix product";
  }
  return "";
}

// Lets every fiber from `begin` to `end` go on if all of them wait for the same thing.
// Returns whether they do.
bool release_together(int begin, int end, bool block) {
  const Collective kind = machine.fibers[begin]->waits;
  if (kind == Collective::none || (kind == Collective::block_barrier) != block) return false;
  for (int t = begin; t < end; ++t) {
    const Fiber& fiber = *machine.fibers[t];
    if (fiber.done || fiber.waits != kind) return false;
  }
  for (int t = begin; t < end; ++t) machine.fibers[t]->waits = Collective::none;
  return true;
}

std::string run_block() {
  for (int t = 0; t < machine.threads; ++t) {
    machine.fibers[t]->done = false;
    machine.fibers[t]->waits = Collective::none;
  }
  for (int round = 0;; ++round) {
    bool moved = false, alive = false;
    for (int warp = 0; warp * kWarp < machine.threads; ++warp) {
      const int begin = warp * kWarp;
      const int end = std::min(begin + kWarp, machine.threads);
      for (int i = begin; i < end; ++i) {
        // Now upwards, now downwards: no order of the lanes may matter.
        const int t = (round + warp) % 2 ? begin + end - 1 - i : i;
        Fiber& fiber = *machine.fibers[t];
        if (fiber.done || fiber.waits != Collective::none) continue;
        resume(t);
        moved = true;
      }
      moved |= release_together(begin, end, false);
    }
    moved |= release_together(0, machine.threads, true);
    for (int t = 0; t < machine.threads; ++t) alive |= !machine.fibers[t]->done;
    if (!alive) return "";
    if (!moved) break;
  }
  std::string complaint = "threads wait for each other in block " + std::to_string(machine.block);
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& fiber = *machine.fibers[t];
    const Fiber& before = *machine.fibers[t > 0 ? t - 1 : 0];
    if (t > 0 && fiber.done == before.done && fiber.waits == before.waits) continue;
    complaint += "; from thread " + std::to_string(t) + ": ";
    complaint += fiber.done ? "done" : name_of(fiber.waits);
  }
  return complaint;
}

}  // namespace

const Exchange* meet(Collective kind, const Exchange& mine) {
  Fiber& fiber = *machine.fibers[machine.current];
  const int warp = machine.current / kWarp, lane = machine.current % kWarp;
  Exchange* board = machine.warps[warp].exchange[fiber.meetings++ % 2];
  board[lane] = mine;
  char* point = kind == Collective::block_barrier ? &machine.block_sync : &machine.warp_sync[warp];
  release(point);
  fiber.waits = kind;
  to_scheduler();
  acquire(point);
  return board;
}

std::vector<Copy>& copies() {
  return machine.fibers[machine.current]->copies;
}

std::string run(void (*body)(const void*), const void* parameters, std::int64_t blocks,
                std::int64_t blocks_y, int threads, std::size_t shared) {
  if (blocks < 1 || blocks_y < 1 || threads < 1 || threads > 1024 || threads % kWarp) {
    return "invalid configuration argument";
  }
  if (blocks > 0x7fffffff || blocks_y > 0xffff) return "too many blocks for one launch";
  if (shared > 227 * 1024) return "too much shared memory";
  machine.sanitizer = this_fiber();
  machine.threads = threads;
  machine.body = body;
  machine.parameters = parameters;
  machine.warps.resize(1024 / kWarp);
  machine.warp_sync.resize(1024 / kWarp);
  while (static_cast<int>(machine.fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<char[]>(kStack);
    fiber->sanitizer = new_fiber();
    fiber->context.prepare(fiber->stack.get(), kStack, live);
    machine.fibers.push_back(std::move(fiber));
  }
  // Each block has shared memory of its own, of just the size asked for, kept to the end: no
  // block's accesses are taken for another's.
  std::vector<std::unique_ptr<char[]>> memories;
  std::string complaint;
  release(&machine.launch_sync);
  for (std::int64_t i = blocks * blocks_y - 1; i >= 0 && complaint.empty(); --i) {
    machine.block = i % blocks;
    machine.block_y = i / blocks;
    memories.emplace_back(new char[shared + 1]);
    machine.shared = memories.back().get();
    std::memset(machine.shared, 0xff, shared + 1);
    release(&machine.launch_sync);
    complaint = run_block();
  }
  if (!complaint.empty()) machine.fibers.clear();  // they hang in the middle of a kernel
  acquire(&machine.launch_sync);
  return complaint;
}

}  // namespace emulation

int thread_index() {
  return emulation::machine.current;
}
int block_threads() {
  return emulation::machine.threads;
}
std::int64_t block_index() {
  return emulation::machine.block;
}
std::int64_t block_index_y() {
  return emulation::machine.block_y;
}
char* shared_memory() {
  return emulation::machine.shared;
}

}  // namespace lslpn::cuda
