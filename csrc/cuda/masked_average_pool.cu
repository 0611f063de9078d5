// Masked average pooling, forward and backward.
//
// Interpolation is linear, so the sum over a window of M * Up F is a sum over feature locations
// of weights times F, the weights being the masks carried down to feature resolution, Up^T M.
//   1. pool_weights: masks -> weights and pixel counts of every tile. Tiles are cut where windows
//      start or end, so that windows are unions of tiles.
//   2. march (march.h): features times weights, windows put together, divided by their counts;
//      or backward: gradients of windows times weights.
#include "march.h"
#include "plain_pool.h"

namespace lslpn::cuda {
namespace {

constexpr int kWeightsWarps = 4;
constexpr int kWeightsRows = 8;  // rows of masks on their way at a time

struct PoolWeights {
  Masks masks;
  int C;
  std::int64_t first_image, images;
  Axis y, x;
  Tiles tiles_y, tiles_x;
  MapLayout layout;
  float* maps;    // [images, tiles] of layout: a slot for each class
  float* counts;  // [images, tiles, C]
};

constexpr std::size_t kWeightsShared = sizeof(TileTaps) + kBoard * sizeof(float);

// A warp a tile.
LSLPN_KERNEL(32 * kWeightsWarps, 4)
pool_weights(LSLPN_PARAMETERS PoolWeights p) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int tiles = p.tiles_y.count * p.tiles_x.count;
  const std::int64_t index = block_index() * kWeightsWarps + warp;  // image and tile
  if (index >= p.images * tiles) return;
  const std::int64_t image = index / tiles;
  const int tile = static_cast<int>(index - image * tiles);
  char* memory = shared_memory() + warp * kWeightsShared;
  TileTaps& taps = *reinterpret_cast<TileTaps*>(memory);
  float* board = reinterpret_cast<float*>(memory + sizeof(TileTaps));

  const Stretch y = stretch(p.y, p.tiles_y, tile / p.tiles_x.count);
  const Stretch x = stretch(p.x, p.tiles_x, tile % p.tiles_x.count);
  find_taps(taps, p.y, p.x, y, x, lane);
  warp_barrier();
  const int height = y.end - y.begin, width = x.end - x.begin;
  const Columns columns = columns_of(taps, width, lane % 8);
  float* map = p.maps + index * p.layout.tile;

  for (int c0 = 0; c0 < p.C; c0 += 4) {
    // Sums over the pixels so far of a column with a tap on row `row`, and on the next.
    float here[4] = {}, next[4] = {}, count[4] = {};
    int row = taps.y[0].lower;
    const auto finish_row = [&] {
      const float sum = sum_columns(board, here, taps, columns, lane);
      const int c = c0 + lane / 8, j = lane % 8;
      if (c < p.C && j < p.layout.columns) {
        map[row * p.layout.row + c * p.layout.columns + j] = sum;
      }
      for (int e = 0; e < 4; ++e) {
        here[e] = next[e];
        next[e] = 0;
      }
      ++row;
    };
    for (int i0 = 0; i0 < height; i0 += kWeightsRows) {
      float m[kWeightsRows][4];
      LSLPN_UNROLL
      for (int k = 0; k < kWeightsRows; ++k) {
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          m[k][e] = 0;
          if (lane < width && i0 + k < height && c0 + e < p.C) {
            const std::int64_t row = static_cast<std::int64_t>(y.begin + i0 + k) * p.x.pixels;
            m[k][e] = mask_at<float>(p.masks, p.first_image + image, c0 + e, row + x.begin + lane,
                                     static_cast<std::int64_t>(p.y.pixels) * p.x.pixels);
          }
        }
      }
      LSLPN_UNROLL
      for (int k = 0; k < kWeightsRows; ++k) {
        if (i0 + k >= height) break;
        const Taps<float> t = taps.y[i0 + k];
        while (row < t.lower) finish_row();
        for (int e = 0; e < 4; ++e) {
          here[e] += (1 - t.upper) * m[k][e];
          next[e] += t.upper * m[k][e];
          count[e] += m[k][e];
        }
      }
    }
    while (row <= y.upper - y.lower) finish_row();
    for (int e = 0; e < 4; ++e) {
      for (int step = 16; step > 0; step /= 2) count[e] += shuffle_xor(count[e], step);
      if (lane == 0 && c0 + e < p.C) p.counts[index * p.C + c0 + e] = count[e];
    }
  }
}

// ---- on the host ----

// All that is decided before the first launch.
struct PoolPlan {
  Tiles tiles_y, tiles_x;
  March march;
  std::int64_t map_floats, count_floats;  // of an image
  Chunks chunks;
};

