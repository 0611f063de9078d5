// Matching forward: scores and winners of the pixels of a tile, interpolated from the inner
// products of its feature locations with the prototypes of its windows and with each other.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {
namespace {

struct MatchTiles : Exchange, Matching {
  float* loss_sums;  // forward with a loss: [B, N, tiles, 2] of losses and weights

  // The number that winners have for the w-th window of a tile.
  LSLPN_DEVICE int place(int w, int windows_x) const {
    return w / windows_x * overlap_x + w % windows_x;
  }
};

// For tiles of at most kWindows windows: classes of one pass over the channels, and products of 8
// (class, window) pairs that these take.
template <int kWindows>
constexpr int kClassesAtATime = kWindows == 4 ? 2 : 1;
template <int kWindows>
constexpr int kProducts = kClassesAtATime<kWindows> * kWindows / 8;

template <int kWindows>
struct alignas(16) ScoreMemory {
  float dots[kLocationsOfBlocks][8 * kProducts<kWindows> + 4];
  GramTile gram[2];  // the second of `other` alone
  RowTaps rows;
};

template <class T>
struct ScoreKernel {
  MatchTiles match;
  Images<const T> features;
  bool fours;  // whether four channels of a location can be read at once
};

// Inner products over all channels, 16 at a time, of a tile's locations with the prototypes of a
// pass and with each other. A lane loads channels 4q .. 4q + 3 of location g of each block of 8,
// and of prototype g of each product.
template <class T, int kWindows>
struct Dots {
  float dots[3][kProducts<kWindows>][4] = {};  // [t]: blocks 2t and 2t + 1 of locations
  float gram[kLocationBlocks][4] = {};         // [k]: blocks k and k + 1 with block k
  float squares[kProducts<kWindows>] = {};     // of the loaded channels of the prototypes

  // Adds 16 channels.
  LSLPN_DEVICE void add(const T* const (&features)[kLocationBlocks], std::int64_t channel,
                        bool fours, const float* const (&prototypes)[kProducts<kWindows>],
                        bool first) {
    Pack<T, 4> raw[kLocationBlocks];
    if (fours) {
      for (int k = 0; k < kLocationBlocks; ++k) raw[k] = read_pack<4>(features[k]);
    } else {
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) {
        for (int k = 0; k < kLocationBlocks; ++k) raw[k].value[e] = read(features[k], e * channel);
      }
    }
    Pack<float, 4> p[kProducts<kWindows>];
    for (int j = 0; j < kProducts<kWindows>; ++j) {
      p[j] = read_pack<4>(prototypes[j]);
    }
    Operand<4> f[kLocationBlocks];
    LSLPN_UNROLL
    for (int k = 0; k < kLocationBlocks; ++k) {
      for (int e = 0; e < 4; ++e) set_feature(f[k], e, raw[k].value[e]);
    }
    LSLPN_UNROLL
    for (int j = 0; j < kProducts<kWindows>; ++j) {
      Operand<4> q;
      for (int e = 0; e < 4; ++e) {
        q.set(e, p[j].value[e]);
        squares[j] += p[j].value[e] * p[j].value[e];
      }
      LSLPN_UNROLL
      for (int t = 0; t < 3; ++t) {
        const Operand<4>& bottom = f[min(2 * t + 1, kLocationBlocks - 1)];
        float sum[4];
        multiply<kHalf<T>, 2>(sum, {rows(f[2 * t], bottom, 0), rows(f[2 * t], bottom, 1)},
                              {columns(q, 0), columns(q, 1)});
        for (int e = 0; e < 4; ++e) dots[t][j][e] += sum[e];
      }
    }
    if (!first) return;
    LSLPN_UNROLL
    for (int k = 0; k < kLocationBlocks; ++k) {
      const Operand<4>& bottom = f[min(k + 1, kLocationBlocks - 1)];
      float sum[4];
      multiply<2 * kHalf<T>, 2>(sum, {rows(f[k], bottom, 0), rows(f[k], bottom, 1)},
                                {columns(f[k], 0), columns(f[k], 1)});
      for (int e = 0; e < 4; ++e) gram[k][e] += sum[e];
    }
  }

