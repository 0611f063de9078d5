// Masked average pooling, forward and backward.
//
// Interpolation is linear, so the sum over a window of M * Up F is a sum over feature locations of
// weights times F; the weights are the masks at feature resolution, Up^T M.
//   mask_weights   masks -> weights and pixel counts of every tile
//   pool           features times weights, divided by the counts
//   pool_backward  gradients of the prototypes times weights
#include "gather.h"
#include "pixels.h"
#include "scatter.h"
#include "sum_tiles.h"

namespace lslpn::cuda {
namespace {

constexpr int kClasses = 2;      // at a time
constexpr int kRowsAtATime = 4;  // rows of masks that are loaded ahead

struct MaskWeights : Exchange {
  const void* masks;
};

struct MaskMemory {
  RowTaps rows;
  ColumnTaps columns;
  float sums[kClasses][kTileSide][kPitch];
};

// Masks of class c at kRows pixels of a column, from those of an image; see core/masks.h.
template <class M, MaskKind kKind, int kRows>
LSLPN_DEVICE void read_masks(const M* masks, std::int64_t down, int plane, int C, int c,
                             float (&value)[kRows]) {
  if (kKind == MaskKind::labels) {
    LSLPN_UNROLL
    for (int k = 0; k < kRows; ++k) value[k] = masks[k * down] == static_cast<M>(c) ? 1 : 0;
    return;
  }
  // The plane of a class, or those of all others for a background that has none.
  const bool rest = kKind == MaskKind::foreground && c == 0;
  const int first = kKind == MaskKind::classes ? c : max(c - 1, 0);
  masks += static_cast<std::int64_t>(first) * plane;
  LSLPN_UNROLL
  for (int k = 0; k < kRows; ++k) value[k] = static_cast<float>(masks[k * down]);
  LSLPN_NO_UNROLL
  for (int other = 2; rest && other < C; ++other) {
    masks += plane;
    LSLPN_UNROLL
    for (int k = 0; k < kRows; ++k) value[k] += static_cast<float>(masks[k * down]);
  }
  LSLPN_UNROLL
  for (int k = 0; k < kRows && rest; ++k) value[k] = max_or_nan(0, 1 - value[k]);
}

// One warp per tile.
template <class M, MaskKind kKind>
LSLPN_KERNEL(kPixelThreads, 4)
mask_weights(LSLPN_PARAMETERS MaskWeights p) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const std::int64_t index = block_index() * kPixelWarps + warp;  // image and tile
  if (index >= p.B * p.N * p.grid.tiles()) return;
  const std::int64_t image = index / p.grid.tiles();
  MaskMemory& memory = reinterpret_cast<MaskMemory*>(shared_memory())[warp];
  const PixelTile tile(p.grid, static_cast<int>(index - image * p.grid.tiles()), lane, memory.rows);
  put_columns(tile, lane, memory.columns);
  const ColumnSums<Linear> columns(memory.columns, lane);
  const int plane = p.grid.y.pixels * p.grid.x.pixels;
  const std::int64_t down = kept(p.grid.x.pixels);
  const int stored = kKind == MaskKind::labels ? 1 : kKind == MaskKind::foreground ? p.C - 1 : p.C;
  const M* masks =
      static_cast<const M*>(p.masks) + image * stored * plane + tile.pixel(p.grid, lane);

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
        float m[kClasses][kRows];
        LSLPN_UNROLL
        for (int e = 0; e < kClasses; ++e) {
          // Beyond the last class it is repeated; its sums are not used.
          read_masks<M, kKind>(masks + begin * p.grid.x.pixels, down, plane, p.C,
                               min(c + e, p.C - 1), m[e]);
        }
        LSLPN_UNROLL
        for (int k = 0; k < kRows; ++k) {
          const float upper = memory.rows[begin + k].upper, lower = 1 - upper;
          LSLPN_UNROLL
          for (int e = 0; e < kClasses; ++e) {
            here[e] += lower * m[e][k];
            next[e] += upper * m[e][k];
            count[e] += m[e][k];
          }
        }
      });
      y = end;
      LSLPN_UNROLL
      for (int e = 0; e < kClasses; ++e) memory.sums[e][row][lane] = here[e];
    }
    __syncwarp();
    const int row = lane / 4, at = min(row, kTileSide - 1);
    float2 sums[kClasses];
    columns.add_up(memory.sums[0][at], memory.sums[1][at], sums);
    LSLPN_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      if (lane >= tile.x.pixels) count[k] = 0;  // it repeats the last column
      count[k] = warp_sum(count[k]);
      if (c + k >= p.C) continue;
      put_sums(p.maps + (index * p.C + c + k) * kMap, row, lane % 4, sums[k]);
      if (lane == 0) p.counts[index * p.C + c + k] = count[k];
    }
    __syncwarp();
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

template <MaskKind kKind>
void launch_mask_weights(const Masks& masks, const Exchange& e, Stream stream) {
  using Wide = std::conditional_t<kKind == MaskKind::labels, std::int64_t, float>;
  launch(masks_are_bytes(masks) ? mask_weights<std::uint8_t, kKind> : mask_weights<Wide, kKind>,
         divide_up(e.B * e.N * e.grid.tiles(), kPixelWarps), kPixelThreads,
         kPixelWarps * sizeof(MaskMemory), stream, MaskWeights{e, masks.data});
}

template <class T>
void launch_product(const Pool& call, const Exchange& e, Stream stream) {
  if (call.backward) {
    launch(pool_backward<T>, e.scatter_blocks(), kExchangeThreads, sizeof(ScatterMemory), stream,
           PoolKernel<T>{e, images_of<T>(call.features)});
  } else {
    launch(pool<T>, e.gather_blocks(), kExchangeThreads, gather_memory(e), stream,
           PoolKernel<const T>{e, images_of<const T>(call.features)});
  }
}

}  // namespace

std::string probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(pool<float>));
  cudaGetLastError();  // so that torch does not see it
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::int64_t run(const Pool& call, std::int64_t workspace, const Allocate& allocate,
                 Stream stream) {
  if (!small_images(call.features)) return 0;
  std::optional<Exchange> plan =
      plan_of(call.features, call.y, call.x, call.masks.C, Operator::pool, workspace);
  if (!plan) return 0;
  Exchange& e = *plan;
  place(e, true, allocate(place(e, true, nullptr)));
  e.min_pixels = call.min_pixels;
  e.scale = call.factor;
  e.vectors = call.prototypes;
  e.out = call.backward ? nullptr : call.prototypes;
  if (!call.kept || e.B < call.features.B) {
    const auto start = call.masks.kind == MaskKind::labels ? launch_mask_weights<MaskKind::labels>
                       : call.masks.kind == MaskKind::foreground
                           ? launch_mask_weights<MaskKind::foreground>
                           : launch_mask_weights<MaskKind::classes>;
    start(call.masks, e, stream);
    launch_sum_tiles<true>(e, stream);
  }
  with_type(call.features.dtype,
            [&](auto type) { launch_product<decltype(type)>(call, e, stream); });
  return e.B;
}

}  // namespace lslpn::cuda
