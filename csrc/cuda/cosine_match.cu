// Cosine matching, forward and backward.
//
// Interpolation is linear, so the inner product of Up F(x) with a prototype is interpolated from
// those of the feature locations, and |Up F(x)|^2 from the Gram maps (core/arithmetic.h). A block
// takes a group of tiles and reads their features once; then a warp has a tile:
//   match_forward   inner products of its feature locations with the prototypes of its windows,
//                   Gram maps; from them its pixels' scores and winners. One launch.
//   tile_gradients  backward: from its pixels' gradients those of the inner products and of the
//                   Gram maps, into maps that march.h carries on to features and prototypes.
//                   Two launches, and the features are read by the second alone.
// The inner products of half precision run on the tensor cores; float32 stays float32.
#include "march.h"
#include "plain_match.h"

namespace lslpn::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kGroupCells = 192;      // feature locations of a group of tiles
constexpr int kGroupPrototypes = 64;  // prototypes of one pass over the channels
// Inner products of a feature location and pass: as many as leave enough registers.
template <class T>
constexpr int kWindows = sizeof(T) == 4 ? 12 : 16;
constexpr int kAxisWindows = 4;  // of a tile along an axis
constexpr int kRowsAtATime = 4;  // rows of pixels on their way at a time
constexpr int kTileCells = kTileRows * kTileColumns;
constexpr int kDotsPitch = 20;  // floats of a feature location: no bank twice

// Channels are staged in shared memory a few at a time, kDepth of each feature location or
// prototype in a row of kPitch words; neighbouring rows begin 4 banks apart.
template <class T>
constexpr int kDepth = sizeof(T) == 4 ? 8 : 32;
template <class T>
constexpr int kOctetsDeep = kDepth<T> / 8;
template <class T>
constexpr int kOctetWords = 2 * static_cast<int>(sizeof(T));
template <class T>
constexpr int kPitch = kOctetsDeep<T> * kOctetWords<T> + 4;
template <class T>
constexpr int kStages = (kGroupCells * kOctetsDeep<T> + kThreads - 1) / kThreads;

// In half precision a prototype is the sum of two numbers, the second what the first lacks: the
// products are as exact as those of float32.
template <class T>
constexpr int kPrototypeParts = sizeof(T) == 4 ? 1 : 2;

struct MatchTiles {
  const void* features;
  std::int64_t stride_b, stride_n;  // in elements; those within an image fit into an int
  int stride_d, stride_h, stride_w;
  bool channels_inner, vectors_of_8;
  const float* prototypes;  // [B, C, Gy, Gx, D]
  bool prototypes_aligned;
  int C, D;
  std::int64_t N, first_image, images;
  Axis y, x;
  Tiles tiles_y, tiles_x;
  int group_y, group_x;    // tiles of a group
  int groups_y, groups_x;  // groups of an image
  int quads;               // of the windows of a tile
  int overlap_x;
  bool mean;
  float logit_scale;  // multiplies the cosines
  float* scores;
  void* winners;  // [images, C, H, W] of uint8, or int32 if wide
  bool wide_winners;
  float* gram;  // [images, kGramMaps, h, w]
  // Backward.
  const float* grad;
  MapLayout layout;
  int tile_windows, tile_windows_x;
  float* maps;             // [images, tiles] of layout
  float* tile_sums;        // [images, tiles, C, tile_windows] of dS S
  float* inverse_lengths;  // [B, C, Gy, Gx]
  std::int64_t first_prototype, prototype_count;
  std::int64_t tile_blocks;  // the others see to the prototypes
};

// What a block knows of its group of tiles.
struct alignas(16) Group {
  std::int64_t image;                  // of the launch
  std::int64_t features, prototypes;   // where the image's and the episode's begin, in elements
  int rows, columns;                   // feature locations
  int wy0, wx0, windows_y, windows_x;  // windows
  int tx0, ty0, tiles, width;          // tiles, and how many side by side
  int i0, j0;                          // first feature location
  int c0, classes, count;              // classes of the pass, prototypes of all of them
};

// What a warp knows of its tile.
struct alignas(16) TileTable {
  TileTaps taps;
  short first_y[kTilePixels], last_y[kTilePixels];  // windows over a row, from the tile's first
  Stretch y, x;
  int index;  // of the tile, in the image
};

// Shared memory, in bytes.
template <class T>
struct Memory {
  static constexpr int kStage = 2 * kGroupCells * kPitch<T> * 4;
  static constexpr int kDots = kWarps * kTileCells * kDotsPitch * 4;
  static constexpr int stage = 0;  // later the inner products
  static constexpr int gram = kDots > kStage ? kDots : kStage;
  static constexpr int group = gram + kWarps * kTileCells * 16;
  static constexpr int tables = group + sizeof(Group);
  static constexpr int cells = tables + kWarps * sizeof(TileTable);
  static constexpr int starts = cells + kGroupCells * 4;
  static constexpr int lengths = starts + kGroupPrototypes * 8;
  static constexpr int prototypes = lengths + kGroupPrototypes * 4;
  static constexpr int end = prototypes + 2 * kPrototypeParts<T> * kGroupPrototypes * kPitch<T> * 4;
  static_assert(gram % 16 == 0 && sizeof(Group) % 16 == 0 && sizeof(TileTable) % 16 == 0);
};

// Eight channels on their way to shared memory.
template <class T>
struct alignas(16) Octet {
  std::uint32_t word[4];
};
template <>
struct alignas(16) Octet<float> {
  float value[8];
};

template <class T>
LSLPN_DEVICE void read_octet(const T* p, int stride, int count, bool vector, Octet<T>& octet) {
  if constexpr (sizeof(T) == 4) {
    if (vector) {
      *reinterpret_cast<float4*>(octet.value) = *reinterpret_cast<const float4*>(p);
      *reinterpret_cast<float4*>(octet.value + 4) = *reinterpret_cast<const float4*>(p + 4);
    } else {
      LSLPN_UNROLL
      for (int k = 0; k < 8; ++k) octet.value[k] = k < count ? p[k * stride] : 0;
    }
  } else {
    if (vector) {
      *reinterpret_cast<uint4*>(octet.word) = *reinterpret_cast<const uint4*>(p);
    } else {
      LSLPN_UNROLL
      for (int k = 0; k < 4; ++k) {
        const std::uint32_t low = 2 * k < count ? p[2 * k * stride].bits : 0u;
        const std::uint32_t high = 2 * k + 1 < count ? p[(2 * k + 1) * stride].bits : 0u;
        octet.word[k] = low | high << 16;
      }
    }
  }
}

template <class T>
LSLPN_DEVICE Octet<T> pack(const float (&value)[8]) {
  Octet<T> octet;
  if constexpr (sizeof(T) == 4) {
    LSLPN_UNROLL
    for (int k = 0; k < 8; ++k) octet.value[k] = value[k];
  } else {
    LSLPN_UNROLL
    for (int k = 0; k < 4; ++k) {
      T low, high;
      from_float(value[2 * k], low);
      from_float(value[2 * k + 1], high);
      octet.word[k] = low.bits | static_cast<std::uint32_t>(high.bits) << 16;
    }
  }
  return octet;
}

