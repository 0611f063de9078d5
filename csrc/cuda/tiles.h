// How the tiled kernels cut the image into tiles, and what a tile knows of its axes.
//
// An axis is cut wherever a window starts or ends, and into stretches of at most kTilePixels
// pixels; a tile is a stretch of rows by a stretch of columns. All pixels of a tile lie in the same
// windows, and are interpolated from the same block of at most kTileSide x kTileSide locations.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <vector>

#include "common.h"

namespace lslpn::cuda {

constexpr int kWarp = 32;
constexpr int kTilePixels = 32;  // a lane for each column of a tile
constexpr int kTileSide = 6;     // feature locations of a tile along an axis, at most
// Floats of a map over a tile's locations: row r, column c at kTileSide r + c.
constexpr int kMap = kTileSide * kTileSide;
constexpr int kMaxTiles = 400;  // along an axis; they travel as kernel parameters
// Up to here pixel positions fit into 32 bits.
constexpr int kTiledAxis = 1 << 14;

// One axis cut into stretches.
struct Tiles {
  int count;
  int windows;   // the most over a stretch
  bool between;  // whether any pixel lies between two locations
  std::uint16_t begin[kMaxTiles + 1];
};

// An image cut into tiles.
struct Grid {
  Axis y, x;
  Tiles tiles_y, tiles_x;

