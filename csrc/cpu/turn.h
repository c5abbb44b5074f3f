// Rows to lanes: what rows hold becomes vectors with a lane for each row, in registers or in memory.
#pragma once

#include "storage.h"

namespace capsroute::CAPSROUTE_ISA {

// So many numbers of a row become vectors together: 16 bytes of them, widened.
template <class A>
inline constexpr int64_t kTurned = 16 / sizeof(A);

// In each 16 bytes numbers of a and of b, by their places there: a's have those from 0 on, b's those from kTurned on.
template <class A, int64_t... place>
CAPSROUTE_INLINE Vec<A> mix(Vec<A> a, Vec<A> b) {
  constexpr int64_t q = kTurned<A>, places[] = {place...};
  return [&]<int64_t... l>(std::integer_sequence<int64_t, l...>) {
    return pick<A>(
        a, b, std::integer_sequence<int64_t, (l / q * q + places[l % q] + (places[l % q] < q ? 0 : L<A> - q))...>());
  }(std::make_integer_sequence<int64_t, L<A>>());
}

// So many numbers, widened, of each row l that has l % kTurned = k; rows past `count` repeat the last one.
template <class X, class Count>
CAPSROUTE_INLINE Vec<Acc<X>> load_rows(const X* rows, int64_t stride, int64_t k, Count count) {
  constexpr int64_t next = kTurned<Acc<X>>;
  const auto at = [&](int64_t piece) {
    const int64_t row = k + piece * next;
    return rows + (row < count ? row : count - 1) * stride;
  };
  if constexpr (sizeof(X) == 2) return widened(bits_by_fours([&](int64_t n) { return bits_at<uint64_t>(at(n)); }), X());
  // The upper pieces are read to where they belong, which saves their shuffles.
#if CAPSROUTE_VECTOR_BYTES > 16 && (defined(__AVX512F__) || (defined(__AVX__) && CAPSROUTE_VECTOR_BYTES == 32))
  const auto piece = [&](int64_t n) { return _mm_loadu_ps(reinterpret_cast<const float*>(at(n))); };
  const __m256 two = _mm256_insertf128_ps(_mm256_castps128_ps256(piece(0)), piece(1), 1);
#if CAPSROUTE_VECTOR_BYTES == 64
  const __m512 three = _mm512_insertf32x4(_mm512_castps256_ps512(two), piece(2), 2);
  return bits_as<Vec<Acc<X>>>(_mm512_insertf32x4(three, piece(3), 3));
#else
  return bits_as<Vec<Acc<X>>>(two);
#endif
#else
  Vec<Acc<X>> x;
  for (int64_t n = 0; n < CAPSROUTE_VECTOR_BYTES / 16; ++n)
    __builtin_memcpy(reinterpret_cast<char*>(&x) + 16 * n, at(n), 16);
  return x;
#endif
}

// x[k][l] = rows[l][k] for k < kTurned, of `count` <= L rows: a lane is a row.
template <class X, class Count>
CAPSROUTE_INLINE void turn(const X* rows, int64_t stride, Count count, Vec<Acc<X>>* x) {
  using A = Acc<X>;
  Vec<A> row[kTurned<A>];
#pragma GCC unroll 4
  for (int64_t k = 0; k < kTurned<A>; ++k) row[k] = load_rows(rows, stride, k, count);
  if constexpr (sizeof(A) == 8) {
    x[0] = mix<A, 0, 2>(row[0], row[1]), x[1] = mix<A, 1, 3>(row[0], row[1]);
  } else {
    const Vec<A> a = mix<A, 0, 4, 1, 5>(row[0], row[1]), b = mix<A, 2, 6, 3, 7>(row[0], row[1]);
    const Vec<A> c = mix<A, 0, 4, 1, 5>(row[2], row[3]), d = mix<A, 2, 6, 3, 7>(row[2], row[3]);
    x[0] = mix<A, 0, 1, 4, 5>(a, c), x[1] = mix<A, 2, 3, 6, 7>(a, c);
    x[2] = mix<A, 0, 1, 4, 5>(b, d), x[3] = mix<A, 2, 3, 6, 7>(b, d);
  }
}

// to[d][k] = from[k][d], of `rows` rows of D numbers each, in squares of four, the last of which lies over the one
// before it where D is no multiple of four. What is stored for them is not looked at. So many rows at a time: a line of
// each stays in the first-level cache until all of it was read. If `ahead` is not 0, the rows follow each other, and
// what lies so many numbers further is asked for.
constexpr int64_t kTransposed = 32;

template <class X>
void transpose_rows(const X* from, int64_t from_stride, int64_t rows, int64_t D, X* to, int64_t to_stride,
                    int64_t ahead = 0) {
  using Bits = std::conditional_t<sizeof(X) == 8, uint64_t, std::conditional_t<sizeof(X) == 4, uint32_t, uint16_t>>;
  using Four = typename VecOf<Bits, 4 * sizeof(Bits)>::type;
  for (int64_t k0 = 0; k0 < rows; k0 += kTransposed) {
    const int64_t end = k0 + kTransposed < rows ? k0 + kTransposed : rows;
    for (int64_t n = 0; n < D && D >= 4; n += 4) {
      const int64_t d = n + 4 <= D ? n : D - 4;
      const X* next = from + k0 * from_stride + d * (end - k0) + ahead;
      for (int64_t l = 0; ahead && l < 4 * (end - k0); l += 64 / int64_t(sizeof(X))) ask_for(next + l);
      int64_t k = k0;
      for (; k + 4 <= end; k += 4) {
        Four x[4];
        for (int l = 0; l < 4; ++l) __builtin_memcpy(&x[l], from + (k + l) * from_stride + d, sizeof(Four));
        const Four a = __builtin_shuffle(x[0], x[1], Four{0, 4, 1, 5}),
                   b = __builtin_shuffle(x[0], x[1], Four{2, 6, 3, 7});
        const Four c = __builtin_shuffle(x[2], x[3], Four{0, 4, 1, 5}),
                   e = __builtin_shuffle(x[2], x[3], Four{2, 6, 3, 7});
        const Four y[] = {__builtin_shuffle(a, c, Four{0, 1, 4, 5}), __builtin_shuffle(a, c, Four{2, 3, 6, 7}),
                          __builtin_shuffle(b, e, Four{0, 1, 4, 5}), __builtin_shuffle(b, e, Four{2, 3, 6, 7})};
        for (int l = 0; l < 4; ++l) __builtin_memcpy(to + (d + l) * to_stride + k, &y[l], sizeof(Four));
      }
      for (; k < end; ++k)
        for (int64_t l = d; l < d + 4; ++l) to[l * to_stride + k] = from[k * from_stride + l];
    }
    for (int64_t d = 0; d < D && D < 4; ++d)
      for (int64_t k = k0; k < end; ++k) to[d * to_stride + k] = from[k * from_stride + d];
  }
}

}  // namespace capsroute::CAPSROUTE_ISA
