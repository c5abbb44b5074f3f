// The inner loops where a lane is a sample: L samples meet one input capsule at a time. Votes are [J, F][L], dot
// products and softmax need no shuffles, and W_i is read a number at a time. Every sum is made of the same terms in the
// same order as where a lane is a feature (micro.h), so that a sample has the same bits in either way.
#pragma once

#include "micro.h"
#include "plan.h"
#include "terms.h"

namespace capsroute::CAPSROUTE_ISA {

// Sums that are made together, in 32 registers, beside their factors.
constexpr int kSums = 16;

// y[k][n] = x_n[k]: `count` numbers of `samples` <= L samples, `stride` apart, to lanes; the other lanes are 0.
template <class A>
void to_lanes(const A* x, int64_t stride, int64_t samples, int64_t count, A* y) {
  int64_t k = 0;
  for (; k + L<A> <= count; k += L<A>) {
    Vec<A> rows[L<A>];
#pragma GCC unroll 16
    for (int64_t n = 0; n < L<A>; ++n) rows[n] = n < samples ? load(x + n * stride + k) : all<A>(0);
    transpose<A>(rows);
#pragma GCC unroll 16
    for (int64_t l = 0; l < L<A>; ++l) store(y + (k + l) * L<A>, rows[l]);
  }
  for (; k < count; ++k)
    for (int64_t n = 0; n < L<A>; ++n) y[k * L<A> + n] = n < samples ? x[n * stride + k] : 0;
}

// The way back, for a count of whole vectors: x_n[k] = y[k][n].
template <class A>
void from_lanes(const A* y, int64_t count, A* x, int64_t stride, int64_t samples) {
  for (int64_t k = 0; k < count; k += L<A>) {
    Vec<A> rows[L<A>];
#pragma GCC unroll 16
    for (int64_t l = 0; l < L<A>; ++l) rows[l] = load(y + (k + l) * L<A>);
    transpose<A>(rows);
#pragma GCC unroll 16
    for (int64_t n = 0; n < L<A>; ++n)
      if (n < samples) store(x + n * stride + k, rows[n]);
  }
}

// h_g[k] = sum over d of w[d, k] u_g[d], lane by lane, for C numbers k and G groups of L samples, over D terms. What
// follows w is asked for: rows this short are not what a processor fetches by itself.
template <int G, int C, class T, class A, class Size>
CAPSROUTE_INLINE void votes_panel(const T* w, int64_t w_stride, const T* const* u, Size D, A* const* h, int64_t k,
                                  Vec<A> (&sum)[G][C]) {
  const int64_t ahead = D * w_stride;
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[g][c] = all<A>(0);
  w += k;
  for (int64_t d = 0; d < D; ++d, w += w_stride) {
    decltype(load(w)) x[G];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) x[g] = load(u[g] + d * L<A>);
    ask_for(w + ahead);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) sum[g][c] = multiply_add(sum[g][c], all(w[c]), x[g]);
  }
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(h[g] + (k + c) * L<A>, sum[g][c]);
}

// The votes h_g [count][L] of an input capsule u_g [D][L], by its weight w [D, count], for G groups of samples.
template <int G, class T, class A>
void votes_of_samples(const T* w, const T* const* u, int64_t D, int64_t count, A* const* h) {
  constexpr int C = kSums / G;
  int64_t k = 0;
  for (; k + C <= count; k += C) {
    Vec<A> sum[G][C];
    votes_panel(w, count, u, D, h, k, sum);
  }
  for (; k < count; k += L<A>) {
    Vec<A> sum[G][L<A>];
    votes_panel(w, count, u, D, h, k, sum);
  }
}

// The sum of L vectors, as sum_each adds lanes: neighbours first.
template <class A>
CAPSROUTE_INLINE Vec<A> sum_vectors(Vec<A>* x) {
#pragma GCC unroll 16
  for (int64_t m = 1; m < L<A>; m *= 2)
#pragma GCC unroll 16
    for (int64_t l = 0; l < L<A>; l += 2 * m) x[l] += x[l + m];
  return x[0];
}

