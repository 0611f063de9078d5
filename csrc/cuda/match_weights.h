// Matching backward, from pixels to tiles: gradients of the inner products ("dots") of a tile's
// feature locations with the prototypes of its windows, and of the Gram maps.
#pragma once

#include "scores.h"

namespace lslpn::cuda {
namespace {

constexpr int kPassClasses = 2;  // classes and windows of one pass over the pixels
constexpr int kWindowsAtATime = 4;
constexpr int kPassWindows = kPassClasses * kWindowsAtATime;  // rows of a product
constexpr int kRowsAtATime = 4;                               // rows of pixels loaded ahead

// Shared memory of a warp.
struct alignas(16) WeightMemory {
  GramTile gram;
  RowTaps rows;
  PixelTaps columns;
  float dots[kTileSide][kPassWindows][kPitch];  // gradients by row of locations, class and window
  float norms[2][kTileSide][kPitch];            // gradients of |u|^2 at the rows, and between them
};

// Gradients of a tile's dots and Gram maps from those of its pixels. kLoss: from what
// `cross_entropy` has written, times `factor`, the incoming gradient over the sum of the weights.
template <bool kMean, bool kLoss>
struct TileGradients {
  const MatchTiles& p;
  WeightMemory& memory;
  const PixelTile& tile;
  const int lane;
  const std::int64_t image;
  float* const maps;
  const float factor;

  LSLPN_DEVICE std::int64_t plane() const {
    return static_cast<std::int64_t>(p.grid.y.pixels) * p.grid.x.pixels;
  }
  // The first pixel of this lane's column in one of the planes of all images.
  LSLPN_DEVICE std::int64_t pixel(std::int64_t of) const {
    return of * plane() + tile.pixel(p.grid, lane);
  }

  LSLPN_DEVICE void read_gram() const {
    const std::int64_t size = static_cast<std::int64_t>(p.grid.y.cells) * p.grid.x.cells;
    const float* from = p.gram + image * kGramMaps * size;
    for (int e = lane; e < kTileSide * kTileSide; e += kWarp) {
      const int r = min(e / kTileSide, tile.y.cells - 1);
      const int c = min(e % kTileSide, tile.x.cells - 1);
      const float* at = from + (tile.y.cell + r) * p.grid.x.cells + tile.x.cell + c;
      for (int k = 0; k < kGramMaps; ++k) memory.gram[k][e] = at[k * size];
    }
    __syncwarp();
  }

  // Sums over the pixels of this lane's column, for classes c0 and c0 + 1 and windows w0 .. w0 + 3
  // of the tile. A window's dots get dS / |u| of the pixels that it wins, or of all pixels for the
  // mean. |u|^2 = w^T G w gets -1/2 sum over c of dS S / |u|^2, here without the -1/2, in the
  // passes of the first windows; a logit scale is in the scores already.
  LSLPN_DEVICE void sum_down(int c0, int w0, int windows) const {
    const bool second = c0 + 1 < p.C, measures = w0 == 0 && (!kLoss || c0 == 0);
    const PixelColumn column(tile.of_column);
    const float share = factor * p.logit_scale /
                        (kMean ? static_cast<float>(tile.y.windows * tile.x.windows) : 1.0f);
    std::int64_t down[kRowsAtATime + 1],
        bytes[kRowsAtATime + 1];  // offsets of rows, uint8 and float
    for (int k = 0; k <= kRowsAtATime; ++k) {
      down[k] = kept(std::int64_t{k} * p.grid.x.pixels);
      bytes[k] = kept(4 * down[k]);
    }
    // With a loss the gradient of the first class is minus the sum of the others.
    const float sign = kLoss && c0 == 0 ? -1.0f : 1.0f;
    const float *grads[kPassClasses], *scores[kPassClasses];
    const std::uint8_t* winners[kPassClasses];
    for (int e = 0; e < kPassClasses; ++e) {
      const int c = min(c0 + e, p.C - 1);
      const std::int64_t at = pixel(image * p.C + c);
      grads[e] = kLoss ? p.scores + pixel(image * (p.C - 1) + max(c - 1, 0)) : p.grad + at;
      scores[e] = kLoss ? p.loss.radial + pixel(image) : p.scores + at;
      winners[e] = kMean ? nullptr : p.winners + at;
    }
    std::uint16_t place[kWindowsAtATime];
    for (int e = 0; e < kWindowsAtATime; ++e) {
      place[e] =
          static_cast<std::uint16_t>(w0 + e < windows ? p.place(w0 + e, tile.x.windows) : -1);
    }
    float here[kPassClasses][kWindowsAtATime], next[kPassClasses][kWindowsAtATime] = {};
    float carried = 0;
    float2 norms = column.norms(memory.gram, 0);
    int y = 0;
    LSLPN_NO_UNROLL
    for (int row = 0; row < kTileSide; ++row) {
      for (int e = 0; e < kPassWindows; ++e) {
        float& from = next[e / kWindowsAtATime][e % kWindowsAtATime];
        here[e / kWindowsAtATime][e % kWindowsAtATime] = p.grid.tiles_y.between ? from : 0;
        from = 0;
      }
      float of_row = p.grid.tiles_y.between ? carried : 0, between = 0;
      carried = 0;
      const int end = y + tile.rows_at(row);
      const float2 next_norms = column.norms(memory.gram, min(row + 1, kTileSide - 1));
      const Norm norm{norms.x, next_norms.x, norms.y};
      norms = next_norms;
      by_rows<kRowsAtATime>(y, end, [&](int begin, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        float gradient[kPassClasses][kRows], product[kRows] = {};
        std::uint16_t winner[kPassClasses][kRows];
        LSLPN_UNROLL
        for (int e = 0; e < kPassClasses; ++e) {
          for (int k = 0; k < kRows; ++k) {
            gradient[e][k] = read(grads[e], bytes[k]);
            winner[e][k] = kMean ? 0 : read(winners[e], down[k]);
          }
        }
        if (kLoss && c0 == 0) {
          for (int other = 1; other < p.C - 1; ++other) {
            for (int k = 0; k < kRows; ++k) {
              gradient[0][k] += read(grads[0] + other * plane(), bytes[k]);
            }
          }
        }
        if (measures) {
          for (int k = 0; k < kRows; ++k) {
            product[k] = (kLoss ? factor : gradient[0][k]) * read(scores[0], bytes[k]);
          }
          if (!kLoss && second) {
            for (int k = 0; k < kRows; ++k) {
              product[k] += gradient[1][k] * read(scores[1], bytes[k]);
            }
          }
        }
        LSLPN_UNROLL
        for (int k = 0; k < kRows; ++k) {
          const RowTap t = memory.rows[begin + k];
          const float square = norm.square(t), scale = Norm::inverse_length(square);
          // A feature shorter than eps gets no gradient, not even NaN.
          const float radial = square < eps_squared<float>() ? 0 : product[k] * (scale * scale);
          of_row += radial * t.here;
          carried += radial * t.next;
          between += radial * t.between;
          const float inverse = scale * share, lower = 1 - t.upper;
          for (int e = 0; e < kPassWindows; ++e) {
            const int c = e / kWindowsAtATime, w = e % kWindowsAtATime;
            add_if_equal(winner[c][k], place[w], lower, t.upper,
                         gradient[c][k] * (c == 0 ? sign * inverse : inverse), here[c][w],
                         next[c][w]);
          }
        }
        for (int e = 0; e < kPassClasses; ++e) {
          grads[e] = at_byte(grads[e], bytes[kRows]);
          scores[e] = at_byte(scores[e], bytes[kRows]);
          winners[e] += down[kRows];
        }
      });
      y = end;
      for (int e = 0; e < kPassWindows; ++e) {
        memory.dots[row][e][lane] = here[e / kWindowsAtATime][e % kWindowsAtATime];
      }
      if (c0 + w0 > 0) {
        of_row += memory.norms[0][row][lane];
        between += memory.norms[1][row][lane];
      }
      memory.norms[0][row][lane] = of_row;
      memory.norms[1][row][lane] = between;
    }
    __syncwarp();
  }

