// From feature locations to windows: sums over locations of weight times features.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

// 1 / (K n) for the windows of a part, 0 where n is too small.
LSLPN_DEVICE void find_factors(const Exchange& p, std::int64_t episode, const Range& wy,
                               const Range& wx, const Range& classes) {
  const int width = wx.end - wx.begin, windows = (wy.end - wy.begin) * width;
  const int count = static_cast<int>(p.N) * (classes.end - classes.begin) * windows;
  for (int e = thread_index(); e < count; e += kExchangeThreads) {
    const int y = wy.begin + e % windows / width, x = wx.begin + e % width;
    const int c = classes.begin + e / windows % (classes.end - classes.begin);
    const std::int64_t n = e / windows / (classes.end - classes.begin);
    const Range ty = stretches_of_windows(p.grid.y, p.grid.tiles_y, y, y);
    const Range tx = stretches_of_windows(p.grid.x, p.grid.tiles_x, x, x);
    const float* counts = p.counts + (episode * p.N + n) * p.grid.tiles() * p.C + c;
    float pixels = 0;
    for (int i = ty.begin; i < ty.end; ++i) {
      for (int j = tx.begin; j < tx.end; ++j)
        pixels += counts[(i * p.grid.tiles_x.count + j) * p.C];
    }
    const std::int64_t image = (p.chunk.first + episode) * p.N + n;
    p.scale[(image * p.C + c) * p.grid.windows() + y * p.grid.x.windows + x] =
        pixels > p.min_pixels ? 1 / (pixels * static_cast<float>(p.N)) : 0;
  }
}

template <class T, bool kPool>
struct Gatherer {
  const Exchange& p;
  const Images<const T>& features;
  std::int64_t b;  // the episode
  Range wy, wx, classes;
  float* sums;  // [ring][windows of a row][classes], p.pitch() floats each

  LSLPN_DEVICE int window(int y, int x) const { return y * p.grid.x.windows + x; }
  LSLPN_DEVICE float* sum(int y, int x, int c) const {
    const int row = y % p.ring * (wx.end - wx.begin) + x - wx.begin;
    return sums + (row * (classes.end - classes.begin) + c) * p.pitch();
  }

  // Where the product's column goes to, null for nowhere; and with what factor.
  LSLPN_DEVICE float* target(int column, const Stretch& y, const Stretch& x, std::int64_t image,
                             float& factor) const {
    const int windows = y.windows * x.windows;
    const int c = column / windows, w = column - c * windows, row = w / x.windows;
    const int i = y.window + row, j = x.window + w - row * x.windows;
    factor = 1;
    if (classes.begin + c >= classes.end) return nullptr;
    if (i < wy.begin || i >= wy.end || j < wx.begin || j >= wx.end) return nullptr;
    if (kPool) {
      factor = p.scale[(image * p.C + classes.begin + c) * p.grid.windows() + window(i, j)];
      // Where too few pixels are in a window, NaN under others must not show.
      if (factor == 0) return nullptr;
    }
    return sum(i, j, c);
  }

  // One tile. A lane has pairs of neighbouring locations: k of the product.
  LSLPN_DEVICE void add(const Stretch& y, const Stretch& x, const float* maps, const T* image,
                        std::int64_t n, const std::int64_t (&offset)[5], int step) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int g = lane / 4, q = lane % 4;
    const int windows = y.windows * x.windows, columns = (classes.end - classes.begin) * windows;
    const T* corner = image + (y.cell * features.h + x.cell * features.w);
    LSLPN_NO_UNROLL
    for (int first = 0; first < columns; first += 8) {
      const int mine = minimum(first + g, columns - 1), c = mine / windows;
      const float* map = maps + p.slot(classes.begin + c, mine - c * windows, x.windows) * kMap;
      OperandB weights[5];
      LSLPN_UNROLL
      for (int k = 0; k < 5; ++k) {
        const int at = q < 3 ? kTileSide * k + 2 * q : 30 + 2 * k;
        const int column = q < 3 ? 2 * q : 2 * k;
        float2 w = *reinterpret_cast<const float2*>(map + at);
        // A last column by itself is the second of a pair.
        if (column + 1 == x.cells && column > 0) w = make_float2(0, w.x);
        weights[k].set(0, w.x);
        weights[k].set(1, w.y);
      }
      float factor[2];
      float* to[2];
      LSLPN_UNROLL
      for (int e = 0; e < 2; ++e) to[e] = target(first + 2 * q + e, y, x, n, factor[e]);
      LSLPN_NO_UNROLL
      for (int d = 16 * warp + g; d - g < p.D; d += 16 * kExchangeWarps) {
        const T* low = corner + static_cast<std::int64_t>(minimum(d, p.D - 1)) * features.d;
        const T* high = corner + static_cast<std::int64_t>(minimum(d + 8, p.D - 1)) * features.d;
        T raw[5][4];
        LSLPN_UNROLL
        for (int k = 0; k < 5; ++k) {
          raw[k][0] = read(low, offset[k]);
          raw[k][1] = read(high, offset[k]);
          raw[k][2] = read(low + step, offset[k]);
          raw[k][3] = read(high + step, offset[k]);
        }
        OperandA f[5];
        LSLPN_UNROLL
        for (int k = 0; k < 5; ++k) {
          LSLPN_UNROLL
          for (int e = 0; e < 4; ++e) set_feature(f[k], e, raw[k][e]);
        }
        float sum[4];
        multiply<kHalf<T>>(sum, f, weights);
        LSLPN_UNROLL
        for (int e = 0; e < 2; ++e) {
          if (!to[e]) continue;
          to[e][d] += factor[e] * sum[e];
          to[e][d + 8] += factor[e] * sum[2 + e];
        }
      }
      warp_barrier();  // other lanes add to these sums next
    }
  }

  // Writes a row of windows, and clears its sums. dp = (dq - <q, dq> q) / |p|, q = p / |p|.
  LSLPN_DEVICE void finish(int y) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int width = wx.end - wx.begin, count = width * (classes.end - classes.begin);
    for (int e = warp; e < count; e += kExchangeWarps) {
      const int x = wx.begin + e % width, c = e / width;
      const std::int64_t at = (b * p.C + classes.begin + c) * p.grid.windows() + window(y, x);
      float* from = sum(y, x, c);
      float* to = p.out + at * p.D;
      float inverse = 1, along = 0;
      if (!kPool) {
        const float* prototype = p.vectors + at * p.D;
        inverse = p.scale[at];
        for (int d = lane; d < p.D; d += kWarp) along += from[d] * prototype[d];
        for (int s = 16; s > 0; s /= 2) along += shuffle_xor(along, s);
        along *= inverse * inverse;
        for (int d = lane; d < p.D; d += kWarp)
          from[d] = (from[d] - along * prototype[d]) * inverse;
      }
      for (int d = lane; d < p.D; d += kWarp) {
        to[d] = from[d];
        from[d] = 0;
      }
    }
  }
};

