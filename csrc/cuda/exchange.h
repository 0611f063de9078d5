// The two products over D channels between feature locations and windows, what they share, and how
// the host cuts them into blocks.
//
//   gather   out(c, m, d)    = sum over images and locations (i, j) of w(c, m, i, j) F(i, j, d)
//   scatter  grad F(i, j, d) = sum over c, m of w(c, m, i, j) v(c, m, d); for matching, plus the
//                              gradients of the Gram maps times F at the neighbours of (i, j)
//
// The weights w come tile by tile, as maps over the locations of a tile: one for each class, and
// where windows over a tile have different weights, one for each of these. `sum_tiles` adds up
// those of a window's tiles. Every number is summed by one thread or warp, in a fixed order.
#pragma once

#include <map>
#include <optional>
#include <utility>

#include "pixels.h"
#include "products.h"

namespace lslpn::cuda {

constexpr int kExchangeWarps = 4;
constexpr int kExchangeThreads = kWarp * kExchangeWarps;
constexpr int kColumns = 8;  // gather: (class, window) pairs of a block, at most
constexpr int kBlock = 8;    // scatter: feature locations of a block along an axis
// Two blocks on each of 132 multiprocessors. A constant, for the order of sums follows from the
// cut, and must not depend on the device.
constexpr int kBlocksAtATime = 264;
constexpr int kGatherBytes = 80 << 10;  // of shared memory, at most
constexpr int kLocations = 256;  // gather: those whose weights are in shared memory at a time

// A class and a window: its locations, the weight of location (0, 0), and its index in [C, Gy, Gx].
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
  bool window_maps;               // whether the windows over a tile have maps of their own
  int tile_maps;                  // maps of a tile; the last kGramMaps are of the Gram maps
  int box_y, box_x;               // locations of a window, at most
  int columns;                    // gather: windows and classes are cut into parts, one block each,
  int parts_y, parts_x, parts_c;  // of at most so many pairs
  float* maps;                    // [B, N, tiles, tile_maps, kMap]
  float* counts;                  // pooling: [B, N, tiles, C] pixels
  float min_pixels;               // pooling
  float* weights;        // [B, N, C, Gy, Gx, box_y, box_x], from a window's first location on
  float4* gram_weights;  // matching: [B, N, h, w] gradients of the Gram maps, that of `own` doubled
  const float* vectors;  // [B, C, Gy, Gx, D]: prototypes, or their gradients
  float* scale;          // of the vectors: pooling [B, N, C, Gy, Gx] factors, matching
                         // [B, C, Gy, Gx] 1 / |p|
  float* out;            // gather: [B, C, Gy, Gx, D]

  LSLPN_HD int pairs() const { return C * grid.windows(); }
  LSLPN_HD int box() const { return box_y * box_x; }
  LSLPN_HD std::int64_t gather_blocks() const { return B * parts_y * parts_x * parts_c; }
  LSLPN_HD std::int64_t scatter_blocks() const {
    return B * N * ((grid.y.cells - 1) / kBlock + 1) * ((grid.x.cells - 1) / kBlock + 1);
  }
  // Floats from one column's sums to the next in `gather`, which avoids bank conflicts.
  LSLPN_HD int pitch() const { return D + 4; }
};

// The e-th pair of some classes and windows, with its weights in an image.
LSLPN_DEVICE Pair pair_of(const Exchange& p, std::int64_t image, const Range& classes,
                          const Range& wy, const Range& wx, int e) {
  const int across = wx.end - wx.begin, down = wy.end - wy.begin, row = e / across, c = row / down;
  const int m_y = wy.begin + row - c * down, m_x = wx.begin + e - row * across;
  const Range y = locations_of_window(p.grid.y, m_y), x = locations_of_window(p.grid.x, m_x);
  const int index = ((classes.begin + c) * p.grid.y.windows + m_y) * p.grid.x.windows + m_x;
  const std::int64_t at = image * p.pairs() + index;
  return {y.begin,
          x.begin,
          y.end - y.begin,
          x.end - x.begin,
          p.weights + (at * p.box() - (y.begin * p.box_x + x.begin)),
          index};
}

// ---- on the host ----

// Gives the arrays of an exchange their places in a workspace; returns the bytes that they take.
inline std::int64_t place(Exchange& e, bool pool, void* workspace) {
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(workspace);
  std::uintptr_t next = begin;
  const auto take = [&](std::int64_t floats) {
    return reinterpret_cast<float*>(std::exchange(next, next + divide_up(floats, 4) * 16));
  };
  const std::int64_t images = e.B * e.N, tiles = e.grid.tiles(), windows = e.grid.windows();
  e.maps = take(images * tiles * e.tile_maps * kMap);
  e.weights = take(images * e.C * windows * e.box());
  if (pool) {
    e.counts = take(images * tiles * e.C);
  } else {
    e.gram_weights = reinterpret_cast<float4*>(take(4 * images * e.grid.y.cells * e.grid.x.cells));
    e.scale = take(e.B * e.C * windows);
  }
  return static_cast<std::int64_t>(next - begin);
}

// Cuts windows and classes for `gather`: of all cuts those where the slowest blocks of each round
// visit the fewest locations; of these, the one where all blocks together visit the fewest.
inline void cut_windows(Exchange& e) {
  const auto visits = [](const Axis& axis, int parts, int& total) {
    int most = total = 0;
    for (int k = 0; k < parts; ++k) {
      const Range w = part_of(axis.windows, parts, k);
      const int cells =
          locations_of_window(axis, w.end - 1).end - locations_of_window(axis, w.begin).begin;
      most = std::max(most, cells);
      total += cells;
    }
    return most;
  };
  std::int64_t least = -1;
  for (int down = 1; down <= std::min(e.columns, e.grid.y.windows); ++down) {
    for (int across = 1; across <= std::min(e.columns / down, e.grid.x.windows); ++across) {
      const int parts_y = divide_up(e.grid.y.windows, down);
      const int parts_x = divide_up(e.grid.x.windows, across);
      const int parts_c = divide_up(e.C, e.columns / (down * across));
      int total_x, total_y;
      const std::int64_t most_y = visits(e.grid.y, parts_y, total_y);
      const std::int64_t most = most_y * visits(e.grid.x, parts_x, total_x);
      const std::int64_t blocks = e.B * parts_y * parts_x * parts_c;
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
  e.window_maps = op == Operator::match_max;
  e.tile_maps = e.C * (e.window_maps ? e.grid.tile_windows() : 1);
  if (op != Operator::pool) e.tile_maps += kGramMaps;
  const auto largest = [](const Axis& axis) {
    int most = 0;
    for (int m = 0; m < axis.windows; ++m) {
      const Range cells = locations_of_window(axis, m);
      most = std::max(most, cells.end - cells.begin);
    }
    return most;
  };
  if (std::int64_t{e.grid.tiles()} * e.tile_maps * kMap > 0x7fffffff) return std::nullopt;
  e.box_y = largest(y);
  e.box_x = largest(x);
  e.columns = std::min<int>(kColumns, (kGatherBytes - sizeof(GatherMemory)) / (4 * e.pitch()));
  if (e.columns < 1) return std::nullopt;
  e.B = 1;
  e.B = std::clamp<std::int64_t>(workspace / place(e, op == Operator::pool, nullptr), 1, f.B);
  cut_windows(e);
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
