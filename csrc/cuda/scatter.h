// From windows to feature locations: sums over windows of weight times vectors, and for matching
// the gradient of the Gram maps.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

// Derivatives by the Gram maps (own, right, below, the diagonals) of a block's locations, with one
// row above and one column to the left of them.
using GramBlock = float4[kBlock + 1][kBlock + 1];

// Of a product with 8 windows of a tile: one of them, with the map's number at the block's first
// location, and where this location is in the tile.
struct Slot {
  std::int64_t vector, weights;  // where they begin
  float scale;
};
struct Place {
  unsigned rows, columns;  // bits: those of the block that the tile has
  int first;               // of the columns
};

constexpr int kProductsAtATime = 64;

struct ScatterMemory {
  GramBlock gram;
  Slot slots[kProductsAtATime][8];
  Place places[kProductsAtATime];
  Stretch y[kNear], x[kNear];
};

template <class T, bool kPool>
struct Scatterer {
  static constexpr int kChannels = 2;  // 16s of channels that a warp has at a time

  const Exchange& p;
  const Images<const T>& features;
  const Images<T>& to;
  std::int64_t b, n;  // the image
  const float* maps;  // its tiles'
  Range i, j;         // the locations
  Range ty, tx;       // the tiles near them
  const Stretch *y, *x;

  LSLPN_DEVICE const float* map(int row, int column) const {
    const int tile = (ty.begin + row) * p.grid.tiles_x.count + tx.begin + column;
    return maps + static_cast<std::int64_t>(tile) * p.slots * kMap;
  }

  // The Gram maps' derivatives, summed over the tiles.
  LSLPN_DEVICE void find_gram(GramBlock& gram) const {
    for (int e = thread_index(); e < (kBlock + 1) * (kBlock + 1) * 4; e += kExchangeThreads) {
      const int kind = e % 4, column = e / 4 % (kBlock + 1), row = e / 4 / (kBlock + 1);
      float sum = 0;
      for (int r = 0; r < ty.end - ty.begin; ++r) {
        const int at_y = i.begin - 1 + row - y[r].cell;
        if (at_y < 0 || at_y >= y[r].cells) continue;
        for (int c = 0; c < tx.end - tx.begin; ++c) {
          const int at_x = j.begin - 1 + column - x[c].cell;
          if (at_x < 0 || at_x >= x[c].cells) continue;
          sum += map(r, c)[(p.slots - 4 + kind) * kMap + kTileSide * at_y + at_x];
        }
      }
      reinterpret_cast<float*>(&gram[row][column])[kind] = sum;
    }
  }

  // Products of 8 windows that a tile takes.
  LSLPN_DEVICE int products() const { return (p.C * p.grid.tile_windows() + 7) / 8; }

  // Finds what the products from `first` on are of, as many as fit.
  LSLPN_DEVICE void find_slots(int first, ScatterMemory& memory) const {
    const int all = (ty.end - ty.begin) * (tx.end - tx.begin) * products();
    for (int e = thread_index(); e < 8 * kProductsAtATime && first + e / 8 < all;
         e += kExchangeThreads) {
      const int tile = (first + e / 8) / products();
      const int row = tile / (tx.end - tx.begin), column = tile - row * (tx.end - tx.begin);
      const Stretch here_y = y[row], here_x = x[column];
      const int windows = here_y.windows * here_x.windows, count = p.C * windows;
      const int mine = 8 * ((first + e / 8) % products()) + e % 8;
      // Those that fill up have any window, and no weight.
      const int c = minimum(mine, count - 1) / windows, w = minimum(mine, count - 1) - c * windows;
      const int wy = w / here_x.windows;
      const int window =
          (here_y.window + wy) * p.grid.x.windows + here_x.window + w - wy * here_x.windows;
      const std::int64_t image = kPool ? b * p.N + n : b;
      const int at_y = i.begin - here_y.cell, at_x = j.begin - here_x.cell;
      Slot& slot = memory.slots[e / 8][e % 8];
      slot.vector = ((b * p.C + c) * p.grid.windows() + window) * p.D;
      slot.scale = mine < count ? p.scale[(image * p.C + c) * p.grid.windows() + window] : 0;
      const int tile_at = (ty.begin + row) * p.grid.tiles_x.count + tx.begin + column;
      slot.weights =
          (static_cast<std::int64_t>(tile_at) * p.slots + p.slot(c, w, here_x.windows)) * kMap +
          kTileSide * at_y + at_x;
      if (e % 8 == 0) {
        const auto bits = [](int at, int cells) {
          const unsigned all = (1u << cells) - 1;
          return at < 0 ? all << -at : all >> at;
        };
        memory.places[e / 8] = {bits(at_y, here_y.cells), bits(at_x, here_x.cells),
                                maximum(0, -at_x)};
      }
    }
  }

