// From feature locations to windows and back, over D channels.
//
// The weights (or gradients) of the tiles tie feature locations to windows:
//   e(c, m, i, j) = sum over tiles of map(tile, c, m, i, j) * scale(c, m)
// and three passes need little else. A block takes a slice of kSlice channels and a part of the
// image, and marches down its rows of feature locations, image by image:
//   sums     out(c, m, d)    = sum over images and (i, j) of e F(i, j, d)
//   spread   grad F(i, j, d) = sum over c, m of e v(c, m, d)
//   stencil  grad F(i, j, d) += gradient of the Gram maps times F at the neighbours of (i, j)
// Each number is summed by one thread, location after location down the rows and image after
// image: neither the parts nor where the sums are kept changes the order.
//
// While row i is worked on, the features of row i + 2 and the maps of row i + 2 are on their way,
// and the maps of row i + 1 are put together: one barrier a row.
#pragma once

#include "columns.h"

namespace lslpn::cuda {

constexpr int kSlice = 64;  // channels of a block: two a lane
constexpr int kMarchWarps = 8;
constexpr int kMarchThreads = kWarp * kMarchWarps;
constexpr int kOctets = kSlice / 8;
static_assert(kOctets == kMarchWarps);
constexpr int kFetches = 1;                // octets of a thread that are fetched ahead, a row
constexpr int kFeaturePitch = kSlice + 4;  // a row of shared memory: no two lanes in one bank
constexpr int kOutputPitch = kSlice + 2;
constexpr int kRun = 4;  // neighbouring feature locations that a warp computes together
constexpr int kMaxParts = 24;

enum class Pass { pool, pool_backward, match_backward };

// Pairs of a class and a column of windows that a warp can sum in registers.
constexpr int pairs_in_registers(Pass pass) {
  return pass == Pass::match_backward ? 1 : 2;
}

// A part of an axis. `own` feature locations get their gradients from this part, and `windows`
// their sums; for that `visit` must be walked over, which `tiles` and windows `touch` belong to.
struct Part {
  short windows_begin, windows_end;
  short own_begin, own_end;
  short visit_begin, visit_end;
  short touch_begin, touch_end;
  short tiles_begin, tiles_end;
};

struct Parts {
  int count;
  int windows, own, visit, touch, tiles;  // the most of a part
  int span;                               // the most feature locations of a window
  int cell_tiles;                         // the most stretches over a feature location
  int cell_windows;                       // the most windows over one
  int near_windows;                       // over one and the next
  Part part[kMaxParts];
};

// Where things lie in shared memory, in bytes.
struct MarchMemory {
  int features, output, weights, stencil, raw, vectors, sums, scale, dots;
  int cells_y, cells_x, tiles_y, tiles_x, spans_y, spans_x;
  int total;
};

struct March {
  const void* features;
  void* grad_features;
  DType dtype;
  std::int64_t stride[5], grad_stride[5];
  bool channels_inner, grad_channels_inner;  // neighbouring channels are neighbours in memory
  bool vectors_of_8, grad_vectors_of_8;      // and eight of them are aligned
  std::int64_t B, N;                         // N images an episode
  std::int64_t first_b, first_n, images;     // of this launch: images of each episode
  int C, D;
  Axis y, x;
  Tiles tiles_y, tiles_x;
  Parts parts_y, parts_x;
  MapLayout layout;
  int tile_windows_x;      // windows of a tile's row in the maps; match only
  int tile_windows;        // windows of a tile in the maps, 1 for pooling
  const float* maps;       // [images of the launch, tiles] of layout
  const float* tile_sums;  // [images of the launch, tiles, C, tile_windows]
  const float* scale;      // pool_backward: factor [B, N, C, G]; match: 1 / |p| [B, C, G]
  float* factor;           // pool: [B, N, C, G]
  float min_pixels;
  const float* vectors;  // [B, C, G, D] gradients of the windows, or prototypes
  bool vectors_aligned;  // to 16 bytes, each of them
  float* out;            // [B, C, G, D]
  bool accumulate;       // onto what is in `out`
  int ring_windows;      // rows of windows in the ring of vectors
  int slots_shift;       // slots along y, rounded up to a power of 2 of at least 4: its logarithm
  bool sums_in_registers;
  MarchMemory memory;
};

// ---- in the kernel ----

LSLPN_DEVICE void load_octet(const void* base, DType dtype, std::int64_t at, std::int64_t stride,
                             int count, bool vector, float (&value)[8]) {
  if (dtype == DType::float32) {
    const float* p = static_cast<const float*>(base) + at;
    if (vector) {
      for (int k = 0; k < 8; k += 4) {
        const float4 v = *reinterpret_cast<const float4*>(p + k);
        value[k] = v.x;
        value[k + 1] = v.y;
        value[k + 2] = v.z;
        value[k + 3] = v.w;
      }
    } else {
      LSLPN_UNROLL
      for (int k = 0; k < 8; ++k) value[k] = k < count ? p[k * stride] : 0;
    }
    return;
  }
  const std::uint16_t* p = static_cast<const std::uint16_t*>(base) + at;
  std::uint16_t bits[8];
  if (vector) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    const unsigned word[4] = {v.x, v.y, v.z, v.w};
    for (int k = 0; k < 8; ++k) bits[k] = static_cast<std::uint16_t>(word[k / 2] >> (16 * (k % 2)));
  } else {
    for (int k = 0; k < 8; ++k) bits[k] = k < count ? p[k * stride] : std::uint16_t{0};
  }
  if (dtype == DType::float16) {
    for (int k = 0; k < 8; ++k) value[k] = to_float(Half{bits[k]});
  } else {
    for (int k = 0; k < 8; ++k) value[k] = to_float(BFloat16{bits[k]});
  }
}

