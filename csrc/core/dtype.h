// Element types of features, and software conversions of half precision.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace lslpn {

enum class DType { float64, float32, float16, bfloat16, uint8, boolean, int32, int64 };

inline bool is_floating(DType dtype) {
  return dtype == DType::float64 || dtype == DType::float32 || dtype == DType::float16 ||
         dtype == DType::bfloat16;
}

// Storage types of 16 bits.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

}  // namespace lslpn

LSLPN_BEGIN

// The accumulation type of features of type T: float64 for float64, otherwise float32.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

LSLPN_HD float bits_to_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
LSLPN_HD std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LSLPN_HD double widen(double value) {
  return value;
}
LSLPN_HD float widen(float value) {
  return value;
}
LSLPN_HD float widen(BFloat16 value) {
  return bits_to_float(std::uint32_t{value.bits} << 16);
}
LSLPN_HD float widen(Half value) {
  const std::uint32_t sign = std::uint32_t{value.bits & 0x8000u} << 16;
  const std::uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
  // Subnormal: rest * 2^-24, exactly.
  return bits_to_float(sign | float_to_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));
}

// Round to nearest, ties to even.
LSLPN_HD void narrow(double value, double& out) {
  out = value;
}
LSLPN_HD void narrow(float value, float& out) {
  out = value;
}
LSLPN_HD void narrow(float value, BFloat16& out) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
  } else {
    out.bits = static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
LSLPN_HD void narrow(float value, Half& out) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t rest = bits & 0x7fffffffu;
  std::uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (rest >= 0x38800000u) {
    half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  } else {
    // Below 2^-14: adding 1/2 rounds to a multiple of 2^-24.
    half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}

LSLPN_END
