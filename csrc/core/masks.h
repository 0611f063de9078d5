// The class masks of the support images, in the forms that are accepted.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lslpn {

enum class MaskKind {
  classes,     // [B, K, C, H, W]: a mask for each class, the background first
  foreground,  // [B, K, C - 1, H, W]: class 0 is the rest of each pixel
  labels,      // [B, K, H, W]: the class of each pixel; numbers outside 0 .. C - 1 are no class
};

struct Masks {
  const void* data = nullptr;
  MaskKind kind = MaskKind::classes;
  DType dtype = DType::boolean;  // boolean, uint8 or the accumulation type; labels: uint8 or int64
  std::int64_t C = 0;
};

}  // namespace lslpn

LSLPN_BEGIN

LSLPN_HD bool masks_are_bytes(const Masks& masks) {
  return masks.dtype == DType::boolean || masks.dtype == DType::uint8;
}

// The mask of class c at a pixel. `image` counts the support images of all episodes, each of
// `pixels` pixels.
template <class A>
LSLPN_HD A mask_at(const Masks& masks, std::int64_t image, std::int64_t c, std::int64_t pixel,
                   std::int64_t pixels) {
  const bool bytes = masks_are_bytes(masks);
  if (masks.kind == MaskKind::labels) {
    const std::int64_t at = image * pixels + pixel;
    const std::int64_t label = bytes ? static_cast<const std::uint8_t*>(masks.data)[at]
                                     : static_cast<const std::int64_t*>(masks.data)[at];
    return label == c ? A(1) : A(0);
  }
  const bool derived = masks.kind == MaskKind::foreground;
  const std::int64_t stored = derived ? masks.C - 1 : masks.C;
  const std::int64_t first = image * stored * pixels + pixel;
  const auto read = [&](std::int64_t k) {
    const std::int64_t at = first + k * pixels;
    return bytes ? static_cast<A>(static_cast<const std::uint8_t*>(masks.data)[at])
                 : static_cast<const A*>(masks.data)[at];
  };
  if (!derived) return read(c);
  if (c > 0) return read(c - 1);
  A held = 0;
  for (std::int64_t k = 0; k < stored; ++k) held += read(k);
  return held > A(1) ? A(0) : A(1) - held;  // NaN stays NaN
}

LSLPN_END
