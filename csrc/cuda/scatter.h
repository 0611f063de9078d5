// From windows to feature locations: sums over windows of weight times vectors, and for matching
// the gradient of the Gram maps.
//
// What the tiles of a window give to a location is added up first, and lies in shared memory as the
// tensor cores take it.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

// Derivatives by the Gram maps (own, right, below, the diagonals) of a block's locations, with one
// row above and one column to the left of them.
using GramBlock = float4[kBlock + 1][kBlock + 1];

// Of a class and a window near the block, and by what it is multiplied.
struct alignas(16) Vector {
  const float* begin;
  float scale;
};

constexpr int kVectors = 64;  // at a time

struct ScatterMemory {
  uint4 weights[kVectors / 8][kBlock][kWarp];  // of a lane's two vectors: high parts, low parts
  GramBlock gram;
  Vector vectors[kVectors];
  int places[kVectors];  // of classes and windows: where their weights begin, in floats, or -1
  int steps;             // 8s of vectors
  Stretch y[kNear], x[kNear];
};

template <class T, bool kPool>
struct Scatterer {
  // A lane has four channels: rows g and g + 8 of the products of 16.
  static constexpr int kProducts = 2;
  using Sums = float[kProducts][kBlock][4];

  const Exchange& p;
  const Images<const T>& features;
  const Images<T>& to;
  std::int64_t b, n;  // the image
  const float* maps;  // its tiles'
  Range i, j;         // the locations
  Range ty, tx;       // the tiles near them
  ScatterMemory& memory;
  bool fours;  // four channels of a vector can be read at once

  LSLPN_DEVICE const float* map(int row, int column) const {
    const int tile = (ty.begin + row) * p.grid.tiles_x.count + tx.begin + column;
    return maps + static_cast<std::int64_t>(tile) * p.slots * kMap;
  }

  // The Gram maps' derivatives, summed over the tiles; twice the first, as the gradient has it.
  LSLPN_DEVICE void find_gram() const {
    for (int e = thread_index(); e < (kBlock + 1) * (kBlock + 1) * 4; e += kExchangeThreads) {
      const int kind = e % 4, column = e / 4 % (kBlock + 1), row = e / 4 / (kBlock + 1);
      float sum = 0;
      for (int r = 0; r < ty.end - ty.begin; ++r) {
        const int at_y = i.begin - 1 + row - memory.y[r].cell;
        if (at_y < 0 || at_y >= memory.y[r].cells) continue;
        for (int c = 0; c < tx.end - tx.begin; ++c) {
          const int at_x = j.begin - 1 + column - memory.x[c].cell;
          if (at_x < 0 || at_x >= memory.x[c].cells) continue;
          sum += map(r, c)[(p.slots - 4 + kind) * kMap + kTileSide * at_y + at_x];
        }
      }
      reinterpret_cast<float*>(&memory.gram[row][column])[kind] = kind == 0 ? 2 * sum : sum;
    }
  }

  // A class of a window near the block: the e-th of them.
  struct Window {
    std::int64_t vector, scale;  // among all
  };
  LSLPN_DEVICE int down() const {
    const Stretch last = memory.y[ty.end - ty.begin - 1];
    return last.window + last.windows - memory.y[0].window;
  }
  LSLPN_DEVICE int across() const {
    const Stretch last = memory.x[tx.end - tx.begin - 1];
    return last.window + last.windows - memory.x[0].window;
  }
  LSLPN_DEVICE Window window(int e) const {
    const int row = e / across(), c = row / down();
    const int at = (memory.y[0].window + row - c * down()) * p.grid.x.windows + memory.x[0].window +
                   e - row * across();
    const auto place = [&](std::int64_t image) {
      return (image * p.C + c) * p.grid.windows() + at;
    };
    return {place(b), place(kPool ? b * p.N + n : b)};
  }

  // Calls f(e, weight) with every weight that a location has of every step-th class.
  template <class F>
  LSLPN_DEVICE void each_weight(int row, int column, int first, int step, F f) const {
    const int width = across(), size = down() * width;
    LSLPN_NO_UNROLL
    for (int r = 0; r < ty.end - ty.begin; ++r) {
      const Stretch y = memory.y[r];
      const int at_y = row - y.cell;
      if (at_y < 0 || at_y >= y.cells) continue;
      LSLPN_NO_UNROLL
      for (int k = 0; k < tx.end - tx.begin; ++k) {
        const Stretch x = memory.x[k];
        const int at_x = column - x.cell;
        if (at_x < 0 || at_x >= x.cells) continue;
        const float* weights = map(r, k) + (kTileSide * at_y + at_x);
        int e = (y.window - memory.y[0].window) * width + x.window - memory.x[0].window;
        e += first * size;
        LSLPN_NO_UNROLL
        for (int c = first; c < p.C; c += step, e += step * size) {
          LSLPN_NO_UNROLL
          for (int w = 0; w < y.windows; ++w) {
            const float* from = weights + p.slot(c, w, 0) * kMap;
            LSLPN_NO_UNROLL
            for (int v = 0; v < x.windows; ++v) {
              f(e + w * width + v, *from);
              if (p.places) from += kMap;
            }
          }
        }
      }
    }
  }

