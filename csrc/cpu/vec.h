// Vectors of the compiler's own kind (GCC vector extensions), so one source serves every
// instruction set: Vec<A> has W<A> lanes and is CAPSROUTE_VECTOR_BYTES wide. Everything lives in a
// namespace named after the instruction set, so that the linker can never mix two of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "routing.h"

#define CAPSROUTE_INLINE inline __attribute__((always_inline))

namespace capsroute::CAPSROUTE_ISA {

template <class E, int bytes>
struct VecOf {
  typedef E type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VecOf<A, CAPSROUTE_VECTOR_BYTES>::type;
template <class A>
using HalfVec = typename VecOf<A, CAPSROUTE_VECTOR_BYTES / 2>::type;
template <class A>
inline constexpr int64_t W = CAPSROUTE_VECTOR_BYTES / sizeof(A);

template <class A>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
// Lane masks and exponents: integers as wide as A.
template <class A>
using Mask = Vec<typename IntOf<A>::type>;

template <class To, class From>
CAPSROUTE_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class A>
CAPSROUTE_INLINE V all_as(A x) {
  return [x]<size_t... l>(std::index_sequence<l...>) {
    return V{(static_cast<void>(l), x)...};
  }(std::make_index_sequence<sizeof(V) / sizeof(A)>());
}

template <class A>
CAPSROUTE_INLINE Vec<A> all(A x) {
  return all_as<Vec<A>>(x);
}

// True in the first `count` lanes.
template <class A>
CAPSROUTE_INLINE Mask<A> first_lanes(int64_t count) {
  return [count]<size_t... l>(std::index_sequence<l...>) {
    return Mask<A>{typename IntOf<A>::type(l)...} < typename IntOf<A>::type(count);
  }(std::make_index_sequence<W<A>>());
}

// The logit of a pair that takes no part, and the largest of no logits.
template <class A>
inline constexpr A kForbidden = -A(__builtin_inf());

template <class A>
CAPSROUTE_INLINE void set_zero(A* to, int64_t count) {
  __builtin_memset(to, 0, count * sizeof(A));
}

// Storage types, one value at a time.

CAPSROUTE_INLINE float to_acc(float x) { return x; }
CAPSROUTE_INLINE double to_acc(double x) { return x; }
CAPSROUTE_INLINE float to_acc(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
CAPSROUTE_INLINE float to_acc(Half x) {
  // Exponent and mantissa moved into a float's place, rescaled by 2^(127-15); denormals come right.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float value = bits_as<float>(magnitude) * 0x1p112f;
  if (magnitude >= 0x0f800000) value = bits_as<float>(magnitude | 0x7f800000);  // inf and NaN
  return bits_as<float>(bits_as<uint32_t>(value) | uint32_t(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even.
template <class X>
X from_acc(Acc<X> x);
template <>
CAPSROUTE_INLINE float from_acc<float>(float x) {
  return x;
}
template <>
CAPSROUTE_INLINE double from_acc<double>(double x) {
  return x;
}
template <>
CAPSROUTE_INLINE BFloat16 from_acc<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
CAPSROUTE_INLINE Half from_acc<Half>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7e00};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to inf
  if (magnitude < 0x38800000) {                                   // a half denormal: let the float adder round at 2^-24
    const float rounded = bits_as<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bits_as<uint32_t>(rounded) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

// Loads and stores of W values, converting.

template <class A>
CAPSROUTE_INLINE Vec<A> load(const A* p) {
  Vec<A> x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

// `count` <= W numbers, and zeros after them: nothing past the last one is read.
template <class A>
CAPSROUTE_INLINE Vec<A> load_some(const A* p, int64_t count) {
#if defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(A) == 8) return bits_as<Vec<A>>(_mm512_maskz_loadu_pd(__mmask8(lanes), p));
  return bits_as<Vec<A>>(_mm512_maskz_loadu_ps(__mmask16(lanes), p));
#elif defined(__AVX2__) && CAPSROUTE_VECTOR_BYTES == 32
  const __m256i lanes = bits_as<__m256i>(first_lanes<A>(count));
  if constexpr (sizeof(A) == 8) return bits_as<Vec<A>>(_mm256_maskload_pd(reinterpret_cast<const double*>(p), lanes));
  return bits_as<Vec<A>>(_mm256_maskload_ps(reinterpret_cast<const float*>(p), lanes));
#else
  Vec<A> x{};
  for (int64_t l = 0; l < count; ++l) x[l] = p[l];
  return x;
#endif
}

using Vec16 = typename VecOf<uint16_t, CAPSROUTE_VECTOR_BYTES / 2>::type;
using Vec32 = Vec<uint32_t>;

CAPSROUTE_INLINE Vec<float> widened(Vec16 bits, BFloat16) {
  // GCC 12 makes four instructions of what is one to widen with.
#if defined(__AVX2__) && CAPSROUTE_VECTOR_BYTES == 32
  const Vec32 wide = bits_as<Vec32>(_mm256_cvtepu16_epi32(bits_as<__m128i>(bits)));
#elif defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  const Vec32 wide = bits_as<Vec32>(_mm512_cvtepu16_epi32(bits_as<__m256i>(bits)));
#else
  const Vec32 wide = __builtin_convertvector(bits, Vec32);
#endif
  return bits_as<Vec<float>>(wide << 16);
}

CAPSROUTE_INLINE Vec<float> widened(Vec16 bits, Half) {
#if defined(__F16C__) && CAPSROUTE_VECTOR_BYTES == 32
  return bits_as<Vec<float>>(_mm256_cvtph_ps(bits_as<__m128i>(bits)));
#elif defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  return bits_as<Vec<float>>(_mm512_cvtph_ps(bits_as<__m256i>(bits)));
#else
  Vec<float> x;
  for (int64_t l = 0; l < W<float>; ++l) x[l] = to_acc(Half{bits[l]});
  return x;
#endif
}

CAPSROUTE_INLINE Vec16 load_bits(const void* p) {
  Vec16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits;
}
CAPSROUTE_INLINE Vec<float> load(const BFloat16* p) { return widened(load_bits(p), *p); }
CAPSROUTE_INLINE Vec<float> load(const Half* p) { return widened(load_bits(p), *p); }

template <class A>
CAPSROUTE_INLINE void store(A* p, Vec<A> x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

// Past the caches, for large memory that is written once and not read soon: a plain store would read
// it first. p is aligned to a vector V. Other threads may read it after finish_stores().
template <class A, class V>
CAPSROUTE_INLINE void store_past(A* p, V x) {
#if defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_as<__m512i>(x));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(x));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(x));
#endif
  __builtin_memcpy(p, &x, sizeof(x));
}

CAPSROUTE_INLINE void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

CAPSROUTE_INLINE void store(BFloat16* p, Vec<float> x) {
  const Vec32 bits = bits_as<Vec32>(x);
  const Vec32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Vec16 narrow = __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Vec16);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

CAPSROUTE_INLINE void store(Half* p, Vec<float> x) {
#if defined(__F16C__) && CAPSROUTE_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bits_as<__m256>(x), 0));
#elif defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bits_as<__m512>(x), 0));
#else
  for (int64_t l = 0; l < W<float>; ++l) p[l] = from_acc<Half>(x[l]);
#endif
}

// The same for vectors V that are whole or half ones; halves are not converted.
template <class V, class X>
CAPSROUTE_INLINE V load_as(const X* p) {
  if constexpr (sizeof(V) == CAPSROUTE_VECTOR_BYTES) return load(p);
  V x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

template <class V, class X>
CAPSROUTE_INLINE void store_as(X* p, V x) {
  if constexpr (sizeof(V) == CAPSROUTE_VECTOR_BYTES)
    store(p, x);
  else
    __builtin_memcpy(p, &x, sizeof(x));
}

// out[k] = in[k * stride] for k < n, then zeros up to `padded`.
template <class X, class A>
CAPSROUTE_INLINE void widen(A* out, const X* in, int64_t stride, int64_t n, int64_t padded) {
  int64_t k = 0;
  if constexpr (std::is_same_v<Acc<X>, A>)
    if (stride == 1) {
      for (; k + W<A> <= n; k += W<A>) store(out + k, load(in + k));
      for (; k < n; ++k) out[k] = to_acc(in[k]);
    }
  for (; k < n; ++k) out[k] = to_acc(in[k * stride]);
  for (; k < padded; ++k) out[k] = 0;
}

template <class X>
CAPSROUTE_INLINE void narrow(X* out, const Acc<X>* in, int64_t n) {
  int64_t k = 0;
  for (; k + W<Acc<X>> <= n; k += W<Acc<X>>) store(out + k, load(in + k));
  for (; k < n; ++k) out[k] = from_acc<X>(in[k]);
}

template <class X>
  requires(!std::is_same_v<X, double>)
CAPSROUTE_INLINE void narrow(X* out, const double* in, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = from_acc<X>(float(in[k]));
}

// Arithmetic across lanes and beyond + - * /.

template <class A, int64_t... l>
CAPSROUTE_INLINE Vec<A> pick(Vec<A> a, Vec<A> b, std::integer_sequence<int64_t, l...>) {
  return __builtin_shuffle(a, b, Mask<A>{typename IntOf<A>::type(l)...});
}

// Adds neighbours at distance m: where lane l lacks bit m, a[l] + a[l^m]; where it has it, b[l] + b[l^m].
template <class A, int64_t m>
CAPSROUTE_INLINE Vec<A> add_pairs(Vec<A> a, Vec<A> b) {
  return [&]<int64_t... l>(std::integer_sequence<int64_t, l...>) {
    return pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? W<A> + l : l)...>()) +
           pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? W<A> + (l ^ m) : l ^ m)...>());
  }(std::make_integer_sequence<int64_t, W<A>>());
}

// N vectors to one whose lane l < N is the sum over the lanes of x[l]: a transpose and sums, in N - 1 additions and one
// for each time that N doubles to W. The order of a sum does not depend on N.
template <class A, int64_t N = W<A>, int64_t m = 1>
CAPSROUTE_INLINE Vec<A> sum_each(Vec<A>* x) {
  if constexpr (m == W<A>) {
    return x[0];
  } else {
    constexpr int64_t pairs = N / (2 * m);
#pragma GCC unroll 8
    for (int64_t k = 0; k < pairs; ++k) x[k] = add_pairs<A, m>(x[2 * k], x[2 * k + 1]);
    if constexpr (pairs == 0) x[0] = add_pairs<A, m>(x[0], x[0]);
    return sum_each<A, N, 2 * m>(x);
  }
}

// W vectors, of which x[k][l] and x[l][k] change places.
template <class A, int64_t m = 1>
CAPSROUTE_INLINE void transpose(Vec<A>* x) {
  if constexpr (m < W<A>) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < W<A>; ++k) {
      if (k & m) continue;
      const Vec<A> a = x[k], b = x[k | m];
      [&]<int64_t... l>(std::integer_sequence<int64_t, l...>) {
        x[k] = pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? W<A> + (l ^ m) : l)...>());
        x[k | m] = pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? W<A> + l : l ^ m)...>());
      }(std::make_integer_sequence<int64_t, W<A>>());
    }
    transpose<A, 2 * m>(x);
  }
}

