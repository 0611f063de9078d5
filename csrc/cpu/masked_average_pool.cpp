// Masked average pooling over the windows of a grid, equation (1), and its gradient.
//
//   p_{c,m} = 1/K sum over i of (sum over x in m of M_{i,c}(x) Up F_i(x)) / n,   n = sum of M over
//   m
//
// Up is linear, so masks are reduced to the feature locations l of a tile instead,
//
//   W_c(l) = sum over x in the tile of w_l(x) M_c(x),       t_c = sum over l of W_c(l) F(l),
//
// and a window is the union of its tiles: p += factor_{c,m} t_c with factor = 1 / (K n), or 0 for a
// window with too few pixels. Backward, with u_c = sum over the windows of the tile of factor dp:
//
//   dF(l) = sum over tiles and c of W_c(l) u_c
#include "parallel.h"
#include "rows.h"
#include "tile.h"

LSLPN_BEGIN
namespace cpu {
namespace {

// Classes of a tile that are processed together.
constexpr int kClasses = 16;
// Images and episodes whose partial sums are stored at the same time.
constexpr std::int64_t kImages = 16, kEpisodes = 8;

template <class A>
struct Problem {
  const Tables<A>& tables;
  const Features& features;
  const Masks& masks;
  std::int64_t C, D, width;  // width: channels of a packed location, padded
  std::int64_t pitch;        // from one packed location to the next
  std::int64_t windows;      // Gy * Gx
  std::int64_t locations;    // of all tiles

  Problem(const Tables<A>& t, const Features& f, const Masks& m)
      : tables(t),
        features(f),
        masks(m),
        C(m.C),
        D(f.D),
        width(padded(f.D)),
        pitch(pitch_of<A>(width)),
        windows(static_cast<std::int64_t>(t.y.windows) * t.x.windows),
        locations(static_cast<std::int64_t>(t.y.locations) * t.x.locations) {}

  int threads(int wanted) const {
    const double pixels = double(tables.y.pixels) * tables.x.pixels;
    const double locations = double(features.h) * features.w;
    const double work = double(features.B) * features.N * C * (pixels + 2 * locations * D);
    return work < kMinParallelWork ? 1 : wanted;
  }
};

// The mask of one class of one image, starting at a pixel: stored, or derived from the labels or
// from the masks of the other classes.
template <class A>
class ClassMask {
 public:
  ClassMask(const Problem<A>& p, std::int64_t b, std::int64_t n, std::int64_t c, int y, int x)
      : label_(c) {
    const Masks& m = p.masks;
    const std::int64_t H = p.tables.y.pixels, W = p.tables.x.pixels;
    const bool bytes = masks_are_bytes(m), labels = m.kind == MaskKind::labels;
    std::int64_t stored = 1, plane = 0;  // planes of an image, and the first one
    if (!labels) {
      stored = m.kind == MaskKind::foreground ? m.C - 1 : m.C;
      plane = c - (m.C - stored);
    }
    if (plane < 0) {
      read_ = bytes ? Read::rest_of_bytes : Read::rest_of_floats;
      foreground_ = static_cast<int>(stored);
      plane = 0;
    } else if (labels) {
      read_ = bytes ? Read::labels8 : Read::labels64;
    } else {
      read_ = bytes ? Read::bytes : Read::floats;
    }
    size_ = bytes ? 1 : labels ? 8 : static_cast<int>(sizeof(A));
    pitch_ = W * size_;
    plane_ = H * pitch_;
    const std::int64_t image = b * p.features.N + n;
    at_ = static_cast<const char*>(m.data) + (image * stored + plane) * plane_ +
          (static_cast<std::int64_t>(y) * W + x) * size_;
  }