  // The classes and windows from the first-th on that have any weight, by one warp. Windows with
  // too few pixels have no gradient, and none is passed on.
  LSLPN_DEVICE void find_vectors(int first, int all) const {
    const int lane = thread_index();
    int count = 0;
    LSLPN_NO_UNROLL
    for (int e = lane; e < kVectors; e += kWarp) {
      const Window at = window(minimum(first + e, all - 1));
      const float scale = first + e < all ? p.scale[at.scale] : 0;
      const unsigned there = ballot(scale != 0);
      const int place = count + count_bits(there & ((1u << lane) - 1));
      memory.places[e] =
          scale != 0 ? place / 8 * kBlock * kWarp * 4 + place % 4 * 4 + place / 4 % 2 : -1;
      if (scale != 0) memory.vectors[place] = {p.vectors + at.vector * p.D, scale};
      count += count_bits(there);
    }
    warp_barrier();
    // Those that fill up have no weight.
    const int steps = maximum(1, (count + 7) / 8);
    if (count + lane < 8 * steps) {
      memory.vectors[count + lane] = {count > 0 ? memory.vectors[0].begin : p.vectors, 0};
    }
    if (lane == 0) memory.steps = steps;
  }

  // What the products of the classes and windows from the first-th on are of.
  LSLPN_DEVICE void prepare(int first, int all) const {
    block_barrier();
    if (thread_index() < kWarp) find_vectors(first, all);
    block_barrier();
    uint4* weights = &memory.weights[0][0][0];
    const int count = memory.steps * kBlock * kWarp;
    for (int e = thread_index(); e < count; e += kExchangeThreads) weights[e] = uint4{};
    block_barrier();
    // A thread has a location, and every other class of it.
    const int row = thread_index() / kBlock % kBlock, column = thread_index() % kBlock;
    constexpr int kStep = kExchangeThreads / (kBlock * kBlock);
    if (row < i.end - i.begin && column < j.end - j.begin) {
      float* to = reinterpret_cast<float*>(&memory.weights[0][row][4 * column]);
      each_weight(i.begin + row, j.begin + column, thread_index() / (kBlock * kBlock), kStep,
                  [&](int e, const float& weight) {
                    if (static_cast<unsigned>(e - first) >= kVectors) return;
                    const int place = memory.places[e - first];
                    if (place >= 0) to[place] += weight;
                  });
    }
    block_barrier();
    for (int e = thread_index(); e < count; e += kExchangeThreads) {
      const uint4 sum = weights[e];
      uint4 parts;
      split_tf32(float_of(sum.x), parts.x, parts.z);
      split_tf32(float_of(sum.y), parts.y, parts.w);
      weights[e] = parts;
    }
    block_barrier();
  }