// To an aligned place of shared memory, in words.
template <class T>
LSLPN_DEVICE void put_octet(std::uint32_t* target, const Octet<T>& octet) {
  if constexpr (sizeof(T) == 4) {
    reinterpret_cast<float4*>(target)[0] = *reinterpret_cast<const float4*>(octet.value);
    reinterpret_cast<float4*>(target)[1] = *reinterpret_cast<const float4*>(octet.value + 4);
  } else {
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(octet.word);
  }
}

// A tile, and its pixels' taps and windows. By a warp.
LSLPN_DEVICE void fill_table(TileTable& t, const MatchTiles& p, int ty, int tx, int lane) {
  const Stretch y = stretch(p.y, p.tiles_y, ty), x = stretch(p.x, p.tiles_x, tx);
  if (lane == 0) {
    t.y = y;
    t.x = x;
    t.index = ty * p.tiles_x.count + tx;
  }
  find_taps(t.taps, p.y, p.x, y, x, lane);
  if (y.begin + lane < y.end) {
    const Covering c = p.y.covering(y.begin + lane);
    t.first_y[lane] = static_cast<short>(c.first - y.first);
    t.last_y[lane] = static_cast<short>(c.last - y.first);
  }
  warp_barrier();
}

// |v|^2 of D numbers, by a warp.
LSLPN_DEVICE float square_of(const float* v, int D, int lane) {
  float square = 0;
  for (int d = lane; d < D; d += kWarp) square += v[d] * v[d];
  for (int step = 16; step > 0; step /= 2) square += shuffle_xor(square, step);
  return square;
}

template <class T>
struct Matcher {
  const MatchTiles& p;
  const int lane, warp;

  LSLPN_DEVICE explicit Matcher(const MatchTiles& parameters)
      : p(parameters), lane(thread_index() % kWarp), warp(thread_index() / kWarp) {}

  // ---- shared memory ----

  LSLPN_DEVICE static char* at(int byte) { return shared_memory() + byte; }
  LSLPN_DEVICE static Group& group() { return *reinterpret_cast<Group*>(at(Memory<T>::group)); }
  LSLPN_DEVICE TileTable& tile() const {
    return reinterpret_cast<TileTable*>(at(Memory<T>::tables))[warp];
  }
  LSLPN_DEVICE static std::uint32_t* stage(int chunk) {
    return reinterpret_cast<std::uint32_t*>(at(Memory<T>::stage)) +
           (chunk & 1) * kGroupCells * kPitch<T>;
  }
  LSLPN_DEVICE static std::uint32_t* prototypes(int chunk) {
    return reinterpret_cast<std::uint32_t*>(at(Memory<T>::prototypes)) +
           (chunk & 1) * kPrototypeParts<T> * kGroupPrototypes * kPitch<T>;
  }
  // Where feature locations begin in an image, and prototypes in an episode, in elements.
  LSLPN_DEVICE static int* cells() { return reinterpret_cast<int*>(at(Memory<T>::cells)); }
  LSLPN_DEVICE static std::int64_t* starts() {
    return reinterpret_cast<std::int64_t*>(at(Memory<T>::starts));
  }
  LSLPN_DEVICE static float* lengths() { return reinterpret_cast<float*>(at(Memory<T>::lengths)); }
  LSLPN_DEVICE float* dots(int cell) const {
    return reinterpret_cast<float*>(at(Memory<T>::stage)) + (warp * kTileCells + cell) * kDotsPitch;
  }
  LSLPN_DEVICE float4* gram(int row, int column) const {
    return reinterpret_cast<float4*>(at(Memory<T>::gram)) + warp * kTileCells + row * kTileColumns +
           column;
  }

  // ---- the group and the tile ----

  // Ends with a barrier.
  LSLPN_DEVICE void find_group(std::int64_t block) const {
    const int groups = p.groups_y * p.groups_x;
    const std::int64_t image = block / groups;
    const int index = static_cast<int>(block - image * groups);
    const int ty0 = index / p.groups_x * p.group_y, tx0 = index % p.groups_x * p.group_x;
    const int ty1 = minimum(ty0 + p.group_y, p.tiles_y.count);
    const int tx1 = minimum(tx0 + p.group_x, p.tiles_x.count);
    const Stretch y = stretch_of(p.y, p.tiles_y.begin[ty0], p.tiles_y.begin[ty1]);
    const Stretch x = stretch_of(p.x, p.tiles_x.begin[tx0], p.tiles_x.begin[tx1]);
    const int rows = y.upper - y.lower + 1, columns = x.upper - x.lower + 1;
    if (thread_index() == 0) {
      Group& g = group();
      g.image = image;
      const std::int64_t absolute = p.first_image + image;
      const std::int64_t b = absolute / p.N, n = absolute - b * p.N;
      g.features = b * p.stride_b + n * p.stride_n;
      g.prototypes = b * p.C * p.y.windows * p.x.windows * p.D;
      g.rows = rows;
      g.columns = columns;
      g.wy0 = y.first;
      g.wx0 = x.first;
      g.windows_y = y.last - y.first + 1;
      g.windows_x = x.last - x.first + 1;
      g.tx0 = tx0;
      g.ty0 = ty0;
      g.width = tx1 - tx0;
      g.tiles = (ty1 - ty0) * (tx1 - tx0);
      g.i0 = y.lower;
      g.j0 = x.lower;
    }
    for (int e = thread_index(); e < rows * columns; e += kThreads) {
      cells()[e] = (y.lower + e / columns) * p.stride_h + (x.lower + e % columns) * p.stride_w;
    }
    block_barrier();
    const Group& g = group();
    if (has_tile()) {
      fill_table(tile(), p, g.ty0 + warp / g.width, g.tx0 + warp % g.width, lane);
    }
  }

  LSLPN_DEVICE bool has_tile() const { return warp < group().tiles; }

  // ---- staging ----

  LSLPN_DEVICE void stage_place(int k, int& cell, int& octet) const {
    const int e = thread_index() + k * kThreads, count = group().rows * group().columns;
    if (p.channels_inner) {
      cell = e / kOctetsDeep<T>;
      octet = e % kOctetsDeep<T>;
    } else {
      octet = 0;
      LSLPN_UNROLL
      for (int n = 1; n < kOctetsDeep<T>; ++n) octet += e >= n * count ? 1 : 0;
      cell = e - octet * count;
    }
    if (e >= count * kOctetsDeep<T>) cell = -1;
  }

  LSLPN_DEVICE void fetch(int chunk, Octet<T> (&octets)[kStages<T>]) const {
    LSLPN_UNROLL
    for (int k = 0; k < kStages<T>; ++k) {
      int cell, octet;
      stage_place(k, cell, octet);
      const int d = chunk * kDepth<T> + 8 * octet;
      octets[k] = {};
      if (cell < 0 || d >= p.D) continue;
      const T* source =
          static_cast<const T*>(p.features) + group().features + cells()[cell] + d * p.stride_d;
      read_octet(source, p.stride_d, p.D - d, p.vectors_of_8, octets[k]);
    }
  }