  // Adds what 8 windows of one tile give to the locations.
  LSLPN_DEVICE void add(float (&sum)[kChannels][kBlock][4], const int (&channel)[kChannels][2],
                        const Slot (&slots)[8], const Place& place) const {
    const int lane = thread_index() % kWarp, g = lane / 4, q = lane % 4;
    // Columns that the tile does not have repeat the first, and what comes of them is left out: a
    // weight of 0 would not keep a NaN of the vectors from them.
    const unsigned columns = place.columns >> 2 * q;
    const int column = place.columns >> g & 1 ? g : place.first;
    OperandA vectors[kChannels][1];
    const float* weights[2];
    LSLPN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const Slot slot = slots[q + 4 * e];
      weights[e] = maps + (slot.weights + column);
      LSLPN_UNROLL
      for (int m = 0; m < kChannels; ++m) {
        LSLPN_UNROLL
        for (int h = 0; h < 2; ++h) {
          // Where too few pixels are in a window its gradient is nobody's business.
          const float value = p.vectors[slot.vector + channel[m][h]] * slot.scale;
          vectors[m][0].set(2 * e + h, slot.scale != 0 ? value : 0);
        }
      }
    }
    LSLPN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      if (!(place.rows >> r & 1)) continue;
      OperandB weight[1];
      LSLPN_UNROLL
      for (int e = 0; e < 2; ++e) weight[0].set(e, weights[e][kTileSide * r]);
      LSLPN_UNROLL
      for (int m = 0; m < kChannels; ++m) {
        float part[4];
        multiply<0>(part, vectors[m], weight);
        add_if(columns & 1, columns & 2, sum[m][r], part);
      }
    }
  }

  // Adds the gradient of the Gram maps times the features around, for one channel of two locations
  // a lane.
  LSLPN_DEVICE void add_gram(float (&sum)[kBlock][4], int half, int d,
                             const GramBlock& gram) const {
    const int q = thread_index() % 4, h = p.grid.y.cells, w = p.grid.x.cells;
    const bool across = p.grid.tiles_x.between, down = p.grid.tiles_y.between;
    const T* channel =
        features.image(b, n) + static_cast<std::int64_t>(minimum(d, p.D - 1)) * features.d;
    std::int64_t column[4];  // bytes
    LSLPN_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int at = minimum(maximum(j.begin + 2 * q + k - 1, 0), w - 1) * features.w;
      column[k] = kept(std::int64_t{at} * int{sizeof(T)});
    }
    float f[3][4];
    const auto read_row = [&](float (&row)[4], int r) {
      const T* at = channel + minimum(maximum(i.begin + r, 0), h - 1) * features.h;
      LSLPN_UNROLL
      for (int k = 0; k < 4; ++k) row[k] = to_float(read(at, column[k]));
    };
    read_row(f[0], -1);
    read_row(f[1], 0);
    float4 above[3];
    LSLPN_UNROLL
    for (int k = 0; k < 3; ++k) above[k] = gram[0][2 * q + k];
    LSLPN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      if (r >= i.end - i.begin) break;
      read_row(f[(r + 2) % 3], r + 1);
      const float (&up)[4] = f[r % 3];
      const float (&here)[4] = f[(r + 1) % 3];
      const float (&low)[4] = f[(r + 2) % 3];
      float4 own[3];
      LSLPN_UNROLL
      for (int k = 0; k < 3; ++k) own[k] = gram[r + 1][2 * q + k];
      LSLPN_UNROLL
      for (int e = 0; e < 2; ++e) {
        float value = sum[r][2 * half + e];
        value += 2 * own[e + 1].x * here[e + 1];
        if (across) {
          value += own[e].y * here[e];
          value += own[e + 1].y * here[e + 2];
        }
        if (down) {
          value += above[e + 1].z * up[e + 1];
          value += own[e + 1].z * low[e + 1];
        }
        if (across && down) {
          value += above[e].w * up[e];
          value += above[e + 1].w * up[e + 2];
          value += own[e].w * low[e];
          value += own[e + 1].w * low[e + 2];
        }
        sum[r][2 * half + e] = value;
      }
      LSLPN_UNROLL
      for (int k = 0; k < 3; ++k) above[k] = own[k];
    }
  }

  LSLPN_DEVICE void write(const float (&sum)[kBlock][4], int half, int d) const {
    if (d >= p.D) return;
    const int q = thread_index() % 4, left = j.end - j.begin - 2 * q;  // columns
    T* at = to.image(b, n) +
            (static_cast<std::int64_t>(d) * to.d + i.begin * to.h + (j.begin + 2 * q) * to.w);
    LSLPN_UNROLL
    for (int r = 0; r < kBlock; ++r, at += to.h) {
      if (r >= i.end - i.begin) break;
      if (left > 0) from_float(sum[r][2 * half], at[0]);
      if (left > 1) from_float(sum[r][2 * half + 1], at[to.w]);
    }
  }
};