LSLPN_DEVICE void store_octet(void* base, DType dtype, std::int64_t at, std::int64_t stride,
                              int count, bool vector, const float (&value)[8]) {
  if (dtype == DType::float32) {
    float* p = static_cast<float*>(base) + at;
    if (vector) {
      for (int k = 0; k < 8; k += 4) {
        *reinterpret_cast<float4*>(p + k) =
            make_float4(value[k], value[k + 1], value[k + 2], value[k + 3]);
      }
    } else {
      for (int k = 0; k < 8; ++k) {
        if (k < count) p[k * stride] = value[k];
      }
    }
    return;
  }
  std::uint16_t bits[8];
  for (int k = 0; k < 8; ++k) {
    if (dtype == DType::float16) {
      Half half;
      from_float(value[k], half);
      bits[k] = half.bits;
    } else {
      BFloat16 half;
      from_float(value[k], half);
      bits[k] = half.bits;
    }
  }
  std::uint16_t* p = static_cast<std::uint16_t*>(base) + at;
  if (vector) {
    unsigned word[4];
    for (int k = 0; k < 4; ++k)
      word[k] = bits[2 * k] | static_cast<unsigned>(bits[2 * k + 1]) << 16;
    *reinterpret_cast<uint4*>(p) = make_uint4(word[0], word[1], word[2], word[3]);
  } else {
    for (int k = 0; k < 8; ++k) {
      if (k < count) p[k * stride] = bits[k];
    }
  }
}

// What a stretch has to say to feature locations.
struct StretchInfo {
  short first, last;  // windows
  short lower, upper;
};

// The feature locations of a window that are visited; none if last < first.
struct Span {
  short first, last;
};

template <Pass kPass>
struct Marcher {
  static constexpr bool kSums = kPass != Pass::pool_backward;
  static constexpr bool kSpread = kPass != Pass::pool;
  static constexpr bool kStencil = kPass == Pass::match_backward;
  static constexpr bool kFeatures = kSums;
  static constexpr int kHalo = kStencil ? 1 : 0;  // neighbours that are loaded as well
  static constexpr int kPairs = pairs_in_registers(kPass);
  using Row = float[kFetches][8];  // features on their way

  const March& p;
  const int lane, warp;
  const int d0;  // first channel
  const Part &py, &px;
  const std::int64_t b;

  LSLPN_DEVICE Marcher(const March& parameters, int slice, int part_y, int part_x,
                       std::int64_t episode)
      : p(parameters),
        lane(thread_index() % kWarp),
        warp(thread_index() / kWarp),
        d0(slice * kSlice),
        py(parameters.parts_y.part[part_y]),
        px(parameters.parts_x.part[part_x]),
        b(episode) {}

  // ---- tables in shared memory ----

  template <class T>
  LSLPN_DEVICE static T* at(int byte) {
    return reinterpret_cast<T*>(shared_memory() + byte);
  }
  LSLPN_DEVICE Cell row_cell(int i) const { return at<Cell>(p.memory.cells_y)[i - py.visit_begin]; }
  LSLPN_DEVICE Cell column_cell(int j) const {
    return at<Cell>(p.memory.cells_x)[j - px.visit_begin];
  }
  LSLPN_DEVICE StretchInfo row_stretch(int t) const {
    return at<StretchInfo>(p.memory.tiles_y)[t - py.tiles_begin];
  }
  LSLPN_DEVICE StretchInfo column_stretch(int t) const {
    return at<StretchInfo>(p.memory.tiles_x)[t - px.tiles_begin];
  }
  // Of the windows that are touched.
  LSLPN_DEVICE Span row_span(int wy) const {
    return at<Span>(p.memory.spans_y)[wy - py.touch_begin];
  }
  LSLPN_DEVICE Span column_span(int wx) const {
    return at<Span>(p.memory.spans_x)[wx - px.touch_begin];
  }

  LSLPN_DEVICE static void fill_axis(const Axis& axis, const Tiles& tiles, const Part& part,
                                     Cell* cells, StretchInfo* info, Span* spans, int thread,
                                     int threads) {
    for (int i = part.visit_begin + thread; i < part.visit_end; i += threads) {
      cells[i - part.visit_begin] = cell_of(axis, tiles, i);
    }
    for (int t = part.tiles_begin + thread; t < part.tiles_end; t += threads) {
      const Stretch s = stretch(axis, tiles, t);
      info[t - part.tiles_begin] = {static_cast<short>(s.first), static_cast<short>(s.last),
                                    static_cast<short>(s.lower), static_cast<short>(s.upper)};
    }
    for (int m = part.touch_begin + thread; m < part.touch_end; m += threads) {
      const int first = short_taps(axis, axis.start(m)).lower;
      const int last = upper_tap(axis, axis.start(m) + axis.window - 1);
      spans[m - part.touch_begin] = {static_cast<short>(maximum(first, part.visit_begin)),
                                     static_cast<short>(minimum(last, part.visit_end - 1))};
    }
  }

  LSLPN_DEVICE void fill_tables() const {
    constexpr int kHalf = kMarchThreads / 2;
    if (thread_index() < kHalf) {
      fill_axis(p.y, p.tiles_y, py, at<Cell>(p.memory.cells_y), at<StretchInfo>(p.memory.tiles_y),
                at<Span>(p.memory.spans_y), thread_index(), kHalf);
    } else {
      fill_axis(p.x, p.tiles_x, px, at<Cell>(p.memory.cells_x), at<StretchInfo>(p.memory.tiles_x),
                at<Span>(p.memory.spans_x), thread_index() - kHalf, kHalf);
    }
  }

  // ---- scale(c, m), and the tiles' sums over the windows: of pixels, or of dS S ----

  LSLPN_DEVICE int scale_index(int c, int wy, int wx) const {
    const int height = py.touch_end - py.touch_begin, width = px.touch_end - px.touch_begin;
    return (c * height + wy - py.touch_begin) * width + wx - px.touch_begin;
  }
  LSLPN_DEVICE float* scale() const { return at<float>(p.memory.scale); }