  LSLPN_DEVICE void keep(int chunk, const Octet<T> (&octets)[kStages<T>]) const {
    LSLPN_UNROLL
    for (int k = 0; k < kStages<T>; ++k) {
      int cell, octet;
      stage_place(k, cell, octet);
      if (cell < 0) continue;
      put_octet(stage(chunk) + cell * kPitch<T> + octet * kOctetWords<T>, octets[k]);
    }
  }

  // Where the prototypes of `classes` classes from c0 begin, class by class and window by window.
  LSLPN_DEVICE void find_prototypes(int c0, int classes) const {
    Group& g = group();
    const int count = classes * g.windows_y * g.windows_x;
    for (int e = thread_index(); e < count; e += kThreads) {
      const int wx = g.wx0 + e % g.windows_x, wy = g.wy0 + e / g.windows_x % g.windows_y;
      const int c = c0 + e / g.windows_x / g.windows_y;
      const std::int64_t window = (std::int64_t{c} * p.y.windows + wy) * p.x.windows + wx;
      starts()[e] = g.prototypes + window * p.D;
    }
    if (thread_index() == 0) {
      g.c0 = c0;
      g.classes = classes;
      g.count = count;
    }
  }

  LSLPN_DEVICE void find_lengths() const {
    for (int e = warp; e < group().count; e += kWarps) {
      const float square = square_of(p.prototypes + starts()[e], p.D, lane);
      if (lane == 0) lengths()[e] = square < eps_squared<float>() ? 0 : inverse_sqrt(square);
    }
  }

  // float32 goes to shared memory as it is, to be scaled in the end.
  LSLPN_DEVICE void send_prototypes(int chunk) const {
    const int quads = kDepth<T> / 4;
    for (int e = thread_index(); e < group().count * quads; e += kThreads) {
      const int d = chunk * kDepth<T> + 4 * (e % quads);
      const float* source = p.prototypes + starts()[e / quads] + d;
      std::uint32_t* target = prototypes(chunk) + e / quads * kPitch<T> + 4 * (e % quads);
      if (p.prototypes_aligned && d < p.D) {
        copy_async(target, source);
      } else {
        float* words = reinterpret_cast<float*>(target);
        LSLPN_UNROLL
        for (int k = 0; k < 4; ++k) words[k] = d + k < p.D ? source[k] : 0.0f;
      }
    }
  }

  // Half precision is scaled and rounded on the way. A thread has an octet of a prototype.
  static_assert(kGroupPrototypes * kOctetsDeep<T> <= kThreads);
  LSLPN_DEVICE void fetch_prototypes(int chunk, float (&value)[8]) const {
    const int e = thread_index() / kOctetsDeep<T>, octet = thread_index() % kOctetsDeep<T>;
    if (e >= group().count) return;
    const int d = chunk * kDepth<T> + 8 * octet;
    const float* source = p.prototypes + starts()[e] + d;
    if (p.prototypes_aligned && d + 8 <= p.D) {
      LSLPN_UNROLL
      for (int k = 0; k < 8; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(source + k);
        value[k] = four.x;
        value[k + 1] = four.y;
        value[k + 2] = four.z;
        value[k + 3] = four.w;
      }
    } else {
      LSLPN_UNROLL
      for (int k = 0; k < 8; ++k) value[k] = d + k < p.D ? source[k] : 0;
    }
  }

  LSLPN_DEVICE void keep_prototypes(int chunk, float (&value)[8]) const {
    const int e = thread_index() / kOctetsDeep<T>, octet = thread_index() % kOctetsDeep<T>;
    if (e >= group().count) return;
    const float scale = lengths()[e];
    std::uint32_t* target = prototypes(chunk) + e * kPitch<T> + octet * kOctetWords<T>;
    LSLPN_UNROLL
    for (int k = 0; k < 8; ++k) value[k] *= scale;
    put_octet(target, pack<T>(value));
    LSLPN_UNROLL
    for (int k = 0; k < 8; ++k) {
      T rounded;
      from_float(value[k], rounded);
      value[k] -= to_float(rounded);
    }
    put_octet(target + kGroupPrototypes * kPitch<T>, pack<T>(value));
  }

  // A chunk's features and prototypes on their way.
  struct Load {
    Octet<T> octets[kStages<T>];
    float prototype[8];  // half precision
  };
  LSLPN_DEVICE void begin(int chunk, Load& load) const {
    fetch(chunk, load.octets);
    if constexpr (sizeof(T) == 4) {
      send_prototypes(chunk);
    } else {
      fetch_prototypes(chunk, load.prototype);
    }
  }
  LSLPN_DEVICE void finish(int chunk, Load& load) const {
    keep(chunk, load.octets);
    if constexpr (sizeof(T) == 4) {
      copy_wait();
    } else {
      keep_prototypes(chunk, load.prototype);
    }
  }

  // Where the prototype of a column of the tile's inner products is staged, in words. Columns
  // that fill up have any; what comes of them is not looked at.
  LSLPN_DEVICE int column_prototype(int column, int classes) const {
    const Group& g = group();
    const TileTable& t = tile();
    const int per_class = 4 * p.quads;
    const int c = column / per_class, w = column % per_class;
    const int width = t.x.last - t.x.first + 1;
    if (c >= classes || w >= (t.y.last - t.y.first + 1) * width) return 0;
    const int wy = t.y.first - g.wy0 + w / width, wx = t.x.first - g.wx0 + w % width;
    return ((c * g.windows_y + wy) * g.windows_x + wx) * kPitch<T>;
  }
};

// Where the staged channels of a tile's feature locations are, for a lane's column of them.
// Beyond the tile's last ones they repeat: what comes of them is weighed with 0.
struct Place {
  int column;  // words
  int pitch;   // words from row to row
  int last;    // row

  template <class T>
  LSLPN_DEVICE static Place of(const Matcher<T>& m, int column) {
    const Group& g = m.group();
    const TileTable& t = m.tile();
    const int c = t.x.lower - g.j0 + minimum(column, t.x.upper - t.x.lower);
    const int r = t.y.lower - g.i0;
    return {(r * g.columns + c) * kPitch<T>, g.columns * kPitch<T>, t.y.upper - t.y.lower};
  }
  LSLPN_DEVICE int row(int r) const { return column + minimum(r, last) * pitch; }
};

// Inner products of a warp's tile, over all channels: of its feature locations with its prototypes
// (`columns` of them, a multiple of 4) and among themselves.
//
// Half precision, on the tensor cores: a row of 8 feature locations is a tile of the matrix b as
// it is, and two of them are one of the matrix a.
template <class T>
struct Products {
  float dot[kTileRows / 2][2][4] = {};  // rows 2t and 2t + 1 with 8 prototypes
  float gram[kTileRows][4] = {};        // rows r and r + 1 with row r
  int prototype[2] = {};

  Place place = {};

  LSLPN_DEVICE void begin(const Matcher<T>& m, int classes) {
    place = Place::of(m, m.lane / 4);
    prototype[0] = m.column_prototype(m.lane / 4, classes);
    prototype[1] = m.column_prototype(8 + m.lane / 4, classes);
  }