  // The operands of channels 2h and 2h + 1.
  LSLPN_DEVICE static OperandA rows(const Operand<4>& top, const Operand<4>& bottom, int h) {
    return {{top.high[2 * h], bottom.high[2 * h], top.high[2 * h + 1], bottom.high[2 * h + 1]},
            {top.low[2 * h], bottom.low[2 * h], top.low[2 * h + 1], bottom.low[2 * h + 1]}};
  }
  LSLPN_DEVICE static OperandB columns(const Operand<4>& of, int h) {
    return {{of.high[2 * h], of.high[2 * h + 1]}, {of.low[2 * h], of.low[2 * h + 1]}};
  }

  // Writes the sums to shared memory, those with prototypes divided by their lengths.
  LSLPN_DEVICE void put(ScoreMemory<kWindows>& memory, int lane, bool first) const {
    const int g = lane / 4, q = lane % 4;
    LSLPN_UNROLL
    for (int j = 0; j < kProducts<kWindows>; ++j) {
      float square = squares[j] + __shfl_xor_sync(kAllLanes, squares[j], 1);
      square += __shfl_xor_sync(kAllLanes, square, 2);
      const float scale = Norm::inverse_length(square);
      const float left = __shfl_sync(kAllLanes, scale, 8 * q);
      const float right = __shfl_sync(kAllLanes, scale, 8 * q + 4);
      for (int k = 0; k < kLocationBlocks; ++k) {
        const float (&dot)[4] = dots[k / 2][j];
        *reinterpret_cast<float2*>(&memory.dots[8 * k + g][8 * j + 2 * q]) =
            make_float2(left * dot[k % 2 * 2], right * dot[k % 2 * 2 + 1]);
      }
    }
    if (!first) return;
    // A lane has <F(l), F(l + distance)> for l = 8 k + 2 q + e.
    LSLPN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int distance = g - 2 * q - e % 2 + (e < 2 ? 0 : 8);
      const int kind = distance == 0               ? 0
                       : distance == 1             ? 1
                       : distance == kTileSide     ? 2
                       : distance == kTileSide + 1 ? 3
                       : distance == kTileSide - 1 ? 4
                                                   : -1;
      if (kind < 0) continue;
      for (int k = 0; k < kLocationBlocks; ++k) {
        memory.gram[kind / 4][kind % 4][8 * k + 2 * q + e % 2] = gram[k][e];
      }
    }
    __syncwarp();
    // The other diagonal, of location l + 1 with the one below l.
    for (int l = lane; l < kMap; l += kWarp) memory.gram[0][3][l] += memory.gram[1][0][l + 1];
  }
};

// Writes the Gram maps for the backward pass. Each location is written by the first tile that has
// it and its neighbours.
LSLPN_DEVICE void keep_gram(const MatchTiles& p, const PixelTile& tile, const GramTile& gram,
                            int lane) {
  const auto to_next = [](const Tiles& tiles, int k) {
    return tiles.segment(k + 1).cell - tiles.segment(k).cell;
  };
  const int height = to_next(p.grid.tiles_y, tile.row);
  const int width = to_next(p.grid.tiles_x, tile.column);
  const std::int64_t size = static_cast<std::int64_t>(p.grid.y.cells) * p.grid.x.cells;
  float* maps =
      p.gram + (tile.image * kGramMaps * size + tile.y.cell * p.grid.x.cells + tile.x.cell);
  for (int e = lane; e < height * width; e += kWarp) {
    const int r = e / width, c = e - r * width;
    for (int k = 0; k < kGramMaps; ++k) {
      maps[k * size + r * p.grid.x.cells + c] = gram[k][kTileSide * r + c];
    }
  }
}

// Scores and winners of the classes of a pass for the pixels of a tile.
template <int kWindows>
struct Scorer {
  static constexpr int kClasses = kClassesAtATime<kWindows>;
  using Row = float[kClasses][kWindows];  // dots interpolated to a column, at a row of locations

