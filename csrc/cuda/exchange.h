// The two products over D channels between feature locations and windows, and how the host cuts
// them into blocks.
//
//   gather   out(c, m, d)    = sum over images and locations (i, j) of w(c, m, i, j) F(i, j, d)
//   scatter  grad F(i, j, d) = sum over c, m of w(c, m, i, j) v(c, m, d); for matching, plus the
//                              gradients of the Gram maps times F at the neighbours of (i, j)
//
// The weights w come tile by tile, as maps over the locations of a tile: one for each class, and
// where windows over a tile have different weights, one for each of these. A block first sums the
// maps of the tiles that overlap at a location, once for all channels; then each of its warps takes
// 16 or 32 channels at a time. Every number is summed by one warp, in a fixed order.
#pragma once

#include <map>
#include <optional>

#include "products.h"
#include "tiles.h"

namespace lslpn::cuda {

constexpr int kExchangeWarps = 4;
constexpr int kExchangeThreads = kWarp * kExchangeWarps;
constexpr int kColumns = 8;  // gather: (class, window) pairs of a block, at most
constexpr int kBlock = 8;    // scatter: feature locations of a block along an axis
constexpr int kNear = 24;    // scatter: segments that touch a block along an axis, at most
// Two blocks on each of 132 multiprocessors. A constant, for the order of sums follows from the
// cut, and must not depend on the device.
constexpr int kBlocksAtATime = 264;
constexpr int kGatherBytes = 80 << 10;  // of shared memory, at most
constexpr int kLocations = 256;  // gather: those whose weights are in shared memory at a time

// A segment as `gather` sees it: its locations, its first window, and a bit for each column of the
// block whose window covers it.
struct CoveredSegment {
  short cell, end, window;
  unsigned short columns;
};

struct GatherMemory {
  uint4 weights[kLocations / 8][kWarp];  // of two locations a lane: high parts, low parts
  longlong2 offsets[kLocations / 8][4];  // of these locations, in bytes
  unsigned char columns[kLocations];     // a bit for each column whose window covers the location
  int maps[kColumns];                    // where the maps of a column begin
  Range tiles[2];
};

// Some episodes of the batch.
struct Chunk {
  std::int64_t first, episodes;
};

struct Exchange {
  Grid grid;
  Chunk chunk;
  std::int64_t N;
  int C, D;
  bool window_maps;   // whether the windows over a tile have maps of their own
  int tile_maps;      // maps of a tile
  const float* maps;  // [images of the chunk, tiles, tile_maps, kMap]
  // gather: windows and classes are cut into parts, one block each, of at most so many columns
  int columns;
  int parts_y, parts_x, parts_c;
  float* out;           // [B, C, G, D]
  const float* counts;  // pooling: [images of the chunk, tiles, C]
  float min_pixels;
  // scatter: locations are cut into blocks
  int blocks_y, blocks_x;
  const float* vectors;  // [B, C, G, D]: prototypes, or their gradients
  float* scale;          // of the vectors: pooling [B, N, C, G] factors, matching [B, C, G] 1 / |p|