  LSLPN_DEVICE void add(const Matcher<T>& m, int chunk, int columns) {
    const int q = m.lane % 4;
    const std::uint32_t* stage = m.stage(chunk) + q;
    const std::uint32_t* prototypes = m.prototypes(chunk) + q;
    LSLPN_UNROLL
    for (int step = 0; step < kDepth<T> / 16; ++step) {
      std::uint32_t f[kTileRows + 1][2];
      LSLPN_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        const std::uint32_t* word = stage + place.row(r) + 8 * step;
        f[r][0] = word[0];
        f[r][1] = word[4];
      }
      f[kTileRows][0] = f[kTileRows - 1][0];
      f[kTileRows][1] = f[kTileRows - 1][1];
      LSLPN_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        if (r <= place.last) {
          const std::uint32_t a[4] = {f[r][0], f[r + 1][0], f[r][1], f[r + 1][1]};
          matrix_multiply<T>(gram[r], a, f[r]);
        }
      }
      LSLPN_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (8 * half >= columns) break;
        const std::uint32_t* word = prototypes + prototype[half] + 8 * step;
        const std::uint32_t* rest = word + kGroupPrototypes * kPitch<T>;
        const std::uint32_t b[2] = {word[0], word[4]}, c[2] = {rest[0], rest[4]};
        LSLPN_UNROLL
        for (int t = 0; t < kTileRows / 2; ++t) {
          const int r = 2 * t;
          const std::uint32_t a[4] = {f[r][0], f[r + 1][0], f[r][1], f[r + 1][1]};
          matrix_multiply<T>(dot[t][half], a, c);
          matrix_multiply<T>(dot[t][half], a, b);
        }
      }
    }
  }

  LSLPN_DEVICE void put_gram(const Matcher<T>& m) const {
    const int g = m.lane / 4, q = m.lane % 4;
    for (int e = m.lane; e < kTileCells; e += kWarp) *m.gram(0, e) = make_float4(0, 0, 0, 0);
    warp_barrier();
    // Rows r (first half) and r + 1 (second half), columns g, with columns 2q, 2q + 1 of row r.
    LSLPN_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      LSLPN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = 2 * q + e;
        if (column == g) {
          m.gram(r, g)->x = gram[r][e];
          m.gram(r, g)->z = gram[r][2 + e];
        } else if (column == g + 1) {
          m.gram(r, g)->y = gram[r][e];
          m.gram(r, g)->w = gram[r][2 + e];  // <F(r, g + 1), F(r + 1, g)>
        }
      }
    }
    warp_barrier();
    LSLPN_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      LSLPN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = 2 * q + e;
        if (column == g - 1) m.gram(r, column)->w += gram[r][2 + e];  // <F(r, c), F(r + 1, g)>
      }
    }
  }

  LSLPN_DEVICE void put_dots(const Matcher<T>& m) const {
    const int g = m.lane / 4, q = m.lane % 4;
    LSLPN_UNROLL
    for (int t = 0; t < kTileRows / 2; ++t) {
      LSLPN_UNROLL
      for (int half = 0; half < 2; ++half) {
        LSLPN_UNROLL
        for (int e = 0; e < 2; ++e) {
          float* target = m.dots((2 * t + e) * kTileColumns + g) + 8 * half + 2 * q;
          *reinterpret_cast<float2*>(target) =
              make_float2(dot[t][half][2 * e], dot[t][half][2 * e + 1]);
        }
      }
    }
  }
};

// float32: a lane has three feature locations below each other, and half of the channels.
template <>
struct Products<float> {
  static constexpr int kRows = kTileRows / 2;
  float dot[kRows][kWindows<float>] = {};
  float4 gram[kRows] = {};
  std::uint32_t prototype[kWindows<float> / 2] = {};  // two to a register
  Place place = {};
  int right = 0;  // words to the next column

  LSLPN_DEVICE void begin(const Matcher<float>& m, int classes) {
    place = Place::of(m, m.lane % 8);
    right = Place::of(m, m.lane % 8 + 1).column - place.column;
    LSLPN_UNROLL
    for (int k = 0; k < kWindows<float>; ++k) {
      const std::uint32_t place = m.column_prototype(k, classes);
      prototype[k / 2] = k % 2 ? prototype[k / 2] | place << 16 : place;
    }
  }

  LSLPN_DEVICE void add(const Matcher<float>& m, int chunk, int columns) {
    const int row = m.lane / 8 % 2 * kRows, part = m.lane / 16 * 4;
    const std::uint32_t* stage = m.stage(chunk) + part;
    const std::uint32_t* prototypes = m.prototypes(chunk) + part;
    const auto dot2 = [](const float2& a, const float2& b, float sum) {
      return sum + a.x * b.x + a.y * b.y;
    };
    LSLPN_UNROLL
    for (int d = 0; d < 4; d += 2) {
      float2 f[kRows + 1], next[kRows + 1];
      LSLPN_UNROLL
      for (int r = 0; r <= kRows; ++r) {
        const std::uint32_t* word = stage + place.row(row + r) + d;
        f[r] = *reinterpret_cast<const float2*>(word);
        next[r] = *reinterpret_cast<const float2*>(word + right);
      }
      LSLPN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        gram[r].x = dot2(f[r], f[r], gram[r].x);
        gram[r].y = dot2(f[r], next[r], gram[r].y);
        gram[r].z = dot2(f[r], f[r + 1], gram[r].z);
        gram[r].w = dot2(f[r], next[r + 1], dot2(next[r], f[r + 1], gram[r].w));
      }
      LSLPN_UNROLL
      for (int k = 0; k < kWindows<float>; ++k) {
        if (k >= columns) break;
        const float2 v = *reinterpret_cast<const float2*>(
            prototypes + (prototype[k / 2] >> 16 * (k % 2) & 0xffff) + d);
        LSLPN_UNROLL
        for (int r = 0; r < kRows; ++r) dot[r][k] = dot2(f[r], v, dot[r][k]);
      }
    }
  }

  LSLPN_DEVICE void put_gram(const Matcher<float>& m) const {
    LSLPN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float4 sum = gram[r];
      sum.x += shuffle_xor(sum.x, 16);
      sum.y += shuffle_xor(sum.y, 16);
      sum.z += shuffle_xor(sum.z, 16);
      sum.w += shuffle_xor(sum.w, 16);
      if (m.lane < 16) *m.gram(m.lane / 8 * kRows + r, m.lane % 8) = sum;
    }
  }

  LSLPN_DEVICE void put_dots(const Matcher<float>& m) const {
    LSLPN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      LSLPN_UNROLL
      for (int k = 0; k < kWindows<float>; k += 4) {
        float sum[4];
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int place = prototype[(k + e) / 2] >> 16 * (e % 2) & 0xffff;
          const float length = m.lengths()[place / kPitch<float>];
          sum[e] = (dot[r][k + e] + shuffle_xor(dot[r][k + e], 16)) * length;
        }
        if (m.lane < 16) {
          float* target = m.dots((m.lane / 8 * kRows + r) * kTileColumns + m.lane % 8) + k;
          *reinterpret_cast<float4*>(target) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
      }
    }
  }
};