  LSLPN_DEVICE void find_scales(std::int64_t n, std::int64_t image) const {
    const int height = py.touch_end - py.touch_begin, width = px.touch_end - px.touch_begin;
    for (int e = thread_index(); e < p.C * height * width; e += kMarchThreads) {
      const int c = e / (height * width);
      const int wy = py.touch_begin + e / width % height, wx = px.touch_begin + e % width;
      const std::int64_t window = (b * p.C + c) * p.y.windows + wy;
      const std::int64_t of_episode = window * p.x.windows + wx;
      const std::int64_t of_image =
          (((b * p.N + n) * p.C + c) * p.y.windows + wy) * p.x.windows + wx;
      if constexpr (kPass == Pass::pool_backward) {
        scale()[e] = p.scale[of_image];
      } else {
        const float sum = tile_sum(image, c, wy, wx);
        if constexpr (kStencil) {
          scale()[e] = p.scale[of_episode];
          at<float>(p.memory.dots)[e] = sum;
        } else {
          const float factor = sum > p.min_pixels ? 1 / (sum * static_cast<float>(p.N)) : 0.0f;
          scale()[e] = factor;
          const bool own = wy >= py.windows_begin && wy < py.windows_end &&
                           wx >= px.windows_begin && wx < px.windows_end;
          if (own && d0 == 0) p.factor[of_image] = factor;
        }
      }
    }
  }

  LSLPN_DEVICE float tile_sum(std::int64_t image, int c, int wy, int wx) const {
    const int y = p.y.start(wy), x = p.x.start(wx);
    const int ty1 = stretch_at(p.tiles_y, y + p.y.window - 1);
    const int tx0 = stretch_at(p.tiles_x, x), tx1 = stretch_at(p.tiles_x, x + p.x.window - 1);
    float sum = 0;
    for (int ty = stretch_at(p.tiles_y, y); ty <= ty1; ++ty) {
      const int first_y = kStencil ? p.y.covering(p.tiles_y.begin[ty]).first : 0;
      for (int tx = tx0; tx <= tx1; ++tx) {
        const std::int64_t tile =
            (image * p.tiles_y.count + ty) * static_cast<std::int64_t>(p.tiles_x.count) + tx;
        int local = 0;
        if constexpr (kStencil) {
          const int first_x = p.x.covering(p.tiles_x.begin[tx]).first;
          local = (wy - first_y) * p.tile_windows_x + wx - first_x;
        }
        sum += p.tile_sums[(tile * p.C + c) * p.tile_windows + local];
      }
    }
    return sum;
  }

  // ---- features ----

  // A thread fetches an octet of every 32nd column, neighbouring threads what are neighbours in
  // memory: columns, or octets of a column.
  LSLPN_DEVICE int fetched_octet(bool inner) const {
    return inner ? thread_index() % kOctets : warp;
  }
  LSLPN_DEVICE int fetched_column(bool inner, int k) const {
    return (inner ? thread_index() / kOctets : lane) + k * kWarp;
  }

  // The k-th octet of a thread in row i; zeros outside of the image.
  LSLPN_DEVICE void fetch(std::int64_t n, int i, int k, float (&value)[8]) const {
    const int j = px.visit_begin - kHalo + fetched_column(p.channels_inner, k);
    const int d = d0 + 8 * fetched_octet(p.channels_inner);
    LSLPN_UNROLL
    for (int m = 0; m < 8; ++m) value[m] = 0;
    if (i < 0 || i >= p.y.cells || j < 0 || j >= p.x.cells || d >= p.D) return;
    const std::int64_t place =
        b * p.stride[0] + n * p.stride[1] + d * p.stride[2] + i * p.stride[3] + j * p.stride[4];
    load_octet(p.features, p.dtype, place, p.stride[2], p.D - d, p.vectors_of_8, value);
  }
  LSLPN_DEVICE bool has_fetch(int k) const {
    return fetched_column(p.channels_inner, k) < px.visit_end - px.visit_begin + 2 * kHalo;
  }

  LSLPN_DEVICE void fetch_row(std::int64_t n, int i, Row& value) const {
    LSLPN_UNROLL
    for (int k = 0; k < kFetches; ++k) {
      if (has_fetch(k)) fetch(n, i, k, value[k]);
    }
  }

  LSLPN_DEVICE float* feature(int i, int column) const {
    return at<float>(p.memory.features) +
           ((i & 3) * (p.parts_x.visit + 2 * kHalo) + column) * kFeaturePitch;
  }

  LSLPN_DEVICE void keep(int i, int k, const float (&value)[8]) const {
    float4* target = reinterpret_cast<float4*>(feature(i, fetched_column(p.channels_inner, k)) +
                                               8 * fetched_octet(p.channels_inner));
    target[0] = make_float4(value[0], value[1], value[2], value[3]);
    target[1] = make_float4(value[4], value[5], value[6], value[7]);
  }

  // Puts a row into shared memory, and what there is more of it than was fetched.
  LSLPN_DEVICE void keep_row(std::int64_t n, int i, const Row& value) const {
    LSLPN_UNROLL
    for (int k = 0; k < kFetches; ++k) {
      if (has_fetch(k)) keep(i, k, value[k]);
    }
    LSLPN_NO_UNROLL
    for (int k = kFetches; has_fetch(k); ++k) {
      float more[8];
      fetch(n, i, k, more);
      keep(i, k, more);
    }
  }

  // The two channels of this lane.
  LSLPN_DEVICE float2 feature_at(int i, int j) const {
    return *reinterpret_cast<const float2*>(feature(i, j - px.visit_begin + kHalo) + 2 * lane);
  }

  // ---- vectors of windows ----

  LSLPN_DEVICE float* vector(int wy, int wx, int c) const {
    const int width = px.touch_end - px.touch_begin;
    return at<float>(p.memory.vectors) +
           ((wy % p.ring_windows * width + wx - px.touch_begin) * p.C + c) * kSlice;
  }