// Lane by lane the sum over f of h[f] q[f], as dot_rows adds them: f modulo L first, then neighbours.
template <class A, class Size>
CAPSROUTE_INLINE Vec<A> dot_samples(const A* h, const A* q, Size F) {
  Vec<A> sum[L<A>];
#pragma GCC unroll 16
  for (int64_t l = 0; l < L<A>; ++l) sum[l] = rounded<A>(load(h + l * L<A>) * load(q + l * L<A>));
  for (int64_t f = L<A>; f < F; f += L<A>)
#pragma GCC unroll 16
    for (int64_t l = 0; l < L<A>; ++l)
      sum[l] = rounded<A>(sum[l] + load(h + (f + l) * L<A>) * load(q + (f + l) * L<A>));
  return sum_vectors<A>(sum);
}

// The votes h [J, F][L] of one group and one input capsule, where F = L, and while they are at hand their dot products
// with up to two queries [J, F][L], to dots[J][L].
template <class T, class A, class Size>
void votes_and_dots(const T* w, const T* u, Size D, int64_t J, A* h, const A* const* query, A* const* dots) {
  for (int64_t j = 0; j < J; ++j) {
    Vec<A> sum[1][L<A>];
    votes_panel(w, J * L<A>, &u, D, &h, j * L<A>, sum);
    for (int t = 0; t < 2; ++t) {
      if (!query[t]) continue;
      const A* q = query[t] + j * L<A> * L<A>;
      Vec<A> product[L<A>];
#pragma GCC unroll 16
      for (int64_t l = 0; l < L<A>; ++l) product[l] = rounded<A>(sum[0][l] * load(q + l * L<A>));
      store(dots[t] + j * L<A>, sum_vectors<A>(product));
    }
  }
}

// What so many input capsules of L samples give: votes h_l [J, F][L] and coefficients c_l [J][L], one after another.
template <class A>
struct Run {
  const A* h;
  int64_t h_next;
  const A* c;
  int64_t c_next;
  int64_t count;
};

// s[f] += sum over l of c_l h_l[f] for C features of output capsule j, from 0 if this is `first`.
template <int C, class A>
CAPSROUTE_INLINE void add_run_panel(A* s, const Run<A> run, int64_t j, int64_t at, bool first) {
  Vec<A> sum[C];
#pragma GCC unroll 16
  for (int k = 0; k < C; ++k) sum[k] = first ? all<A>(0) : load(s + at + k * L<A>);
  for (int64_t l = 0; l < run.count; ++l) {
    const Vec<A> c = load(run.c + l * run.c_next + j * L<A>);
#pragma GCC unroll 16
    for (int k = 0; k < C; ++k) sum[k] += c * load(run.h + l * run.h_next + at + k * L<A>);
  }
#pragma GCC unroll 16
  for (int k = 0; k < C; ++k) store(s + at + k * L<A>, sum[k]);
}

// s [J, F][L]
template <class A>
void add_run(A* s, const Run<A> run, int64_t J, int64_t F, bool first) {
  constexpr int C = kSums;
  for (int64_t j = 0; j < J; ++j) {
    int64_t f = 0;
    for (; f + C <= F; f += C) add_run_panel<C>(s, run, j, (j * F + f) * L<A>, first);
    for (; f < F; f += L<A>) add_run_panel<L<A>>(s, run, j, (j * F + f) * L<A>, first);
  }
}

// Sums over a group of input capsules for L samples, block by block as for one sample: [count][L].
template <class A>
struct SampleSums {
  A* total;
  A* block;
  int64_t count;

  static SampleSums carve(int64_t count, Carver& carver) {
    A* total = carver.take<A>(count * L<A>);
    return {total, carver.take<A>(count * L<A>), count};
  }
  void clear() const { __builtin_memset(total, 0, count * L<A> * sizeof(A)); }
  // What a block gave is added to the total, for the first of the numbers.
  void join(A scale, int64_t first) const { add_scaled(total, block, scale, first * L<A>); }
};

}  // namespace capsroute::CAPSROUTE_ISA