  // n <= kLanes pixels of row i from column j on, both relative to the first pixel; the other lanes
  // are 0.
  Vec<A> load(int i, int j, int n) const {
    const char* at = at_ + i * pitch_ + j * size_;
    __builtin_prefetch(at + 64);  // of the next tile
    Vec<A> M{};
    switch (read_) {
      case Read::bytes:
        return __builtin_convertvector(load_index<A>(at, true, n), Vec<A>);
      case Read::floats:
        return cpu::load(reinterpret_cast<const A*>(at), n);
      case Read::labels64: {
        A buffer[kLanes<A>] = {};
        for (int t = 0; t < n; ++t) {
          buffer[t] = reinterpret_cast<const std::int64_t*>(at)[t] == label_;
        }
        return cpu::load(buffer);
      }
      case Read::labels8: {
        const Index<A> label = Index<A>{} + static_cast<Whole<A>>(label_);
        M = load_index<A>(at, true, n) == label ? splat(A(1)) : Vec<A>{};
        break;
      }
      case Read::rest_of_bytes: {
        Index<A> any{};
        for (int k = 0; k < foreground_; ++k) any |= load_index<A>(at + k * plane_, true, n);
        M = any == 0 ? splat(A(1)) : Vec<A>{};
        break;
      }
      case Read::rest_of_floats: {
        Vec<A> sum{};
        for (int k = 0; k < foreground_; ++k) {
          sum += cpu::load(reinterpret_cast<const A*>(at + k * plane_), n);
        }
        M = sum > A(1) ? Vec<A>{} : A(1) - sum;  // NaN stays NaN
        break;
      }
    }
    Index<A> lane{};
    for (int t = 0; t < kLanes<A>; ++t) lane[t] = t;
    return lane < n ? M : Vec<A>{};
  }

 private:
  enum class Read { bytes, floats, labels8, labels64, rest_of_bytes, rest_of_floats };
  Read read_;
  std::int64_t label_;
  int foreground_ = 0;  // number of foreground masks if the background is derived
  int size_;            // bytes per pixel
  std::int64_t pitch_, plane_;
  const char* at_;
};

// ---- mask sizes --------------------------------------------------------------------

// factor = 1 / (K n), or 0 for a window with too few pixels, from the sums over tiles.
template <class A>
void window_factors(const Problem<A>& p, const double* counts, double* columns, A min_pixels,
                    A* factor) {
  const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
  const std::int64_t Sx = x.segments;
  int sy = 0;
  for (int my = 0; my < y.windows; ++my) {
    // The segments of a window are those with first <= my <= last: a run that advances with my.
    while (y.segment[sy].last < my) ++sy;
    for (int sx = 0; sx < Sx; ++sx) columns[sx] = 0;
    for (int s = sy; s < y.segments && y.segment[s].first <= my; ++s) {
      for (int sx = 0; sx < Sx; ++sx) columns[sx] += counts[s * Sx + sx];
    }
    int first = 0;
    for (int mx = 0; mx < x.windows; ++mx) {
      while (x.segment[first].last < mx) ++first;
      double n = 0;
      for (int s = first; s < Sx && x.segment[s].first <= mx; ++s) n += columns[s];
      const A size = static_cast<A>(n);
      factor[static_cast<std::int64_t>(my) * x.windows + mx] =
          size > min_pixels ? A(1) / (size * static_cast<A>(p.features.N)) : A(0);
    }
  }
}

// ---- tiles ------------------------------------------------------------------------------------

// Where W of a tile begins, tiles one after the other; `plane` counts images and classes.
template <class A>
std::int64_t tile_weights(const Problem<A>& p, const Side<A>& y, const Side<A>& x,
                          std::int64_t plane) {
  return plane * p.locations + std::int64_t{y.before} * p.tables.x.locations +
         std::int64_t{y.cells} * x.before;
}

template <class A>
struct TileScratch {
  A* columns = nullptr;  // [R rows, T] a mask reduced to the rows of locations
  A* weights = nullptr;  // [kClasses, locations] W
  A* sums = nullptr;     // [kClasses, width] t, or u

  TileScratch(Arena& arena, const Problem<A>& p) {
    const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
    columns = arena.take<A>(y.reach * x.length);
    weights = arena.take<A>(static_cast<std::int64_t>(kClasses) * y.reach * x.reach);
    sums = arena.take<A>(kClasses * p.width);
  }