// A lane's column of a tile on the way down: what its pixels' norms are interpolated from.
struct Column {
  int left, right;  // feature locations
  float p, q;       // their weights

  LSLPN_DEVICE explicit Column(const Taps<float>& t) {
    left = t.lower;
    right = minimum(t.upper > 0 ? t.lower + 1 : t.lower, kTileColumns - 1);
    p = 1 - t.upper;
    q = t.upper;
  }
  LSLPN_DEVICE float row(const float4& a, const float4& b) const {
    return p * p * a.x + q * q * b.x + 2 * p * q * a.y;
  }
  LSLPN_DEVICE float between(const float4& a, const float4& b) const {
    return p * p * a.z + q * q * b.z + p * q * a.w;
  }
};

struct NormWalk {
  float row = 0, next = 0, between = 0;  // see core/arithmetic.h

  // At row r of the tile's feature locations, coming from the one above if `down`.
  LSLPN_DEVICE void enter(const float4* gram, const Column& column, int r, bool down) {
    const float4* here = gram + r * kTileColumns;
    const float4 a = here[column.left], b = here[column.right];
    row = down ? next : column.row(a, b);
    between = column.between(a, b);
    if (r + 1 < kTileRows) here += kTileColumns;
    next = column.row(here[column.left], here[column.right]);
  }
  // 1 / |u|, 0 where it has no direction.
  LSLPN_DEVICE float inverse_length(float upper) const {
    const float square = squared_length(row, next, between, upper);
    return square < eps_squared<float>() ? 0.0f : inverse_sqrt(square);
  }
};

// Scores and winners of class c for the pixels of a tile, from its inner products in shared
// memory: kQuads times 4 of them (or fewer) from `first` on.
template <int kQuads, class T>
LSLPN_DEVICE void score_pixels(const Matcher<T>& m, int c, int first) {
  const MatchTiles& p = m.p;
  const TileTable& table = m.tile();
  const Stretch y = table.y, x = table.x;
  const int windows_x = x.last - x.first + 1, windows = (y.last - y.first + 1) * windows_x;
  const int px = minimum(m.lane, x.end - x.begin - 1);  // idle lanes repeat the last column
  const Column column(table.taps.x[px]);
  Covering cx = p.x.covering(x.begin + px);
  cx.first -= x.first;
  cx.last -= x.first;
  // Bit w: window w of the tile, row by row, lies over this column.
  unsigned over_column = 0;
  for (int w = 0; w < windows; ++w) {
    const int wx = w % windows_x;
    if (wx >= cx.first && wx <= cx.last) over_column |= 1u << w;
  }
  const int reciprocal = (256 + windows_x - 1) / windows_x;  // w / windows_x, for w < 16
  const std::int64_t row0 = ((p.first_image + m.group().image) * p.C + c) * p.y.pixels + y.begin;
  std::int64_t pixel = row0 * p.x.pixels + x.begin + px;

  NormWalk norm;
  float here[4 * kQuads], next[4 * kQuads];
  const auto enter = [&](float (&target)[4 * kQuads], int r) {
    const float* a = m.dots(r * kTileColumns + column.left) + first;
    const float* b = m.dots(r * kTileColumns + column.right) + first;
    LSLPN_UNROLL
    for (int k = 0; k < 4 * kQuads; k += 4) {
      if (k >= windows) break;
      const float4 left = *reinterpret_cast<const float4*>(a + k);
      const float4 right = *reinterpret_cast<const float4*>(b + k);
      target[k] = column.p * left.x + column.q * right.x;
      target[k + 1] = column.p * left.y + column.q * right.y;
      target[k + 2] = column.p * left.z + column.q * right.z;
      target[k + 3] = column.p * left.w + column.q * right.w;
    }
  };
  int current = -2;
  LSLPN_NO_UNROLL
  for (int py = 0; py < y.end - y.begin; ++py, pixel += p.x.pixels) {
    const Taps<float> t = table.taps.y[py];
    if (t.lower != current) {
      const bool down = t.lower == current + 1;
      if (down) {
        LSLPN_UNROLL
        for (int k = 0; k < 4 * kQuads; ++k) here[k] = next[k];
      } else {
        enter(here, t.lower);
      }
      enter(next, minimum(t.lower + 1, kTileRows - 1));
      norm.enter(m.gram(0, 0), column, t.lower, down);
      current = t.lower;
    }
    const float scale = norm.inverse_length(t.upper);
    const int first_y = table.first_y[py], last_y = table.last_y[py];
    const unsigned below = (1u << (last_y + 1) * windows_x) - (1u << first_y * windows_x);
    const unsigned over = over_column & below;
    float best = -3e38f, sum = 0;
    int winner = first_y * windows_x + cx.first;
    LSLPN_UNROLL
    for (int w = 0; w < 4 * kQuads; ++w) {
      if (!(over >> w & 1)) continue;
      const float value = t.upper > 0 ? (1 - t.upper) * here[w] + t.upper * next[w] : here[w];
      if (value > best) winner = w;
      best = max_or_nan(best, value);
      sum += value;
    }
    if (m.lane >= x.end - x.begin) continue;
    if (p.mean) {
      best = sum / static_cast<float>((last_y - first_y + 1) * (cx.last - cx.first + 1));
    }
    p.scores[pixel] = best * (scale * p.logit_scale);
    if (p.winners) {
      const int wy = winner * reciprocal >> 8;
      const int place = (wy - first_y) * p.overlap_x + winner - wy * windows_x - cx.first;
      if (p.wide_winners) {
        static_cast<std::int32_t*>(p.winners)[pixel] = place;
      } else {
        static_cast<std::uint8_t*>(p.winners)[pixel] = static_cast<std::uint8_t>(place);
      }
    }
  }
}

// Writes the Gram maps down for the backward pass. Each feature location belongs to the first tile
// that has it and all its neighbours.
template <class T>
LSLPN_DEVICE void keep_gram(const Matcher<T>& m) {
  const MatchTiles& p = m.p;
  const Stretch y = m.tile().y, x = m.tile().x;
  const int begin_y = y.begin == 0 ? 0 : y.lower, begin_x = x.begin == 0 ? 0 : x.lower;
  const int end_y = y.end == p.y.pixels ? p.y.cells : short_taps(p.y, y.end).lower;
  const int end_x = x.end == p.x.pixels ? p.x.cells : short_taps(p.x, x.end).lower;
  const std::int64_t size = static_cast<std::int64_t>(p.y.cells) * p.x.cells;
  float* maps = p.gram + (p.first_image + m.group().image) * kGramMaps * size;
  const int width = end_x - begin_x;
  for (int e = m.lane; e < (end_y - begin_y) * width; e += kWarp) {
    const int i = begin_y + e / width, j = begin_x + e % width;
    float4 gram = make_float4(0, 0, 0, 0);
    if (i >= y.lower && i <= y.upper && j >= x.lower && j <= x.upper) {
      gram = *m.gram(i - y.lower, j - x.lower);
    }
    float* target = maps + static_cast<std::int64_t>(i) * p.x.cells + j;
    target[0] = gram.x;
    target[size] = gram.y;
    target[2 * size] = gram.z;
    target[3 * size] = gram.w;
  }
}

