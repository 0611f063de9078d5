// How the tiled kernels cut the image into tiles, and what a tile knows of its axes.
//
// An axis is cut into stretches of at most kTilePixels pixels; a tile is a stretch of rows by a
// stretch of columns. The pixels of a tile are interpolated from a small block of feature
// locations and lie in few windows, so that a warp can hold all that belongs to a tile.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <vector>

#include "common.h"

namespace lslpn::cuda {

constexpr int kTilePixels = 32;  // a lane for each column of a tile
constexpr int kTileRows = 6;     // feature locations of a tile, at most
constexpr int kTileColumns = 8;
constexpr int kMaxTiles = 400;  // along an axis; they travel as kernel parameters
// Up to here pixel positions fit into 32 bits.
constexpr int kTiledAxis = 1 << 14;

// One axis cut into stretches.
struct Tiles {
  int count;
  int cells, windows;  // the most that a stretch has of them
  std::uint16_t begin[kMaxTiles + 1];
};

// A stretch: pixels begin <= x < end, in windows first .. last (not every pixel in each of them),
// interpolated from feature locations lower .. upper.
struct Stretch {
  int begin, end;
  int first, last;
  int lower, upper;
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
  return {begin,
          end,
          axis.covering(begin).first,
          axis.covering(end - 1).last,
          short_taps(axis, begin).lower,
          upper_tap(axis, end - 1)};
}
LSLPN_HD Stretch stretch(const Axis& axis, const Tiles& tiles, int i) {
  return stretch_of(axis, tiles.begin[i], tiles.begin[i + 1]);
}

// The stretch that a pixel lies in, found from a guess.
LSLPN_HD int stretch_at(const Tiles& tiles, int pixel) {
  const int pixels = tiles.begin[tiles.count];
  int i =
      static_cast<int>(static_cast<unsigned>(pixel * tiles.count) / static_cast<unsigned>(pixels));
  while (tiles.begin[i] > pixel) --i;
  while (tiles.begin[i + 1] <= pixel) ++i;
  return i;
}

// What a feature location is touched by: stretches and windows, both ends included. None where
// no pixel is interpolated from it: last_stretch < first_stretch.
struct Cell {
  short first_stretch, last_stretch;
  short first_window, last_window;
};
LSLPN_HD Cell cell_of(const Axis& axis, const Tiles& tiles, int cell) {
  // The pixels with a tap on it; estimated from outside, then pixel by pixel.
  const int n = axis.pixels, cells = axis.cells;
  int first = ((2 * cell - 1) * n) / (2 * cells) - 2;
  int last = ((2 * cell + 3) * n) / (2 * cells) + 1;
  first = first < 0 ? 0 : first;
  last = last > n - 1 ? n - 1 : last;
  while (first < n && upper_tap(axis, first) < cell) ++first;
  while (last >= 0 && short_taps(axis, last).lower > cell) --last;
  if (last < first) return {0, -1, 0, -1};
  return {static_cast<short>(stretch_at(tiles, first)), static_cast<short>(stretch_at(tiles, last)),
          static_cast<short>(axis.covering(first).first),
          static_cast<short>(axis.covering(last).last)};
}

// The tiles' weights, or gradients, at feature locations: for every image and tile
//   [rows][slots][columns]   rows and columns of the tile's own block of feature locations
// with rows rounded up to 16 bytes, so that they can be copied asynchronously.
struct MapLayout {
  int rows, slots, columns;
  int row;   // floats from row to row
  int tile;  // floats from tile to tile

