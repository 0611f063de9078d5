// Masked average pooling, forward and backward.
//
// Interpolation is linear, so the sum over a tile of M * Up F is a sum over feature locations of
// weights times F; the weights are the masks at feature resolution, Up^T M.
//   mask_weights     masks -> weights and pixel counts of every tile
//   pool             features times weights: a vector for each tile and class
//   sum_windows      sums over the tiles of a window, divided by its pixel count
//   share_windows    backward: gradients of prototypes -> gradients of the tiles' vectors
//   pool_backward    these times weights
#include "gather.h"
#include "pixels.h"
#include "scatter.h"

namespace lslpn::cuda {
namespace {

struct Pooling : Exchange {
  const void* masks;
  float min_pixels;
  float* factors;     // [B, N, C, Gy, Gx]: 1 / (N n), or 0 where n is too small
  float* prototypes;  // [B, C, Gy, Gx, D], or their gradients
};

struct MaskMemory {
  PixelTaps rows, columns;
};

// Masks of class c at the pixels of a tile that a lane has; see core/masks.h.
template <class M, MaskKind kKind>
LSLPN_DEVICE void read_masks(const M* masks, const std::int64_t (&rows)[8],
                             const std::int64_t (&columns)[4], std::int64_t plane, int C, int c,
                             float (&value)[8][4]) {
  const auto each = [&](const M* from, auto f) {
    LSLPN_UNROLL
    for (int k = 0; k < 8; ++k) {
      const M* const row = kept(from + rows[k]);
      __builtin_assume(__isGlobal(row));
      for (int j = 0; j < 4; ++j) f(value[k][j], *at_byte(row, columns[j]));
    }
  };
  const auto take = [](float& of, M mask) { of = static_cast<float>(mask); };
  if constexpr (kKind == MaskKind::labels) {
    each(masks, [&](float& of, M label) { of = label == static_cast<M>(c) ? 1 : 0; });
  } else if (kKind == MaskKind::classes || c > 0) {
    each(masks + (kKind == MaskKind::classes ? c : c - 1) * plane, take);
  } else {
    // The rest of all other classes.
    each(masks, take);
    LSLPN_NO_UNROLL
    for (int other = 2; other < C; ++other) {
      masks += plane;
      each(masks, [](float& of, M mask) { of += static_cast<float>(mask); });
    }
    each(masks, [](float& of, M) { of = max_or_nan(0, 1 - of); });
  }
}

// One warp per tile. The sums over rows of pixels are a product, with the high parts of the weights
// in rows 0 to 7 of its first operand and the low parts in the others; those over columns another,
// with the parts of these sums. Row 6 has ones, as has column 7 of the second: they count pixels.
// What is not finite spoils the tile, all of whose windows have it anyway.
template <class M, MaskKind kKind>
LSLPN_KERNEL(kPixelThreads, 3)
mask_weights(LSLPN_PARAMETERS Pooling p) {
  const int lane = thread_index() % kWarp, g = lane / 4, q = lane % 4;
  const int index = block_index() * kPixelWarps + thread_index() / kWarp;  // image and tile
  if (index >= p.all_tiles()) return;
  const PixelTile tile(p.grid, index, lane);
  MaskMemory& memory = reinterpret_cast<MaskMemory*>(shared_memory())[thread_index() / kWarp];
  memory.rows[lane] = {tile.of_row.lower, tile.of_row.upper};
  put_columns(tile, lane, memory.columns);
  std::uint32_t down[4][4];
  OperandB across[4];
  // A lane has pixels of rows q, q + 4, ... and columns g, g + 8, ... Beyond the tile the last ones
  // are repeated, with a weight of 0.
  std::int64_t rows[8], columns[4];
  LSLPN_UNROLL
  for (int k = 0; k < 8; ++k) {
    const PixelTap row = memory.rows[4 * k + q];
    const PixelTap column = memory.columns[8 * (k / 2) + 2 * q + k % 2];
    const float ones_down = g == 6 && row.lower >= 0 ? 1.0f : 0.0f;
    const float ones_across = g == 7 && column.lower >= 0 ? 1.0f : 0.0f;
    split_tf32(fmaxf(row.weight<Linear>(g), ones_down), down[k / 2][k % 2 * 2],
               down[k / 2][k % 2 * 2 + 1]);
    across[k / 2].set(k % 2, fmaxf(column.weight<Linear>(g), ones_across));
    rows[k] = std::int64_t{min(4 * k + q, tile.y.pixels - 1)} * p.grid.x.pixels;
    if (k < 4) columns[k] = kept(std::int64_t{sizeof(M)} * min(8 * k + g, tile.x.pixels - 1));
  }
  const std::int64_t plane = std::int64_t{p.grid.y.pixels} * p.grid.x.pixels;
  const int stored = kKind == MaskKind::labels ? 1 : kKind == MaskKind::foreground ? p.C - 1 : p.C;
  const M* const masks =
      static_cast<const M*>(p.masks) +
      (tile.image * stored * plane + tile.y.pixel * p.grid.x.pixels + tile.x.pixel);
  const std::int64_t tiles = p.grid.tiles(), number = index - tile.image * tiles;
  LSLPN_NO_UNROLL
  for (int c = 0; c < p.C; ++c) {
    float value[8][4], sum[4];
    read_masks<M, kKind>(masks, rows, columns, plane, p.C, c, value);
    LSLPN_UNROLL
    for (int j = 0; j < 4; ++j) {
      float part[4];
      LSLPN_UNROLL
      for (int k = 0; k < 4; ++k) {
        OperandB of;
        if constexpr (std::is_same_v<M, float>) {
          of.set(0, value[2 * k][j]);
          of.set(1, value[2 * k + 1][j]);
          matrix_multiply(part, down[k], of.low, k == 0);
          matrix_multiply(part, down[k], of.high, false);
        } else {
          // Bytes and labels have no low part.
          of.high[0] = float_bits(value[2 * k][j]);
          of.high[1] = float_bits(value[2 * k + 1][j]);
          matrix_multiply(part, down[k], of.high, k == 0);
        }
      }
      std::uint32_t parts[4];
      split_tf32(part[0] + part[2], parts[0], parts[1]);
      split_tf32(part[1] + part[3], parts[2], parts[3]);
      matrix_multiply(sum, parts, across[j].low, j == 0);
      matrix_multiply(sum, parts, across[j].high, false);
    }
    float* const map = p.weights + ((tile.image * p.C + c) * tiles + number) * kTileWeights;
    const float2 sums = make_float2(sum[0] + sum[2], sum[1] + sum[3]);
    put_sums(map, g, q, sums);
    const bool any = __any_sync(kAllLanes, sums.x != 0 || sums.y != 0);
    if (g == 6 && q == 3) *reinterpret_cast<float2*>(map + kMap) = make_float2(sums.y, any);
  }
}

// Neighbouring channels, of which a lane has eight of every 256.
struct alignas(16) Channels {
  float value[8] = {};

