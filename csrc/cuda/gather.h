// From feature locations to windows: sums over locations of weight times features.
//
// A block has a few columns of the product, classes of neighbouring windows, and visits all
// locations under these windows, kLocations at a time. Their weights, summed over tiles, lie in
// shared memory in the order of the operands of matrix_multiply.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

template <class T, bool kPool>
struct Gatherer {
  const Exchange& p;
  const Images<const T>& features;
  std::int64_t b;  // the episode
  Range wy, wx, classes;
  Range ty, tx;  // the segments under the windows
  GatherMemory& memory;
  float* sums;                        // [columns][p.pitch()]
  CoveredSegment *y, *x;              // the segments
  unsigned short *first_y, *first_x;  // the first segment of each row and column of locations
  int height, width;                  // of the locations

  struct Column {
    int c, y, x;  // class and window
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

  // 1 / (K n) of the block's windows in each support image, 0 where n is too small.
  LSLPN_DEVICE void find_factors() const {
    const int count = static_cast<int>(p.N) * columns();
    for (int e = thread_index(); e < count; e += kExchangeThreads) {
      const std::int64_t n = e / columns();
      const Column at = column(e % columns());
      const Range rows = segments_of_windows(p.grid.y, p.grid.tiles_y, at.y, at.y);
      const Range across = segments_of_windows(p.grid.x, p.grid.tiles_x, at.x, at.x);
      const float* counts =
          p.counts + ((b - p.chunk.first) * p.N + n) * p.grid.tiles() * p.C + at.c;
      float pixels = 0;
      for (int i = rows.begin; i < rows.end; ++i) {
        for (int j = across.begin; j < across.end; ++j) {
          pixels += counts[(i * p.grid.tiles_x.count + j) * p.C];
        }
      }
      p.scale[window(b * p.N + n, at)] =
          pixels > p.min_pixels ? 1 / (pixels * static_cast<float>(p.N)) : 0;
    }
  }

  LSLPN_DEVICE void find_segments() {
    const int rows = ty.end - ty.begin, across = tx.end - tx.begin;
    for (int e = thread_index(); e < rows + across; e += kExchangeThreads) {
      const bool down = e < rows;
      const Segment s = down ? segment(p.grid.y, p.grid.tiles_y, ty.begin + e)
                             : segment(p.grid.x, p.grid.tiles_x, tx.begin + e - rows);
      CoveredSegment found{s.cell, static_cast<short>(s.cell + s.cells), s.window, 0};
      for (int k = 0; k < columns(); ++k) {
        const int w = (down ? column(k).y : column(k).x) - s.window;
        if (w >= 0 && w < s.windows) found.columns |= 1u << k;
      }
      (down ? y[e] : x[e - rows]) = found;
    }
    if (thread_index() < kColumns) {
      const Column at = column(min(thread_index(), columns() - 1));
      memory.maps[thread_index()] = kMap * p.map_of(at.c, at.y, at.x);
    }
    for (int e = thread_index(); e < p.columns * p.pitch(); e += kExchangeThreads) sums[e] = 0;
    __syncthreads();
    height = y[rows - 1].end - y[0].cell;
    width = x[across - 1].end - x[0].cell;
    for (int e = thread_index(); e < height + width; e += kExchangeThreads) {
      const CoveredSegment* of = e < height ? y : x;
      const int cell = of[0].cell + (e < height ? e : e - height);
      int first = 0;
      while (of[first].end <= cell) ++first;
      (e < height ? first_y[e] : first_x[e - height]) = static_cast<unsigned short>(first);
    }
    __syncthreads();
  }

