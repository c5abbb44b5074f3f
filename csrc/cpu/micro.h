// The inner loops. Feature axes (f) are padded to whole vectors; a lane is a feature, or, after
// sum_each, one of W input capsules. Every sum runs in an order that does not depend on how many
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
  switch (F / W<A>) {
    case 1: return visit(Known<W<A>>());
    case 2: return visit(Known<2 * W<A>>());
    case 4: return visit(Known<4 * W<A>>());
    default: return visit(F);
  }
}

constexpr int64_t kRows = 8;           // of a weight, that are read together
constexpr int64_t kNear = 256 * 1024;  // bytes that are asked for ahead: at 512 KiB it was a loss

// y_n[f] += sum over d of x_n[d] w[d, f], for N samples, given as terms, and C vectors of features; from 0 if this is
// `first`. What lies `ahead` of w is asked for on the way, if that is not 0: rows this short and far apart are not what
// a processor prefetches by itself.
template <int N, int C, class X, class A, class Size>
CAPSROUTE_INLINE void apply_panel(const X* w, int64_t w_stride, const Term<X>* const* x, Size D, A* const* y, int64_t f,
                                  bool first, int64_t ahead) {
  Vec<A> sum[N][C];
  A* to[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    to[n] = y[n] + f;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[n][c] = first ? all<A>(0) : load(to[n] + c * W<A>);
  }
  w += f;
  for (int64_t d = 0; d < D; d += kTerm<X>, w += kTerm<X> * w_stride) {
    TermVec<X> row[C];
    if (kTerm<X> > 1) w = opaque(w);  // else GCC keeps a pointer to each row, more than there are registers for
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int64_t k = 0; k < kTerm<X>; ++k)
        if (ahead && c * W<A> * sizeof(X) % 64 == 0) ask_for(w + k * w_stride + ahead + c * W<A>);
    load_terms<C>(w, w_stride, kTerm<X> > 1 && d + 1 == D, row);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const TermVec<X> share = all(x[n][d / kTerm<X>]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[n][c] = multiply_add(sum[n][c], share, row[c]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(to[n] + c * W<A>, sum[n][c]);
}

template <int N, class X, class A, class Size>
void apply_rows(const X* w, int64_t w_stride, const Term<X>* const* x, Size D, A* const* y, int64_t F, bool first) {
  // N C sums, C rows and a scale in 16 registers, or in 32; pairs are woven for two vectors at a time
  constexpr int C = N > 2 ? (kTerm<X> > 1 ? 4 : 3) : N > 1 ? 4 : 10;
  const int64_t next = kRows * w_stride;
  const int64_t ahead = next * int64_t(sizeof(X)) > kNear ? 0 : next;
  int64_t f = 0;
  for (; f + C * W<A> <= F; f += C * W<A>) apply_panel<N, C>(w, w_stride, x, D, y, f, first, ahead);
  for (; f + 2 * W<A> <= F; f += 2 * W<A>) apply_panel<N, 2>(w, w_stride, x, D, y, f, first, ahead);
  if (f < F) apply_panel<N, 1>(w, w_stride, x, D, y, f, first, ahead);
}

template <int N, class X, class A>
void apply_samples(const X* w, int64_t w_stride, const Term<X>* const* x, int64_t D, A* const* y, int64_t F,
                   bool first) {
  for (int64_t d = 0; d < D; d += kRows) {
    const Term<X>* part[N];
    for (int n = 0; n < N; ++n) part[n] = x[n] + d / kTerm<X>;
    if (d + kRows <= D)
      apply_rows<N>(w + d * w_stride, w_stride, part, Known<kRows>(), y, F, first && d == 0);
    else
      apply_rows<N>(w + d * w_stride, w_stride, part, D - d, y, F, first && d == 0);
  }
}

// y_n[f] = sum over d of x_n[d] w[d, f] for `samples` <= kSamples samples, given as terms, and F features; unless it is
// the `first` sum, that is added term by term.
template <class X, class A>
void apply(const X* w, int64_t w_stride, const Term<X>* const* x, int64_t D, A* const* y, int64_t F, int64_t samples,
           bool first = true) {
  switch (samples) {
    case 1: return apply_samples<1>(w, w_stride, x, D, y, F, first);
    case 2: return apply_samples<2>(w, w_stride, x, D, y, F, first);
    case 3: return apply_samples<3>(w, w_stride, x, D, y, F, first);
    default: return apply_samples<4>(w, w_stride, x, D, y, F, first);
  }
}

// x_n[d] = sum over f of w[d, f] y_n[f] for `samples` <= N, and K features d at a time: N K dot products, one sum_each.
// The weight that follows it in memory is asked for.
template <int N, int K, class X, class A>
CAPSROUTE_INLINE void apply_transposed_panel(const X* w, int64_t w_stride, const A* const* y, int64_t F, A* const* x,
                                             int64_t D, int64_t samples) {
  const A* from[N];
#pragma GCC unroll 4
  for (int64_t n = 0; n < N; ++n) from[n] = y[n < samples ? n : samples - 1];  // those past the end are not stored
  const int64_t ahead = D * w_stride;
  for (int64_t d0 = 0; d0 < D; d0 += K) {
    const X* row[K];  // rows past the end repeat the last one and are not stored
#pragma GCC unroll 16
    for (int64_t k = 0; k < K; ++k) row[k] = w + (d0 + k < D ? d0 + k : D - 1) * w_stride;
    Vec<A> sum[N * K] = {};
    for (int64_t f = 0; f < F; f += W<A>) {
#pragma GCC unroll 16
      for (int64_t k = 0; k < K; ++k) {
        const Vec<A> weight = load(row[k] + f);
        ask_for(row[k] + f + ahead);
#pragma GCC unroll 4
        for (int64_t n = 0; n < N; ++n) sum[n * K + k] += weight * load(from[n] + f);
      }
    }
    const Vec<A> sums = sum_each<A, N * K>(sum);
    for (int64_t n = 0; n < N && n < samples; ++n)
      for (int64_t k = 0; k < K && d0 + k < D; ++k) x[n][d0 + k] = sums[n * K + k];
  }
}

// x_n[d] = sum over f of w[d, f] y_n[f]
template <class X, class A>
void apply_transposed(const X* w, int64_t w_stride, const A* const* y, int64_t F, A* const* x, int64_t D,
                      int64_t samples) {
  constexpr int N = W<A> >= 8 ? 4 : 2, K = W<A> / N;
  for (int64_t n = 0; n < samples; n += N)
    if (samples - n > 1)
      apply_transposed_panel<N, K>(w, w_stride, y + n, F, x + n, D, samples - n);
    else if (D <= W<A> / 2)
      apply_transposed_panel<1, W<A> / 2>(w, w_stride, y + n, F, x + n, D, 1);
    else
      apply_transposed_panel<1, W<A>>(w, w_stride, y + n, F, x + n, D, 1);
}

// What becomes of a sum: added to what is there, or put there, or put there past the caches.
enum class Write { add, set, set_past };

// w[d, f] += or = sum over n of x_n[d] y_n[f], for K rows d and C vectors V of columns f. The sum is made apart and
// added once: two levels keep the rounding error of a long batch small.
template <int K, int C, class V, class T, class A>
CAPSROUTE_INLINE void outer_panel(T* w, int64_t w_stride, const A* x, int64_t x_stride, const A* y, int64_t y_stride,
                                  int64_t samples, Write write) {
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
      if (write == Write::add)
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
  for (; f + 3 * lanes <= F; f += 3 * lanes)
    outer_panel<K, 3, V>(w + f, w_stride, x, x_stride, y + f, y_stride, samples, write);
  for (; f + 2 * lanes <= F; f += 2 * lanes)
    outer_panel<K, 2, V>(w + f, w_stride, x, x_stride, y + f, y_stride, samples, write);
  for (; f < F; f += lanes) outer_panel<K, 1, V>(w + f, w_stride, x, x_stride, y + f, y_stride, samples, write);
}

// w[d, f] += or = sum over n of x_n[d] y_n[f], for D rows of F columns, whole vectors V.
template <class V, class T, class A>
void outer(T* w, int64_t w_stride, const A* x, int64_t x_stride, int64_t D, const A* y, int64_t y_stride, int64_t F,
           int64_t samples, Write write) {
  int64_t d = 0;
  if (F == sizeof(V) / sizeof(A))  // one vector: more rows, as additions take a while
    for (; d + 8 <= D; d += 8)
      outer_panel<8, 1, V>(w + d * w_stride, w_stride, x + d, x_stride, y, y_stride, samples, write);
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
  for (int64_t f = W<A>; f < F; f += W<A>) {
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

// The same for `count` <= W rows.
template <class A, class Size>
CAPSROUTE_INLINE Vec<A> dot_rows(const A* rows, int64_t row_stride, int64_t count, const A* q, Size F) {
  constexpr int all_rows = W<A>, few = all_rows >= 8 ? all_rows / 4 : 1;
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
  return all<A>(c[k * W<A> + l]);
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
    for (int v = 0; v < C; ++v) row[v] = load(rows + l * row_stride + v * W<A>);
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
      A* to = s + k * s_stride + v * W<A>;
      store(to, load(to) + sum[k][v]);
    }
}

// s_k[f] += sum over l < count of c_k[l] rows[l, f] for K output capsules: the bits are those of one at a time.
template <int K, class A, class Count, class Size, class Factors>
CAPSROUTE_INLINE void add_rows(A* s, const A* rows, int64_t row_stride, Count count, Factors c, Size F) {
  int64_t f = 0;
  for (; f + 2 * W<A> <= F; f += 2 * W<A>) add_panel<K, 2>(s + f, F, rows + f, row_stride, count, c);
  for (; f < F; f += W<A>) add_panel<K, 1>(s + f, F, rows + f, row_stride, count, c);
}

// A coefficient for each of W input capsules l and each j, of one sample.
template <class A>
struct Coefficient {
  const A* at;   // at[l * next + j * W]
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
    const A* own = coefficient[t].at + lane * next + j0 * W<A>;
    for (int64_t j = 0; j < J; ++j, vector += vector_stride, own += W<A>) {
      Vec<A> row[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) row[c] = load(vector + c * W<A>);
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
    for (int c = 0; c < C; ++c) store(y + n * y_stride + c * W<A>, sum[n][c]);
}

}  // namespace capsroute::CAPSROUTE_ISA
