// Reading and writing rows of features.
//
// The kernels need the D channels of a location to be contiguous, in the accumulation type, and
// zero-padded to whole vectors. Features have D outermost or innermost, in one of four dtypes. So
// they are packed, a few rows of locations at a time, into a ring buffer of as many rows as a band
// of tiles needs: each row is read once, and packed rows stay in the L2 cache.
#pragma once

#include "kernels.h"
#include "simd.h"

LSLPN_BEGIN
namespace cpu {

// A ring buffer of rows: row i is in slot i mod slots.
template <class A>
struct Ring {
  A* data;
  int slots;
  std::int64_t size;  // of a row

  A* row(std::int64_t i) const { return data + static_cast<int>(i) % slots * size; }
};

template <class T>
inline T* image_of(const Features& f, std::int64_t b, std::int64_t n) {
  return reinterpret_cast<T*>(f.data) + b * f.stride[0] + n * f.stride[1];
}

// The number of rows i, i + 1, ... < last that follow each other in an image with D outermost and
// where they are packed, `row(i)`: together they are one long row.
template <class Row>
inline std::int64_t adjacent(const Features& f, Row row, std::int64_t pitch, std::int64_t i,
                             std::int64_t last) {
  std::int64_t n = 1;
  if (f.stride[3] != f.w || !row(i)) return n;
  while (i + n < last && row(i + n) == row(i) + n * f.w * pitch) ++n;
  return n;
}

// Packs rows first <= i < last of image (b, n) into a ring: `row(i)[j * pitch + d]`, zero-padded to
// `width`.
//
// If D is outermost, blocks of channels by locations are transposed in registers. All rows of a
// channel are read before those of the next, since one row is only a few cache lines of a page. The
// next channels are prefetched, because the hardware prefetcher does not cross page boundaries.
template <class T, class A>
inline void pack_as(const Features& f, std::int64_t b, std::int64_t n, std::int64_t first,
                    std::int64_t last, const Ring<A>& to, std::int64_t width) {
  const std::int64_t pitch = pitch_of<A>(width);
  constexpr int lanes = kLanes<A>;
  const std::int64_t sd = f.stride[2], sh = f.stride[3], sw = f.stride[4];
  const T* const image = image_of<const T>(f, b, n);
  std::int64_t packed_channels = 0;
  if (sd == 1) {
    packed_channels = f.D / lanes * lanes;
    for (std::int64_t i = first; i < last; ++i) {
      for (std::int64_t j = 0; j < f.w; ++j) {
        const T* p = image + i * sh + j * sw;
        A* q = to.row(i) + j * pitch;
        for (std::int64_t d = 0; d < packed_channels; d += lanes) store(q + d, load_as(p + d, A()));
      }
    }
  } else if (sw == 1 && f.w >= lanes) {
    packed_channels = f.D / lanes * lanes;
    for (std::int64_t d = 0; d < packed_channels; d += lanes) {
      const std::int64_t ahead = d + lanes < packed_channels ? lanes * sd : 0;
      for (std::int64_t i = first, rows; i < last; i += rows) {
        rows = adjacent(f, [&to](std::int64_t k) { return to.row(k); }, pitch, i, last);
        const std::int64_t length = rows * f.w;
        const T* p = image + i * sh + d * sd;
        A* q = to.row(i) + d;
        // The last square is moved back to end with the rows.
        for (std::int64_t j = 0; j < length; j += lanes) {
          const std::int64_t at = j + lanes <= length ? j : length - lanes;
          Vec<A> v[lanes];
          for (int k = 0; k < lanes; ++k) {
            v[k] = load_as(p + k * sd + at, A());
            __builtin_prefetch(p + k * sd + at + ahead);
          }
          transpose<A>(v);
          for (int k = 0; k < lanes; ++k) store(q + (at + k) * pitch, v[k]);
        }
      }
    }
  }
  for (std::int64_t i = first; i < last; ++i) {
    for (std::int64_t j = 0; j < f.w; ++j) {
      const T* p = image + i * sh + j * sw;
      A* q = to.row(i) + j * pitch;
      for (std::int64_t d = packed_channels; d < f.D; ++d) q[d] = widen(p[d * sd]);
      for (std::int64_t d = f.D; d < width; ++d) q[d] = A(0);
    }
  }
}

// The reverse, rounded to T: from `row(i)[j * pitch + d]`, or zeros if row(i) is null.
template <class T, class A, class Row>
inline void unpack_as(Row row, std::int64_t pitch, const Features& f, std::int64_t b,
                      std::int64_t n, std::int64_t first, std::int64_t last) {
  constexpr int lanes = kLanes<A>;
  const std::int64_t sd = f.stride[2], sh = f.stride[3], sw = f.stride[4];
  T* const image = image_of<T>(f, b, n);
  std::int64_t done = 0;
  if (sd == 1) {
    done = f.D / lanes * lanes;
    for (std::int64_t i = first; i < last; ++i) {
      const A* from = row(i);
      for (std::int64_t j = 0; j < f.w; ++j) {
        T* p = image + i * sh + j * sw;
        for (std::int64_t d = 0; d < done; d += lanes) {
          store_as(p + d, from ? load(from + j * pitch + d) : Vec<A>{});
        }
      }
    }
  } else if (sw == 1 && f.w >= lanes) {
    done = f.D / lanes * lanes;
    for (std::int64_t d = 0; d < done; d += lanes) {
      const std::int64_t ahead = d + lanes < done ? lanes * sd : 0;
      for (std::int64_t i = first, rows; i < last; i += rows) {
        rows = adjacent(f, row, pitch, i, last);
        const std::int64_t length = rows * f.w;
        const A* from = row(i);
        T* p = image + i * sh + d * sd;
        for (std::int64_t j = 0; j < length; j += lanes) {
          const std::int64_t at = j + lanes <= length ? j : length - lanes;
          Vec<A> v[lanes] = {};
          if (from) {
            for (int k = 0; k < lanes; ++k) v[k] = load(from + (at + k) * pitch + d);
            transpose<A>(v);
          }
          for (int k = 0; k < lanes; ++k) {
            store_as(p + k * sd + at, v[k]);
            __builtin_prefetch(p + k * sd + at + ahead, 1);
          }
        }
      }
    }
  }
  for (std::int64_t i = first; i < last; ++i) {
    const A* from = row(i);
    for (std::int64_t j = 0; j < f.w; ++j) {
      for (std::int64_t d = done; d < f.D; ++d) {
        narrow(from ? from[j * pitch + d] : A(0), image[i * sh + j * sw + d * sd]);
      }
    }
  }
}

inline void pack(const Features& f, std::int64_t b, std::int64_t n, std::int64_t first,
                 std::int64_t last, const Ring<double>& to, std::int64_t width) {
  pack_as<double>(f, b, n, first, last, to, width);
}
inline void pack(const Features& f, std::int64_t b, std::int64_t n, std::int64_t first,
                 std::int64_t last, const Ring<float>& to, std::int64_t width) {
  switch (f.dtype) {
    case DType::float16:
      return pack_as<Half>(f, b, n, first, last, to, width);
    case DType::bfloat16:
      return pack_as<BFloat16>(f, b, n, first, last, to, width);
    default:
      return pack_as<float>(f, b, n, first, last, to, width);
  }
}

template <class A, class Row>
inline void unpack(Row row, std::int64_t pitch, const Features& f, std::int64_t b, std::int64_t n,
                   std::int64_t first, std::int64_t last) {
  if constexpr (sizeof(A) == 8) {
    unpack_as<double, A>(row, pitch, f, b, n, first, last);
  } else {
    switch (f.dtype) {
      case DType::float16:
        return unpack_as<Half, A>(row, pitch, f, b, n, first, last);
      case DType::bfloat16:
        return unpack_as<BFloat16, A>(row, pitch, f, b, n, first, last);
      default:
        return unpack_as<float, A>(row, pitch, f, b, n, first, last);
    }
  }
}

// Chunks of row segments are the units of parallel work. Their number depends only on the geometry,
// so every sum has the same order for any number of threads. If chunks share a feature row, each
// writes its part of the gradient to a buffer, and the parts are added in order at the end.
struct Chunk {
  int first, last;    // segments first <= s < last
  int lower, upper;   // feature rows under them, inclusive
  int before, after;  // rows <= before are shared with an earlier chunk, rows >= after with a later
  int begin, end;     // rows begin <= i < end are written by this chunk, including those between
                      // chunks that no pixel needs

