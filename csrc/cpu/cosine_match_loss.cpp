// The cross-entropy of the logits z = logit_scale * S, and its gradients, in one pass: logits and
// winners are stored for one tile at a time. See match.h.
//
// A pixel x with label y has the weight w(x) = weight[y] (0 if ignored), divided by the sum of all
// weights, which a first pass over the labels computes. With p = softmax(z),
//
//   loss     = sum over x of -w(x) log p_y(x)
//   dz_c(x)  = w(x) (p_c(x) - [c = y])
//
// and the backward pass follows, tile by tile, while its inputs are in the cache.
#include <limits>

#include "match_backward.h"
#include "match_forward.h"
#include "softmax.h"

LSLPN_BEGIN
namespace cpu {
namespace {

template <class A>
struct LossProblem : BackwardProblem<A> {
  const MatchLoss<A>& args;
  std::int64_t tile;    // size of a plane of a tile
  A each = A(0);        // 1 / sum of the weights
  std::int64_t strips;  // of labels, the work units of the first pass
  static constexpr std::int64_t kStrip = 1 << 14;

  explicit LossProblem(const MatchLoss<A>& a)
      : BackwardProblem<A>(a),
        args(a),
        tile(static_cast<std::int64_t>(a.tables.y.length) * a.tables.x.length),
        strips((pixels() + kStrip - 1) / kStrip) {}

  A weight(int c) const { return args.weight ? each * args.weight[c] : each; }
  std::int64_t pixels() const {  // of all images
    const Tables<A>& t = args.tables;
    return args.features.B * args.features.N * t.y.pixels * t.x.pixels;
  }
  std::int64_t chunks() const { return args.features.B * args.features.N * args.tables.y.chunks; }
};

template <class A>
struct LossShared : BackwardShared<A> {
  double* losses = nullptr;   // [B, N, chunks]
  double* weights = nullptr;  // [strips] sums of weights
  bool* in_range = nullptr;   // [strips]

  LossShared() = default;
  LossShared(Arena& arena, const LossProblem<A>& p)
      : BackwardShared<A>(arena, p),
        losses(arena.take<double>(p.chunks())),
        weights(arena.take<double>(p.strips)),
        in_range(arena.take<bool>(p.strips)) {}
};

template <class A>
struct LossScratch : BackwardScratch<A> {
  A* scores;          // [C, T rows, T] logits, then g = dz / |u|
  Whole<A>* winners;  // [C, T rows, T]
  A* exps;            // [C, lanes]

  LossScratch(Arena& arena, const LossProblem<A>& p)
      : BackwardScratch<A>(arena, p),
        scores(arena.take<A>(p.C * p.tile)),
        winners(arena.take<Whole<A>>(p.C * p.tile)),
        exps(arena.take<A>(p.C * kLanes<A>)) {}
};

// ---- the labels ---------------------------------------------------------------------------------

// The sum of the weights of labels[0 .. n), and whether all of them are classes or ignored.
template <class T, class A>
double sum_of_weights(const T* labels, std::int64_t n, const LossProblem<A>& p, bool& in_range) {
  const std::int64_t ignored = p.args.ignore_index;
  std::int64_t count = 0, strays = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t y = labels[i];
    const bool counts = y != ignored;
    count += counts;
    strays += counts && static_cast<std::uint64_t>(y) >= static_cast<std::uint64_t>(p.C);
  }
  in_range = strays == 0;
  if (!p.args.weight || !in_range) return static_cast<double>(count);
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (labels[i] != ignored) sum += p.args.weight[labels[i]];
  }
  return sum;
}

// Sums the weights of all pixels. Returns false if a label is out of range, and reports it in the
// result.
template <class A>
bool read_labels(LossProblem<A>& p, const LossShared<A>& shared, int threads) {
  const auto strip = [&p](std::int64_t k, auto call) {
    const std::int64_t begin = k * p.kStrip, left = p.pixels() - begin;
    const std::int64_t n = left < p.kStrip ? left : p.kStrip;
    if (p.args.labels_are_bytes) {
      call(static_cast<const std::uint8_t*>(p.args.labels) + begin, n);
    } else {
      call(static_cast<const std::int64_t*>(p.args.labels) + begin, n);
    }
  };
  parallel(
      p.strips, threads, [](int thread) { return thread; },
      [&](std::int64_t k, int) {
        strip(k, [&](auto labels, std::int64_t n) {
          shared.weights[k] = sum_of_weights(labels, n, p, shared.in_range[k]);
        });
      });
  double sum = 0;
  for (std::int64_t k = 0; k < p.strips; ++k) {
    sum += shared.weights[k];
    if (shared.in_range[k]) continue;
    strip(k, [&](auto labels, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t y = labels[i];
        if (y != p.args.ignore_index && (y < 0 || y >= p.C)) p.args.result->stray = y;
      }
    });
    return false;
  }
  p.each = sum == 0 ? A(0) : static_cast<A>(1 / sum);
  return true;
}