  // Adds what kSteps times 8 vectors give to the locations, for channels d .. d + 3; `poison` is
  // no longer finite where one of them is not.
  template <int kSteps, bool kBegins>
  LSLPN_DEVICE void add(Sums& sum, float& poison, int d, int step) const {
    const int lane = thread_index() % kWarp;
    OperandA vectors[kProducts][kSteps];
    LSLPN_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      LSLPN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const Vector vector = memory.vectors[8 * (step + k) + lane % 4 + 4 * e];
        float4 value;
        if (fours) {
          value = *reinterpret_cast<const float4*>(vector.begin + d);
        } else {
          value = {vector.begin[d], vector.begin[minimum(d + 1, p.D - 1)],
                   vector.begin[minimum(d + 2, p.D - 1)], vector.begin[minimum(d + 3, p.D - 1)]};
        }
        value = {vector.scale * value.x, vector.scale * value.y, vector.scale * value.z,
                 vector.scale * value.w};
        vectors[0][k].set(2 * e, value.x);
        vectors[0][k].set(2 * e + 1, value.y);
        vectors[1][k].set(2 * e, value.z);
        vectors[1][k].set(2 * e + 1, value.w);
        poison += 0 * (value.x + value.y + (value.z + value.w));
      }
    }
    LSLPN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      OperandB weights[kSteps];
      LSLPN_UNROLL
      for (int k = 0; k < kSteps; ++k) set(weights[k], memory.weights[step + k][r][lane]);
      LSLPN_UNROLL
      for (int m = 0; m < kProducts; ++m) {
        float part[4];
        multiply<0>(part, vectors[m], weights);
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) sum[m][r][e] = kBegins ? part[e] : sum[m][r][e] + part[e];
      }
    }
  }

  // Takes sums over vectors that are not finite anew, of the windows over each location alone:
  // others have a weight of 0, which does not keep a NaN away.
  LSLPN_DEVICE void mend(Sums& sum, int d) const {
    LSLPN_NO_UNROLL
    for (int e = 0; e < kProducts * kBlock * 4; ++e) {
      const int row = e / 4 % kBlock, column = 2 * (thread_index() % 4) + e % 2;
      const int channel = minimum(d + e / (4 * kBlock) * 2 + e / 2 % 2, p.D - 1);
      float alone = 0;
      each_weight(i.begin + row, j.begin + column, 0, 1, [&](int e, float weight) {
        const Window of = window(e);
        const float scale = p.scale[of.scale];
        if (scale != 0) alone += weight * (scale * p.vectors[of.vector * p.D + channel]);
      });
      LSLPN_UNROLL
      for (int k = 0; k < kProducts * kBlock * 4; ++k) {
        if (k == e) (&sum[0][0][0])[k] = alone;
      }
    }
  }

  // Adds the gradient of the Gram maps times the features around, for two channels of two locations
  // a lane. kBetween: there are pixels between rows and between columns.
  template <bool kBetween>
  LSLPN_DEVICE void add_gram(float (&sum)[kBlock][4], int d) const {
    const int q = thread_index() % 4, h = p.grid.y.cells, w = p.grid.x.cells;
    const bool across = kBetween || p.grid.tiles_x.between;
    const bool down = kBetween || p.grid.tiles_y.between;
    const T* image = features.image(b, n);
    const T* const channel[2] = {
        image + static_cast<std::int64_t>(minimum(d, p.D - 1)) * features.d,
        image + static_cast<std::int64_t>(minimum(d + 1, p.D - 1)) * features.d};
    std::int64_t column[4];  // bytes
    LSLPN_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int at = minimum(maximum(j.begin + 2 * q + k - 1, 0), w - 1) * features.w;
      column[k] = kept(std::int64_t{at} * int{sizeof(T)});
    }
    float f[3][2][4];
    const auto read_row = [&](float (&row)[2][4], int r) {
      const int at = minimum(maximum(i.begin + r, 0), h - 1);
      const std::int64_t bytes = std::int64_t{at} * (features.h * int{sizeof(T)});
      LSLPN_UNROLL
      for (int e = 0; e < 2; ++e) {
        LSLPN_UNROLL
        for (int k = 0; k < 4; ++k) {
          row[e][k] = to_float(read(at_byte(channel[e], bytes), column[k]));
        }
      }
    };
    read_row(f[0], -1);
    read_row(f[1], 0);
    float4 above[3];
    LSLPN_UNROLL
    for (int k = 0; k < 3; ++k) above[k] = memory.gram[0][2 * q + k];
    LSLPN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      if (r >= i.end - i.begin) break;
      read_row(f[(r + 2) % 3], r + 1);
      float4 own[3];
      LSLPN_UNROLL
      for (int k = 0; k < 3; ++k) own[k] = memory.gram[r + 1][2 * q + k];
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int k = e % 2;
        const float (&up)[4] = f[r % 3][e / 2];
        const float (&here)[4] = f[(r + 1) % 3][e / 2];
        const float (&low)[4] = f[(r + 2) % 3][e / 2];
        float value = sum[r][e];
        value += own[k + 1].x * here[k + 1];
        if (across) {
          value += own[k].y * here[k];
          value += own[k + 1].y * here[k + 2];
        }
        if (down) {
          value += above[k + 1].z * up[k + 1];
          value += own[k + 1].z * low[k + 1];
        }
        if (across && down) {
          value += above[k].w * up[k];
          value += above[k + 1].w * up[k + 2];
          value += own[k].w * low[k];
          value += own[k + 1].w * low[k + 2];
        }
        sum[r][e] = value;
      }
      LSLPN_UNROLL
      for (int k = 0; k < 3; ++k) above[k] = own[k];
    }
  }

  LSLPN_DEVICE void write(const Sums& sum, int d) const {
    const int q = thread_index() % 4, left = j.end - j.begin - 2 * q;  // columns
    const std::int64_t down = kept(std::int64_t{to.h} * int{sizeof(T)});
    T* at[4];
    LSLPN_UNROLL
    for (int e = 0; e < 4; ++e) {
      at[e] = to.image(b, n) + (static_cast<std::int64_t>(minimum(d + e, p.D - 1)) * to.d +
                                i.begin * to.h + (j.begin + 2 * q) * to.w);
    }
    LSLPN_UNROLL
    for (int k = 0; k < 2; ++k) {
      if (k >= left) break;
      LSLPN_UNROLL
      for (int r = 0; r < kBlock; ++r) {
        if (r >= i.end - i.begin) break;
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          from_float(sum[e / 2][r][e % 2 * 2 + k], *at_byte(at[e], r * down));
        }
      }
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) at[e] += to.w;
    }
  }
};

