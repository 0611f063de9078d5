// Masked average pooling, forward and backward.
//
// Interpolation is linear, so the sum over a window of M * Up F is a sum over feature locations
// of weights times F, the weights being the masks carried down to feature resolution, Up^T M.
//   mask_weights   masks -> weights and pixel counts of every tile
//   pool           features times weights, divided by the counts
//   pool_backward  gradients of windows times weights
#include "gather.h"
#include "pixels.h"
#include "plain_pool.h"
#include "scatter.h"

namespace lslpn::cuda {
namespace {

constexpr int kClasses = 2;      // at a time
constexpr int kRowsAtATime = 4;  // rows of masks on their way

struct MaskWeights {
  Grid grid;
  const void* masks;
  int C;
  std::int64_t first_image, images;
  float* maps;    // [images, tiles, C, kMap]
  float* counts;  // [images, tiles, C]
};

struct MaskMemory {
  RowTaps rows;
  ColumnTaps columns;
  float board[kClasses][kTileSide][kPitch];
};

// How much of some pixels, each below the other, belongs to classes c and c + 1; of an image's
// masks, as core/masks.h has it.
template <class M, MaskKind kKind, int kRows>
LSLPN_DEVICE void read_masks(const M* masks, std::int64_t down, int plane, int C, int c,
                             float (&value)[kRows][kClasses]) {
  if constexpr (kKind == MaskKind::labels) {
    LSLPN_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const M label = masks[k * down];
      value[k][0] = label == static_cast<M>(c) ? 1 : 0;
      value[k][1] = label == static_cast<M>(c + 1) ? 1 : 0;
    }
  } else {
    // The plane of a class that there is not is that of the last: it is not looked at.
    const int first = kKind == MaskKind::classes ? 0 : 1;
    const M* planes = masks + static_cast<std::int64_t>(minimum(c + 1, C - 1) - first) * plane;
    LSLPN_UNROLL
    for (int k = 0; k < kRows; ++k) value[k][1] = static_cast<float>(planes[k * down]);
    if (c >= first) {
      planes = masks + static_cast<std::int64_t>(c - first) * plane;
      LSLPN_UNROLL
      for (int k = 0; k < kRows; ++k) value[k][0] = static_cast<float>(planes[k * down]);
    } else {
      LSLPN_UNROLL
      for (int k = 0; k < kRows; ++k) value[k][0] = value[k][1];
      LSLPN_NO_UNROLL
      for (int other = 1; other < C - 1; ++other) {
        planes += plane;
        LSLPN_UNROLL
        for (int k = 0; k < kRows; ++k) value[k][0] += static_cast<float>(planes[k * down]);
      }
      LSLPN_UNROLL
      for (int k = 0; k < kRows; ++k) value[k][0] = max_or_nan(0, 1 - value[k][0]);
    }
  }
}

// A warp a tile.
template <class M, MaskKind kKind>
LSLPN_KERNEL(kPixelThreads, 4)
mask_weights(LSLPN_PARAMETERS MaskWeights p) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const std::int64_t index = block_index() * kPixelWarps + warp;  // image and tile
  if (index >= p.images * p.grid.tiles()) return;
  const std::int64_t image = index / p.grid.tiles();
  MaskMemory& memory = reinterpret_cast<MaskMemory*>(shared_memory())[warp];
  const PixelTile tile(p.grid, static_cast<int>(index - image * p.grid.tiles()), lane, memory.rows);
  put_columns(tile, lane, memory.columns);
  const ColumnSums<Linear> columns(memory.columns, lane);
  const int plane = p.grid.y.pixels * p.grid.x.pixels;
  const std::int64_t down = kept(p.grid.x.pixels);
  const int stored = kKind == MaskKind::labels ? 1 : kKind == MaskKind::foreground ? p.C - 1 : p.C;
  const M* masks = static_cast<const M*>(p.masks) + (p.first_image + image) * stored * plane +
                   tile.pixel(p.grid, lane);

  LSLPN_NO_UNROLL
  for (int c = 0; c < p.C; c += kClasses) {
    // Sums over the pixels of a column with a tap on a row of locations, and on the next.
    float here[kClasses], next[kClasses] = {}, count[kClasses] = {};
    int y = 0;
    LSLPN_NO_UNROLL
    for (int row = 0; row < kTileSide; ++row) {
      LSLPN_UNROLL
      for (int e = 0; e < kClasses; ++e) {
        here[e] = p.grid.tiles_y.between ? next[e] : 0;
        next[e] = 0;
      }
      const int end = y + tile.rows_at(row);
      by_rows<kRowsAtATime>(y, end, [&](int begin, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        float m[kRows][kClasses];
        read_masks<M, kKind>(masks + begin * p.grid.x.pixels, down, plane, p.C, c, m);
        LSLPN_UNROLL
        for (int k = 0; k < kRows; ++k) {
          const float upper = memory.rows[begin + k].upper, lower = 1 - upper;
          LSLPN_UNROLL
          for (int e = 0; e < kClasses; ++e) {
            here[e] += lower * m[k][e];
            next[e] += upper * m[k][e];
            count[e] += m[k][e];
          }
        }
      });
      y = end;
      LSLPN_UNROLL
      for (int e = 0; e < kClasses; ++e) memory.board[e][row][lane] = here[e];
    }
    warp_barrier();
    const int row = lane / 4, at = minimum(row, kTileSide - 1);
    float2 sums[kClasses];
    columns.add_up(memory.board[0][at], memory.board[1][at], sums);
    LSLPN_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      if (c + k < p.C) put_sums(p.maps + (index * p.C + c + k) * kMap, row, lane % 4, sums[k]);
    }
    LSLPN_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      if (lane >= tile.x.pixels) count[k] = 0;  // repeats the last column
      for (int step = 16; step > 0; step /= 2) count[k] += shuffle_xor(count[k], step);
      if (lane == 0 && c + k < p.C) p.counts[index * p.C + c + k] = count[k];
    }
    warp_barrier();
  }
}

