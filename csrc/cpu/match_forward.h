// The forward pass of matching, tile by tile. An `Output` stores scores and winners; see Image in
// cosine_match.cpp.
#pragma once

#include "match.h"

LSLPN_BEGIN
namespace cpu {

// The best of N windows at every pixel, from inner products interpolated to `columns`.
// `first` and `last`: whether these are the first and the last windows of the tile.
template <int N, class A, class Output>
void best_of(const Problem<A>& p, const Tile<A>& tile, const TileScratch<A>& s, std::int64_t c,
             const int* code, bool first, bool last, const Output& out) {
  const int T = tile.T, plane = tile.y.cells * T;
  for (int t = 0; t < tile.x.pixels; t += kLanes<A>) {
    Vec<A> low[N] = {}, rise[N] = {};
    walk_rows(
        p.tables.y, tile.y,
        [&](int lower, int upper) {
          for (int n = 0; n < N; ++n) {
            low[n] = load(s.columns + n * plane + lower * T + t);
            rise[n] = load(s.columns + n * plane + upper * T + t) - low[n];
          }
        },
        [&](int i, A b) {
          const std::int64_t here = i * T + t;
          Vec<A> best = low[0] + b * rise[0];
          Index<A> winner = Index<A>{} + code[0];
          if (!first) {
            // Strictly greater: of equal scores the lowest window keeps the pixel.
            const Vec<A> so_far = load(s.value + here);
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
            store(s.value + here, best);
            store_index<A>(s.winner + here, winner);
            return;
          }
          out.put(c, i, t, best * load(s.length + here), winner);
        },
        [](int, int) {});
  }
}

template <class A, class Output>
void best_of(int n, const Problem<A>& p, const Tile<A>& tile, const TileScratch<A>& s,
             std::int64_t c, const int* code, bool first, bool last, const Output& out) {
  static_assert(kAtOnce == 4, "one case for each number of windows");
  switch (n) {
    case 1:
      return best_of<1>(p, tile, s, c, code, first, last, out);
    case 2:
      return best_of<2>(p, tile, s, c, code, first, last, out);
    case 3:
      return best_of<3>(p, tile, s, c, code, first, last, out);
    default:
      return best_of<4>(p, tile, s, c, code, first, last, out);
  }
}

// Whether all inputs of the pixels of a tile are finite, including the products of its last
// locations with those outside, whose weights are 0, since 0 times NaN is NaN.
template <class A>
bool finite(const Problem<A>& p, const Tile<A>& tile, const Rows<A>& rows,
            const Directions<A>& directions, std::int64_t b) {
  A sums[4] = {};  // of each map, since one sum would wait for every addition
  for (int i = 0; i < tile.y.cells; ++i) {
    const int at = tile.y.lower + i;
    const A* const maps[4] = {rows.own.row(at), rows.right.row(at), rows.below.row(at),
                              rows.across.row(at)};
    for (int j = tile.x.lower; j < tile.x.lower + tile.x.cells; ++j) {
      for (int k = 0; k < 4; ++k) sums[k] += maps[k][j] * A(0);
    }
  }
  A sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (std::int64_t c = 0; c < p.C; ++c) {
    for (int k = 0; k < tile.windows; ++k) {
      sum += directions.inverse[(b * p.C + c) * p.windows + tile.window(p, k)] * A(0);
    }
  }
  return sum == A(0);
}

// Scores a tile with non-finite values pixel by pixel: such a value must reach exactly the pixels
// interpolated from it, and a NaN score wins over all others.
template <class A, class Output>
void match_not_finite(const Problem<A>& p, const Tile<A>& tile, const Rows<A>& rows,
                      const Directions<A>& directions, std::int64_t b, std::int64_t c,
                      const Output& out) {
  const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
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
        if (p.mean) {
          best += value / static_cast<A>(tile.windows);
        } else if (k == 0 || value > best || value != value) {
          // NaN wins, and nothing is greater than NaN.
          best = value;
          winner = tile.code(p, k);
        }
      }
      out.put_one(c, i, j, best * length, winner);
    }
  }
}

// Interpolates a from the locations of a tile to the columns of its pixels.
template <class A>
void to_columns(const Tile<A>& tile, const A* a, A* columns) {
  for (int i = 0; i < tile.y.cells; ++i) {
    interpolate_row(a + i * tile.x.cells, tile.x.cells, tile.x.weight, tile.T,
                    columns + i * tile.T);
  }
}

// Scores all pixels of a tile.
template <class A, class Output>
void match_tile(const Problem<A>& p, const Directions<A>& directions, const MatchScratch<A>& s,
                std::int64_t b, Tile<A>& tile, const Output& out) {
  tile.locate(p, s.rows.features);
  s.tile.lengths(p, tile, s.rows);
  if (!finite(p, tile, s.rows, directions, b)) {
    for (std::int64_t c = 0; c < p.C; ++c) {
      match_not_finite(p, tile, s.rows, directions, b, c, out);
    }
    return;
  }

  const int L = tile.locations, plane = tile.y.cells * tile.T;
  const int classes = static_cast<int>(p.C), all = tile.windows * classes;
  for (Piece piece = Piece::after(0, tile.windows, classes); piece.from < all;
       piece = Piece::after(piece.to, tile.windows, classes)) {
    s.tile.inner_products(p, tile, directions, b, piece);
    // The piece, class by class, kAtOnce windows at a time.
    for (int k = piece.from; k < piece.to;) {
      const int c = k / tile.windows, first = k % tile.windows;
      int count = tile.windows - first;
      if (count > piece.to - k) count = piece.to - k;
      const A* a = s.tile.dots + (k - piece.from) * L;
      if (p.mean) {
        if (first == 0) std::memset(s.tile.mean, 0, sizeof(A) * L);
        for (int m = 0; m < count; ++m) {
          for (int l = 0; l < L; ++l) s.tile.mean[l] += a[m * L + l];
        }
        if (first + count == tile.windows) {
          for (int l = 0; l < L; ++l) s.tile.mean[l] /= static_cast<A>(tile.windows);
          const int code = 0;
          to_columns(tile, s.tile.mean, s.tile.columns);
          best_of(1, p, tile, s.tile, c, &code, true, true, out);
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
      best_of(count, p, tile, s.tile, c, code, first == 0, first + count == tile.windows, out);
      k += count;
    }
  }
}

}  // namespace cpu
LSLPN_END