  // The weights of `count` locations from `first` on.
  LSLPN_DEVICE void find_weights(const float* maps, int first, int count) const {
    for (int l = thread_index(); l < (count + 7) / 8 * 8; l += kExchangeThreads) {
      float sum[kColumns] = {};
      unsigned covered = 0;
      // Locations that fill up a step of 8 repeat the last one, and have no weight.
      const int at = min(first + l, height * width - 1), row = at / width;
      const int i = y[0].cell + row, j = x[0].cell + at - row * width;
      LSLPN_NO_UNROLL
      for (int r = first_y[row]; l < count && r < ty.end - ty.begin && y[r].cell <= i; ++r) {
        LSLPN_NO_UNROLL
        for (int c = first_x[at - row * width]; c < tx.end - tx.begin && x[c].cell <= j; ++c) {
          const CoveredSegment here_y = y[r], here_x = x[c];
          const int tile = (ty.begin + r) * p.grid.tiles_x.count + tx.begin + c;
          const int of_tile = p.map_of(0, here_y.window, here_x.window);
          const float* map = maps + ((std::int64_t{tile} * p.tile_maps - of_tile) * kMap +
                                     kTileSide * (i - here_y.cell) + j - here_x.cell);
          const unsigned columns = here_y.columns & here_x.columns;
          covered |= columns;
          LSLPN_UNROLL
          for (int e = 0; e < kColumns; ++e) {
            if (columns >> e & 1) sum[e] += map[memory.maps[e]];
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

  static constexpr int kTiles = 2;  // of 16 channels, that a warp takes at a time

  // Adds kSteps times 8 locations to the sums of kTiles tiles of 16 channels. `channels` are those
  // that a lane loads.
  template <int kSteps>
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

  // One channel of one column, over the locations under its window alone: the others have a weight
  // of 0, and 0 times NaN is NaN.
  LSLPN_DEVICE float sum_covered(const T* channel, int column, int count) const {
    float sum = 0;
    LSLPN_NO_UNROLL
    for (int l = 0; l < count; ++l) {
      if (!(memory.columns[l] >> column & 1)) continue;
      const std::uint32_t* weight = &memory.weights[l / 8][4 * column + l % 4].x + l / 4 % 2;
      const std::int64_t* offset =
          reinterpret_cast<const std::int64_t*>(&memory.offsets[l / 8][l % 4]) + l / 4 % 2;
      sum += (__uint_as_float(weight[0]) + __uint_as_float(weight[2])) *
             to_float(read(channel, *offset));
    }
    return sum;
  }

  // Adds `count` locations of image n to the sums of all channels.
  LSLPN_DEVICE void add_locations(std::int64_t n, int count) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int g = lane / 4, q = lane % 4, steps = (count + 7) / 8;
    const T* image = features.image(b, n);
    float factor[2];
    LSLPN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int mine = min(2 * q + e, columns() - 1);
      factor[e] = kPool ? p.scale[window(b * p.N + n, column(mine))] : 1;
      if (2 * q + e >= columns()) factor[e] = 0;
    }
    LSLPN_NO_UNROLL
    for (int d = 16 * kTiles * warp + g; d - g < p.D; d += 16 * kTiles * kExchangeWarps) {
      const T* channels[kTiles][2];
      LSLPN_UNROLL
      for (int e = 0; e < 2 * kTiles; ++e) {
        channels[e / 2][e % 2] =
            image + static_cast<std::int64_t>(min(d + 8 * e, p.D - 1)) * features.d;
      }
      float sum[kTiles][4] = {};
      int step = 0;
      LSLPN_NO_UNROLL
      for (; step + 4 <= steps; step += 4) add<4>(sum, channels, step);
      LSLPN_NO_UNROLL
      for (; step < steps; ++step) add<1>(sum, channels, step);
      LSLPN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (!isfinite(sum[t][0] + sum[t][1] + sum[t][2] + sum[t][3])) {
          for (int e = 0; e < 4; ++e) {
            sum[t][e] = sum_covered(channels[t][e / 2], 2 * q + e % 2, count);
          }
        }
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          // A window with too few pixels in an image takes nothing from it, not even NaN.
          if (factor[e % 2] == 0 || d - g + 16 * t >= p.D) continue;
          sums[(2 * q + e % 2) * p.pitch() + d + 16 * t + 8 * (e / 2)] += factor[e % 2] * sum[t][e];
        }
      }
    }
  }

  // Writes the columns, kWidth channels at a time: prototypes, or their gradients from those of
  // their directions q = p / |p|, dp = (dq - <q, dq> q) / |p|.
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
        for (int s = 16; s > 0; s /= 2) along += __shfl_xor_sync(kAllLanes, along, s);
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
  const Range wy = part_of(p.grid.y.windows, p.parts_y, part_y);
  const Range wx = part_of(p.grid.x.windows, p.parts_x, part_x);
  const Range classes = part_of(p.C, p.parts_c, part_c);
  GatherMemory& memory = *reinterpret_cast<GatherMemory*>(shared_memory());
  find_tiles<segments_of_windows>(p.grid, wy, wx, memory.tiles);
  const Range ty = memory.tiles[0], tx = memory.tiles[1];
  float* sums = reinterpret_cast<float*>(&memory + 1);
  CoveredSegment* y = reinterpret_cast<CoveredSegment*>(sums + p.columns * p.pitch());
  CoveredSegment* x = y + (ty.end - ty.begin);
  unsigned short* first_y = reinterpret_cast<unsigned short*>(x + (tx.end - tx.begin));
  Gatherer<T, kPool> gatherer{
      p, features, p.chunk.first + episode,  wy, wx, classes, ty, tx, memory, sums, y,
      x, first_y,  first_y + p.grid.y.cells, 0,  0};
  if (kPool) gatherer.find_factors();
  gatherer.find_segments();
  const int locations = gatherer.height * gatherer.width;
  LSLPN_NO_UNROLL
  for (int n = 0; n < p.N; ++n) {
    const float* maps = p.maps + (episode * p.N + n) * p.grid.tiles() * p.tile_maps * kMap;
    LSLPN_NO_UNROLL
    for (int first = 0; first < locations; first += kLocations) {
      const int count = min(locations - first, kLocations);
      gatherer.find_weights(maps, first, count);
      __syncthreads();
      gatherer.add_locations(n, count);
      __syncthreads();
    }
  }
  fours(p.vectors, p.D) && fours(p.out, p.D) ? gatherer.template finish<4>()
                                             : gatherer.template finish<1>();
}

}  // namespace lslpn::cuda
