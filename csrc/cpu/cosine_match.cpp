// Scores and winners of whole images, and their gradients; see match.h.
#include "match_backward.h"
#include "match_forward.h"

LSLPN_BEGIN
namespace cpu {
namespace {

// The offset of class 0 of a tile in images [B, N, C, H, W].
template <class A>
std::int64_t first_pixel(const Problem<A>& p, const Tile<A>& tile, std::int64_t b, std::int64_t n) {
  const std::int64_t H = p.tables.y.pixels, W = p.tables.x.pixels;
  return ((b * p.features.N + n) * p.C * H + tile.y.begin) * W + tile.x.begin;
}

// An Output that writes a tile's scores into images, and its winners unless null.
template <class A>
struct Image {
  A* scores;
  char* winners;
  bool bytes;
  std::int64_t plane, pitch;  // pixels from one class to the next, from one row to the next
  int columns;                // of the tile

  void put(std::int64_t c, int i, int t, Vec<A> score, Index<A> winner) const {
    const std::int64_t at = c * plane + i * pitch + t;
    store(scores + at, score, columns - t);
    __builtin_prefetch(scores + at + columns, 1);  // the next tile
    if (winners) {
      __builtin_prefetch(winners + (at + columns) * (bytes ? 1 : 4), 1);
      store_index<A>(winners + at * (bytes ? 1 : 4), bytes, winner, columns - t);
    }
  }
  void put_one(std::int64_t c, int i, int j, A score, int winner) const {
    const std::int64_t at = c * plane + i * pitch + j;
    scores[at] = score;
    if (winners && bytes) {
      reinterpret_cast<std::uint8_t*>(winners)[at] = static_cast<std::uint8_t>(winner);
    } else if (winners) {
      reinterpret_cast<std::int32_t*>(winners)[at] = winner;
    }
  }
};

template <class A>
void forward(const Match<A>& args) {
  Problem<A> p(args);
  p.gram = args.gram;
  const int threads = p.threads(args.threads);
  const Memory<Directions<A>, MatchScratch<A>> memory(p, threads);
  const Directions<A>& directions = memory.shared();
  directions.fill(p, threads);

  const AxisTables<A>&y = p.tables.y, &x = p.tables.x;
  const std::int64_t N = p.features.N;
  using Scratch = MatchScratch<A>;
  parallel(p.features.B * N * y.chunks, threads, memory.scratch(p),
           [&](std::int64_t unit, Scratch& s) {
             const std::int64_t image = unit / y.chunks, b = image / N, n = image % N;
             const Chunk chunk = chunk_of(y, static_cast<int>(unit % y.chunks));
             s.rows.start(p, b, n, chunk);
             for (int sy = chunk.first; sy < chunk.last; ++sy) {
               s.rows.load(p, b, n, y.segment[sy].lower, y.segment[sy].upper);
               for (int sx = 0; sx < x.segments; ++sx) {
                 Tile<A> tile(p, sy, sx);
                 const std::int64_t at = first_pixel(p, tile, b, n);
                 char* winners = static_cast<char*>(args.winners);
                 if (winners) winners += at * (args.winners_are_bytes ? 1 : 4);
                 const std::int64_t plane = std::int64_t{y.pixels} * x.pixels;
                 match_tile(p, directions, s, b, tile,
                            Image<A>{args.scores + at, winners, args.winners_are_bytes, plane,
                                     x.pixels, tile.x.pixels});
               }
             }
           });
}

// A Pixels that reads gradients of scores, and the scores and winners saved by the forward pass.
template <class A>
struct SavedPixels {
  const MatchBackward<A>& args;
  std::int64_t first = 0;  // pixel of the tile

  SavedPixels of(const BackwardProblem<A>& p, const Directions<A>&, BackwardScratch<A>& s,
                 std::int64_t b, std::int64_t n, int, Tile<A>& tile) const {
    tile.locate(p, s.rows.features);
    s.tile.lengths(p, tile, s.rows);
    return {args, first_pixel(p, tile, b, n)};
  }

  // Reads one class of a tile: slope = g = logit_scale dS / |u| and the winners; adds dS S, which
  // does not depend on the scale, to energy.
  void open(const BackwardProblem<A>& p, const Tile<A>& tile, BackwardScratch<A>& s,
            std::int64_t c) const {
    const std::int64_t H = p.tables.y.pixels, W = p.tables.x.pixels, at = first + c * H * W;
    const bool bytes = args.winners_are_bytes;
    const char* winners = static_cast<const char*>(args.winners);
    const bool more = tile.x.begin + tile.x.pixels < W;
    for (int i = 0; i < tile.y.pixels; ++i) {
      if (more) {  // prefetch the same row of the next tile
        const std::int64_t next = at + i * W + tile.x.pixels;
        for (std::int64_t t = 0; t < tile.x.pixels; t += 64 / sizeof(A)) {
          __builtin_prefetch(args.grad + next + t);
          __builtin_prefetch(args.scores + next + t);
        }
        if (winners) __builtin_prefetch(winners + next * (bytes ? 1 : 4));
      }
      for (int t = 0; t < tile.T; t += kLanes<A>) {
        const std::int64_t here = i * tile.T + t, pixel = at + i * W + t;
        const int valid = tile.x.pixels - t;
        const Vec<A> grad = load(args.grad + pixel, valid);
        store(s.tile.value + here, grad * load(s.tile.length + here));
        const Vec<A> energy = c == 0 ? Vec<A>{} : load(s.energy + here);
        store(s.energy + here, energy + grad * load(args.scores + pixel, valid));
        if (p.mean) continue;
        store_index<A>(s.tile.winner + here,
                       load_index<A>(winners + pixel * (bytes ? 1 : 4), bytes, valid));
      }
    }
    s.slope = s.tile.value;
    s.winner = s.tile.winner;
  }
};

template <class A>
void backward(const MatchBackward<A>& args) {
  BackwardProblem<A> p(args);
  p.gram = const_cast<A*>(args.gram);
  p.gram_known = args.gram;
  const int threads = p.threads(args.threads);
  const Memory<BackwardShared<A>, BackwardScratch<A>> memory(p, threads);
  memory.shared().directions.fill(p, threads);
  backward(p, memory.shared(), threads, memory.scratch(p), SavedPixels<A>{args});
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
