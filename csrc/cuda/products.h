// Small dense products on the tensor cores, as exact as float32.
//
// float32 is cut into two TF32; the product of the low parts is below rounding. Half precision fits
// into one. Tensor cores cut off what does not fit when they add, which over a long sum would
// become an error of many units in the last place: they sum few products, which are added up in
// float32.
#pragma once

#include <type_traits>

#include "common.h"

namespace lslpn::cuda {

// The part of a matrix that a lane holds, see matrix_multiply.
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

// d = a b over kSteps of k, the small products first. kHalves: the numbers of `a`, or those of
// both, are of half precision.
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

// How many of the operands are of half precision where one is of features.
template <class T>
constexpr int kHalf = sizeof(T) == 2 ? 1 : 0;

// Of features of type T.
template <class T, int kCount>
LSLPN_DEVICE void set_feature(Operand<kCount>& operand, int i, T value) {
  if constexpr (kHalf<T> == 1) {
    operand.high[i] = bits_of(to_float(value));
  } else {
    operand.set(i, value);
  }
}

// Neighbouring channels, moved at once.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T value[kCount];
};
template <int kCount, class T>
LSLPN_DEVICE Pack<T, kCount> read_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}
// Whether all vectors of D floats can be read four at a time.
LSLPN_DEVICE bool fours(const float* vectors, int D) {
  return D % 4 == 0 && reinterpret_cast<std::uintptr_t>(vectors) % 16 == 0;
}

// An element at so many bytes: what is far apart is addressed so, with offsets worked out once.
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
