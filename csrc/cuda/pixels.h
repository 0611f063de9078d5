// Between the pixels of a tile and its feature locations: a warp has a tile, and a lane a column of
// pixels. Sums over rows are taken in registers on the way down, those over columns in the end.
#pragma once

#include <type_traits>

#include "products.h"
#include "tiles.h"

namespace lslpn::cuda {

constexpr int kPixelWarps = 4;  // of a block
constexpr int kPixelThreads = kWarp * kPixelWarps;

// What a tile's rows of pixels weigh the row of locations below them with, and what |Up F|^2 weighs
// its rows with, see Norm.
struct alignas(16) RowTap {
  float upper;
  float here, next, between;  // (1 - upper)^2, upper^2, 2 upper (1 - upper)
};
using RowTaps = RowTap[kTilePixels];

// |Up F|^2 down a column of pixels, see core/arithmetic.h.
struct Norm {
  float row, next, between;

  // A row of weight 0 is not read: a NaN there must not reach this pixel. Where terms cancel,
  // rounding can make it negative.
  LSLPN_DEVICE float square(const RowTap& t) const {
    return t.here * row + (t.upper > 0 ? t.next * next + t.between * between : 0.0f);
  }
  // 1 / |u|, 0 where it has no direction.
  LSLPN_DEVICE static float inverse_length(float square) {
    const float inverse = inverse_sqrt(square);
    return square < eps_squared<float>() ? 0.0f : inverse;
  }
};

// A Stretch of plain ints, for registers.
struct PixelStretch {
  int pixel, pixels, cell, cells, window, windows;
};

// What a warp knows of its tile.
struct PixelTile {
  PixelStretch y, x;
  Taps<float> taps;  // of this lane's column; idle lanes repeat the last one
  int lower;         // row of locations that this lane's row of pixels begins at; idle lanes: none
  bool between;      // whether it reaches the next

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
    const float upper = of_row.upper, rest = 1 - upper;
    rows[lane] = {upper, rest * rest, upper * upper, 2 * upper * rest};
    lower = lane < y.pixels ? of_row.lower - y.cell : -1;
    between = upper > 0;
    warp_barrier();
  }
  // The number of rows of pixels that begin at a row of locations, and of those that lie on it:
  // they come first. By a warp.
  LSLPN_DEVICE int rows_at(int row) const { return count_bits(ballot(lower == row)); }
  LSLPN_DEVICE int rows_on(int row) const { return count_bits(ballot(lower == row && !between)); }
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

// Sums over the columns of pixels that were left in shared memory, as one product.
constexpr int kPitch = kTilePixels + 4;  // floats of a row: no bank twice
struct alignas(8) ColumnTap {
  int lower;  // from the tile's first location; of a column that there is not, none
  float upper;
};
using ColumnTaps = ColumnTap[kTilePixels];

// Ends with a barrier.
LSLPN_DEVICE void put_columns(const PixelTile& tile, int lane, ColumnTaps& taps) {
  taps[lane] = {lane < tile.x.pixels ? tile.taps.lower : -kTilePixels, tile.taps.upper};
  warp_barrier();
}

// What a column of pixels weighs the column of locations with that is `right` of its lower one.
struct Linear {
  LSLPN_DEVICE static float weight(int right, float upper) {
    return right == 0 ? 1 - upper : right == 1 ? upper : 0;
  }
};
struct Squared {
  LSLPN_DEVICE static float weight(int right, float upper) {
    const float linear = Linear::weight(right, upper);
    return linear * linear;
  }
};
struct Crossed {  // a column and the next
  LSLPN_DEVICE static float weight(int right, float upper) {
    return right == 0 ? (1 - upper) * upper : 0;
  }
};

template <class Weight>
class ColumnSums {
 public:
  LSLPN_DEVICE ColumnSums(const ColumnTaps& taps, int lane) : taps_(taps), lane_(lane) {
    LSLPN_UNROLL
    for (int i = 0; i < 8; ++i) {
      const ColumnTap tap = taps[lane % 4 * 8 + i];
      weights_[i / 2].set(i % 2, Weight::weight(lane / 4 - tap.lower, tap.upper));
    }
  }

  // With g = lane / 4 and q = lane % 4 a lane, which says where row g of 8 lies, and row g of 8
  // others, has the sums of either at columns of locations 2q and 2q + 1.
  LSLPN_DEVICE void add_up(const float* first, const float* second, float2 (&sums)[2]) const {
    const int q = lane_ % 4;
    OperandA values[4];
    LSLPN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float4* row = reinterpret_cast<const float4*>(e == 0 ? first : second) + 2 * q;
      const float4 low = row[0], high = row[1];
      values[0].set(e, low.x);
      values[0].set(2 + e, low.y);
      values[1].set(e, low.z);
      values[1].set(2 + e, low.w);
      values[2].set(e, high.x);
      values[2].set(2 + e, high.y);
      values[3].set(e, high.z);
      values[3].set(2 + e, high.w);
    }
    float sum[4];
    multiply<0>(sum, values, weights_);
    if (!is_finite(sum[0] + sum[1] + sum[2] + sum[3])) {
      // A weight of 0 does not keep a NaN away.
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) {
        sum[e] = 0;
        LSLPN_NO_UNROLL
        for (int x = 0; x < kTilePixels; ++x) {
          const ColumnTap tap = taps_[x];
          const float weight = Weight::weight(2 * q + e % 2 - tap.lower, tap.upper);
          if (weight != 0) sum[e] += weight * (e < 2 ? first : second)[x];
        }
      }
    }
    sums[0] = make_float2(sum[0], sum[1]);
    sums[1] = make_float2(sum[2], sum[3]);
  }

 private:
  const ColumnTaps& taps_;
  const int lane_;
  OperandB weights_[4];
};

// Writes a lane's sums of a row of locations.
LSLPN_DEVICE void put_sums(float* map, int row, int q, const float2& sums) {
  if (row < kTileSide && 2 * q < kTileSide) {
    *reinterpret_cast<float2*>(map + kTileSide * row + 2 * q) = sums;
  }
}

}  // namespace lslpn::cuda