  bool shares(int i) const { return i <= before || i >= after; }

  // The number of shared rows, and the index of one among them.
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

// The numbers of all parts of an image, and where those of chunk k begin; rows have `size` numbers.
template <class A>
inline std::int64_t part_offset(const AxisTables<A>& y, int k, std::int64_t size) {
  std::int64_t rows = 0;
  for (int i = 0; i < k; ++i) rows += chunk_of(y, i).shared();
  return rows * size;
}

// Row i of a gradient, if chunks share it, otherwise null: the sum of their parts, in order, in
// `sum` or, of a single part, in place.
template <class A>
inline const A* sum_parts(const AxisTables<A>& y, int i, std::int64_t size, const A* parts,
                          A* sum) {
  const A* found = nullptr;
  for (int k = 0; k < y.chunks; ++k) {
    const Chunk chunk = chunk_of(y, k);
    if (i >= chunk.lower && i <= chunk.upper && chunk.shares(i)) {
      const A* part = parts + chunk.place(i) * size;
      for (std::int64_t d = 0; found && d < size; d += kLanes<A>) {
        store(sum + d, load(found + d) + load(part + d));
      }
      found = found ? sum : part;
    }
    parts += chunk.shared() * size;
  }
  return found;
}

// The rows of a gradient while they are accumulated over one chunk. Its own rows are in a ring
// until they are written, shared ones in `parts`, [shared rows, w, pitch].
template <class A>
struct GradientRows {
  Ring<A> ring;
  A* parts = nullptr;
  Chunk chunk{};
  bool gaps = false;  // columns that no tile touches
  int run = 0;        // rows run .. opened are open
  int opened = -1;
  int fresh = 0;    // rows from here on have not been touched by the previous band
  int written = 0;  // rows below this are finished

