// Vectors of the compiler's own kind (GCC vector extensions), so one source serves every
// instruction set: Vec<A> has L<A> lanes and is CAPSROUTE_VECTOR_BYTES wide. Everything lives in a
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
inline constexpr int64_t L = CAPSROUTE_VECTOR_BYTES / sizeof(A);  // lanes

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

template <class To>
CAPSROUTE_INLINE To bits_at(const void* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(To));
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
  }(std::make_index_sequence<L<A>>());
}

// The logit of a pair that takes no part, and the largest of no logits.
template <class A>
inline constexpr A kForbidden = -A(__builtin_inf());

template <class A>
CAPSROUTE_INLINE void set_zero(A* to, int64_t count) {
  __builtin_memset(to, 0, count * sizeof(A));
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
    return pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? L<A> + l : l)...>()) +
           pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? L<A> + (l ^ m) : l ^ m)...>());
  }(std::make_integer_sequence<int64_t, L<A>>());
}

// N vectors to one whose lane l < N is the sum over the lanes of x[l]: a transpose and sums, in N - 1 additions and one
// for each time that N doubles to L. The order of a sum does not depend on N.
template <class A, int64_t N = L<A>, int64_t m = 1>
CAPSROUTE_INLINE Vec<A> sum_each(Vec<A>* x) {
  if constexpr (m == L<A>) {
    return x[0];
  } else {
    constexpr int64_t pairs = N / (2 * m);
#pragma GCC unroll 8
    for (int64_t k = 0; k < pairs; ++k) x[k] = add_pairs<A, m>(x[2 * k], x[2 * k + 1]);
    if constexpr (pairs == 0) x[0] = add_pairs<A, m>(x[0], x[0]);
    return sum_each<A, N, 2 * m>(x);
  }
}

// L vectors, of which x[k][l] and x[l][k] change places.
template <class A, int64_t m = 1>
CAPSROUTE_INLINE void transpose(Vec<A>* x) {
  if constexpr (m < L<A>) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < L<A>; ++k) {
      if (k & m) continue;
      const Vec<A> a = x[k], b = x[k | m];
      [&]<int64_t... l>(std::integer_sequence<int64_t, l...>) {
        x[k] = pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? L<A> + (l ^ m) : l)...>());
        x[k | m] = pick<A>(a, b, std::integer_sequence<int64_t, (l & m ? L<A> + l : l ^ m)...>());
      }(std::make_integer_sequence<int64_t, L<A>>());
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