// ---- the pixels ---------------------------------------------------------------------------------

// An Output that writes the planes of a tile to the scratch memory of a thread.
template <class A>
struct Planes {
  A* scores;
  Whole<A>* winners;
  std::int64_t plane;
  int T;

  void put(std::int64_t c, int i, int t, Vec<A> score, Index<A> winner) const {
    const std::int64_t at = c * plane + i * T + t;
    store(scores + at, score);
    store_index<A>(winners + at, winner);
  }
  void put_one(std::int64_t c, int i, int j, A score, int winner) const {
    const std::int64_t at = c * plane + i * T + j;
    scores[at] = score;
    winners[at] = winner;
  }
};

// Labels and feature lengths of some pixels.
template <class A>
struct LabelledPixels {
  Index<A> label;
  Index<A> counts;  // whether the pixel is neither ignored nor padding
  Vec<A> length;    // logit_scale / |u|
};

// The loss of some pixels. Replaces their logits z, one plane per class, by g = dz / |u|, and
// writes sum over c of dz z to `energy`.
template <class A>
Vec<A> cross_entropy(const LossProblem<A>& p, const LabelledPixels<A>& x, A* z, A* exps,
                     A* energy) {
  const int C = static_cast<int>(p.C);
  Vec<A> largest = load(z);
  for (int c = 1; c < C; ++c) {
    const Vec<A> value = load(z + c * p.tile);
    largest = value > largest ? value : largest;
  }
  Vec<A> rest = splat(A(-1)), own{}, weight{};  // rest: sum of exps without that of the largest
  for (int c = 0; c < C; ++c) {
    const Vec<A> below = load(z + c * p.tile) - largest, e = exp_of(below);
    const Index<A> mine = x.label == c;
    store(z + c * p.tile, below);
    store(exps + c * kLanes<A>, e);
    rest += e;
    own = mine ? below : own;
    weight = mine ? splat(p.weight(c)) : weight;
  }
  weight = x.counts ? weight : Vec<A>{};
  // The sum of dz over c is 0, so an offset of z does not matter.
  const Vec<A> inverse = A(1) / (rest + A(1));
  Vec<A> sum{};
  for (int c = 0; c < C; ++c) {
    const Vec<A> hit = x.label == c ? splat(A(1)) : Vec<A>{};
    const Vec<A> grad = weight * (load(exps + c * kLanes<A>) * inverse - hit);
    sum += grad * load(z + c * p.tile);
    store(z + c * p.tile, grad * x.length);
  }
  store(energy, sum);
  return weight * (log_of_1_plus(rest) - own);
}

// The same for two classes, with half as many exponentials.
template <class A>
Vec<A> cross_entropy_of_two(const LossProblem<A>& p, const LabelledPixels<A>& x, A* z, A* energy) {
  const Vec<A> difference = load(z + p.tile) - load(z);
  const Index<A> second = x.label == 1;
  const Vec<A> wrong = second ? -difference : difference;  // z of the other class minus that of y
  const Vec<A> distance = wrong < A(0) ? -wrong : wrong;
  const Vec<A> e = exp_of(-distance), inverse = A(1) / (A(1) + e);
  Vec<A> weight = second ? splat(p.weight(1)) : splat(p.weight(0));
  weight = x.counts ? weight : Vec<A>{};
  const Vec<A> other = weight * (wrong < A(0) ? e * inverse : inverse);  // dz of the other class
  const Vec<A> slope = (second ? -other : other) * x.length;             // g of class 1
  store(energy, other * wrong);
  store(z, -slope);
  store(z + p.tile, slope);
  return weight * (log_of_1_plus(e) + (wrong < A(0) ? Vec<A>{} : wrong));
}

