// Both operators and their gradients as the equations have them: one pixel, one window, one channel
// after the other, in double precision. Nothing is shared with the kernels but the description of
// an axis.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/geometry.h"

namespace oracle {

using Numbers = std::vector<double>;

constexpr double kEps = 1e-8;

struct Tap {
  int cell;
  double weight;
};

// One axis, pixel by pixel.
struct Line {
  int pixels, cells, windows, overlap = 0;
  std::vector<std::vector<Tap>> taps;  // those of a weight above 0
  std::vector<std::vector<int>> windows_over;

  explicit Line(const lslpn::Axis& a) : pixels(a.pixels), cells(a.cells), windows(a.windows) {
    for (int p = 0; p < pixels; ++p) {
      const double position = std::max((p + 0.5) * cells / pixels - 0.5, 0.0);
      // What rounding leaves of a position that is whole is no tap.
      const int lower = std::min(static_cast<int>(position + 1e-12), cells - 1);
      const double upper = lower == cells - 1 ? 0 : position - lower;
      taps.push_back({{lower, 1 - std::max(upper, 0.0)}});
      if (upper > 1e-12) taps.back().push_back({lower + 1, upper});
      windows_over.emplace_back();
      for (int m = 0; m < windows; ++m) {
        const int start = std::min(m * a.step, pixels - a.window);
        if (start <= p && p < start + a.window) windows_over.back().push_back(m);
      }
      overlap = std::max(overlap, static_cast<int>(windows_over.back().size()));
    }
  }
};

// Letters as in the kernels: features [B, N, D, h, w], classes C, windows Gy x Gx.
struct Problem {
  Line y, x;
  std::int64_t B, N, D, C;

  std::int64_t pixels() const { return std::int64_t{y.pixels} * x.pixels; }
  std::int64_t cells() const { return std::int64_t{y.cells} * x.cells; }
  std::int64_t windows() const { return std::int64_t{y.windows} * x.windows; }