  // W of one class; returns the sum of its mask.
  double mask_weights(const Problem<A>& p, const Side<A>& y, const Side<A>& x, std::int64_t b,
                      std::int64_t n, std::int64_t c, A* out) const {
    const int T = p.tables.x.length;
    const ClassMask<A> mask(p, b, n, c, y.begin, x.begin);
    std::memset(columns, 0, sizeof(A) * y.cells * T);
    Index<A> any{};
    Vec<A> sum{};
    for (int t = 0; t < x.pixels; t += kLanes<A>) {
      const int count = x.pixels - t < kLanes<A> ? x.pixels - t : kLanes<A>;
      int row = 0;
      Vec<A> low{}, high{};
      walk_rows(
          p.tables.y, y, [&](int, int) { low = high = Vec<A>{}; },
          [&](int, A down) {
            const Vec<A> M = mask.load(row++, t, count);
            any |= M != Vec<A>{};
            sum += M;
            low += (A(1) - down) * M;
            high += down * M;
          },
          [&](int lower, int upper) {
            store(columns + lower * T + t, load(columns + lower * T + t) + low);
            store(columns + upper * T + t, load(columns + upper * T + t) + high);
          });
    }
    Whole<A> found = 0;
    for (int i = 0; i < kLanes<A>; ++i) found |= any[i];
    if (!found) {
      std::memset(out, 0, sizeof(A) * y.cells * x.cells);
      return 0;
    }
    reduce_rows(columns, y.cells, x.weight, x.cells, T, out, x.cells);
    double total = 0;
    for (int i = 0; i < kLanes<A>; ++i) total += sum[i];
    return total;
  }

  // Copies W of class c of a tile; returns false if the mask is empty.
  bool copy_weights(const Problem<A>& p, const A* weights, const Side<A>& y, const Side<A>& x,
                    std::int64_t b, std::int64_t n, std::int64_t c, A* out) const {
    const A* from = weights + tile_weights(p, y, x, (b * p.features.N + n) * p.C + c);
    bool any = false;
    for (int l = 0; l < y.cells * x.cells; ++l) {
      out[l] = from[l];
      any |= from[l] != A(0);
    }
    return any;
  }
};

// W of all tiles, and their sums [B, K, C, Sy, Sx] unless null.
template <class A, class Start>
void mask_weights(const Problem<A>& p, int threads, Start scratch, A* weights, double* sums) {
  const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
  const std::int64_t planes = p.features.B * p.features.N * p.C;
  parallel(planes * y.segments, threads, scratch, [&](std::int64_t unit, auto& s) {
    const std::int64_t plane = unit / y.segments, image = plane / p.C;
    const Side<A> rows = side(y, static_cast<int>(unit % y.segments));
    for (int sx = 0; sx < x.segments; ++sx) {
      const Side<A> columns = side(x, sx);
      const double sum =
          s.tile.mask_weights(p, rows, columns, image / p.features.N, image % p.features.N,
                              plane % p.C, weights + tile_weights(p, rows, columns, plane));
      if (sums) sums[unit * x.segments + sx] = sum;
    }
  });
}

// Whether a window over a tile has enough pixels of class c.
template <class A>
bool any_window_counts(const Problem<A>& p, const Side<A>& y, const Side<A>& x, const A* factor) {
  for (int i = 0; i < y.windows; ++i) {
    for (int j = 0; j < x.windows; ++j) {
      if (factor[static_cast<std::int64_t>(y.first + i) * p.tables.x.windows + x.first + j] !=
          A(0)) {
        return true;
      }
    }
  }
  return false;
}

// ---- forward ----------------------------------------------------------------------------------

template <class A>
struct ForwardShared {
  double* counts = nullptr;  // [B, K, C, Sy, Sx]
  A* parts = nullptr;        // [episodes, chunks, windows of the chunk's rows, C, Gx, width]
  std::int64_t part_size = 0;

  ForwardShared() = default;
  ForwardShared(Arena& arena, const Problem<A>& p) {
    const Features& f = p.features;
    counts = arena.take<double>(f.B * f.N * p.C * p.tables.y.segments * p.tables.x.segments);
    part_size = offset(p, p.tables.y.chunks);
    parts = arena.take<A>((f.B < kEpisodes ? f.B : kEpisodes) * part_size);
  }
  static Covering window_rows(const Problem<A>& p, const Chunk& chunk) {
    return {p.tables.y.segment[chunk.first].first, p.tables.y.segment[chunk.last - 1].last};
  }
  static std::int64_t offset(const Problem<A>& p, int k) {
    std::int64_t rows = 0;
    for (int i = 0; i < k; ++i) {
      const Covering c = window_rows(p, chunk_of(p.tables.y, i));
      rows += c.last - c.first + 1;
    }
    return rows * p.C * p.tables.x.windows * p.width;
  }
};

template <class A>
struct ForwardScratch {
  Ring<A> features;
  TileScratch<A> tile;
  double* columns;
  A* sum;
  std::int64_t image = -1;  // the last image and row that were packed, -1 for none
  int loaded = -1;