// The loss of the pixels of a tile.
template <class A>
double cross_entropy(const LossProblem<A>& p, const Tile<A>& tile, const LossScratch<A>& s,
                     std::int64_t b, std::int64_t n) {
  const std::int64_t H = p.tables.y.pixels, W = p.tables.x.pixels;
  const bool bytes = p.args.labels_are_bytes, more = tile.x.begin + tile.x.pixels < W;
  const std::int64_t size = bytes ? 1 : 8;
  const char* row = static_cast<const char*>(p.args.labels);
  row += (((b * p.features.N + n) * H + tile.y.begin) * W + tile.x.begin) * size;
  Index<A> lane{};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  Vec<A> total{};
  for (int i = 0; i < tile.y.pixels; ++i, row += W * size) {
    for (std::int64_t t = 0; more && t < tile.x.pixels * size; t += 64) {
      __builtin_prefetch(row + tile.x.pixels * size + t);  // of the next tile
    }
    for (int t = 0; t < tile.T; t += kLanes<A>) {
      const int valid = tile.x.pixels - t, here = i * tile.T + t;
      LabelledPixels<A> x;
      x.label = load_labels<A>(row + t * size, bytes, valid);
      x.counts = (x.label != p.args.ignore_index) & (lane < valid);
      x.length = load(s.tile.length + here);
      if (valid < kLanes<A>) {  // padding may not be finite
        for (std::int64_t c = 0; c < p.C; ++c) {
          A* const z = s.scores + c * p.tile + here;
          store(z, lane < valid ? load(z) : Vec<A>{});
        }
      }
      const Vec<A> loss = p.C == 2 ? cross_entropy_of_two(p, x, s.scores + here, s.energy + here)
                                   : cross_entropy(p, x, s.scores + here, s.exps, s.energy + here);
      total += x.counts ? loss : Vec<A>{};
    }
  }
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += total[i];
  return sum;
}

// A Pixels with gradients of logits, computed tile by tile.
template <class A>
struct LossPixels {
  const LossProblem<A>& problem;
  double* losses;

  LossPixels of(const BackwardProblem<A>&, const Directions<A>& directions,
                BackwardScratch<A>& scratch, std::int64_t b, std::int64_t n, int chunk,
                Tile<A>& tile) const {
    const LossProblem<A>& p = problem;
    const auto& s = static_cast<const LossScratch<A>&>(scratch);
    match_tile(p, directions, s, b, tile, Planes<A>{s.scores, s.winners, p.tile, tile.T});
    losses[(b * p.features.N + n) * p.tables.y.chunks + chunk] += cross_entropy(p, tile, s, b, n);
    return *this;
  }
  void open(const BackwardProblem<A>&, const Tile<A>&, BackwardScratch<A>& scratch,
            std::int64_t c) const {
    auto& s = static_cast<LossScratch<A>&>(scratch);
    s.slope = s.scores + c * problem.tile;
    s.winner = s.winners + c * problem.tile;
  }
};

// The loss without gradients.
template <class A>
void forward(const LossProblem<A>& p, const LossShared<A>& shared, int threads,
             const LossPixels<A>& pixels, const Memory<LossShared<A>, LossScratch<A>>& memory) {
  const AxisTables<A>& y = p.tables.y;
  const std::int64_t N = p.features.N;
  using Scratch = LossScratch<A>;
  parallel(p.chunks(), threads, memory.scratch(p), [&](std::int64_t unit, Scratch& s) {
    const std::int64_t image = unit / y.chunks, b = image / N, n = image % N;
    const int k = static_cast<int>(unit % y.chunks);
    const Chunk chunk = chunk_of(y, k);
    s.rows.start(p, b, n, chunk);
    for (int sy = chunk.first; sy < chunk.last; ++sy) {
      s.rows.load(p, b, n, y.segment[sy].lower, y.segment[sy].upper);
      for (int sx = 0; sx < p.tables.x.segments; ++sx) {
        Tile<A> tile(p, sy, sx);
        pixels.of(p, shared.directions, s, b, n, k, tile);
      }
    }
  });
}

template <class A>
void loss(const MatchLoss<A>& args) {
  LossProblem<A> p(args);
  const int threads = p.threads(args.threads);
  const Memory<LossShared<A>, LossScratch<A>> memory(p, threads);
  const LossShared<A>& shared = memory.shared();
  args.result->in_range = read_labels(p, shared, threads);
  if (!args.result->in_range) return;
  shared.directions.fill(p, threads);
  for (std::int64_t k = 0; k < p.chunks(); ++k) shared.losses[k] = 0;
  const LossPixels<A> pixels{p, shared.losses};
  if (p.grad_features.data || p.grad_prototypes) {
    backward(p, shared, threads, memory.scratch(p), pixels);
  } else {
    forward(p, shared, threads, pixels, memory);
  }
  double sum = 0;
  for (std::int64_t k = 0; k < p.chunks(); ++k) sum += shared.losses[k];
  args.result->loss = p.each == A(0) ? std::numeric_limits<double>::quiet_NaN() : sum;
}

}  // namespace

void cosine_match(const MatchLoss<float>& args) {
  loss(args);
}
void cosine_match(const MatchLoss<double>& args) {
  loss(args);
}

}  // namespace cpu
LSLPN_END
