// Small matrix products over D channels, which make up nearly all of the arithmetic.
#pragma once

#include "simd.h"

LSLPN_BEGIN
namespace cpu {

// Accumulators that fit into registers: rows x columns vectors.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotColumns = 4, kSumRows = 4, kSumColumns = 4;
#else
constexpr int kDotRows = 4, kDotColumns = 2, kSumRows = 4, kSumColumns = 2;
#endif

// out[m * stride + l] = <a[l], b[m]> for l < rows, m < columns, over `length` numbers, a multiple
// of kPadding.
template <class A>
inline void dots(const A* const* a, int rows, const A* const* b, int columns, std::int64_t length,
                 A* out, std::int64_t stride) {
  constexpr int lanes = kLanes<A>;
  constexpr int R = kDotRows, C = kDotColumns;
  for (int l = 0; l < rows; l += R) {
    const A* p[R];
    for (int i = 0; i < R; ++i) p[i] = a[l + i < rows ? l + i : rows - 1];
    for (int m = 0; m < columns; m += C) {
      const A* q[C];
      for (int j = 0; j < C; ++j) q[j] = b[m + j < columns ? m + j : columns - 1];
      Vec<A> sum[C * R] = {};
      for (std::int64_t d = 0; d < length; d += lanes) {
        Vec<A> x[R];
        for (int i = 0; i < R; ++i) x[i] = load(p[i] + d);
        for (int j = 0; j < C; ++j) {
          const Vec<A> y = load(q[j] + d);
          for (int i = 0; i < R; ++i) sum[j * R + i] += x[i] * y;
        }
      }
      A total[C * R];
      for (int k = 0; k < C * R; k += lanes) store(total + k, lane_sums<A>(sum + k));
      for (int j = 0; j < C && m + j < columns; ++j) {
        A* to = out + (m + j) * stride + l;
        if (l + R <= rows) {
          std::memcpy(to, total + j * R, sizeof(A) * R);
        } else {
          for (int i = 0; i < rows - l; ++i) to[i] = total[j * R + i];
        }
      }
    }
  }
}

// out[l] += sum over m < terms of factor[l * row + m * term] * in[m], for l < rows: vectors of
// `length` numbers, a multiple of kPadding. If fresh[l], out[l] is overwritten instead.
template <class A>
inline void weighted_sums(A* const* out, int rows, const A* const* in, int terms, const A* factor,
                          std::int64_t row, std::int64_t term, std::int64_t length,
                          const bool* fresh = nullptr) {
  constexpr int lanes = kLanes<A>;
  constexpr int R = kSumRows, C = kSumColumns;
  static_assert(kPadding % lanes == 0, "rows are made of whole vectors");
  int l = 0;
  for (; l + R <= rows; l += R) {
    const A* f = factor + l * row;
    std::int64_t d = 0;
    for (; d + C * lanes <= length; d += C * lanes) {
      Vec<A> sum[R][C];
      for (int i = 0; i < R; ++i) {
        const bool empty = fresh && fresh[l + i];
        for (int j = 0; j < C; ++j) {
          sum[i][j] = empty ? Vec<A>{} : load(out[l + i] + d + j * lanes);
        }
      }
      for (int m = 0; m < terms; ++m) {
        Vec<A> x[C];
        for (int j = 0; j < C; ++j) x[j] = load(in[m] + d + j * lanes);
        for (int i = 0; i < R; ++i) {
          const Vec<A> w = splat(f[i * row + m * term]);
          for (int j = 0; j < C; ++j) sum[i][j] += w * x[j];
        }
      }
      for (int i = 0; i < R; ++i) {
        for (int j = 0; j < C; ++j) store(out[l + i] + d + j * lanes, sum[i][j]);
      }
    }
    for (; d < length; d += lanes) {
      for (int i = 0; i < R; ++i) {
        Vec<A> sum = fresh && fresh[l + i] ? Vec<A>{} : load(out[l + i] + d);
        for (int m = 0; m < terms; ++m) sum += splat(f[i * row + m * term]) * load(in[m] + d);
        store(out[l + i] + d, sum);
      }
    }
  }
  for (; l < rows; ++l) {
    const A* f = factor + l * row;
    for (std::int64_t d = 0; d < length; d += lanes) {
      Vec<A> sum = fresh && fresh[l] ? Vec<A>{} : load(out[l] + d);
      for (int m = 0; m < terms; ++m) sum += splat(f[m * term]) * load(in[m] + d);
      store(out[l] + d, sum);
    }
  }
}

}  // namespace cpu
LSLPN_END
