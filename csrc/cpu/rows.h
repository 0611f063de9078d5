// Rows of features on their way between memory and the kernels.
//
// Kernels want the D channels of one location side by side, in the accumulation type, filled up
// with zeros to whole vectors. Features come with D outermost or innermost and in four dtypes. So
// they are packed a row of locations at a time, into a ring of as many rows as one band of tiles
// needs: each row is read once, and what is packed stays in the second cache.
#pragma once

#include "kernels.h"
#include "simd.h"

LSLPN_BEGIN
namespace cpu {

// Row i of image (b, n): w locations of D channels, `to[j * width + d]`, width >= D.
template <class T, class A>
inline void pack_row(const Features& f, std::int64_t b, std::int64_t n, std::int64_t i, A* to,
                     std::int64_t width) {
  constexpr int lanes = kLanes<A>;
  const std::int64_t sd = f.stride[2], sw = f.stride[4];
  const T* from =
      reinterpret_cast<const T*>(f.data) + b * f.stride[0] + n * f.stride[1] + i * f.stride[3];
  std::int64_t packed_channels = 0;
  if (sd == 1) {
    packed_channels = f.D / lanes * lanes;
    for (std::int64_t j = 0; j < f.w; ++j) {
      const T* p = from + j * sw;
      A* q = to + j * width;
      for (std::int64_t d = 0; d < packed_channels; d += lanes) store(q + d, load_as(p + d, A()));
    }
  } else if (sw == 1 && f.w >= lanes) {
    packed_channels = f.D / lanes * lanes;
    for (std::int64_t d = 0; d < packed_channels; d += lanes) {
      const T* p = from + d * sd;
      // The last block of locations is moved back so that it ends with the row.
      for (std::int64_t j = 0; j < f.w; j += lanes) {
        const std::int64_t first = j + lanes <= f.w ? j : f.w - lanes;
        Vec<A> v[lanes];
        for (int k = 0; k < lanes; ++k) v[k] = load_as(p + k * sd + first, A());
        transpose<A>(v);
        for (int k = 0; k < lanes; ++k) store(to + (first + k) * width + d, v[k]);
      }
    }
  }
  for (std::int64_t j = 0; j < f.w; ++j) {
    const T* p = from + j * sw;
    A* q = to + j * width;
    for (std::int64_t d = packed_channels; d < f.D; ++d) q[d] = widen(p[d * sd]);
    for (std::int64_t d = f.D; d < width; ++d) q[d] = A(0);
  }
}

// The way back: rounds to T.
template <class T, class A>
inline void unpack_row(const A* from, std::int64_t width, const Features& f, std::int64_t b,
                       std::int64_t n, std::int64_t i) {
  constexpr int lanes = kLanes<A>;
  const std::int64_t sd = f.stride[2], sw = f.stride[4];
  T* to = reinterpret_cast<T*>(f.data) + b * f.stride[0] + n * f.stride[1] + i * f.stride[3];
  std::int64_t done = 0;
  if (sd == 1) {
    done = f.D / lanes * lanes;
    for (std::int64_t j = 0; j < f.w; ++j) {
      for (std::int64_t d = 0; d < done; d += lanes) {
        store_as(to + j * sw + d, load(from + j * width + d));
      }
    }
  } else if (sw == 1 && f.w >= lanes) {
    done = f.D / lanes * lanes;
    for (std::int64_t d = 0; d < done; d += lanes) {
      for (std::int64_t j = 0; j < f.w; j += lanes) {
        const std::int64_t first = j + lanes <= f.w ? j : f.w - lanes;
        Vec<A> v[lanes];
        for (int k = 0; k < lanes; ++k) v[k] = load(from + (first + k) * width + d);
        transpose<A>(v);
        for (int k = 0; k < lanes; ++k) store_as(to + (d + k) * sd + first, v[k]);
      }
    }
  }
  for (std::int64_t j = 0; j < f.w; ++j) {
    for (std::int64_t d = done; d < f.D; ++d) {
      narrow(from[j * width + d], to[j * sw + d * sd]);
    }
  }
}

inline void pack_row(const Features& f, std::int64_t b, std::int64_t n, std::int64_t i, double* to,
                     std::int64_t width) {
  pack_row<double>(f, b, n, i, to, width);
}
inline void pack_row(const Features& f, std::int64_t b, std::int64_t n, std::int64_t i, float* to,
                     std::int64_t width) {
  switch (f.dtype) {
    case DType::float16:
      return pack_row<Half>(f, b, n, i, to, width);
    case DType::bfloat16:
      return pack_row<BFloat16>(f, b, n, i, to, width);
    default:
      return pack_row<float>(f, b, n, i, to, width);
  }
}
inline void unpack_row(const double* from, std::int64_t width, const Features& f, std::int64_t b,
                       std::int64_t n, std::int64_t i) {
  unpack_row<double>(from, width, f, b, n, i);
}
inline void unpack_row(const float* from, std::int64_t width, const Features& f, std::int64_t b,
                       std::int64_t n, std::int64_t i) {
  switch (f.dtype) {
    case DType::float16:
      return unpack_row<Half>(from, width, f, b, n, i);
    case DType::bfloat16:
      return unpack_row<BFloat16>(from, width, f, b, n, i);
    default:
      return unpack_row<float>(from, width, f, b, n, i);
  }
}

// A ring of rows: row i lies in slot i mod slots.
template <class A>
struct Ring {
  A* data;
  int slots;
  std::int64_t size;  // of a row

  A* row(std::int64_t i) const { return data + i % slots * size; }
  static std::int64_t bytes(int slots, std::int64_t size) {
    return slots * size * static_cast<std::int64_t>(sizeof(A));
  }
};

// Chunks. The segments of the rows are dealt into chunks, the units of parallel work; how many
// there are depends on the geometry alone, so that every sum has the same order whatever the number
// of threads. A feature row may lie under several chunks: each of them then leaves its part of the
// gradient in a buffer, and the parts are added in order when all are there.
struct Chunk {
  int first, last;    // segments first <= s < last
  int lower, upper;   // feature rows under them, both included
  int before, after;  // rows <= before lie under an earlier chunk too, rows >= after under a later
  int begin, end;     // rows begin <= i < end are this chunk's own to write; among them are those
                      // between the chunks that no pixel needs

  bool shares(int i) const { return i <= before || i >= after; }

  // How many rows are shared, and the place of one among them.
  int shared() const { return heads() + tails(); }
  int place(int i) const { return i <= before ? i - lower : heads() + i - tail(); }

 private:
  int heads() const { return before < lower ? 0 : (before < upper ? before : upper) - lower + 1; }
  int tail() const { return after > lower + heads() ? after : lower + heads(); }
  int tails() const { return upper < tail() ? 0 : upper - tail() + 1; }
};

template <class A>
inline Chunk chunk_of(const AxisTables<A>& y, int k) {
  const bool final = k + 1 == y.chunks;
  Chunk c;
  c.first = y.chunk[k];
  c.last = y.chunk[k + 1];
  c.lower = y.segment[c.first].lower;
  c.upper = y.segment[c.last - 1].upper;
  c.before = k > 0 ? y.segment[c.first - 1].upper : -1;
  c.after = final ? y.cells : y.segment[c.last].lower;
  c.begin = c.before + 1;
  c.end = final ? y.cells : (c.after < c.upper + 1 ? c.after : c.upper + 1);
  return c;
}

}  // namespace cpu
LSLPN_END
