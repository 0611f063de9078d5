// From regions to feature locations: sums over regions of weight times vectors, and for matching
// the gradient through |Up F|^2.
//
// A block has up to kBlock x kBlock locations, and visits all (class, region) pairs near them,
// kVectors at a time. Their weights lie in shared memory in the order of the operands of
// matrix_multiply.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

// A pair near the block, with its vector and the scale of that, and where its weights are stored.
struct Near : Pair {
  const float* vector;
  std::uint32_t* to;
  float scale;
};

constexpr int kVectors = 56;       // at a time
constexpr int kRows = kBlock + 3;  // of features around a block

struct ScatterMemory {
  uint4 weights[kVectors / 8][kBlock][kWarp];  // of a lane's two vectors: high parts, low parts
  // Gradients of the Gram maps (own, right, below, diagonals) at the locations, the row above and
  // the column to the left of them.
  float4 gram[kBlock + 1][kBlock + 1];
  uint4 stencil[3][kBlock + 1][kWarp];  // of two neighbours of a lane's column, likewise
  std::int64_t rows[kRows];             // offsets in bytes
  Near near[kVectors];
  int steps;  // of 8 vectors
};

template <class T, bool kPool>
struct Scatterer {
  // A lane has four channels: rows g and g + 8 of two products of 16.
  static constexpr int kProducts = 2;
  using Sums = float[kProducts][kBlock][4];

  const Exchange& p;
  const Images<const T>& features;
  const Images<T>& to;
  int image;
  Range i, j;    // the locations
  Range ry, rx;  // the tiles or windows near them
  ScatterMemory& memory;

  // Pairs near the block.
  LSLPN_DEVICE int vectors() const { return p.C * (ry.end - ry.begin) * (rx.end - rx.begin); }
  LSLPN_DEVICE Near near(int e) const {
    const Pair pair = pair_of<kPool>(p, image, {0, p.C}, ry, rx, e);
    const std::int64_t at = std::int64_t{kPool ? image : image / p.N} * p.pairs() + pair.index;
    return {pair, p.vectors + at * p.D, nullptr, p.scale[at]};
  }

  LSLPN_DEVICE void find_gram() const {
    const int e = thread_index(), row = e / (kBlock + 1), column = e % (kBlock + 1);
    if (row > kBlock) return;
    const int y = i.begin - 1 + row, x = j.begin - 1 + column;
    const bool inside = y >= 0 && y < p.grid.y.cells && x >= 0 && x < p.grid.x.cells;
    const std::int64_t above = std::int64_t{image} * p.grid.y.cells + y;
    const float4* from = p.gram_weights + above * p.grid.x.cells + x;
    memory.gram[row][column] = inside ? *from : make_float4(0, 0, 0, 0);
  }

  // Where the weights of the k-th vector begin.
  LSLPN_DEVICE std::uint32_t* weights_of(int k) const {
    return &memory.weights[k / 8][0][k % 4].x + k / 4 % 2;
  }

  // Collects the pairs from `first` on whose scale is not 0, by one warp. The others pass on no
  // gradient, not even NaN.
  LSLPN_DEVICE void find_vectors(int first) const {
    const int lane = thread_index(), end = min(vectors(), first + kVectors);
    int count = 0;
    LSLPN_NO_UNROLL
    for (int e = first + lane; e - lane < end; e += kWarp) {
      Near found = near(min(e, end - 1));
      const bool counts = e < end && found.scale != 0;
      const unsigned there = __ballot_sync(kAllLanes, counts);
      const int at = count + __popc(there & ((1u << lane) - 1));
      found.to = weights_of(at);
      if (counts) memory.near[at] = found;
      count += __popc(there);
    }
    __syncwarp();
    // Vectors that fill up a step of 8 have no location.
    const int steps = max(1, (count + 7) / 8);
    if (count + lane < 8 * steps) {
      Near none{};
      none.vector = count > 0 ? memory.near[0].vector : p.vectors;
      none.to = weights_of(count + lane);
      memory.near[count + lane] = none;
    }
    if (lane == 0) memory.steps = steps;
  }

