// Matching backward, from tiles to windows and locations: the weights of a window's locations are
// the sums of the maps of its tiles; the gradients of the Gram maps at a location, of the maps of
// all tiles that have it.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

// Blocks for the locations of a window, and for all locations of an image.
LSLPN_HD int window_blocks(const Exchange& p) {
  return divide_up(p.box, kExchangeThreads);
}
LSLPN_HD int location_blocks(const Exchange& p) {
  return divide_up(p.grid.y.cells * p.grid.x.cells, kExchangeThreads);
}
LSLPN_HD int sum_blocks(const Exchange& p) {
  return p.grid.windows() * window_blocks(p) + location_blocks(p);
}

LSLPN_KERNEL(kExchangeThreads, 4)
sum_tiles(LSLPN_PARAMETERS Exchange p) {
  const Grid& grid = p.grid;
  const int image = block_index() / sum_blocks(p), part = block_index() % sum_blocks(p);
  const int of_tile = p.tile_maps * kMap;
  const float* const maps = p.maps + std::int64_t{image} * grid.tiles() * of_tile;
  // Calls f(map, y, x) for the tiles over a range of pixels that have a location, with the first of
  // their maps at this location and their segments.
  const auto each_tile = [&](const Range& of_y, const Range& of_x, int i, int j, auto f) {
    const int first = segment_at(grid.tiles_x, of_x.begin);
    LSLPN_NO_UNROLL
    for (int r = segment_at(grid.tiles_y, of_y.begin); grid.tiles_y.begin(r) < of_y.end; ++r) {
      const Segment y = grid.tiles_y.segment(r);
      if (static_cast<unsigned>(i - y.cell) >= y.cells) continue;
      LSLPN_NO_UNROLL
      for (int k = first; grid.tiles_x.begin(k) < of_x.end; ++k) {
        const Segment x = grid.tiles_x.segment(k);
        if (static_cast<unsigned>(j - x.cell) >= x.cells) continue;
        const int at = kTileSide * (i - y.cell) + j - x.cell;
        f(maps + ((r * grid.tiles_x.count + k) * of_tile + at), y, x);
      }
    }
  };
  if (part < location_blocks(p)) {
    const int cell = part * kExchangeThreads + thread_index();
    const int i = cell / grid.x.cells, j = cell - i * grid.x.cells;
    if (i >= grid.y.cells) return;
    float4 sum = make_float4(0, 0, 0, 0);
    each_tile(pixels_of(grid.y, {i, i + 1}), pixels_of(grid.x, {j, j + 1}), i, j,
              [&](const float* map, const Segment&, const Segment&) {
                map += (p.tile_maps - kGramMaps) * kMap;
                sum.x += 2 * map[0];  // d(f^2) = 2 f df
                sum.y += map[kMap];
                sum.z += map[2 * kMap];
                sum.w += map[3 * kMap];
              });
    p.gram_weights[std::int64_t{image} * grid.y.cells * grid.x.cells + cell] = sum;
    return;
  }
  const int block = part - location_blocks(p), m = block / window_blocks(p);
  const int m_y = m / grid.x.windows, m_x = m - m_y * grid.x.windows;
  const int l = (block - m * window_blocks(p)) * kExchangeThreads + thread_index();
  const Range of_y = pixels_of_window(grid.y, m_y), of_x = pixels_of_window(grid.x, m_x);
  const int top = short_taps(grid.y, of_y.begin).lower, left = short_taps(grid.x, of_x.begin).lower;
  const int of_class = p.window_maps ? grid.tile_windows() * kMap : kMap;
  const int i = top + l / p.box_x, j = left + l % p.box_x;
  LSLPN_NO_UNROLL
  for (int c = 0; c < p.C && l < p.box; c += 2) {
    const int second = c + 1 < p.C ? of_class : 0;
    float sum[2] = {};
    each_tile(of_y, of_x, i, j, [&](const float* map, const Segment& y, const Segment& x) {
      const int window = (m_y - y.window) * grid.tiles_x.windows + m_x - x.window;
      map += c * of_class + (p.window_maps ? window * kMap : 0);
      sum[0] += map[0];
      sum[1] += map[second];
    });
    const std::int64_t at = (std::int64_t{image} * p.C + c) * grid.windows() + m;
    p.weights[at * p.box + l] = sum[0];
    if (second) p.weights[(at + grid.windows()) * p.box + l] = sum[1];
  }
  // Of the first block of a window and the first image of an episode, a warp has a class.
  if (l >= kExchangeThreads || image % p.N != 0) return;
  const int lane = thread_index() % kWarp;
  for (int c = thread_index() / kWarp; c < p.C; c += kExchangeWarps) {
    const std::int64_t at = (std::int64_t{image / p.N} * p.C + c) * grid.windows() + m;
    float square = 0;
    for (int d = 4 * lane; d < p.D; d += 4 * kWarp) {
      const auto v = read_pack<4>(p.vectors + at * p.D + d);
      for (int k = 0; k < 4; ++k) square += v.value[k] * v.value[k];
    }
    square = warp_sum(square);
    if (lane == 0) p.scale[at] = Norm::inverse_length(square);
  }
}

// On the host.
inline void launch_sum_tiles(const Exchange& e, Stream stream) {
  launch(sum_tiles, std::int64_t{e.images()} * sum_blocks(e), kExchangeThreads, 0, stream, e);
}

}  // namespace lslpn::cuda
