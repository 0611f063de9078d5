// Cosine matching with the best of the windows over each pixel, equation (3), and its gradient.
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
//   d|u|^2(x)   = -1/2 sum over c of dS_c(x) S_c(x) / |Up F(x)|^2, handed on to the inner products
//   dF(l)       = sum over c, m of da(l) q_{c,m}  +  what the inner products of l hand on
//   dq_{c,m}    = sum over l of da(l) F(l),          dp = (dq - <q, dq> q) / |p|
//
// What is written may be logit_scale * S, the logits of the head: then g is scaled as well.
#include <array>

#include "parallel.h"
#include "rows.h"
#include "tile.h"

LSLPN_BEGIN
namespace cpu {
namespace {

// This many windows (of one or more classes) of a tile are handled together, and this many of one
// class are kept in registers.
constexpr int kWindows = 16;
constexpr int kAtOnce = 4;

// What forward and backward have in common.
template <class A>
struct Problem {
  const Tables<A>& tables;
  const Features& features;
  const A* prototypes;
  std::int64_t C, D, width;  // width: channels of a packed location, filled up
  std::int64_t pitch;        // from one packed location to the next
  std::int64_t windows;      // Gy * Gx
  A logit_scale;             // multiplies the cosines

  Problem(const Tables<A>& t, const Features& f, const A* p, int classes, A scale)
      : tables(t),
        features(f),
        prototypes(p),
        C(classes),
        D(f.D),
        width(padded(f.D)),
        pitch(pitch_of<A>(width)),
        windows(static_cast<std::int64_t>(t.y.windows) * t.x.windows),
        logit_scale(scale) {}

  int threads(int wanted) const {
    const double pixels = double(tables.y.pixels) * tables.x.pixels;
    const double over = double(tables.y.overlap) * tables.x.overlap * C;
    const double locations = double(features.h) * features.w;
    const double work =
        double(features.B) * features.N * (over * (pixels + locations * D) + 8 * locations * D);
    return work < kWorthThreads ? 1 : wanted;
  }
  std::int64_t vectors() const { return features.B * C * windows; }
};

// Directions q = p / |p|, filled up with zeros to `width`, and 1 / |p|: 0 for a prototype without a
// direction, NaN for one that is not finite.
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
      rest += x * A(0);  // 0, or NaN if anything is not finite
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
  A* zero = nullptr;                  // a location of zeros, beyond the end of a row
  int loaded = -1;                    // the last row that was loaded, -1 for none
  std::int64_t image = -1;            // and its image

  Rows(Arena& arena, const Problem<A>& p) {
    const int slots = p.tables.y.reach + 2;
    const std::int64_t w = p.features.w;
    features = {arena.take<A>(slots * w * p.pitch), slots, w * p.pitch};
    for (Ring<A>* map : {&own, &right, &below, &across}) {
      *map = {arena.take<A>(slots * padded(w)), slots, padded(w)};
    }
    zero = arena.take<A>(p.width);
  }

  // Begins chunk k of an image. After the chunk before it, its last rows are still there.
  void start(const Problem<A>& p, std::int64_t b, std::int64_t n, const Chunk& chunk) {
    const std::int64_t next = b * p.features.N + n;
    if (next != image || loaded != chunk.before) loaded = -1;
    image = next;
    for (std::int64_t d = 0; d < p.width; ++d) zero[d] = A(0);
  }

  // Makes rows lower .. upper available, and keeps row lower - 1 if it was.
  void load(const Problem<A>& p, std::int64_t b, std::int64_t n, int lower, int upper) {
    const int first = loaded + 1 < lower ? lower : loaded + 1;
    if (first > upper) return;
    pack(p.features, b, n, first, upper + 1, features, p.width);
    for (int i = first; i <= upper; ++i) {
      products(p, i, loaded == i - 1 && i > 0);
      loaded = i;
    }
  }

 private:
  // own and right of row i; below and across of row i - 1 if it is there.
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
        below.row(i)[j + k] = A(0);  // until the next row is there
        across.row(i)[j + k] = A(0);
      }
    }
  }
};

// One tile: its sides, the feature locations under it, the windows over it.
template <class A>
struct Tile {
  Side<A> y, x;
  int T;  // pixels of a row, filled up
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

  // Where window k of those over the tile stands among the prototypes of a class.
  std::int64_t window(const Problem<A>& p, int k) const {
    const int my = y.first + k / x.windows, mx = x.first + k % x.windows;
    return static_cast<std::int64_t>(my) * p.tables.x.windows + mx;
  }
  // How the winner k is written down.
  int code(const Problem<A>& p, int k) const {
    return k / x.windows * p.tables.x.overlap + k % x.windows;
  }
};

// Up to kWindows windows of a tile, of one or several classes: piece `from` .. `to` of the list of
// all (class, window), class by class.
struct Piece {
  int from, to;

  // The next piece: as many whole classes as fit, or a part of one class.
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

// Buffers that follow a tile, forward and backward.
template <class A>
struct TileScratch {
  A* dots = nullptr;     // [kWindows, locations] a, or da
  A* columns = nullptr;  // [kAtOnce, R rows, T] a carried to the pixels' columns
  A* row = nullptr;      // [R rows, T] row(i) of |u|^2
  A* between = nullptr;  // [R rows, T]
  A* length = nullptr;   // [T rows, T] logit_scale / |u|

