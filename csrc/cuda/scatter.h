// From windows to feature locations: sums over windows of weight times vectors, and for matching
// the gradient through |Up F|^2.
//
// A block has up to kBlock x kBlock locations, and visits all (class, window) pairs near them,
// kVectors at a time. Their weights, summed over tiles, lie in shared memory in the order of the
// operands of matrix_multiply.
#pragma once

#include "exchange.h"

namespace lslpn::cuda {

// Gradients of the Gram maps (own, right, below, diagonals) at a block's locations, the row above
// and the column to the left of them.
using GramBlock = float4[kBlock + 1][kBlock + 1];

// The vector of a class and a window near the block, and its scale.
struct alignas(16) Vector {
  const float* begin;
  float scale;
};
// Its window, the offset of its map from that of class 0 and window (0, 0), and the offset at which
// its weights are stored, in floats.
struct alignas(16) Place {
  int y, x, map, weights;
};

constexpr int kVectors = 56;       // at a time
constexpr int kRows = kBlock + 3;  // of features around a block

struct ScatterMemory {
  uint4 weights[kVectors / 8][kBlock][kWarp];  // of a lane's two vectors: high parts, low parts
  GramBlock gram;
  uint4 stencil[3][kBlock + 1][kWarp];  // of two neighbours of a lane's column, likewise
  std::int64_t rows[kRows];             // offsets in bytes
  Vector vectors[kVectors];
  Place places[kVectors];
  int steps;  // of 8 vectors
  Range tiles[2];
  Segment y[kNear], x[kNear];
};

template <class T, bool kPool>
struct Scatterer {
  // A lane has four channels: rows g and g + 8 of two products of 16.
  static constexpr int kProducts = 2;
  using Sums = float[kProducts][kBlock][4];

  const Exchange& p;
  const Images<const T>& features;
  const Images<T>& to;
  std::int64_t b, n;  // episode and image
  const float* maps;  // of the image
  Range i, j;         // the locations
  Range ty, tx;       // the segments near them
  ScatterMemory& memory;
  bool fours;  // whether four channels of a vector can be read at once

  // 2 x 2 tiles over a location. `map` points to its weight in a tile's first map, shifted as if
  // that map were of window (0, 0).
  struct Over {
    const float* map[2][2];
    int window[2][2],
        windows[2][2];  // first and number, of rows and columns; 0 beyond the last tile
  };
  // Calls f with all tiles over a location, 2 x 2 at a time.
  template <class F>
  LSLPN_DEVICE void each_over(int row, int column, F f) const {
    const auto first = [](const Segment* tiles, int count, int cell) {
      int k = 0;
      while (k < count && tiles[k].cell + tiles[k].cells <= cell) ++k;
      return k;
    };
    const int down = ty.end - ty.begin, across = tx.end - tx.begin;
    const int first_x = first(memory.x, across, column);
    LSLPN_NO_UNROLL
    for (int r = first(memory.y, down, row); r < down && memory.y[r].cell <= row; r += 2) {
      LSLPN_NO_UNROLL
      for (int k = first_x; k < across && memory.x[k].cell <= column; k += 2) {
        Over over;
        const auto look = [](const Segment& s, bool there, int cell, int& window, int& windows) {
          window = s.window;
          windows = there && s.cell <= cell ? s.windows : 0;
          return cell - s.cell;
        };
        int at[2][2];
        LSLPN_UNROLL
        for (int e = 0; e < 2; ++e) {
          at[0][e] = look(memory.y[min(r + e, down - 1)], r + e < down, row, over.window[0][e],
                          over.windows[0][e]);
          at[1][e] = look(memory.x[min(k + e, across - 1)], k + e < across, column,
                          over.window[1][e], over.windows[1][e]);
        }
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int i = e / 2, j = e % 2;
          const int tile = (ty.begin + r + i) * p.grid.tiles_x.count + tx.begin + k + j;
          over.map[i][j] = maps + ((std::int64_t{tile} * p.tile_maps -
                                    p.map_of(0, over.window[0][i], over.window[1][j])) *
                                       kMap +
                                   kTileSide * at[0][i] + at[1][j]);
        }
        f(over);
      }
    }
  }
  // The weight of a class and a window at the location; sets `under` where its window covers it.
  LSLPN_DEVICE static float weight(const Over& over, const Place& place, int map, bool& under) {
    float sum = 0;
    LSLPN_UNROLL
    for (int i = 0; i < 2; ++i) {
      LSLPN_UNROLL
      for (int j = 0; j < 2; ++j) {
        if (static_cast<unsigned>(place.y - over.window[0][i]) >= over.windows[0][i]) continue;
        if (static_cast<unsigned>(place.x - over.window[1][j]) >= over.windows[1][j]) continue;
        sum += over.map[i][j][map];
        under = true;
      }
    }
    return sum;
  }