  LSLPN_DEVICE void run() const {
    read_gram();
    const int g = lane / 4, q = lane % 4, windows = kMean ? 1 : tile.y.windows * tile.x.windows;
    const ColumnSums<Linear> columns(memory.columns, lane);
    float2 sums[2];
    LSLPN_NO_UNROLL
    for (int c0 = 0; c0 < p.C; c0 += kPassClasses) {
      LSLPN_NO_UNROLL
      for (int w0 = 0; w0 < windows; w0 += kWindowsAtATime) {
        sum_down(c0, w0, windows);
        const int c = c0 + g / kWindowsAtATime, w = w0 + g % kWindowsAtATime;
        const int wx = tile.x.windows;
        const int slot =
            !kMean ? c * p.grid.tile_windows() + w / wx * p.grid.tiles_x.windows + w % wx : c;
        const bool there = c < p.C && w < windows;
        LSLPN_UNROLL
        for (int r = 0; r < kTileSide; r += 2) {
          columns.add_up(memory.dots[r][g], memory.dots[r + 1][g], sums);
          for (int e = 0; e < 2; ++e) {
            if (there) put_sums(maps + slot * kMap, r + e, q, sums[e]);
          }
        }
        __syncwarp();
      }
    }
    // Of own and right from the sums at rows, of below and the diagonals from those between rows.
    const int row = min(g, kTileSide - 1);
    const auto put = [&](int map, float factor) {
      for (int e = 0; e < 2; ++e) {
        const float scaled = e == 0 ? factor : -0.5f;
        put_sums(maps + (p.tile_maps - 4 + map + 2 * e) * kMap, g, q,
                 make_float2(scaled * sums[e].x, scaled * sums[e].y));
      }
    };
    ColumnSums<Squared>(memory.columns, lane)
        .add_up(memory.norms[0][row], memory.norms[1][row], sums);
    put(0, -0.5f);
    ColumnSums<Crossed>(memory.columns, lane)
        .add_up(memory.norms[0][row], memory.norms[1][row], sums);
    put(1, -1.0f);
  }
};

// One warp per tile.
template <bool kMean, bool kLoss>
LSLPN_KERNEL(kPixelThreads, 3)
match_weights(LSLPN_PARAMETERS MatchTiles p) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int index = block_index() * kPixelWarps + warp;
  if (index >= p.all_tiles()) return;
  WeightMemory& memory = reinterpret_cast<WeightMemory*>(shared_memory())[warp];
  const PixelTile tile(p.grid, index, lane);
  put_rows(tile, lane, memory.rows);
  put_columns(tile, lane, memory.columns);
  // Where all pixels are ignored the gradient is 0.
  const float factor = !kLoss ? 1.0f : *p.loss.total == 0 ? 0.0f : *p.loss.grad / *p.loss.total;
  float* const maps = p.maps + std::int64_t{index} * p.tile_maps * kMap;
  TileGradients<kMean, kLoss>{p, memory, tile, lane, tile.image, maps, factor}.run();
}

}  // namespace
}  // namespace lslpn::cuda