  ForwardScratch(Arena& arena, const Problem<A>& p) : features(ring(arena, p)), tile(arena, p) {
    columns = arena.take<double>(p.tables.x.segments);
    sum = arena.take<A>(p.width);
  }
  static Ring<A> ring(Arena& arena, const Problem<A>& p) {
    const int slots = p.tables.y.reach + 1;
    const std::int64_t size = p.features.w * p.pitch;
    return {arena.take<A>(slots * size), slots, size};
  }
};

template <class A>
void pool_tile(const Pool<A>& args, const Problem<A>& p, const ForwardScratch<A>& s,
               const Side<A>& y, const Side<A>& x, std::int64_t b, std::int64_t n, A* part,
               int first_row) {
  const A* location[kTileCells * kTileCells];
  const int L = y.cells * x.cells;
  bool located = false;
  for (std::int64_t c0 = 0; c0 < p.C; c0 += kClasses) {
    std::int64_t present[kClasses];
    int found = 0;
    for (std::int64_t c = c0; c < p.C && c < c0 + kClasses; ++c) {
      const A* factor = args.factor + ((b * p.features.N + n) * p.C + c) * p.windows;
      if (any_window_counts(p, y, x, factor) &&
          s.tile.copy_weights(p, args.weights, y, x, b, n, c, s.tile.weights + found * L)) {
        present[found++] = c;
      }
    }
    if (!found) continue;
    if (!located) {
      for (int i = 0, l = 0; i < y.cells; ++i) {
        const A* row = s.features.row(y.lower + i) + x.lower * p.pitch;
        for (int j = 0; j < x.cells; ++j) location[l++] = row + j * p.pitch;
      }
      located = true;
    }
    A* sums[kClasses];
    for (int m = 0; m < found; ++m) sums[m] = s.tile.sums + m * p.width;
    std::memset(s.tile.sums, 0, sizeof(A) * found * p.width);
    weighted_sums<A>(sums, found, location, L, s.tile.weights, L, 1, p.width);
    for (int m = 0; m < found; ++m) {
      const std::int64_t c = present[m], Gx = p.tables.x.windows;
      const A* factor = args.factor + ((b * p.features.N + n) * p.C + c) * p.windows;
      for (int i = 0; i < y.windows; ++i) {
        for (int j = 0; j < x.windows; ++j) {
          const std::int64_t my = y.first + i, mx = x.first + j;
          const A weight = factor[my * Gx + mx];
          if (weight == A(0)) continue;
          A* to = part + (((my - first_row) * p.C + c) * Gx + mx) * p.width;
          for (std::int64_t d = 0; d < p.width; d += kLanes<A>) {
            store(to + d, load(to + d) + weight * load(sums[m] + d));
          }
        }
      }
    }
  }
}

template <class A>
void forward(const Pool<A>& args) {
  const Problem<A> p(args.tables, args.features, args.masks);
  const int threads = p.threads(args.threads);
  const Memory<ForwardShared<A>, ForwardScratch<A>> memory(p, threads);
  const ForwardShared<A>& shared = memory.shared();
  const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
  const std::int64_t B = p.features.B, K = p.features.N;
  const std::int64_t tiles = static_cast<std::int64_t>(y.segments) * x.segments;

  using Scratch = ForwardScratch<A>;
  const auto scratch = memory.scratch(p);
  mask_weights(p, threads, scratch, args.weights, shared.counts);
  parallel(B * K * p.C, threads, scratch, [&](std::int64_t plane, Scratch& s) {
    window_factors(p, shared.counts + plane * tiles, s.columns, args.min_pixels,
                   args.factor + plane * p.windows);
  });
  for (std::int64_t b0 = 0; b0 < B; b0 += kEpisodes) {
    const std::int64_t episodes = B - b0 < kEpisodes ? B - b0 : kEpisodes;
    parallel(episodes * y.chunks, threads, scratch, [&](std::int64_t unit, Scratch& s) {
      const std::int64_t e = unit / y.chunks, b = b0 + e;
      const int k = static_cast<int>(unit % y.chunks);
      const Chunk chunk = chunk_of(y, k);
      const std::int64_t begin = shared.offset(p, k), end = shared.offset(p, k + 1);
      A* part = shared.parts + e * shared.part_size + begin;
      std::memset(part, 0, sizeof(A) * (end - begin));
      const int first_row = shared.window_rows(p, chunk).first;
      for (std::int64_t n = 0; n < K; ++n) {
        // Keeps the rows shared with the previous chunk.
        if (s.image != b * K + n || s.loaded != chunk.before) s.loaded = -1;
        s.image = b * K + n;
        for (int sy = chunk.first; sy < chunk.last; ++sy) {
          const int lower = y.segment[sy].lower;
          const int upper = y.segment[sy].upper, next = s.loaded < lower ? lower : s.loaded + 1;
          if (next <= upper) {
            pack(p.features, b, n, next, upper + 1, s.features, p.width);
            s.loaded = upper;
          }
          for (int sx = 0; sx < x.segments; ++sx) {
            pool_tile(args, p, s, side(y, sy), side(x, sx), b, n, part, first_row);
          }
        }
      }
    });
    // The parts of each window, in the order of the chunks.
    parallel(episodes * p.C * y.windows, threads, scratch, [&](std::int64_t unit, Scratch& s) {
      const std::int64_t e = unit / (p.C * y.windows), c = unit / y.windows % p.C;
      const std::int64_t my = unit % y.windows;
      for (std::int64_t mx = 0; mx < x.windows; ++mx) {
        std::memset(s.sum, 0, sizeof(A) * p.width);
        for (int k = 0; k < y.chunks; ++k) {
          const Covering rows = shared.window_rows(p, chunk_of(y, k));
          if (my < rows.first || my > rows.last) continue;
          const A* part = shared.parts + e * shared.part_size + shared.offset(p, k) +
                          (((my - rows.first) * p.C + c) * x.windows + mx) * p.width;
          for (std::int64_t d = 0; d < p.width; d += kLanes<A>) {
            store(s.sum + d, load(s.sum + d) + load(part + d));
          }
        }
        const std::int64_t v = ((b0 + e) * p.C + c) * p.windows + my * x.windows + mx;
        std::memcpy(args.prototypes + v * p.D, s.sum, sizeof(A) * p.D);
      }
    });
  }
}

// ---- backward ---------------------------------------------------------------------------------

template <class A>
struct BackwardShared {
  A* weights = nullptr;  // W of all tiles
  A* parts = nullptr;    // [images, chunks, shared rows, w, width]
  std::int64_t part_size = 0;