  LSLPN_HD int tiles() const { return tiles_y.count * tiles_x.count; }
  LSLPN_HD int windows() const { return y.windows * x.windows; }
  LSLPN_HD int tile_windows() const { return tiles_y.windows * tiles_x.windows; }
};

// A stretch: its pixels, the feature locations they are interpolated from, the windows over them.
struct Stretch {
  short pixel, pixels;
  short cell, cells;
  short window, windows;
};

// Axis::taps in 32 bits, for axes of at most kTiledAxis pixels and cells.
LSLPN_HD Taps<float> short_taps(const Axis& axis, int pixel) {
  const int position = (2 * pixel + 1) * axis.cells - axis.pixels;
  if (position <= 0) return {0, 0.0f};
  const unsigned unit = 2u * static_cast<unsigned>(axis.pixels);
  const int lower = static_cast<int>(static_cast<unsigned>(position) / unit);
  if (lower >= axis.cells - 1) return {axis.cells - 1, 0.0f};
  const int rest = position - lower * static_cast<int>(unit);
  return {lower, static_cast<float>(rest) / static_cast<float>(unit)};
}
LSLPN_HD int upper_tap(const Axis& axis, int pixel) {
  const Taps<float> taps = short_taps(axis, pixel);
  return taps.lower + (taps.upper > 0 ? 1 : 0);
}

LSLPN_HD Stretch stretch_of(const Axis& axis, int begin, int end) {
  const int cell = short_taps(axis, begin).lower;
  const Covering windows = axis.covering(begin);
  return {
      static_cast<short>(begin),         static_cast<short>(end - begin),
      static_cast<short>(cell),          static_cast<short>(upper_tap(axis, end - 1) - cell + 1),
      static_cast<short>(windows.first), static_cast<short>(windows.last - windows.first + 1)};
}
LSLPN_HD Stretch stretch(const Axis& axis, const Tiles& tiles, int i) {
  return stretch_of(axis, tiles.begin[i], tiles.begin[i + 1]);
}

// A range: begin <= i < end.
struct Range {
  int begin, end;
};

// The stretch that a pixel lies in, found from a guess.
LSLPN_HD int stretch_at(const Tiles& tiles, int pixel) {
  const unsigned pixels = tiles.begin[tiles.count];
  int i = static_cast<int>(static_cast<unsigned>(pixel * tiles.count) / pixels);
  while (tiles.begin[i] > pixel) --i;
  while (tiles.begin[i + 1] <= pixel) ++i;
  return i;
}

// The stretches of windows first .. last.
LSLPN_HD Range stretches_of_windows(const Axis& axis, const Tiles& tiles, int first, int last) {
  return {stretch_at(tiles, axis.start(first)),
          stretch_at(tiles, axis.start(last) + axis.window - 1) + 1};
}

// The stretches that have any of the locations first .. last.
LSLPN_HD Range stretches_near(const Axis& axis, const Tiles& tiles, int first, int last) {
  const auto guess = [&](int cell) {
    const int pixel = static_cast<int>(static_cast<unsigned>(cell * axis.pixels) /
                                       static_cast<unsigned>(axis.cells));
    return stretch_at(tiles, pixel < axis.pixels ? pixel : axis.pixels - 1);
  };
  const auto lower = [&](int i) { return short_taps(axis, tiles.begin[i]).lower; };
  const auto upper = [&](int i) { return upper_tap(axis, tiles.begin[i + 1] - 1); };
  int i = guess(first), j = guess(last);
  while (i > 0 && upper(i - 1) >= first) --i;
  while (i < tiles.count && upper(i) < first) ++i;
  while (j < tiles.count - 1 && lower(j + 1) <= last) ++j;
  while (j >= 0 && lower(j) > last) --j;
  return {i, j < i ? i : j + 1};
}

// Begin and end of a block, where `length` is cut into `blocks` that differ by 1 at most.
LSLPN_HD Range block_of(int length, int blocks, int block) {
  return {length * block / blocks, length * (block + 1) / blocks};
}

// ---- on the host ----

// Cuts an axis; false where there is no way. With fewer pixels than locations some of these would
// lie under no pixel, and what they hold must not show.
inline bool cut_at_windows(const Axis& axis, Tiles& tiles) {
  if (axis.pixels < axis.cells) return false;
  if (axis.pixels > kTiledAxis || axis.cells > kTiledAxis || axis.windows > kMaxTiles) return false;
  std::vector<int> cuts{0, axis.pixels};
  for (int m = 0; m < axis.windows; ++m) {
    cuts.push_back(axis.start(m));
    cuts.push_back(axis.start(m) + axis.window);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  tiles.count = tiles.windows = 0;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    // In equal parts, as few as do; a single pixel always does.
    const int length = cuts[i + 1] - cuts[i];
    const auto begin = [&](int k, int parts) { return cuts[i] + k * length / parts; };
    const auto fits = [&](int parts) {
      for (int k = 0; k < parts; ++k) {
        if (stretch_of(axis, begin(k, parts), begin(k + 1, parts)).cells > kTileSide) return false;
      }
      return true;
    };
    int parts = static_cast<int>(divide_up(length, kTilePixels));
    while (!fits(parts)) ++parts;
    if (tiles.count + parts > kMaxTiles) return false;
    for (int k = 0; k < parts; ++k) {
      tiles.begin[tiles.count++] = static_cast<std::uint16_t>(begin(k, parts));
    }
    const Covering windows = axis.covering(cuts[i]);
    tiles.windows = std::max(tiles.windows, windows.last - windows.first + 1);
  }
  tiles.begin[tiles.count] = static_cast<std::uint16_t>(axis.pixels);
  tiles.between = false;
  for (int x = 0; x < axis.pixels; ++x) tiles.between |= short_taps(axis, x).upper > 0;
  return true;
}

inline bool make_grid(const Axis& y, const Axis& x, Grid& grid) {
  grid.y = y;
  grid.x = x;
  return cut_at_windows(y, grid.tiles_y) && cut_at_windows(x, grid.tiles_x);
}

// Plans follow from sizes alone and take longer than a launch: a thread keeps those it has made.
using PlanKey = std::array<std::int64_t, 18>;

inline PlanKey plan_key(const Features& f, const Axis& y, const Axis& x, std::int64_t C,
                        bool mean = false) {
  const Device device = this_device();
  return {f.dtype == DType::float64   ? 8
          : f.dtype == DType::float32 ? 4
                                      : 2,
          C,
          f.B,
          f.N,
          f.D,
          y.pixels,
          y.cells,
          y.window,
          y.step,
          y.windows,
          x.pixels,
          x.cells,
          x.window,
          x.step,
          x.windows,
          device.shared_memory,
          device.workspace,
          mean};
}

template <class Plan>
class Plans {
 public:
  // Copies the plan for these sizes, or calls `make(plan)`, which says whether there is one.
  template <class Make>
  bool find(const PlanKey& key, Plan& plan, Make make) {
    auto found = known_.find(key);
    if (found == known_.end()) {
      Plan made{};
      const bool possible = make(made);
      if (known_.size() == kMost) known_.clear();
      found = known_.emplace(key, possible ? std::optional<Plan>(made) : std::nullopt).first;
    }
    if (!found->second) return false;
    plan = *found->second;
    return true;
  }

 private:
  static constexpr std::size_t kMost = 64;  // of some 5 KB
  std::map<PlanKey, std::optional<Plan>> known_;
};

// The tiles' maps lie in a workspace, which should not grow with the batch: episodes are taken in
// chunks.
struct Chunk {
  std::int64_t first, episodes;
};

// How many episodes a chunk has, for `bytes` of workspace an image. All of a chunk take no more
// than a part of their features, or than some MiB if these are small; but it is one episode at
// least.
inline std::int64_t episodes_of_chunk(const Features& f, std::int64_t bytes) {
  const std::int64_t size = f.dtype == DType::float32 ? 4 : 2;
  const std::int64_t budget =
      std::max<std::int64_t>(this_device().workspace, f.B * f.N * f.D * f.h * f.w * size / 12);
  return std::min(f.B, std::max<std::int64_t>(1, budget / (bytes * f.N)));
}

// Calls launches(chunk), which returns an error or an empty string, for one chunk after the other.
template <class F>
std::string each_chunk(std::int64_t B, std::int64_t episodes, F launches) {
  for (std::int64_t b = 0; b < B; b += episodes) {
    const std::string error = launches(Chunk{b, std::min(episodes, B - b)});
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace lslpn::cuda