  // Sums the gradients of the Gram maps over the tiles. That of `own` is doubled, as d(f^2) = 2 f
  // df.
  LSLPN_DEVICE void find_gram() const {
    const int e = thread_index(), row = e / (kBlock + 1), column = e % (kBlock + 1);
    if (row > kBlock) return;
    float sum[4] = {};
    each_over(i.begin - 1 + row, j.begin - 1 + column, [&](const Over& over) {
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int y = e / 2, x = e % 2;
        if (over.windows[0][y] == 0 || over.windows[1][x] == 0) continue;
        const float* from =
            over.map[y][x] +
            (p.tile_maps - 4 + p.map_of(0, over.window[0][y], over.window[1][x])) * kMap;
        LSLPN_UNROLL
        for (int kind = 0; kind < 4; ++kind) sum[kind] += from[kind * kMap];
      }
    });
    memory.gram[row][column] = make_float4(2 * sum[0], sum[1], sum[2], sum[3]);
  }

  LSLPN_DEVICE int down() const {
    const Segment last = memory.y[ty.end - ty.begin - 1];
    return last.window + last.windows - memory.y[0].window;
  }
  LSLPN_DEVICE int across() const {
    const Segment last = memory.x[tx.end - tx.begin - 1];
    return last.window + last.windows - memory.x[0].window;
  }
  // The e-th class and window near the block.
  LSLPN_DEVICE Vector vector(int e, Place& place) const {
    const int row = e / across(), c = row / down();
    place.y = memory.y[0].window + row - c * down();
    place.x = memory.x[0].window + e - row * across();
    place.map = kMap * p.map_of(c, place.y, place.x);
    const int at = place.y * p.grid.x.windows + place.x;
    const auto of = [&](std::int64_t image) { return (image * p.C + c) * p.grid.windows() + at; };
    return {p.vectors + of(b) * p.D, p.scale[of(kPool ? b * p.N + n : b)]};
  }

  // Where the weights of the k-th vector begin.
  LSLPN_DEVICE static int weights_at(int k) {
    return k / 8 * kBlock * kWarp * 4 + k % 4 * 4 + k / 4 % 2;
  }

  // Collects the classes and windows from `first` on whose scale is not 0, by one warp. The others,
  // windows with too few pixels, pass on no gradient, not even NaN.
  LSLPN_DEVICE void find_vectors(int first, int all) const {
    const int lane = thread_index(), end = min(all, first + kVectors);
    int count = 0;
    LSLPN_NO_UNROLL
    for (int e = first + lane; e - lane < end; e += kWarp) {
      Place place;
      const Vector found = vector(min(e, end - 1), place);
      const bool counts = e < end && found.scale != 0;
      const unsigned there = __ballot_sync(kAllLanes, counts);
      const int at = count + __popc(there & ((1u << lane) - 1));
      if (counts) {
        memory.vectors[at] = found;
        place.weights = weights_at(at);
        memory.places[at] = place;
      }
      count += __popc(there);
    }
    __syncwarp();
    // Vectors that fill up a step of 8 have window -1, which covers no location.
    const int steps = max(1, (count + 7) / 8);
    if (count + lane < 8 * steps) {
      memory.vectors[count + lane] = {count > 0 ? memory.vectors[0].begin : p.vectors, 0};
      memory.places[count + lane] = {-1, -1, 0, weights_at(count + lane)};
    }
    if (lane == 0) memory.steps = steps;
  }

  // Vectors and weights of the classes and windows from `first` on.
  LSLPN_DEVICE void prepare(int first, int all) const {
    __syncthreads();
    if (thread_index() < kWarp) find_vectors(first, all);
    __syncthreads();
    // A thread has a location, and every kStep-th vector.
    const int row = thread_index() / kBlock % kBlock, column = thread_index() % kBlock;
    constexpr int kStep = kExchangeThreads / (kBlock * kBlock);
    std::uint32_t* const weights = &memory.weights[0][row][4 * column].x;
    bool begins = true;
    each_over(min(i.begin + row, i.end - 1), min(j.begin + column, j.end - 1),
              [&](const Over& over) {
                LSLPN_NO_UNROLL
                for (int e = thread_index() / (kBlock * kBlock); e < 8 * memory.steps; e += kStep) {
                  const Place place = memory.places[e];
                  bool under = false;
                  float sum = weight(over, place, place.map, under);
                  std::uint32_t* to = weights + place.weights;
                  if (!begins && sum == 0) continue;
                  if (!begins) sum += __uint_as_float(to[0]) + __uint_as_float(to[2]);
                  split_tf32(sum, to[0], to[2]);
                }
                begins = false;
              });
    __syncthreads();
  }

  // Adds the contributions of 8 vectors to channels d .. d + 3 of the locations, or begins with
  // them.
  template <bool kBegins>
  LSLPN_DEVICE void add(Sums& sum, int d, int step) const {
    const int lane = thread_index() % kWarp;
    OperandA vectors[kProducts][1];
    LSLPN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const Vector vector = memory.vectors[8 * step + lane % 4 + 4 * e];
      float4 value;
      if (fours) {
        value = *reinterpret_cast<const float4*>(vector.begin + d);
      } else {
        value = {vector.begin[d], vector.begin[min(d + 1, p.D - 1)],
                 vector.begin[min(d + 2, p.D - 1)], vector.begin[min(d + 3, p.D - 1)]};
      }
      value = {vector.scale * value.x, vector.scale * value.y, vector.scale * value.z,
               vector.scale * value.w};
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
        LSLPN_UNROLL
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
    LSLPN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int k = lane % 4 + 4 * e, down = kind == 0 ? 1 : kind == 1 ? 0 : k / 2 - 1;
      const int right = (kind < 2 ? k - 1 : 7 + k % 2) - lane / 4;
      from[e] =
          down < 2 && abs(right) < 2 ? gram_weight(-(kind == 0), lane / 4, down, right) : nullptr;
    }
    constexpr int kDown = sizeof(memory.gram[0]) / sizeof(float);
    LSLPN_UNROLL
    for (int r = 0; r < kBlock + 1; ++r) {
      if (r + (kind > 0) > kBlock || kind > 2) break;
      uint4 parts;
      split_tf32(from[0] ? from[0][r * kDown] : 0, parts.x, parts.z);
      split_tf32(from[1] ? from[1][r * kDown] : 0, parts.y, parts.w);
      memory.stencil[kind][r][lane] = parts;
    }
    // Rows from the one above the block on. Beyond the image the nearest one is read.
    const int row = min(max(i.begin - 1 + thread_index(), 0), p.grid.y.cells - 1);
    if (thread_index() < kRows) memory.rows[thread_index()] = row * features.h * int{sizeof(T)};
  }

  // Adds the gradients of the Gram maps times the neighbouring features, for channels d and d + 1.
  LSLPN_DEVICE void add_gram(float (&sum)[kBlock][4], int d) const {
    const int lane = thread_index() % kWarp, q = lane % 4;
    // Columns q - 1 and q + 3 of a row, and column 7 or 8 of the same row or the next.
    const T* from[6];
    LSLPN_UNROLL
    for (int e = 0; e < 6; ++e) {
      const int column = j.begin + (e < 2 ? q - 1 : e < 4 ? q + 3 : 7 + q % 2);
      from[e] =
          features.image(b, n) + (static_cast<std::int64_t>(min(d + e % 2, p.D - 1)) * features.d +
                                  min(max(column, 0), p.grid.x.cells - 1) * features.w);
    }
    Operand<6> rows[3];
    const auto read_row = [&](int r) {
      LSLPN_UNROLL
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
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const Operand<6>& of = rows[(r + (k < 3 ? k : e / 2 * 2)) % 3];
          const int at = k < 3 ? e : 4 + e % 2;
          neighbours[k].high[e] = of.high[at];
          neighbours[k].low[e] = of.low[at];
        }
      }
      float part[4];
      multiply<kHalf<T>>(part, neighbours, weights);
      LSLPN_UNROLL
      for (int e = 0; e < 4; ++e) sum[r][e] += part[e];
    }
  }

  // Sums again what is not finite: over the windows that cover a location alone, for the others
  // have a weight of 0, and 0 times NaN is NaN, and over the neighbours that pixels lie between.
  LSLPN_DEVICE void sum_again(Sums& sum, int d) const {
    LSLPN_NO_UNROLL
    for (int e = 0; e < kProducts * kBlock * 4; ++e) {
      const int row = e / 4 % kBlock, column = 2 * (thread_index() % 4) + e % 2;
      const int channel = min(d + e / (4 * kBlock) * 2 + e / 2 % 2, p.D - 1);
      float alone = 0;
      each_over(i.begin + row, j.begin + column, [&](const Over& over) {
        LSLPN_NO_UNROLL
        for (int e = 0; e < p.C * down() * across(); ++e) {
          Place place;
          const Vector of = vector(e, place);
          bool under = false;
          const float by = weight(over, place, place.map, under);
          if (under && of.scale != 0) alone += by * (of.scale * of.begin[channel]);
        }
      });
      const T* const of = features.image(b, n) + static_cast<std::int64_t>(channel) * features.d;
      LSLPN_NO_UNROLL
      for (int k = 0; k < 9 && !kPool; ++k) {
        const int down = k / 3 - 1, right = k % 3 - 1;
        if ((down != 0 && !p.grid.tiles_y.between) || (right != 0 && !p.grid.tiles_x.between)) {
          continue;
        }
        const int y = min(max(i.begin + row + down, 0), p.grid.y.cells - 1);
        const int x = min(max(j.begin + column + right, 0), p.grid.x.cells - 1);
        alone +=
            *gram_weight(row, column, down, right) * to_float(of[y * features.h + x * features.w]);
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
    LSLPN_UNROLL
    for (int e = 0; e < 4; ++e) {
      at[e] = to.image(b, n) + (static_cast<std::int64_t>(min(d + e, p.D - 1)) * to.d +
                                i.begin * to.h + (j.begin + 2 * q) * to.w);
    }
    const auto rows = [&](auto columns) {
      LSLPN_UNROLL
      for (int r = 0; r < kBlock; ++r) {
        if (r >= i.end - i.begin) break;
        LSLPN_UNROLL
        for (int e = 0; e < 4; ++e) {
          LSLPN_UNROLL
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
  const Range j = cells_of(p.grid.x, block % p.blocks_x);
  const Range i = cells_of(p.grid.y, block / p.blocks_x % p.blocks_y);
  const std::int64_t image = block / p.blocks_x / p.blocks_y;
  const std::int64_t episode = image / p.N;
  find_tiles<segments_near>(p.grid, i, j, memory.tiles);
  const Range ty = memory.tiles[0], tx = memory.tiles[1];
  const bool fours = cuda::fours(p.vectors, p.D);
  const float* maps = p.maps + image * p.grid.tiles() * p.tile_maps * kMap;
  const Scatterer<T, kPool> s{
      p,  features, to,   p.chunk.first + episode, image - episode * p.N, maps, i, j, ty,
      tx, memory,   fours};
  for (int e = thread_index(); e < ty.end - ty.begin + tx.end - tx.begin; e += kExchangeThreads) {
    const int column = e - (ty.end - ty.begin);
    (column < 0 ? memory.y[e] : memory.x[column]) =
        column < 0 ? segment(p.grid.y, p.grid.tiles_y, ty.begin + e)
                   : segment(p.grid.x, p.grid.tiles_x, tx.begin + column);
  }
  __syncthreads();
  if (!kPool) {
    s.find_gram();
    __syncthreads();
    s.find_stencil();
  }
  constexpr int kChannels = 16 * Scatterer<T, kPool>::kProducts;
  const int warp = thread_index() / kWarp, g = thread_index() % kWarp / 4;
  const int all = p.C * s.down() * s.across();
  LSLPN_NO_UNROLL
  for (int d0 = 0; d0 < p.D; d0 += kChannels * kExchangeWarps) {
    // Beyond the last channel, the last ones are repeated.
    const int d = min(d0 + kChannels * warp + 4 * g, p.D - (fours ? 4 : 1));
    typename Scatterer<T, kPool>::Sums sum;
    LSLPN_NO_UNROLL
    for (int first = 0; first < all; first += kVectors) {
      if (d0 == 0 || all > kVectors) s.prepare(first, all);
      int step = 0;
      if (first == 0) s.template add<true>(sum, d, step++);
      LSLPN_NO_UNROLL
      for (; step < memory.steps; ++step) s.template add<false>(sum, d, step);
    }
    if (d0 + kChannels * warp >= p.D) continue;
    float finite = 0;  // or NaN
    LSLPN_UNROLL
    for (int m = 0; m < Scatterer<T, kPool>::kProducts; ++m) {
      if (!kPool) s.add_gram(sum[m], d + 2 * m);
      LSLPN_UNROLL
      for (int e = 0; e < 4 * kBlock; ++e) finite += 0 * sum[m][e / 4][e % 4];
    }
    if (finite != 0) s.sum_again(sum, d);
    to.w == 1 ? s.template write<true>(sum, d) : s.template write<false>(sum, d);
  }
}

}  // namespace lslpn::cuda
