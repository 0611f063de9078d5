// exp and log of vectors, and labels as vectors.
#pragma once

#include <cmath>

#include "simd.h"

LSLPN_BEGIN
namespace cpu {

// exp(x) for x <= 0, but at least the smallest normal number. NaN stays NaN.
inline Vec<float> exp_of(Vec<float> x) {
  // x = k log 2 + r with |r| <= log(2) / 2, and exp(r) by its series: the next term is 5e-9.
  constexpr float kLeast = -87.0f, kLog2e = 1.44269504f, kShift = 12582912.0f;  // 1.5 * 2^23
  constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // log 2 in two parts
  x = x < kLeast ? splat(kLeast) : x;
  const Vec<float> shifted = x * kLog2e + kShift;  // k in the lowest bits
  const Vec<float> k = shifted - kShift;
  const Vec<float> r = (x - k * kHigh) - k * kLow;
  Vec<float> series = splat(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    series = series * r + term;
  }
  const Ints power = (reinterpret_cast<Ints>(shifted) << 23) + 0x3f800000;
  return series * reinterpret_cast<Vec<float>>(power);
}

// log(1 + x) for 0 <= x < 2^31. NaN stays NaN.
inline Vec<float> log_of_1_plus(Vec<float> x) {
  // 1 + x = 2^k (1 + f) with f in [-1/4, 1/2), exact except for the rounding of 1 + x, which the
  // last term corrects; log(1 + f) = 2 artanh(s) with s = f / (2 + f), |s| <= 1/5.
  const Vec<float> y = x + 1.0f;
  const Ints bits = reinterpret_cast<Ints>(y);
  const Ints k = (bits - 0x3f400000) >> 23;  // 0x3f400000 is 3/4
  const Vec<float> f = reinterpret_cast<Vec<float>>(bits - (k << 23)) - 1.0f;
  const Vec<float> s = f / (f + 2.0f), z = s * s;
  Vec<float> series = splat(2.0f / 11);
  for (const float term : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) {
    series = series * z + term;
  }
  const Vec<float> rounded = (x - (y - 1.0f)) / y;
  return __builtin_convertvector(k, Vec<float>) * 0.693147181f + (s * series + rounded);
}

inline Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline Vec<double> log_of_1_plus(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

// The lower halves of 64-bit numbers in two vectors: every second lane.
template <int... lane>
inline Ints lower_halves(Ints a, Ints b, std::integer_sequence<int, lane...>) {
  constexpr int offset = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : 1;
  return LSLPN_SHUFFLE(float, a, b, (2 * lane + offset)...);
}

// Labels in memory, uint8 or int64, the first n lanes; the others are 0. They must fit into 32
// bits.
template <class A>
inline Index<A> load_labels(const void* p, bool bytes, int n) {
  if (bytes) return load_index<A>(p, true, n);
  const std::int64_t* from = static_cast<const std::int64_t*>(p);
  Index<A> v{};
  if (n < kLanes<A>) {
    for (int i = 0; i < n; ++i) v[i] = static_cast<Whole<A>>(from[i]);
  } else if constexpr (sizeof(A) == 8) {
    std::memcpy(&v, from, sizeof v);
  } else {
    Ints halves[2];
    std::memcpy(halves, from, sizeof halves);
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
    v = lower_halves(halves[0], halves[1], lanes);
  }
  return v;
}

}  // namespace cpu
LSLPN_END
