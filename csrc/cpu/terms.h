// What lanes of samples multiply: numbers, or pairs of them where the processor takes two bfloat16 at once.
#pragma once

#include "vec.h"

namespace capsroute::CAPSROUTE_ISA {

template <class X>
struct TermOf {
  using type = Acc<X>;
};

// sum + w x, lane by lane, of a number w that all lanes share.
template <class A>
CAPSROUTE_INLINE Vec<A> multiply_add(Vec<A> sum, A w, Vec<A> x) {
  return sum + all<A>(w) * x;
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

CAPSROUTE_INLINE Vec32 load(const Pair* p) {
  Vec32 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

CAPSROUTE_INLINE void store(Pair* p, Vec32 x) { __builtin_memcpy(p, &x, sizeof(x)); }

CAPSROUTE_INLINE Vec<float> multiply_add(Vec<float> sum, Pair w, Vec32 x) {
  const Vec32 own = all<uint32_t>(w.bits);
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(own), bits_as<__m512bh>(x));
#else
  const auto first = [](Vec32 pairs) { return bits_as<Vec<float>>(pairs >> 16 << 16); };
  return (sum + first(own) * first(x)) + first(own << 16) * first(x << 16);
#endif
}
#endif

template <class X>
using Term = typename TermOf<X>::type;
template <class X>  // numbers in a term
inline constexpr int64_t kTerm = std::is_same_v<Term<X>, Acc<X>> ? 1 : 2;

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
        for (int64_t k = 0; k < count; k += W<A>) {
          const From* first = x + (item * D + d) * count + k;
          const Vec32 low = d + 1 < D ? bits_as<Vec32>(load(first + count)) : Vec32{};
          store(to + k, bits_as<Vec32>(load(first)) | low >> 16);
        }
  }
}

}  // namespace capsroute::CAPSROUTE_ISA
