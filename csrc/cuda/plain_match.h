// Cosine matching by the definition: a thread computes one number from beginning to end.
// Takes every type and geometry; the tiled kernels are checked against it.
#pragma once

#include "common.h"

namespace lslpn::cuda {
namespace {

template <class T, class A>
struct PlainMatch {
  View<const T> features;
  const A* prototypes;
  A* scores;
  void* winners;
  bool wide_winners, mean;
  A logit_scale;  // multiplies the cosines
  int overlap_x;
  Axis y, x;
  std::int64_t B, Q, C, D;
  A* gram;  // [B, Q, kGramMaps, h, w]
  // Backward.
  const A* grad;
  View<T> grad_features;
  A* grad_prototypes;
  A* feature_scale;    // [B, Q, H, W] 1 / |Up F|
  A* prototype_scale;  // [B, C, Gy, Gx] 1 / |p|

  LSLPN_DEVICE std::int64_t prototype(std::int64_t b, std::int64_t c, int gy, int gx) const {
    return ((b * C + c) * y.windows + gy) * x.windows + gx;
  }

  // The share that a window over a pixel has in the pixel's score.
  LSLPN_DEVICE A share(std::int64_t pixel, int gy, int gx, const Covering& cy,
                       const Covering& cx) const {
    if (mean) return A(1) / static_cast<A>((cy.last - cy.first + 1) * (cx.last - cx.first + 1));
    const int place = (gy - cy.first) * overlap_x + gx - cx.first;
    const int winner = wide_winners ? static_cast<const std::int32_t*>(winners)[pixel]
                                    : static_cast<const std::uint8_t*>(winners)[pixel];
    return winner == place ? A(1) : A(0);
  }
};

template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_match_forward(LSLPN_PARAMETERS PlainMatch<T, A> p) {
  const std::int64_t element = element_index();
  const std::int64_t size = static_cast<std::int64_t>(p.y.pixels) * p.x.pixels;
  if (element >= p.B * p.Q * size) return;
  const int px = static_cast<int>(element % p.x.pixels);
  const int py = static_cast<int>(element / p.x.pixels % p.y.pixels);
  const std::int64_t image = element / size, b = image / p.Q, q = image % p.Q;
  const Taps<A> y = p.y.template taps<A>(py), x = p.x.template taps<A>(px);
  const Covering cy = p.y.covering(py), cx = p.x.covering(px);
  A square = 0;
  for (std::int64_t d = 0; d < p.D; ++d) {
    const A u = interpolate(p.features, b, q, d, y, x);
    square += u * u;
  }
  const A scale = inverse_length(square);
  for (std::int64_t c = 0; c < p.C; ++c) {
    A best = 0, sum = 0;
    int winner = 0;
    bool first = true;
    for (int gy = cy.first; gy <= cy.last; ++gy) {
      for (int gx = cx.first; gx <= cx.last; ++gx) {
        const A* prototype = p.prototypes + p.prototype(b, c, gy, gx) * p.D;
        A dot = 0, length = 0;
        for (std::int64_t d = 0; d < p.D; ++d) {
          dot += interpolate(p.features, b, q, d, y, x) * prototype[d];
          length += prototype[d] * prototype[d];
        }
        const A cosine = dot * inverse_length(length) * scale;
        sum += cosine;
        if (first || cosine > best || cosine != cosine) {
          // NaN stays: nothing is greater.
          best = cosine;
          winner = (gy - cy.first) * p.overlap_x + gx - cx.first;
          first = false;
        }
      }
    }
    const std::int64_t pixel = ((image * p.C + c) * p.y.pixels + py) * p.x.pixels + px;
    const int windows = (cy.last - cy.first + 1) * (cx.last - cx.first + 1);
    p.scores[pixel] = p.logit_scale * (p.mean ? sum / static_cast<A>(windows) : best);
    if (!p.winners) continue;
    if (p.wide_winners) {
      static_cast<std::int32_t*>(p.winners)[pixel] = winner;
    } else {
      static_cast<std::uint8_t*>(p.winners)[pixel] = static_cast<std::uint8_t>(winner);
    }
  }
}

// For a tiled backward pass; the plain one does without.
template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_gram(LSLPN_PARAMETERS PlainMatch<T, A> p) {
  const std::int64_t element = element_index();
  const std::int64_t size = static_cast<std::int64_t>(p.y.cells) * p.x.cells;
  if (element >= p.B * p.Q * size) return;
  const std::int64_t image = element / size, cell = element % size;
  const std::int64_t i = cell / p.x.cells, j = cell % p.x.cells;
  const bool right = j + 1 < p.x.cells, below = i + 1 < p.y.cells;
  A sum[kGramMaps] = {};
  for (std::int64_t d = 0; d < p.D; ++d) {
    const T* f = p.features.at(image / p.Q, image % p.Q, d, i, j);
    const A a = to_float(f[0]);
    const A b = right ? A(to_float(f[p.features.w])) : A(0);
    const A c = below ? A(to_float(f[p.features.h])) : A(0);
    const A e = right && below ? A(to_float(f[p.features.h + p.features.w])) : A(0);
    sum[0] += a * a;
    sum[1] += a * b;
    sum[2] += a * c;
    sum[3] += a * e + b * c;
  }
  for (int k = 0; k < kGramMaps; ++k) {
    p.gram[(image * kGramMaps + k) * size + cell] = sum[k];
  }
}

template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_feature_scale(LSLPN_PARAMETERS PlainMatch<T, A> p) {
  const std::int64_t element = element_index();
  const std::int64_t size = static_cast<std::int64_t>(p.y.pixels) * p.x.pixels;
  if (element >= p.B * p.Q * size) return;
  const Taps<A> x = p.x.template taps<A>(static_cast<int>(element % p.x.pixels));
  const Taps<A> y = p.y.template taps<A>(static_cast<int>(element / p.x.pixels % p.y.pixels));
  const std::int64_t image = element / size;
  A square = 0;
  for (std::int64_t d = 0; d < p.D; ++d) {
    const A u = interpolate(p.features, image / p.Q, image % p.Q, d, y, x);
    square += u * u;
  }
  p.feature_scale[element] = inverse_length(square);
}

template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_prototype_scale(LSLPN_PARAMETERS PlainMatch<T, A> p) {
  const std::int64_t element = element_index();
  if (element >= p.B * p.C * p.y.windows * p.x.windows) return;
  A square = 0;
  for (std::int64_t d = 0; d < p.D; ++d) {
    const A value = p.prototypes[element * p.D + d];
    square += value * value;
  }
  p.prototype_scale[element] = inverse_length(square);
}

// d<u / |u|, q> / du = (q - S u / |u|) / |u| for unit q, at each pixel that touches the feature.
// The scores are scaled already.
template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_match_backward_features(LSLPN_PARAMETERS PlainMatch<T, A> p) {
  const std::int64_t element = element_index();
  if (element >= p.B * p.Q * p.y.cells * p.x.cells * p.D) return;
  const std::int64_t d = element % p.D;
  const int j = static_cast<int>(element / p.D % p.x.cells);
  const int i = static_cast<int>(element / p.D / p.x.cells % p.y.cells);
  const std::int64_t image = element / p.D / p.x.cells / p.y.cells, b = image / p.Q;
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
      const A scale = p.feature_scale[(image * p.y.pixels + py) * p.x.pixels + px];
      if (scale == A(0)) continue;
      const A direction = interpolate(p.features, b, image % p.Q, d, y, x) * scale;
      for (std::int64_t c = 0; c < p.C; ++c) {
        const std::int64_t pixel = ((image * p.C + c) * p.y.pixels + py) * p.x.pixels + px;
        A sum = 0;
        for (int gy = cy.first; gy <= cy.last; ++gy) {
          for (int gx = cx.first; gx <= cx.last; ++gx) {
            const A share = p.share(pixel, gy, gx, cy, cx);
            if (share == A(0)) continue;
            const std::int64_t prototype = p.prototype(b, c, gy, gx);
            sum += share * p.prototype_scale[prototype] * p.prototypes[prototype * p.D + d];
          }
        }
        gradient +=
            weight * scale * p.grad[pixel] * (p.logit_scale * sum - p.scores[pixel] * direction);
      }
    }
  }
  from_float(gradient, *p.grad_features.at(b, image % p.Q, d, i, j));
}

