// What votes are sums of: products of numbers, or of pairs of them where the processor takes two bfloat16 at once.
#pragma once

#include "turn.h"

namespace capsroute::CAPSROUTE_ISA {

template <class X>
struct TermOf {
  using type = Acc<X>;
};

// sum + x y, lane by lane.
template <class V>
CAPSROUTE_INLINE V multiply_add(V sum, V x, V y) {
  return sum + x * y;
}

// CAPSROUTE_PAIRS by itself, for tests where no such processor is at hand, takes them one after the other.
#if defined(__AVX512BF16__) && CAPSROUTE_VECTOR_BYTES == 64
#define CAPSROUTE_PAIRS
#endif
#ifdef CAPSROUTE_PAIRS
// Two bfloat16 numbers, the first in the upper half: that one is multiplied and added first, and either sum is rounded
// as an fma's. So the bits are those of a sum made number by number, but that subnormal numbers count as 0.
struct Pair {
  uint32_t bits;
};
template <>
struct TermOf<BFloat16> {
  using type = Pair;
};

CAPSROUTE_INLINE Vec32 load(const Pair* p) { return bits_at<Vec32>(p); }

CAPSROUTE_INLINE void store(Pair* p, Vec32 x) { __builtin_memcpy(p, &x, sizeof(x)); }

CAPSROUTE_INLINE Vec32 all(Pair x) { return all<uint32_t>(x.bits); }

CAPSROUTE_INLINE Vec<float> multiply_add(Vec<float> sum, Vec32 x, Vec32 y) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(x), bits_as<__m512bh>(y));
#else
  const auto first = [](Vec32 pairs) { return bits_as<Vec<float>>(pairs >> 16 << 16); };
  return (sum + first(x) * first(y)) + first(x << 16) * first(y << 16);
#endif
}
#endif

template <class X>
using Term = typename TermOf<X>::type;
template <class X>  // numbers in a term
inline constexpr int64_t kTerm = std::is_same_v<Term<X>, Acc<X>> ? 1 : 2;
template <class X>  // L terms
using TermVec = decltype(load(static_cast<const Term<X>*>(nullptr)));

// Pairs of a number of `first` and one of `second`, where these are widened.
CAPSROUTE_INLINE Vec32 weave(Vec<float> first, Vec<float> second) {
  return bits_as<Vec32>(first) | bits_as<Vec32>(second) >> 16;
}

// C vectors of terms of a weight's row, and, where a term is a pair, of the row w_stride after it, which counts as 0
// where the first is the `last`.
template <int C, class X>
CAPSROUTE_INLINE void load_terms(const X* w, int64_t w_stride, bool last, TermVec<X>* terms) {
  constexpr int64_t lanes = L<Acc<X>>;
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
    if constexpr (kTerm<X> == 1)
      terms[c] = load(w + c * lanes);
    else
      terms[c] = weave(load(w + c * lanes), last ? Vec<float>{} : load(w + c * lanes + w_stride));
}

#if defined(__AVX512BF16__) && CAPSROUTE_VECTOR_BYTES == 64
// The same in one shuffle each.
template <int C>
CAPSROUTE_INLINE void load_terms(const BFloat16* w, int64_t w_stride, bool last, Vec32* terms) {
  using Numbers = VecOf<uint16_t, 64>::type;
  const Numbers low = {32, 0, 33, 1, 34, 2,  35, 3,  36, 4,  37, 5,  38, 6,  39, 7,
                       40, 8, 41, 9, 42, 10, 43, 11, 44, 12, 45, 13, 46, 14, 47, 15};
  int c = 0;
#pragma GCC unroll 8
  for (; c + 2 <= C; c += 2) {
    const auto first = bits_at<Numbers>(w + c * 16),
               second = last ? Numbers{} : bits_at<Numbers>(w + c * 16 + w_stride);
    terms[c] = bits_as<Vec32>(__builtin_shuffle(first, second, low));
    terms[c + 1] = bits_as<Vec32>(__builtin_shuffle(first, second, low + 16));
  }
  if constexpr (C % 2) terms[c] = weave(load(w + c * 16), last ? Vec<float>{} : load(w + c * 16 + w_stride));
}
#endif

// One such vector, with `count` terms and zeros after them.
template <class X>
CAPSROUTE_INLINE TermVec<X> load_some_terms(const X* w, int64_t w_stride, bool last, int64_t count) {
  if constexpr (kTerm<X> == 1)
    return load_some(w, count);
  else
    return weave(load_some(w, count), last ? Vec<float>{} : load_some(w + w_stride, count));
}

// Terms of `count` rows of a weight, kTurned of each from their first numbers on: a lane is a row.
template <class X, class Count>
CAPSROUTE_INLINE void turn_terms(const X* rows, int64_t stride, Count count, TermVec<X>* terms) {
  if constexpr (kTerm<X> == 1) {
    turn(rows, stride, count, terms);
  } else {
    Vec<float> pairs[kTurned<float>];  // the first number of each is in the lower half
    turn(reinterpret_cast<const float*>(rows), stride / 2, count, pairs);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kTurned<float>; ++k) {
      const Vec32 bits = bits_as<Vec32>(pairs[k]);
      terms[k] = bits << 16 | bits >> 16;
    }
  }
}

// x [items][D, count] to terms [items][D / kTerm, count]; a count of whole vectors. From numbers that X holds exactly,
// and to the same place, if wanted.
template <class X, class From>
CAPSROUTE_INLINE void make_terms(const From* x, int64_t items, int64_t D, int64_t count, Term<X>* to) {
  using A = Acc<X>;
  if constexpr (kTerm<X> == 1) {
    widen(to, x, 1, items * D * count, items * D * count);
  } else {
    for (int64_t item = 0; item < items; ++item)
      for (int64_t d = 0; d < D; d += 2, to += count)
        for (int64_t k = 0; k < count; k += L<A>) {
          const From* first = x + (item * D + d) * count + k;
          store(to + k, weave(load(first), d + 1 < D ? load(first + count) : Vec<float>{}));
        }
  }
}

// x [items][D] to terms [items][D / kTerm], of numbers that X holds exactly.
template <class X>
CAPSROUTE_INLINE void make_terms(const Acc<X>* x, int64_t items, int64_t D, Term<X>* to) {
  static_assert(kTerm<X> == 2);
  const auto bits = [](Acc<X> number) { return bits_as<uint32_t>(number); };
  for (int64_t item = 0; item < (D % 2 ? items : 1); ++item, x += D) {
    const int64_t numbers = D % 2 ? D : items * D;
    for (int64_t d = 0; d + 2 <= numbers; d += 2) (to++)->bits = bits(x[d]) | bits(x[d + 1]) >> 16;
    if (D % 2) (to++)->bits = bits(x[D - 1]);
  }
}

}  // namespace capsroute::CAPSROUTE_ISA
