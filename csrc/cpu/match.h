// Cosine matching with the best of the windows over each pixel, equation (3): the code shared by
// its forward pass, its gradient and the cross-entropy of its logits.
//
//   S_c(x) = max over windows m over x of <Up F(x), q_{c,m}> / |Up F(x)|,    q = p / |p|
//
// Up is linear, so the inner products are taken at the feature locations l of a tile,
//
//   a_{c,m}(l) = <F(l), q_{c,m}>,      <Up F(x), q_{c,m}> = sum over the taps of x of w_l(x) a(l),
//
// and |Up F(x)|^2 comes from inner products of neighbouring locations (core/arithmetic.h). With
// g_c(x) = dS_c(x) / |Up F(x)|, and m*(x) the winning window, the gradients are
//
//   da_{c,m}(l) = sum over x with m*(x) = m of w_l(x) g_c(x)
//   d|u|^2(x)   = -1/2 sum over c of dS_c(x) S_c(x) / |Up F(x)|^2
//   dF(l)       = sum over c, m of da(l) q_{c,m} + the gradient of |u|^2 via the inner products
//   dq_{c,m}    = sum over l of da(l) F(l),          dp = (dq - <q, dq> q) / |p|
//
// Scores may be scaled to the logits of the head, logit_scale * S; then g is scaled as well.
//
// Files: match_forward.h scores the pixels of a tile, match_backward.h computes their gradients.
// cosine_match.cpp reads and writes whole images of scores, cosine_match_loss.cpp stores no scores.
#pragma once

#include "parallel.h"
#include "rows.h"
#include "tile.h"

LSLPN_BEGIN
namespace cpu {

// Windows (of one or more classes) of a tile that are processed together, and windows of one class
// that are kept in registers.
constexpr int kWindows = 16;
constexpr int kAtOnce = 4;

// Forward and backward.
template <class A>
struct Problem {
  const Tables<A>& tables;
  const Features& features;
  const A* prototypes;
  std::int64_t C, D, width;  // width: channels of a packed location, padded
  std::int64_t pitch;        // from one packed location to the next
  std::int64_t windows;      // Gy * Gx
  bool mean;                 // over the windows of a pixel, instead of the best
  A logit_scale;             // multiplies the cosines
  A* gram = nullptr;         // [B, N, 4, h, w], if not null:
  bool gram_known = false;   // read from there, otherwise written

  template <class Args>
  explicit Problem(const Args& args)
      : tables(args.tables),
        features(args.features),
        prototypes(args.prototypes),
        C(args.C),
        D(features.D),
        width(padded(features.D)),
        pitch(pitch_of<A>(width)),
        windows(static_cast<std::int64_t>(tables.y.windows) * tables.x.windows),
        mean(args.mean),
        logit_scale(args.logit_scale) {}

  int threads(int wanted) const {
    const double pixels = double(tables.y.pixels) * tables.x.pixels;
    const double over = double(tables.y.overlap) * tables.x.overlap * C;
    const double locations = double(features.h) * features.w;
    const double work =
        double(features.B) * features.N * (over * (pixels + locations * D) + 8 * locations * D);
    return work < kMinParallelWork ? 1 : wanted;
  }
  std::int64_t vectors() const { return features.B * C * windows; }
};

// Directions q = p / |p|, zero-padded to `width`, and 1 / |p|: 0 for a prototype shorter than eps,
// NaN for one that is not finite.
template <class A>
struct Directions {
  A* q = nullptr;
  A* inverse = nullptr;

  Directions() = default;
  Directions(Arena& arena, const Problem<A>& p)
      : q(arena.take<A>(p.vectors() * p.width)), inverse(arena.take<A>(p.vectors())) {}

  void fill(const Problem<A>& p, int threads) const {
    const std::int64_t block = 64;
    const auto nothing = [](int thread) { return thread; };
    parallel((p.vectors() + block - 1) / block, threads, nothing, [&](std::int64_t unit, int) {
      const std::int64_t end = (unit + 1) * block < p.vectors() ? (unit + 1) * block : p.vectors();
      for (std::int64_t v = unit * block; v < end; ++v) fill_one(p, v);
    });
  }

