// Cosine matching, forward and backward.
//
// Interpolation is linear, so the inner product of Up F(x) with a prototype is interpolated from
// those of the feature locations, and |Up F(x)|^2 from the Gram maps (core/arithmetic.h).
//   scores          dots: inner products of a tile's locations with the prototypes of its windows,
//                   Gram maps; from them its pixels' scores and winners
//   match_weights   backward: from the pixels' gradients those of the dots and of the Gram maps
//   match_backward  from these the gradients of prototypes (gather) and features (scatter)
#include "gather.h"
#include "match_weights.h"
#include "plain_match.h"
#include "scatter.h"
#include "scores.h"

namespace lslpn::cuda {
namespace {

template <class T>
struct MatchBackwardKernel {
  Exchange exchange;
  Images<const T> features;
  Images<T> to;
  std::int64_t gathers;
};

// First the blocks for the prototypes, then those for the features.
template <class T>
LSLPN_KERNEL(kExchangeThreads, 2)
match_backward(LSLPN_PARAMETERS MatchBackwardKernel<T> p) {
  const int block = static_cast<int>(block_index());
  if (block < p.gathers) {
    gather<T, false>(p.exchange, p.features, block);
  } else {
    scatter<T, false>(p.exchange, p.features, p.to, block - static_cast<int>(p.gathers));
  }
}

// ---- on the host ----

// All that is decided before the first launch.
struct MatchPlan {
  MatchTiles tiles;
  Exchange exchange;
  std::int64_t floats;    // of workspace, an image
  std::int64_t episodes;  // of a chunk, backward

  std::int64_t prototypes() const { return std::int64_t{exchange.C} * exchange.grid.windows(); }
};

bool make_plan(const Match& call, MatchPlan& plan) {
  const Features& f = call.features;
  MatchTiles& t = plan.tiles;
  Exchange& e = plan.exchange;
  if (f.dtype == DType::float64 || f.D > kTiledAxis || call.C > kTiledAxis) return false;
  if (!make_grid(call.y, call.x, e.grid) || e.grid.tile_windows() > 16) return false;
  t.grid = e.grid;
  t.N = e.N = f.N;
  t.images = f.B * f.N;
  t.C = e.C = static_cast<int>(call.C);
  t.D = e.D = static_cast<int>(f.D);
  t.mean = call.mean;
  e.places = !call.mean;
  t.slots = e.slots = t.C * (e.places ? e.grid.tile_windows() : 1) + 4;
  plan.floats = std::int64_t{e.grid.tiles()} * e.slots * kMap;
  plan.episodes = episodes_of_chunk(f, 4 * plan.floats);
  return plan_exchange(e, plan.episodes);
}

bool plan_match(const Match& call, MatchPlan& plan) {
  thread_local Plans<MatchPlan> plans;
  const Features& f = call.features;
  if (!small_images(f) || call.wide_winners) return false;
  if (call.backward && !(call.gram && small_images(call.grad_features))) return false;
  if (!plans.find(plan_key(f, call.y, call.x, call.C, call.mean), plan,
                  [&](MatchPlan& made) { return make_plan(call, made); })) {
    return false;
  }
  // What is of this call.
  MatchTiles& t = plan.tiles;
  t.prototypes = static_cast<const float*>(call.prototypes);
  t.overlap_x = static_cast<int>(call.overlap_x);
  t.logit_scale = static_cast<float>(call.logit_scale);
  t.scores = static_cast<float*>(call.scores);
  t.winners = static_cast<std::uint8_t*>(call.winners);
  t.gram = static_cast<float*>(call.gram);
  const Loss& loss = call.loss;
  t.loss = {loss.labels,
            loss.wide_labels,
            loss.ignore_index,
            static_cast<const float*>(loss.weight),
            static_cast<float*>(loss.radial),
            static_cast<float*>(call.workspace),
            static_cast<const float*>(loss.grad),
            static_cast<const float*>(loss.total)};
  return true;
}

template <class T, int kWindows>
std::string launch_scores(const Match& call, const MatchTiles& t, Stream stream) {
  const ScoreKernel<T> kernel{t, images_of<const T>(call.features), fours(call.features)};
  return launch(scores<T, kWindows>, divide_up(t.images * t.grid.tiles(), kPixelWarps),
                kPixelThreads, kPixelWarps * sizeof(ScoreMemory<kWindows>), stream, kernel);
}

template <class T>
std::string tiled_backward(const Match& call, MatchPlan& plan, Stream stream) {
  const Features& f = call.features;
  MatchTiles& t = plan.tiles;
  Exchange& e = plan.exchange;
  t.grad = static_cast<const float*>(call.grad);
  t.maps = static_cast<float*>(call.workspace);
  t.inverse_lengths = t.maps + plan.episodes * f.N * plan.floats;
  e.maps = t.maps;
  e.scale = t.inverse_lengths;
  e.vectors = t.prototypes;
  e.out = static_cast<float*>(call.grad_prototypes);
  return each_chunk(f.B, plan.episodes, [&](const Chunk& chunk) {
    t.first_image = chunk.first * f.N;
    t.images = chunk.episodes * f.N;
    t.tile_blocks = divide_up(t.images * t.grid.tiles(), kPixelWarps);
    t.first_prototype = chunk.first * plan.prototypes();
    t.prototype_count = chunk.episodes * plan.prototypes();
    e.chunk = chunk;
    const std::int64_t blocks = t.tile_blocks + divide_up(t.prototype_count, kMeasuredOfBlock);
    const auto kernel_of = [&](auto loss) {
      return t.mean ? match_weights<true, loss.value> : match_weights<false, loss.value>;
    };
    const std::string error =
        launch(call.has_loss ? kernel_of(std::true_type()) : kernel_of(std::false_type()), blocks,
               kPixelThreads, kPixelWarps * sizeof(WeightMemory), stream, t);
    if (!error.empty()) return error;
    const MatchBackwardKernel<T> kernel{e, images_of<const T>(f), images_of<T>(call.grad_features),
                                        e.gather_blocks()};
    return launch(match_backward<T>, e.gather_blocks() + e.scatter_blocks(), kExchangeThreads,
                  std::max(gather_memory(e), sizeof(ScatterMemory)), stream, kernel);
  });
}

}  // namespace

std::int64_t workspace_of(const Match& call) {
  MatchPlan plan;
  const bool tiled = plan_match(call, plan);
  if (call.has_loss && !tiled) return -1;
  if (!call.backward) return call.has_loss ? 8 * plan.tiles.images * plan.tiles.grid.tiles() : 0;
  if (!tiled) return plain_match_workspace(call);
  return 4 * (plan.episodes * call.features.N * plan.floats + call.features.B * plan.prototypes());
}

std::string run(const Match& call, Stream stream) {
  MatchPlan plan;
  const bool tiled = plan_match(call, plan);
  return with_type(call.features.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      if (tiled && call.backward) return tiled_backward<T>(call, plan, stream);
      if (tiled && plan.tiles.grid.tile_windows() <= 4) {
        return launch_scores<T, 4>(call, plan.tiles, stream);
      }
      if (tiled) return launch_scores<T, 16>(call, plan.tiles, stream);
    }
    return plain_match<T>(call, stream);
  });
}

}  // namespace lslpn::cuda
