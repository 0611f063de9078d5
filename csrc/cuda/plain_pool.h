// Masked average pooling by the definition: a thread computes one number from beginning to end.
// Takes every type and geometry; the tiled kernels are checked against it.
#pragma once

#include "common.h"

namespace lslpn::cuda {
namespace {

template <class T, class A>
struct PlainPool {
  View<T> features;
  Masks masks;
  A* prototypes;
  A* factor;
  Axis y, x;
  std::int64_t B, K, C, D;
  A min_pixels;
};

// factor [B, K, C, Gy, Gx] = 1 / (K n), 0 for windows of too few pixels.
template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_pool_factor(LSLPN_PARAMETERS PlainPool<T, A> p) {
  const std::int64_t element = element_index();
  if (element >= p.B * p.K * p.C * p.y.windows * p.x.windows) return;
  const int gx = static_cast<int>(element % p.x.windows);
  const int gy = static_cast<int>(element / p.x.windows % p.y.windows);
  const std::int64_t image = element / p.x.windows / p.y.windows;  // and class
  A n = 0;
  for (int i = 0; i < p.y.window; ++i) {
    const std::int64_t row = static_cast<std::int64_t>(p.y.start(gy) + i) * p.x.pixels;
    for (int j = 0; j < p.x.window; ++j) {
      n += mask_at<A>(p.masks, image / p.C, image % p.C, row + p.x.start(gx) + j,
                      static_cast<std::int64_t>(p.y.pixels) * p.x.pixels);
    }
  }
  p.factor[element] = n > p.min_pixels ? A(1) / (n * static_cast<A>(p.K)) : A(0);
}

// prototypes [B, C, Gy, Gx, D] = sum over k of factor * (sum over the window of M * Up F).
template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_pool_sum(LSLPN_PARAMETERS PlainPool<T, A> p) {
  const std::int64_t element = element_index();
  if (element >= p.B * p.C * p.y.windows * p.x.windows * p.D) return;
  const std::int64_t d = element % p.D;
  const std::int64_t window = element / p.D;
  const int gx = static_cast<int>(window % p.x.windows);
  const int gy = static_cast<int>(window / p.x.windows % p.y.windows);
  const std::int64_t c = window / p.x.windows / p.y.windows % p.C;
  const std::int64_t b = window / p.x.windows / p.y.windows / p.C;
  const View<const T> f{p.features.data, p.features.b, p.features.n,
                        p.features.d,    p.features.h, p.features.w};
  A prototype = 0;
  for (std::int64_t k = 0; k < p.K; ++k) {
    const std::int64_t image = (b * p.K + k) * p.C + c;
    const A factor = p.factor[(image * p.y.windows + gy) * p.x.windows + gx];
    if (factor == A(0)) continue;
    A sum = 0;
    for (int i = 0; i < p.y.window; ++i) {
      const int py = p.y.start(gy) + i;
      const Taps<A> y = p.y.template taps<A>(py);
      for (int j = 0; j < p.x.window; ++j) {
        const int px = p.x.start(gx) + j;
        const A m =
            mask_at<A>(p.masks, b * p.K + k, c, static_cast<std::int64_t>(py) * p.x.pixels + px,
                       static_cast<std::int64_t>(p.y.pixels) * p.x.pixels);
        if (m != A(0)) sum += m * interpolate(f, b, k, d, y, p.x.template taps<A>(px));
      }
    }
    prototype += sum * factor;
  }
  p.prototypes[element] = prototype;
}

// The gradient of a feature: over the pixels that touch it, their masks times the gradients of
// the windows over them.
template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_pool_backward(LSLPN_PARAMETERS PlainPool<T, A> p) {
  const std::int64_t element = element_index();
  if (element >= p.B * p.K * p.y.cells * p.x.cells * p.D) return;
  const std::int64_t d = element % p.D;
  const int j = static_cast<int>(element / p.D % p.x.cells);
  const int i = static_cast<int>(element / p.D / p.x.cells % p.y.cells);
  const std::int64_t image = element / p.D / p.x.cells / p.y.cells;
  const std::int64_t b = image / p.K;
  const Touching ty = touching(p.y, i), tx = touching(p.x, j);
  A gradient = 0;
  for (int py = ty.first; py <= ty.last; ++py) {
    const Taps<A> y = p.y.template taps<A>(py);
    const A wy = y.lower == i ? A(1) - y.upper : y.upper;
    const Covering cy = p.y.covering(py);
    for (int px = tx.first; px <= tx.last; ++px) {
      const Taps<A> x = p.x.template taps<A>(px);
      const A weight = wy * (x.lower == j ? A(1) - x.upper : x.upper);
      const Covering cx = p.x.covering(px);
      for (std::int64_t c = 0; c < p.C; ++c) {
        const std::int64_t mask = image * p.C + c, prototype = b * p.C + c;
        const A m = mask_at<A>(p.masks, image, c, static_cast<std::int64_t>(py) * p.x.pixels + px,
                               static_cast<std::int64_t>(p.y.pixels) * p.x.pixels);
        if (m == A(0)) continue;
        A sum = 0;
        for (int gy = cy.first; gy <= cy.last; ++gy) {
          for (int gx = cx.first; gx <= cx.last; ++gx) {
            sum += p.factor[(mask * p.y.windows + gy) * p.x.windows + gx] *
                   p.prototypes[((prototype * p.y.windows + gy) * p.x.windows + gx) * p.D + d];
          }
        }
        gradient += weight * m * sum;
      }
    }
  }
  from_float(gradient, *p.features.at(b, image % p.K, d, i, j));
}

template <class T>
std::string plain_pool(const Pool& call, Stream stream) {
  using A = typename Accumulate<T>::type;
  const Features& f = call.features;
  const PlainPool<T, A> p{view_of<T>(f),
                          call.masks,
                          static_cast<A*>(call.prototypes),
                          static_cast<A*>(call.factor),
                          call.y,
                          call.x,
                          f.B,
                          f.N,
                          call.masks.C,
                          f.D,
                          static_cast<A>(call.min_pixels)};
  const std::int64_t windows = call.masks.C * call.y.windows * call.x.windows;
  if (call.backward) {
    return launch_each(plain_pool_backward<T, A>, f.B * f.N * f.D * f.h * f.w, stream, p);
  }
  std::string error = launch_each(plain_pool_factor<T, A>, f.B * f.N * windows, stream, p);
  if (!error.empty()) return error;
  return launch_each(plain_pool_sum<T, A>, f.B * windows * f.D, stream, p);
}

}  // namespace
}  // namespace lslpn::cuda
