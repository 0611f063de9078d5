// From pixels down to feature locations: a warp holds a column of a tile in each lane, sums over
// the rows in registers as it walks down, and over the columns in shared memory.
#pragma once

#include "tiles.h"

namespace lslpn::cuda {

constexpr int kWarp = 32;
constexpr int kBoard = 4 * (kWarp + 1);  // floats: four numbers a column

// Taps of a tile's rows or columns, relative to its first feature location.
struct TileTaps {
  Taps<float> y[kTilePixels], x[kTilePixels];
};

// Fills in a tile's taps, a lane a row and a column.
LSLPN_DEVICE void find_taps(TileTaps& taps, const Axis& ay, const Axis& ax, const Stretch& y,
                            const Stretch& x, int lane) {
  if (y.begin + lane < y.end) {
    taps.y[lane] = short_taps(ay, y.begin + lane);
    taps.y[lane].lower -= y.lower;
  }
  if (x.begin + lane < x.end) {
    taps.x[lane] = short_taps(ax, x.begin + lane);
    taps.x[lane].lower -= x.lower;
  }
}

// The columns of a tile that touch feature location `cell` of it: first <= x < end.
struct Columns {
  int first, end;
};
LSLPN_DEVICE Columns columns_of(const TileTaps& taps, int width, int cell) {
  Columns c{0, width};
  while (c.first < width && taps.x[c.first].lower + 1 < cell) ++c.first;
  while (c.end > c.first && taps.x[c.end - 1].lower > cell) --c.end;
  return c;
}

// Sums over the columns of a tile. Lane x gives four numbers for column x; lane 8 e + j gets the
// sum of number e over the columns, times their weights at feature location j.
LSLPN_DEVICE float sum_columns(float* board, const float (&value)[4], const TileTaps& taps,
                               const Columns& columns, int lane) {
  for (int e = 0; e < 4; ++e) board[e * (kWarp + 1) + lane] = value[e];
  warp_barrier();
  const float* row = board + lane / 8 * (kWarp + 1);
  const int j = lane % 8;
  float sum = 0;
  for (int x = columns.first; x < columns.end; ++x) {
    const Taps<float> t = taps.x[x];
    sum += row[x] * (t.lower == j ? 1 - t.upper : t.upper);
  }
  warp_barrier();
  return sum;
}

}  // namespace lslpn::cuda
