// The accepted forms of the class masks of support images.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lslpn {

enum class MaskKind {
  classes,     // [B, K, C, H, W]: a mask for each class, the background first
  foreground,  // [B, K, C - 1, H, W]: class 0 is the rest of each pixel
  labels,      // [B, K, H, W]: the class of each pixel; none if outside 0 .. C - 1
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

LSLPN_END
