// The backward pass of matching, tile by tile. A `Pixels` provides the gradients of the scores; see
// SavedPixels in cosine_match.cpp.
#pragma once

#include "match.h"

LSLPN_BEGIN
namespace cpu {

template <class A>
struct BackwardProblem : Problem<A> {
  Features grad_features;  // null data if not needed
  A* grad_prototypes;      // null if not needed

  template <class Args>
  explicit BackwardProblem(const Args& args)
      : Problem<A>(args),
        grad_features(args.grad_features),
        grad_prototypes(args.grad_prototypes) {}
};

// The gradient of the feature rows of one band of tiles, and of their inner products.
template <class A>
struct QueryGradient {
  GradientRows<A> features;
  Ring<A> own, right, below, across;

  QueryGradient(Arena& arena, const Problem<A>& p) {
    const int slots = p.tables.y.reach + 1;
    const std::int64_t w = p.features.w;
    features.ring = {arena.take<A>((slots - 1) * w * p.pitch), slots - 1, w * p.pitch};
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

  // Writes the rows below `end`, which no later tile touches.
  void write(const BackwardProblem<A>& p, const Rows<A>& rows, std::int64_t b, std::int64_t n,
             int end) {
    Line lines[kTileCells];
    int count = 0;
    for (int i = features.written; i < end; ++i) {
      if (features.is_open(i)) lines[count++] = line(rows, i);
    }
    // Column by column, so that each location comes from the L2 cache once, not once for each row.
    for (std::int64_t j = 0; j < p.features.w; ++j) {
      for (int k = 0; k < count; ++k) products(p, lines[k], rows.zero, j);
    }
    features.write(p.grad_features, p.pitch, b, n, end);
  }

 private:
  // A row: its features and those above and below it (null if not open), its gradient, and the
  // gradients of inner products within it, with the row below, and of the row above with it.
  struct Line {
    const A* F[3];
    A* out;
    const A *own, *right, *below, *across, *from_above, *across_above;
  };

  Line line(const Rows<A>& rows, int i) const {
    const bool has_above = i > features.run, has_below = i < features.opened;
    return {{has_above ? rows.features.row(i - 1) : nullptr, rows.features.row(i),
             has_below ? rows.features.row(i + 1) : nullptr},
            features.row(i),
            own.row(i),
            right.row(i),
            below.row(i),
            across.row(i),
            has_above ? below.row(i - 1) : nullptr,
            has_above ? across.row(i - 1) : nullptr};
  }

  // The gradient through the inner products of location j of a row: dF += their gradients times the
  // other factor.
  void products(const Problem<A>& p, const Line& r, const A* zero, std::int64_t j) const {
    const std::int64_t w = p.features.w;
    const bool has_left = j > 0, has_right = j + 1 < w;
    const A* in[9];
    A factor[9] = {};
    for (int y = 0; y < 3; ++y) {
      for (int x = 0; x < 3; ++x) {
        const bool there = r.F[y] && j + x >= 1 && j + x <= w;
        in[3 * y + x] = there ? r.F[y] + (j + x - 1) * p.pitch : zero;
      }
    }
    factor[4] = A(2) * r.own[j];
    if (has_left) factor[3] = r.right[j - 1];
    if (has_right) factor[5] = r.right[j];
    if (r.F[2]) {
      factor[7] = r.below[j];
      if (has_left) factor[6] = r.across[j - 1];
      if (has_right) factor[8] = r.across[j];
    }
    if (r.F[0]) {
      factor[1] = r.from_above[j];
      if (has_left) factor[0] = r.across_above[j - 1];
      if (has_right) factor[2] = r.across_above[j];
    }
    A* const out = r.out + j * p.pitch;
    for (std::int64_t d = 0; d < p.width; d += kLanes<A>) {
      Vec<A> sum = load(out + d);
      for (int k = 0; k < 9; ++k) sum += factor[k] * load(in[k] + d);
      store(out + d, sum);
    }
  }
};

// Partial sums of dq, and of the rows of dF that chunks share, for the chunks of a group of images.
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
    if (p.grad_prototypes) {
      direction_size = direction_offset(p, p.tables.y.chunks);
      grad_directions = arena.take<A>(episodes * direction_size);
    }
    if (p.grad_features.data) {
      part_size = part_offset(p.tables.y, p.tables.y.chunks, p.features.w * p.pitch);
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
};

template <class A>
struct BackwardScratch : MatchScratch<A> {
  QueryGradient<A> gradient;
  A* energy;  // [T rows, T] sum over c of dS S
  // For the current class, [T rows, T]:
  const A* slope;          // g
  const Whole<A>* winner;  // m*; not used for "mean"

