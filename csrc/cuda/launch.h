// What the bindings ask of the operators: plain data in, launches on a stream, an error out.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "core/dtype.h"
#include "core/geometry.h"
#include "core/masks.h"

namespace lslpn::cuda {

using Stream = void*;          // cudaStream_t, as an integer from Python
constexpr int kChannels = 32;  // of which D is a multiple

// Features [B, N, D, h, w] of N support or query images, in any layout; strides in elements.
struct Features {
  void* data = nullptr;
  DType dtype = DType::float32;  // or float16, bfloat16
  std::int64_t B = 0, N = 0, D = 0, h = 0, w = 0;
  std::int64_t stride[5] = {};
};

// Pointers are to device memory. All arrays but the features are contiguous; those of channels are
// aligned to 16 bytes.

struct Pool {
  Features features;  // backward: their gradient, an output
  Axis y, x;
  Masks masks;
  float* prototypes = nullptr;  // [B, C, Gy, Gx, D]; backward: their gradient, an input
  float* factor = nullptr;      // [B, K, C, Gy, Gx]; backward: an input
  float min_pixels = 0;
  bool backward = false;
  void* kept = nullptr;         // what the first workspace of an earlier call was given,
  std::int64_t kept_bytes = 0;  // from these episodes on; bytes of an episode
};

// Cross-entropy of the logits z_c of a pixel with label y and weight w, for two classes or more.
// The forward pass writes the gradients g_c = w (p_c - [c = y]) of all classes but the first, and
// sum_c g_c z_c; see gpu_match.py.
struct Loss {
  const void* labels = nullptr;  // [B, Q, H, W], uint8 or int64; forward alone
  bool wide_labels = false;      // int64
  std::int64_t ignore_index = 0;
  const float* weight = nullptr;  // [C], or null
  float* radial = nullptr;        // [B, Q, H, W]: sum_c g_c z_c; null where there is no loss
  const float* grad = nullptr;    // backward: [], of the loss
  const float* total = nullptr;   // backward: [], the sum of the weights of all pixels
};

// Number of Gram maps that the forward pass keeps for the backward pass, in the order of
// core/arithmetic.h: own, right, below, and the sum of diagonal and other. Entries that no pixel
// needs are undefined.
constexpr int kGramMaps = 4;

// The arrays and settings of matching that its kernels take as they are.
struct Matching {
  const float* prototypes = nullptr;  // [B, C, Gy, Gx, D]
  float* scores = nullptr;            // [B, Q, C, H, W], with a loss [B, Q, C - 1, H, W] gradients
  std::uint8_t* winners = nullptr;    // [B, Q, C, H, W], or null
  float* gram = nullptr;              // [B, Q, kGramMaps, h, w], or null
  const float* grad = nullptr;        // backward: [B, Q, C, H, W]; null with a loss
  Loss loss;
  bool mean = false;
  float logit_scale = 1;  // multiplies the cosines; not 0
  int overlap_x = 1;      // the largest number of windows over a pixel along x
};

struct Match {
  Features features;
  Axis y, x;
  std::int64_t C = 0;
  Matching matching;
  Features grad_features;            // backward
  float* grad_prototypes = nullptr;  // backward
  bool backward = false;
};

// Why the driver cannot run these kernels on the current device; empty where it can.
std::string probe();
// Memory of so many bytes for the kernels of a call, aligned to 16.
using Allocate = std::function<void*(std::int64_t)>;
// Launches what a call asks for, for its first episodes, as many as a workspace of so many bytes
// allows, one at least. Returns how many, 0 where the kernels do not take the call; throws what
// CUDA reports. The workspace of a loss has its sums: [B, Q, tiles, 2] of losses and of weights.
std::int64_t run(const Pool& call, std::int64_t workspace, const Allocate& allocate, Stream stream);
std::int64_t run(const Match& call, std::int64_t workspace, const Allocate& allocate,
                 Stream stream);

}  // namespace lslpn::cuda