  TileScratch(Arena& arena, const Problem<A>& p) {
    const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
    dots = arena.take<A>(static_cast<std::int64_t>(kWindows) * y.reach * x.reach);
    columns = arena.take<A>(static_cast<std::int64_t>(kAtOnce) * y.reach * x.length);
    row = arena.take<A>(y.reach * x.length);
    between = arena.take<A>(y.reach * x.length);
    length = arena.take<A>(y.length * x.length);
  }

  // logit_scale / |u| of every pixel of the tile.
  void lengths(const Problem<A>& p, const Tile<A>& tile, const Rows<A>& rows) const {
    const Side<A>& x = tile.x;
    const int T = tile.T;
    for (int i = 0; i < tile.y.cells; ++i) {
      const int at = tile.y.lower + i;
      widen_row(rows.own.row(at) + x.lower, x.square, rows.right.row(at) + x.lower, x.cross, A(2),
                x.cells, T, row + i * T);
      if (i + 1 == tile.y.cells) {  // has no neighbour below in the tile
        std::memset(between + i * T, 0, sizeof(A) * T);
        break;
      }
      widen_row(rows.below.row(at) + x.lower, x.square, rows.across.row(at) + x.lower, x.cross,
                A(1), x.cells, T, between + i * T);
    }
    for (int t = 0; t < T; t += kLanes<A>) {
      Vec<A> one{}, next{}, both{};
      walk(
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
    // Spread out from the last, since they stand closer than where they belong.
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

// ---- forward ----------------------------------------------------------------------------------

template <class A>
struct MatchScratch {
  Rows<A> rows;
  TileScratch<A> tile;
  A* best;           // [T rows, T] the best so far, where the windows are too many for one go
  Whole<A>* winner;  // [T rows, T] and whose it is
  A* mean;           // [locations] the sum of a over the windows

  MatchScratch(Arena& arena, const Problem<A>& p) : rows(arena, p), tile(arena, p) {
    const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
    best = arena.take<A>(y.length * x.length);
    winner = arena.take<Whole<A>>(y.length * x.length);
    mean = arena.take<A>(y.reach * x.reach);
  }
};

// The pixels of one tile and class: their scores, and the winners unless null.
template <class A>
struct Output {
  A* scores;
  char* winners;
  bool bytes;
  std::int64_t pitch;  // pixels from one row of the image to the next
};

// The best of N windows, of which `columns` holds the inner products, carried down to the pixels.
// `first` and `last` tell whether windows came before, and come after.
template <class A, int N>
void best_of(const Problem<A>& p, const Tile<A>& tile, const MatchScratch<A>& s, const int* code,
             bool first, bool last, const Output<A>& out) {
  const int T = tile.T, plane = tile.y.cells * T;
  for (int t = 0; t < tile.x.pixels; t += kLanes<A>) {
    const int valid = tile.x.pixels - t;
    Vec<A> low[N] = {}, rise[N] = {};
    walk(
        p.tables.y, tile.y,
        [&](int lower, int upper) {
          for (int n = 0; n < N; ++n) {
            low[n] = load(s.tile.columns + n * plane + lower * T + t);
            rise[n] = load(s.tile.columns + n * plane + upper * T + t) - low[n];
          }
        },
        [&](int i, A b) {
          const std::int64_t here = i * T + t;
          Vec<A> best = low[0] + b * rise[0];
          Index<A> winner = Index<A>{} + code[0];
          if (!first) {
            // Strictly greater: of equal scores the lowest window keeps the pixel.
            const Vec<A> so_far = load(s.best + here);
            const Index<A> greater = best > so_far;
            best = greater ? best : so_far;
            winner = greater ? winner : load_index<A>(s.winner + here);
          }
          for (int n = 1; n < N; ++n) {
            const Vec<A> value = low[n] + b * rise[n];
            const Index<A> greater = value > best;
            best = greater ? value : best;
            winner = greater ? Index<A>{} + code[n] : winner;
          }
          if (!last) {
            store(s.best + here, best);
            store_index<A>(s.winner + here, winner);
            return;
          }
          const std::int64_t pixel = i * out.pitch + t;
          store(out.scores + pixel, best * load(s.tile.length + here), valid);
          if (out.winners) {
            store_index<A>(out.winners + pixel * (out.bytes ? 1 : 4), out.bytes, winner, valid);
          }
        },
        [](int, int) {});
  }
}

template <class A>
void best_of(int n, const Problem<A>& p, const Tile<A>& tile, const MatchScratch<A>& s,
             const int* code, bool first, bool last, const Output<A>& out) {
  static_assert(kAtOnce == 4, "one case for each number of windows");
  switch (n) {
    case 1:
      return best_of<A, 1>(p, tile, s, code, first, last, out);
    case 2:
      return best_of<A, 2>(p, tile, s, code, first, last, out);
    case 3:
      return best_of<A, 3>(p, tile, s, code, first, last, out);
    default:
      return best_of<A, 4>(p, tile, s, code, first, last, out);
  }
}

// Whether everything that the pixels of a tile are made of is finite; and the products of its last
// locations with those beyond too, for their weights are 0, but 0 times NaN is NaN.
template <class A>
bool finite(const Problem<A>& p, const Tile<A>& tile, const Rows<A>& rows,
            const Directions<A>& directions, std::int64_t b) {
  A sum = A(0);
  for (int i = 0; i < tile.y.cells; ++i) {
    for (const Ring<A>* map : {&rows.own, &rows.right, &rows.below, &rows.across}) {
      const A* values = map->row(tile.y.lower + i) + tile.x.lower;
      for (int j = 0; j < tile.x.cells; ++j) sum += values[j] * A(0);
    }
  }
  for (std::int64_t c = 0; c < p.C; ++c) {
    for (int k = 0; k < tile.windows; ++k) {
      sum += directions.inverse[(b * p.C + c) * p.windows + tile.window(p, k)] * A(0);
    }
  }
  return sum == A(0);
}

// A tile with values that are not finite, pixel by pixel: such a value must reach all pixels that
// are interpolated from it, and no others; and a score that is NaN stays so whatever comes after.
template <class A>
void match_not_finite(const Problem<A>& p, const Tile<A>& tile, const MatchScratch<A>& s,
                      const Directions<A>& directions, std::int64_t b, std::int64_t c, bool mean,
                      const Output<A>& out) {
  const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
  const Rows<A>& rows = s.rows;
  for (int i = 0; i < tile.y.pixels; ++i) {
    for (int j = 0; j < tile.x.pixels; ++j) {
      const int low = y.lower[tile.y.begin + i], left = x.lower[tile.x.begin + j];
      const A down = y.upper[tile.y.begin + i], over = x.upper[tile.x.begin + j];
      // The taps that take part, with their weights.
      const int height = down > 0 ? 2 : 1, breadth = over > 0 ? 2 : 1;
      const A wy[2] = {A(1) - down, down}, wx[2] = {A(1) - over, over};
      A row[2] = {}, between = A(0);
      for (int u = 0; u < height; ++u) {
        for (int v = 0; v < breadth; ++v) {
          row[u] += wx[v] * wx[v] * rows.own.row(low + u)[left + v];
          if (u == 0 && height == 2) between += wx[v] * wx[v] * rows.below.row(low)[left + v];
        }
        if (breadth == 2) row[u] += A(2) * wx[0] * wx[1] * rows.right.row(low + u)[left];
      }
      if (height == 2 && breadth == 2) between += wx[0] * wx[1] * rows.across.row(low)[left];
      A square = wy[0] * wy[0] * row[0];
      if (height == 2) square += wy[1] * wy[1] * row[1] + A(2) * wy[0] * wy[1] * between;
      const A length = p.logit_scale * inverse_length(square);

      A best = A(0);
      int winner = 0;
      for (int k = 0; k < tile.windows; ++k) {
        const A* q = directions.q + ((b * p.C + c) * p.windows + tile.window(p, k)) * p.width;
        A value = A(0);
        for (int u = 0; u < height; ++u) {
          for (int v = 0; v < breadth; ++v) {
            const A* F = rows.features.row(low + u) + (left + v) * p.pitch;
            A a = A(0);
            for (std::int64_t d = 0; d < p.D; ++d) a += F[d] * q[d];
            value += wy[u] * wx[v] * a;
          }
        }
        if (mean) {
          best += value / static_cast<A>(tile.windows);
        } else if (k == 0 || value > best || value != value) {
          // NaN beats all, and nothing is greater than NaN.
          best = value;
          winner = tile.code(p, k);
        }
      }
      const std::int64_t pixel = i * out.pitch + j;
      out.scores[pixel] = best * length;
      if (out.winners && out.bytes) {
        reinterpret_cast<std::uint8_t*>(out.winners)[pixel] = static_cast<std::uint8_t>(winner);
      } else if (out.winners) {
        reinterpret_cast<std::int32_t*>(out.winners)[pixel] = winner;
      }
    }
  }
}

// Carries a from the locations of a tile to the columns of its pixels.
template <class A>
void to_columns(const Tile<A>& tile, const A* a, A* columns) {
  for (int i = 0; i < tile.y.cells; ++i) {
    widen_row(a + i * tile.x.cells, tile.x.cells, tile.x.weight, tile.T, columns + i * tile.T);
  }
}

template <class A>
void match_tile(const Match<A>& args, const Problem<A>& p, const Directions<A>& directions,
                MatchScratch<A>& s, std::int64_t b, std::int64_t n, Tile<A>& tile) {
  const std::int64_t H = p.tables.y.pixels, W = p.tables.x.pixels;
  const auto output = [&](std::int64_t c) {
    const std::int64_t at =
        (((b * p.features.N + n) * p.C + c) * H + tile.y.begin) * W + tile.x.begin;
    char* winners = static_cast<char*>(args.winners);
    if (winners) winners += at * (args.winners_are_bytes ? 1 : 4);
    return Output<A>{args.scores + at, winners, args.winners_are_bytes, W};
  };
  tile.locate(p, s.rows.features);
  if (!finite(p, tile, s.rows, directions, b)) {
    for (std::int64_t c = 0; c < p.C; ++c) {
      match_not_finite(p, tile, s, directions, b, c, args.mean, output(c));
    }
    return;
  }
  s.tile.lengths(p, tile, s.rows);

  const int L = tile.locations, plane = tile.y.cells * tile.T;
  const int classes = static_cast<int>(p.C), all = tile.windows * classes;
  for (Piece piece = Piece::after(0, tile.windows, classes); piece.from < all;
       piece = Piece::after(piece.to, tile.windows, classes)) {
    s.tile.inner_products(p, tile, directions, b, piece);
    // The piece, class by class, a few windows at a time.
    for (int k = piece.from; k < piece.to;) {
      const int c = k / tile.windows, first = k % tile.windows;
      int count = tile.windows - first;
      if (count > piece.to - k) count = piece.to - k;
      const A* a = s.tile.dots + (k - piece.from) * L;
      if (args.mean) {
        if (first == 0) std::memset(s.mean, 0, sizeof(A) * L);
        for (int m = 0; m < count; ++m) {
          for (int l = 0; l < L; ++l) s.mean[l] += a[m * L + l];
        }
        if (first + count == tile.windows) {
          for (int l = 0; l < L; ++l) s.mean[l] /= static_cast<A>(tile.windows);
          const int code = 0;
          to_columns(tile, s.mean, s.tile.columns);
          best_of(1, p, tile, s, &code, true, true, output(c));
        }
        k += count;
        continue;
      }
      if (count > kAtOnce) count = kAtOnce;
      int code[kAtOnce];
      for (int m = 0; m < count; ++m) {
        code[m] = tile.code(p, first + m);
        to_columns(tile, a + m * L, s.tile.columns + m * plane);
      }
      best_of(count, p, tile, s, code, first == 0, first + count == tile.windows, output(c));
      k += count;
    }
  }
}

template <class A>
void forward(const Match<A>& args) {
  const Problem<A> p(args.tables, args.features, args.prototypes, args.C, args.logit_scale);
  const int threads = p.threads(args.threads);
  const Memory<Directions<A>, MatchScratch<A>> memory(p, threads);
  const Directions<A>& directions = memory.shared();
  directions.fill(p, threads);

  const AxisTables<A>& y = p.tables.y;
  const std::int64_t N = p.features.N;
  using Scratch = MatchScratch<A>;
  parallel(p.features.B * N * y.chunks, threads, memory.scratch(p),
           [&](std::int64_t unit, Scratch& s) {
             const std::int64_t image = unit / y.chunks, b = image / N, n = image % N;
             const Chunk chunk = chunk_of(y, static_cast<int>(unit % y.chunks));
             s.rows.start(p, b, n, chunk);
             for (int sy = chunk.first; sy < chunk.last; ++sy) {
               s.rows.load(p, b, n, y.segment[sy].lower, y.segment[sy].upper);
               for (int sx = 0; sx < p.tables.x.segments; ++sx) {
                 Tile<A> tile(p, sy, sx);
                 match_tile(args, p, directions, s, b, n, tile);
               }
             }
           });
}

// ---- backward ---------------------------------------------------------------------------------

template <class A>
struct BackwardProblem : Problem<A> {
  const MatchBackward<A>& args;

  explicit BackwardProblem(const MatchBackward<A>& a)
      : Problem<A>(a.tables, a.features, a.prototypes, a.C, a.logit_scale), args(a) {}
};

// The gradient of the feature rows of one band of tiles, and of their inner products.
template <class A>
struct QueryGradient {
  GradientRows<A> features;
  Ring<A> own, right, below, across;

  QueryGradient(Arena& arena, const Problem<A>& p) {
    const int slots = p.tables.y.reach + 2;
    const std::int64_t w = p.features.w;
    features.ring = {arena.take<A>(slots * w * p.pitch), slots, w * p.pitch};
    for (Ring<A>* map : {&own, &right, &below, &across}) {
      *map = {arena.take<A>(slots * padded(w)), slots, padded(w)};
    }
  }

  void open(int lower, int upper) {
    features.open(lower, upper);
    for (int i = features.fresh; i <= upper; ++i) {
      for (const Ring<A>* map : {&own, &right, &below, &across}) {
        std::memset(map->row(i), 0, sizeof(A) * map->size);
      }
    }
  }

  // Writes the rows below `end`: no tile to come touches them.
  void write(const BackwardProblem<A>& p, const Rows<A>& rows, std::int64_t b, std::int64_t n,
             int end) {
    for (int i = features.written; i < end; ++i) {
      if (features.is_open(i)) products(p, rows, i);
    }
    features.write(p.args.grad_features, p.pitch, b, n, end);
  }

 private:
  // What the inner products of row i hand on: dF += their gradients times the other factor.
  void products(const Problem<A>& p, const Rows<A>& rows, int i) const {
    const bool has_above = i > features.run, has_below = i < features.opened;
    const std::int64_t w = p.features.w;
    const A* const F[3] = {has_above ? rows.features.row(i - 1) : nullptr, rows.features.row(i),
                           has_below ? rows.features.row(i + 1) : nullptr};
    for (std::int64_t j = 0; j < w; ++j) {
      const A* in[9];
      A factor[9] = {};
      for (int y = 0; y < 3; ++y) {
        for (int x = 0; x < 3; ++x) {
          const bool there = F[y] && j + x >= 1 && j + x <= w;
          in[3 * y + x] = there ? F[y] + (j + x - 1) * p.pitch : rows.zero;
        }
      }
      const bool has_left = j > 0, has_right = j + 1 < w;
      factor[4] = A(2) * own.row(i)[j];
      if (has_left) factor[3] = right.row(i)[j - 1];
      if (has_right) factor[5] = right.row(i)[j];
      if (has_below) {
        factor[7] = below.row(i)[j];
        if (has_left) factor[6] = across.row(i)[j - 1];
        if (has_right) factor[8] = across.row(i)[j];
      }
      if (has_above) {
        factor[1] = below.row(i - 1)[j];
        if (has_left) factor[0] = across.row(i - 1)[j - 1];
        if (has_right) factor[2] = across.row(i - 1)[j];
      }
      A* out = features.row(i) + j * p.pitch;
      for (std::int64_t d = 0; d < p.width; d += kLanes<A>) {
        for (int y = 0; y < 3; ++y) __builtin_prefetch(in[3 * y + 2] + d + p.pitch);
        __builtin_prefetch(out + d + p.pitch);
        Vec<A> sum = load(out + d);
        for (int k = 0; k < 9; ++k) sum += factor[k] * load(in[k] + d);
        store(out + d, sum);
      }
    }
  }
};

// What the chunks of a group of images leave for the end: parts of dq, and of shared rows of dF.
constexpr std::int64_t kEpisodes = 8, kImages = 4;

template <class A>
struct BackwardShared {
  Directions<A> directions;
  A* grad_directions = nullptr;  // [episodes, chunks, windows of the chunk's rows, C, Gx, width]
  A* parts = nullptr;            // [episodes, images, chunks, shared rows, w, width]
  std::int64_t direction_size = 0, part_size = 0;  // of an episode, of an image
  std::int64_t images = 0;                         // of an episode in a group

  BackwardShared() = default;
  BackwardShared(Arena& arena, const BackwardProblem<A>& p) : directions(arena, p) {
    const std::int64_t episodes = p.features.B < kEpisodes ? p.features.B : kEpisodes;
    images = p.features.N < kImages ? p.features.N : kImages;
    if (p.args.grad_prototypes) {
      direction_size = direction_offset(p, p.tables.y.chunks);
      grad_directions = arena.take<A>(episodes * direction_size);
    }
    if (p.args.grad_features.data) {
      part_size = part_offset(p, p.tables.y.chunks);
      parts = arena.take<A>(episodes * images * part_size);
    }
  }

  // The windows my of the rows of a chunk.
  static Covering window_rows(const Problem<A>& p, const Chunk& chunk) {
    return {p.tables.y.segment[chunk.first].first, p.tables.y.segment[chunk.last - 1].last};
  }
  static std::int64_t direction_offset(const Problem<A>& p, int k) {
    std::int64_t rows = 0;
    for (int i = 0; i < k; ++i) {
      const Covering c = window_rows(p, chunk_of(p.tables.y, i));
      rows += c.last - c.first + 1;
    }
    return rows * p.C * p.tables.x.windows * p.width;
  }
  static std::int64_t part_offset(const Problem<A>& p, int k) {
    std::int64_t rows = 0;
    for (int i = 0; i < k; ++i) rows += chunk_of(p.tables.y, i).shared();
    return rows * p.features.w * p.pitch;
  }
};

template <class A>
struct BackwardScratch {
  Rows<A> rows;
  QueryGradient<A> gradient;
  TileScratch<A> tile;
  A* slope;          // [T rows, T] g of a class
  A* energy;         // [T rows, T] sum over c of dS S
  Whole<A>* winner;  // [T rows, T]
  A* mean;           // [locations]

  BackwardScratch(Arena& arena, const BackwardProblem<A>& p)
      : rows(arena, p), gradient(arena, p), tile(arena, p) {
    const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
    slope = arena.take<A>(y.length * x.length);
    energy = arena.take<A>(y.length * x.length);
    winner = arena.take<Whole<A>>(y.length * x.length);
    mean = arena.take<A>(y.reach * x.reach);
  }
};

// Reads one class of a tile: slope = g = logit_scale dS / |u|, the winners, and adds dS S to
// energy, which is the same for any scale.
template <class A>
void read_class(const BackwardProblem<A>& p, const Tile<A>& tile, const BackwardScratch<A>& s,
                std::int64_t b, std::int64_t n, std::int64_t c) {
  const std::int64_t H = p.tables.y.pixels, W = p.tables.x.pixels;
  const std::int64_t at =
      (((b * p.features.N + n) * p.C + c) * H + tile.y.begin) * W + tile.x.begin;
  const bool bytes = p.args.winners_are_bytes;
  const char* winners = static_cast<const char*>(p.args.winners);
  const bool more = tile.x.begin + tile.x.pixels < W;
  for (int i = 0; i < tile.y.pixels; ++i) {
    if (more) {  // ask for the same row of the next tile: the processor does not foresee the jump
      const std::int64_t next = at + i * W + tile.x.pixels;
      for (std::int64_t t = 0; t < tile.x.pixels; t += 64 / sizeof(A)) {
        __builtin_prefetch(p.args.grad + next + t);
        __builtin_prefetch(p.args.scores + next + t);
      }
      if (winners) __builtin_prefetch(winners + next * (bytes ? 1 : 4));
    }
    for (int t = 0; t < tile.T; t += kLanes<A>) {
      const std::int64_t here = i * tile.T + t, pixel = at + i * W + t;
      const int valid = tile.x.pixels - t;
      const Vec<A> grad = load(p.args.grad + pixel, valid);
      store(s.slope + here, grad * load(s.tile.length + here));
      const Vec<A> energy = c == 0 ? Vec<A>{} : load(s.energy + here);
      store(s.energy + here, energy + grad * load(p.args.scores + pixel, valid));
      if (p.args.mean) continue;
      store_index<A>(s.winner + here,
                     load_index<A>(winners + pixel * (bytes ? 1 : 4), bytes, valid));
    }
  }
}

// columns[n, i, t] = sum over pixels y whose winner is code[n] of their weight of feature row i
// times g(y, t); of all pixels, where `code` is null.
template <class A, int N>
void gather(const BackwardProblem<A>& p, const Tile<A>& tile, const BackwardScratch<A>& s,
            const int* code) {
  const int T = tile.T, plane = tile.y.cells * T;
  std::memset(s.tile.columns, 0, sizeof(A) * N * plane);
  for (int t = 0; t < T; t += kLanes<A>) {
    Vec<A> low[N] = {}, high[N] = {};
    walk(
        p.tables.y, tile.y,
        [&](int, int) {
          for (int n = 0; n < N; ++n) low[n] = high[n] = Vec<A>{};
        },
        [&](int i, A b) {
          const Vec<A> slope = load(s.slope + i * T + t);
          const Index<A> winner = code ? load_index<A>(s.winner + i * T + t) : Index<A>{};
          for (int n = 0; n < N; ++n) {
            const Vec<A> mine = !code ? slope : (winner == code[n] ? slope : Vec<A>{});
            low[n] += (A(1) - b) * mine;
            high[n] += b * mine;
          }
        },
        [&](int lower, int upper) {
          for (int n = 0; n < N; ++n) {
            A* column = s.tile.columns + n * plane + t;
            store(column + lower * T, load(column + lower * T) + low[n]);
            store(column + upper * T, load(column + upper * T) + high[n]);
          }
        });
  }
}

template <class A>
void gather(int n, const BackwardProblem<A>& p, const Tile<A>& tile, const BackwardScratch<A>& s,
            const int* code) {
  static_assert(kAtOnce == 4, "one case for each number of windows");
  switch (n) {
    case 1:
      return gather<A, 1>(p, tile, s, code);
    case 2:
      return gather<A, 2>(p, tile, s, code);
    case 3:
      return gather<A, 3>(p, tile, s, code);
    default:
      return gather<A, 4>(p, tile, s, code);
  }
}

// The gradient of |u|^2 of the pixels of a tile, handed on to the inner products of its locations.
template <class A>
void gather_lengths(const BackwardProblem<A>& p, const Tile<A>& tile, const BackwardScratch<A>& s) {
  const int T = tile.T, rows = tile.y.cells, cells = tile.x.cells;
  const A unscaled = A(1) / p.logit_scale;
  std::memset(s.tile.row, 0, sizeof(A) * rows * T);
  std::memset(s.tile.between, 0, sizeof(A) * rows * T);
  for (int t = 0; t < T; t += kLanes<A>) {
    Vec<A> one{}, next{}, both{};
    walk(
        p.tables.y, tile.y, [&](int, int) { one = next = both = Vec<A>{}; },
        [&](int i, A b) {
          const std::int64_t here = i * T + t;
          const A a = A(1) - b;
          const Vec<A> length = unscaled * load(s.tile.length + here);
          const Vec<A> grad = A(-0.5) * load(s.energy + here) * length * length;
          one += (a * a) * grad;
          next += (b * b) * grad;
          both += (A(2) * a * b) * grad;
        },
        [&](int lower, int upper) {
          A *row = s.tile.row + t, *between = s.tile.between + t;
          store(row + lower * T, load(row + lower * T) + one);
          store(row + upper * T, load(row + upper * T) + next);
          store(between + lower * T, load(between + lower * T) + both);
        });
  }
  const struct {
    const A* value;
    const A* table;
    const Ring<A>& map;
    A times;
  } products[] = {{s.tile.row, tile.x.square, s.gradient.own, A(1)},
                  {s.tile.row, tile.x.cross, s.gradient.right, A(2)},
                  {s.tile.between, tile.x.square, s.gradient.below, A(1)},
                  {s.tile.between, tile.x.cross, s.gradient.across, A(1)}};
  for (const auto& product : products) {
    narrow_rows(product.value, rows, product.table, cells, T, s.mean, cells);
    for (int i = 0; i < rows; ++i) {
      A* to = product.map.row(tile.y.lower + i) + tile.x.lower;
      for (int j = 0; j < cells; ++j) to[j] += product.times * s.mean[i * cells + j];
    }
  }
}

// Hands da of the windows of a piece on to the features and the directions.
template <class A>
void hand_on(const BackwardProblem<A>& p, const Tile<A>& tile, const BackwardScratch<A>& s,
             const Directions<A>& directions, std::int64_t b, int sx, Piece piece,
             A* grad_directions, int first_row) {
  const A* near[kWindows];
  A* grad_near[kWindows];
  int active = 0;
  const int L = tile.locations;
  for (int k = piece.from; k < piece.to; ++k) {
    const std::int64_t c = k / tile.windows;
    const std::int64_t window = tile.window(p, k % tile.windows);
    const std::int64_t v = (b * p.C + c) * p.windows + window;
    if (directions.inverse[v] == A(0)) continue;
    if (active != k - piece.from) {
      std::memcpy(s.tile.dots + active * L, s.tile.dots + (k - piece.from) * L, sizeof(A) * L);
    }
    near[active] = directions.q + v * p.width;
    // [rows of windows, C, Gx, width] from row first_row on.
    const std::int64_t Gx = p.tables.x.windows;
    const std::int64_t my = window / Gx, mx = window % Gx;
    grad_near[active] = grad_directions
                            ? grad_directions + (((my - first_row) * p.C + c) * Gx + mx) * p.width
                            : nullptr;
    ++active;
  }
  if (p.args.grad_features.data) {
    A* location[kTileCells * kTileCells];
    bool fresh[kTileCells * kTileCells];
    s.gradient.features.touch(tile.y.lower, tile.y.cells, p.tables.x, sx, p.pitch, location, fresh);
    mix<A>(location, L, near, active, s.tile.dots, 1, L, p.width,
           piece.from == 0 ? fresh : nullptr);
  }
  if (grad_directions) {
    mix<A>(grad_near, active, tile.location, L, s.tile.dots, L, 1, p.width);
  }
}

template <class A>
void unmatch_tile(const BackwardProblem<A>& p, const Directions<A>& directions,
                  BackwardScratch<A>& s, std::int64_t b, std::int64_t n, Tile<A>& tile, int sx,
                  A* grad_directions, int first_row) {
  tile.locate(p, s.rows.features);
  s.tile.lengths(p, tile, s.rows);
  const int L = tile.locations, rows = tile.y.cells;
  const int classes = static_cast<int>(p.C), all = tile.windows * classes;
  for (Piece piece = Piece::after(0, tile.windows, classes); piece.from < all;
       piece = Piece::after(piece.to, tile.windows, classes)) {
    for (int k = piece.from; k < piece.to;) {
      const int c = k / tile.windows, first = k % tile.windows;
      if (first == 0) {
        read_class(p, tile, s, b, n, c);
        if (p.args.mean) {
          gather(1, p, tile, s, nullptr);
          narrow_rows(s.tile.columns, rows, tile.x.weight, tile.x.cells, tile.T, s.mean,
                      tile.x.cells);
          for (int l = 0; l < L; ++l) s.mean[l] /= static_cast<A>(tile.windows);
        }
      }
      int count = tile.windows - first;
      if (count > piece.to - k) count = piece.to - k;
      if (count > kAtOnce) count = kAtOnce;
      A* da = s.tile.dots + (k - piece.from) * L;
      if (p.args.mean) {
        for (int m = 0; m < count; ++m) std::memcpy(da + m * L, s.mean, sizeof(A) * L);
      } else {
        int code[kAtOnce];
        for (int m = 0; m < count; ++m) code[m] = tile.code(p, first + m);
        gather(count, p, tile, s, code);
        narrow_rows(s.tile.columns, count * rows, tile.x.weight, tile.x.cells, tile.T, da,
                    tile.x.cells);
      }
      k += count;
    }
    hand_on(p, tile, s, directions, b, sx, piece, grad_directions, first_row);
  }
  if (p.args.grad_features.data) gather_lengths(p, tile, s);
}

// All images of a group, one after the other, in one chunk of rows.
template <class A>
void unmatch_chunk(const BackwardProblem<A>& p, const BackwardShared<A>& shared,
                   BackwardScratch<A>& s, int k, std::int64_t episode, std::int64_t b,
                   std::int64_t first_image, std::int64_t images) {
  const AxisTables<A>& y = p.tables.y;
  const Chunk chunk = chunk_of(y, k);
  const Covering window_rows = shared.window_rows(p, chunk);
  A* grad_directions = nullptr;
  if (shared.grad_directions) {
    const std::int64_t begin = shared.direction_offset(p, k),
                       end = shared.direction_offset(p, k + 1);
    grad_directions = shared.grad_directions + episode * shared.direction_size + begin;
    if (first_image == 0) std::memset(grad_directions, 0, sizeof(A) * (end - begin));
  }
  const bool wants_features = p.args.grad_features.data;
  for (std::int64_t image = 0; image < images; ++image) {
    const std::int64_t n = first_image + image;
    A* parts = nullptr;
    if (wants_features) {
      parts = shared.parts + (episode * shared.images + image) * shared.part_size +
              shared.part_offset(p, k);
    }
    s.rows.start(p, b, n, chunk);
    s.gradient.features.start(p.tables.x, chunk, parts);
    for (int sy = chunk.first; sy < chunk.last; ++sy) {
      const int lower = y.segment[sy].lower, upper = y.segment[sy].upper;
      if (wants_features) {
        s.gradient.write(p, s.rows, b, n, lower);
        s.gradient.open(lower, upper);
      }
      s.rows.load(p, b, n, lower, upper);
      for (int sx = 0; sx < p.tables.x.segments; ++sx) {
        Tile<A> tile(p, sy, sx);
        unmatch_tile(p, shared.directions, s, b, n, tile, sx, grad_directions, window_rows.first);
      }
    }
    if (wants_features) {
      const int end = chunk.upper + 1 > chunk.end ? chunk.upper + 1 : chunk.end;
      s.gradient.write(p, s.rows, b, n, end);
    }
  }
}

// Rows that lie under several chunks: the sum of their parts, in order.
template <class A>
void add_parts(const BackwardProblem<A>& p, const BackwardShared<A>& shared, A* sum, int i,
               std::int64_t b, std::int64_t n, std::int64_t slot) {
  const std::int64_t size = p.features.w * p.pitch;
  int found = 0;
  for (int k = 0; k < p.tables.y.chunks; ++k) {
    const Chunk chunk = chunk_of(p.tables.y, k);
    if (i < chunk.lower || i > chunk.upper || !chunk.shares(i)) continue;
    const A* part =
        shared.parts + slot * shared.part_size + shared.part_offset(p, k) + chunk.place(i) * size;
    if (found++ == 0) {
      std::memcpy(sum, part, sizeof(A) * size);
    } else {
      for (std::int64_t d = 0; d < size; ++d) sum[d] += part[d];
    }
  }
  if (!found) return;
  unpack<A>([sum](std::int64_t) { return sum; }, p.pitch, p.args.grad_features, b, n, i, i + 1);
}

// dp = (dq - <q, dq> q) / |p|, of the sum of the chunks' parts of dq.
template <class A>
void finish_direction(const BackwardProblem<A>& p, const BackwardShared<A>& shared, A* sum,
                      std::int64_t episode, std::int64_t b, std::int64_t c, int my, int mx) {
  constexpr int lanes = kLanes<A>;
  const std::int64_t Gx = p.tables.x.windows;
  const std::int64_t v = (b * p.C + c) * p.windows + my * Gx + mx;
  A* out = p.args.grad_prototypes + v * p.D;
  const A inverse = shared.directions.inverse[v];
  if (inverse == A(0)) {
    std::memset(out, 0, sizeof(A) * p.D);
    return;
  }
  std::memset(sum, 0, sizeof(A) * p.width);
  for (int k = 0; k < p.tables.y.chunks; ++k) {
    const Covering rows = shared.window_rows(p, chunk_of(p.tables.y, k));
    if (my < rows.first || my > rows.last) continue;
    const A* part = shared.grad_directions + episode * shared.direction_size +
                    shared.direction_offset(p, k) +
                    (((my - rows.first) * p.C + c) * Gx + mx) * p.width;
    for (std::int64_t d = 0; d < p.width; d += lanes)
      store(sum + d, load(sum + d) + load(part + d));
  }
  const A* q = shared.directions.q + v * p.width;
  Vec<A> products{};
  for (std::int64_t d = 0; d < p.width; d += lanes) products += load(q + d) * load(sum + d);
  A along = A(0);
  for (int i = 0; i < lanes; ++i) along += products[i];
  for (std::int64_t d = 0; d < p.D; ++d) out[d] = (sum[d] - along * q[d]) * inverse;
}

template <class A>
void backward(const MatchBackward<A>& args) {
  const BackwardProblem<A> p(args);
  const int threads = p.threads(args.threads);
  const Memory<BackwardShared<A>, BackwardScratch<A>> memory(p, threads);
  const BackwardShared<A>& shared = memory.shared();
  shared.directions.fill(p, threads);

  using Scratch = BackwardScratch<A>;
  const auto scratch = memory.scratch(p);
  const int chunks = p.tables.y.chunks;
  const std::int64_t B = p.features.B, N = p.features.N, h = p.features.h;
  for (std::int64_t b0 = 0; b0 < B; b0 += kEpisodes) {
    const std::int64_t episodes = B - b0 < kEpisodes ? B - b0 : kEpisodes;
    for (std::int64_t n0 = 0; n0 < N; n0 += kImages) {
      const std::int64_t images = N - n0 < kImages ? N - n0 : kImages;
      parallel(episodes * chunks, threads, scratch, [&](std::int64_t unit, Scratch& s) {
        const std::int64_t e = unit / chunks;
        unmatch_chunk(p, shared, s, static_cast<int>(unit % chunks), e, b0 + e, n0, images);
      });
      if (!args.grad_features.data) continue;
      parallel(episodes * images * h, threads, scratch, [&](std::int64_t unit, Scratch& s) {
        const std::int64_t e = unit / (images * h), image = unit / h % images;
        add_parts(p, shared, s.rows.features.data, static_cast<int>(unit % h), b0 + e, n0 + image,
                  e * shared.images + image);
      });
    }
    if (!args.grad_prototypes) continue;
    const int Gy = p.tables.y.windows, Gx = p.tables.x.windows;
    parallel(episodes * p.C * Gy, threads, scratch, [&](std::int64_t unit, Scratch& s) {
      const std::int64_t e = unit / (p.C * Gy), c = unit / Gy % p.C;
      const int my = static_cast<int>(unit % Gy);
      for (int mx = 0; mx < Gx; ++mx) {
        finish_direction(p, shared, s.rows.features.data, e, b0 + e, c, my, mx);
      }
    });
  }
}

}  // namespace

void cosine_match(const Match<float>& args) {
  forward(args);
}
void cosine_match(const Match<double>& args) {
  forward(args);
}
void cosine_match(const MatchBackward<float>& args) {
  backward(args);
}
void cosine_match(const MatchBackward<double>& args) {
  backward(args);
}

}  // namespace cpu
LSLPN_END