  BackwardScratch(Arena& arena, const BackwardProblem<A>& p)
      : MatchScratch<A>(arena, p), gradient(arena, p) {
    energy = arena.take<A>(p.tables.y.length * p.tables.x.length);
  }
};

// columns[n, i, t] = sum over pixels y with winner code[n] of w_i(y) g(y, t), where w_i(y) is the
// interpolation weight of feature row i; over all pixels if `code` is null.
template <class A, int N>
void column_sums(const BackwardProblem<A>& p, const Tile<A>& tile, const BackwardScratch<A>& s,
                 const int* code) {
  const int T = tile.T, plane = tile.y.cells * T;
  std::memset(s.tile.columns, 0, sizeof(A) * N * plane);
  for (int t = 0; t < T; t += kLanes<A>) {
    Vec<A> low[N] = {}, high[N] = {};
    walk_rows(
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
void column_sums(int n, const BackwardProblem<A>& p, const Tile<A>& tile,
                 const BackwardScratch<A>& s, const int* code) {
  static_assert(kAtOnce == 4, "one case for each number of windows");
  switch (n) {
    case 1:
      return column_sums<A, 1>(p, tile, s, code);
    case 2:
      return column_sums<A, 2>(p, tile, s, code);
    case 3:
      return column_sums<A, 3>(p, tile, s, code);
    default:
      return column_sums<A, 4>(p, tile, s, code);
  }
}

// The gradient of |u|^2 of the pixels of a tile, as gradients of the inner products of its
// locations.
template <class A>
void length_gradients(const BackwardProblem<A>& p, const Tile<A>& tile,
                      const BackwardScratch<A>& s) {
  const int T = tile.T, rows = tile.y.cells, cells = tile.x.cells;
  const A unscaled = A(1) / p.logit_scale;
  std::memset(s.tile.row, 0, sizeof(A) * rows * T);
  std::memset(s.tile.between, 0, sizeof(A) * rows * T);
  for (int t = 0; t < T; t += kLanes<A>) {
    Vec<A> one{}, next{}, both{};
    walk_rows(
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
  // All four products of `row` and `between` with the tables, in one.
  const A *table[2 * kTileCells], *value[2 * kTileCells];
  for (int r = 0; r < cells; ++r) {
    table[r] = tile.x.square + r * T;
    table[cells + r] = tile.x.cross + r * T;
  }
  for (int i = 0; i < rows; ++i) {
    value[i] = s.tile.row + i * T;
    value[rows + i] = s.tile.between + i * T;
  }
  dots<A>(table, 2 * cells, value, 2 * rows, T, s.tile.dots, 2 * cells);
  for (int i = 0; i < rows; ++i) {
    const A *row = s.tile.dots + i * 2 * cells, *between = row + rows * 2 * cells;
    const int at = tile.y.lower + i;
    A* own = s.gradient.own.row(at) + tile.x.lower;
    A* right = s.gradient.right.row(at) + tile.x.lower;
    A* below = s.gradient.below.row(at) + tile.x.lower;
    A* across = s.gradient.across.row(at) + tile.x.lower;
    for (int j = 0; j < cells; ++j) {
      own[j] += row[j];
      right[j] += A(2) * row[cells + j];
      below[j] += between[j];
      across[j] += between[cells + j];
    }
  }
}

// Adds the gradients of features and directions due to da of the windows of a piece.
template <class A>
void add_gradients(const BackwardProblem<A>& p, const Tile<A>& tile, const BackwardScratch<A>& s,
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
  if (p.grad_features.data) {
    A* location[kTileCells * kTileCells];
    bool fresh[kTileCells * kTileCells];
    s.gradient.features.touch(tile.y.lower, tile.y.cells, p.tables.x, sx, p.pitch, location, fresh);
    weighted_sums<A>(location, L, near, active, s.tile.dots, 1, L, p.width,
                     piece.from == 0 ? fresh : nullptr);
  }
  if (grad_directions) {
    weighted_sums<A>(grad_near, active, tile.location, L, s.tile.dots, L, 1, p.width);
  }
}

template <class A, class Pixels>
void match_tile_backward(const BackwardProblem<A>& p, const Directions<A>& directions,
                         BackwardScratch<A>& s, std::int64_t b, Tile<A>& tile, int sx,
                         A* grad_directions, int first_row, const Pixels& pixels) {
  const int L = tile.locations, rows = tile.y.cells;
  const int classes = static_cast<int>(p.C), all = tile.windows * classes;
  for (Piece piece = Piece::after(0, tile.windows, classes); piece.from < all;
       piece = Piece::after(piece.to, tile.windows, classes)) {
    for (int k = piece.from; k < piece.to;) {
      const int c = k / tile.windows, first = k % tile.windows;
      if (first == 0) {
        pixels.open(p, tile, s, c);
        if (p.mean) {
          column_sums(1, p, tile, s, nullptr);
          reduce_rows(s.tile.columns, rows, tile.x.weight, tile.x.cells, tile.T, s.tile.mean,
                      tile.x.cells);
          for (int l = 0; l < L; ++l) s.tile.mean[l] /= static_cast<A>(tile.windows);
        }
      }
      int count = tile.windows - first;
      if (count > piece.to - k) count = piece.to - k;
      if (count > kAtOnce) count = kAtOnce;
      A* da = s.tile.dots + (k - piece.from) * L;
      if (p.mean) {
        for (int m = 0; m < count; ++m) std::memcpy(da + m * L, s.tile.mean, sizeof(A) * L);
      } else {
        int code[kAtOnce];
        for (int m = 0; m < count; ++m) code[m] = tile.code(p, first + m);
        column_sums(count, p, tile, s, code);
        reduce_rows(s.tile.columns, count * rows, tile.x.weight, tile.x.cells, tile.T, da,
                    tile.x.cells);
      }
      k += count;
    }
    add_gradients(p, tile, s, directions, b, sx, piece, grad_directions, first_row);
  }
  if (p.grad_features.data) length_gradients(p, tile, s);
}

// All images of a group, one after the other, in one chunk of rows.
template <class A, class Pixels>
void match_chunk_backward(const BackwardProblem<A>& p, const BackwardShared<A>& shared,
                          BackwardScratch<A>& s, int k, std::int64_t episode, std::int64_t b,
                          std::int64_t first_image, std::int64_t images, const Pixels& pixels) {
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
  const bool wants_features = p.grad_features.data;
  for (std::int64_t image = 0; image < images; ++image) {
    const std::int64_t n = first_image + image;
    A* parts = nullptr;
    if (wants_features) {
      parts = shared.parts + (episode * shared.images + image) * shared.part_size +
              part_offset(y, k, p.features.w * p.pitch);
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
        const auto of_tile = pixels.of(p, shared.directions, s, b, n, k, tile);
        match_tile_backward(p, shared.directions, s, b, tile, sx, grad_directions,
                            window_rows.first, of_tile);
      }
    }
    if (wants_features) {
      const int end = chunk.upper + 1 > chunk.end ? chunk.upper + 1 : chunk.end;
      s.gradient.write(p, s.rows, b, n, end);
    }
  }
}

// dp = (dq - <q, dq> q) / |p|, with dq the sum of the chunks' parts.
template <class A>
void finish_direction(const BackwardProblem<A>& p, const BackwardShared<A>& shared, A* sum,
                      std::int64_t episode, std::int64_t b, std::int64_t c, int my, int mx) {
  constexpr int lanes = kLanes<A>;
  const std::int64_t Gx = p.tables.x.windows;
  const std::int64_t v = (b * p.C + c) * p.windows + my * Gx + mx;
  A* out = p.grad_prototypes + v * p.D;
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

// The backward pass; `shared` has the directions.
template <class A, class Shared, class Start, class Pixels>
void backward(const BackwardProblem<A>& p, const Shared& shared, int threads, Start scratch,
              const Pixels& pixels) {
  using Scratch = decltype(scratch(0));
  const int chunks = p.tables.y.chunks;
  const std::int64_t B = p.features.B, N = p.features.N, h = p.features.h;
  for (std::int64_t b0 = 0; b0 < B; b0 += kEpisodes) {
    const std::int64_t episodes = B - b0 < kEpisodes ? B - b0 : kEpisodes;
    for (std::int64_t n0 = 0; n0 < N; n0 += kImages) {
      const std::int64_t images = N - n0 < kImages ? N - n0 : kImages;
      parallel(episodes * chunks, threads, scratch, [&](std::int64_t unit, Scratch& s) {
        const std::int64_t e = unit / chunks;
        match_chunk_backward(p, shared, s, static_cast<int>(unit % chunks), e, b0 + e, n0, images,
                             pixels);
      });
      if (!p.grad_features.data) continue;
      parallel(episodes * images * h, threads, scratch, [&](std::int64_t unit, Scratch& s) {
        const std::int64_t e = unit / (images * h), image = unit / h % images;
        const int i = static_cast<int>(unit % h);
        const A* row = sum_parts(p.tables.y, i, p.features.w * p.pitch,
                                 shared.parts + (e * shared.images + image) * shared.part_size,
                                 s.rows.features.data);
        if (!row) return;
        unpack<A>([row](std::int64_t) { return row; }, p.pitch, p.grad_features, b0 + e, n0 + image,
                  i, i + 1);
      });
    }
    if (!p.grad_prototypes) continue;
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

}  // namespace cpu
LSLPN_END
