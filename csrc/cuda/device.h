// What the kernels need of the machine that CUDA C++ does not spell: launches, conversions of half
// precision, tensor cores.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/arithmetic.h"
#include "core/dtype.h"
#include "core/geometry.h"
#include "launch.h"

// A kernel of at most `threads` threads a block, at least `blocks` of them on a multiprocessor.
#define LSLPN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define LSLPN_DEVICE __device__ __forceinline__
// For loops of more than a few statements or passes; shorter ones are unrolled anyway.
#define LSLPN_UNROLL _Pragma("unroll")
#define LSLPN_NO_UNROLL _Pragma("unroll 1")
// Keeps kernel parameters in constant memory where they are indexed at run time, too.
#define LSLPN_PARAMETERS const __grid_constant__

namespace lslpn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

LSLPN_DEVICE int thread_index() {
  const int index = static_cast<int>(threadIdx.x);
  __builtin_assume(index >= 0 && index < 1024);  // divisions by powers of two are shifts
  return index;
}
LSLPN_DEVICE int block_index() {
  return static_cast<int>(blockIdx.x);
}

LSLPN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// The same number of 64 bits or address, which the compiler keeps in registers instead of computing
// it anew at each use.
template <class T>
LSLPN_DEVICE T kept(T value) {
  asm("" : "+l"(value));
  return value;
}

// The larger of two numbers; NaN if either is.
LSLPN_DEVICE float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The bits of a number in float32. Where bits are wanted, this saves moves between register types.
LSLPN_DEVICE std::uint32_t float_bits(float value) {
  return __float_as_uint(value);
}
LSLPN_DEVICE std::uint32_t float_bits(BFloat16 value) {
  std::uint32_t result;
  asm("mov.b32 %0, {0, %1};" : "=r"(result) : "h"(value.bits));
  return result;
}
LSLPN_DEVICE std::uint32_t float_bits(Half value) {
  std::uint32_t result;
  asm("cvt.f32.f16 %0, %1;" : "=r"(result) : "h"(value.bits));
  return result;
}
template <class T>
LSLPN_DEVICE float to_float(T value) {
  return __uint_as_float(float_bits(value));
}
LSLPN_DEVICE void from_float(float value, float& out) {
  out = value;
}
LSLPN_DEVICE void from_float(float value, BFloat16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}
LSLPN_DEVICE void from_float(float value, Half& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}

// Splits a float32 into two TF32 numbers, the truncated value and the remainder; as bits, which is
// how the tensor cores take them.
LSLPN_DEVICE void split_tf32(float value, std::uint32_t& high, std::uint32_t& low) {
  asm("and.b32 %0, %1, 0xffffe000;" : "=r"(high) : "f"(value));
  asm("sub.f32 %0, %1, %2;" : "=r"(low) : "f"(value), "r"(high));
}

// first += low * value and second += high * value if `a` equals `b`.
LSLPN_DEVICE void add_if_equal(std::uint16_t a, std::uint16_t b, float low, float high, float value,
                               float& first, float& second) {
  asm("{.reg .pred equal;\n"
      "setp.eq.u16 equal, %2, %3;\n"
      "@equal fma.rn.f32 %0, %4, %6, %0;\n"
      "@equal fma.rn.f32 %1, %5, %6, %1;}"
      : "+f"(first), "+f"(second)
      : "h"(a), "h"(b), "f"(low), "f"(high), "f"(value));
}

// d [16 x 8] = a [16 x 8] b [8 x 8], plus d unless it `begins`, by a whole warp: products of TF32,
// summed in float32. With g = lane / 4 and q = lane % 4, a lane holds
//   a[0] = a(g, q)  a[1] = a(g + 8, q)  a[2] = a(g, q + 4)  a[3] = a(g + 8, q + 4)
//   b[0] = b(q, g)  b[1] = b(q + 4, g)
//   d[0], d[1] = d(g, 2q), d(g, 2q + 1)  d[2], d[3] = d(g + 8, 2q), d(g + 8, 2q + 1)
LSLPN_DEVICE void matrix_multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2], bool begins) {
  if (begins) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The sum over the lanes of a warp, which all get.
LSLPN_DEVICE float warp_sum(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Launches a kernel on a stream of the current device.
template <class P>
void launch(void (*kernel)(P), std::int64_t blocks, int threads, std::size_t shared, Stream stream,
            const P& parameters) {
  static_assert(sizeof(P) <= 4096, "a kernel has 4 KiB for its parameters");
  if (blocks > 0x7fffffff) throw std::runtime_error("CUDA: too many blocks for one launch");
  if (shared > 48 * 1024) {
    // Always the device's maximum: a lower limit, set by one thread, could fail the launch of
    // another that has just set its own.
    int device = 0, limit = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  }
  void* arguments[] = {const_cast<P*>(&parameters)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(threads), arguments, shared, static_cast<cudaStream_t>(stream)));
}

}  // namespace lslpn::cuda
