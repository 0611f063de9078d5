// From feature locations to windows: sums over locations of weight times features.
//
// A block has a few columns of the product, classes of neighbouring windows, and visits all
// locations under them. What the tiles of a window give to a location is added up first, and lies
// in shared memory as the tensor cores take it.
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
  Range ty, tx;  // the tiles under the windows
  GatherMemory& memory;
  float* sums;                        // [columns][p.pitch()]
  Part *y, *x;                        // the tiles'
  unsigned short *first_y, *first_x;  // the first tile of each row and column of locations
  int height, width;                  // of the locations

  // A column's class and window.
  struct Column {
    int c, y, x;
  };
  LSLPN_DEVICE int columns() const {
    return (classes.end - classes.begin) * (wy.end - wy.begin) * (wx.end - wx.begin);
  }
  LSLPN_DEVICE Column column(int e) const {
    const int across = wx.end - wx.begin, down = wy.end - wy.begin, row = e / across;
    return {classes.begin + row / down, wy.begin + row % down, wx.begin + e % across};
  }
  LSLPN_DEVICE std::int64_t window(std::int64_t image, const Column& at) const {
    return (image * p.C + at.c) * p.grid.windows() + at.y * p.grid.x.windows + at.x;
  }

  LSLPN_DEVICE Part part(const Axis& axis, const Tiles& tiles, int i, bool down) const {
    const Stretch s = stretch(axis, tiles, i);
    Part part{s.cell, static_cast<short>(s.cell + s.cells), s.window, 0};
    for (int e = 0; e < columns(); ++e) {
      const int w = (down ? column(e).y : column(e).x) - s.window;
      if (w >= 0 && w < s.windows) part.columns |= 1u << e;
    }
    return part;
  }

  LSLPN_DEVICE void find_parts() {
    const int rows = ty.end - ty.begin, across = tx.end - tx.begin;
    for (int e = thread_index(); e < rows + across; e += kExchangeThreads) {
      (e < rows ? y[e] : x[e - rows]) =
          e < rows ? part(p.grid.y, p.grid.tiles_y, ty.begin + e, true)
                   : part(p.grid.x, p.grid.tiles_x, tx.begin + e - rows, false);
    }
    if (thread_index() < kColumns) {
      const Column at = column(minimum(thread_index(), columns() - 1));
      memory.slots[thread_index()] = kMap * p.slot(at.c, at.y, at.x);
    }
    for (int e = thread_index(); e < p.columns * p.pitch(); e += kExchangeThreads) sums[e] = 0;
    block_barrier();
    height = y[rows - 1].end - y[0].cell;
    width = x[across - 1].end - x[0].cell;
    for (int e = thread_index(); e < height + width; e += kExchangeThreads) {
      const Part* of = e < height ? y : x;
      const int cell = of[0].cell + (e < height ? e : e - height);
      int tile = 0;
      while (of[tile].end <= cell) ++tile;
      (e < height ? first_y[e] : first_x[e - height]) = static_cast<unsigned short>(tile);
    }
    block_barrier();
  }

  // The weights of some locations from the first-th on.
  LSLPN_DEVICE void find_weights(const float* maps, int first, int count) const {
    for (int l = thread_index(); l < (count + 7) / 8 * 8; l += kExchangeThreads) {
      float sum[kColumns] = {};
      unsigned covered = 0;
      // Those that fill up repeat the last location, and have no weight.
      const int at = minimum(first + l, height * width - 1), row = at / width;
      const int i = y[0].cell + row, j = x[0].cell + at - row * width;
      LSLPN_NO_UNROLL
      for (int r = first_y[row]; l < count && r < ty.end - ty.begin && y[r].cell <= i; ++r) {
        LSLPN_NO_UNROLL
        for (int c = first_x[at - row * width]; c < tx.end - tx.begin && x[c].cell <= j; ++c) {
          const Part here_y = y[r], here_x = x[c];
          const int tile = (ty.begin + r) * p.grid.tiles_x.count + tx.begin + c;
          const int place = p.slot(0, here_y.window, here_x.window);
          const float* map = maps + ((std::int64_t{tile} * p.slots - place) * kMap +
                                     kTileSide * (i - here_y.cell) + j - here_x.cell);
          const unsigned columns = here_y.columns & here_x.columns;
          covered |= columns;
          LSLPN_UNROLL
          for (int e = 0; e < kColumns; ++e) {
            if (columns >> e & 1) sum[e] += map[memory.slots[e]];
          }
        }
      }
      memory.columns[l] = static_cast<unsigned char>(covered);
      reinterpret_cast<std::int64_t*>(&memory.offsets[l / 8][l % 4])[l / 4 % 2] =
          std::int64_t{i * features.h + j * features.w} * int{sizeof(T)};
      LSLPN_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        std::uint32_t* to = &memory.weights[l / 8][4 * e + l % 4].x + l / 4 % 2;
        split_tf32(sum[e], to[0], to[2]);
      }
    }
  }

  // Adds kTiles times 16 channels of kSteps times 8 locations from the step-th on; `channels` are a
  // lane's, low and high.
  template <int kTiles, int kSteps>
  LSLPN_DEVICE void add(float (&sum)[kTiles][4], const T* const (&channels)[kTiles][2],
                        int step) const {
    const int lane = thread_index() % kWarp;
    T raw[kTiles][kSteps][4];
    OperandB w[kSteps];
    LSLPN_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const longlong2 at = memory.offsets[step + k][lane % 4];
      LSLPN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) raw[t][k][e] = read(channels[t][e % 2], e < 2 ? at.x : at.y);
      }
      set(w[k], memory.weights[step + k][lane]);
    }
    LSLPN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      OperandA f[kSteps];
      LSLPN_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) set_feature(f[k], e, raw[t][k][e]);
      }
      float part[4];
      multiply<kHalf<T>>(part, f, w);
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) sum[t][e] += part[e];
    }
  }

  // One channel of one column, of the locations under its window alone: others have a weight of 0,
  // which does not keep a NaN away.
  LSLPN_DEVICE float sum_alone(const T* channel, int column, int count) const {
    float sum = 0;
    LSLPN_NO_UNROLL
    for (int l = 0; l < count; ++l) {
      if (!(memory.columns[l] >> column & 1)) continue;
      const std::uint32_t* weight = &memory.weights[l / 8][4 * column + l % 4].x + l / 4 % 2;
      const std::int64_t* offset =
          reinterpret_cast<const std::int64_t*>(&memory.offsets[l / 8][l % 4]) + l / 4 % 2;
      sum += (float_of(weight[0]) + float_of(weight[2])) * to_float(read(channel, *offset));
    }
    return sum;
  }

  // All channels of some locations, kTiles times 16 at a time a warp.
  template <int kTiles>
  LSLPN_DEVICE void add_locations(std::int64_t n, int count) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int g = lane / 4, q = lane % 4, steps = (count + 7) / 8;
    const T* image = features.image(b, n);
    float factor[2];
    LSLPN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int mine = minimum(2 * q + e, columns() - 1);
      factor[e] = kPool ? p.scale[window(b * p.N + n, column(mine))] : 1;
      if (2 * q + e >= columns()) factor[e] = 0;
    }
    LSLPN_NO_UNROLL
    for (int d = 16 * kTiles * warp + g; d - g < p.D; d += 16 * kTiles * kExchangeWarps) {
      const T* channels[kTiles][2];
      LSLPN_UNROLL
      for (int e = 0; e < 2 * kTiles; ++e) {
        channels[e / 2][e % 2] =
            image + static_cast<std::int64_t>(minimum(d + 8 * e, p.D - 1)) * features.d;
      }
      float sum[kTiles][4] = {};
      int step = 0;
      LSLPN_NO_UNROLL
      for (; step + 4 <= steps; step += 4) add<kTiles, 4>(sum, channels, step);
      LSLPN_NO_UNROLL
      for (; step < steps; ++step) add<kTiles, 1>(sum, channels, step);
      LSLPN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (!is_finite(sum[t][0] + sum[t][1] + sum[t][2] + sum[t][3])) {
          for (int e = 0; e < 4; ++e) {
            sum[t][e] = sum_alone(channels[t][e / 2], 2 * q + e % 2, count);
          }
        }
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          // Where too few pixels are in a window, NaN under it must not show.
          if (factor[e % 2] == 0 || d - g + 16 * t >= p.D) continue;
          sums[(2 * q + e % 2) * p.pitch() + d + 16 * t + 8 * (e / 2)] += factor[e % 2] * sum[t][e];
        }
      }
    }
  }

  // Writes the columns, kWidth channels at a time. dp = (dq - <q, dq> q) / |p|, q = p / |p|.
  template <int kWidth>
  LSLPN_DEVICE void finish() const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    for (int e = warp; e < columns(); e += kExchangeWarps) {
      const std::int64_t at = window(b, column(e));
      const float* from = sums + e * p.pitch();
      const float* prototype = p.vectors + at * p.D;
      float inverse = 1, along = 0;
      if (!kPool) {
        inverse = p.scale[at];
        for (int d = kWidth * lane; d < p.D; d += kWidth * kWarp) {
          const auto sum = read_pack<kWidth>(from + d), q = read_pack<kWidth>(prototype + d);
          LSLPN_UNROLL
          for (int k = 0; k < kWidth; ++k) along += sum.value[k] * q.value[k];
        }
        for (int s = 16; s > 0; s /= 2) along += shuffle_xor(along, s);
        along *= inverse * inverse;
      }
      for (int d = kWidth * lane; d < p.D; d += kWidth * kWarp) {
        auto out = read_pack<kWidth>(from + d);
        if (!kPool) {
          const auto q = read_pack<kWidth>(prototype + d);
          LSLPN_UNROLL
          for (int k = 0; k < kWidth; ++k) {
            out.value[k] = (out.value[k] - along * q.value[k]) * inverse;
          }
        }
        *reinterpret_cast<Pack<float, kWidth>*>(p.out + at * p.D + d) = out;
      }
    }
  }
};