  const MatchTiles& p;
  const PixelTile& tile;
  const ScoreMemory<kWindows>& memory;
  const PixelColumn column;
  float* scores[kClasses];          // of the next pixel
  std::uint8_t* winners[kClasses];  // or null

  LSLPN_DEVICE void enter(Row& row, int r) const {
    const float* left = memory.dots[kTileSide * r + column.left];
    const float* right = memory.dots[kTileSide * r + column.right];
    const int windows = tile.y.windows * tile.x.windows;
    LSLPN_UNROLL
    for (int k = 0; k < kClasses * kWindows; k += 4) {
      const float4 a = *reinterpret_cast<const float4*>(left + k);
      const float4 b = *reinterpret_cast<const float4*>(right + k);
      const float value[4] = {column.p * a.x + column.q * b.x, column.p * a.y + column.q * b.y,
                              column.p * a.z + column.q * b.z, column.p * a.w + column.q * b.w};
      for (int e = 0; e < 4; ++e) row[(k + e) / kWindows][(k + e) % kWindows] = value[e];
    }
    if (!p.mean) return;
    // The mean over windows commutes with interpolation.
    LSLPN_UNROLL
    for (int c = 0; c < kClasses; ++c) {
      float sum = 0;
      for (int w = 0; w < kWindows; ++w) sum += w < windows ? row[c][w] : 0;
      for (int w = 0; w < kWindows; ++w) row[c][w] = sum / static_cast<float>(windows);
    }
  }

  // The pixels of this lane's column in rows y .. end - 1, which have the same taps.
  LSLPN_DEVICE void pixels(const Row& here, const Row& slope, const Norm& norm,
                           const int (&place)[kWindows], int y, int end) {
    const std::int64_t down = kept(std::int64_t{p.grid.x.pixels}), bytes = kept(4 * down);
    const bool keeps = p.winners;
    const float logit_scale = p.logit_scale;
    by_rows<4>(y, end, [&](int begin, auto rows) {
      LSLPN_UNROLL
      for (int k = 0; k < decltype(rows)::value; ++k) {
        const RowTap t = memory.rows[begin + k];
        const float square = t.here * norm.row + t.next * norm.next + t.between * norm.between;
        const float scale = Norm::inverse_length(square) * logit_scale;
        float best[kClasses];
        int winner[kClasses] = {};
        LSLPN_UNROLL
        for (int c = 0; c < kClasses; ++c) {
          best[c] = here[c][0] + t.upper * slope[c][0];
          // Of equal scores the first window wins. NaN stays NaN.
          for (int w = 1; w < kWindows; ++w) {
            const float value = here[c][w] + t.upper * slope[c][w];
            winner[c] = value > best[c] ? place[w] : winner[c];
            best[c] = max_or_nan(best[c], value);
          }
        }
        const float all = best[0] + best[kClasses - 1];
        if (all != all) {
          // The gradient goes to the window whose score is NaN.
          LSLPN_UNROLL
          for (int c = 0; c < kClasses; ++c) {
            for (int w = 0; w < kWindows; ++w) {
              const float value = here[c][w] + t.upper * slope[c][w];
              if (value != value && place[w] >= 0) winner[c] = place[w];
            }
          }
        }
        for (int c = 0; c < kClasses; ++c) {
          *scores[c] = best[c] * scale;
          scores[c] = at_byte(scores[c], bytes);
        }
        if (keeps) {
          for (int c = 0; c < kClasses; ++c) {
            *winners[c] = static_cast<std::uint8_t>(winner[c]);
            winners[c] += down;
          }
        }
      }
    });
  }