  LSLPN_DEVICE void load_vectors(int wy) const {
    const int width = px.touch_end - px.touch_begin;
    for (int e = thread_index(); e < width * p.C * (kSlice / 4); e += kMarchThreads) {
      const int quad = e % (kSlice / 4), c = e / (kSlice / 4) % p.C;
      const int wx = px.touch_begin + e / (kSlice / 4) / p.C;
      const int d = d0 + 4 * quad;
      float* target = vector(wy, wx, c) + 4 * quad;
      const std::int64_t window = ((b * p.C + c) * p.y.windows + wy) * p.x.windows + wx;
      const float* source = p.vectors + window * p.D + d;
      if (p.vectors_aligned && d < p.D) {
        copy_async(target, source);
      } else {
        LSLPN_UNROLL
        for (int k = 0; k < 4; ++k) target[k] = d + k < p.D ? source[k] : 0.0f;
      }
    }
  }

  // ---- weights ----

  LSLPN_DEVICE float* raw_tile(int i, int row, int tx) const {
    const int tiles = px.tiles_end - px.tiles_begin;
    const int buffer = (i & 1) * p.parts_y.cell_tiles * p.parts_x.tiles;
    return at<float>(p.memory.raw) + (buffer + row * tiles + tx - px.tiles_begin) * p.layout.row;
  }

  // Sends for the rows of the maps that belong to row i.
  LSLPN_DEVICE void fetch_maps(std::int64_t image, int i) const {
    const Cell row = row_cell(i);
    const int chunks = p.layout.row / 4 * (px.tiles_end - px.tiles_begin);
    for (int ty = row.first_stretch; ty <= row.last_stretch; ++ty) {
      const int r = i - row_stretch(ty).lower;
      const std::int64_t tile = (image * p.tiles_y.count + ty) * p.tiles_x.count + px.tiles_begin;
      const float* source = p.maps + tile * p.layout.tile + r * p.layout.row;
      float* target = raw_tile(i, ty - row.first_stretch, px.tiles_begin);
      for (int e = thread_index(); e < chunks; e += kMarchThreads) {
        const int tx = e / (p.layout.row / 4), chunk = e - tx * (p.layout.row / 4);
        copy_async(target + 4 * e, source + tx * p.layout.tile + 4 * chunk);
      }
    }
  }

  // Weights of a class and column of windows in row i: for each feature location of the window,
  // from the first one visited on, those of the rows of windows over row i.
  LSLPN_DEVICE float* weights(int i, int c, int wx) const {
    const int pair = ((i & 1) * p.C + c) * p.parts_x.touch + wx - px.touch_begin;
    return at<float>(p.memory.weights) + (pair * p.parts_x.span << p.slots_shift);
  }

  LSLPN_DEVICE float4* stencil(int i, int j) const {
    return at<float4>(p.memory.stencil) + (i & 3) * (p.parts_x.visit + 1) + j - px.visit_begin + 1;
  }

  // Puts the tiles' maps together at row i.
  LSLPN_DEVICE void gather_weights(int i) const {
    const Cell row = row_cell(i);
    const int width = px.touch_end - px.touch_begin, stride = p.layout.columns;
    for (int pair = warp; pair < p.C * width; pair += kMarchWarps) {
      const int c = pair / width, wx = px.touch_begin + pair - c * width;
      const Span span = column_span(wx);
      float* target = weights(i, c, wx);
      const int count = (span.last - span.first + 1) << p.slots_shift;
      for (int e = lane; e < count; e += kWarp) {
        const int j = span.first + (e >> p.slots_shift);
        const int wy = row.first_window + (e & ((1 << p.slots_shift) - 1));
        float sum = 0;
        if (wy <= row.last_window) {
          const Cell column = column_cell(j);
          for (int ty = row.first_stretch; ty <= row.last_stretch; ++ty) {
            const StretchInfo y = row_stretch(ty);
            if (wy < y.first || wy > y.last) continue;
            for (int tx = column.first_stretch; tx <= column.last_stretch; ++tx) {
              const StretchInfo x = column_stretch(tx);
              if (wx < x.first || wx > x.last) continue;
              int slot = c;
              if constexpr (kStencil) {
                slot = c * p.tile_windows + (wy - y.first) * p.tile_windows_x + wx - x.first;
              }
              sum += raw_tile(i, ty - row.first_stretch, tx)[slot * stride + j - x.lower];
            }
          }
          sum *= scale()[scale_index(c, wy, wx)];
        }
        target[e] = sum;
      }
    }
    if constexpr (kStencil) {
      for (int j = px.visit_begin - 1 + thread_index(); j < px.visit_end; j += kMarchThreads) {
        float4 sum = make_float4(0, 0, 0, 0);
        if (j >= px.visit_begin) {
          const Cell column = column_cell(j);
          for (int ty = row.first_stretch; ty <= row.last_stretch; ++ty) {
            for (int tx = column.first_stretch; tx <= column.last_stretch; ++tx) {
              const float* tile = raw_tile(i, ty - row.first_stretch, tx) +
                                  p.C * p.tile_windows * stride + j - column_stretch(tx).lower;
              sum.x += tile[0];
              sum.y += tile[stride];
              sum.z += tile[2 * stride];
              sum.w += tile[3 * stride];
            }
          }
        }
        *stencil(i, j) = sum;
      }
    }
  }

  // ---- gradients of the features of row i ----

  LSLPN_DEVICE float* output(int i, int j) const {
    return at<float>(p.memory.output) + ((i & 1) * p.parts_x.own + j - px.own_begin) * kOutputPitch;
  }

  // How many neighbours a warp takes at a time, so that all warps have as many to do.
  LSLPN_DEVICE int spread_run() const {
    const int share = (px.own_end - px.own_begin + kMarchWarps - 1) / kMarchWarps;
    const int times = (share + kRun - 1) / kRun;
    return (share + times - 1) / times;
  }