// One block: some classes of some windows of an episode.
template <class T, bool kPool>
LSLPN_DEVICE void gather(const Exchange& p, const Images<const T>& features, int block) {
  const int part_x = block % p.parts_x, part_y = block / p.parts_x % p.parts_y;
  const int part_c = block / p.parts_x / p.parts_y % p.parts_c;
  const std::int64_t episode = block / p.parts_x / p.parts_y / p.parts_c;
  const Range wy = block_of(p.grid.y.windows, p.parts_y, part_y);
  const Range wx = block_of(p.grid.x.windows, p.parts_x, part_x);
  const Range classes = block_of(p.C, p.parts_c, part_c);
  GatherMemory& memory = *reinterpret_cast<GatherMemory*>(shared_memory());
  find_tiles<stretches_of_windows>(p.grid, wy, wx, memory.tiles);
  const Range ty = memory.tiles[0], tx = memory.tiles[1];
  float* sums = reinterpret_cast<float*>(&memory + 1);
  Part* y = reinterpret_cast<Part*>(sums + p.columns * p.pitch());
  Part* x = y + (ty.end - ty.begin);
  unsigned short* first_y = reinterpret_cast<unsigned short*>(x + (tx.end - tx.begin));
  Gatherer<T, kPool> gatherer{
      p, features, p.chunk.first + episode,  wy, wx, classes, ty, tx, memory, sums, y,
      x, first_y,  first_y + p.grid.y.cells, 0,  0};
  if (kPool) find_factors(p, episode, wy, wx, classes);
  gatherer.find_parts();
  const int locations = gatherer.height * gatherer.width;
  LSLPN_NO_UNROLL
  for (int n = 0; n < p.N; ++n) {
    const float* maps = p.maps + (episode * p.N + n) * p.grid.tiles() * p.slots * kMap;
    LSLPN_NO_UNROLL
    for (int first = 0; first < locations; first += kLocations) {
      const int count = minimum(locations - first, kLocations);
      gatherer.find_weights(maps, first, count);
      block_barrier();
      p.D > 16 * kExchangeWarps ? gatherer.template add_locations<2>(n, count)
                                : gatherer.template add_locations<1>(n, count);
      block_barrier();
    }
  }
  fours(p.vectors, p.D) && fours(p.out, p.D) ? gatherer.template finish<4>()
                                             : gatherer.template finish<1>();
}

}  // namespace lslpn::cuda
