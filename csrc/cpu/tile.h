// Interpolation from feature locations to the pixels of a tile, and its transpose.
//
// A tile is a row segment crossed with a column segment: at most 32 x 32 pixels that are in the
// same windows and are interpolated from the same few feature locations. Interpolation is
// separable: columns by a product with the table of weights, rows by walking down the pixel rows,
// several of which have the same two taps.
//
// Letters: T pixels of a segment along x, padded to whole vectors; R feature locations along x;
// rows of both are along y.
#pragma once

#include "../core/geometry.h"
#include "kernels.h"
#include "linear.h"
#include "simd.h"

LSLPN_BEGIN
namespace cpu {

// One side of a tile.
template <class A>
struct Side {
  int begin, pixels;
  int lower, cells, before;
  int first, windows;
  const A* weight;  // [R, T]
  const A* square;
  const A* cross;
};

template <class A>
inline Side<A> side(const AxisTables<A>& axis, int s) {
  const Segment& g = axis.segment[s];
  const std::int64_t offset = static_cast<std::int64_t>(s) * axis.reach * axis.length;
  return {g.begin,
          g.end - g.begin,
          g.lower,
          g.upper - g.lower + 1,
          g.before,
          g.first,
          g.last - g.first + 1,
          axis.weight + offset,
          axis.square + offset,
          axis.cross + offset};
}

// out[t] = sum over r < cells of value[r] table[r, t].
template <class A>
inline void interpolate_row(const A* value, int cells, const A* table, int T, A* out) {
  for (int t = 0; t < T; t += kLanes<A>) {
    Vec<A> sum = splat(value[0]) * load(table + t);
    for (int r = 1; r < cells; ++r) sum += splat(value[r]) * load(table + r * T + t);
    store(out + t, sum);
  }
}

// out[t] = sum over r of value[r] table[r, t] + twice * other[r] second[r, t], where `second` is
// for neighbours r and r + 1, of which the last r has none in the tile.
template <class A>
inline void interpolate_row(const A* value, const A* table, const A* other, const A* second,
                            A twice, int cells, int T, A* out) {
  for (int t = 0; t < T; t += kLanes<A>) {
    Vec<A> sum = splat(value[0]) * load(table + t);
    for (int r = 1; r < cells; ++r) {
      sum += splat(twice * other[r - 1]) * load(second + (r - 1) * T + t);
      sum += splat(value[r]) * load(table + r * T + t);
    }
    store(out + t, sum);
  }
}

// The transpose: out[row * stride + r] = sum over t of value[row * T + t] table[r, t], for all
// rows.
template <class A>
inline void reduce_rows(const A* value, int rows, const A* table, int cells, int T, A* out,
                        std::int64_t stride) {
  const A* a[kTileCells];
  for (int r = 0; r < cells; ++r) a[r] = table + r * T;
  constexpr int block = 32;
  const A* b[block];
  for (int first = 0; first < rows; first += block) {
    const int n = rows - first < block ? rows - first : block;
    for (int i = 0; i < n; ++i) b[i] = value + (first + i) * T;
    dots<A>(a, cells, b, n, T, out + first * stride, stride);
  }
}

// 1 / |v| from |v|^2; see core/arithmetic.h.
template <class A>
inline Vec<A> inverse_lengths(Vec<A> square) {
  Vec<A> result;
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    // An estimate of 14 or 12 bits, and Newton's method: y (3 - x y^2) / 2.
    constexpr float kLargest = 3.4e38f;
#if defined(__AVX512F__)
    const Vec<float> x = _mm512_min_ps(_mm512_set1_ps(kLargest), square);
    result = _mm512_rsqrt14_ps(x);
#else
    const Vec<float> x = _mm256_min_ps(_mm256_set1_ps(kLargest), square);
    result = _mm256_rsqrt_ps(x);
    result = result * (1.5f - 0.5f * x * result * result);
#endif
    result = result * (1.5f - 0.5f * x * result * result);
  } else
#endif
  {
    for (int i = 0; i < kLanes<A>; ++i) result[i] = A(1) / std::sqrt(square[i]);
  }
  return square < eps_squared<A>() ? Vec<A>{} : result;
}

// Walks down the pixel rows of a tile: calls `enter(lower, upper)` with the two feature rows
// (counted from the tile's first) whenever they change, `pixel(y, weight of the upper)` for each
// pixel row, and `leave(lower, upper)` before the next change and at the end.
template <class A, class Enter, class Pixel, class Leave>
[[gnu::always_inline]] inline void walk_rows(const AxisTables<A>& axis, const Side<A>& y,
                                             Enter enter, Pixel pixel, Leave leave) {
  const int* const rows = axis.lower + y.begin;
  const A* const weight = axis.upper + y.begin;
  for (int i = 0; i < y.pixels;) {
    const int row = rows[i], lower = row - y.lower;
    const int upper = lower + 1 < y.cells ? lower + 1 : lower;  // if equal, its weight is 0
    enter(lower, upper);
    do {
      pixel(i, weight[i]);
      ++i;
    } while (i < y.pixels && rows[i] == row);
    leave(lower, upper);
  }
}

}  // namespace cpu
LSLPN_END
