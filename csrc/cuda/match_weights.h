// Matching backward, from pixels to tiles: gradients of the inner products of a tile's feature
// locations with the prototypes of its windows, and of the Gram maps.
#pragma once

#include "scores.h"

namespace lslpn::cuda {
namespace {

constexpr int kWindowsAtATime = 4;
constexpr int kRowsAtATime = 4;  // rows of pixels on their way

// Shared memory of a warp.
struct alignas(16) WeightMemory {
  float4 gram[kTileSide * kTileSide];
  float inverse[kTilePixels][kTilePixels];  // logit_scale / |u| of every pixel
  float board[kTileSide][kWindowsAtATime][kTilePixels + 1];
  RowTaps rows;
  ColumnWeights weights;
};

// Gradients of a tile's dots and Gram maps from those of its pixels. kLoss: these are made of what
// `cross_entropy` has left, and the factor is that of the loss.
template <bool kMean, bool kLoss>
struct TileGradients {
  const MatchTiles& p;
  WeightMemory& memory;
  const PixelTile& tile;
  const ColumnSums& columns;
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
      const int r = minimum(e / kTileSide, tile.y.cells - 1);
      const int c = minimum(e % kTileSide, tile.x.cells - 1);
      const float* at = from + (tile.y.cell + r) * p.grid.x.cells + tile.x.cell + c;
      memory.gram[e] = make_float4(at[0], at[size], at[2 * size], at[3 * size]);
    }
    warp_barrier();
  }

  // Norms: |u|^2 = w^T G w gets -1/2 sum over c of dS S / |u|^2; any scale is in the scores.
  LSLPN_DEVICE void norms() const {
    const Column column(tile.taps);
    const float pp = column.p * column.p, qq = column.q * column.q, pq = column.p * column.q;
    const auto at = [&](int r) {
      const float4 a = memory.gram[kTileSide * r + column.left];
      const float4 b = memory.gram[kTileSide * r + column.right];
      if (qq == 0) return make_float2(a.x, a.z);  // as in Scorer
      return make_float2(pp * a.x + qq * b.x + 2 * pq * a.y, pp * a.z + qq * b.z + pq * a.w);
    };
    const float share =
        kMean ? factor / static_cast<float>(tile.y.windows * tile.x.windows) : factor;
    Norm norm;
    const float* grad = p.grad + pixel(image * p.C);
    const float* scores = kLoss ? p.loss.radial + pixel(image) : p.scores + pixel(image * p.C);
    const std::int64_t plane = this->plane(), down = kept(p.grid.x.pixels);
    float carried = 0;
    int y = 0;
    LSLPN_NO_UNROLL
    for (int row = 0; row < kTileSide; ++row) {
      float sum = p.grid.tiles_y.between ? carried : 0, between = 0;
      carried = 0;
      const int end = y + tile.rows_at(row);
      if (y < end) {
        const float2 here = at(row);
        norm.row = here.x;
        norm.between = here.y;
        norm.next = at(minimum(row + 1, kTileSide - 1)).x;
      }
      by_rows<kRowsAtATime>(y, end, [&](int begin, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        float product[kRows] = {};
        std::int64_t here = begin * p.grid.x.pixels;
        LSLPN_NO_UNROLL
        for (int c = 0; c < (kLoss ? 1 : p.C); ++c, here += plane) {
          LSLPN_UNROLL
          for (int k = 0; k < kRows; ++k) {
            const float score = (scores + here)[k * down];
            product[k] += (kLoss ? factor : (grad + here)[k * down]) * score;
          }
        }
        LSLPN_UNROLL
        for (int k = 0; k < kRows; ++k) {
          const int at_y = begin + k;
          const float upper = memory.rows[at_y].upper, lower = 1 - upper;
          const float square = norm.square(upper), scale = Norm::inverse_length(square);
          memory.inverse[at_y][lane] = scale * p.logit_scale * share;
          // Where there is no direction there is no gradient, whatever comes in.
          const float gradient =
              square < eps_squared<float>() ? 0 : -0.5f * product[k] * scale * scale;
          sum += gradient * lower * lower;
          carried += gradient * upper * upper;
          between += gradient * 2 * lower * upper;
        }
      });
      y = end;
      memory.board[row][0][lane] = sum;
      memory.board[row][1][lane] = between;
    }
    warp_barrier();
    // own and right from the rows' sums, below and the diagonals from those between them
    const int e = lane / 8, j = lane % 8;
    const float* other = columns.weight + (e % 2 ? kTilePixels + 1 : 0);
    const Range range = e % 2 ? columns.between : columns.touching;
    float sum[kTileSide] = {};
    LSLPN_NO_UNROLL
    for (int x = range.begin; x < range.end; ++x) {
      const float weight = columns.weight[x] * other[x] * (e == 1 ? 2.0f : 1.0f);
      LSLPN_UNROLL
      for (int r = 0; r < kTileSide; ++r) sum[r] += weight * memory.board[r][e / 2][x];
    }
    put(p.slots - 4 + e, j, sum);
    warp_barrier();
  }

  LSLPN_DEVICE void put(int slot, int j, const float (&sum)[kTileSide]) const {
    float* map = maps + slot * kMap + j;
    LSLPN_UNROLL
    for (int r = 0; r < kTileSide; ++r) {
      if (j < kTileSide) map[kTileSide * r] = sum[r];
    }
    if (j < kMap - kTileSide * kTileSide) map[kTileSide * kTileSide] = 0;
  }

