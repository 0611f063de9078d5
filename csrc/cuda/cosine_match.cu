// Cosine matching, forward and backward.
//
// Interpolation is linear, so the inner product of Up F(x) with a prototype is interpolated from
// those of the feature locations, and |Up F(x)|^2 from the Gram maps (core/arithmetic.h).
//   scores          inner products ("dots") of a tile's locations with the prototypes of its
//                   windows, Gram maps; from these scores and winners of the tile's pixels
//   match_weights   backward: from the gradients of the pixels those of the dots and the Gram maps
//   match_backward  from these the gradients of prototypes (gather) and features (scatter)
#include "gather.h"
#include "match_weights.h"
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

std::optional<Plan> plan_of(const Match& call) {
  const Features& f = call.features;
  if (!small_images(f) || (call.backward && !small_images(call.grad_features))) return std::nullopt;
  return plan_of(f, call.y, call.x, call.C,
                 call.matching.mean ? Operator::match_mean : Operator::match_max);
}

MatchTiles tiles_of(const Match& call, const Exchange& e) {
  MatchTiles t{};
  static_cast<Matching&>(t) = call.matching;
  t.grid = e.grid;
  t.C = e.C;
  t.D = e.D;
  t.N = e.N;
  t.images = call.features.B * e.N;
  return t;
}

template <class T, int kWindows>
std::string launch_scores(const Match& call, const MatchTiles& t, Stream stream) {
  const ScoreKernel<T> kernel{t, images_of<const T>(call.features), fours(call.features)};
  return launch(scores<T, kWindows>, divide_up(t.images * t.grid.tiles(), kPixelWarps),
                kPixelThreads, kPixelWarps * sizeof(ScoreMemory<kWindows>), stream, kernel);
}

template <class T>
std::string launch_backward(const Match& call, MatchTiles& t, Plan& plan, Stream stream) {
  const Features& f = call.features;
  Exchange& e = plan.exchange;
  const std::int64_t prototypes = std::int64_t{e.C} * e.grid.windows();  // of an episode
  t.tile_maps = e.tile_maps;
  t.maps = static_cast<float*>(call.workspace);
  t.inverse_lengths = t.maps + plan.episodes * f.N * plan.floats;
  e.maps = t.maps;
  e.scale = t.inverse_lengths;
  e.vectors = t.prototypes;
  e.out = call.grad_prototypes;
  const auto match_weights_of = [&](auto loss) {
    return t.mean ? match_weights<true, loss.value> : match_weights<false, loss.value>;
  };
  const auto weights =
      t.loss.radial ? match_weights_of(std::true_type()) : match_weights_of(std::false_type());
  return each_chunk(plan, f.B, [&] {
    t.first_image = e.chunk.first * f.N;
    t.images = e.chunk.episodes * f.N;
    t.tile_blocks = divide_up(t.images * t.grid.tiles(), kPixelWarps);
    t.first_prototype = e.chunk.first * prototypes;
    t.prototype_count = e.chunk.episodes * prototypes;
    const std::int64_t blocks = t.tile_blocks + divide_up(t.prototype_count, kMeasuredOfBlock);
    const std::string error =
        launch(weights, blocks, kPixelThreads, kPixelWarps * sizeof(WeightMemory), stream, t);
    if (!error.empty()) return error;
    const MatchBackwardKernel<T> kernel{e, images_of<const T>(f), images_of<T>(call.grad_features),
                                        e.gather_blocks()};
    return launch(match_backward<T>, e.gather_blocks() + e.scatter_blocks(), kExchangeThreads,
                  std::max(gather_memory(e), sizeof(ScatterMemory)), stream, kernel);
  });
}

}  // namespace

std::int64_t workspace_of(const Match& call) {
  const std::optional<Plan> plan = plan_of(call);
  if (!plan) return -1;
  const Exchange& e = plan->exchange;
  const std::int64_t B = call.features.B;
  if (call.backward) {
    return 4 * (plan->episodes * e.N * plan->floats + B * e.C * e.grid.windows());
  }
  return call.matching.loss.radial ? 8 * B * e.N * e.grid.tiles() : 0;
}

std::string run(const Match& call, Stream stream) {
  std::optional<Plan> plan = plan_of(call);
  MatchTiles t = tiles_of(call, plan->exchange);
  t.loss_sums = static_cast<float*>(call.workspace);
  return with_type(call.features.dtype, [&](auto type) {
    using T = decltype(type);
    if (call.backward) return launch_backward<T>(call, t, *plan, stream);
    if (t.grid.tile_windows() <= 4) return launch_scores<T, 4>(call, t, stream);
    return launch_scores<T, 16>(call, t, stream);
  });
}

}  // namespace lslpn::cuda