 private:
  void fill_one(const Problem<A>& p, std::int64_t v) const {
    constexpr int lanes = kLanes<A>;
    const A* from = p.prototypes + v * p.D;
    A* to = q + v * p.width;
    std::memcpy(to, from, sizeof(A) * p.D);
    for (std::int64_t d = p.D; d < p.width; ++d) to[d] = A(0);
    Vec<A> squares{};
    for (std::int64_t d = 0; d < p.width; d += lanes) squares += load(to + d) * load(to + d);
    A square = A(0);
    for (int i = 0; i < lanes; ++i) square += squares[i];
    const A scale = inverse_length(square);
    Vec<A> rest{};
    for (std::int64_t d = 0; d < p.width; d += lanes) {
      const Vec<A> x = scale * load(to + d);
      store(to + d, x);
      rest += x * A(0);  // 0, or NaN if any value is not finite
    }
    A finite = A(0);
    for (int i = 0; i < lanes; ++i) finite += rest[i];
    inverse[v] = scale + finite;
  }
};

// The packed feature rows of one band of tiles, and the inner products of neighbouring locations.
template <class A>
struct Rows {
  Ring<A> features;
  Ring<A> own, right, below, across;  // across: diagonal + other of core/arithmetic.h
  A* zero = nullptr;                  // a location of zeros, used beyond the end of a row
  int loaded = -1;                    // the last row that was loaded, -1 for none
  std::int64_t image = -1;            // and its image
  int before = -1;                    // rows up to this one are written by an earlier chunk

  Rows(Arena& arena, const Problem<A>& p) {
    const int slots = p.tables.y.reach + 1;
    const std::int64_t w = p.features.w;
    features = {arena.take<A>(slots * w * p.pitch), slots, w * p.pitch};
    for (Ring<A>* map : {&own, &right, &below, &across}) {
      *map = {arena.take<A>(slots * padded(w)), slots, padded(w)};
    }
    zero = arena.take<A>(p.width);
  }

  // Begins a chunk of an image. Keeps the rows shared with the previous chunk.
  void start(const Problem<A>& p, std::int64_t b, std::int64_t n, const Chunk& chunk) {
    const std::int64_t next = b * p.features.N + n;
    if (next != image || loaded != chunk.before) loaded = -1;
    image = next;
    before = chunk.before;
    if (p.gram_known) {
      const int h = static_cast<int>(p.features.h);
      int k = 0;
      for (Ring<A>* map : {&own, &right, &below, &across}) {
        *map = {gram_row(p, 0, k++), h, p.features.w};
      }
    }
    for (std::int64_t d = 0; d < p.width; ++d) zero[d] = A(0);
  }

  // Loads rows lower .. upper; row lower - 1 is kept if it was loaded.
  void load(const Problem<A>& p, std::int64_t b, std::int64_t n, int lower, int upper) {
    const int first = loaded + 1 < lower ? lower : loaded + 1;
    if (first > upper) return;
    pack(p.features, b, n, first, upper + 1, features, p.width);
    for (int i = first; i <= upper; ++i) {
      const bool above = loaded == i - 1 && i > 0;
      loaded = i;
      if (p.gram_known) continue;
      products(p, i, above);
      if (!p.gram || i <= before) continue;
      const Ring<A>* const maps[4] = {&own, &right, &below, &across};
      for (int k = 0; k < (above ? 4 : 2); ++k) {
        const int at = k < 2 ? i : i - 1;  // the last two are products of row i - 1 with row i
        std::memcpy(gram_row(p, at, k), maps[k]->row(at), sizeof(A) * p.features.w);
      }
    }
  }

 private:
  // Row i of map k of this image in p.gram.
  A* gram_row(const Problem<A>& p, int i, int k) const {
    return p.gram + ((image * 4 + k) * p.features.h + i) * p.features.w;
  }