  // Dots of class c: dS / |u| of the pixels whose winner the window is, or of all alike.
  LSLPN_DEVICE void dots(int c) const {
    const int windows = kMean ? 1 : tile.y.windows * tile.x.windows;
    const float* grad = kLoss ? p.scores + pixel(image * (p.C - 1) + maximum(c - 1, 0))
                              : p.grad + pixel(image * p.C + c);
    // The first class has minus the sum of the others.
    const float sign = kLoss && c == 0 ? -1.0f : 1.0f;
    const std::int64_t down = kept(p.grid.x.pixels);
    const std::uint8_t* winners = kMean ? nullptr : p.winners + pixel(image * p.C + c);
    LSLPN_NO_UNROLL
    for (int w0 = 0; w0 < windows; w0 += kWindowsAtATime) {
      int place[kWindowsAtATime];
      LSLPN_UNROLL
      for (int e = 0; e < kWindowsAtATime; ++e) {
        place[e] = w0 + e < windows ? p.place(w0 + e, tile.x.windows) : -1;
      }
      float here[kWindowsAtATime], next[kWindowsAtATime] = {};
      int y = 0;
      LSLPN_NO_UNROLL
      for (int row = 0; row < kTileSide; ++row) {
        LSLPN_UNROLL
        for (int e = 0; e < kWindowsAtATime; ++e) {
          here[e] = p.grid.tiles_y.between ? next[e] : 0;
          next[e] = 0;
        }
        const int end = y + tile.rows_at(row);
        by_rows<kRowsAtATime>(y, end, [&](int begin, auto rows) {
          constexpr int kRows = decltype(rows)::value;
          const std::int64_t at = begin * p.grid.x.pixels;
          float gradient[kRows];
          int winner[kRows];
          LSLPN_UNROLL
          for (int k = 0; k < kRows; ++k) {
            gradient[k] = (grad + at)[k * down];
            winner[k] = kMean ? 0 : (winners + at)[k * down];
          }
          if (kLoss && c == 0) {
            for (int other = 1; other < p.C - 1; ++other) {
              LSLPN_UNROLL
              for (int k = 0; k < kRows; ++k) {
                gradient[k] += (grad + (other * plane() + at))[k * down];
              }
            }
          }
          LSLPN_UNROLL
          for (int k = 0; k < kRows; ++k) {
            const float upper = memory.rows[begin + k].upper, lower = 1 - upper;
            const float scaled = sign * gradient[k] * memory.inverse[begin + k][lane];
            LSLPN_UNROLL
            for (int e = 0; e < kWindowsAtATime; ++e) {
              add_if_equal(winner[k], place[e], lower, upper, scaled, here[e], next[e]);
            }
          }
        });
        y = end;
        LSLPN_UNROLL
        for (int e = 0; e < kWindowsAtATime; ++e) memory.board[row][e][lane] = here[e];
      }
      warp_barrier();
      const int e = lane / 8;
      float sum[kTileSide] = {};
      LSLPN_NO_UNROLL
      for (int x = columns.touching.begin; x < columns.touching.end; ++x) {
        const float weight = columns.weight[x];
        LSLPN_UNROLL
        for (int r = 0; r < kTileSide; ++r) sum[r] += weight * memory.board[r][e][x];
      }
      const int w = w0 + e, wx = tile.x.windows;
      if (w < windows) {
        const int slot =
            !kMean ? c * p.grid.tile_windows() + w / wx * p.grid.tiles_x.windows + w % wx : c;
        put(slot, lane % 8, sum);
      }
      warp_barrier();
    }
  }
};

// A warp for each tile; those after them measure a prototype each.
template <bool kMean, bool kLoss>
LSLPN_KERNEL(kPixelThreads, 4)
match_weights(LSLPN_PARAMETERS MatchTiles p) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  if (block_index() >= p.tile_blocks) {
    const std::int64_t e = (block_index() - p.tile_blocks) * kPixelWarps + warp;
    if (e >= p.prototype_count) return;
    const std::int64_t prototype = p.first_prototype + e;
    float square = 0;
    for (int d = lane; d < p.D; d += kWarp) {
      const float value = p.prototypes[prototype * p.D + d];
      square += value * value;
    }
    for (int step = 16; step > 0; step /= 2) square += shuffle_xor(square, step);
    const float scale = square < eps_squared<float>() ? 0 : inverse_sqrt(square);
    if (lane == 0) p.inverse_lengths[prototype] = scale;
    return;
  }
  const std::int64_t index = block_index() * kPixelWarps + warp;
  if (index >= p.images * p.grid.tiles()) return;
  const std::int64_t image = index / p.grid.tiles();
  WeightMemory& memory = reinterpret_cast<WeightMemory*>(shared_memory())[warp];
  const PixelTile tile(p.grid, static_cast<int>(index - image * p.grid.tiles()), lane, memory.rows);
  const ColumnSums columns(tile, lane, memory.weights);
  // Where no pixel counts there is no gradient.
  const float factor = !kLoss ? 1.0f : *p.loss.total == 0 ? 0.0f : *p.loss.grad / *p.loss.total;
  const TileGradients<kMean, kLoss> gradients{
      p,     memory, tile, columns, lane, p.first_image + image, p.maps + index * p.slots * kMap,
      factor};
  gradients.read_gram();
  gradients.norms();
  LSLPN_NO_UNROLL
  for (int c = 0; c < p.C; ++c) gradients.dots(c);
}

}  // namespace
}  // namespace lslpn::cuda
