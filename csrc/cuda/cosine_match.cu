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
#include "sum_tiles.h"

namespace lslpn::cuda {
namespace {

template <class T>
struct MatchBackwardKernel {
  Exchange exchange;
  Images<const T> features;
  Images<T> to;
  int gathers;
};

// First the blocks for the prototypes, then those for the features.
template <class T>
LSLPN_KERNEL(kExchangeThreads, 2)
match_backward(LSLPN_PARAMETERS MatchBackwardKernel<T> p) {
  const int block = block_index();
  if (block < p.gathers) {
    gather<T, false>(p.exchange, p.features, block);
  } else {
    scatter<T, false>(p.exchange, p.features, p.to, block - p.gathers);
  }
}

// ---- on the host ----

int tile_blocks(const Exchange& e) {
  return divide_up(e.all_tiles(), kPixelWarps);
}

template <class T, int kWindows>
void launch_scores(const Match& call, const MatchTiles& t, Stream stream) {
  const ScoreKernel<T> kernel{t, images_of<const T>(call.features), fours(call.features)};
  launch(scores<T, kWindows>, tile_blocks(t), kPixelThreads,
         kPixelWarps * sizeof(ScoreMemory<kWindows>), stream, kernel);
}

template <class T>
void launch_backward(const Match& call, const MatchTiles& t, Stream stream) {
  const auto match_weights_of = [&](auto loss) {
    return t.mean ? match_weights<true, loss.value> : match_weights<false, loss.value>;
  };
  launch(t.loss.radial ? match_weights_of(std::true_type()) : match_weights_of(std::false_type()),
         tile_blocks(t), kPixelThreads, kPixelWarps * sizeof(WeightMemory), stream, t);
  launch_sum_tiles(t, stream);
  const MatchBackwardKernel<T> kernel{t, images_of<const T>(call.features),
                                      images_of<T>(call.grad_features),
                                      static_cast<int>(t.B) * t.gather_parts()};
  launch(match_backward<T>, kernel.gathers + t.scatter_blocks(), kExchangeThreads,
         std::max(gather_memory(t), sizeof(ScatterMemory)), stream, kernel);
}

}  // namespace

std::int64_t run(const Match& call, std::int64_t workspace, const Allocate& allocate,
                 Stream stream) {
  const Features& f = call.features;
  if (!small_images(f) || (call.backward && !small_images(call.grad_features))) return 0;
  const Operator op = call.matching.mean ? Operator::match_mean : Operator::match_max;
  const std::optional<Exchange> plan = plan_of(f, call.y, call.x, call.C, op, workspace);
  if (!plan) return 0;
  MatchTiles t{*plan, call.matching, nullptr};
  t.vectors = t.prototypes;
  t.out = call.grad_prototypes;
  if (call.backward) {
    place(t, false, allocate(place(t, false, nullptr)));
  } else {
    t.B = f.B;
    if (t.loss.radial) t.loss_sums = static_cast<float*>(allocate(8 * t.B * t.N * t.grid.tiles()));
  }
  with_type(f.dtype, [&](auto type) {
    using T = decltype(type);
    if (call.backward) {
      launch_backward<T>(call, t, stream);
    } else if (t.grid.tile_windows() <= 4) {
      launch_scores<T, 4>(call, t, stream);
    } else {
      launch_scores<T, 16>(call, t, stream);
    }
  });
  return t.B;
}

}  // namespace lslpn::cuda