  LSLPN_DEVICE void spread_row(int i) const {
    const Cell row = row_cell(i);
    const int run = spread_run();
    for (int j0 = px.own_begin + warp * run; j0 < px.own_end; j0 += kMarchWarps * run) {
      const int count = minimum(run, px.own_end - j0);
      float2 sum[kRun];
      int begin = px.touch_end, end = px.touch_begin;  // windows
      LSLPN_UNROLL
      for (int k = 0; k < kRun; ++k) {
        sum[k] = make_float2(0, 0);
        const Cell column = column_cell(j0 + minimum(k, count - 1));
        if (column.last_window < column.first_window) continue;
        begin = minimum(begin, column.first_window);
        end = maximum(end, column.last_window + 1);
      }
      for (int c = 0; c < p.C; ++c) {
        for (int wx = begin; wx < end; ++wx) {
          const Span span = column_span(wx);
          const float* w = weights(i, c, wx);
          const int from = j0 - span.first;
          const unsigned last =
              static_cast<unsigned>(minimum(span.last, j0 + count - 1) - span.first);
          for (int s = 0; s < 1 << p.slots_shift; s += 4) {
            if (row.first_window + s > row.last_window) break;
            float2 v[4];
            LSLPN_UNROLL
            for (int k = 0; k < 4; ++k) {
              const int wy = row.first_window + s + k;
              v[k] = make_float2(0, 0);
              if (wy <= row.last_window) {
                v[k] = *reinterpret_cast<const float2*>(vector(wy, wx, c) + 2 * lane);
              }
            }
            LSLPN_UNROLL
            for (int k = 0; k < kRun; ++k) {
              if (static_cast<unsigned>(from + k) > last) continue;
              const float4 e =
                  *reinterpret_cast<const float4*>(w + ((from + k) << p.slots_shift) + s);
              sum[k].x += e.x * v[0].x + e.y * v[1].x + e.z * v[2].x + e.w * v[3].x;
              sum[k].y += e.x * v[0].y + e.y * v[1].y + e.z * v[2].y + e.w * v[3].y;
            }
          }
        }
      }
      if constexpr (kStencil) add_stencil(i, j0, count, sum);
      LSLPN_UNROLL
      for (int k = 0; k < kRun; ++k) {
        if (k < count) *reinterpret_cast<float2*>(output(i, j0 + k) + 2 * lane) = sum[k];
      }
    }
  }

  // The Gram maps' gradients: own, right, below and cross of (i, j) weigh <F, F>, the product with
  // the right neighbour, with the lower one, and both diagonals of the square they span.
  LSLPN_DEVICE void add_stencil(int i, int j0, int count, float2 (&sum)[kRun]) const {
    float2 f[3][3];  // rows i - 1, i, i + 1; columns by turns
    LSLPN_UNROLL
    for (int r = 0; r < 3; ++r) {
      f[r][0] = feature_at(i - 1 + r, j0 - 1);
      f[r][1] = feature_at(i - 1 + r, j0);
    }
    float4 left = *stencil(i, j0 - 1), above_left = *stencil(i - 1, j0 - 1);
    LSLPN_UNROLL
    for (int k = 0; k < kRun; ++k) {
      if (k >= count) break;
      const int l = k % 3, m = (k + 1) % 3, n = (k + 2) % 3;  // left, middle, right
      LSLPN_UNROLL
      for (int r = 0; r < 3; ++r) f[r][n] = feature_at(i - 1 + r, j0 + k + 1);
      const float4 here = *stencil(i, j0 + k), above = *stencil(i - 1, j0 + k);
      const auto add = [&](float weight, const float2& value) {
        sum[k].x += weight * value.x;
        sum[k].y += weight * value.y;
      };
      add(2 * here.x, f[1][m]);
      add(here.y, f[1][n]);
      add(left.y, f[1][l]);
      add(here.z, f[2][m]);
      add(above.z, f[0][m]);
      add(here.w, f[2][n]);
      add(above_left.w, f[0][l]);
      add(left.w, f[2][l]);
      add(above.w, f[0][n]);
      left = here;
      above_left = above;
    }
  }

  LSLPN_DEVICE void write_row(std::int64_t n, int i) const {
    const int d = d0 + 8 * fetched_octet(p.grad_channels_inner);
    if (d >= p.D) return;
    const std::int64_t row =
        b * p.grad_stride[0] + n * p.grad_stride[1] + d * p.grad_stride[2] + i * p.grad_stride[3];
    for (int k = 0;; ++k) {
      const int j = px.own_begin + fetched_column(p.grad_channels_inner, k);
      if (j >= px.own_end) return;
      const float* source = output(i, j) + d - d0;
      float value[8];
      LSLPN_UNROLL
      for (int m = 0; m < 8; ++m) value[m] = source[m];
      store_octet(p.grad_features, p.dtype, row + j * p.grad_stride[4], p.grad_stride[2], p.D - d,
                  p.grad_vectors_of_8, value);
    }
  }

  // ---- sums over windows ----

  // One for each pair of a class and a column of windows that a warp has, and for each row of
  // windows over the current row, counted from the first.
  struct Sums {
    float2 of[kPairs][4];
  };

  LSLPN_DEVICE void emit(int wy, int wx, int c, const float2& sum, bool more) const {
    const std::int64_t window = ((b * p.C + c) * p.y.windows + wy) * p.x.windows + wx;
    const int d = d0 + 2 * lane;
    const float pair[2] = {sum.x, sum.y};
    LSLPN_UNROLL
    for (int k = 0; k < 2; ++k) {
      if (d + k >= p.D) continue;
      const std::int64_t place = window * p.D + d + k;
      float value = pair[k];
      if constexpr (kStencil) {
        // dp = (dq - <q, dq> q) / |p|, the first term being scaled already.
        const int e = scale_index(c, wy, wx);
        value -= at<float>(p.memory.dots)[e] * scale()[e] * scale()[e] * p.vectors[place];
      }
      p.out[place] = more ? p.out[place] + value : value;
    }
  }

