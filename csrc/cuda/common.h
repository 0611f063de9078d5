// What the kernels of both operators share.
#pragma once

#include <algorithm>

#include "device.h"
#include "launch.h"

namespace lslpn::cuda {

// Features [B, N, D, h, w] in any layout, as a kernel sees them.
template <class T>
struct View {
  T* data;
  std::int64_t b, n, d, h, w;  // strides in elements

  LSLPN_DEVICE T* at(std::int64_t ib, std::int64_t in, std::int64_t id, std::int64_t ih,
                     std::int64_t iw) const {
    return data + (ib * b + in * n + id * d + ih * h + iw * w);
  }
};

template <class T>
View<T> view_of(const Features& f) {
  return {static_cast<T*>(f.data), f.stride[0], f.stride[1], f.stride[2], f.stride[3], f.stride[4]};
}

// Likewise for the tiled kernels: small images, whose strides within one fit into an int.
template <class T>
struct Images {
  T* data;
  std::int64_t b, n;
  int d, h, w;

  LSLPN_DEVICE T* image(std::int64_t ib, std::int64_t in) const { return data + (ib * b + in * n); }
};

template <class T>
Images<T> images_of(const Features& f) {
  return {static_cast<T*>(f.data),
          f.stride[0],
          f.stride[1],
          static_cast<int>(f.stride[2]),
          static_cast<int>(f.stride[3]),
          static_cast<int>(f.stride[4])};
}

// Double joins in where the plain kernels calculate in it.
LSLPN_DEVICE double to_float(double value) {
  return value;
}
LSLPN_DEVICE void from_float(double value, double& out) {
  out = value;
}

LSLPN_DEVICE int minimum(int a, int b) {
  return a < b ? a : b;
}
LSLPN_DEVICE int maximum(int a, int b) {
  return a > b ? a : b;
}

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
inline std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return divide_up(a, b) * b;
}

// Whether four neighbouring channels are always aligned, and can be moved at once.
inline bool fours(const Features& f) {
  bool whole = f.stride[2] == 1 && f.D % 4 == 0;
  const std::int64_t length[5] = {f.B, f.N, f.D, f.h, f.w};
  for (const int i : {0, 1, 3, 4}) {
    // The stride of a single image or location means nothing: some releases of torch export 1.
    whole = whole && (length[i] == 1 || f.stride[i] % 4 == 0);
  }
  const int size = f.dtype == DType::float32 ? 4 : 2;
  return whole && reinterpret_cast<std::uintptr_t>(f.data) % (4 * size) == 0;
}

// Whether every element of an image can be reached from its first by an int.
inline bool small_images(const Features& f) {
  const std::int64_t size[3] = {f.D, f.h, f.w};
  std::int64_t last = 0;
  for (int i = 0; i < 3; ++i) {
    if (f.stride[2 + i] < 0 || f.stride[2 + i] > 0x7fffffff) return false;
    last += (size[i] - 1) * f.stride[2 + i];
  }
  return last <= 0x7fffffff;
}

// Channel d of Up F at a pixel.
template <class T, class A>
LSLPN_DEVICE A interpolate(const View<const T>& f, std::int64_t b, std::int64_t n, std::int64_t d,
                           const Taps<A>& y, const Taps<A>& x) {
  const T* here = f.at(b, n, d, y.lower, x.lower);
  A value = (A(1) - x.upper) * A(to_float(here[0]));
  if (x.upper > A(0)) value += x.upper * A(to_float(here[f.w]));
  if (!(y.upper > A(0))) return value;
  A below = (A(1) - x.upper) * A(to_float(here[f.h]));
  if (x.upper > A(0)) below += x.upper * A(to_float(here[f.h + f.w]));
  return (A(1) - y.upper) * value + y.upper * below;
}

// The pixels that touch a feature location: those with a tap on it.
struct Touching {
  int first, last;  // last < first: none
};
LSLPN_DEVICE Touching touching(const Axis& axis, int cell) {
  const std::int64_t n = axis.pixels, cells = axis.cells;
  // Estimates from outside, then pixel by pixel; a tap's index grows with the pixel.
  const std::int64_t low = ((2 * cell - 1) * n) / (2 * cells) - 2;
  const std::int64_t high = ((2 * static_cast<std::int64_t>(cell) + 3) * n) / (2 * cells) + 1;
  Touching t{low < 0 ? 0 : static_cast<int>(low),
             high > n - 1 ? axis.pixels - 1 : static_cast<int>(high)};
  for (; t.first < axis.pixels; ++t.first) {
    const Taps<float> taps = axis.taps<float>(t.first);
    if (taps.lower + (taps.upper > 0) >= cell) break;
  }
  while (t.last >= 0 && axis.taps<float>(t.last).lower > cell) --t.last;
  return t;
}

// One thread for each of `elements`, in blocks of kPlainThreads.
constexpr int kPlainThreads = 128;
LSLPN_DEVICE std::int64_t element_index() {
  return block_index() * kPlainThreads + thread_index();
}
template <class P>
std::string launch_each(void (*kernel)(P), std::int64_t elements, Stream stream, const P& p) {
  return launch(kernel, divide_up(elements, kPlainThreads), kPlainThreads, 0, stream, p);
}

// Calls f(T()) with the type that a dtype stands for.
template <class F>
auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float64:
      return f(double());
    case DType::float16:
      return f(Half());
    case DType::bfloat16:
      return f(BFloat16());
    default:
      return f(float());
  }
}

}  // namespace lslpn::cuda