template <class T>
struct PoolKernel {
  Exchange exchange;
  Images<T> features;  // or their gradient
};

template <class T>
LSLPN_KERNEL(kExchangeThreads, 3)
pool(LSLPN_PARAMETERS PoolKernel<const T> p) {
  gather<T, true>(p.exchange, p.features, static_cast<int>(block_index()));
}

template <class T>
LSLPN_KERNEL(kExchangeThreads, 2)
pool_backward(LSLPN_PARAMETERS PoolKernel<T> p) {
  const Images<const T> none{nullptr, 0, 0, 0, 0, 0};
  scatter<T, true>(p.exchange, none, p.features, static_cast<int>(block_index()));
}

// ---- on the host ----

// All that is decided before the first launch.
struct PoolPlan {
  Exchange exchange;
  std::int64_t floats;    // of workspace, an image
  std::int64_t episodes;  // of a chunk
};

bool make_plan(const Pool& call, PoolPlan& plan) {
  const Features& f = call.features;
  Exchange& e = plan.exchange;
  if (f.dtype == DType::float64 || f.D > kTiledAxis || call.masks.C > kTiledAxis) return false;
  if (!make_grid(call.y, call.x, e.grid)) return false;
  e.N = f.N;
  e.C = e.slots = static_cast<int>(call.masks.C);
  e.D = static_cast<int>(f.D);
  plan.floats = std::int64_t{e.grid.tiles()} * e.C * (kMap + 1);
  plan.episodes = episodes_of_chunk(f, 4 * plan.floats);
  return plan_exchange(e, plan.episodes);
}

bool plan_pool(const Pool& call, PoolPlan& plan) {
  thread_local Plans<PoolPlan> plans;
  const Features& f = call.features;
  // Without foreground there are no masks to be read.
  if (call.masks.kind == MaskKind::foreground && call.masks.C == 1) return false;
  return small_images(f) && plans.find(plan_key(f, call.y, call.x, call.masks.C), plan,
                                       [&](PoolPlan& made) { return make_plan(call, made); });
}

std::string launch_mask_weights(const Masks& masks, const MaskWeights& w, Stream stream) {
  const std::int64_t blocks = divide_up(w.images * w.grid.tiles(), kPixelWarps);
  const auto start = [&](void (*kernel)(MaskWeights)) {
    return launch(kernel, blocks, kPixelThreads, kPixelWarps * sizeof(MaskMemory), stream, w);
  };
  const bool bytes = masks_are_bytes(masks);
  switch (masks.kind) {
    case MaskKind::labels:
      return bytes ? start(mask_weights<std::uint8_t, MaskKind::labels>)
                   : start(mask_weights<std::int64_t, MaskKind::labels>);
    case MaskKind::foreground:
      return bytes ? start(mask_weights<std::uint8_t, MaskKind::foreground>)
                   : start(mask_weights<float, MaskKind::foreground>);
    default:
      return bytes ? start(mask_weights<std::uint8_t, MaskKind::classes>)
                   : start(mask_weights<float, MaskKind::classes>);
  }
}

template <class T>
std::string tiled_pool(const Pool& call, PoolPlan& plan, Stream stream) {
  const Features& f = call.features;
  Exchange& e = plan.exchange;
  float* maps = static_cast<float*>(call.workspace);
  MaskWeights w{e.grid, call.masks.data, e.C, 0, 0, maps, nullptr};
  w.counts = maps + plan.episodes * f.N * e.grid.tiles() * e.C * kMap;
  e.maps = w.maps;
  e.counts = w.counts;
  e.min_pixels = static_cast<float>(call.min_pixels);
  e.scale = static_cast<float*>(call.factor);
  e.out = static_cast<float*>(call.prototypes);
  e.vectors = e.out;
  return each_chunk(f.B, plan.episodes, [&](const Chunk& chunk) {
    e.chunk = chunk;
    w.first_image = chunk.first * f.N;
    w.images = chunk.episodes * f.N;
    // What was kept is of the last chunk.
    if (!call.kept || chunk.episodes < f.B) {
      const std::string error = launch_mask_weights(call.masks, w, stream);
      if (!error.empty()) return error;
    }
    if (call.backward) {
      return launch(pool_backward<T>, e.scatter_blocks(), kExchangeThreads, sizeof(ScatterMemory),
                    stream, PoolKernel<T>{e, images_of<T>(f)});
    }
    return launch(pool<T>, e.gather_blocks(), kExchangeThreads, gather_memory(e), stream,
                  PoolKernel<const T>{e, images_of<const T>(f)});
  });
}

}  // namespace

std::string probe() {
  return probe_kernel(pool<float>);
}

std::int64_t workspace_of(const Pool& call) {
  PoolPlan plan;
  return plan_pool(call, plan) ? 4 * plan.episodes * call.features.N * plan.floats : 0;
}

std::string run(const Pool& call, Stream stream) {
  PoolPlan plan;
  const bool tiled = plan_pool(call, plan);
  return with_type(call.features.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      if (tiled) return tiled_pool<T>(call, plan, stream);
    }
    return plain_pool<T>(call, stream);
  });
}

}  // namespace lslpn::cuda