  // What row i adds to four rows of windows, from slot s on.
  LSLPN_DEVICE void add_row(int i, int c, int wx, int s, float2 (&sum)[4]) const {
    const Span span = column_span(wx);
    const float* w = weights(i, c, wx) + s;
    const float* f = feature(i, span.first - px.visit_begin + kHalo) + 2 * lane;
    const int step = 1 << p.slots_shift;
    LSLPN_UNROLL_BY_4
    for (int k = span.last - span.first; k >= 0; --k) {
      const float4 e = *reinterpret_cast<const float4*>(w);
      const float2 two = *reinterpret_cast<const float2*>(f);
      sum[0].x += e.x * two.x;
      sum[0].y += e.x * two.y;
      sum[1].x += e.y * two.x;
      sum[1].y += e.y * two.y;
      sum[2].x += e.z * two.x;
      sum[2].y += e.z * two.y;
      sum[3].x += e.w * two.x;
      sum[3].y += e.w * two.y;
      w += step;
      f += kFeaturePitch;
    }
  }

  // Sums in registers: no more than four rows of windows over a row, and two pairs to a warp.
  LSLPN_DEVICE void sum_row(int i, int moved, bool more, Sums& sums) const {
    const Cell row = row_cell(i);
    if (row.last_window < row.first_window) return;
    const int width = px.windows_end - px.windows_begin;
    LSLPN_UNROLL
    for (int k = 0; k < kPairs; ++k) {
      const int pair = warp + k * kMarchWarps;
      if (pair >= width * p.C) break;
      const int c = pair / width, wx = px.windows_begin + pair - c * width;
      for (int step = minimum(moved, 4); step > 0; --step) {
        LSLPN_UNROLL
        for (int s = 0; s < 3; ++s) sums.of[k][s] = sums.of[k][s + 1];
        sums.of[k][3] = make_float2(0, 0);
      }
      add_row(i, c, wx, 0, sums.of[k]);
      LSLPN_UNROLL
      for (int s = 0; s < 4; ++s) {
        const int wy = row.first_window + s;
        // Features beyond a window weigh nothing in it, but 0 * NaN is not 0.
        if (wy > row.last_window) sums.of[k][s] = make_float2(0, 0);
        if (wy > row.last_window || wy < py.windows_begin || wy >= py.windows_end) continue;
        if (row_span(wy).last == i) emit(wy, wx, c, sums.of[k][s], more);
      }
    }
  }

  // Sums in shared memory, for any number of them; added up in the same order.
  LSLPN_DEVICE void sum_row_anyhow(int i, bool more) const {
    const Cell row = row_cell(i);
    const int width = px.windows_end - px.windows_begin, ring = p.parts_y.cell_windows;
    for (int pair = warp; pair < width * p.C; pair += kMarchWarps) {
      const int c = pair / width, wx = px.windows_begin + pair - c * width;
      for (int s = 0; row.first_window + s <= row.last_window; s += 4) {
        float2 sum[4];
        const auto kept = [&](int wy) {
          return reinterpret_cast<float2*>(at<float>(p.memory.sums) +
                                           (wy % ring * width * p.C + pair) * kSlice + 2 * lane);
        };
        const auto own = [&](int wy) {
          return wy <= row.last_window && wy >= py.windows_begin && wy < py.windows_end;
        };
        LSLPN_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int wy = row.first_window + s + k;
          sum[k] = own(wy) && i > row_span(wy).first ? *kept(wy) : make_float2(0, 0);
        }
        add_row(i, c, wx, s, sum);
        LSLPN_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int wy = row.first_window + s + k;
          if (!own(wy)) continue;
          if (i == row_span(wy).last) {
            emit(wy, wx, c, sum[k], more);
          } else {
            *kept(wy) = sum[k];
          }
        }
      }
    }
  }

  // ---- the march ----

  LSLPN_DEVICE void run() const {
    fill_tables();
    block_barrier();
    LSLPN_NO_UNROLL
    for (std::int64_t k = 0; k < p.images; ++k) {
      const std::int64_t image = (b - p.first_b) * p.images + k;
      march(p.first_n + k, image, k > 0 || p.accumulate);
    }
  }

  LSLPN_DEVICE void march(std::int64_t n, std::int64_t image, bool more) const {
    const int begin = py.visit_begin, end = py.visit_end;
    Row fetched;
    fetch_maps(image, begin);
    if (begin + 1 < end) fetch_maps(image, begin + 1);
    int loaded = row_cell(begin).first_window;  // windows below this are in the ring
    if constexpr (kSpread) {
      for (; loaded <= row_cell(begin).last_window; ++loaded) load_vectors(loaded);
    }
    if constexpr (kFeatures) {
      Row before, after;  // all on their way before the first is waited for
      if constexpr (kHalo > 0) fetch_row(n, begin - 1, before);
      fetch_row(n, begin, fetched);
      fetch_row(n, begin + 1, after);
      if constexpr (kHalo > 0) keep_row(n, begin - 1, before);
      keep_row(n, begin, fetched);
      keep_row(n, begin + 1, after);
    }
    find_scales(n, image);
    if constexpr (kStencil) {
      for (int j = px.visit_begin - 1 + thread_index(); j < px.visit_end; j += kMarchThreads) {
        *stencil(begin - 1, j) = make_float4(0, 0, 0, 0);
      }
    }
    Sums sums = {};
    int first = row_cell(begin).first_window;  // that the sums are counted from
    copy_wait();
    block_barrier();
    gather_weights(begin);
    block_barrier();
    LSLPN_NO_UNROLL
    for (int i = begin; i < end; ++i) {
      if constexpr (kFeatures) fetch_row(n, i + 2, fetched);
      if (i + 2 < end) fetch_maps(image, i + 2);
      if (i + 1 < end) {
        if constexpr (kSpread) {
          const Cell below = row_cell(i + 1);
          loaded = maximum(loaded, below.first_window);
          for (; loaded <= below.last_window; ++loaded) load_vectors(loaded);
        }
        gather_weights(i + 1);
      }
      if constexpr (kSpread) {
        if (i >= py.own_begin && i < py.own_end) spread_row(i);
        if (i - 1 >= py.own_begin && i - 1 < py.own_end && i > begin) write_row(n, i - 1);
      }
      if constexpr (kSums) {
        if (p.sums_in_registers) {
          const Cell row = row_cell(i);
          const bool touched = row.first_window <= row.last_window;
          sum_row(i, touched ? row.first_window - first : 0, more, sums);
          if (touched) first = row.first_window;
        } else {
          sum_row_anyhow(i, more);
        }
      }
      if constexpr (kFeatures) keep_row(n, i + 2, fetched);
      copy_wait();
      block_barrier();
    }
    if constexpr (kSpread) {
      if (end - 1 >= py.own_begin && end - 1 < py.own_end) write_row(n, end - 1);
    }
    block_barrier();  // before the next image takes the memory over
  }
};