  // Vectors and weights of the pairs from `first` on.
  LSLPN_DEVICE void prepare(int first) const {
    __syncthreads();
    if (thread_index() < kWarp) find_vectors(first);
    __syncthreads();
    // A thread has a location, and every kStep-th vector.
    const int row = thread_index() / kBlock % kBlock, column = thread_index() % kBlock;
    const int y = min(i.begin + row, i.end - 1), x = min(j.begin + column, j.end - 1);
    constexpr int kStep = kExchangeThreads / (kBlock * kBlock);
    LSLPN_NO_UNROLL
    for (int e = thread_index() / (kBlock * kBlock); e < 8 * memory.steps; e += kStep) {
      const Near& of = memory.near[e];
      std::uint32_t* const to = of.to + 4 * (row * kWarp + 4 * column);
      split_tf32(of.has(y, x) ? of.scale * of.weights[y * p.box_x + x] : 0, to[0], to[2]);
    }
    __syncthreads();
  }

  // Adds the contributions of 8 vectors to channels d .. d + 3 of the locations, or begins with
  // them.
  template <bool kBegins>
  LSLPN_DEVICE void add(Sums& sum, int d, int step) const {
    const int lane = thread_index() % kWarp;
    OperandA vectors[kProducts][1];
    for (int e = 0; e < 2; ++e) {
      const float* vector = memory.near[8 * step + lane % 4 + 4 * e].vector;
      const float4 value = *reinterpret_cast<const float4*>(vector + d);
      vectors[0][0].set(2 * e, value.x);
      vectors[0][0].set(2 * e + 1, value.y);
      vectors[1][0].set(2 * e, value.z);
      vectors[1][0].set(2 * e + 1, value.w);
    }
    LSLPN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      OperandB weights[1];
      set(weights[0], memory.weights[step][r][lane]);
      LSLPN_UNROLL
      for (int m = 0; m < kProducts; ++m) {
        float part[4];
        multiply<0>(part, vectors[m], weights);
        for (int e = 0; e < 4; ++e) sum[m][r][e] = kBegins ? part[e] : sum[m][r][e] + part[e];
      }
    }
  }

  // The weight that the neighbour so far below and to the right of a location has for it.
  LSLPN_DEVICE const float* gram_weight(int row, int column, int down, int right) const {
    const float4& from = memory.gram[row + 1 + min(down, 0)][column + 1 + min(right, 0)];
    return &from.x + 2 * abs(down) + abs(right);
  }

  // Writes these weights in the order of the operands of matrix_multiply, for columns -1 .. 6: of a
  // row for the next, which are those of the next row for it, and of a row for itself; and those of
  // columns 7 and 8 of three rows. A warp has one of these kinds, a lane a column and two of its
  // neighbours.
  LSLPN_DEVICE void find_stencil() const {
    const int kind = thread_index() / kWarp, lane = thread_index() % kWarp;
    const float* from[2];
    for (int e = 0; e < 2; ++e) {
      const int k = lane % 4 + 4 * e, down = kind == 0 ? 1 : kind == 1 ? 0 : k / 2 - 1;
      const int right = (kind < 2 ? k - 1 : 7 + k % 2) - lane / 4;
      from[e] =
          down < 2 && abs(right) < 2 ? gram_weight(-(kind == 0), lane / 4, down, right) : nullptr;
    }
    constexpr int kDown = sizeof(memory.gram[0]) / sizeof(float);
    for (int r = 0; r < kBlock + 1; ++r) {
      if (r + (kind > 0) > kBlock || kind > 2) break;
      uint4 parts;
      split_tf32(from[0] ? from[0][r * kDown] : 0, parts.x, parts.z);
      split_tf32(from[1] ? from[1][r * kDown] : 0, parts.y, parts.w);
      memory.stencil[kind][r][lane] = parts;
    }
    // Rows from the one above the block on. Beyond the image the nearest one is read.
    const int row = min(max(i.begin - 1 + thread_index(), 0), p.grid.y.cells - 1);
    if (thread_index() < kRows)
      memory.rows[thread_index()] = std::int64_t{row * features.h} * int{sizeof(T)};
  }

  // Adds the gradients of the Gram maps times the neighbouring features, for channels d and d + 1.
  LSLPN_DEVICE void add_gram(float (&sum)[kBlock][4], int d) const {
    const int lane = thread_index() % kWarp, q = lane % 4;
    // Columns q - 1 and q + 3 of a row, and column 7 or 8 of the same row or the next.
    const T* from[6];
    for (int e = 0; e < 6; ++e) {
      const int column = j.begin + (e < 2 ? q - 1 : e < 4 ? q + 3 : 7 + q % 2);
      from[e] = features.image(image) + (static_cast<std::int64_t>(d + e % 2) * features.d +
                                         min(max(column, 0), p.grid.x.cells - 1) * features.w);
    }
    Operand<6> rows[3];
    const auto read_row = [&](int r) {
      for (int e = 0; e < 6; ++e) {
        set_feature(rows[r % 3], e, read(from[e], memory.rows[r + (e < 4 ? 0 : q / 2)]));
      }
    };
    read_row(0);
    read_row(1);
    LSLPN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      if (r >= i.end - i.begin) break;
      read_row(r + 2);
      OperandA neighbours[4];
      OperandB weights[4];
      LSLPN_UNROLL
      for (int k = 0; k < 4; ++k) {
        set(weights[k], memory.stencil[k < 3 ? k % 2 : 2][r + k % 3 / 2][lane]);
        for (int e = 0; e < 4; ++e) {
          const Operand<6>& of = rows[(r + (k < 3 ? k : e / 2 * 2)) % 3];
          const int at = k < 3 ? e : 4 + e % 2;
          neighbours[k].high[e] = of.high[at];
          neighbours[k].low[e] = of.low[at];
        }
      }
      float part[4];
      multiply<kHalf<T>>(part, neighbours, weights);
      for (int e = 0; e < 4; ++e) sum[r][e] += part[e];
    }
  }

  // Sums again what is not finite: over the regions that have a location alone, for the others
  // have a weight of 0, and 0 times NaN is NaN, and over the neighbours that pixels lie between.
  LSLPN_DEVICE void sum_again(Sums& sum, int d) const {
    LSLPN_NO_UNROLL
    for (int e = 0; e < kProducts * kBlock * 4; ++e) {
      const int row = e / 4 % kBlock, column = 2 * (thread_index() % 4) + e % 2;
      const int channel = d + e / (4 * kBlock) * 2 + e / 2 % 2;
      float alone = 0;
      const int y = min(i.begin + row, i.end - 1), x = min(j.begin + column, j.end - 1);
      LSLPN_NO_UNROLL
      for (int k = 0; k < vectors(); ++k) {
        const Near from = near(k);
        if (from.scale == 0 || !from.has(y, x)) continue;
        alone += from.scale * from.weights[y * p.box_x + x] * from.vector[channel];
      }
      const T* const of = features.image(image) + static_cast<std::int64_t>(channel) * features.d;
      LSLPN_NO_UNROLL
      for (int k = 0; k < 9 && !kPool; ++k) {
        const int down = k / 3 - 1, right = k % 3 - 1;
        if ((down != 0 && !p.grid.tiles_y.between) || (right != 0 && !p.grid.tiles_x.between)) {
          continue;
        }
        const int near_y = min(max(y + down, 0), p.grid.y.cells - 1);
        const int near_x = min(max(x + right, 0), p.grid.x.cells - 1);
        alone += *gram_weight(row, column, down, right) *
                 to_float(of[near_y * features.h + near_x * features.w]);
      }
      LSLPN_UNROLL
      for (int k = 0; k < kProducts * kBlock * 4; ++k) {
        if (k == e) (&sum[0][0][0])[k] = alone;
      }
    }
  }

  // kUnit: neighbours along x are neighbours in memory.
  template <bool kUnit>
  LSLPN_DEVICE void write(const Sums& sum, int d) const {
    const int q = thread_index() % 4, left = j.end - j.begin - 2 * q;  // columns
    const int across = kUnit ? 1 : to.w;
    const std::int64_t down = kept(std::int64_t{to.h} * int{sizeof(T)});
    T* at[4];
    for (int e = 0; e < 4; ++e) {
      at[e] = to.image(image) +
              (static_cast<std::int64_t>(d + e) * to.d + i.begin * to.h + (j.begin + 2 * q) * to.w);
    }
    const auto rows = [&](auto columns) {
      LSLPN_UNROLL
      for (int r = 0; r < kBlock; ++r) {
        if (r >= i.end - i.begin) break;
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          for (int k = 0; k < columns.value; ++k) {
            from_float(sum[e / 2][r][e % 2 * 2 + k], at[e][k * across]);
          }
          at[e] = at_byte(at[e], down);
        }
      }
    };
    if (left > 1) rows(std::integral_constant<int, 2>());
    if (left == 1) rows(std::integral_constant<int, 1>());
  }
};