// One block: up to kBlock x kBlock locations of an image.
template <class T, bool kPool>
LSLPN_DEVICE void scatter(const Exchange& p, const Images<const T>& features, const Images<T>& to,
                          std::int64_t block) {
  ScatterMemory& memory = *reinterpret_cast<ScatterMemory*>(shared_memory());
  const Range j = block_of(p.grid.x.cells, p.blocks_x, static_cast<int>(block % p.blocks_x));
  const Range i =
      block_of(p.grid.y.cells, p.blocks_y, static_cast<int>(block / p.blocks_x % p.blocks_y));
  const std::int64_t image = block / p.blocks_x / p.blocks_y;
  const std::int64_t episode = image / p.N;
  const Range ty = stretches_near(p.grid.y, p.grid.tiles_y, i.begin, i.end - 1);
  const Range tx = stretches_near(p.grid.x, p.grid.tiles_x, j.begin, j.end - 1);
  const bool fours = p.D % 4 == 0 && reinterpret_cast<std::uintptr_t>(p.vectors) % 16 == 0;
  const float* maps = p.maps + image * p.grid.tiles() * p.slots * kMap;
  const Scatterer<T, kPool> s{
      p,  features, to,   p.chunk.first + episode, image - episode * p.N, maps, i, j, ty,
      tx, memory,   fours};
  for (int e = thread_index(); e < ty.end - ty.begin + tx.end - tx.begin; e += kExchangeThreads) {
    const int column = e - (ty.end - ty.begin);
    (column < 0 ? memory.y[e] : memory.x[column]) =
        column < 0 ? stretch(p.grid.y, p.grid.tiles_y, ty.begin + e)
                   : stretch(p.grid.x, p.grid.tiles_x, tx.begin + column);
  }
  block_barrier();
  if (!kPool) s.find_gram();
  constexpr int kChannels = 16 * Scatterer<T, kPool>::kProducts;
  constexpr int kAtOnce = kPool ? 2 : 1;  // two spill registers beside the Gram maps
  const int warp = thread_index() / kWarp, g = thread_index() % kWarp / 4;
  const int all = p.C * s.down() * s.across();
  LSLPN_NO_UNROLL
  for (int d0 = 0; d0 < p.D; d0 += kChannels * kExchangeWarps) {
    // Channels that there are not repeat the last ones.
    const int d = minimum(d0 + kChannels * warp + 4 * g, p.D - (fours ? 4 : 1));
    typename Scatterer<T, kPool>::Sums sum;
    float poison = 0;
    LSLPN_NO_UNROLL
    for (int first = 0; first < all; first += kVectors) {
      if (d0 == 0 || all > kVectors) s.prepare(first, all);
      int step = first == 0 ? minimum(kAtOnce, memory.steps) : 0;
      if (step == kAtOnce) s.template add<kAtOnce, true>(sum, poison, d, 0);
      if (kAtOnce > 1 && step == 1) s.template add<1, true>(sum, poison, d, 0);
      LSLPN_NO_UNROLL
      for (; step + kAtOnce <= memory.steps; step += kAtOnce) {
        s.template add<kAtOnce, false>(sum, poison, d, step);
      }
      if (kAtOnce > 1 && step < memory.steps) s.template add<1, false>(sum, poison, d, step);
    }
    if (d0 + kChannels * warp >= p.D) continue;
    poison += shuffle_xor(poison, 1);
    poison += shuffle_xor(poison, 2);
    if (poison != 0) s.mend(sum, d);
    LSLPN_UNROLL
    for (int m = 0; m < Scatterer<T, kPool>::kProducts; ++m) {
      if (!kPool && p.grid.tiles_x.between && p.grid.tiles_y.between) {
        s.template add_gram<true>(sum[m], d + 2 * m);
      } else if (!kPool) {
        s.template add_gram<false>(sum[m], d + 2 * m);
      }
    }
    s.write(sum, d);
  }
}

}  // namespace lslpn::cuda