template <Pass kPass>
LSLPN_KERNEL(kMarchThreads, 2)
march(LSLPN_PARAMETERS March p) {
  const int slices = (p.D + kSlice - 1) / kSlice;
  const int parts_x = p.parts_x.count, parts = p.parts_y.count * parts_x;
  const std::int64_t block = block_index() / slices, episode = block / parts;
  const int slice = static_cast<int>(block_index() - block * slices);
  const int part = static_cast<int>(block - episode * parts);
  Marcher<kPass>(p, slice, part / parts_x, part % parts_x, p.first_b + episode).run();
}

// ---- on the host ----

// Cuts an axis into `count` parts. `sums` and `spread` as in the pass; `halo` for the stencil.
inline void cut_parts(const Axis& axis, const Tiles& tiles, int count, bool sums, bool spread,
                      bool halo, Parts& parts) {
  parts = {};
  parts.count = count;
  for (int g = 0; g < count; ++g) {
    Part& part = parts.part[g];
    int begin = axis.cells, end = 0;
    if (sums) {
      part.windows_begin = static_cast<short>(std::int64_t{axis.windows} * g / count);
      part.windows_end = static_cast<short>(std::int64_t{axis.windows} * (g + 1) / count);
      begin = short_taps(axis, axis.start(part.windows_begin)).lower;
      end = upper_tap(axis, axis.start(part.windows_end - 1) + axis.window - 1) + 1;
    }
    if (spread) {
      part.own_begin = static_cast<short>(std::int64_t{axis.cells} * g / count);
      part.own_end = static_cast<short>(std::int64_t{axis.cells} * (g + 1) / count);
      begin = std::min(begin, std::max(0, part.own_begin - (halo ? 1 : 0)));
      end = std::max<int>(end, part.own_end);
    }
    part.visit_begin = static_cast<short>(begin);
    part.visit_end = static_cast<short>(end);
    int touch_begin = axis.windows, touch_end = 0, tiles_begin = tiles.count, tiles_end = 0;
    int before = 0;  // first window of the location before, where it has one
    bool has_before = false;
    for (int i = begin; i < end; ++i) {
      const Cell cell = cell_of(axis, tiles, i);
      if (cell.last_stretch < cell.first_stretch) {
        has_before = false;
        continue;
      }
      touch_begin = std::min<int>(touch_begin, cell.first_window);
      touch_end = std::max(touch_end, cell.last_window + 1);
      tiles_begin = std::min<int>(tiles_begin, cell.first_stretch);
      tiles_end = std::max(tiles_end, cell.last_stretch + 1);
      parts.cell_tiles = std::max(parts.cell_tiles, cell.last_stretch - cell.first_stretch + 1);
      parts.cell_windows = std::max(parts.cell_windows, cell.last_window - cell.first_window + 1);
      const int from = has_before ? before : cell.first_window;
      parts.near_windows = std::max(parts.near_windows, cell.last_window - from + 1);
      before = cell.first_window;
      has_before = true;
    }
    if (touch_end == 0) touch_begin = tiles_begin = 0;
    for (int m = touch_begin; m < touch_end; ++m) {
      const int first = short_taps(axis, axis.start(m)).lower;
      const int last = upper_tap(axis, axis.start(m) + axis.window - 1);
      parts.span = std::max(parts.span, std::min(last, end - 1) - std::max(first, begin) + 1);
    }
    part.touch_begin = static_cast<short>(touch_begin);
    part.touch_end = static_cast<short>(touch_end);
    part.tiles_begin = static_cast<short>(tiles_begin);
    part.tiles_end = static_cast<short>(tiles_end);
    parts.windows = std::max(parts.windows, part.windows_end - part.windows_begin);
    parts.own = std::max(parts.own, part.own_end - part.own_begin);
    parts.visit = std::max(parts.visit, end - begin);
    parts.touch = std::max(parts.touch, touch_end - touch_begin);
    parts.tiles = std::max(parts.tiles, tiles_end - tiles_begin);
  }
}