// A block for each group of tiles and pass, a pass having some of the classes.
template <class T>
LSLPN_KERNEL(kThreads, 2)
match_forward(LSLPN_PARAMETERS MatchTiles p) {
  const Matcher<T> m(p);
  const int per_pass = kWindows<T> / 4 / p.quads;
  const int passes = (p.C + per_pass - 1) / per_pass;
  const std::int64_t group = block_index() / passes;
  const int c0 = static_cast<int>(block_index() - group * passes) * per_pass;
  m.find_group(group);
  m.find_prototypes(c0, minimum(per_pass, p.C - c0));
  block_barrier();
  typename Matcher<T>::Load load;
  m.begin(0, load);
  m.find_lengths();
  block_barrier();
  m.finish(0, load);
  block_barrier();
  Products<T> products;
  if (m.has_tile()) products.begin(m, m.group().classes);
  LSLPN_NO_UNROLL
  for (int chunk = 0; chunk * kDepth<T> < p.D; ++chunk) {
    const bool more = (chunk + 1) * kDepth<T> < p.D;
    if (more) m.begin(chunk + 1, load);
    if (m.has_tile()) products.add(m, chunk, 4 * p.quads * m.group().classes);
    if (more) m.finish(chunk + 1, load);
    block_barrier();
  }
  if (!m.has_tile()) return;
  products.put_dots(m);
  products.put_gram(m);
  warp_barrier();
  if (p.gram && m.group().c0 == 0) keep_gram(m);
  LSLPN_NO_UNROLL
  for (int k = 0; k < m.group().classes; ++k) {
    if (p.quads == 1) {
      score_pixels<1>(m, m.group().c0 + k, 4 * k);
    } else {
      score_pixels<kWindows<T> / 4>(m, m.group().c0 + k, 4 * k * p.quads);
    }
  }
}

// ---- backward ----

// Shared memory of a warp.
struct alignas(16) GradientMemory {
  float4 gram[kTileCells];
  TileTable table;
  float inverse[kTilePixels * kWarp];  // logit_scale / |u| of every pixel
  float board[kBoard];
};

// Gradients of a tile's inner products and Gram maps from those of its pixels.
struct TileGradients {
  const MatchTiles& p;
  GradientMemory& memory;
  const int lane;
  const std::int64_t image;  // absolute
  const std::int64_t index;  // of the tile, in the launch
  float* const map;
  Stretch y, x;
  int height, width;

  LSLPN_DEVICE TileGradients(const MatchTiles& parameters, GradientMemory& shared, int l,
                             std::int64_t i, int tiles)
      : p(parameters),
        memory(shared),
        lane(l),
        image(parameters.first_image + i / tiles),
        index(i),
        map(parameters.maps + i * parameters.layout.tile) {
    const int tile = static_cast<int>(i % tiles);
    fill_table(memory.table, p, tile / p.tiles_x.count, tile % p.tiles_x.count, lane);
    y = memory.table.y;
    x = memory.table.x;
    height = y.end - y.begin;
    width = x.end - x.begin;
    const std::int64_t size = static_cast<std::int64_t>(p.y.cells) * p.x.cells;
    const float* maps = p.gram + image * kGramMaps * size;
    for (int e = lane; e < kTileCells; e += kWarp) {
      const int r = y.lower + e / kTileColumns, c = x.lower + e % kTileColumns;
      float4 gram = make_float4(0, 0, 0, 0);
      if (r <= y.upper && c <= x.upper) {
        const float* source = maps + static_cast<std::int64_t>(r) * p.x.cells + c;
        gram = make_float4(source[0], source[size], source[2 * size], source[3 * size]);
      }
      memory.gram[e] = gram;
    }
    warp_barrier();
  }

  // Of the first pixel of a class in this lane's column.
  LSLPN_DEVICE std::int64_t pixel(int c) const {
    return ((image * p.C + c) * p.y.pixels + y.begin) * p.x.pixels + x.begin + lane;
  }

  // Norms: |u|^2 = w^T G w gets -1/2 sum over c of dS S / |u|^2; any scale is in the scores. The
  // sums go over the pixels of a row of feature locations, then over the columns that touch one.
  LSLPN_DEVICE void norms() const {
    const TileTaps& taps = memory.table.taps;
    const Column column(taps.x[minimum(lane, width - 1)]);
    const Columns touched = columns_of(taps, width, lane % 8);
    float row_here = 0, row_next = 0, between_here = 0;
    int row = taps.y[0].lower, current = -2;
    const auto finish_row = [&] {
      memory.board[lane] = row_here;
      memory.board[kWarp + 1 + lane] = between_here;
      warp_barrier();
      // own and right from the row's sums, below and cross from those with the next row
      const int e = lane / 8, j = lane % 8;
      float sum = 0;
      for (int k = touched.first; k < touched.end; ++k) {
        const Taps<float> t = taps.x[k];
        const bool lower = t.lower == j;
        const float mine = lower ? 1 - t.upper : t.upper;
        const float other = lower ? t.upper : 0.0f;
        const float weight = e % 2 == 0 ? mine * mine : mine * other * (e == 1 ? 2.0f : 1.0f);
        sum += memory.board[e / 2 * (kWarp + 1) + k] * weight;
      }
      warp_barrier();
      if (j < p.layout.columns) {
        map[row * p.layout.row + (p.C * p.tile_windows + e) * p.layout.columns + j] = sum;
      }
      row_here = row_next;
      row_next = between_here = 0;
      ++row;
    };
    NormWalk norm;
    LSLPN_NO_UNROLL
    for (int py = 0; py < height; ++py) {
      const Taps<float> t = taps.y[py];
      while (row < t.lower) finish_row();
      if (t.lower != current) {
        norm.enter(memory.gram, column, t.lower, t.lower == current + 1);
        current = t.lower;
      }
      const float scale = norm.inverse_length(t.upper);
      memory.inverse[py * kWarp + lane] = scale * p.logit_scale;
      float product = 0;
      if (lane < width) {
        for (int c = 0; c < p.C; ++c) {
          const std::int64_t at = pixel(c) + static_cast<std::int64_t>(py) * p.x.pixels;
          product += p.grad[at] * p.scores[at];
        }
      }
      // Where there is no direction there is no gradient, whatever comes in.
      const float gradient = scale > 0 || scale != scale ? -0.5f * product * scale * scale : 0;
      const float lower = 1 - t.upper;
      row_here += gradient * lower * lower;
      row_next += gradient * t.upper * t.upper;
      between_here += gradient * 2 * lower * t.upper;
    }
    while (row <= y.upper - y.lower) finish_row();
  }

