// From feature locations to regions: sums over locations of weight times features.
//
// A block has a few columns of the product, classes of neighbouring regions, and visits all
// locations of these regions, kLocations at a time. Their weights lie in shared memory in the
// order of the operands of matrix_multiply. Of its two locations a lane loads the second one at a
// constant distance from the first: both are in the same row. In rows of odd length the last but
// one is visited twice, the second time with a weight of 0.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

template <class T, bool kPool>
struct Gatherer {
  const Exchange& p;
  const Images<const T>& features;
  int first, images;  // an image for pooling, those of an episode for matching
  Range ry, rx, classes;
  Range y, x;  // the locations under these
  GatherMemory& memory;
  float* sums;  // matching: [columns][p.pitch()]

  LSLPN_DEVICE int columns() const {
    return (classes.end - classes.begin) * (ry.end - ry.begin) * (rx.end - rx.begin);
  }
  // The index of a column in `out`.
  LSLPN_DEVICE std::int64_t column(int e) const {
    return std::int64_t{first / images} * p.pairs() + memory.pairs[e].index;
  }
  // In a row.
  LSLPN_DEVICE int pairs() const { return (x.end - x.begin + 1) / 2; }
  LSLPN_DEVICE int visits() const { return 2 * pairs() * (y.end - y.begin); }

  LSLPN_DEVICE void prepare() const {
    const int e = thread_index();
    if (e < kColumns) {
      memory.pairs[e] = pair_of<kPool>(p, first, classes, ry, rx, min(e, columns() - 1));
      if (e >= columns()) memory.pairs[e].rows = 0;
    }
    for (int k = e; !kPool && k < columns() * p.pitch(); k += kExchangeThreads) sums[k] = 0;
    __syncthreads();
  }

  // The l-th location that is visited; false where it was visited before, or is beyond the last.
  LSLPN_DEVICE bool find(int l, int& i, int& j) const {
    const int pair = min(l, visits() - 1) / 2, row = pair / pairs(),
              left = 2 * (pair - row * pairs());
    const int shift = left > 0 && left + 2 > x.end - x.begin ? 1 : 0;
    i = y.begin + row;
    j = x.begin + left - shift + l % 2;
    return l < visits() && l % 2 >= shift;
  }

  // The weights of `count` locations of image n from `begin` on.
  LSLPN_DEVICE void find_weights(std::int64_t n, int begin, int count) const {
    for (int l = thread_index(); l < (count + 7) / 8 * 8; l += kExchangeThreads) {
      int i, j;
      const bool counts = find(begin + l, i, j);
      const std::int64_t at = n * p.pairs() * p.box + (i * p.box_x + j);
      std::uint32_t* to = &memory.weights[l / 8][l / 2 % 4].x + l % 2;
      for (int e = 0; e < kColumns; ++e) {
        const Pair pair = memory.pairs[e];
        split_tf32(counts && pair.has(i, j) ? pair.weights[at] : 0, to[16 * e], to[16 * e + 2]);
      }
      if (l % 2 == 0) {
        memory.offsets[l / 2] = std::int64_t{i * features.h + j * features.w} * int{sizeof(T)};
      }
    }
  }

  static constexpr int kTiles = 2;  // of 16 channels, that a warp takes at a time