// One block: a part of the windows and classes of an episode.
template <class T, bool kPool>
LSLPN_DEVICE void gather(const Exchange& p, const Images<const T>& features, std::int64_t block) {
  const int lane = thread_index() % kWarp, q = lane % 4;
  const int part_x = static_cast<int>(block % p.parts_x);
  const int part_y = static_cast<int>(block / p.parts_x % p.parts_y);
  const int part_c = static_cast<int>(block / p.parts_x / p.parts_y % p.parts_c);
  const std::int64_t episode = block / p.parts_x / p.parts_y / p.parts_c;
  const Range wy = block_of(p.grid.y.windows, p.parts_y, part_y);
  const Range wx = block_of(p.grid.x.windows, p.parts_x, part_x);
  const Range ty = stretches_of_windows(p.grid.y, p.grid.tiles_y, wy.begin, wy.end - 1);
  const Range tx = stretches_of_windows(p.grid.x, p.grid.tiles_x, wx.begin, wx.end - 1);
  const int rows = ty.end - ty.begin, columns = tx.end - tx.begin;
  Stretch* y = reinterpret_cast<Stretch*>(shared_memory());
  Stretch* x = y + rows;
  float* sums = reinterpret_cast<float*>(shared_memory()) + (rows + columns) * 3;
  const Gatherer<T, kPool> gatherer{
      p, features, p.chunk.first + episode, wy, wx, block_of(p.C, p.parts_c, part_c), sums};
  const Range& classes = gatherer.classes;
  if (kPool) find_factors(p, episode, wy, wx, classes);
  for (int e = thread_index(); e < rows + columns; e += kExchangeThreads) {
    y[e] = e < rows ? stretch(p.grid.y, p.grid.tiles_y, ty.begin + e)
                    : stretch(p.grid.x, p.grid.tiles_x, tx.begin + e - rows);
  }
  const int floats = p.ring * (wx.end - wx.begin) * (classes.end - classes.begin) * p.pitch();
  for (int e = thread_index(); e < floats; e += kExchangeThreads) sums[e] = 0;
  block_barrier();

  std::int64_t offset[5] = {};  // of a lane's pairs of locations, in bytes
  int step = 0, cells = 0;
  LSLPN_NO_UNROLL
  for (int i = 0; i < rows; ++i) {
    LSLPN_NO_UNROLL
    for (int n = 0; n < p.N; ++n) {
      const std::int64_t image = gatherer.b * p.N + n;
      const T* from = features.image(gatherer.b, n);
      const float* maps = p.maps + ((episode * p.N + n) * p.grid.tiles() +
                                    (ty.begin + i) * p.grid.tiles_x.count + tx.begin) *
                                       p.slots * kMap;
      LSLPN_NO_UNROLL
      for (int j = 0; j < columns; ++j) {
        if (cells != (y[i].cells << 8 | x[j].cells)) {
          cells = y[i].cells << 8 | x[j].cells;
          step = x[j].cells > 1 ? features.w : 0;
          LSLPN_UNROLL
          for (int k = 0; k < 5; ++k) {
            const int row = minimum(q < 3 ? k : 5, y[i].cells - 1);
            const int column = minimum(q < 3 ? 2 * q : 2 * k, maximum(x[j].cells - 2, 0));
            offset[k] = std::int64_t{row * features.h + column * features.w} * int{sizeof(T)};
          }
        }
        gatherer.add(y[i], x[j], maps + static_cast<std::int64_t>(j) * p.slots * kMap, from, image,
                     offset, step);
      }
    }
    const int next = i + 1 < rows ? y[i + 1].window : wy.end;
    if (next <= maximum(y[i].window, wy.begin)) continue;
    block_barrier();
    for (int w = maximum(y[i].window, wy.begin); w < minimum(next, wy.end); ++w) gatherer.finish(w);
    block_barrier();
  }
}

}  // namespace lslpn::cuda
