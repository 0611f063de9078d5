// Features as a kernel sees them, and how the image is cut into tiles.
//
// An axis is cut wherever a window starts or ends, and into segments of at most kTilePixels pixels;
// a tile is a segment of rows by a segment of columns. All pixels of a tile lie in the same
// windows, and are interpolated from the same block of at most kTileSide x kTileSide feature
// locations.
#pragma once

#include <algorithm>
#include <vector>

#include "device.h"
#include "launch.h"

namespace lslpn::cuda {

// Images of all episodes, N of each. Strides in elements; those within an image in 32 bits.
template <class T>
struct Images {
  T* data;
  std::int64_t b, n;
  int N, d, h, w;

  LSLPN_DEVICE T* image(int i) const { return data + (i / N * b + i % N * n); }
};

template <class T>
Images<T> images_of(const Features& f) {
  const auto within = [&](int axis) { return static_cast<int>(f.stride[axis]); };
  return {static_cast<T*>(f.data),
          f.stride[0],
          f.stride[1],
          static_cast<int>(f.N),
          within(2),
          within(3),
          within(4)};
}

// Whether every element of an image can be reached from its first by an int.
inline bool small_images(const Features& f) {
  const std::int64_t size[3] = {f.D, f.h, f.w};
  std::int64_t last = 0;
  for (int i = 0; i < 3; ++i) {
    if (f.stride[2 + i] < 0 || f.stride[2 + i] > 0x7fffffff) return false;
    last += (size[i] - 1) * f.stride[2 + i];
  }
  return last <= 0x7fffffff;
}

// Calls f(T()) with the type of features of a dtype.
template <class F>
auto with_type(DType dtype, F f) {
  if (dtype == DType::float16) return f(Half());
  if (dtype == DType::bfloat16) return f(BFloat16());
  return f(float());
}

template <class T>
LSLPN_HD T divide_up(T a, int b) {
  return (a + b - 1) / b;
}

constexpr int kTilePixels = kWarp;  // a lane for each column of a tile
constexpr int kTileSide = 6;        // feature locations of a tile along an axis, at most
// Floats of a map over a tile's locations: row r, column c at kTileSide r + c.
constexpr int kMap = kTileSide * kTileSide;
constexpr int kMaxTiles = 255;  // along an axis, and windows; they are kernel parameters
// Pixels and locations of an axis, at most: interpolation positions fit into 32 bits.
constexpr int kTiledAxis = 1 << 14;
constexpr int kCells = 1 << 12;

// A segment of an axis: its pixels, the feature locations they are interpolated from, the windows
// over them.
struct Segment {
  int pixel, pixels, cell, cells, window, windows;
};

// One axis cut into segments.
struct Tiles {
  int count;
  int windows;   // the largest number over a segment
  bool between;  // whether any pixel lies between two locations
  struct {
    std::uint16_t pixel, cell : 13, cells : 3;
    std::uint8_t window, windows;
  } packed[kMaxTiles + 1];  // that after the last has the ends of the axis

  LSLPN_HD int begin(int k) const { return packed[k].pixel; }
  LSLPN_HD Segment segment(int k) const {
    const auto& of = packed[k];
    return {of.pixel, packed[k + 1].pixel - of.pixel, of.cell, of.cells, of.window, of.windows};
  }
};

// An image cut into tiles.
struct Grid {
  Axis y, x;
  Tiles tiles_y, tiles_x;

