// Between the pixels of a tile and its feature locations: a warp has a tile, and a lane a column of
// pixels. Sums over rows are taken in registers on the way down, those over columns in the end.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace lslpn::cuda {

constexpr int kPixelWarps = 4;  // of a block
constexpr int kPixelThreads = kWarp * kPixelWarps;

// Taps of a tile's rows of pixels, from the tile's first location.
struct alignas(8) RowTap {
  int lower;
  float upper;
};
using RowTaps = RowTap[kTilePixels];
// Weights of the columns of pixels at each column of locations, and at one beyond, where they are
// 0.
using ColumnWeights = float[kTileSide + 1][kTilePixels + 1];

// A Stretch of plain ints, for registers.
struct PixelStretch {
  int pixel, pixels, cell, cells, window, windows;
};

// What a warp knows of its tile.
struct PixelTile {
  PixelStretch y, x;
  Taps<float> taps;  // of this lane's column; idle lanes repeat the last one
  int lower;         // row of locations that this lane's row of pixels begins at; idle lanes: none

  // Ends with a barrier.
  LSLPN_DEVICE PixelTile(const Grid& grid, int tile, int lane, RowTaps& rows) {
    const int row = tile / grid.tiles_x.count, column = tile - row * grid.tiles_x.count;
    // Four lanes find what is at the ends of the two stretches.
    const int end = lane & 1;
    const Axis axis = lane & 2 ? grid.x : grid.y;
    const int pixel =
        (lane & 2 ? grid.tiles_x.begin[column + end] : grid.tiles_y.begin[row + end]) - end;
    const Taps<float> at = short_taps(axis, pixel);
    const Covering windows = axis.covering(pixel);
    const int cell = at.lower + (end && at.upper > 0 ? 1 : 0);
    const int window = end ? windows.last : windows.first;
    const auto found = [&](int first) {
      const auto from = [&](int value, int& begin, int& count) {
        begin = shuffle(value, first);
        count = shuffle(value, first + 1) - begin + 1;
      };
      PixelStretch s;
      from(pixel, s.pixel, s.pixels);
      from(cell, s.cell, s.cells);
      from(window, s.window, s.windows);
      return s;
    };
    y = found(0);
    x = found(2);
    taps = short_taps(grid.x, x.pixel + minimum(lane, x.pixels - 1));
    taps.lower -= x.cell;
    const Taps<float> of_row = short_taps(grid.y, y.pixel + minimum(lane, y.pixels - 1));
    rows[lane] = {of_row.lower - y.cell, of_row.upper};
    lower = lane < y.pixels ? of_row.lower - y.cell : -1;
    warp_barrier();
  }
  // The number of rows of pixels that begin at a row of locations. By a warp.
  LSLPN_DEVICE int rows_at(int row) const { return count_bits(ballot(lower == row)); }
  // The first pixel of this lane's column, in the image.
  LSLPN_DEVICE int pixel(const Grid& grid, int lane) const {
    return y.pixel * grid.x.pixels + x.pixel + minimum(lane, x.pixels - 1);
  }
};

// Calls f with rows y .. end - 1: the first of some and, as a constant, how many: kRows, or 1 in
// the end.
template <int kRows, class F>
LSLPN_DEVICE void by_rows(int y, int end, F f) {
  LSLPN_NO_UNROLL
  for (; y + kRows <= end; y += kRows) f(y, std::integral_constant<int, kRows>());
  LSLPN_NO_UNROLL
  for (; y < end; ++y) f(y, std::integral_constant<int, 1>());
}

// Sums over the columns of a tile: lane 8 e + j is for location column j of four numbers e.
struct ColumnSums {
  const float* weight;  // of the columns of pixels, and kTilePixels + 1 further at column j + 1
  Range touching;       // the columns of pixels that touch location column j
  Range between;        // those that touch column j + 1 as well

  // Ends with a barrier.
  LSLPN_DEVICE ColumnSums(const PixelTile& tile, int lane, ColumnWeights& weights) {
    weight = weights[minimum(lane % 8, kTileSide - 1)];
    touching = between = {0, 0};
    const bool inside = lane < tile.x.pixels;
    LSLPN_UNROLL
    for (int j = 0; j <= kTileSide; ++j) {
      const bool lower = tile.taps.lower == j;
      const bool touches = inside && (lower || (tile.taps.lower + 1 == j && tile.taps.upper > 0));
      const float value = lower ? 1 - tile.taps.upper : tile.taps.upper;
      weights[j][lane] = touches ? value : 0;
      const unsigned columns = ballot(touches);
      const int before = count_bits((columns & (0u - columns)) - 1);
      if (lane % 8 == j && columns) touching = {before, before + count_bits(columns)};
      if (lane % 8 == j - 1) between = {maximum(touching.begin, before), touching.end};
    }
    warp_barrier();
  }
};

}  // namespace lslpn::cuda
