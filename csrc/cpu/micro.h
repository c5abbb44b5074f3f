// The inner loops. Feature axes (f) are padded to whole vectors; a lane is a feature, or, after
// sum_each, one of L input capsules. Every sum runs in an order that does not depend on how many
// samples are handled together, so a sample's bits are its own.
#pragma once

#include "terms.h"

namespace capsroute::CAPSROUTE_ISA {

constexpr int64_t kSamples = 4;  // samples that share one load of the weight

// A size that is known when this is compiled: loops over it are unrolled, and their counters gone.
template <int64_t n>
using Known = std::integral_constant<int64_t, n>;

// Calls visit(size) with a number of padded features, the commonest as known ones.
template <class A, class Visit>
CAPSROUTE_INLINE void with_features(int64_t F, const Visit& visit) {
  switch (F / L<A>) {
    case 1: return visit(Known<L<A>>());
    case 2: return visit(Known<2 * L<A>>());
    case 4: return visit(Known<4 * L<A>>());
    default: return visit(F);
  }
}

// What becomes of a sum: added to what is there, or put there, or put there past the caches.
enum class Write { add, set, set_past };

// w[d, f] += or = sum over n of x_n[d] y_n[f], for K rows d and C vectors V of columns f. The sum is made apart and
// added once: two levels keep the rounding error of a long batch small. Of one vector only some columns may be there:
// `count`.
template <int K, int C, class V, class T, class A, class Count = Known<sizeof(V) / sizeof(A)>>
CAPSROUTE_INLINE void outer_panel(T* w, int64_t w_stride, const A* x, int64_t x_stride, const A* y, int64_t y_stride,
                                  int64_t samples, Write write, Count count = {}) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  V sum[K][C] = {};
  for (int64_t n = 0; n < samples; ++n, x += x_stride, y += y_stride) {
    V row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = load_as<V>(y + c * lanes);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const V scale = all_as<V>(x[k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[k][c] += scale * row[c];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* to = w + k * w_stride + c * lanes;
      if constexpr (std::is_same_v<Count, int64_t>)
        store_some(to, write == Write::add ? load_some(to, count) + sum[k][c] : sum[k][c], count);
      else if (write == Write::add)
        store_as<V>(to, load_as<V>(static_cast<const T*>(to)) + sum[k][c]);
      else if (write == Write::set_past && std::is_same_v<T, A>)
        store_past(reinterpret_cast<A*>(to), sum[k][c]);
      else
        store_as<V>(to, sum[k][c]);
    }
}

template <int K, class V, class T, class A>
CAPSROUTE_INLINE void outer_rows(T* w, int64_t w_stride, const A* x, int64_t x_stride, const A* y, int64_t y_stride,
                                 int64_t F, int64_t samples, Write write) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  int64_t f = 0;
  if constexpr (K <= 4) {  // more rows are taken of one vector alone
    for (; f + 3 * lanes <= F; f += 3 * lanes)
      outer_panel<K, 3, V>(w + f, w_stride, x, x_stride, y + f, y_stride, samples, write);
    for (; f + 2 * lanes <= F; f += 2 * lanes)
      outer_panel<K, 2, V>(w + f, w_stride, x, x_stride, y + f, y_stride, samples, write);
  }
  for (; f + lanes <= F; f += lanes)
    outer_panel<K, 1, V>(w + f, w_stride, x, x_stride, y + f, y_stride, samples, write);
  if constexpr (std::is_same_v<V, Vec<A>>)
    if (f < F) outer_panel<K, 1, V>(w + f, w_stride, x, x_stride, y + f, y_stride, samples, write, F - f);
}

// w[d, f] += or = sum over n of x_n[d] y_n[f], for D rows of F columns, of which V = Vec need not be filled, though
// whole vectors of y_n are read.
template <class V, class T, class A>
void outer(T* w, int64_t w_stride, const A* x, int64_t x_stride, int64_t D, const A* y, int64_t y_stride, int64_t F,
           int64_t samples, Write write) {
  int64_t d = 0;
  if (F <= int64_t(sizeof(V) / sizeof(A)))  // one vector: more rows, as additions take a while
    for (; d + 8 <= D; d += 8)
      outer_rows<8, V>(w + d * w_stride, w_stride, x + d, x_stride, y, y_stride, F, samples, write);
  for (; d + 4 <= D; d += 4)
    outer_rows<4, V>(w + d * w_stride, w_stride, x + d, x_stride, y, y_stride, F, samples, write);
  for (; d < D; ++d) outer_rows<1, V>(w + d * w_stride, w_stride, x + d, x_stride, y, y_stride, F, samples, write);
}

// N rows of votes against one query vector: lane l is sum over f of row_l[f] q[f]; lanes from N on hold nothing of use.
template <int N, class A, class Size>
CAPSROUTE_INLINE Vec<A> dot_some_rows(const A* const* row, const A* q, Size F) {
  Vec<A> sum[N];
  {
    const Vec<A> query = load(q);
#pragma GCC unroll 16
    for (int64_t l = 0; l < N; ++l) sum[l] = rounded<A>(load(row[l]) * query);
  }
  for (int64_t f = L<A>; f < F; f += L<A>) {
    const Vec<A> query = load(q + f);
#pragma GCC unroll 16
    for (int64_t l = 0; l < N; ++l) sum[l] += load(row[l] + f) * query;
  }
  return sum_each<A, N>(sum);
}

// The same for `count` <= N rows. Those past the end repeat the last one; if the compiler knew, it would share their
// products, and then make no fma of them.
template <int N, class A, class Size>
CAPSROUTE_INLINE Vec<A> dot_last_rows(const A* rows, int64_t row_stride, int64_t count, const A* q, Size F) {
  const A* row[N];
#pragma GCC unroll 16
  for (int64_t l = 0; l < N; ++l) row[l] = opaque(rows + (l < count ? l : count - 1) * row_stride);
  return dot_some_rows<N>(row, q, F);
}

// The same for `count` <= L rows.
template <class A, class Size>
CAPSROUTE_INLINE Vec<A> dot_rows(const A* rows, int64_t row_stride, int64_t count, const A* q, Size F) {
  constexpr int all_rows = L<A>, few = all_rows >= 8 ? all_rows / 4 : 1;
  if (count <= few) return dot_last_rows<few>(rows, row_stride, count, q, F);
  if (count < all_rows) return dot_last_rows<all_rows>(rows, row_stride, count, q, F);
  const A* row[all_rows];
#pragma GCC unroll 16
  for (int64_t l = 0; l < all_rows; ++l) row[l] = rows + l * row_stride;
  return dot_some_rows<all_rows>(row, q, F);
}

// c_k[l], or what all k and l share.
template <class A>
CAPSROUTE_INLINE Vec<A> factor(const A* c, int64_t k, int64_t l) {
  return all<A>(c[k * L<A> + l]);
}
template <class A>
CAPSROUTE_INLINE Vec<A> factor(Vec<A> share, int64_t, int64_t) {
  return share;
}

// s_k[f] += sum over l < count of c_k[l] rows[l, f] for K output capsules and C vectors of features.
template <int K, int C, class A, class Count, class Factors>
CAPSROUTE_INLINE void add_panel(A* s, int64_t s_stride, const A* rows, int64_t row_stride, Count count, Factors c) {
  Vec<A> sum[K][C] = {};
  for (int64_t l = 0; l < count; ++l) {
    Vec<A> row[C];
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) row[v] = load(rows + l * row_stride + v * L<A>);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const Vec<A> scale = factor<A>(c, k, l);
#pragma GCC unroll 2
      for (int v = 0; v < C; ++v) sum[k][v] += scale * row[v];
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) {
      A* to = s + k * s_stride + v * L<A>;
      store(to, load(to) + sum[k][v]);
    }
}