// One block: up to kBlock x kBlock locations of an image.
template <class T, bool kPool>
LSLPN_DEVICE void scatter(const Exchange& p, const Images<const T>& features, const Images<T>& to,
                          std::int64_t block) {
  ScatterMemory& memory = *reinterpret_cast<ScatterMemory*>(shared_memory());
  const Range j = block_of(p.grid.x.cells, p.blocks_x, static_cast<int>(block % p.blocks_x));
  const Range i =
      block_of(p.grid.y.cells, p.blocks_y, static_cast<int>(block / p.blocks_x % p.blocks_y));
  const std::int64_t image = block / p.blocks_x / p.blocks_y;
  const std::int64_t episode = image / p.N;
  const Range ty = stretches_near(p.grid.y, p.grid.tiles_y, i.begin, i.end - 1);
  const Range tx = stretches_near(p.grid.x, p.grid.tiles_x, j.begin, j.end - 1);
  const Scatterer<T, kPool> s{p,
                              features,
                              to,
                              p.chunk.first + episode,
                              image - episode * p.N,
                              p.maps + image * p.grid.tiles() * p.slots * kMap,
                              i,
                              j,
                              ty,
                              tx,
                              memory.y,
                              memory.x};
  const int e = thread_index() % kNear;
  if (thread_index() < kNear && e < ty.end - ty.begin) {
    memory.y[e] = stretch(p.grid.y, p.grid.tiles_y, ty.begin + e);
  } else if (thread_index() >= kWarp && thread_index() < kWarp + kNear &&
             thread_index() - kWarp < tx.end - tx.begin) {
    memory.x[thread_index() - kWarp] =
        stretch(p.grid.x, p.grid.tiles_x, tx.begin + thread_index() - kWarp);
  }
  block_barrier();
  s.find_slots(0, memory);
  if (!kPool) s.find_gram(memory.gram);
  block_barrier();
  constexpr int kChannels = Scatterer<T, kPool>::kChannels;
  const int warp = thread_index() / kWarp, g = thread_index() % kWarp / 4;
  bool again = false;
  LSLPN_NO_UNROLL
  for (int d0 = 16 * kChannels * warp; d0 - 16 * kChannels * warp < p.D;
       d0 += 16 * kChannels * kExchangeWarps) {
    float sum[kChannels][kBlock][4] = {};
    int channel[kChannels][2];
    LSLPN_UNROLL
    for (int m = 0; m < kChannels; ++m) {
      LSLPN_UNROLL
      for (int h = 0; h < 2; ++h) channel[m][h] = minimum(d0 + 16 * m + 8 * h + g, p.D - 1);
    }
    const int all = (ty.end - ty.begin) * (tx.end - tx.begin) * s.products();
    LSLPN_NO_UNROLL
    for (int first = 0; first < all; first += kProductsAtATime) {
      if (again || first > 0) {
        block_barrier();
        s.find_slots(first, memory);
        block_barrier();
      }
      LSLPN_NO_UNROLL
      for (int k = 0; k < minimum(all - first, kProductsAtATime); ++k) {
        s.add(sum, channel, memory.slots[k], memory.places[k]);
      }
    }
    again = all > kProductsAtATime;
    if (d0 >= p.D) continue;
    LSLPN_UNROLL
    for (int m = 0; m < kChannels; ++m) {
      LSLPN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int d = d0 + 16 * m + 8 * half + g;
        if (!kPool) s.add_gram(sum[m], half, d, memory.gram);
        s.write(sum[m], half, d);
      }
    }
  }
}

}  // namespace lslpn::cuda
