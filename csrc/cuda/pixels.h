// Between the pixels of a tile and its feature locations. A warp has a tile, and a lane a column of
// its pixels. Sums over rows are taken in registers on the way down, those over columns at the end,
// as a product.
#pragma once

#include "products.h"
#include "tiles.h"

namespace lslpn::cuda {

constexpr int kPixelWarps = 4;  // of a block
constexpr int kPixelThreads = kWarp * kPixelWarps;

// The weights of a row of pixels: of the row of feature locations below it, and in |Up F|^2, see
// Norm.
struct alignas(16) RowTap {
  float upper;
  float here, next, between;  // (1 - upper)^2, upper^2, 2 upper (1 - upper)
};
using RowTaps = RowTap[kTilePixels];

// |Up F|^2 in a column of pixels, by rows of feature locations; see core/arithmetic.h.
struct Norm {
  float row, next, between;

  // A row of weight 0 is not used: a NaN there must not reach this pixel. Rounding can make the
  // result negative.
  LSLPN_DEVICE float square(const RowTap& t) const {
    return t.here * row + (t.upper > 0 ? t.next * next + t.between * between : 0.0f);
  }
  // 1 / |v| from |v|^2, or 0 where |v| is below eps.
  LSLPN_DEVICE static float inverse_length(float square) {
    const float inverse = rsqrtf(square);
    return square < eps_squared<float>() ? 0.0f : inverse;
  }
};

constexpr int kLocationBlocks = (kMap + 7) / 8;  // blocks of 8 locations of a tile
constexpr int kLocationsOfBlocks = 8 * kLocationBlocks;
// The Gram maps of a tile: own, right, below, and the sum of diagonal and other.
using GramTile = float[kGramMaps][kLocationsOfBlocks];

// The taps of a lane's column of pixels.
struct PixelColumn {
  int left, right;  // columns of locations, the same where the second weight is 0
  float p, q;       // their weights

  LSLPN_DEVICE explicit PixelColumn(const Taps<float>& t)
      : left(t.lower), right(t.upper > 0 ? t.lower + 1 : t.lower), p(1 - t.upper), q(t.upper) {}

  // |Up F|^2 at a row of locations, and between it and the next.
  LSLPN_DEVICE float2 norms(const GramTile& gram, int row) const {
    const int a = kTileSide * row + left, b = kTileSide * row + right;
    // Where the weight of the next column is 0, it is not used: it may hold a NaN.
    if (q == 0) return make_float2(gram[0][a], gram[2][a]);
    return make_float2(p * p * gram[0][a] + q * q * gram[0][b] + 2 * p * q * gram[1][a],
                       p * p * gram[2][a] + q * q * gram[2][b] + p * q * gram[3][a]);
  }
};

constexpr int kNone = -kTilePixels;  // the lower tap of a pixel that has no weight for any location

// What a warp knows of its tile.
struct PixelTile {
  std::int64_t image;  // of all images
  int row, column;     // of the tiles of an image
  Segment y, x;
  // Of this lane's row and column of pixels, from the tile's first. Beyond the tile rows have none,
  // columns repeat the last one.
  Taps<float> of_row, of_column;