  // Inner products of class c: dS / |u| of the pixels whose winner the window is.
  LSLPN_DEVICE void products(int c) const {
    const TileTable& table = memory.table;
    const TileTaps& taps = table.taps;
    const Columns touched = columns_of(taps, width, lane % 8);
    const Covering cx = p.x.covering(x.begin + minimum(lane, width - 1));
    const int windows_x = x.last - x.first + 1, windows = (y.last - y.first + 1) * windows_x;
    LSLPN_NO_UNROLL
    for (int w0 = 0; w0 < windows; w0 += 4) {
      // The place of each window among those over a pixel, as winners have it: a number of the
      // column, to be added to one of the row. No pixel outside the window has it.
      int place[4], window_y[4];
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int w = w0 + e, wx = x.first + w % windows_x;
        window_y[e] = w < windows ? w / windows_x : -1;
        place[e] = wx >= cx.first && wx <= cx.last ? wx - cx.first : -1000000;
      }
      float here[4] = {}, next[4] = {}, dots[4] = {};
      int row = taps.y[0].lower;
      const auto finish_row = [&] {
        const float sum = sum_columns(memory.board, here, taps, touched, lane);
        const int w = w0 + lane / 8, j = lane % 8;
        if (w < windows && j < p.layout.columns) {
          const int slot = c * p.tile_windows + w / windows_x * p.tile_windows_x + w % windows_x;
          map[row * p.layout.row + slot * p.layout.columns + j] = sum;
        }
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          here[e] = next[e];
          next[e] = 0;
        }
        ++row;
      };
      std::int64_t at = pixel(c);
      LSLPN_NO_UNROLL
      for (int y0 = 0; y0 < height; y0 += kRowsAtATime) {
        float gradient[kRowsAtATime], score[kRowsAtATime];
        int winner[kRowsAtATime];
        LSLPN_UNROLL
        for (int k = 0; k < kRowsAtATime; ++k, at += p.x.pixels) {
          const bool inside = lane < width && y0 + k < height;
          gradient[k] = inside ? p.grad[at] : 0;
          score[k] = inside ? p.scores[at] : 0;
          winner[k] = -1;
          if (inside) {
            winner[k] = p.wide_winners ? static_cast<const std::int32_t*>(p.winners)[at]
                                       : static_cast<const std::uint8_t*>(p.winners)[at];
          }
        }
        LSLPN_UNROLL
        for (int k = 0; k < kRowsAtATime; ++k) {
          const int py = y0 + k;
          if (py >= height) break;
          const Taps<float> t = taps.y[py];
          while (row < t.lower) finish_row();
          const int first_y = table.first_y[py];
          const float dot = gradient[k] * score[k];
          const float scaled = gradient[k] * memory.inverse[py * kWarp + lane];
          LSLPN_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int of_row = window_y[e] < 0 ? -1000000 : (window_y[e] - first_y) * p.overlap_x;
            if (winner[k] != of_row + place[e]) continue;
            here[e] += (1 - t.upper) * scaled;
            next[e] += t.upper * scaled;
            dots[e] += dot;
          }
        }
      }
      while (row <= y.upper - y.lower) finish_row();
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int w = w0 + e;
        for (int step = 16; step > 0; step /= 2) dots[e] += shuffle_xor(dots[e], step);
        if (lane == 0 && w < windows) {
          const int slot = w / windows_x * p.tile_windows_x + w % windows_x;
          p.tile_sums[(index * p.C + c) * p.tile_windows + slot] = dots[e];
        }
      }
    }
  }
};

// A warp for each tile; those after them measure a prototype each.
LSLPN_KERNEL(kThreads, 2)
tile_gradients(LSLPN_PARAMETERS MatchTiles p) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  if (block_index() >= p.tile_blocks) {
    const std::int64_t e = (block_index() - p.tile_blocks) * kWarps + warp;
    if (e >= p.prototype_count) return;
    const std::int64_t prototype = p.first_prototype + e;
    const float square = square_of(p.prototypes + prototype * p.D, p.D, lane);
    const float scale = square < eps_squared<float>() ? 0 : inverse_sqrt(square);
    if (lane == 0) p.inverse_lengths[prototype] = scale;
    return;
  }
  const int tiles = p.tiles_y.count * p.tiles_x.count;
  const std::int64_t index = block_index() * kWarps + warp;
  if (index >= p.images * tiles) return;
  GradientMemory& memory = reinterpret_cast<GradientMemory*>(shared_memory())[warp];
  const TileGradients gradients(p, memory, lane, index, tiles);
  gradients.norms();
  warp_barrier();
  LSLPN_NO_UNROLL
  for (int c = 0; c < p.C; ++c) gradients.products(c);
}

// ---- on the host ----

bool choose_groups(MatchTiles& t, std::int64_t images, int most_classes) {
  const auto most = [](const Axis& axis, const Tiles& tiles, int group, int& cells, int& windows) {
    cells = windows = 0;
    for (int i = 0; i < tiles.count; i += group) {
      const int end = std::min(i + group, tiles.count);
      const Stretch s = stretch_of(axis, tiles.begin[i], tiles.begin[end]);
      cells = std::max(cells, s.upper - s.lower + 1);
      windows = std::max(windows, s.last - s.first + 1);
    }
  };
  const std::int64_t wanted = 3 * this_device().multiprocessors / 2;
  const int classes = std::min(t.C, most_classes);
  std::int64_t least = -1;
  bool enough = false;
  for (int gy = 1; gy <= std::min(kWarps, t.tiles_y.count); ++gy) {
    int rows, windows_y;
    most(t.y, t.tiles_y, gy, rows, windows_y);
    for (int gx = 1; gx <= std::min(kWarps / gy, t.tiles_x.count); ++gx) {
      int columns, windows_x;
      most(t.x, t.tiles_x, gx, columns, windows_x);
      if (rows * columns > kGroupCells) continue;
      if (windows_y * windows_x * classes > kGroupPrototypes) continue;
      const std::int64_t groups = divide_up(t.tiles_y.count, gy) * divide_up(t.tiles_x.count, gx);
      const bool busy = groups * images >= wanted;
      const std::int64_t cost = groups * rows * columns;
      // Many blocks first, then few features read twice.
      if (least >= 0 && (busy != enough ? enough : cost >= least)) continue;
      if (!busy && least >= 0 &&
          groups <= divide_up(t.tiles_y.count, t.group_y) * divide_up(t.tiles_x.count, t.group_x)) {
        continue;
      }
      least = cost;
      enough = busy;
      t.group_y = gy;
      t.group_x = gx;
    }
  }
  if (least < 0) return false;
  t.groups_y = static_cast<int>(divide_up(t.tiles_y.count, t.group_y));
  t.groups_x = static_cast<int>(divide_up(t.tiles_x.count, t.group_x));
  return true;
}

// What follows from sizes alone.
bool make_tiles(const Match& call, MatchTiles& t) {
  const Features& f = call.features;
  if (f.dtype == DType::float64 || f.D > kTiledAxis || call.C > kTiledAxis) return false;
  // Fewer windows a tile, until a pass can hold them.
  const int most = f.dtype == DType::float32 ? kWindows<float> : kWindows<Half>;
  for (int limit = kAxisWindows; t.quads == 0 || 4 * t.quads > most; --limit) {
    if (!cut_for_matching(call.y, kTileRows, limit, t.tiles_y)) return false;
    if (!cut_for_matching(call.x, kTileColumns, limit, t.tiles_x)) return false;
    t.tile_windows_x = t.tiles_x.windows;
    t.tile_windows = t.tiles_y.windows * t.tiles_x.windows;
    t.quads = static_cast<int>(divide_up(t.tile_windows, 4));
  }
  t.C = static_cast<int>(call.C);
  t.D = static_cast<int>(f.D);
  t.N = f.N;
  t.images = f.B * f.N;
  t.y = call.y;
  t.x = call.x;
  return choose_groups(t, t.images, most / 4 / t.quads);
}

