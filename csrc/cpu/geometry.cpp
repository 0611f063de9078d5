#include "geometry.h"

#include <algorithm>

namespace lslpn {
namespace {

template <class A>
struct Numbers {
  std::vector<A> upper, weight, square, cross;
};

struct AxisStorage {
  Axis axis;
  std::vector<Segment> segments;
  std::vector<int> lower, chunk;
  Numbers<float> single;
  Numbers<double> twice;

  template <class A>
  Numbers<A>& numbers() {
    if constexpr (sizeof(A) == 4) {
      return single;
    } else {
      return twice;
    }
  }
};

// Cuts begin <= x < end, which has the same windows throughout, into segments of bounded size.
void cut(const Axis& axis, int begin, int end, std::vector<Segment>& out) {
  const Taps<double> first = axis.taps<double>(begin), last = axis.taps<double>(end - 1);
  const int upper = last.lower + (last.upper > 0);
  int pieces = (end - begin + kTilePixels - 1) / kTilePixels;
  if (pieces == 1 && upper - first.lower + 1 > kTileCells) pieces = 2;
  if (pieces > 1) {
    for (int k = 0; k < pieces; ++k) {
      const std::int64_t length = end - begin;
      cut(axis, begin + static_cast<int>(length * k / pieces),
          begin + static_cast<int>(length * (k + 1) / pieces), out);
    }
    return;
  }
  const Covering windows = axis.covering(begin);
  out.push_back({begin, end, windows.first, windows.last, first.lower, upper, 0});
}

AxisStorage describe(const Axis& axis) {
  AxisStorage s;
  s.axis = axis;
  // Where a window starts or ends.
  std::vector<int> cuts = {0, axis.pixels};
  for (int m = 0; m < axis.windows; ++m) {
    cuts.push_back(axis.start(m));
    cuts.push_back(axis.start(m) + axis.window);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) cut(axis, cuts[i], cuts[i + 1], s.segments);

  for (int pixel = 0; pixel < axis.pixels; ++pixel) {
    s.lower.push_back(axis.taps<double>(pixel).lower);
  }
  const int segments = static_cast<int>(s.segments.size());
  // Each chunk costs the rows that it shares. Four are enough for most processors, and images with
  // many segments have more.
  const int chunks = std::min(16, std::max(std::min(4, (segments + 1) / 2), (segments + 3) / 4));
  for (int k = 0; k <= chunks; ++k) {
    s.chunk.push_back(static_cast<int>(static_cast<std::int64_t>(segments) * k / chunks));
  }
  return s;
}

template <class A>
AxisTables<A> tabulate(AxisStorage& s) {
  const Axis& axis = s.axis;
  AxisTables<A> t{};
  t.pixels = axis.pixels;
  t.cells = axis.cells;
  t.windows = axis.windows;
  t.segments = static_cast<int>(s.segments.size());
  t.segment = s.segments.data();
  for (Segment& g : s.segments) {
    g.before = t.locations;
    t.locations += g.upper - g.lower + 1;
    t.length = std::max(t.length, g.end - g.begin);
    t.reach = std::max(t.reach, g.upper - g.lower + 1);
    t.overlap = std::max(t.overlap, g.last - g.first + 1);
  }
  t.length = (t.length + 15) / 16 * 16;
  for (int k = 1; k < t.segments; ++k) {
    t.gaps |= s.segments[k].lower > s.segments[k - 1].upper + 1;
  }
  t.gaps |= s.segments[0].lower > 0 || s.segments.back().upper < axis.cells - 1;
  t.lower = s.lower.data();
  t.chunks = static_cast<int>(s.chunk.size()) - 1;
  t.chunk = s.chunk.data();

  Numbers<A>& n = s.numbers<A>();
  for (int pixel = 0; pixel < axis.pixels; ++pixel) {
    n.upper.push_back(axis.taps<A>(pixel).upper);
  }
  const std::size_t size = static_cast<std::size_t>(t.segments) * t.reach * t.length;
  n.weight.assign(size, A(0));
  n.square.assign(size, A(0));
  n.cross.assign(size, A(0));
  for (int k = 0; k < t.segments; ++k) {
    const Segment& g = s.segments[k];
    const std::size_t start = static_cast<std::size_t>(k) * t.reach * t.length;
    for (int pixel = g.begin; pixel < g.end; ++pixel) {
      const Taps<A> taps = axis.taps<A>(pixel);
      const std::size_t low = start + static_cast<std::size_t>(taps.lower - g.lower) * t.length +
                              static_cast<std::size_t>(pixel - g.begin);
      const A rest = A(1) - taps.upper;
      n.weight[low] = rest;
      n.square[low] = rest * rest;
      if (taps.upper > 0) {
        n.weight[low + t.length] = taps.upper;
        n.square[low + t.length] = taps.upper * taps.upper;
        n.cross[low] = rest * taps.upper;
      }
    }
  }
  t.upper = n.upper.data();
  t.weight = n.weight.data();
  t.square = n.square.data();
  t.cross = n.cross.data();
  return t;
}

}  // namespace

struct Geometry::Storage {
  AxisStorage y, x;
  Tables<float> single;
  Tables<double> twice;
};

Geometry::Geometry(const Axis& y, const Axis& x) : storage_(new Storage) {
  storage_->y = describe(y);
  storage_->x = describe(x);
  storage_->single = {tabulate<float>(storage_->y), tabulate<float>(storage_->x)};
  storage_->twice = {tabulate<double>(storage_->y), tabulate<double>(storage_->x)};
}

Geometry::~Geometry() = default;

const Axis& Geometry::y() const {
  return storage_->y.axis;
}
const Axis& Geometry::x() const {
  return storage_->x.axis;
}

template <>
const Tables<float>& Geometry::tables<float>() const {
  return storage_->single;
}
template <>
const Tables<double>& Geometry::tables<double>() const {
  return storage_->twice;
}

}  // namespace lslpn
