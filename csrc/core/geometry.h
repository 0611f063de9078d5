// One axis of an image under a grid of windows, as in lslpn_kernels/geometry.py.
#pragma once

#include <cstdint>

#include "macros.h"

LSLPN_BEGIN

// The feature locations from which a pixel is interpolated: `lower` with weight 1 - upper, and
// lower + 1 with weight `upper`.
template <class A>
struct Taps {
  int lower;
  A upper;
};

// Windows first, first + 1, ..., last.
struct Covering {
  int first;
  int last;
};

// The longest axis, so that pixel and window numbers fit into an int.
constexpr std::int64_t kLongestAxis = std::int64_t{1} << 30;

struct Axis {
  int pixels;   // image pixels, n
  int cells;    // feature locations
  int window;   // pixels in a window, k
  int step;     // pixels from one window to the next, s; the last window may be closer
  int windows;  // number of windows, ceil((n - k) / s) + 1

  // The first pixel of window m.
  LSLPN_HD int start(int m) const {
    const std::int64_t regular = static_cast<std::int64_t>(m) * step;
    const int latest = pixels - window;
    return regular < latest ? static_cast<int>(regular) : latest;
  }

  // The windows over a pixel.
  LSLPN_HD Covering covering(int pixel) const {
    const int before = pixel - window;  // the last pixel of a window that ends just too early
    int first = before < 0 ? 0 : before / step + 1;
    if (first > windows - 1) first = windows - 1;
    return {first, pixel >= pixels - window ? windows - 1 : pixel / step};
  }

  // The taps of a pixel, as in torch.nn.functional.interpolate(mode="bilinear",
  // align_corners=False): position = (pixel + 1/2) cells / pixels - 1/2, not below 0. It is a ratio
  // of integers, split into whole and fraction in integer arithmetic, without rounding.
  //
  // At the far border the weight of the upper tap is 0; clamping its index alone would leave
  // |Up F|^2 = w^T G w wrong there, since G has inner products of *neighbours*.
  template <class A>
  LSLPN_HD Taps<A> taps(int pixel) const {
    const std::int64_t unit = 2 * static_cast<std::int64_t>(pixels);
    const std::int64_t position = (2 * static_cast<std::int64_t>(pixel) + 1) * cells - pixels;
    if (position <= 0) return {0, A(0)};
    const std::int64_t lower = position / unit;
    if (lower >= cells - 1) return {cells - 1, A(0)};
    const std::int64_t rest = position - lower * unit;
    return {static_cast<int>(lower), static_cast<A>(rest) / static_cast<A>(unit)};
  }
};

LSLPN_END