  // own and right of row i; below and across of row i - 1 if it is loaded.
  void products(const Problem<A>& p, int i, bool above) {
    constexpr int n = kLanes<A> >= 4 ? kLanes<A> / 4 : 1;  // locations at a time
    constexpr int lanes = kLanes<A>;
    const std::int64_t w = p.features.w;
    const A* const row = features.row(i);
    const A* const last = above ? features.row(i - 1) : nullptr;
    for (std::int64_t j = 0; j < w; j += n) {
      const A *x[n + 1], *y[n + 1];
      for (int k = 0; k <= n; ++k) {
        x[k] = j + k < w ? row + (j + k) * p.pitch : zero;
        y[k] = last && j + k < w ? last + (j + k) * p.pitch : zero;
      }
      Vec<A> sum[4 * n] = {};
      for (std::int64_t d = 0; d < p.width; d += lanes) {
        Vec<A> u = cpu::load(x[0] + d), v = cpu::load(y[0] + d);
        for (int k = 0; k < n; ++k) {
          const Vec<A> next_u = cpu::load(x[k + 1] + d), next_v = cpu::load(y[k + 1] + d);
          sum[k] += u * u;
          sum[n + k] += u * next_u;
          sum[2 * n + k] += v * u;
          sum[3 * n + k] += v * next_u;
          sum[3 * n + k] += next_v * u;
          u = next_u;
          v = next_v;
        }
      }
      A total[4 * n];
      for (int k = 0; k < 4 * n; k += lanes) store(total + k, lane_sums<A>(sum + k));
      const int valid = w - j < n ? static_cast<int>(w - j) : n;
      for (int k = 0; k < valid; ++k) {
        own.row(i)[j + k] = total[k];
        right.row(i)[j + k] = total[n + k];
        if (above) {
          below.row(i - 1)[j + k] = total[2 * n + k];
          across.row(i - 1)[j + k] = total[3 * n + k];
        }
        below.row(i)[j + k] = A(0);  // until the next row is loaded
        across.row(i)[j + k] = A(0);
      }
    }
  }
};

// A tile: its sides, the feature locations under it, the windows over it.
template <class A>
struct Tile {
  Side<A> y, x;
  int T;  // pixels of a row, padded
  int locations;
  int windows;
  const A* location[kTileCells * kTileCells];

  Tile(const Problem<A>& p, int sy, int sx)
      : y(side(p.tables.y, sy)),
        x(side(p.tables.x, sx)),
        T(p.tables.x.length),
        locations(y.cells * x.cells),
        windows(y.windows * x.windows) {}

  void locate(const Problem<A>& p, const Ring<A>& ring) {
    for (int i = 0, l = 0; i < y.cells; ++i) {
      const A* row = ring.row(y.lower + i) + x.lower * p.pitch;
      for (int j = 0; j < x.cells; ++j) location[l++] = row + j * p.pitch;
    }
  }

  // The index of window k over the tile among the prototypes of a class.
  std::int64_t window(const Problem<A>& p, int k) const {
    const int my = y.first + k / x.windows, mx = x.first + k % x.windows;
    return static_cast<std::int64_t>(my) * p.tables.x.windows + mx;
  }
  // The code by which winner k is stored.
  int code(const Problem<A>& p, int k) const {
    return k / x.windows * p.tables.x.overlap + k % x.windows;
  }
};

// Up to kWindows windows of a tile, of one or several classes: entries `from` .. `to` of the list
// of all (class, window) pairs, class by class.
struct Piece {
  int from, to;

  // The next piece: as many whole classes as fit, or a part of one.
  static Piece after(int done, int windows, int classes) {
    const int all = windows * classes;
    int n = kWindows;
    if (windows <= kWindows) {
      n = kWindows / windows * windows;
    } else {
      const int left = windows - done % windows;
      if (left < n) n = left;
    }
    return {done, done + n < all ? done + n : all};
  }
};

// Buffers of a tile, forward and backward.
template <class A>
struct TileScratch {
  A* dots = nullptr;           // [kWindows, locations] a, or da; sums of length_gradients
  A* mean = nullptr;           // [locations] the mean of a over the windows, or da of each of them
  A* columns = nullptr;        // [kAtOnce, R rows, T] a interpolated to the pixels' columns
  A* row = nullptr;            // [R rows, T] row(i) of |u|^2
  A* between = nullptr;        // [R rows, T]
  A* length = nullptr;         // [T rows, T] logit_scale / |u|
  A* value = nullptr;          // [T rows, T] of a class: the best score so far, or g
  Whole<A>* winner = nullptr;  // [T rows, T] its window