  BackwardShared() = default;
  BackwardShared(Arena& arena, const Problem<A>& p) {
    const std::int64_t images = p.features.B * p.features.N;
    part_size = part_offset(p.tables.y, p.tables.y.chunks, p.features.w * p.pitch);
    parts = arena.take<A>((images < kImages ? images : kImages) * part_size);
    weights = arena.take<A>(images * p.C * p.locations);
  }
};

template <class A>
struct BackwardScratch {
  GradientRows<A> features;
  TileScratch<A> tile;
  BackwardScratch(Arena& arena, const Problem<A>& p)
      : features{ForwardScratch<A>::ring(arena, p)}, tile(arena, p) {}
};

template <class A>
void pool_tile_backward(const PoolBackward<A>& args, const Problem<A>& p, const A* weights,
                        const BackwardScratch<A>& s, const Side<A>& y, int sx, std::int64_t b,
                        std::int64_t n) {
  const Side<A> x = side(p.tables.x, sx);
  A* location[kTileCells * kTileCells];
  bool fresh[kTileCells * kTileCells];
  s.features.touch(y.lower, y.cells, p.tables.x, sx, p.pitch, location, fresh);
  const int L = y.cells * x.cells;
  const std::int64_t Gx = p.tables.x.windows;
  for (std::int64_t c0 = 0; c0 < p.C; c0 += kClasses) {
    int found = 0;
    for (std::int64_t c = c0; c < p.C && c < c0 + kClasses; ++c) {
      const A* factor = args.factor + ((b * p.features.N + n) * p.C + c) * p.windows;
      if (!any_window_counts(p, y, x, factor) ||
          !s.tile.copy_weights(p, weights, y, x, b, n, c, s.tile.weights + found * L)) {
        continue;
      }
      A* sum = s.tile.sums + found * p.width;
      std::memset(sum, 0, sizeof(A) * p.width);
      for (int i = 0; i < y.windows; ++i) {
        for (int j = 0; j < x.windows; ++j) {
          const std::int64_t window = (y.first + i) * Gx + x.first + j;
          const A weight = factor[window];
          if (weight == A(0)) continue;
          const A* grad = args.grad + ((b * p.C + c) * p.windows + window) * p.D;
          std::int64_t d = 0;
          for (; d + kLanes<A> <= p.D; d += kLanes<A>) {
            store(sum + d, load(sum + d) + weight * load(grad + d));
          }
          for (; d < p.D; ++d) sum[d] += weight * grad[d];
        }
      }
      ++found;
    }
    const A* sums[kClasses];
    for (int m = 0; m < found; ++m) sums[m] = s.tile.sums + m * p.width;
    if (found || c0 == 0) {
      weighted_sums<A>(location, L, sums, found, s.tile.weights, 1, L, p.width,
                       c0 == 0 ? fresh : nullptr);
    }
  }
}

template <class A>
void backward(const PoolBackward<A>& args) {
  const Problem<A> p(args.tables, args.features, args.masks);
  const int threads = p.threads(args.threads);
  const Memory<BackwardShared<A>, BackwardScratch<A>> memory(p, threads);
  const BackwardShared<A>& shared = memory.shared();
  const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
  const std::int64_t K = p.features.N, all = p.features.B * K, h = p.features.h;
  using Scratch = BackwardScratch<A>;
  const auto scratch = memory.scratch(p);

  const A* weights = args.weights;
  if (!weights) {
    mask_weights<A>(p, threads, scratch, shared.weights, nullptr);
    weights = shared.weights;
  }
  for (std::int64_t first = 0; first < all; first += kImages) {
    const std::int64_t images = all - first < kImages ? all - first : kImages;
    parallel(images * y.chunks, threads, scratch, [&](std::int64_t unit, Scratch& s) {
      const std::int64_t slot = unit / y.chunks, b = (first + slot) / K, n = (first + slot) % K;
      const int k = static_cast<int>(unit % y.chunks);
      const Chunk chunk = chunk_of(y, k);
      A* parts = shared.parts + slot * shared.part_size + part_offset(y, k, p.features.w * p.pitch);
      s.features.start(x, chunk, parts);
      for (int sy = chunk.first; sy < chunk.last; ++sy) {
        const int lower = y.segment[sy].lower, upper = y.segment[sy].upper;
        s.features.write(p.features, p.pitch, b, n, lower);
        s.features.open(lower, upper);
        for (int sx = 0; sx < x.segments; ++sx)
          pool_tile_backward(args, p, weights, s, side(y, sy), sx, b, n);
      }
      const int end = chunk.upper + 1 > chunk.end ? chunk.upper + 1 : chunk.end;
      s.features.write(p.features, p.pitch, b, n, end);
    });
    parallel(images * h, threads, scratch, [&](std::int64_t unit, Scratch& s) {
      const std::int64_t slot = unit / h, b = (first + slot) / K, n = (first + slot) % K;
      const int i = static_cast<int>(unit % h);
      const A* row = sum_parts(y, i, p.features.w * p.pitch, shared.parts + slot * shared.part_size,
                               s.features.ring.data);
      if (!row) return;
      unpack<A>([row](std::int64_t) { return row; }, p.pitch, p.features, b, n, i, i + 1);
    });
  }
}

}  // namespace

void masked_average_pool(const Pool<float>& args) {
  forward(args);
}
void masked_average_pool(const Pool<double>& args) {
  forward(args);
}
void masked_average_pool(const PoolBackward<float>& args) {
  backward(args);
}
void masked_average_pool(const PoolBackward<double>& args) {
  backward(args);
}

}  // namespace cpu
LSLPN_END