  LSLPN_DEVICE PixelTile(const Grid& grid, int index, int lane)
      : image(index / grid.tiles()),
        row(index % grid.tiles() / grid.tiles_x.count),
        column(index % grid.tiles_x.count),
        y(grid.tiles_y.segment(row)),
        x(grid.tiles_x.segment(column)),
        of_row(short_taps(grid.y, y.pixel + min(lane, y.pixels - 1))),
        of_column(short_taps(grid.x, x.pixel + min(lane, x.pixels - 1))) {
    of_row.lower = lane < y.pixels ? of_row.lower - y.cell : kNone;
    of_column.lower -= x.cell;
  }
  // How many rows of pixels have a row of locations as their lower tap, and how many of these have
  // no upper tap: they come first. By a whole warp.
  LSLPN_DEVICE int rows_at(int k) const {
    return __popc(__ballot_sync(kAllLanes, of_row.lower == k));
  }
  LSLPN_DEVICE int rows_on(int k) const {
    return __popc(__ballot_sync(kAllLanes, of_row.lower == k && of_row.upper == 0));
  }
  // The first pixel of this lane's column, in the image.
  LSLPN_DEVICE int pixel(const Grid& grid, int lane) const {
    return y.pixel * grid.x.pixels + x.pixel + min(lane, x.pixels - 1);
  }
};

// Ends with a barrier.
LSLPN_DEVICE void put_rows(const PixelTile& tile, int lane, RowTaps& rows) {
  const float upper = tile.of_row.upper, rest = 1 - upper;
  rows[lane] = {upper, rest * rest, upper * upper, 2 * upper * rest};
  __syncwarp();
}

// Calls f(first row, number of rows as a constant) for rows y .. end - 1, kRows at a time and the
// rest one by one.
template <int kRows, class F>
LSLPN_DEVICE void by_rows(int y, int end, F f) {
  LSLPN_NO_UNROLL
  for (; y + kRows <= end; y += kRows) f(y, std::integral_constant<int, kRows>());
  LSLPN_NO_UNROLL
  for (; y < end; ++y) f(y, std::integral_constant<int, 1>());
}

constexpr int kPitch = kTilePixels + 4;  // floats of a row in shared memory; avoids bank conflicts

// The weight of a column of pixels at the column of locations that is `right` of its lower tap: in
// Up F, and in |Up F|^2 at a column of locations, and between it and the next.
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
struct Crossed {
  LSLPN_DEVICE static float weight(int right, float upper) {
    return right == 0 ? (1 - upper) * upper : 0;
  }
};

// The taps of a row or column of pixels in shared memory.
struct alignas(8) PixelTap {
  int lower;
  float upper;

  // That of a row or column of locations.
  template <class Weight>
  LSLPN_DEVICE float weight(int location) const {
    return Weight::weight(location - lower, upper);
  }
};
using PixelTaps = PixelTap[kTilePixels];

// Ends with a barrier.
LSLPN_DEVICE void put_columns(const PixelTile& tile, int lane, PixelTaps& taps) {
  taps[lane] = {lane < tile.x.pixels ? tile.of_column.lower : kNone, tile.of_column.upper};
  __syncwarp();
}

// Sums over the columns of a tile, of rows of pixels in shared memory.
template <class Weight>
class ColumnSums {
 public:
  LSLPN_DEVICE ColumnSums(const PixelTaps& taps, int lane) : taps_(taps), lane_(lane) {
    for (int i = 0; i < 8; ++i) {
      weights_[i / 2].set(i % 2, taps[lane % 4 * 8 + i].template weight<Weight>(lane / 4));
    }
  }

  // Of 8 rows and 8 others. With g = lane / 4 and q = lane % 4, a lane passes row g of either, and
  // gets their sums at columns of locations 2q and 2q + 1.
  LSLPN_DEVICE void add_up(const float* first, const float* second, float2 (&sums)[2]) const {
    const int q = lane_ % 4;
    OperandA values[4];
    LSLPN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float4* row = reinterpret_cast<const float4*>(e == 0 ? first : second) + 2 * q;
      for (int k = 0; k < 4; k += 2) {
        const float4 four = row[k / 2];
        values[k].set(e, four.x);
        values[k].set(2 + e, four.y);
        values[k + 1].set(e, four.z);
        values[k + 1].set(2 + e, four.w);
      }
    }
    float sum[4];
    multiply<0>(sum, values, weights_);
    if (!isfinite(sum[0] + sum[1] + sum[2] + sum[3])) {
      // 0 times NaN is NaN: sum anew, without the weights of 0.
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) {
        sum[e] = 0;
        LSLPN_NO_UNROLL
        for (int x = 0; x < kTilePixels; ++x) {
          const float weight = taps_[x].template weight<Weight>(2 * q + e % 2);
          if (weight != 0) sum[e] += weight * (e < 2 ? first : second)[x];
        }
      }
    }
    sums[0] = make_float2(sum[0], sum[1]);
    sums[1] = make_float2(sum[2], sum[3]);
  }

 private:
  const PixelTaps& taps_;
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