  LSLPN_DEVICE void add(float scale, const Channels& other) {
    for (int k = 0; k < 8; ++k) value[k] += scale * other.value[k];
  }
};
constexpr int kWarpChannels = 8 * kWarp;

constexpr int kClassesOfWarp = 2;

// One warp per window of an episode and two classes.
LSLPN_KERNEL(kExchangeThreads, 4)
sum_windows(LSLPN_PARAMETERS Pooling p) {
  const int windows = p.grid.windows(), across = p.grid.x.windows, lane = thread_index() % kWarp;
  const int index = block_index() * kExchangeWarps + thread_index() / kWarp;
  const int parts = divide_up(p.C, kClassesOfWarp), part = index / windows;
  if (part >= p.B * parts) return;
  const int m = index - part * windows, m_y = m / across, b = part / parts;
  const Range rows = segments_over(p.grid.tiles_y, pixels_of_window(p.grid.y, m_y));
  const Range columns = segments_over(p.grid.tiles_x, pixels_of_window(p.grid.x, m - m_y * across));
  const int down = p.grid.tiles_x.count, corner = rows.begin * down + columns.begin;
  const std::int64_t step = p.D / 8;
  const int c0 = (part - b * parts) * kClassesOfWarp;
  LSLPN_NO_UNROLL
  for (int c = c0; c < min(c0 + kClassesOfWarp, p.C); ++c) {
    LSLPN_NO_UNROLL
    for (int d = 8 * lane; d < p.D; d += kWarpChannels) {
      Channels all;
      LSLPN_NO_UNROLL
      for (int n = 0; n < p.N; ++n) {
        const std::int64_t image = std::int64_t{b * p.N + n} * p.C + c;
        const std::int64_t at = image * p.grid.tiles() + corner;
        const float* count = p.weights + (at * kTileWeights + kMap);
        auto vector = reinterpret_cast<const Channels*>(p.out + (at * p.D + d));
        float pixels = 0;
        Channels sum;
        LSLPN_NO_UNROLL
        for (int r = rows.begin; r < rows.end;
             ++r, count += down * kTileWeights, vector += down * step) {
#pragma unroll 2  // as many as the paper's windows have in a row
          for (int k = 0; k < columns.end - columns.begin; ++k) {
            pixels += count[k * kTileWeights];
            sum.add(1, vector[k * step]);
          }
        }
        const float factor = pixels > p.min_pixels ? 1 / (pixels * static_cast<float>(p.N)) : 0;
        if (d == 0) p.factors[image * windows + m] = factor;
        // A window with too few pixels in an image takes nothing from it, not even NaN.
        if (factor != 0) all.add(factor, sum);
      }
      const std::int64_t at = (std::int64_t{b} * p.C + c) * windows + m;
      *reinterpret_cast<Channels*>(p.prototypes + (at * p.D + d)) = all;
    }
  }
}

// One warp per tile of an image.
LSLPN_KERNEL(kExchangeThreads, 4)
share_windows(LSLPN_PARAMETERS Pooling p) {
  const int tiles = p.grid.tiles(), windows = p.grid.windows(), lane = thread_index() % kWarp;
  const int index = block_index() * kExchangeWarps + thread_index() / kWarp;
  if (index >= p.all_tiles()) return;
  const int image = index / tiles, tile = index - image * tiles, row = tile / p.regions_x;
  const Segment y = p.grid.tiles_y.segment(row),
                x = p.grid.tiles_x.segment(tile - row * p.regions_x);
  const int down = p.grid.x.windows, corner = y.window * down + x.window;
  LSLPN_NO_UNROLL
  for (int c = 0; c < p.C; ++c) {
    const float* const factors = p.factors + ((std::int64_t{image} * p.C + c) * windows + corner);
    const float* const prototypes =
        p.prototypes + ((std::int64_t{image / p.N} * p.C + c) * windows + corner) * p.D;
    const std::int64_t at = (std::int64_t{image} * p.C + c) * tiles + tile;
    // A tile counts if a window passes on a gradient to it, and a mask or what is not finite that
    // to locations: 0 times NaN is NaN.
    bool passes = false, spreads = p.weights[at * kTileWeights + kMap + 1] != 0;
    LSLPN_NO_UNROLL
    for (int d = 8 * lane; d < p.D; d += kWarpChannels) {
      Channels sum;
      LSLPN_NO_UNROLL
      for (int r = 0; r < y.windows; ++r) {
        LSLPN_NO_UNROLL
        for (int k = r * down; k < r * down + x.windows; ++k) {
          // Windows with too few pixels pass on no gradient, not even NaN.
          if (factors[k] == 0) continue;
          passes = true;
          const float* from = prototypes + (std::int64_t{k} * p.D + d);
          sum.add(factors[k], *reinterpret_cast<const Channels*>(from));
        }
      }
      *reinterpret_cast<Channels*>(p.out + (at * p.D + d)) = sum;
      for (int k = 0; k < 8; ++k) spreads |= !isfinite(sum.value[k]);
    }
    const bool counts = __any_sync(kAllLanes, passes && spreads);
    if (lane == 0) p.scale[at] = counts ? 1 : 0;
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
  gather<T, true>(p.exchange, p.features, block_index());
}

template <class T>
LSLPN_KERNEL(kExchangeThreads, 2)
pool_backward(LSLPN_PARAMETERS PoolKernel<T> p) {
  const Images<const T> none{nullptr, 0, 0, 1, 0, 0, 0};
  scatter<T, true>(p.exchange, none, p.features, block_index());
}

// ---- on the host ----

template <MaskKind kKind>
void launch_mask_weights(const Masks& masks, const Pooling& p, Stream stream) {
  using Wide = std::conditional_t<kKind == MaskKind::labels, std::int64_t, float>;
  launch(masks_are_bytes(masks) ? mask_weights<std::uint8_t, kKind> : mask_weights<Wide, kKind>,
         divide_up(p.all_tiles(), kPixelWarps), kPixelThreads, kPixelWarps * sizeof(MaskMemory),
         stream, p);
}

template <class T>
void launch_product(const Pool& call, const Exchange& e, Stream stream) {
  if (call.backward) {
    launch(pool_backward<T>, e.scatter_blocks(), kExchangeThreads, sizeof(ScatterMemory), stream,
           PoolKernel<T>{e, images_of<T>(call.features)});
  } else {
    launch(pool<T>, std::int64_t{e.images()} * e.gather_parts(), kExchangeThreads,
           sizeof(GatherMemory), stream, PoolKernel<const T>{e, images_of<const T>(call.features)});
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
  const Features& f = call.features;
  if (!small_images(f)) return 0;
  const std::optional<Exchange> plan =
      plan_of(f, call.y, call.x, call.masks.C, Operator::pool, workspace);
  if (!plan) return 0;
  Pooling p{*plan, call.masks.data, call.min_pixels, call.factor, call.prototypes};
  const std::int64_t bytes = 4 * std::int64_t{p.N} * p.pairs() * kTileWeights;  // of an episode
  if (call.kept && call.kept_bytes != bytes) throw std::invalid_argument("kept has another size");
  p.weights = static_cast<float*>(call.kept ? call.kept : allocate(f.B * bytes));
  if (!call.kept) {
    Pooling all = p;
    all.B = f.B;
    const auto start = call.masks.kind == MaskKind::labels ? launch_mask_weights<MaskKind::labels>
                       : call.masks.kind == MaskKind::foreground
                           ? launch_mask_weights<MaskKind::foreground>
                           : launch_mask_weights<MaskKind::classes>;
    start(call.masks, all, stream);
  }
  place(p, true, allocate(place(p, true, nullptr)));
  const auto launch_warps = [&](void (*kernel)(Pooling), std::int64_t warps) {
    launch(kernel, divide_up(warps, kExchangeWarps), kExchangeThreads, 0, stream, p);
  };
  if (call.backward) launch_warps(share_windows, p.all_tiles());
  with_type(f.dtype, [&](auto type) { launch_product<decltype(type)>(call, p, stream); });
  if (!call.backward)
    launch_warps(sum_windows, p.B * divide_up(p.C, kClassesOfWarp) * p.grid.windows());
  return p.B;
}

}  // namespace lslpn::cuda