  LSLPN_HD int tiles() const { return tiles_y.count * tiles_x.count; }
  LSLPN_HD int windows() const { return y.windows * x.windows; }
  LSLPN_HD int tile_windows() const { return tiles_y.windows * tiles_x.windows; }
};

// begin <= i < end.
struct Range {
  int begin, end;
};

// Axis::taps in 32 bits.
LSLPN_HD Taps<float> short_taps(const Axis& axis, int pixel) {
  const int position = (2 * pixel + 1) * axis.cells - axis.pixels;
  if (position <= 0) return {0, 0.0f};
  const unsigned unit = 2u * static_cast<unsigned>(axis.pixels);
  const int lower = static_cast<int>(static_cast<unsigned>(position) / unit);
  if (lower >= axis.cells - 1) return {axis.cells - 1, 0.0f};
  const int rest = position - lower * static_cast<int>(unit);
  return {lower, static_cast<float>(rest) / static_cast<float>(unit)};
}
// The locations that pixels begin .. end - 1 are interpolated from.
LSLPN_HD Range locations(const Axis& axis, const Range& pixels) {
  const Taps<float> last = short_taps(axis, pixels.end - 1);
  return {short_taps(axis, pixels.begin).lower, last.lower + (last.upper > 0 ? 2 : 1)};
}

LSLPN_HD Range pixels_of_window(const Axis& axis, int window) {
  return {axis.start(window), axis.start(window) + axis.window};
}
// The pixels that are interpolated from any of these locations.
LSLPN_HD Range pixels_of(const Axis& axis, const Range& cells) {
  const int begin = (2 * cells.begin - 1) * axis.pixels - axis.cells;
  const int end = divide_up((2 * cells.end + 1) * axis.pixels - axis.cells, 2 * axis.cells);
  return {cells.begin == 0 ? 0 : begin / (2 * axis.cells) + 1,
          end < axis.pixels ? end : axis.pixels};
}
LSLPN_HD Range windows_over(const Axis& axis, const Range& pixels) {
  return {axis.covering(pixels.begin).first, axis.covering(pixels.end - 1).last + 1};
}

// The segment that a pixel lies in, searched from an estimate.
LSLPN_HD int segment_at(const Tiles& tiles, int pixel) {
  const unsigned pixels = tiles.begin(tiles.count);
  int i = static_cast<int>(static_cast<unsigned>(pixel * tiles.count) / pixels);
  while (tiles.begin(i) > pixel) --i;
  while (tiles.begin(i + 1) <= pixel) ++i;
  return i;
}
LSLPN_HD Range segments_over(const Tiles& tiles, const Range& pixels) {
  return {segment_at(tiles, pixels.begin), segment_at(tiles, pixels.end - 1) + 1};
}
// The k-th part, where `length` is cut into parts whose lengths differ by 1 at most.
LSLPN_HD Range part_of(int length, int parts, int k) {
  return {length * k / parts, length * (k + 1) / parts};
}

// On the host: cuts an axis; false where it cannot be cut. With fewer pixels than locations some of
// these would lie under no pixel, and a NaN there must not reach any result.
inline bool cut_at_windows(const Axis& axis, Tiles& tiles) {
  if (axis.pixels < axis.cells) return false;
  if (axis.pixels > kTiledAxis || axis.cells > kCells || axis.windows > kMaxTiles) return false;
  std::vector<int> cuts{0, axis.pixels};
  for (int m = 0; m < axis.windows; ++m) {
    cuts.push_back(axis.start(m));
    cuts.push_back(axis.start(m) + axis.window);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  tiles.count = tiles.windows = 0;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    // As few equal parts as fit; a single pixel always does.
    const int length = cuts[i + 1] - cuts[i];
    const auto fits = [&](int parts) {
      for (int k = 0; k < parts; ++k) {
        const Range part = part_of(length, parts, k);
        const Range cells = locations(axis, {cuts[i] + part.begin, cuts[i] + part.end});
        if (cells.end - cells.begin > kTileSide) return false;
      }
      return true;
    };
    int parts = divide_up(length, kTilePixels);
    while (!fits(parts)) ++parts;
    if (tiles.count + parts > kMaxTiles) return false;
    const Covering windows = axis.covering(cuts[i]);
    tiles.windows = std::max(tiles.windows, windows.last - windows.first + 1);
    for (int k = 0; k < parts; ++k, ++tiles.count) {
      const Range part = part_of(length, parts, k);
      const Range cells = locations(axis, {cuts[i] + part.begin, cuts[i] + part.end});
      auto& of = tiles.packed[tiles.count];
      of.pixel = static_cast<std::uint16_t>(cuts[i] + part.begin);
      of.cell = static_cast<std::uint16_t>(cells.begin);
      of.cells = static_cast<std::uint16_t>(cells.end - cells.begin);
      of.window = static_cast<std::uint8_t>(windows.first);
      of.windows = static_cast<std::uint8_t>(windows.last - windows.first + 1);
    }
  }
  auto& end = tiles.packed[tiles.count];
  end.pixel = static_cast<std::uint16_t>(axis.pixels);
  end.cell = static_cast<std::uint16_t>(axis.cells);
  tiles.between = false;
  for (int x = 0; x < axis.pixels; ++x) tiles.between |= short_taps(axis, x).upper > 0;
  return true;
}

}  // namespace lslpn::cuda
