// The two products over D channels between feature locations and windows, what they share, and how
// the host cuts them into blocks.
//
//   gather   out(c, r, d)    = sum over images and locations (i, j) of w(c, r, i, j) F(i, j, d)
//   scatter  grad F(i, j, d) = sum over c, r of w(c, r, i, j) v(c, r, d); for matching, plus the
//                              gradients of the Gram maps times F at the neighbours of (i, j)
//
// The weights w come tile by tile, as maps over the locations of a tile. For pooling, all windows
// over a tile have the same, so a region r is a tile of an image, and a window is the sum of its
// tiles. For matching a region is a window of an episode, whose weights `sum_tiles` adds up. Every
// number is summed by one thread or warp, in a fixed order.
#pragma once

#include <map>
#include <optional>
#include <utility>

#include "pixels.h"
#include "products.h"

namespace lslpn::cuda {

constexpr int kExchangeWarps = 4;
constexpr int kExchangeThreads = kWarp * kExchangeWarps;
constexpr int kColumns = 8;  // gather: (class, region) pairs of a block, at most
constexpr int kBlock = 8;    // scatter: feature locations of a block along an axis
// Two blocks on each of 132 multiprocessors. A constant, for the order of sums follows from the
// cut, and must not depend on the device.
constexpr int kBlocksAtATime = 264;
constexpr int kGatherBytes = 80 << 10;  // of shared memory, at most
// gather: those whose weights are in shared memory at a time, at least those of kColumns tiles
constexpr int kLocations = 320;
static_assert(kLocations >= kColumns * kMap);
constexpr int kTileWeights = kMap + 4;      // pooling: floats of the weights of a tile
constexpr std::int64_t kMost = 0x7fffff00;  // tiles of a call, and floats of maps of an image

// A class and a region: its locations, the weight of location (0, 0), its index among all pairs.
struct alignas(16) Pair {
  int y, x, rows, columns;
  const float* weights;
  std::int64_t index;

  LSLPN_DEVICE bool has(int i, int j) const {
    return static_cast<unsigned>(i - y) < rows && static_cast<unsigned>(j - x) < columns;
  }
};

struct GatherMemory {
  uint4 weights[kLocations / 8][kWarp];  // of two locations a lane: high parts, low parts
  std::int64_t offsets[kLocations / 2];  // of two locations, in bytes
  Pair pairs[kColumns];
};

// B episodes of N images.
struct Exchange {
  Grid grid;
  std::int64_t B;
  int N, C, D;
  int regions_y, regions_x;
  int box, box_x;                 // floats of the weights of a region, and of a row of these
  int columns;                    // gather: regions and classes are cut into parts, a block each,
  int parts_y, parts_x, parts_c;  // of at most so many pairs
  bool window_maps;               // matching: whether the windows over a tile have their own maps
  int tile_maps;                  // matching: maps of a tile; the last kGramMaps are of these
  float* maps;                    // matching: [B, N, tiles, tile_maps, kMap]
  float* weights;  // [B, N, C, regions, box], rows of box_x, from a region's first location on;
                   // of a tile its map, at kMap its pixels, and whether a weight is not 0
  float4* gram_weights;  // matching: [B, N, h, w] gradients of the Gram maps, that of `own` doubled
  float* scale;          // of the vectors: matching 1 / |p|, pooling 1, or 0 for those not needed
  const float* vectors;  // scatter: [B, N, C, tiles, D] or [B, C, windows, D]
  float* out;            // gather: likewise

