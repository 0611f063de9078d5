// The device-function layer: everything that the kernels ask of the machine.
//
// CUDA's own names, some as inline PTX. Kernels use nothing of CUDA that is not named here.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/arithmetic.h"
#include "core/dtype.h"
#include "core/geometry.h"

// A kernel of at most `threads` threads a block, at least `blocks` of them on a multiprocessor.
#define LSLPN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define LSLPN_DEVICE __device__ __forceinline__
#define LSLPN_UNROLL _Pragma("unroll")
#define LSLPN_NO_UNROLL _Pragma("unroll 1")
// Kernel parameters stay in constant memory, also where they are indexed at run time.
#define LSLPN_PARAMETERS const __grid_constant__

namespace lslpn::cuda {

using Stream = void*;  // cudaStream_t, as an integer from Python

LSLPN_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
LSLPN_DEVICE std::int64_t block_index() {
  return blockIdx.x;
}

LSLPN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

LSLPN_DEVICE void block_barrier() {
  __syncthreads();
}
LSLPN_DEVICE void warp_barrier() {
  __syncwarp();
}
LSLPN_DEVICE unsigned ballot(bool value) {
  return __ballot_sync(0xffffffffu, value);
}
LSLPN_DEVICE int count_bits(unsigned bits) {
  return __popc(bits);
}
LSLPN_DEVICE int shuffle(int value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
LSLPN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The same number, which the compiler does not work out anew at each use.
LSLPN_DEVICE std::int64_t kept(std::int64_t value) {
  asm("" : "+l"(value));
  return value;
}

LSLPN_DEVICE float inverse_sqrt(float x) {
  return rsqrtf(x);
}

LSLPN_DEVICE float exponential(float x) {
  return __expf(x);
}
LSLPN_DEVICE float logarithm(float x) {
  return logf(x);
}
LSLPN_DEVICE float quotient(float a, float b) {
  return __fdividef(a, b);
}

LSLPN_DEVICE bool either_is_nan(float a, float b) {
  return a != a || b != b;
}
LSLPN_DEVICE bool is_finite(float value) {
  return isfinite(value);
}
// The larger of two numbers; NaN if either is.
LSLPN_DEVICE float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Half precision through the processor's own conversions.
LSLPN_DEVICE float to_float(float value) {
  return value;
}
LSLPN_DEVICE float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
LSLPN_DEVICE float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
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

// A float32 is the sum of two numbers of the tensor cores' TF32: `high`, cut off, and the rest. As
// bits, which is how the tensor cores take them.
LSLPN_DEVICE void split_tf32(float value, std::uint32_t& high, std::uint32_t& low) {
  asm("and.b32 %0, %1, 0xffffe000;" : "=r"(high) : "f"(value));
  asm("sub.f32 %0, %1, %2;" : "=r"(low) : "f"(value), "r"(high));
}
LSLPN_DEVICE std::uint32_t bits_of(float value) {
  return __float_as_uint(value);
}
LSLPN_DEVICE float float_of(std::uint32_t bits) {
  return __uint_as_float(bits);
}
// first += low * value and second += high * value if `mine` is `of`.
LSLPN_DEVICE void add_if_equal(std::uint16_t mine, std::uint16_t of, float low, float high,
                               float value, float& first, float& second) {
  asm("{.reg .pred equal;\n"
      "setp.eq.u16 equal, %2, %3;\n"
      "@equal fma.rn.f32 %0, %4, %6, %0;\n"
      "@equal fma.rn.f32 %1, %5, %6, %1;}"
      : "+f"(first), "+f"(second)
      : "h"(mine), "h"(of), "f"(low), "f"(high), "f"(value));
}

// d [16 x 8] = a [16 x 8] b [8 x 8], plus d unless it `begins`, by a whole warp, products of TF32
// summed in float32. With g = lane / 4 and q = lane % 4 a lane holds
//   a[0] = a(g, q)  a[1] = a(g + 8, q)  a[2] = a(g, q + 4)  a[3] = a(g + 8, q + 4)
//   b[0] = b(q, g)  b[1] = b(q + 4, g)
//   c[0], c[1] = c(g, 2q), c(g, 2q + 1)  c[2], c[3] = c(g + 8, 2q), c(g + 8, 2q + 1)
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

// What the launches need to know of the current device.
struct Device {
  int shared_memory;       // bytes that a block can have
  std::int64_t workspace;  // bytes that are worth no thought
};
inline Device this_device() {
  int index = 0;
  Device device{48 * 1024, 16 << 20};
  if (cudaGetDevice(&index) != cudaSuccess) return device;
  cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return device;
}

// The error of the last CUDA call, in words; empty for none.
inline std::string error_text(cudaError_t error) {
  return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

// Why the driver cannot run a kernel on the current device, in words; empty where it can.
template <class P>
std::string probe_kernel(void (*kernel)(P)) {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  cudaGetLastError();  // so that torch does not find it
  return error_text(error);
}

// Launches a kernel on a stream of the current device. Returns what went wrong, empty if nothing.
template <class P>
std::string launch(void (*kernel)(P), std::int64_t blocks, int threads, std::size_t shared,
                   Stream stream, const P& parameters) {
  static_assert(sizeof(P) <= 4096, "a kernel has 4 KiB for its parameters");
  if (blocks > 0x7fffffff) return "too many blocks for one launch";
  if (shared > 48 * 1024) {
    // Always the device's maximum: a lower limit, set by one thread, could fail the launch of
    // another that has just set its own.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, this_device().shared_memory);
    if (error != cudaSuccess) return error_text(error);
  }
  const dim3 grid(static_cast<unsigned>(blocks));
  void* arguments[] = {const_cast<P*>(&parameters)};
  return error_text(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads),
                                     arguments, shared, static_cast<cudaStream_t>(stream)));
}

}  // namespace lslpn::cuda