  // All pixels of this lane's column.
  LSLPN_DEVICE void column_pixels() {
    const int windows = tile.y.windows * tile.x.windows;
    int place[kWindows];
    for (int w = 0; w < kWindows; ++w) {
      place[w] = w < windows ? p.place(w, tile.x.windows) : -1;
    }
    Norm norm{};
    Row here, next, slope;
    int y = 0;
    bool known = false;  // whether `next` is of the next row
    LSLPN_NO_UNROLL
    for (int row = 0; row < tile.y.cells; ++row) {
      const int on = tile.rows_on(row), all = tile.rows_at(row);
      norm.row = known ? norm.next : column.norms(memory.gram[0], row).x;
      if (!known) enter(next, row);
      LSLPN_UNROLL
      for (int c = 0; c < kClasses; ++c) {
        for (int w = 0; w < kWindows; ++w) here[c][w] = next[c][w];
      }
      // First the pixels without an upper tap: the next row may hold a NaN that must not reach
      // them.
      LSLPN_NO_UNROLL
      for (int between = 0; between < 2; ++between) {
        const int count = between ? all - on : on;
        known = between && count > 0;
        if (count == 0) continue;
        if (between) {
          norm.next = column.norms(memory.gram[0], row + 1).x;
          norm.between = column.norms(memory.gram[0], row).y;
          enter(next, row + 1);
        } else {
          norm.next = norm.between = 0;
        }
        LSLPN_UNROLL
        for (int c = 0; c < kClasses; ++c) {
          for (int w = 0; w < kWindows; ++w) slope[c][w] = between ? next[c][w] - here[c][w] : 0;
        }
        pixels(here, slope, norm, place, y, y + count);
        y += count;
      }
    }
  }
};

// The cross-entropy of a tile. Its lanes have written the logits of their columns of pixels, those
// of class 0 to `radial`, the others to `scores`, and replace them by what the backward pass reads.
LSLPN_DEVICE void cross_entropy(const MatchTiles& p, const PixelTile& tile, int index, int lane) {
  const std::int64_t plane = static_cast<std::int64_t>(p.grid.y.pixels) * p.grid.x.pixels;
  std::int64_t at = tile.image * plane + tile.pixel(p.grid, lane);
  float sum = 0, total = 0;
  const int rows = lane < tile.x.pixels ? tile.y.pixels : 0;
  LSLPN_NO_UNROLL
  for (int y = 0; y < rows; ++y, at += p.grid.x.pixels) {
    float* const slopes = p.scores + (at + tile.image * (p.C - 2) * plane);
    const std::int64_t label = p.loss.wide_labels
                                   ? static_cast<const std::int64_t*>(p.loss.labels)[at]
                                   : static_cast<const std::uint8_t*>(p.loss.labels)[at];
    const bool counts = label != p.loss.ignore_index;
    const bool known = static_cast<std::uint64_t>(label) < static_cast<std::uint64_t>(p.C);
    const int right = known ? static_cast<int>(label) : 0;
    float weight = p.loss.weight ? p.loss.weight[right] : 1.0f;
    weight = !counts ? 0.0f : known ? weight : NAN;
    // Logits minus that of class 0, whose difference is 0.
    const float first = p.loss.radial[at];
    float most = 0, exponentials = 1, of_right = 0;
    const float* from = slopes;
    LSLPN_NO_UNROLL
    for (int c = 1; c < p.C; ++c, from += plane) {
      const float z = *from - first, above = z - most;
      const float ratio = __expf(above > 0 ? -above : above);
      exponentials = above > 0 ? exponentials * ratio + 1 : exponentials + ratio;
      most = above > 0 ? z : most;
      of_right = c == right ? z : of_right;
    }
    if (counts) sum += weight * (logf(exponentials) + (most - of_right));
    total += weight;
    const float share = __fdividef(weight, exponentials);
    float radial = 0;
    float* to = slopes;
    LSLPN_NO_UNROLL
    for (int c = 1; c < p.C; ++c, to += plane) {
      const float z = *to - first;
      const float slope = share * __expf(z - most) - (c == right ? weight : 0.0f);
      radial += slope * z;  // sum_c g_c z_c, for the g_c of all classes sum to 0
      *to = slope;
    }
    p.loss.radial[at] = radial;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
    total += __shfl_xor_sync(kAllLanes, total, step);
  }
  if (lane == 0)
    *reinterpret_cast<float2*>(p.loss_sums + 2 * std::int64_t{index}) = make_float2(sum, total);
}

