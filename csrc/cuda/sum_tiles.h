// Matching backward, from tiles to windows: the weights of a window's locations are the sums of the
// maps of its tiles; the gradients of the Gram maps at a location, of the maps of all tiles that
// have it.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

// What a block knows of an axis, in shared memory.
struct AxisTable {
  struct Window {
    Range cells, segments;
  };
  Window* windows;
  Range* segments;  // that have a location
  int* maps;  // of a segment: the index of its first map, if location and window 0 were its first

  LSLPN_HD static std::size_t bytes(const Axis& axis, const Tiles& tiles) {
    return static_cast<std::size_t>(axis.windows) * sizeof(Window) +
           static_cast<std::size_t>(axis.cells) * sizeof(Range) +
           static_cast<std::size_t>(tiles.count + tiles.count % 2) * sizeof(int);
  }
  // The distances in `maps` of neighbouring segments, locations and windows.
  LSLPN_DEVICE AxisTable(const Axis& axis, const Tiles& tiles, void* memory, int of_segment,
                         int of_cell, int of_window)
      : windows(static_cast<Window*>(memory)),
        segments(reinterpret_cast<Range*>(windows + axis.windows)),
        maps(reinterpret_cast<int*>(segments + axis.cells)) {
    for (int k = thread_index(); k < axis.windows; k += kExchangeThreads) {
      const Range pixels = pixels_of_window(axis, k);
      windows[k] = {locations(axis, pixels), segments_over(tiles, pixels)};
    }
    for (int k = thread_index(); k < axis.cells; k += kExchangeThreads) {
      segments[k] = segments_over(tiles, pixels_of(axis, {k, k + 1}));
    }
    for (int k = thread_index(); k < tiles.count; k += kExchangeThreads) {
      const Segment first = tiles.segment(k);
      maps[k] = k * of_segment - first.cell * of_cell - first.window * of_window;
    }
  }
};

constexpr int kSumsOfBlock = 8 * kExchangeThreads;  // numbers of all classes

// Blocks for the weights of an image, and for the gradients of the Gram maps.
LSLPN_HD int weight_blocks(const Exchange& p) {
  return divide_up(p.grid.windows() * p.box, kSumsOfBlock);
}
LSLPN_HD int gram_blocks(const Exchange& p) {
  return divide_up(p.grid.y.cells * p.grid.x.cells, kSumsOfBlock);
}

LSLPN_KERNEL(kExchangeThreads, 4)
sum_tiles(LSLPN_PARAMETERS Exchange p) {
  const Grid& grid = p.grid;
  const int w = grid.x.cells, windows = grid.windows();
  const int of_image = weight_blocks(p) + gram_blocks(p);
  const std::int64_t image = block_index() / of_image;
  const int part = block_index() % of_image;
  const bool gram = part >= weight_blocks(p);
  const int of_window = p.window_maps && !gram ? kMap : 0,
            of_row = grid.tiles_x.windows * of_window;
  const int of_tile = p.tile_maps * kMap;
  const AxisTable y(grid.y, grid.tiles_y, shared_memory(), grid.tiles_x.count * of_tile, kTileSide,
                    of_row);
  const AxisTable x(grid.x, grid.tiles_x, shared_memory() + AxisTable::bytes(grid.y, grid.tiles_y),
                    of_tile, 1, of_window);
  __syncthreads();
  const float* maps = p.maps + image * grid.tiles() * of_tile;
  // Calls f(map) for tiles, with their maps at a location.
  const auto each_tile = [&](const Range& rows, const Range& columns, int at, auto f) {
    LSLPN_NO_UNROLL
    for (int r = rows.begin; r < rows.end; ++r) {
      LSLPN_NO_UNROLL
      for (int k = columns.begin; k < columns.end; ++k) f(maps + (at + y.maps[r] + x.maps[k]));
    }
  };
  const auto both = [](const Range& a, const Range& b) {
    return Range{max(a.begin, b.begin), min(a.end, b.end)};
  };
  if (gram) {
    const int begin = (part - weight_blocks(p)) * kSumsOfBlock + thread_index();
    for (int e = begin; e < min(begin + kSumsOfBlock, grid.y.cells * w); e += kExchangeThreads) {
      const int i = e / w, j = e - i * w;
      float sum[kGramMaps] = {};
      each_tile(y.segments[i], x.segments[j], (p.tile_maps - kGramMaps) * kMap + kTileSide * i + j,
                [&](const float* map) {
                  for (int k = 0; k < kGramMaps; ++k) sum[k] += map[k * kMap];
                });
      p.gram_weights[image * grid.y.cells * w + e] =
          make_float4(2 * sum[0], sum[1], sum[2], sum[3]);  // d(f^2) = 2 f df
    }
    return;
  }
  const int step = p.window_maps ? grid.tile_windows() * kMap : kMap;  // of classes
  const std::int64_t of_class = std::int64_t{windows} * p.box;
  const int begin = part * kSumsOfBlock + thread_index();
  for (int e = begin; e < min(begin + kSumsOfBlock, windows * p.box); e += kExchangeThreads) {
    const int m = e / p.box, location = e - m * p.box;
    const int m_y = m / grid.x.windows, m_x = m - m_y * grid.x.windows;
    const AxisTable::Window of_y = y.windows[m_y], of_x = x.windows[m_x];
    const int i = of_y.cells.begin + location / p.box_x, j = of_x.cells.begin + location % p.box_x;
    if (i >= of_y.cells.end || j >= of_x.cells.end) continue;
    const Range rows = both(y.segments[i], of_y.segments);
    const Range columns = both(x.segments[j], of_x.segments);
    const int at = kTileSide * i + j + m_y * of_row + m_x * of_window;
    float* to = p.weights + (image * p.C * of_class + e);
    LSLPN_NO_UNROLL
    for (int c = 0; c < p.C; c += 2, to += 2 * of_class) {
      const int second = c + 1 < p.C ? step : 0;
      float sum[2] = {};
      each_tile(rows, columns, at + c * step, [&](const float* map) {
        sum[0] += map[0];
        sum[1] += map[second];
      });
      to[0] = sum[0];
      if (second) to[of_class] = sum[1];
    }
  }
  // Of the first image of an episode, a warp has a class and window.
  if (image % p.N == 0) {
    const std::int64_t first = image / p.N * p.C * windows;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    for (int e = part * kExchangeWarps + warp; e < p.C * windows;
         e += weight_blocks(p) * kExchangeWarps) {
      float square = 0;
      for (int d = 4 * lane; d < p.D; d += 4 * kWarp) {
        const auto v = read_pack<4>(p.vectors + (first + e) * p.D + d);
        for (int k = 0; k < 4; ++k) square += v.value[k] * v.value[k];
      }
      square = warp_sum(square);
      if (lane == 0) p.scale[first + e] = Norm::inverse_length(square);
    }
  }
}

// On the host.
inline void launch_sum_tiles(const Exchange& e, Stream stream) {
  launch(sum_tiles, e.images() * (weight_blocks(e) + gram_blocks(e)), kExchangeThreads,
         AxisTable::bytes(e.grid.y, e.grid.tiles_y) + AxisTable::bytes(e.grid.x, e.grid.tiles_x),
         stream, e);
}

}  // namespace lslpn::cuda
