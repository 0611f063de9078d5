// Macros for compiling one source several times.
#pragma once

// Functions of csrc/core run on the host and, if compiled by nvcc, on the device.
#ifdef __CUDACC__
#define LSLPN_HD __host__ __device__ __forceinline__
#else
#define LSLPN_HD inline
#endif

// The CPU kernels are compiled once per instruction set and linked into one module. An inline
// function in a common namespace would be emitted by each of these compilations, and the linker
// would keep an arbitrary one: a machine without AVX-512 could end up executing AVX-512 code.
// Hence all inline code is in a namespace named after the instruction set.
#ifndef LSLPN_ISA
#define LSLPN_ISA generic
#endif
#define LSLPN_BEGIN \
  namespace lslpn { \
  inline namespace LSLPN_ISA {
#define LSLPN_END \
  }               \
  }