// One warp per tile.
template <class T, int kWindows>
LSLPN_KERNEL(kPixelThreads, kWindows == 4 ? 3 : 2)
scores(LSLPN_PARAMETERS ScoreKernel<T> kernel) {
  const MatchTiles& p = kernel.match;
  const Images<const T>& features = kernel.features;
  constexpr int kClasses = kClassesAtATime<kWindows>;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int g = lane / 4, q = lane % 4;
  const int index = block_index() * kPixelWarps + warp;  // image and tile
  if (index >= p.all_tiles()) return;
  ScoreMemory<kWindows>& memory = reinterpret_cast<ScoreMemory<kWindows>*>(shared_memory())[warp];
  const PixelTile tile(p.grid, index, lane);
  put_rows(tile, lane, memory.rows);
  const int b = static_cast<int>(tile.image) / p.N;
  const int windows = tile.y.windows * tile.x.windows;
  const std::int64_t channel = std::int64_t{features.d} * int{sizeof(T)};  // bytes
  const T* corner = features.image(static_cast<int>(tile.image)) +
                    (tile.y.cell * features.h + tile.x.cell * features.w + 4 * q * features.d);
  const T* locations[kLocationBlocks];
  for (int k = 0; k < kLocationBlocks; ++k) {
    // Beyond the tile, its last locations are repeated; their results are not used.
    const int l = 8 * k + g;
    const int r = min(l / kTileSide, tile.y.cells - 1);
    const int c = min(l % kTileSide, tile.x.cells - 1);
    locations[k] = corner + (r * features.h + c * features.w);
  }
  LSLPN_NO_UNROLL
  for (int c0 = 0; c0 < p.C; c0 += kClasses) {
    const bool first = c0 == 0;
    const float* prototypes[kProducts<kWindows>];
    LSLPN_UNROLL
    for (int j = 0; j < kProducts<kWindows>; ++j) {
      // Columns that fill up repeat the first window, which wins over its copies, or the last
      // class.
      const int column = 8 * j + g;
      const int c = min(c0 + column / kWindows, p.C - 1);
      const int w = column % kWindows < windows ? column % kWindows : 0;
      const int window = (tile.y.window + w / tile.x.windows) * p.grid.x.windows + tile.x.window +
                         w % tile.x.windows;
      prototypes[j] =
          p.prototypes + ((std::int64_t{b} * p.C + c) * p.grid.windows() + window) * p.D + 4 * q;
    }
    Dots<T, kWindows> dots;
    const auto advance = [&](int channels_16) {
      for (int k = 0; k < kLocationBlocks; ++k) {
        locations[k] = at_byte(locations[k], 16 * channels_16 * channel);
      }
      for (int j = 0; j < kProducts<kWindows>; ++j) prototypes[j] += 16;
    };
    LSLPN_NO_UNROLL
    for (int d = 0; d < p.D; d += 16, advance(1)) {
      dots.add(locations, channel, kernel.fours, prototypes, first);
    }
    advance(-p.D / 16);
    dots.put(memory, lane, first);
    __syncwarp();
    if (p.gram && first) keep_gram(p, tile, memory.gram[0], lane);
    Scorer<kWindows> scorer{p, tile, memory, PixelColumn(tile.of_column), {}, {}};
    LSLPN_UNROLL
    for (int e = 0; e < kClasses; ++e) {
      // Beyond the last class it is repeated, as columns of pixels are.
      const int c = min(c0 + e, p.C - 1);
      const std::int64_t size = static_cast<std::int64_t>(p.grid.y.pixels) * p.grid.x.pixels;
      const std::int64_t at = (tile.image * p.C + c) * size + tile.pixel(p.grid, lane);
      scorer.scores[e] = p.scores + at;
      scorer.winners[e] = p.winners ? p.winners + at : nullptr;
      if (p.loss.radial) {
        // Scores have one plane less in each image: that of class 0 is `radial`.
        scorer.scores[e] = c == 0 ? p.loss.radial + (at - tile.image * (p.C - 1) * size)
                                  : p.scores + (at - (tile.image + 1) * size);
      }
    }
    scorer.column_pixels();
    __syncwarp();
  }
  if (p.loss.radial) cross_entropy(p, tile, index, lane);
}

}  // namespace
}  // namespace lslpn::cuda