// dq: over the pixels that chose the prototype, dS times their direction.
template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_match_backward_directions(LSLPN_PARAMETERS PlainMatch<T, A> p) {
  const std::int64_t element = element_index();
  if (element >= p.B * p.C * p.y.windows * p.x.windows * p.D) return;
  const std::int64_t d = element % p.D;
  const std::int64_t window = element / p.D;
  const int gx = static_cast<int>(window % p.x.windows);
  const int gy = static_cast<int>(window / p.x.windows % p.y.windows);
  const std::int64_t c = window / p.x.windows / p.y.windows % p.C;
  const std::int64_t b = window / p.x.windows / p.y.windows / p.C;
  A sum = 0;
  for (std::int64_t q = 0; q < p.Q; ++q) {
    const std::int64_t image = b * p.Q + q;
    for (int k = 0; k < p.y.window; ++k) {
      const int py = p.y.start(gy) + k;
      const Taps<A> y = p.y.template taps<A>(py);
      const Covering cy = p.y.covering(py);
      for (int l = 0; l < p.x.window; ++l) {
        const int px = p.x.start(gx) + l;
        const std::int64_t pixel = ((image * p.C + c) * p.y.pixels + py) * p.x.pixels + px;
        const A share = p.share(pixel, gy, gx, cy, p.x.covering(px));
        const A scale = p.feature_scale[(image * p.y.pixels + py) * p.x.pixels + px];
        if (share == A(0) || scale == A(0)) continue;
        const A u = interpolate(p.features, b, q, d, y, p.x.template taps<A>(px));
        sum += share * p.logit_scale * p.grad[pixel] * scale * u;
      }
    }
  }
  p.grad_prototypes[element] = sum;
}

