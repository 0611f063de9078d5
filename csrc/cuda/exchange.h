// Between feature locations and windows: the two products over D channels.
//
//   gather   out(c, m, d)    = sum over images and locations (i, j) of w(c, m, i, j) F(i, j, d)
//   scatter  grad F(i, j, d) = sum over c, m of w(c, m, i, j) v(c, m, d), and for matching the
//                              gradient of the Gram maps times F at the neighbours of (i, j)
//
// w is what the pixels of the tiles give to their locations: a map over the locations of a tile for
// each class, and for each window over the tile where these differ. A block has all channels, each
// of its warps 16 at a time, and every number is summed by one warp in a fixed order.
#pragma once

#include "products.h"
#include "tiles.h"

namespace lslpn::cuda {

constexpr int kExchangeWarps = 4;
constexpr int kExchangeThreads = kWarp * kExchangeWarps;
constexpr int kBlock = 8;  // feature locations of a block along an axis, scatter
constexpr int kNear = 24;  // stretches near them, at most

struct Exchange {
  Grid grid;
  Chunk chunk;
  std::int64_t N;
  int C, D;
  bool places;        // whether each window of a tile has a map of its own
  int slots;          // maps of a tile
  const float* maps;  // [images of the chunk, tiles, slots, kMap]
  // gather: windows and classes are cut into parts, a block each
  int parts_y, parts_x, parts_c;
  int ring;             // rows of windows that are summed at a time
  float* out;           // [B, C, G, D]
  const float* counts;  // pooling: [images of the chunk, tiles, C]
  float min_pixels;
  // scatter: locations are cut into blocks
  int blocks_y, blocks_x;
  const float* vectors;  // [B, C, G, D]: prototypes, or their gradients
  float* scale;          // of the vectors: pooling [B, N, C, G] factors; matching [B, C, G] 1 / |p|

  LSLPN_HD std::int64_t gather_blocks() const {
    return chunk.episodes * parts_y * parts_x * parts_c;
  }
  LSLPN_HD std::int64_t scatter_blocks() const { return chunk.episodes * N * blocks_y * blocks_x; }
  LSLPN_HD int pitch() const { return (D + 15) / 16 * 16 + 4; }  // floats; no bank twice
  // The map of class c and a window of a tile, the w-th from the top left one.
  LSLPN_HD int slot(int c, int w, int windows_x) const {
    if (!places) return c;
    const int at = windows_x == grid.tiles_x.windows
                       ? w
                       : w / windows_x * grid.tiles_x.windows + w % windows_x;
    return c * grid.tile_windows() + at;
  }
};

// ---- on the host ----

// Cuts the windows of an episode for `gather` and the locations of an image for `scatter`.
inline bool plan_exchange(Exchange& e, std::int64_t episodes) {
  e.blocks_y = static_cast<int>(divide_up(e.grid.y.cells, kBlock));
  e.blocks_x = static_cast<int>(divide_up(e.grid.x.cells, kBlock));
  const auto near = [](const Axis& axis, const Tiles& tiles, int blocks) {
    int most = 0;
    for (int k = 0; k < blocks; ++k) {
      const Range cells = block_of(axis.cells, blocks, k);
      const Range range = stretches_near(axis, tiles, cells.begin, cells.end - 1);
      most = std::max(most, range.end - range.begin);
    }
    return most;
  };
  if (near(e.grid.y, e.grid.tiles_y, e.blocks_y) > kNear) return false;
  if (near(e.grid.x, e.grid.tiles_x, e.blocks_x) > kNear) return false;
  e.ring = e.grid.tiles_y.windows;

  // The parts for which two blocks a multiprocessor have the fewest tiles to visit; of these, those
  // which have the fewest in all.
  const auto visits = [](const Axis& axis, const Tiles& tiles, int parts, int& total) {
    int most = total = 0;
    for (int k = 0; k < parts; ++k) {
      const Range w = block_of(axis.windows, parts, k);
      const Range t = stretches_of_windows(axis, tiles, w.begin, w.end - 1);
      most = std::max(most, t.end - t.begin);
      total += t.end - t.begin;
    }
    return most;
  };
  const Device device = this_device();
  const std::int64_t room = std::min(device.shared_memory / 3, 72 << 10) - 2048;
  e.parts_c = 0;
  std::int64_t least = -1;
  for (int parts_x = 1; parts_x <= e.grid.x.windows; ++parts_x) {
    int total_x, total_y;
    const int most_x = visits(e.grid.x, e.grid.tiles_x, parts_x, total_x);
    const std::int64_t width = divide_up(e.grid.x.windows, parts_x);
    const std::int64_t classes = room / (4 * e.ring * width * e.pitch());
    if (classes == 0) continue;
    const int parts_c = static_cast<int>(divide_up(e.C, classes));
    for (int parts_y = 1; parts_y <= e.grid.y.windows; ++parts_y) {
      const int most_y = visits(e.grid.y, e.grid.tiles_y, parts_y, total_y);
      const std::int64_t blocks = episodes * parts_y * parts_x * parts_c;
      // A visit takes the longer, the more products of 8 columns it has.
      const std::int64_t products = divide_up(divide_up(e.C, parts_c) * e.grid.tile_windows(), 8);
      const std::int64_t turns = divide_up(blocks, 2 * device.multiprocessors);
      const std::int64_t time = turns * most_y * most_x * products;
      const std::int64_t cost = (time << 20) + std::int64_t{total_y} * total_x * parts_c * products;
      if (least >= 0 && cost >= least) continue;
      least = cost;
      e.parts_y = parts_y;
      e.parts_x = parts_x;
      e.parts_c = parts_c;
    }
  }
  return least >= 0;
}

// Bytes of shared memory of `gather`.
inline std::size_t gather_memory(const Exchange& e) {
  const std::int64_t width = divide_up(e.grid.x.windows, e.parts_x);
  const std::int64_t classes = divide_up(e.C, e.parts_c);
  const int stretches = e.grid.tiles_y.count + e.grid.tiles_x.count;
  return static_cast<std::size_t>(12 * stretches + 4 * e.ring * width * classes * e.pitch());
}

}  // namespace lslpn::cuda