// What is of this call.
void set_arguments(MatchTiles& t, const Match& call) {
  const Features& f = call.features;
  t.features = f.data;
  t.stride_b = f.stride[0];
  t.stride_n = f.stride[1];
  t.stride_d = static_cast<int>(f.stride[2]);
  t.stride_h = static_cast<int>(f.stride[3]);
  t.stride_w = static_cast<int>(f.stride[4]);
  t.channels_inner = f.stride[2] == 1;
  t.vectors_of_8 = eights(f);
  t.prototypes = static_cast<const float*>(call.prototypes);
  t.prototypes_aligned =
      f.D % 4 == 0 && reinterpret_cast<std::uintptr_t>(call.prototypes) % 16 == 0;
  t.overlap_x = static_cast<int>(call.overlap_x);
  t.mean = call.mean;
  t.logit_scale = static_cast<float>(call.logit_scale);
  t.scores = static_cast<float*>(call.scores);
  t.winners = call.winners;
  t.wide_winners = call.wide_winners;
  t.gram = static_cast<float*>(call.gram);
}

bool plan_tiles(const Match& call, MatchTiles& t) {
  thread_local Plans<MatchTiles> plans;
  const Features& f = call.features;
  return small_images(f) && plans.find(plan_key(f, call.y, call.x, call.C), t,
                                       [&](MatchTiles& made) { return make_tiles(call, made); });
}

template <class T>
std::string tiled_forward(const MatchTiles& t, Stream stream) {
  const std::int64_t passes = divide_up(t.C, kWindows<T> / 4 / t.quads);
  const std::int64_t blocks = t.images * t.groups_y * t.groups_x * passes;
  return launch(match_forward<T>, blocks, 1, kThreads, Memory<T>::end, stream, t);
}

// All that is decided before the first launch of the backward pass.
struct BackwardPlan {
  MatchTiles tiles;
  March march;
  std::int64_t map_floats, sum_floats;  // of an image
  Chunks chunks;

  std::int64_t prototypes() const { return march.B * march.C * march.y.windows * march.x.windows; }
};

bool make_backward(const Match& call, BackwardPlan& plan) {
  MatchTiles& t = plan.tiles;
  if (!make_tiles(call, t)) return false;
  const Features& f = call.features;
  March& m = plan.march;
  m.tiles_y = t.tiles_y;
  m.tiles_x = t.tiles_x;
  m.B = f.B;
  m.N = f.N;
  m.C = t.C;
  m.D = t.D;
  m.y = call.y;
  m.x = call.x;
  m.tile_windows = t.tile_windows;
  m.tile_windows_x = t.tile_windows_x;
  m.layout = t.layout = MapLayout::of(t.tiles_y, t.tiles_x, t.C * t.tile_windows + 4);
  if (!plan_march(m, Pass::match_backward)) return false;
  const std::int64_t tiles = static_cast<std::int64_t>(t.tiles_y.count) * t.tiles_x.count;
  plan.map_floats = tiles * m.layout.tile;
  plan.sum_floats = tiles * t.C * t.tile_windows;
  plan.chunks = Chunks::of(f, 4 * (plan.map_floats + plan.sum_floats));
  return true;
}

bool plan_backward(const Match& call, BackwardPlan& plan) {
  thread_local Plans<BackwardPlan> plans;
  const Features& f = call.features;
  if (call.mean || !call.gram || !small_images(f) || !small_images(call.grad_features)) {
    return false;
  }
  return plans.find(plan_key(f, call.y, call.x, call.C), plan,
                    [&](BackwardPlan& made) { return make_backward(call, made); });
}

std::string tiled_backward(const Match& call, BackwardPlan& plan, Stream stream) {
  const Features& f = call.features;
  MatchTiles& t = plan.tiles;
  March& m = plan.march;
  set_arguments(t, call);
  t.grad = static_cast<const float*>(call.grad);
  t.maps = static_cast<float*>(call.workspace);
  t.tile_sums = t.maps + plan.chunks.images * plan.map_floats;
  t.inverse_lengths = t.tile_sums + plan.chunks.images * plan.sum_floats;
  set_features(m, f);
  set_grad_features(m, call.grad_features);
  m.maps = t.maps;
  m.tile_sums = t.tile_sums;
  m.scale = t.inverse_lengths;
  m.vectors = t.prototypes;
  m.vectors_aligned = t.prototypes_aligned;
  m.out = static_cast<float*>(call.grad_prototypes);
  const std::int64_t per_episode = plan.prototypes() / f.B;
  return plan.chunks.each(f, [&](const Chunk& chunk) {
    t.first_image = chunk.first_b * f.N + chunk.first_n;
    t.images = chunk.episodes * chunk.images;
    t.tile_blocks = divide_up(t.images * t.tiles_y.count * t.tiles_x.count, kWarps);
    t.first_prototype = chunk.first_b * per_episode;
    t.prototype_count = chunk.first_n == 0 ? chunk.episodes * per_episode : 0;
    m.first_b = chunk.first_b;
    m.first_n = chunk.first_n;
    m.images = chunk.images;
    m.accumulate = chunk.first_n > 0;
    const std::int64_t blocks = t.tile_blocks + divide_up(t.prototype_count, kWarps);
    const std::string error =
        launch(tile_gradients, blocks, 1, kThreads, kWarps * sizeof(GradientMemory), stream, t);
    if (!error.empty()) return error;
    return launch_march<Pass::match_backward>(m, chunk.episodes, stream);
  });
}

}  // namespace

bool match_is_tiled(const Match& call) {
  BackwardPlan plan;
  return plan_tiles(call, plan.tiles) && plan_backward(call, plan);
}

std::int64_t match_workspace(const Match& call, bool backward, bool plain) {
  BackwardPlan plan;
  if (plain || !backward || !plan_backward(call, plan)) {
    return plain_match_workspace(call, backward);
  }
  return 4 * (plan.chunks.images * (plan.map_floats + plan.sum_floats) + plan.prototypes());
}

std::string match_forward(const Match& call, Stream stream, bool plain) {
  MatchTiles t;
  if (!plain && plan_tiles(call, t)) {
    set_arguments(t, call);
    switch (call.features.dtype) {
      case DType::float16:
        return tiled_forward<Half>(t, stream);
      case DType::bfloat16:
        return tiled_forward<BFloat16>(t, stream);
      default:
        return tiled_forward<float>(t, stream);
    }
  }
  return with_type(call.features.dtype,
                   [&](auto type) { return plain_match<decltype(type)>(call, stream, false); });
}

std::string match_backward(const Match& call, Stream stream, bool plain) {
  BackwardPlan plan;
  if (!plain && plan_backward(call, plan)) return tiled_backward(call, plan, stream);
  return with_type(call.features.dtype,
                   [&](auto type) { return plain_match<decltype(type)>(call, stream, true); });
}

}  // namespace lslpn::cuda