  // Adds kSteps times 8 locations to the sums of kTiles tiles of 16 channels, of which a lane loads
  // `channels`. The second location of a lane is `across` bytes after the first.
  template <int kSteps>
  LSLPN_DEVICE void add(float (&sum)[kTiles][4], const T* const (&channels)[kTiles][2], int step,
                        std::int64_t across) const {
    const int lane = thread_index() % kWarp;
    T raw[kTiles][kSteps][4];
    OperandB w[kSteps];
    LSLPN_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const std::int64_t at = memory.offsets[4 * (step + k) + lane % 4];
      LSLPN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        for (int e = 0; e < 4; ++e)
          raw[t][k][e] = read(at_byte(channels[t][e % 2], at), e < 2 ? 0 : across);
      }
      set(w[k], memory.weights[step + k][lane]);
    }
    LSLPN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      OperandA f[kSteps];
      LSLPN_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        for (int e = 0; e < 4; ++e) set_feature(f[k], e, raw[t][k][e]);
      }
      float part[4];
      multiply<kHalf<T>>(part, f, w);
      for (int e = 0; e < 4; ++e) sum[t][e] += part[e];
    }
  }

  // One channel of one column, over the locations under its window alone: the others have a weight
  // of 0, and 0 times NaN is NaN.
  LSLPN_DEVICE float sum_covered(const T* channel, int e, std::int64_t n, int begin,
                                 int count) const {
    const Pair& pair = memory.pairs[e];
    float sum = 0;
    LSLPN_NO_UNROLL
    for (int l = begin; l < begin + count; ++l) {
      int i, j;
      if (!find(l, i, j) || !pair.has(i, j)) continue;
      sum += pair.weights[n * p.pairs() * p.box + (i * p.box_x + j)] *
             to_float(channel[i * features.h + j * features.w]);
    }
    return sum;
  }

  // Adds `count` locations of image n, from `begin` on, to the sums of all channels.
  LSLPN_DEVICE void add_locations(int n, int begin, int count) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int g = lane / 4, q = lane % 4, steps = (count + 7) / 8;
    float* out[2];
    for (int e = 0; e < 2; ++e) out[e] = p.out + column(min(2 * q + e, columns() - 1)) * p.D;
    const bool wide = x.end - x.begin > 1;
    const std::int64_t across = wide ? std::int64_t{features.w} * int{sizeof(T)} : 0;
    LSLPN_NO_UNROLL
    for (int d = 16 * kTiles * warp + g; d < p.D; d += 16 * kTiles * kExchangeWarps) {
      const T* channels[kTiles][2];
      for (int e = 0; e < 2 * kTiles; ++e) {
        channels[e / 2][e % 2] =
            features.image(first + n) + static_cast<std::int64_t>(d + 8 * e) * features.d;
      }
      float sum[kTiles][4] = {};
      const auto add_all = [&](auto unit) {
        const std::int64_t distance = unit.value ? sizeof(T) : across;
        int step = 0;
        LSLPN_NO_UNROLL
        for (; step + 4 <= steps; step += 4) add<4>(sum, channels, step, distance);
        LSLPN_NO_UNROLL
        for (; step < steps; ++step) add<1>(sum, channels, step, distance);
      };
      // A constant distance costs no instruction.
      across == sizeof(T) ? add_all(std::true_type()) : add_all(std::false_type());
      LSLPN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (!isfinite(sum[t][0] + sum[t][1] + sum[t][2] + sum[t][3])) {
          for (int e = 0; e < 4; ++e) {
            sum[t][e] = sum_covered(channels[t][e / 2], 2 * q + e % 2, n, begin, count);
          }
        }
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int channel = d + 16 * t + 8 * (e / 2);
          if (2 * q + e % 2 >= columns()) continue;
          if (kPool) {
            out[e % 2][channel] = sum[t][e];  // all locations are visited at once
          } else {
            sums[(2 * q + e % 2) * p.pitch() + channel] += sum[t][e];
          }
        }
      }
    }
  }

  // Writes the columns of matching, gradients of the directions q = p / |p| of prototypes:
  // dp = (dq - <q, dq> q) / |p|.
  LSLPN_DEVICE void finish() const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    for (int e = warp; e < columns(); e += kExchangeWarps) {
      const std::int64_t at = column(e);
      const float* from = sums + e * p.pitch();
      const float* prototype = p.vectors + at * p.D;
      const float inverse = p.scale[at];
      float along = 0;
      for (int d = 4 * lane; d < p.D; d += 4 * kWarp) {
        const auto sum = read_pack<4>(from + d), q = read_pack<4>(prototype + d);
        for (int k = 0; k < 4; ++k) along += sum.value[k] * q.value[k];
      }
      along = warp_sum(along) * inverse * inverse;
      for (int d = 4 * lane; d < p.D; d += 4 * kWarp) {
        auto out = read_pack<4>(from + d);
        const auto q = read_pack<4>(prototype + d);
        for (int k = 0; k < 4; ++k) out.value[k] = (out.value[k] - along * q.value[k]) * inverse;
        *reinterpret_cast<Pack<float, 4>*>(p.out + at * p.D + d) = out;
      }
    }
  }
};

// One block: some classes of some tiles of an image, or of some windows of an episode.
template <class T, bool kPool>
LSLPN_DEVICE void gather(const Exchange& p, const Images<const T>& features, int block) {
  const int part_x = block % p.parts_x, part_y = block / p.parts_x % p.parts_y;
  const int part_c = block / p.parts_x / p.parts_y % p.parts_c, images = kPool ? 1 : p.N;
  const Range ry = part_of(p.regions_y, p.parts_y, part_y);
  const Range rx = part_of(p.regions_x, p.parts_x, part_x);
  GatherMemory& memory = *reinterpret_cast<GatherMemory*>(shared_memory());
  const Gatherer<T, kPool> gatherer{p,
                                    features,
                                    block / p.gather_parts() * images,
                                    images,
                                    ry,
                                    rx,
                                    part_of(p.C, p.parts_c, part_c),
                                    locations_of(kPool, p.grid.y, p.grid.tiles_y, ry),
                                    locations_of(kPool, p.grid.x, p.grid.tiles_x, rx),
                                    memory,
                                    reinterpret_cast<float*>(&memory + 1)};
  gatherer.prepare();
  LSLPN_NO_UNROLL
  for (int n = 0; n < images; ++n) {
    LSLPN_NO_UNROLL
    for (int begin = 0; begin < gatherer.visits(); begin += kLocations) {
      const int count = min(gatherer.visits() - begin, kLocations);
      gatherer.find_weights(n, begin, count);
      __syncthreads();
      gatherer.add_locations(n, begin, count);
      __syncthreads();
    }
  }
  if (!kPool) gatherer.finish();
}

}  // namespace lslpn::cuda