  // Calls f(pixel, row, column).
  template <class F>
  void for_pixels(F f) const {
    for (int i = 0; i < y.pixels; ++i) {
      for (int j = 0; j < x.pixels; ++j) f(std::int64_t{i} * x.pixels + j, i, j);
    }
  }
  // Calls f(cell, weight) for the taps of a pixel.
  template <class F>
  void for_taps(int row, int column, F f) const {
    for (const Tap& a : y.taps[row]) {
      for (const Tap& b : x.taps[column]) f(a.cell * x.cells + b.cell, a.weight * b.weight);
    }
  }
  // Calls f(window, how its winning is written down) for the windows over a pixel, row by row.
  template <class F>
  void for_windows(int row, int column, F f) const {
    const std::vector<int>&rows = y.windows_over[row], &columns = x.windows_over[column];
    for (const int my : rows) {
      for (const int mx : columns) {
        f(std::int64_t{my} * x.windows + mx, (my - rows[0]) * x.overlap + mx - columns[0]);
      }
    }
  }
};

// [images, D, h, w] -> [images, H, W, D].
inline Numbers upsample(const Problem& p, const Numbers& features, std::int64_t images) {
  Numbers up(images * p.pixels() * p.D);
  for (std::int64_t n = 0; n < images; ++n) {
    p.for_pixels([&](std::int64_t pixel, int row, int column) {
      double* u = &up[(n * p.pixels() + pixel) * p.D];
      p.for_taps(row, column, [&](std::int64_t cell, double weight) {
        for (std::int64_t d = 0; d < p.D; ++d) {
          u[d] += weight * features[(n * p.D + d) * p.cells() + cell];
        }
      });
    });
  }
  return up;
}

// The way back: [images, H, W, D] -> [images, D, h, w].
inline Numbers upsample_backward(const Problem& p, const Numbers& grad, std::int64_t images) {
  Numbers out(images * p.D * p.cells());
  for (std::int64_t n = 0; n < images; ++n) {
    p.for_pixels([&](std::int64_t pixel, int row, int column) {
      const double* g = &grad[(n * p.pixels() + pixel) * p.D];
      p.for_taps(row, column, [&](std::int64_t cell, double weight) {
        for (std::int64_t d = 0; d < p.D; ++d) {
          out[(n * p.D + d) * p.cells() + cell] += weight * g[d];
        }
      });
    });
  }
  return out;
}

// factor [B, N, C, G] of masks [B, N, C, H, W].
inline Numbers factors(const Problem& p, const Numbers& masks, double min_pixels) {
  Numbers size(p.B * p.N * p.C * p.windows());
  for (std::int64_t plane = 0; plane < p.B * p.N * p.C; ++plane) {
    p.for_pixels([&](std::int64_t pixel, int row, int column) {
      p.for_windows(row, column, [&](std::int64_t m, int) {
        size[plane * p.windows() + m] += masks[plane * p.pixels() + pixel];
      });
    });
  }
  for (double& n : size) n = n > min_pixels ? 1 / (n * static_cast<double>(p.N)) : 0;
  return size;
}

// Prototypes [B, C, G, D].
inline Numbers pool(const Problem& p, const Numbers& up, const Numbers& masks,
                    const Numbers& factor) {
  Numbers out(p.B * p.C * p.windows() * p.D);
  for (std::int64_t b = 0; b < p.B; ++b) {
    for (std::int64_t n = b * p.N; n < (b + 1) * p.N; ++n) {
      for (std::int64_t c = 0; c < p.C; ++c) {
        p.for_pixels([&](std::int64_t pixel, int row, int column) {
          const double mask = masks[(n * p.C + c) * p.pixels() + pixel];
          if (mask == 0) return;
          const double* u = &up[(n * p.pixels() + pixel) * p.D];
          p.for_windows(row, column, [&](std::int64_t m, int) {
            const double weight = mask * factor[(n * p.C + c) * p.windows() + m];
            double* to = &out[((b * p.C + c) * p.windows() + m) * p.D];
            for (std::int64_t d = 0; d < p.D; ++d) to[d] += weight * u[d];
          });
        });
      }
    }
  }
  return out;
}

// The gradient of the features [B, N, D, h, w], of that of the prototypes.
inline Numbers pool_backward(const Problem& p, const Numbers& masks, const Numbers& factor,
                             const Numbers& grad) {
  Numbers du(p.B * p.N * p.pixels() * p.D);
  for (std::int64_t n = 0; n < p.B * p.N; ++n) {
    for (std::int64_t c = 0; c < p.C; ++c) {
      p.for_pixels([&](std::int64_t pixel, int row, int column) {
        const double mask = masks[(n * p.C + c) * p.pixels() + pixel];
        if (mask == 0) return;
        double* to = &du[(n * p.pixels() + pixel) * p.D];
        p.for_windows(row, column, [&](std::int64_t m, int) {
          const double weight = mask * factor[(n * p.C + c) * p.windows() + m];
          const double* g = &grad[((n / p.N * p.C + c) * p.windows() + m) * p.D];
          for (std::int64_t d = 0; d < p.D; ++d) to[d] += weight * g[d];
        });
      });
    }
  }
  return upsample_backward(p, du, p.B * p.N);
}

inline double dot(const double* a, const double* b, std::int64_t D) {
  double sum = 0;
  for (std::int64_t d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

// Vectors [count, D] over their lengths, zero where these are below kEps; 1 / length, or 0.
inline Numbers unit(Numbers vectors, std::int64_t D, Numbers& inverse) {
  const std::int64_t count = static_cast<std::int64_t>(vectors.size()) / D;
  inverse.assign(count, 0);
  for (std::int64_t v = 0; v < count; ++v) {
    double* at = &vectors[v * D];
    const double square = dot(at, at, D);
    inverse[v] = square < kEps * kEps ? 0 : 1 / std::sqrt(square);
    for (std::int64_t d = 0; d < D; ++d) at[d] = inverse[v] == 0 ? 0 : at[d] * inverse[v];
  }
  return vectors;
}

struct Matched {
  Numbers directions, inverse;     // of features at pixels [B, N, H, W, D], [B, N, H, W]
  Numbers q, q_inverse;            // of prototypes [B, C, G, D], [B, C, G]
  Numbers scores;                  // [B, N, C, H, W]
  std::vector<int> winner, first;  // [B, N, C, H, W]: how it is written, and the window
};

inline Matched match(const Problem& p, const Numbers& up, const Numbers& prototypes, bool mean) {
  Matched out;
  out.directions = unit(up, p.D, out.inverse);
  out.q = unit(prototypes, p.D, out.q_inverse);
  out.scores.resize(p.B * p.N * p.C * p.pixels());
  out.winner.resize(out.scores.size());
  out.first.resize(out.scores.size());
  for (std::int64_t n = 0; n < p.B * p.N; ++n) {
    for (std::int64_t c = 0; c < p.C; ++c) {
      p.for_pixels([&](std::int64_t pixel, int row, int column) {
        const double* u = &out.directions[(n * p.pixels() + pixel) * p.D];
        const std::int64_t at = (n * p.C + c) * p.pixels() + pixel;
        double best = mean ? 0 : -std::numeric_limits<double>::infinity(), over = 0;
        p.for_windows(row, column, [&](std::int64_t m, int code) {
          const double value = dot(u, &out.q[((n / p.N * p.C + c) * p.windows() + m) * p.D], p.D);
          over += 1;
          if (mean) {
            best += value;
          } else if (value > best || std::isnan(value)) {
            best = value;
            out.winner[at] = code;
            out.first[at] = static_cast<int>(m);
          }
        });
        out.scores[at] = mean ? best / over : best;
      });
    }
  }
  return out;
}

struct MatchGradients {
  Numbers features;          // [B, N, D, h, w]
  Numbers prototypes;        // [B, C, G, D]
  double feature_scale = 0;  // how large they are made of, before anything cancels
  double prototype_scale = 0;
};

inline MatchGradients match_backward(const Problem& p, const Matched& of, bool mean,
                                     const Numbers& grad) {
  Numbers du(p.B * p.N * p.pixels() * p.D), dq(p.B * p.C * p.windows() * p.D);
  Numbers size(p.B * p.N * p.cells()), size_q(p.B * p.C * p.windows());
  for (std::int64_t n = 0; n < p.B * p.N; ++n) {
    for (std::int64_t c = 0; c < p.C; ++c) {
      p.for_pixels([&](std::int64_t pixel, int row, int column) {
        const std::int64_t at = (n * p.C + c) * p.pixels() + pixel, where = n * p.pixels() + pixel;
        const double over = static_cast<double>(p.y.windows_over[row].size()) *
                            static_cast<double>(p.x.windows_over[column].size());
        const double* u = &of.directions[where * p.D];
        p.for_windows(row, column, [&](std::int64_t m, int) {
          if (!mean && m != of.first[at]) return;
          const double g = mean ? grad[at] / over : grad[at];
          const std::int64_t v = (n / p.N * p.C + c) * p.windows() + m;
          const double* q = &of.q[v * p.D];
          const double score = dot(u, q, p.D);
          for (std::int64_t d = 0; d < p.D; ++d) {
            du[where * p.D + d] += g * (q[d] - score * u[d]) * of.inverse[where];
            dq[v * p.D + d] += g * u[d];
          }
          size_q[v] += std::abs(g);
          p.for_taps(row, column, [&](std::int64_t cell, double weight) {
            size[n * p.cells() + cell] += weight * std::abs(g) * of.inverse[where];
          });
        });
      });
    }
  }
  MatchGradients out;
  out.features = upsample_backward(p, du, p.B * p.N);
  out.prototypes.resize(dq.size());
  for (std::int64_t v = 0; v < p.B * p.C * p.windows(); ++v) {
    const double along = dot(&of.q[v * p.D], &dq[v * p.D], p.D);
    for (std::int64_t d = 0; d < p.D; ++d) {
      const double across = dq[v * p.D + d] - along * of.q[v * p.D + d];
      out.prototypes[v * p.D + d] = across * of.q_inverse[v];
    }
    out.prototype_scale = std::max(out.prototype_scale, size_q[v] * of.q_inverse[v]);
  }
  for (const double s : size) out.feature_scale = std::max(out.feature_scale, s);
  return out;
}

}  // namespace oracle
