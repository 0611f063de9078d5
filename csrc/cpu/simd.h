// Vectors of the instruction set that this file is compiled for, as the vector types that gcc and
// clang have in common.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../core/arithmetic.h"
#include "../core/dtype.h"

LSLPN_BEGIN
namespace cpu {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float memory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef std::int32_t whole;
  typedef whole index __attribute__((vector_size(kVectorBytes)));
  typedef whole index_memory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef std::uint8_t bytes __attribute__((vector_size(kVectorBytes / 4)));
  typedef std::int32_t ints __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double memory __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef std::int64_t whole;
  typedef whole index __attribute__((vector_size(kVectorBytes)));
  typedef whole index_memory __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef std::uint8_t bytes __attribute__((vector_size(kVectorBytes / 8)));
  typedef std::int32_t ints __attribute__((vector_size(kVectorBytes / 2)));
};

// A vector of A; a vector of integers of the same width; such an integer; and the number of lanes.
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
using Index = typename VectorOf<A>::index;
template <class A>
using Whole = typename VectorOf<A>::whole;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// Rows of numbers are zero-padded to a multiple of this.
constexpr int kPadding = 16;
constexpr std::int64_t padded(std::int64_t n) {
  return (n + kPadding - 1) / kPadding * kPadding;
}

// The distance between locations in a ring of rows: `width` plus a cache line. Otherwise, D = 256
// would map all locations to the same few sets of the L1 cache.
template <class A>
constexpr std::int64_t pitch_of(std::int64_t width) {
  return width + 64 / static_cast<std::int64_t>(sizeof(A));
}

template <class A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::memory*>(p);
}

template <class A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VectorOf<A>::memory*>(p) = v;
}

template <class A>
inline Index<A> load_index(const Whole<A>* p) {
  return *reinterpret_cast<const typename VectorOf<A>::index_memory*>(p);
}

template <class A>
inline void store_index(Whole<A>* p, Index<A> v) {
  *reinterpret_cast<typename VectorOf<A>::index_memory*>(p) = v;
}

// Lanes of 32 bits from and to memory with 8 or 16 bits per element; narrowed values must fit. gcc
// compiles __builtin_convertvector to element-wise code here.
typedef VectorOf<float>::index Ints;

inline Ints widen_bytes(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#elif defined(__SSE2__)
  std::int32_t four;
  std::memcpy(&four, p, sizeof four);
  const __m128i zero = _mm_setzero_si128();
  const __m128i shorts = _mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero);
  return reinterpret_cast<Ints>(_mm_unpacklo_epi16(shorts, zero));
#else
  Ints v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<const std::uint8_t*>(p)[i];
  return v;
#endif
}

inline void narrow_bytes(void* p, Ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(v);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(shorts, shorts));
#elif defined(__SSE2__)
  const __m128i x = reinterpret_cast<__m128i>(v);
  const __m128i shorts = _mm_packs_epi32(x, x);
  const std::int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
  std::memcpy(p, &four, sizeof four);
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    static_cast<std::uint8_t*>(p)[i] = static_cast<std::uint8_t>(v[i]);
  }
#endif
}

inline Ints widen_shorts(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__SSE2__)
  const __m128i shorts = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return reinterpret_cast<Ints>(_mm_unpacklo_epi16(shorts, _mm_setzero_si128()));
#else
  Ints v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<const std::uint16_t*>(p)[i];
  return v;
#endif
}

inline void narrow_shorts(void* p, Ints v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(v);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    static_cast<std::uint16_t*>(p)[i] = static_cast<std::uint16_t>(v[i]);
  }
#endif
}

// The first n lanes only; the others are 0.
template <class A>
inline Vec<A> load(const A* p, int n) {
  if (n >= kLanes<A>) return load(p);
  Vec<A> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class A>
inline void store(A* p, Vec<A> v, int n) {
  if (n >= kLanes<A>) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

// The first n lanes of integers in memory, uint8 (`bytes`) or int32.
template <class A>
inline Index<A> load_index(const void* p, bool bytes, int n) {
  if (n < kLanes<A>) {
    Index<A> v{};
    for (int i = 0; i < n; ++i) {
      v[i] =
          bytes ? static_cast<const std::uint8_t*>(p)[i] : static_cast<const std::int32_t*>(p)[i];
    }
    return v;
  }
  if constexpr (sizeof(A) == 4) {
    return bytes ? widen_bytes(p) : load_index<A>(static_cast<const Whole<A>*>(p));
  }
  if (bytes) {
    typename VectorOf<A>::bytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Index<A>);
  }
  typename VectorOf<A>::ints v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Index<A>);
}