  LSLPN_HD std::int64_t gather_blocks() const {
    return chunk.episodes * parts_y * parts_x * parts_c;
  }
  LSLPN_HD std::int64_t scatter_blocks() const { return chunk.episodes * N * blocks_y * blocks_x; }
  // Floats from one column's sums to the next, a multiple of 4 that avoids bank conflicts.
  LSLPN_HD int pitch() const { return (D + 15) / 16 * 16 + 4; }
  // The index of the map of class c and window (y, x), counted from the tile's first window.
  LSLPN_HD int map_of(int c, int y, int x) const {
    return window_maps ? c * grid.tile_windows() + y * grid.tiles_x.windows + x : c;
  }
};

// scatter: the locations of the k-th block along an axis.
LSLPN_HD Range cells_of(const Axis& axis, int k) {
  const int end = kBlock * (k + 1);
  return {kBlock * k, end < axis.cells ? end : axis.cells};
}

// The segments along both axes that `kFind` returns for the ranges y and x, found by a thread each.
// Ends with a barrier.
template <auto kFind>
LSLPN_DEVICE void find_tiles(const Grid& grid, const Range& y, const Range& x, Range (&tiles)[2]) {
  if (thread_index() < 2) {
    const bool down = thread_index() == 0;
    tiles[thread_index()] = kFind(down ? grid.y : grid.x, down ? grid.tiles_y : grid.tiles_x,
                                  down ? y.begin : x.begin, (down ? y.end : x.end) - 1);
  }
  __syncthreads();
}

// ---- on the host ----

// Bytes of shared memory of `gather`.
inline std::size_t gather_memory(const Exchange& e) {
  return sizeof(GatherMemory) + 4 * static_cast<std::size_t>(e.columns * e.pitch()) +
         sizeof(CoveredSegment) *
             static_cast<std::size_t>(e.grid.tiles_y.count + e.grid.tiles_x.count) +
         2 * static_cast<std::size_t>(e.grid.y.cells + e.grid.x.cells);
}

// Cuts the locations of an image for `scatter` and the windows of an episode for `gather`; false
// where a block would not hold its part.
inline bool cut_into_blocks(Exchange& e, std::int64_t episodes) {
  e.blocks_y = static_cast<int>(divide_up(e.grid.y.cells, kBlock));
  e.blocks_x = static_cast<int>(divide_up(e.grid.x.cells, kBlock));
  const auto fits = [](const Axis& axis, const Tiles& tiles, int blocks) {
    for (int k = 0; k < blocks; ++k) {
      const Range cells = cells_of(axis, k);
      const Range range = segments_near(axis, tiles, cells.begin, cells.end - 1);
      if (range.end - range.begin > kNear) return false;
    }
    return true;
  };
  if (!fits(e.grid.y, e.grid.tiles_y, e.blocks_y)) return false;
  if (!fits(e.grid.x, e.grid.tiles_x, e.blocks_x)) return false;

  e.columns = 0;
  e.columns =
      std::min(kColumns, (kGatherBytes - static_cast<int>(gather_memory(e))) / (4 * e.pitch()));
  if (e.columns < 1) return false;
  if (gather_memory(e) > static_cast<std::size_t>(shared_memory_limit())) return false;
  // Of all cuts of the windows, those where the slowest blocks of each round visit the fewest
  // locations; of these, the one where all blocks together visit the fewest.
  const auto visits = [](const Axis& axis, const Tiles& tiles, int parts, int& total) {
    int most = total = 0;
    for (int k = 0; k < parts; ++k) {
      const Range w = part_of(axis.windows, parts, k);
      const Range t = segments_of_windows(axis, tiles, w.begin, w.end - 1);
      const Segment last = segment(axis, tiles, t.end - 1);
      const int cells = last.cell + last.cells - segment(axis, tiles, t.begin).cell;
      most = std::max(most, cells);
      total += cells;
    }
    return most;
  };
  std::int64_t least = -1;
  for (int down = 1; down <= std::min(e.columns, e.grid.y.windows); ++down) {
    for (int across = 1; across <= std::min(e.columns / down, e.grid.x.windows); ++across) {
      const int parts_y = static_cast<int>(divide_up(e.grid.y.windows, down));
      const int parts_x = static_cast<int>(divide_up(e.grid.x.windows, across));
      const int parts_c = static_cast<int>(divide_up(e.C, e.columns / (down * across)));
      int total_x, total_y;
      const std::int64_t most_y = visits(e.grid.y, e.grid.tiles_y, parts_y, total_y);
      const std::int64_t most = most_y * visits(e.grid.x, e.grid.tiles_x, parts_x, total_x);
      const std::int64_t rounds = divide_up(episodes * parts_y * parts_x * parts_c, kBlocksAtATime);
      const std::int64_t cost = (rounds * most << 24) + std::int64_t{total_y} * total_x * parts_c;
      if (least >= 0 && cost >= least) continue;
      least = cost;
      e.parts_y = parts_y;
      e.parts_x = parts_x;
      e.parts_c = parts_c;
    }
  }
  return true;
}

// What is decided before the first launch, from sizes alone.
struct Plan {
  Exchange exchange;
  std::int64_t floats;    // of an image's maps and counts
  std::int64_t episodes;  // of a chunk
};

enum class Operator { pool, match_max, match_mean };

inline std::optional<Plan> make_plan(const Features& f, const Axis& y, const Axis& x,
                                     std::int64_t C, Operator op) {
  if (f.D > kTiledAxis || C > kTiledAxis) return std::nullopt;
  Plan plan{};
  Exchange& e = plan.exchange;
  e.grid.y = y;
  e.grid.x = x;
  if (!cut_at_windows(y, e.grid.tiles_y) || !cut_at_windows(x, e.grid.tiles_x)) return std::nullopt;
  if (op != Operator::pool && e.grid.tile_windows() > 16) return std::nullopt;
  e.N = f.N;
  e.C = static_cast<int>(C);
  e.D = static_cast<int>(f.D);
  e.window_maps = op == Operator::match_max;
  e.tile_maps = e.C * (e.window_maps ? e.grid.tile_windows() : 1);
  if (op != Operator::pool) e.tile_maps += kGramMaps;
  plan.floats =
      e.grid.tiles() * std::int64_t{e.tile_maps * kMap + (op == Operator::pool ? e.C : 0)};
  // The maps must not grow with the batch: all of a chunk take a twelfth of the features at most,
  // or 16 MiB if that is more, or one episode.
  const std::int64_t bytes = f.B * f.N * f.D * f.h * f.w * (f.dtype == DType::float32 ? 4 : 2);
  const std::int64_t budget = std::max<std::int64_t>(16 << 20, bytes / 12);
  plan.episodes = std::clamp<std::int64_t>(budget / (4 * plan.floats * f.N), 1, f.B);
  if (!cut_into_blocks(e, plan.episodes)) return std::nullopt;
  return plan;
}

// The plan for a call, or none where the kernels do not take it. To make one takes longer than a
// launch, so each thread keeps those it has made.
inline std::optional<Plan> plan_of(const Features& f, const Axis& y, const Axis& x, std::int64_t C,
                                   Operator op) {
  using Key = std::vector<std::int64_t>;
  thread_local std::map<Key, std::optional<Plan>> known;
  Key key{static_cast<int>(op), C, f.B, f.N, f.D, f.dtype == DType::float32, shared_memory_limit()};
  for (const Axis& a : {y, x}) {
    key.insert(key.end(), {a.pixels, a.cells, a.window, a.step, a.windows});
  }
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() == 64) known.clear();  // of some 5 KB
  return known[key] = make_plan(f, y, x, C, op);
}

// Calls launches(), which returns an error or an empty string, for one chunk of episodes after the
// other.
template <class F>
std::string each_chunk(Plan& plan, std::int64_t B, F launches) {
  std::string error;
  for (std::int64_t b = 0; b < B && error.empty(); b += plan.episodes) {
    plan.exchange.chunk = {b, std::min(plan.episodes, B - b)};
    error = launches();
  }
  return error;
}

}  // namespace lslpn::cuda
