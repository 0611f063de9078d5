// Small dense products on the tensor cores, as exact as float32.
//
// A float32 operand is split into two TF32 numbers; the product of the low parts is below rounding.
// A half-precision operand fits into one. Tensor cores truncate when they add, which over a long
// sum would become an error of many units in the last place: they sum few products at a time, and
// these sums are added in float32.
#pragma once

#include <type_traits>

#include "device.h"
#include "launch.h"

namespace lslpn::cuda {

// The elements of a matrix that a lane holds, see matrix_multiply.
template <int kCount>
struct Operand {
  std::uint32_t high[kCount], low[kCount];

  LSLPN_DEVICE void set(int i, float value) { split_tf32(value, high[i], low[i]); }
};
using OperandA = Operand<4>;
using OperandB = Operand<2>;

// From high parts and low parts.
LSLPN_DEVICE void set(OperandB& operand, const uint4& parts) {
  operand.high[0] = parts.x;
  operand.high[1] = parts.y;
  operand.low[0] = parts.z;
  operand.low[1] = parts.w;
}

// d = a b over kSteps of k, the small products first. kHalves: 1 where `a`, 2 where both are of
// half precision.
template <int kHalves, int kSteps>
LSLPN_DEVICE void multiply(float (&d)[4], const OperandA (&a)[kSteps],
                           const OperandB (&b)[kSteps]) {
  LSLPN_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    if constexpr (kHalves < 1) matrix_multiply(d, a[k].low, b[k].high, k == 0);
    if constexpr (kHalves < 2) matrix_multiply(d, a[k].high, b[k].low, kHalves == 1 && k == 0);
  }
  LSLPN_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    matrix_multiply(d, a[k].high, b[k].high, kHalves == 2 && k == 0);
  }
}

// kHalves where `a` are features of type T.
template <class T>
constexpr int kHalf = sizeof(T) == 2 ? 1 : 0;

template <class T, int kCount>
LSLPN_DEVICE void set_feature(Operand<kCount>& operand, int i, T value) {
  if constexpr (kHalf<T> == 1) {
    operand.high[i] = float_bits(value);
  } else {
    operand.set(i, value);
  }
}

// Neighbouring channels, read or written at once.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T value[kCount];
};
template <int kCount, class T>
LSLPN_DEVICE Pack<T, kCount> read_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

// Whether four neighbouring channels of a location can be read at once.
inline bool fours(const Features& f) {
  bool whole = f.stride[2] == 1;
  const std::int64_t length[5] = {f.B, f.N, f.D, f.h, f.w};
  for (const int i : {0, 1, 3, 4}) {
    // The stride of a single image or location means nothing: some releases of torch export 1.
    whole = whole && (length[i] == 1 || f.stride[i] % 4 == 0);
  }
  const int size = f.dtype == DType::float32 ? 4 : 2;
  return whole && reinterpret_cast<std::uintptr_t>(f.data) % (4 * size) == 0;
}

// Addresses by byte offsets, which are computed once for a loop.
template <class T>
LSLPN_DEVICE T* at_byte(T* from, std::int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + bytes);
}
template <class T>
LSLPN_DEVICE T read(const T* from, std::int64_t bytes) {
  return *at_byte(from, bytes);
}

}  // namespace lslpn::cuda