// dp = (dq - <q, dq> q) / |p|, in place of dq.
template <class T, class A>
LSLPN_KERNEL(kPlainThreads, 1)
plain_match_backward_prototypes(LSLPN_PARAMETERS PlainMatch<T, A> p) {
  const std::int64_t element = element_index();
  if (element >= p.B * p.C * p.y.windows * p.x.windows) return;
  const A scale = p.prototype_scale[element];
  const A* prototype = p.prototypes + element * p.D;
  A* gradient = p.grad_prototypes + element * p.D;
  A dot = 0;
  for (std::int64_t d = 0; d < p.D; ++d) dot += prototype[d] * scale * gradient[d];
  for (std::int64_t d = 0; d < p.D; ++d) {
    gradient[d] = (gradient[d] - dot * prototype[d] * scale) * scale;
  }
}

inline std::int64_t plain_match_workspace(const Match& call) {
  const Features& f = call.features;
  const std::int64_t pixels = static_cast<std::int64_t>(call.y.pixels) * call.x.pixels;
  const std::int64_t windows = static_cast<std::int64_t>(call.y.windows) * call.x.windows;
  const std::int64_t size = f.dtype == DType::float64 ? 8 : 4;
  return size * (f.B * f.N * pixels + f.B * call.C * windows);
}

template <class T>
std::string plain_match(const Match& call, Stream stream) {
  using A = typename Accumulate<T>::type;
  const Features& f = call.features;
  const View<T> features = view_of<T>(f);
  PlainMatch<T, A> p{};
  p.features = {features.data, features.b, features.n, features.d, features.h, features.w};
  p.prototypes = static_cast<const A*>(call.prototypes);
  p.scores = static_cast<A*>(call.scores);
  p.winners = call.winners;
  p.wide_winners = call.wide_winners;
  p.mean = call.mean;
  p.logit_scale = static_cast<A>(call.logit_scale);
  p.overlap_x = static_cast<int>(call.overlap_x);
  p.y = call.y;
  p.x = call.x;
  p.B = f.B;
  p.Q = f.N;
  p.C = call.C;
  p.D = f.D;
  p.gram = static_cast<A*>(call.gram);
  const std::int64_t pixels = f.B * f.N * call.y.pixels * call.x.pixels;
  const std::int64_t prototypes = f.B * call.C * call.y.windows * call.x.windows;
  if (!call.backward) {
    const std::string failed = launch_each(plain_match_forward<T, A>, pixels, stream, p);
    if (!failed.empty() || !p.gram) return failed;
    return launch_each(plain_gram<T, A>, f.B * f.N * f.h * f.w, stream, p);
  }

  p.grad = static_cast<const A*>(call.grad);
  p.grad_features = view_of<T>(call.grad_features);
  p.grad_prototypes = static_cast<A*>(call.grad_prototypes);
  p.feature_scale = static_cast<A*>(call.workspace);
  p.prototype_scale = p.feature_scale + pixels;
  std::string error = launch_each(plain_feature_scale<T, A>, pixels, stream, p);
  if (error.empty()) error = launch_each(plain_prototype_scale<T, A>, prototypes, stream, p);
  if (error.empty()) {
    error =
        launch_each(plain_match_backward_features<T, A>, f.B * f.N * f.D * f.h * f.w, stream, p);
  }
  if (error.empty()) {
    error = launch_each(plain_match_backward_directions<T, A>, prototypes * f.D, stream, p);
  }
  if (error.empty()) {
    error = launch_each(plain_match_backward_prototypes<T, A>, prototypes, stream, p);
  }
  return error;
}

}  // namespace
}  // namespace lslpn::cuda
