// Arguments and results of the CPU kernels: plain data, identical for every instruction set.
#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "../core/masks.h"

namespace lslpn {

// An interval of pixels begin <= x < end along an axis, all of which are in the windows first ..
// last and are interpolated from the feature locations lower .. upper (inclusive).
struct Segment {
  int begin, end;
  int first, last;
  int lower, upper;
  int before;  // feature locations of the segments before it, counted again where they overlap
};

// The longest segment, in pixels and in feature locations, so that a tile stays in the L1 cache.
constexpr int kTilePixels = 32;
constexpr int kTileCells = 16;

// One axis, with tables in the accumulation type A.
//
// T `length` and R `reach` are the largest numbers of pixels and feature locations of a segment; T
// is padded to whole vectors with weights of zero.
template <class A>
struct AxisTables {
  int pixels, cells, windows;
  int segments;
  const Segment* segment;
  int length, reach, overlap;
  int locations;     // the sum over all segments
  bool gaps;         // whether there are feature locations between segments that no pixel needs
  const int* lower;  // [pixels] the lower tap
  const A* upper;    // [pixels] the weight of the tap above it
  const A* weight;   // [segments, R, T] weight of feature location r for pixel t
  const A* square;   // [segments, R, T] its square
  const A* cross;    // [segments, R, T] its product with that of location r + 1
  int chunks;        // units of parallel work, see rows.h
  const int* chunk;  // [chunks + 1] their first segments
};

template <class A>
struct Tables {
  AxisTables<A> y, x;
};

// [B, N, D, h, w], N support or query images, in any layout; strides in elements.
struct Features {
  char* data;
  DType dtype;
  std::int64_t B, N, D, h, w;
  std::int64_t stride[5];
};

// Prototypes [B, C, Gy, Gx, D], factor [B, K, C, Gy, Gx] and, for the backward pass, the masks
// reduced to the feature locations of each tile, [B, K, C, y.locations, x.locations], in A.
template <class A>
struct Pool {
  Tables<A> tables;
  Features features;
  Masks masks;
  A min_pixels;
  A* prototypes;
  A* factor;
  A* weights;
  int threads;
};

// The same for the backward pass: features.data is the gradient to write; grad [B, C, Gy, Gx, D].
// Without weights (null), they are computed from the masks again.
template <class A>
struct PoolBackward {
  Tables<A> tables;
  Features features;
  Masks masks;
  const A* factor;
  const A* weights;
  const A* grad;
  int threads;
};

// Scores, times `logit_scale`, and winners [B, Q, C, H, W]; winners may be null, otherwise uint8 or
// int32. Unless null, gram [B, Q, 4, h, w] gets the inner products of neighbouring locations that
// some tile needs, see core/arithmetic.h: own, right, below, diagonal + other.
template <class A>
struct Match {
  Tables<A> tables;
  Features features;
  const A* prototypes;
  int C;
  bool mean;
  A* scores;
  void* winners;
  bool winners_are_bytes;
  int threads;
  A logit_scale = A(1);
  A* gram = nullptr;
};

template <class A>
struct MatchBackward {
  Tables<A> tables;
  Features features;
  const A* prototypes;
  int C;
  bool mean;
  const A* scores;
  const void* winners;
  bool winners_are_bytes;
  const A* grad;
  Features grad_features;  // shapes as features; null data if not needed
  A* grad_prototypes;      // null if not needed
  int threads;
  A logit_scale = A(1);     // of the scores; not 0
  const A* gram = nullptr;  // of the forward pass; if null, it is computed again
};

// The result of a call of the loss.
struct LossResult {
  double loss;         // the mean; NaN if all pixels are ignored
  bool in_range;       // whether all labels are valid; otherwise nothing was computed
  std::int64_t stray;  // an invalid label
};

// The cross-entropy of the logits logit_scale * S, and its gradients. Labels [B, Q, H, W], uint8 or
// int64.
template <class A>
struct MatchLoss {
  Tables<A> tables;
  Features features;
  const A* prototypes;
  int C;
  bool mean;
  const void* labels;
  bool labels_are_bytes;
  std::int32_t ignore_index;
  const A* weight;         // [C], or null for 1
  Features grad_features;  // in A, shapes as features; null data if not needed
  A* grad_prototypes;      // null if not needed
  LossResult* result;
  int threads;
  A logit_scale;  // not 0
};

// The maximum number of threads of a call.
constexpr int kMaxThreads = 256;

// Memory for the duration of a call, aligned to 64 bytes and not cleared. Throws std::bad_alloc.
void* allocate_memory(std::int64_t bytes);
void free_memory(void* memory);

}  // namespace lslpn