bool make_plan(const Pool& call, bool backward, PoolPlan& plan) {
  const Features& f = call.features;
  if (f.dtype == DType::float64 || f.D > kTiledAxis || call.masks.C > kTiledAxis) return false;
  March& m = plan.march;
  if (!cut_at_windows(call.y, kTileRows, m.tiles_y)) return false;
  if (!cut_at_windows(call.x, kTileColumns, m.tiles_x)) return false;
  m.B = f.B;
  m.N = f.N;
  m.C = static_cast<int>(call.masks.C);
  m.D = static_cast<int>(f.D);
  m.y = call.y;
  m.x = call.x;
  m.tile_windows = m.tile_windows_x = 1;
  m.layout = MapLayout::of(m.tiles_y, m.tiles_x, m.C);
  if (!plan_march(m, backward ? Pass::pool_backward : Pass::pool)) return false;
  const std::int64_t tiles = static_cast<std::int64_t>(m.tiles_y.count) * m.tiles_x.count;
  plan.map_floats = tiles * m.layout.tile;
  plan.count_floats = tiles * call.masks.C;
  plan.chunks = Chunks::of(f, 4 * (plan.map_floats + plan.count_floats));
  return true;
}

bool plan_pool(const Pool& call, bool backward, PoolPlan& plan) {
  thread_local Plans<PoolPlan> plans[2];
  return plans[backward].find(plan_key(call.features, call.y, call.x, call.masks.C), plan,
                              [&](PoolPlan& made) { return make_plan(call, backward, made); });
}

std::string tiled_pool(const Pool& call, PoolPlan& plan, Stream stream, bool backward) {
  const Features& f = call.features;
  March& m = plan.march;
  PoolWeights w{};
  w.masks = call.masks;
  w.C = m.C;
  w.y = call.y;
  w.x = call.x;
  w.tiles_y = m.tiles_y;
  w.tiles_x = m.tiles_x;
  w.layout = m.layout;
  w.maps = static_cast<float*>(call.workspace);
  w.counts = w.maps + plan.chunks.images * plan.map_floats;
  m.maps = w.maps;
  m.tile_sums = w.counts;
  m.min_pixels = static_cast<float>(call.min_pixels);
  float* prototypes = static_cast<float*>(call.prototypes);
  float* factor = static_cast<float*>(call.factor);
  if (backward) {
    set_grad_features(m, f);
    m.scale = factor;
    m.vectors = prototypes;
    m.vectors_aligned = f.D % 4 == 0 && reinterpret_cast<std::uintptr_t>(prototypes) % 16 == 0;
  } else {
    set_features(m, f);
    m.factor = factor;
    m.out = prototypes;
  }
  return plan.chunks.each(f, [&](const Chunk& chunk) {
    w.first_image = chunk.first_b * f.N + chunk.first_n;
    w.images = chunk.episodes * chunk.images;
    m.first_b = chunk.first_b;
    m.first_n = chunk.first_n;
    m.images = chunk.images;
    m.accumulate = chunk.first_n > 0;
    const std::int64_t tiles = w.images * m.tiles_y.count * m.tiles_x.count;
    std::string error = launch(pool_weights, divide_up(tiles, kWeightsWarps), 1,
                               kWarp * kWeightsWarps, kWeightsWarps * kWeightsShared, stream, w);
    if (!error.empty()) return error;
    return backward ? launch_march<Pass::pool_backward>(m, chunk.episodes, stream)
                    : launch_march<Pass::pool>(m, chunk.episodes, stream);
  });
}

std::string pool(const Pool& call, Stream stream, bool backward, bool plain) {
  PoolPlan plan;
  if (!plain && plan_pool(call, backward, plan)) {
    return tiled_pool(call, plan, stream, backward);
  }
  return with_type(call.features.dtype,
                   [&](auto type) { return plain_pool<decltype(type)>(call, stream, backward); });
}

}  // namespace

bool pool_is_tiled(const Pool& call) {
  PoolPlan plan;
  return plan_pool(call, false, plan) && plan_pool(call, true, plan);
}

std::int64_t pool_workspace(const Pool& call, bool backward, bool plain) {
  PoolPlan plan;
  if (plain || !plan_pool(call, backward, plan)) return 0;
  return 4 * plan.chunks.images * (plan.map_floats + plan.count_floats);
}

std::string probe() {
  return probe_kernel(pool_weights);
}

std::string pool_forward(const Pool& call, Stream stream, bool plain) {
  return pool(call, stream, false, plain);
}

std::string pool_backward(const Pool& call, Stream stream, bool plain) {
  return pool(call, stream, true, plain);
}

}  // namespace lslpn::cuda
