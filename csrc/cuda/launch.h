// What the bindings ask of the operators: plain data in, launches on a stream, an error out.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/geometry.h"
#include "core/masks.h"

namespace lslpn::cuda {

using Stream = void*;  // cudaStream_t, as an integer from Python

// [B, N, D, h, w], N support or query images, in any layout; strides in elements.
struct Features {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::int64_t B = 0, N = 0, D = 0, h = 0, w = 0;
  std::int64_t stride[5] = {};
};

// A contiguous float of the accumulation type (A): float64 for float64 features, else float32.
//
// All pointers are to memory of the device. `workspace` has as many bytes as workspace_of(call)
// says; it is aligned to 256 bytes.

struct Pool {
  Features features;  // backward: the gradient, to be written
  Axis y, x;
  Masks masks;
  void* prototypes = nullptr;  // A [B, C, Gy, Gx, D]; backward: their gradient, read only
  void* factor = nullptr;      // A [B, K, C, Gy, Gx]; backward: read only
  double min_pixels = 0;
  bool backward = false;
  bool kept = false;  // the workspace is as a forward pass of the same sizes has left it
  void* workspace = nullptr;
};

// Why the driver cannot run these kernels on the current device; empty where it can.
std::string probe();

// Cross-entropy in place of scores: what is kept of a pixel are the gradients of its logits z_c but
// the first, g_c = w (p_c - [c = label]), in place of scores, and sum_c g_c z_c; see gpu_loss.py.
struct Loss {
  const void* labels = nullptr;  // [B, Q, H, W], uint8 or int64
  bool wide_labels = false;      // int64
  std::int64_t ignore_index = 0;
  const void* weight = nullptr;  // A [C], or null
  void* radial = nullptr;        // A [B, Q, H, W]
  const void* grad = nullptr;    // backward: A [], of the loss
  const void* total = nullptr;   // backward: A [], of the weights of all pixels
};

struct Match {
  Features features;
  Axis y, x;
  std::int64_t C = 0;
  const void* prototypes = nullptr;  // A [B, C, Gy, Gx, D]
  void* scores = nullptr;            // A [B, Q, C, H, W], C - 1 slopes; backward: read only
  void* winners = nullptr;           // [B, Q, C, H, W] of uint8 or int32, or null; likewise
  bool wide_winners = false;         // int32
  bool mean = false;
  double logit_scale = 1;           // multiplies the cosines; not 0
  std::int64_t overlap_x = 1;       // the most windows over a pixel along x
  void* gram = nullptr;             // A [B, Q, 4, h, w], or null; backward: read only
  const void* grad = nullptr;       // backward: A [B, Q, C, H, W]; not of a loss
  Features grad_features;           // backward: written
  void* grad_prototypes = nullptr;  // backward: A, written
  bool backward = false;
  void* workspace = nullptr;
  // Of two classes and more. The workspace of the forward pass is what it results in: of each tile
  // the sums of the losses and of the weights.
  bool has_loss = false;
  Loss loss;
};

// The Gram maps of core/arithmetic.h that the forward pass leaves to the backward pass, in this
// order: own, right, below, and the sum of diagonal and other. Those that would reach beyond the
// last row or column, or into a pair of locations that no pixel lies between, are of no use.
constexpr int kGramMaps = 4;

// Bytes, or -1 where no kernel takes the call.
std::int64_t workspace_of(const Pool& call);
std::int64_t workspace_of(const Match& call);
// The result is what went wrong, empty if nothing did.
std::string run(const Pool& call, Stream stream);
std::string run(const Match& call, Stream stream);

}  // namespace lslpn::cuda