// One block of locations of an image.
template <class T, bool kPool>
LSLPN_DEVICE void scatter(const Exchange& p, const Images<const T>& features, const Images<T>& to,
                          int block) {
  ScatterMemory& memory = *reinterpret_cast<ScatterMemory*>(shared_memory());
  const auto cells_of = [](const Axis& axis, int k) {
    return Range{kBlock * k, min(kBlock * (k + 1), axis.cells)};
  };
  const int across = divide_up(p.grid.x.cells, kBlock), down = divide_up(p.grid.y.cells, kBlock);
  const Range j = cells_of(p.grid.x, block % across);
  const Range i = cells_of(p.grid.y, block / across % down);
  const auto near = [](const Axis& axis, const Tiles& tiles, const Range& cells) {
    const Range pixels = pixels_of(axis, cells);
    return kPool ? segments_over(tiles, pixels) : windows_over(axis, pixels);
  };
  const Scatterer<T, kPool> s{p,
                              features,
                              to,
                              block / across / down,
                              i,
                              j,
                              near(p.grid.y, p.grid.tiles_y, i),
                              near(p.grid.x, p.grid.tiles_x, j),
                              memory};
  if (!kPool) {
    s.find_gram();
    __syncthreads();
    s.find_stencil();
  }
  const int warp = thread_index() / kWarp, g = thread_index() % kWarp / 4;
  LSLPN_NO_UNROLL
  for (int d0 = 0; d0 < p.D; d0 += kChannels * kExchangeWarps) {
    // A warp beyond the last channel repeats the last ones.
    const int d = min(d0 + kChannels * warp + 4 * g, p.D - 4);
    typename Scatterer<T, kPool>::Sums sum;
    LSLPN_NO_UNROLL
    for (int first = 0; first < s.vectors(); first += kVectors) {
      if (d0 == 0 || s.vectors() > kVectors) s.prepare(first);
      int step = 0;
      if (first == 0) s.template add<true>(sum, d, step++);
      LSLPN_NO_UNROLL
      for (; step < memory.steps; ++step) s.template add<false>(sum, d, step);
    }
    if (d0 + kChannels * warp >= p.D) continue;
    float finite = 0;  // or not, or the product of two numbers is not
    LSLPN_UNROLL
    for (int m = 0; m < Scatterer<T, kPool>::kProducts; ++m) {
      if (!kPool) s.add_gram(sum[m], d + 2 * m);
      for (int e = 0; e < 2 * kBlock; ++e)
        finite += sum[m][e / 2][e % 2] * sum[m][e / 2][e % 2 + 2];
    }
    if (!isfinite(finite)) s.sum_again(sum, d);
    to.w == 1 ? s.template write<true>(sum, d) : s.template write<false>(sum, d);
  }
}

}  // namespace lslpn::cuda