// s_k[f] += sum over l < count of c_k[l] rows[l, f] for K output capsules: the bits are those of one at a time.
template <int K, class A, class Count, class Size, class Factors>
CAPSROUTE_INLINE void add_rows(A* s, const A* rows, int64_t row_stride, Count count, Factors c, Size F) {
  int64_t f = 0;
  for (; f + 2 * L<A> <= F; f += 2 * L<A>) add_panel<K, 2>(s + f, F, rows + f, row_stride, count, c);
  for (; f < F; f += L<A>) add_panel<K, 1>(s + f, F, rows + f, row_stride, count, c);
}

// A coefficient for each of L input capsules l and each j, of one sample.
template <class A>
struct Coefficient {
  const A* at;   // at[l * next + j * L]
  int64_t next;  // 1 where a lane is an input capsule
};

// y_l[f] = sum over t and j of coefficient_t[j, l] vector_tj[f], for N input capsules l from `lane` on and C vectors of
// features; y_l are y_stride apart, vector_tj follow each other vector_stride apart.
template <int N, int C, class A, class Size>
CAPSROUTE_INLINE void combine_panel(A* y, int64_t y_stride, const Coefficient<A>* coefficient, int64_t lane, int64_t j0,
                                    const A* vector, int64_t vector_stride, int64_t terms, Size J) {
  Vec<A> sum[N][C] = {};
  for (int64_t t = 0; t < terms; ++t) {
    const int64_t next = coefficient[t].next;
    const A* own = coefficient[t].at + lane * next + j0 * L<A>;
    for (int64_t j = 0; j < J; ++j, vector += vector_stride, own += L<A>) {
      Vec<A> row[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) row[c] = load(vector + c * L<A>);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Vec<A> scale = all<A>(own[n * next]);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sum[n][c] += scale * row[c];
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) store(y + n * y_stride + c * L<A>, sum[n][c]);
}

// total = partial, or total += partial
template <class A>
CAPSROUTE_INLINE void fold_sum(A* total, const A* partial, int64_t count, bool first) {
  for (int64_t k = 0; k < count; k += L<A>)
    store(total + k, first ? load(partial + k) : load(total + k) + load(partial + k));
}

// total += scale * partial
template <class A>
CAPSROUTE_INLINE void add_scaled(A* total, const A* partial, A scale, int64_t count) {
  for (int64_t k = 0; k < count; k += L<A>) store(total + k, load(total + k) + load(partial + k) * scale);
}

}  // namespace capsroute::CAPSROUTE_ISA