  static MapLayout of(const Tiles& y, const Tiles& x, int slots) {
    MapLayout m{y.cells, slots, x.cells, 0, 0};
    m.row = static_cast<int>(round_up(std::int64_t{slots} * m.columns, 4));
    m.tile = m.rows * m.row;
    return m;
  }
};

// ---- on the host ----

inline bool tileable(const Axis& axis) {
  return axis.pixels <= kTiledAxis && axis.cells <= kTiledAxis;
}

// Fills in what follows from `begin` and `count`.
inline void measure(const Axis& axis, Tiles& tiles) {
  tiles.cells = tiles.windows = 0;
  for (int i = 0; i < tiles.count; ++i) {
    const Stretch s = stretch(axis, tiles, i);
    tiles.cells = std::max(tiles.cells, s.upper - s.lower + 1);
    tiles.windows = std::max(tiles.windows, s.last - s.first + 1);
  }
}

// Stretches of `length` pixels, whatever windows they cross.
inline bool cut_evenly(const Axis& axis, int length, Tiles& tiles) {
  tiles.count = static_cast<int>(divide_up(axis.pixels, length));
  if (tiles.count > kMaxTiles) return false;
  for (int i = 0; i < tiles.count; ++i) tiles.begin[i] = static_cast<std::uint16_t>(i * length);
  tiles.begin[tiles.count] = static_cast<std::uint16_t>(axis.pixels);
  measure(axis, tiles);
  return true;
}

// The even cut that has the kernels read the least: few feature locations twice, few windows.
inline bool cut_for_matching(const Axis& axis, int cells, int windows, Tiles& best) {
  if (!tileable(axis)) return false;
  std::int64_t least = -1;
  for (int length = std::min(kTilePixels, axis.pixels); length >= 1; --length) {
    Tiles tiles;
    if (!cut_evenly(axis, length, tiles)) break;
    if (tiles.cells > cells || tiles.windows > windows) continue;
    const std::int64_t cost =
        static_cast<std::int64_t>(tiles.count) * tiles.cells * (4 + tiles.windows);
    if (least < 0 || cost < least) {
      least = cost;
      best = tiles;
    }
  }
  return least >= 0;
}

// Stretches that begin wherever a window starts or ends: all pixels of one lie in the same windows.
inline bool cut_at_windows(const Axis& axis, int cells, Tiles& tiles) {
  if (!tileable(axis)) return false;
  std::vector<int> cuts{0, axis.pixels};
  if (axis.windows > kMaxTiles) return false;
  for (int m = 0; m < axis.windows; ++m) {
    cuts.push_back(axis.start(m));
    cuts.push_back(axis.start(m) + axis.window);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  tiles.count = 0;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    // In equal parts, as few as do; a single pixel always does.
    const int length = cuts[i + 1] - cuts[i];
    const auto fits = [&](int parts) {
      for (int k = 0; k < parts; ++k) {
        const Stretch part =
            stretch_of(axis, cuts[i] + k * length / parts, cuts[i] + (k + 1) * length / parts);
        if (part.upper - part.lower >= cells) return false;
      }
      return true;
    };
    int parts = static_cast<int>(divide_up(length, kTilePixels));
    while (!fits(parts)) ++parts;
    for (int k = 0; k < parts; ++k) {
      if (tiles.count == kMaxTiles) return false;
      tiles.begin[tiles.count++] = static_cast<std::uint16_t>(cuts[i] + k * length / parts);
    }
  }
  tiles.begin[tiles.count] = static_cast<std::uint16_t>(axis.pixels);
  measure(axis, tiles);
  return true;
}

// Plans follow from sizes alone and take longer than a launch: a thread keeps those it has made.
using PlanKey = std::array<std::int64_t, 18>;

inline PlanKey plan_key(const Features& f, const Axis& y, const Axis& x, std::int64_t C) {
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
          device.multiprocessors,
          device.shared_memory,
          device.workspace};
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

// The tiles' maps lie in a workspace, which should not grow with the batch: images are taken in
// chunks, whole episodes or parts of one.
struct Chunk {
  std::int64_t first_b, first_n, episodes, images;  // images of each episode
};

struct Chunks {
  std::int64_t images;  // the most that a chunk has, over all its episodes

  // For `bytes` of workspace an image. Never more than a part of the features, or than some MiB
  // if they are small; but one image at least.
  static Chunks of(const Features& f, std::int64_t bytes) {
    const std::int64_t size = f.dtype == DType::float32 ? 4 : 2;
    const std::int64_t all = f.B * f.N;
    const std::int64_t budget =
        std::max<std::int64_t>(this_device().workspace, all * f.D * f.h * f.w * size / 12);
    const std::int64_t images = std::min(all, std::max<std::int64_t>(1, budget / bytes));
    return {images < f.N ? images : images / f.N * f.N};
  }

  // Calls f(chunk), which returns an error or an empty string, for one chunk after the other.
  template <class F>
  std::string each(const Features& features, F f) const {
    const std::int64_t N = features.N;
    const std::int64_t episodes = std::max<std::int64_t>(1, images / N);
    for (std::int64_t b = 0; b < features.B; b += episodes) {
      for (std::int64_t n = 0; n < N; n += images) {
        const std::string error =
            f(Chunk{b, n, std::min(episodes, features.B - b), std::min(images, N - n)});
        if (!error.empty()) return error;
      }
    }
    return "";
  }
};

}  // namespace lslpn::cuda