  void start(const AxisTables<A>& x, const Chunk& c, A* shared) {
    parts = shared;
    chunk = c;
    gaps = x.gaps;
    written = c.begin < c.lower ? c.begin : c.lower;
    run = c.lower;
    opened = c.lower - 1;
  }

  A* row(std::int64_t i) const {
    const int k = static_cast<int>(i);
    return chunk.shares(k) ? parts + chunk.place(k) * ring.size : ring.row(i);
  }
  bool is_open(std::int64_t i) const { return run <= i && i <= opened; }

  // Opens the rows lower .. upper of a band; they are not cleared, see touch().
  void open(int lower, int upper) {
    if (lower > opened + 1) run = lower;
    fresh = opened + 1 > lower ? opened + 1 : lower;
    for (int i = fresh; gaps && i <= upper; ++i) std::memset(row(i), 0, sizeof(A) * ring.size);
    if (upper > opened) opened = upper;
  }

  // The locations of a tile, and which of them are fresh: not touched by a tile of an earlier band
  // or further to the left, and so not initialised.
  void touch(int lower, int rows, const AxisTables<A>& x, int sx, std::int64_t pitch, A** location,
             bool* is_fresh) const {
    const Segment& columns = x.segment[sx];
    const int first_fresh = sx > 0 ? x.segment[sx - 1].upper + 1 : 0;
    for (int i = lower, l = 0; i < lower + rows; ++i) {
      for (int j = columns.lower; j <= columns.upper; ++j, ++l) {
        location[l] = row(i) + j * pitch;
        is_fresh[l] = !gaps && i >= fresh && j >= first_fresh;
      }
    }
  }

  // Writes the rows below `end`, which no later tile touches, to f.
  void write(const Features& f, std::int64_t pitch, std::int64_t b, std::int64_t n, int end) {
    while (written < end && chunk.shares(written)) ++written;
    int own = written;
    while (own < end && !chunk.shares(own)) ++own;
    unpack<A>([this](std::int64_t i) { return is_open(i) ? ring.row(i) : nullptr; }, pitch, f, b, n,
              written, own);
    written = end;
  }
};

}  // namespace cpu
LSLPN_END
