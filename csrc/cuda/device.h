// The device-function layer: everything that the kernels ask of the machine.
//
// Two bodies stand behind these names. Here they are CUDA's own, some as inline PTX; in
// tests/emulation they are portable C++, so that the very same kernels run on any processor,
// under a debugger or a sanitizer. Kernels use nothing of CUDA that is not named here.
#pragma once

#ifdef LSLPN_EMULATION
#include "emulation.h"
#else

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
#define LSLPN_UNROLL_BY_4 _Pragma("unroll 4")
#define LSLPN_NO_UNROLL _Pragma("unroll 1")
// Kernel parameters stay in constant memory, also where they are indexed at run time.
#define LSLPN_PARAMETERS const __grid_constant__

namespace lslpn::cuda {

using Stream = void*;  // cudaStream_t, as an integer from Python

LSLPN_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
LSLPN_DEVICE int block_threads() {
  return static_cast<int>(blockDim.x);
}
LSLPN_DEVICE std::int64_t block_index() {
  return blockIdx.x;
}
LSLPN_DEVICE std::int64_t block_index_y() {
  return blockIdx.y;
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
LSLPN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

LSLPN_DEVICE float inverse_sqrt(float x) {
  return rsqrtf(x);
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

// c [16 x 8] += a [16 x 16] b [16 x 8] by a whole warp, products of T summed in float32. With
// g = lane / 4 and q = lane % 4 a lane holds, two neighbours of T in a register, lower one first:
//   a[0] = a(g, 2q..)  a[1] = a(g + 8, 2q..)  a[2] = a(g, 2q + 8..)  a[3] = a(g + 8, 2q + 8..)
//   b[0] = b(2q.., g)  b[1] = b(2q + 8.., g)
//   c[0], c[1] = c(g, 2q..)  c[2], c[3] = c(g + 8, 2q..)
template <class T>
LSLPN_DEVICE void matrix_multiply(float (&c)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2]);
template <>
LSLPN_DEVICE void matrix_multiply<Half>(float (&c)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
LSLPN_DEVICE void matrix_multiply<BFloat16>(float (&c)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory behind the thread's back, both ends aligned to 16 bytes.
// They are there for the thread that asked for them after copy_wait(), for the others of the
// block after a barrier as well.
LSLPN_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}
LSLPN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// What the launches need to know of the current device.
struct Device {
  int multiprocessors;
  int shared_memory;       // bytes that a block can have
  std::int64_t workspace;  // bytes that are worth no thought
};
inline Device this_device() {
  int index = 0;
  Device device{1, 48 * 1024, 16 << 20};
  if (cudaGetDevice(&index) != cudaSuccess) return device;
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
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
std::string launch(void (*kernel)(P), std::int64_t blocks, std::int64_t blocks_y, int threads,
                   std::size_t shared, Stream stream, const P& parameters) {
  static_assert(sizeof(P) <= 4096, "a kernel has 4 KiB for its parameters");
  if (blocks > 0x7fffffff || blocks_y > 0xffff) return "too many blocks for one launch";
  if (shared > 48 * 1024) {
    // Always the device's maximum: a lower limit, set by one thread, could fail the launch of
    // another that has just set its own.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, this_device().shared_memory);
    if (error != cudaSuccess) return error_text(error);
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y));
  void* arguments[] = {const_cast<P*>(&parameters)};
  return error_text(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads),
                                     arguments, shared, static_cast<cudaStream_t>(stream)));
}

}  // namespace lslpn::cuda

#endif