  LSLPN_HD int images() const { return static_cast<int>(B) * N; }
  LSLPN_HD int all_tiles() const { return images() * grid.tiles(); }
  LSLPN_HD int pairs() const { return C * regions_y * regions_x; }
  LSLPN_HD int gather_parts() const { return parts_y * parts_x * parts_c; }
  LSLPN_HD std::int64_t scatter_blocks() const {
    return images() * ((grid.y.cells - 1) / kBlock + 1) * ((grid.x.cells - 1) / kBlock + 1);
  }
  // Floats from one column's sums to the next in `gather`, which avoids bank conflicts.
  LSLPN_HD int pitch() const { return D + 4; }
};

// The locations from the first to the last region of a range along an axis.
LSLPN_HD Range locations_of(bool pool, const Axis& axis, const Tiles& tiles, const Range& r) {
  if (!pool) {
    return locations(axis, {axis.start(r.begin), pixels_of_window(axis, r.end - 1).end});
  }
  const Segment last = tiles.segment(r.end - 1);
  return {tiles.segment(r.begin).cell, last.cell + last.cells};
}

// The e-th pair of some classes and regions, with its weights in an image.
template <bool kPool>
LSLPN_DEVICE Pair pair_of(const Exchange& p, int image, const Range& classes, const Range& ry,
                          const Range& rx, int e) {
  const int across = rx.end - rx.begin, down = ry.end - ry.begin, row = e / across, c = row / down;
  const int i = ry.begin + row - c * down, j = rx.begin + e - row * across;
  const Range y = locations_of(kPool, p.grid.y, p.grid.tiles_y, {i, i + 1});
  const Range x = locations_of(kPool, p.grid.x, p.grid.tiles_x, {j, j + 1});
  const int index = ((classes.begin + c) * p.regions_y + i) * p.regions_x + j;
  const std::int64_t at = std::int64_t{image} * p.pairs() + index;
  return {y.begin,
          x.begin,
          y.end - y.begin,
          x.end - x.begin,
          p.weights + (at * p.box - (y.begin * p.box_x + x.begin)),
          index};
}

// ---- on the host ----

// Gives the arrays of an exchange their places in a workspace, but the weights of pooling; returns
// the bytes that they take.
inline std::int64_t place(Exchange& e, bool pool, void* workspace) {
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(workspace);
  std::uintptr_t next = begin;
  const auto take = [&](std::int64_t floats) {
    return reinterpret_cast<float*>(std::exchange(next, next + divide_up(floats, 4) * 16));
  };
  const std::int64_t images = e.images(), cells = e.grid.y.cells * e.grid.x.cells;
  if (pool) {
    e.vectors = e.out = take(images * e.pairs() * e.D);
    e.scale = take(images * e.pairs());
  } else {
    e.maps = take(images * e.grid.tiles() * e.tile_maps * kMap);
    e.weights = take(images * e.pairs() * e.box);
    e.gram_weights = reinterpret_cast<float4*>(take(4 * images * cells));
    e.scale = take(e.B * e.pairs());
  }
  return static_cast<std::int64_t>(next - begin);
}

// The largest part of an axis, by locations, if its regions are cut into parts.
inline int largest_part(bool pool, const Axis& axis, const Tiles& tiles, int count, int parts,
                        int& total) {
  int most = total = 0;
  for (int k = 0; k < parts; ++k) {
    const Range cells = locations_of(pool, axis, tiles, part_of(count, parts, k));
    most = std::max(most, cells.end - cells.begin);
    total += cells.end - cells.begin;
  }
  return most;
}

// Cuts regions and classes for `gather`: of all cuts those where the slowest blocks of each round
// visit the fewest locations; of these, the one where all blocks together visit the fewest.
inline void cut_for_gather(bool pool, Exchange& e) {
  const Grid& grid = e.grid;
  std::int64_t least = -1;
  for (int down = 1; down <= std::min(e.columns, e.regions_y); ++down) {
    for (int across = 1; across <= std::min(e.columns / down, e.regions_x); ++across) {
      const int parts_y = divide_up(e.regions_y, down), parts_x = divide_up(e.regions_x, across);
      const int parts_c = divide_up(e.C, e.columns / (down * across));
      int total_x, total_y;
      const std::int64_t most =
          std::int64_t{largest_part(pool, grid.y, grid.tiles_y, e.regions_y, parts_y, total_y)} *
          largest_part(pool, grid.x, grid.tiles_x, e.regions_x, parts_x, total_x);
      const std::int64_t blocks = (pool ? e.images() : e.B) * parts_y * parts_x * parts_c;
      const std::int64_t cost = (divide_up(blocks, kBlocksAtATime) * most << 24) +
                                std::int64_t{total_y} * total_x * parts_c;
      if (least >= 0 && cost >= least) continue;
      least = cost;
      e.parts_y = parts_y;
      e.parts_x = parts_x;
      e.parts_c = parts_c;
    }
  }
}

enum class Operator { pool, match_max, match_mean };

// What is decided from sizes alone: the exchange of the first episodes of a call, as many as fit
// into a workspace of so many bytes, one at least; none where the kernels do not take the call.
inline std::optional<Exchange> make_plan(const Features& f, const Axis& y, const Axis& x,
                                         std::int64_t C, Operator op, std::int64_t workspace) {
  if (f.D % kChannels != 0 || f.D > kTiledAxis || C > kTiledAxis) return std::nullopt;
  Exchange e{};
  e.grid.y = y;
  e.grid.x = x;
  if (!cut_at_windows(y, e.grid.tiles_y) || !cut_at_windows(x, e.grid.tiles_x)) return std::nullopt;
  if (op != Operator::pool && e.grid.tile_windows() > 16) return std::nullopt;
  e.N = static_cast<int>(f.N);
  e.C = static_cast<int>(C);
  e.D = static_cast<int>(f.D);
  const bool pool = op == Operator::pool;
  e.regions_y = pool ? e.grid.tiles_y.count : y.windows;
  e.regions_x = pool ? e.grid.tiles_x.count : x.windows;
  e.window_maps = op == Operator::match_max;
  e.tile_maps = e.C * (e.window_maps ? e.grid.tile_windows() : 1) + kGramMaps;
  const std::int64_t tiles = e.grid.tiles();
  if (std::max(tiles * e.tile_maps * kMap, tiles * e.N * f.B) > kMost) return std::nullopt;
  if (pool) {
    e.box = kTileWeights;
    e.box_x = kTileSide;
  } else {
    int total;
    e.box_x = largest_part(false, x, e.grid.tiles_x, e.regions_x, e.regions_x, total);
    e.box = e.box_x * largest_part(false, y, e.grid.tiles_y, e.regions_y, e.regions_y, total);
  }
  e.columns = std::min<int>(kColumns, (kGatherBytes - sizeof(GatherMemory)) / (4 * e.pitch()));
  if (e.columns < 1) return std::nullopt;
  e.B = 1;
  e.B = std::clamp<std::int64_t>(workspace / place(e, pool, nullptr), 1, f.B);
  cut_for_gather(pool, e);
  return e;
}

// The plan of a call. To make one takes longer than a launch, so each thread keeps those it has
// made.
inline std::optional<Exchange> plan_of(const Features& f, const Axis& y, const Axis& x,
                                       std::int64_t C, Operator op, std::int64_t workspace) {
  using Key = std::vector<std::int64_t>;
  thread_local std::map<Key, std::optional<Exchange>> known;
  Key key{static_cast<int>(op), C, f.B, f.N, f.D, workspace};
  for (const Axis& a : {y, x}) {
    key.insert(key.end(), {a.pixels, a.cells, a.window, a.step, a.windows});
  }
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() == 64) known.clear();  // of some 5 KB
  return known[key] = make_plan(f, y, x, C, op, workspace);
}

inline std::size_t gather_memory(const Exchange& e) {
  return sizeof(GatherMemory) + 4 * static_cast<std::size_t>(e.columns * e.pitch());
}

}  // namespace lslpn::cuda