template <class A>
inline void store_index(void* p, bool bytes, Index<A> v, int n) {
  if (n < kLanes<A>) {
    for (int i = 0; i < n; ++i) {
      if (bytes) {
        static_cast<std::uint8_t*>(p)[i] = static_cast<std::uint8_t>(v[i]);
      } else {
        static_cast<std::int32_t*>(p)[i] = static_cast<std::int32_t>(v[i]);
      }
    }
  } else if constexpr (sizeof(A) == 4) {
    if (bytes) {
      narrow_bytes(p, v);
    } else {
      store_index<A>(static_cast<Whole<A>*>(p), v);
    }
  } else if (bytes) {
    const auto narrow = __builtin_convertvector(v, typename VectorOf<A>::bytes);
    std::memcpy(p, &narrow, sizeof narrow);
  } else {
    const auto narrow = __builtin_convertvector(v, typename VectorOf<A>::ints);
    std::memcpy(p, &narrow, sizeof narrow);
  }
}

template <class A>
inline Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

#if defined(__clang__)
#define LSLPN_SHUFFLE(A, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LSLPN_SHUFFLE(A, a, b, ...) __builtin_shuffle(a, b, Index<A>{__VA_ARGS__})
#endif

// Interleaves groups of `half` lanes: the lower (Upper = 0) or upper (1) group of each pair of
// groups of a, then of b.
template <class A, int half, int upper, int... lane>
inline Vec<A> pick_groups(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
  return LSLPN_SHUFFLE(A, a, b,
                       (lane / (2 * half) * (2 * half) + upper * half + lane % half +
                        (lane / half % 2) * kLanes<A>)...);
}

// Sums over the lanes of many vectors at once: lane j of the result is the sum of v[j]. Every sum
// has the same order, whatever its lane, so equal vectors have equal sums.
template <class A, int n = kLanes<A>>
inline Vec<A> lane_sums(const Vec<A>* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    const Vec<A> a = lane_sums<A, n / 2>(v);
    const Vec<A> b = lane_sums<A, n / 2>(v + n / 2);
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
    return pick_groups<A, n / 2, 0>(a, b, lanes) + pick_groups<A, n / 2, 1>(a, b, lanes);
  }
}

// Transposes a square of as many vectors as there are lanes.
template <class A, int half = kLanes<A> / 2>
inline void transpose(Vec<A>* v) {
  if constexpr (half >= 1) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & half) continue;
      const Vec<A> a = v[i];
      const Vec<A> b = v[i + half];
      v[i] = pick_groups<A, half, 0>(a, b, lanes);
      v[i + half] = pick_groups<A, half, 1>(a, b, lanes);
    }
    transpose<A, half / 2>(v);
  }
}

// Features of any dtype, read as and rounded from a vector of A.
inline Vec<double> load_as(const double* p, double) {
  return load(p);
}
inline Vec<float> load_as(const float* p, float) {
  return load(p);
}
inline Vec<float> load_as(const BFloat16* p, float) {
  return reinterpret_cast<Vec<float>>(widen_shorts(p) << 16);
}
inline Vec<float> load_as(const Half* p, float) {
  Vec<float> v;
#if defined(__AVX512F__)
  v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
#endif
  return v;
}

inline void store_as(double* p, Vec<double> v) {
  store(p, v);
}
inline void store_as(float* p, Vec<float> v) {
  store(p, v);
}
inline void store_as(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(v[i], p[i]);
#endif
}
inline void store_as(BFloat16* p, Vec<float> v) {
  // See narrow(float, BFloat16&) in core/dtype.h; v != v for NaN.
  const Ints bits = reinterpret_cast<Ints>(v);
  const Ints rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
  const Ints quiet = (bits >> 16 & 0xffff) | 0x40;
  narrow_shorts(p, v != v ? quiet : rounded);
}

}  // namespace cpu
LSLPN_END