  TileScratch(Arena& arena, const Problem<A>& p) {
    const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
    dots = arena.take<A>(static_cast<std::int64_t>(kWindows) * y.reach * x.reach);
    columns = arena.take<A>(static_cast<std::int64_t>(kAtOnce) * y.reach * x.length);
    row = arena.take<A>(y.reach * x.length);
    between = arena.take<A>(y.reach * x.length);
    length = arena.take<A>(y.length * x.length);
    mean = arena.take<A>(y.reach * x.reach);
    value = arena.take<A>(y.length * x.length);
    winner = arena.take<Whole<A>>(y.length * x.length);
  }

  // logit_scale / |u| of every pixel of the tile.
  void lengths(const Problem<A>& p, const Tile<A>& tile, const Rows<A>& rows) const {
    const Side<A>& x = tile.x;
    const int T = tile.T;
    for (int i = 0; i < tile.y.cells; ++i) {
      const int at = tile.y.lower + i;
      interpolate_row(rows.own.row(at) + x.lower, x.square, rows.right.row(at) + x.lower, x.cross,
                      A(2), x.cells, T, row + i * T);
      if (i + 1 == tile.y.cells) {  // has no neighbour below in the tile
        std::memset(between + i * T, 0, sizeof(A) * T);
        break;
      }
      interpolate_row(rows.below.row(at) + x.lower, x.square, rows.across.row(at) + x.lower,
                      x.cross, A(1), x.cells, T, between + i * T);
    }
    for (int t = 0; t < T; t += kLanes<A>) {
      Vec<A> one{}, next{}, both{};
      walk_rows(
          p.tables.y, tile.y,
          [&](int lower, int upper) {
            one = load(row + lower * T + t);
            next = load(row + upper * T + t);
            both = load(between + lower * T + t);
          },
          [&](int i, A b) {
            const A a = A(1) - b;
            const Vec<A> square = (a * a) * one + (b * b) * next + (A(2) * a * b) * both;
            store(length + i * T + t, p.logit_scale * inverse_lengths<A>(square));
          },
          [](int, int) {});
    }
  }

  // a of the windows of a piece: <F(l), q>, 0 where q = 0.
  void inner_products(const Problem<A>& p, const Tile<A>& tile, const Directions<A>& directions,
                      std::int64_t b, Piece piece) const {
    const A* near[kWindows];
    int active[kWindows], n = 0;
    for (int k = piece.from; k < piece.to; ++k) {
      const std::int64_t v =
          (b * p.C + k / tile.windows) * p.windows + tile.window(p, k % tile.windows);
      if (directions.inverse[v] == A(0)) continue;
      near[n] = directions.q + v * p.width;
      active[n++] = k - piece.from;
    }
    const int L = tile.locations;
    cpu::dots<A>(tile.location, L, near, n, p.width, dots, L);
    // Move them to their places, from the last.
    int k = piece.to - piece.from - 1;
    for (int m = n - 1; k >= 0; --k) {
      if (m >= 0 && active[m] == k) {
        if (m != k) std::memcpy(dots + k * L, dots + m * L, sizeof(A) * L);
        --m;
      } else {
        std::memset(dots + k * L, 0, sizeof(A) * L);
      }
    }
  }
};

// The memory of a thread.
template <class A>
struct MatchScratch {
  Rows<A> rows;
  TileScratch<A> tile;

  MatchScratch(Arena& arena, const Problem<A>& p) : rows(arena, p), tile(arena, p) {}
};

}  // namespace cpu
LSLPN_END