// Asks for what will be read, for the second-level cache: measured, what is asked for in the first comes more slowly
// from memory. Were this not inlined, GCC would see a function without effect, and drop the call.
template <class T>
CAPSROUTE_INLINE void ask_for(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// x itself, rounded: what the compiler cannot see through, it cannot make part of an fma.
template <class A>
CAPSROUTE_INLINE Vec<A> rounded(Vec<A> x) {
#if defined(__AVX512F__) || (defined(__x86_64__) && CAPSROUTE_VECTOR_BYTES < 64)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// A pointer of which the compiler knows nothing.
template <class T>
CAPSROUTE_INLINE T* opaque(T* p) {
  asm("" : "+r"(p));
  return p;
}

template <class M>
CAPSROUTE_INLINE bool any(M mask) {
  bool found = false;
  for (size_t l = 0; l < sizeof(mask) / sizeof(mask[0]); ++l) found |= mask[l] != 0;
  return found;
}

template <class V>
CAPSROUTE_INLINE auto sum_lanes(V x) {
  auto sum = x[0];
  for (size_t l = 1; l < sizeof(x) / sizeof(x[0]); ++l) sum += x[l];
  return sum;
}

// 1 / k! for k = 0 .. 13
template <class A>
struct InverseFactorials {
  A of[14] = {1};
  constexpr InverseFactorials() {
    double value = 1;
    for (int k = 1; k < 14; ++k) of[k] = A(value /= k);
  }
};

// exp(x) for x <= 0 and NaN; below the smallest normal number it is 0. With x = n ln 2 + r and
// |r| <= ln 2 / 2, exp(x) = 2^n exp(r), and exp(r) is its Taylor series (7 terms err by 5e-9 in
// float, 13 by 4e-18 in double).
template <class A>
CAPSROUTE_INLINE Vec<A> exp_negative(Vec<A> x) {
  constexpr bool wide = sizeof(A) == 8;
  constexpr A lowest = wide ? -708.39 : -87.33654;
  constexpr A magic = wide ? 0x1.8p52 : 0x1.8p23;               // adding it rounds to an integer
  constexpr A ln2_high = wide ? 0x1.62e42feep-1 : 0x1.62e4p-1;  // n * ln2_high is exact
  constexpr A ln2_low = wide ? 0x1.a39ef35793c76p-33 : 0x1.7f7d1cp-20;
  constexpr int mantissa = wide ? 52 : 23, bias = wide ? 1023 : 127, terms = wide ? 13 : 7;
  const Vec<A> clamped = x < lowest ? all<A>(lowest) : x;  // keeps NaN
  const Vec<A> shifted = clamped * A(1.4426950408889634) + magic;
  const Vec<A> n = shifted - magic;
  const Vec<A> r = (clamped - n * ln2_high) - n * ln2_low;
  constexpr InverseFactorials<A> coefficient;
  Vec<A> series = all<A>(coefficient.of[terms]);
#pragma GCC unroll 16
  for (int k = terms - 1; k >= 0; --k) series = series * r + coefficient.of[k];
  const Mask<A> exponent = bits_as<Mask<A>>(shifted) - bits_as<Mask<A>>(all<A>(magic)) + bias;
  return x < lowest ? all<A>(0) : series * bits_as<Vec<A>>(exponent << mantissa);
}

}  // namespace capsroute::CAPSROUTE_ISA
