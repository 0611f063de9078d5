// Between feature locations and windows: the two products over D channels.
//
//   gather   out(c, m, d)    = sum over images and locations (i, j) of w(c, m, i, j) F(i, j, d)
//   scatter  grad F(i, j, d) = sum over c, m of w(c, m, i, j) v(c, m, d), and for matching the
//                              gradient of the Gram maps times F at the neighbours of (i, j)
//
// w is what the pixels of the tiles give to their locations: a map over the locations of a tile for
// each class, and for each window over the tile where these differ. A block first adds up what the
// tiles of a window give to a location, for all channels; then each of its warps takes 16 or 32
// channels at a time, and every number is summed by one warp in a fixed order.
#pragma once

#include "products.h"
#include "tiles.h"

namespace lslpn::cuda {

constexpr int kExchangeWarps = 4;
constexpr int kExchangeThreads = kWarp * kExchangeWarps;
constexpr int kColumns = 8;  // classes and windows of a block, at most, gather
constexpr int kBlock = 8;    // feature locations of a block along an axis, scatter
constexpr int kNear = 24;    // stretches near them, at most
// Of the GPUs that these kernels are made for, two blocks on each of some 130 multiprocessors.
constexpr int kBlocksAtATime = 264;
constexpr int kGatherBytes = 80 << 10;  // of shared memory, at most

constexpr int kLocations = 256;  // whose weights a block has at a time

// A stretch as seen by a block: its locations, its first window, and as bits the columns it is of.
struct Part {
  short cell, end, window;
  unsigned short columns;
};

struct GatherMemory {
  uint4 weights[kLocations / 8][kWarp];  // of a lane's two locations: high parts, low parts
  longlong2 offsets[kLocations / 8][4];  // of these locations, in bytes
  unsigned char columns[kLocations];     // bits: those that the location lies under
  int slots[kColumns];                   // where the maps of a column begin
  Range tiles[2];
};

struct Exchange {
  Grid grid;
  Chunk chunk;
  std::int64_t N;
  int C, D;
  bool places;        // whether each window of a tile has a map of its own
  int slots;          // maps of a tile
  const float* maps;  // [images of the chunk, tiles, slots, kMap]
  // gather: windows and classes are cut into parts, a block each, of so many columns at most
  int columns;
  int parts_y, parts_x, parts_c;
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
  // The map of class c and a window of a tile, counted from its top left one.
  LSLPN_HD int slot(int c, int y, int x) const {
    return places ? c * grid.tile_windows() + y * grid.tiles_x.windows + x : c;
  }
};

// The locations of the k-th block along an axis, scatter.
LSLPN_HD Range cells_of(const Axis& axis, int k) {
  const int end = kBlock * (k + 1);
  return {kBlock * k, end < axis.cells ? end : axis.cells};
}

// Along both axes the tiles that kFind gives to what begins and ends so: a thread for each axis.
// Ends with a barrier.
template <auto kFind>
LSLPN_DEVICE void find_tiles(const Grid& grid, const Range& y, const Range& x, Range (&tiles)[2]) {
  if (thread_index() < 2) {
    const bool down = thread_index() == 0;
    tiles[thread_index()] = kFind(down ? grid.y : grid.x, down ? grid.tiles_y : grid.tiles_x,
                                  down ? y.begin : x.begin, (down ? y.end : x.end) - 1);
  }
  block_barrier();
}

// ---- on the host ----

// Bytes of shared memory of `gather`.
inline std::size_t gather_memory(const Exchange& e) {
  return sizeof(GatherMemory) + 4 * static_cast<std::size_t>(e.columns * e.pitch()) +
         sizeof(Part) * static_cast<std::size_t>(e.grid.tiles_y.count + e.grid.tiles_x.count) +
         2 * static_cast<std::size_t>(e.grid.y.cells + e.grid.x.cells);
}

// Cuts the windows of an episode for `gather` and the locations of an image for `scatter`.
inline bool plan_exchange(Exchange& e, std::int64_t episodes) {
  e.blocks_y = static_cast<int>(divide_up(e.grid.y.cells, kBlock));
  e.blocks_x = static_cast<int>(divide_up(e.grid.x.cells, kBlock));
  const auto near = [](const Axis& axis, const Tiles& tiles, int blocks) {
    int most = 0;
    for (int k = 0; k < blocks; ++k) {
      const Range cells = cells_of(axis, k);
      const Range range = stretches_near(axis, tiles, cells.begin, cells.end - 1);
      most = std::max(most, range.end - range.begin);
    }
    return most;
  };
  if (near(e.grid.y, e.grid.tiles_y, e.blocks_y) > kNear) return false;
  if (near(e.grid.x, e.grid.tiles_x, e.blocks_x) > kNear) return false;

  // The parts for which all blocks at a time have the fewest locations to visit, one after the
  // other; of these, those which have the fewest in all. The order of the sums follows from the
  // parts: these must not depend on the device.
  const auto visits = [](const Axis& axis, const Tiles& tiles, int parts, int& total) {
    int most = total = 0;
    for (int k = 0; k < parts; ++k) {
      const Range w = block_of(axis.windows, parts, k);
      const Range t = stretches_of_windows(axis, tiles, w.begin, w.end - 1);
      const Stretch last = stretch(axis, tiles, t.end - 1);
      const int cells = last.cell + last.cells - stretch(axis, tiles, t.begin).cell;
      most = std::max(most, cells);
      total += cells;
    }
    return most;
  };
  e.columns = 0;
  e.columns =
      std::min(kColumns, (kGatherBytes - static_cast<int>(gather_memory(e))) / (4 * e.pitch()));
  if (e.columns < 1 || gather_memory(e) > static_cast<std::size_t>(this_device().shared_memory))
    return false;
  std::int64_t least = -1;
  for (int down = 1; down <= std::min(e.columns, e.grid.y.windows); ++down) {
    for (int across = 1; across <= std::min(e.columns / down, e.grid.x.windows); ++across) {
      const int parts_y = static_cast<int>(divide_up(e.grid.y.windows, down));
      const int parts_x = static_cast<int>(divide_up(e.grid.x.windows, across));
      const int parts_c = static_cast<int>(divide_up(e.C, e.columns / (down * across)));
      int total_x, total_y;
      const std::int64_t most_y = visits(e.grid.y, e.grid.tiles_y, parts_y, total_y);
      const std::int64_t most = most_y * visits(e.grid.x, e.grid.tiles_x, parts_x, total_x);
      const std::int64_t blocks = episodes * parts_y * parts_x * parts_c;
      const std::int64_t time = divide_up(blocks, kBlocksAtATime) * most;
      const std::int64_t cost = (time << 24) + std::int64_t{total_y} * total_x * parts_c;
      if (least >= 0 && cost >= least) continue;
      least = cost;
      e.parts_y = parts_y;
      e.parts_x = parts_x;
      e.parts_c = parts_c;
    }
  }
  return true;
}

}  // namespace lslpn::cuda
