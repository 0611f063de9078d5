// A CUDA runtime for modules that nvcc compiled: registers their kernels, answers what launches
// ask of the device, and hands every launch to a function of the host. What is not here is an error
// when the module is linked, which names it.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define EXPORTED __attribute__((visibility("default")))

namespace {

using LaunchFunction = int (*)(const char* kernel, const unsigned* grid, const unsigned* block,
                               std::uint64_t shared, void** parameters);

LaunchFunction host = nullptr;
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> all;
  return all;
}
std::map<const void*, int> dynamic_shared;  // that a kernel was allowed
// What nvcc wraps around a fat binary.
struct Binary {
  int magic, version;
  const char* data;
  void* file;
};
std::vector<const char*>& binaries() {
  static std::vector<const char*> all;
  return all;
}
int multiprocessors = 132, shared_per_block = 227 * 1024;
constexpr int kStaticLimit = 48 * 1024;
cudaError_t last = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

}  // namespace

extern "C" {

EXPORTED void cudart_on_launch(LaunchFunction function) {
  host = function;
}
EXPORTED void cudart_device(int count, int shared) {
  multiprocessors = count;
  shared_per_block = shared;
}

// The fat binaries of the module: a header of 16 bytes with the size of the rest in its second
// half.
EXPORTED int cudart_binaries() {
  return int(binaries().size());
}
EXPORTED const char* cudart_binary(int i) {
  return binaries()[i];
}

// ---- what nvcc's own code calls ----

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle = nullptr;
  binaries().push_back(static_cast<const Binary*>(binary)->data);
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[function] = name;
}
char __cudaInitModule(void**) {
  return 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

namespace {
struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  void* stream;
} configuration;
}  // namespace
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                     CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

// ---- launches ----

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** parameters,
                             std::size_t shared, cudaStream_t) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return result(cudaErrorInvalidDeviceFunction);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || block.x < 1 || block.y < 1 || block.z < 1 ||
      block.x * block.y * block.z > 1024) {
    return result(cudaErrorInvalidConfiguration);
  }
  const auto allowed = dynamic_shared.find(function);
  const std::size_t limit =
      allowed == dynamic_shared.end() ? kStaticLimit : std::size_t(allowed->second);
  if (shared > limit) return result(cudaErrorInvalidValue);
  const unsigned sizes[2][3] = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
  if (!host || host(found->second.c_str(), sizes[0], sizes[1], shared, parameters)) {
    return result(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** parameters,
                               std::size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, parameters, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function,
                                void** parameters) {
  return cudaLaunchKernel(function, c->gridDim, c->blockDim, parameters, c->dynamicSmemBytes,
                          c->stream);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (!kernels().count(function)) return result(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > shared_per_block) return result(cudaErrorInvalidValue);
  // Another thread may be about to launch by the limit that it has just set.
  int& limit = dynamic_shared[function];
  if (value < limit && limit <= shared_per_block) return result(cudaErrorInvalidValue);
  limit = value > kStaticLimit ? value : kStaticLimit;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (!kernels().count(function)) return result(cudaErrorInvalidDeviceFunction);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = kStaticLimit;
  return cudaSuccess;
}

// ---- the device ----

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared_per_block + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kStaticLimit;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      return result(cudaErrorNotSupported);
  }
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return last;
}
const char* cudaGetErrorName(cudaError_t) {
  return "an error of the emulated CUDA runtime";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorLaunchFailure:
      return "the kernel failed";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    default:
      return "an error of the emulated CUDA runtime";
  }
}
cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

}  // extern "C"