// Lays out shared memory.
inline void lay_out(March& p, Pass pass) {
  const bool sums = pass != Pass::pool_backward, spread = pass != Pass::pool;
  const bool stencil = pass == Pass::match_backward;
  const Parts& y = p.parts_y;
  const Parts& x = p.parts_x;
  p.slots_shift = 2;
  while ((1 << p.slots_shift) < y.cell_windows) ++p.slots_shift;
  p.sums_in_registers =
      p.slots_shift == 2 && p.C * x.windows <= pairs_in_registers(pass) * kMarchWarps;
  p.ring_windows = std::max(1, y.near_windows);
  std::int64_t bytes = 0;
  const auto take = [&](std::int64_t size) {
    const std::int64_t at = bytes;
    bytes += round_up(size, 16);
    return static_cast<int>(std::min<std::int64_t>(at, 1 << 30));
  };
  const std::int64_t C = p.C, halo = stencil ? 2 : 0;
  MarchMemory& m = p.memory;
  m.features = take(sums ? 4 * 4 * (x.visit + halo) * kFeaturePitch : 0);
  m.output = take(spread ? 4 * 2 * x.own * kOutputPitch : 0);
  m.weights = take(4 * 2 * C * x.touch * std::max(1, x.span) << p.slots_shift);
  m.stencil = take(stencil ? 16 * 4 * (x.visit + 1) : 0);
  m.raw = take(4 * 2 * static_cast<std::int64_t>(y.cell_tiles) * x.tiles * p.layout.row);
  m.vectors = take(spread ? 4 * p.ring_windows * x.touch * C * kSlice : 0);
  m.sums = take(
      sums && !p.sums_in_registers ? 4 * std::int64_t{y.cell_windows} * x.windows * C * kSlice : 0);
  m.scale = take(4 * C * y.touch * x.touch);
  m.dots = take(stencil ? 4 * C * y.touch * x.touch : 0);
  m.cells_y = take(sizeof(Cell) * y.visit);
  m.cells_x = take(sizeof(Cell) * x.visit);
  m.tiles_y = take(sizeof(StretchInfo) * y.tiles);
  m.tiles_x = take(sizeof(StretchInfo) * x.tiles);
  m.spans_y = take(sizeof(Span) * y.touch);
  m.spans_x = take(sizeof(Span) * x.touch);
  m.total = static_cast<int>(std::min<std::int64_t>(bytes, 1 << 30));
}

// What a way to cut costs, for p.B episodes: rows that a multiprocessor's blocks walk down in turn,
// those on the way to the first included, by the instructions of a warp in a row, roughly counted.
inline std::int64_t march_cost(const March& p, Pass pass, const Device& device) {
  const bool sums = pass != Pass::pool_backward, spread = pass != Pass::pool;
  const Parts &y = p.parts_y, &x = p.parts_x;
  const int together = 2 * p.memory.total <= device.shared_memory - 1024 ? 2 : 1;
  const std::int64_t blocks = divide_up(p.D, kSlice) * p.B * y.count * x.count;
  const std::int64_t turns = divide_up(blocks, std::int64_t{together} * device.multiprocessors);
  std::int64_t row = 300;
  if (sums) row += divide_up(std::int64_t{p.C} * x.windows, kMarchWarps) * (13 * x.span + 40);
  if (spread) {
    const std::int64_t share = divide_up(x.own, kMarchWarps);
    row += p.C * (x.cell_windows * (12 * share + 10) + 10 * share);
    if (pass == Pass::match_backward) row += 25 * share;
  }
  return turns * (y.visit + 4) * row;
}

// Cuts the image into parts: as few as fit into shared memory, preferably two blocks at a time on
// a multiprocessor, or some more where that costs less. They overlap by a window or so, but fill
// the multiprocessors. Returns whether they fit at all.
inline bool plan_march(March& p, Pass pass) {
  const bool sums = pass != Pass::pool_backward, spread = pass != Pass::pool;
  const auto most = [&](const Axis& axis) {
    int parts = kMaxParts;
    if (sums) parts = std::min(parts, axis.windows);
    if (spread) parts = std::min(parts, axis.cells);
    return parts;
  };
  const auto cut = [&](const Axis& axis, const Tiles& tiles, int count) {
    Parts parts;
    cut_parts(axis, tiles, count, sums, spread, pass == Pass::match_backward, parts);
    return parts;
  };
  const Device device = this_device();
  const int most_x = most(p.x);
  p.parts_y = cut(p.y, p.tiles_y, 1);
  int fewest_x = 0;
  const auto fewest = [&](int memory, int columns) {
    for (int parts = 1; parts <= most_x && fewest_x == 0; ++parts) {
      p.parts_x = cut(p.x, p.tiles_x, parts);
      lay_out(p, pass);
      if (p.memory.total <= memory && p.parts_x.visit + 2 <= columns) fewest_x = parts;
    }
  };
  const int half = device.shared_memory / 2 - 1024;
  fewest(half, kFetches * kWarp);
  fewest(half, kTiledAxis);
  fewest(device.shared_memory, kTiledAxis);
  if (fewest_x == 0) return false;
  std::vector<Parts> ways_y;
  for (int parts = 1; parts <= std::min(most(p.y), 16); ++parts) {
    ways_y.push_back(cut(p.y, p.tiles_y, parts));
  }
  std::int64_t least = -1;
  March best = p;
  for (int parts = fewest_x; parts <= std::min(most_x, fewest_x + 7); ++parts) {
    p.parts_x = cut(p.x, p.tiles_x, parts);
    for (const Parts& way : ways_y) {
      p.parts_y = way;
      lay_out(p, pass);
      const std::int64_t cost = march_cost(p, pass, device);
      if (p.memory.total > device.shared_memory || (least >= 0 && cost >= least)) continue;
      least = cost;
      best = p;
    }
  }
  p = best;
  return least >= 0;
}

// The features' side of the parameters.
inline void set_features(March& p, const Features& f) {
  p.features = f.data;
  p.dtype = f.dtype;
  for (int i = 0; i < 5; ++i) p.stride[i] = f.stride[i];
  p.channels_inner = f.stride[2] == 1;
  p.vectors_of_8 = eights(f);
}
inline void set_grad_features(March& p, const Features& f) {
  p.grad_features = f.data;
  p.dtype = f.dtype;
  for (int i = 0; i < 5; ++i) p.grad_stride[i] = f.stride[i];
  p.grad_channels_inner = f.stride[2] == 1;
  p.grad_vectors_of_8 = eights(f);
}

template <Pass kPass>
std::string launch_march(const March& p, std::int64_t episodes, Stream stream) {
  const std::int64_t blocks = divide_up(p.D, kSlice) * p.parts_x.count * p.parts_y.count * episodes;
  return launch(march<kPass>, blocks, 1, kMarchThreads, static_cast<std::size_t>(p.memory.total),
                stream, p);
}

}  // namespace lslpn::cuda
