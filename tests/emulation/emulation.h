// The device-function layer of csrc/cuda/device.h in portable C++.
//
// Blocks run one after another; the threads of a block are fibers that hand over to each other
// where they wait: at barriers, shuffles and matrix products. A wait that not all threads of a
// block, or lanes of a warp, come to is an error and not a hang. Shared memory is filled with NaN
// before each block, and an asynchronous copy arrives only when it is waited for, its target
// being NaN until then. Under ThreadSanitizer each fiber counts as a thread, and only barriers and
// the like order their accesses; blocks of one launch are not ordered at all.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/arithmetic.h"
#include "core/dtype.h"
#include "core/geometry.h"

#define LSLPN_KERNEL(threads, blocks) void
#define LSLPN_DEVICE inline
#define LSLPN_PARAMETERS const
#define LSLPN_UNROLL
#define LSLPN_UNROLL_BY_4
#define LSLPN_NO_UNROLL

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

namespace lslpn::cuda {

using Stream = void*;

// What the launches need to know of the device; see csrc/cuda/device.h.
struct Device {
  int multiprocessors;
  int shared_memory;
  std::int64_t workspace;
};

namespace emulation {

// What the lanes of a warp hand to each other.
struct Exchange {
  float value;
  std::uint32_t a[4];
  std::uint32_t b[2];
};

enum class Collective { none, block_barrier, warp_barrier, shuffle, matrix };

// Hands over to the other fibers until all of the block (or warp) have come here too. The result
// holds what the 32 lanes of the warp gave.
const Exchange* meet(Collective kind, const Exchange& mine);

// The asynchronous copies that the current fiber has yet to wait for.
struct Copy {
  char* target;
  const char* source;
};
std::vector<Copy>& copies();

// What the emulated device is like, and how many kernels were launched on it.
extern Device device;
extern std::int64_t launches;

// Runs `body(parameters)` once per thread. The result is a complaint, or empty.
std::string run(void (*body)(const void*), const void* parameters, std::int64_t blocks,
                std::int64_t blocks_y, int threads, std::size_t shared);

}  // namespace emulation

int thread_index();
int block_threads();
std::int64_t block_index();
std::int64_t block_index_y();
char* shared_memory();

inline void block_barrier() {
  emulation::meet(emulation::Collective::block_barrier, {});
}
inline void warp_barrier() {
  emulation::meet(emulation::Collective::warp_barrier, {});
}
inline float shuffle_xor(float value, int mask) {
  const int lane = thread_index() % 32;
  return emulation::meet(emulation::Collective::shuffle, {value, {}, {}})[lane ^ mask].value;
}

inline Device this_device() {
  return emulation::device;
}

inline float inverse_sqrt(float x) {
  return 1 / std::sqrt(x);
}
inline float max_or_nan(float a, float b) {
  if (a != a || b != b) return std::nanf("");
  return a < b ? b : a;
}

inline float to_float(float value) {
  return value;
}
inline float to_float(BFloat16 value) {
  return widen(value);
}
inline float to_float(Half value) {
  return widen(value);
}
template <class T>
inline void from_float(float value, T& out) {
  narrow(value, out);
}

template <class T>
inline float half_of(std::uint32_t pair, int which) {
  return widen(T{static_cast<std::uint16_t>(pair >> (16 * which))});
}

template <class T>
inline void matrix_multiply(float (&c)[4], const std::uint32_t (&a)[4],
                            const std::uint32_t (&b)[2]) {
  emulation::Exchange mine{0, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emulation::Exchange* lanes = emulation::meet(emulation::Collective::matrix, mine);
  const int g = thread_index() % 32 / 4, q = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2;  // whether the row is g + 8
    const int column = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, high = k / 8;
      const float x = half_of<T>(lanes[4 * g + holder].a[2 * high + lower], k % 2);
      const float y = half_of<T>(lanes[4 * column + holder].b[high], k % 2);
      c[i] += x * y;
    }
  }
}

inline void copy_async(void* shared, const void* global) {
  const emulation::Copy copy{static_cast<char*>(shared), static_cast<const char*>(global)};
  for (const char* address : {static_cast<const char*>(copy.target), copy.source}) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16) {
      std::fprintf(stderr, "emulation: an asynchronous copy between misaligned addresses\n");
      std::abort();
    }
  }
  for (int i = 0; i < 16; ++i) copy.target[i] = '\xff';
  emulation::copies().push_back(copy);
}
inline void copy_wait() {
  for (const emulation::Copy& copy : emulation::copies()) {
    for (int i = 0; i < 16; ++i) copy.target[i] = copy.source[i];
  }
  emulation::copies().clear();
}

// The processor runs them all.
template <class P>
std::string probe_kernel(void (*)(P)) {
  return {};
}

template <class P>
std::string launch(void (*kernel)(P), std::int64_t blocks, std::int64_t blocks_y, int threads,
                   std::size_t shared, Stream, const P& parameters) {
  struct Call {
    void (*kernel)(P);
    const P& parameters;
  };
  const Call call{kernel, parameters};
  return emulation::run(
      [](const void* data) {
        const Call& c = *static_cast<const Call*>(data);
        c.kernel(c.parameters);
      },
      &call, blocks, blocks_y, threads, shared);
}

}  // namespace lslpn::cuda
