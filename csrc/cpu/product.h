// Products with a weight as it lies in memory: of a few samples at a time, forward (W x) and back (W^T y).
#pragma once

#include "micro.h"

namespace capsroute::CAPSROUTE_ISA {

constexpr int64_t kRows = 8;  // of a weight, that are read together
// Bytes that are asked for ahead: the same place of what follows, or, if that is farther away and kSamples samples
// share a load, along the rows. Two vectors at a time are faster then than three, together 0.69 of the time.
constexpr int64_t kNear = 256 * 1024, kAlong = 2048;

// A matrix w as it lies in memory: `parts` of D rows, of `size` features each, whole vectors; or, `turned`, of as many
// rows as features, of D numbers each.
template <class X>
struct Matrix {
  const X* at;
  int64_t row, size;            // numbers from one row to the next, and features of a part
  int64_t parts = 1, part = 0;  // and numbers from one part to the next
  int64_t missing = 0;          // the last features of a part, which are not there, and count as 0
  bool turned = false;          // a row is a feature
  int64_t ahead = 0;            // to what is read later, if that is not simply what follows

  int64_t whole() const { return missing ? size - L<Acc<X>> : size; }  // features that are all there
};

// y_n[f] += sum over d of x_n[d] w[d, f], for N samples, given as terms, and C vectors of features; from 0 if this is
// `first`. What lies `ahead` of w is asked for on the way, if that is not 0: rows this short and far apart are not what
// a processor prefetches by itself. Of one vector only some features may be there: `count`.
template <int N, int C, class X, class A, class Size, class Count = Known<L<A>>>
CAPSROUTE_INLINE void apply_panel(const X* w, int64_t w_stride, const Term<X>* const* x, Size D, A* const* y, int64_t f,
                                  bool first, int64_t ahead, Count count = {}) {
  Vec<A> sum[N][C];
  A* to[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    to[n] = y[n] + f;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[n][c] = first ? all<A>(0) : load(to[n] + c * L<A>);
  }
  for (int64_t d = 0; d < D; d += kTerm<X>, w += kTerm<X> * w_stride) {
    TermVec<X> row[C];
    if (kTerm<X> > 1) w = opaque(w);  // else GCC keeps a pointer to each row, more than there are registers for
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int64_t k = 0; k < kTerm<X>; ++k)
        if (ahead && c * L<A> * sizeof(X) % 64 == 0) ask_for(w + k * w_stride + ahead + c * L<A>);
    const bool last = kTerm<X> > 1 && d + 1 == D;
    if constexpr (std::is_same_v<Count, int64_t>)
      row[0] = load_some_terms(w, w_stride, last, count);
    else
      load_terms<C>(w, w_stride, last, row);
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
    for (int c = 0; c < C; ++c) store(to[n] + c * L<A>, sum[n][c]);
}

// The same for the features f and on of a part, the first of which is at w; of whole vectors: two at a time
// if rows are `far` apart.
template <int N, class X, class A, class Size>
void apply_rows(const X* w, const Matrix<X>& matrix, const Term<X>* const* x, Size D, A* const* y, int64_t f,
                bool first, int64_t ahead, bool far) {
  // N C sums, C rows and a scale in 16 registers, or in 32; pairs are woven for two vectors at a time
  constexpr int C = N > 2 ? (kTerm<X> > 1 ? 4 : 3) : N > 1 ? 4 : 10;
  const int64_t row = matrix.row, end = f + matrix.whole();
  for (; !far && f + C * L<A> <= end; f += C * L<A>, w += C * L<A>) apply_panel<N, C>(w, row, x, D, y, f, first, ahead);
  for (; f + 2 * L<A> <= end; f += 2 * L<A>, w += 2 * L<A>) apply_panel<N, 2>(w, row, x, D, y, f, first, ahead);
  if (f < end) apply_panel<N, 1>(w, row, x, D, y, f, first, ahead), f += L<A>, w += L<A>;
}

// The same for features that are rows w of D numbers, which are turned into vectors, kTurned terms at a time.
template <int N, int C, class X, class A, class Count = Known<L<A>>>
CAPSROUTE_INLINE void apply_turned_panel(const X* w, int64_t w_stride, const Term<X>* const* x, int64_t D, A* const* y,
                                         int64_t f, bool first, int64_t ahead, Count count = {}) {
  constexpr int64_t terms = kTurned<A>, numbers = L<A> * terms * kTerm<X>, line = 64 / int64_t(sizeof(X));
  Vec<A> sum[N][C];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[n][c] = first ? all<A>(0) : load(y[n] + f + c * L<A>);
  for (int64_t term = 0, asked = ahead; term * kTerm<X> < D; term += terms) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c, asked += numbers) {
      for (int64_t k = 0; ahead && k < numbers; k += line) ask_for(w + asked + k);
      TermVec<X> weight[terms];
      turn_terms(w + c * L<A> * w_stride + term * kTerm<X>, w_stride, count, weight);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int64_t k = 0; k < terms; ++k) sum[n][c] = multiply_add(sum[n][c], all(x[n][term + k]), weight[k]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      if constexpr (std::is_same_v<Count, int64_t>) sum[n][c] = first_lanes<A>(count) ? sum[n][c] : all<A>(0);
      store(y[n] + f + c * L<A>, sum[n][c]);
    }
}

// The last terms of D, fewer than kTurned: they are turned together with those before them, so that it is kTurned, of
// which the first, `over` many, are in y already.
template <int N, class X, class A, class Count>
CAPSROUTE_INLINE void add_turned_rest(const X* w, int64_t w_stride, const Term<X>* const* x, int64_t D, A* const* y,
                                      int64_t f, Count count) {
  constexpr int64_t terms = kTurned<A>;
  const int64_t all_terms = D / kTerm<X>, begin = all_terms - terms, over = terms - all_terms % terms;
  TermVec<X> weight[terms];
  turn_terms(w + begin * kTerm<X>, w_stride, count, weight);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    Vec<A> sum = load(y[n] + f);
#pragma GCC unroll 4
    for (int64_t k = 1; k < terms; ++k)
      if (k >= over) sum = multiply_add(sum, all(x[n][begin + k]), weight[k]);
    if constexpr (std::is_same_v<Count, int64_t>) sum = first_lanes<A>(count) ? sum : all<A>(0);
    store(y[n] + f, sum);
  }
}

template <int N, class X, class A>
void apply_turned(const X* w, const Matrix<X>& matrix, const Term<X>* const* x, int64_t D, A* const* y, int64_t f,
                  bool first) {
  constexpr int C = N > 2 || CAPSROUTE_VECTOR_BYTES == 64 ? 1 : 2;
  const int64_t row = matrix.row, ahead = matrix.ahead, end = f + matrix.whole();
  for (; f + C * L<A> <= end; f += C * L<A>, w += C * L<A> * row)
    apply_turned_panel<N, C>(w, row, x, D, y, f, first, ahead);
  for (; f < end; f += L<A>, w += L<A> * row) apply_turned_panel<N, 1>(w, row, x, D, y, f, first, ahead);
  if (matrix.missing) apply_turned_panel<N, 1>(w, row, x, D, y, f, first, ahead, L<A> - matrix.missing);
}

template <int N, class X, class A>
void apply_turned_rest(const X* w, const Matrix<X>& matrix, const Term<X>* const* x, int64_t D, A* const* y,
                       int64_t f) {
  const int64_t row = matrix.row, end = f + matrix.whole();
  for (; f < end; f += L<A>, w += L<A> * row) add_turned_rest<N>(w, row, x, D, y, f, Known<L<A>>());
  if (matrix.missing) add_turned_rest<N>(w, row, x, D, y, f, L<A> - matrix.missing);
}

template <int N, class X, class A>
CAPSROUTE_INLINE void apply_part(const X* w, const Matrix<X>& matrix, const Term<X>* const* x, int64_t D, A* const* y,
                                 int64_t f, bool first) {
  if (matrix.turned) {
    const int64_t rest = D % (kTurned<A> * kTerm<X>);
    apply_turned<N>(w, matrix, x, D - rest, y, f, first);
    return rest ? apply_turned_rest<N>(w, matrix, x, D, y, f) : void();
  }
  const int64_t row = matrix.row, next = kRows * row;
  constexpr int64_t size = sizeof(X);
  const bool is_far = next * size > kNear, far = is_far && N == kSamples;
  const int64_t ahead = matrix.ahead ? matrix.ahead : far ? kAlong / size : is_far ? 0 : next;
  for (int64_t d = 0; d < D; d += kRows, w += next) {
    const Term<X>* part[N];
    for (int n = 0; n < N; ++n) part[n] = x[n] + d / kTerm<X>;
    const auto multiply = [&](auto rows) {
      const int64_t whole = matrix.whole();
      if (whole) apply_rows<N>(w, matrix, part, rows, y, f, first && d == 0, ahead, far);
      if (matrix.missing)
        apply_panel<N, 1>(w + whole, row, part, rows, y, f + whole, first && d == 0, ahead, L<A> - matrix.missing);
    };
    d + kRows <= D ? multiply(Known<kRows>()) : multiply(D - d);
  }
}

template <int N, class X, class A>
CAPSROUTE_INLINE void apply_samples(const Matrix<X>& w, const Term<X>* const* x, int64_t D, A* const* y, bool first) {
  for (int64_t j = 0; j < w.parts; ++j) apply_part<N>(w.at + j * w.part, w, x, D, y, j * w.size, first);
}

// y_n[f] = sum over d of x_n[d] w[d, f] for `samples` <= kSamples samples, given as terms; unless it is the `first`
// sum, that is added term by term.
template <class X, class A>
CAPSROUTE_INLINE void apply(const Matrix<X>& w, const Term<X>* const* x, int64_t D, A* const* y, int64_t samples,
                            bool first = true) {
  switch (samples) {
    case 1: return apply_samples<1>(w, x, D, y, first);
    case 2: return apply_samples<2>(w, x, D, y, first);
    case 3: return apply_samples<3>(w, x, D, y, first);
    default: return apply_samples<4>(w, x, D, y, first);
  }
}

// x_n[d] = sum over f of w[d, f] y_n[f] for `samples` <= N, and K features d at a time: N K dot products, one sum_each.
// The weight that is read later is asked for.
template <int N, int K, class X, class A>
CAPSROUTE_INLINE void apply_transposed_panel(const Matrix<X>& w, const A* const* y, A* const* x, int64_t D,
                                             int64_t samples) {
  const int64_t ahead = w.ahead ? w.ahead : D * w.row;
  for (int64_t d0 = 0; d0 < D; d0 += K) {
    Vec<A> sum[N * K] = {};
    for (int64_t j = 0; j < w.parts; ++j) {
      const A* from[N];
#pragma GCC unroll 4
      for (int64_t n = 0; n < N; ++n)  // those past the end are not stored
        from[n] = y[n < samples ? n : samples - 1] + j * w.size;
      const X* row[K];  // nor are rows past the end, which repeat the last one
#pragma GCC unroll 16
      for (int64_t k = 0; k < K; ++k) row[k] = w.at + j * w.part + (d0 + k < D ? d0 + k : D - 1) * w.row;
      const auto add = [&](int64_t f, const auto& load_weight) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < K; ++k) {
          const Vec<A> weight = load_weight(row[k] + f);
          ask_for(row[k] + f + ahead);
#pragma GCC unroll 4
          for (int64_t n = 0; n < N; ++n) sum[n * K + k] += weight * load(from[n] + f);
        }
      };
      for (int64_t f = 0; f < w.whole(); f += L<A>) add(f, [](const X* at) { return load(at); });
      if (w.missing) add(w.whole(), [&](const X* at) { return load_some(at, L<A> - w.missing); });
    }
    const Vec<A> sums = sum_each<A, N * K>(sum);
    for (int64_t n = 0; n < N && n < samples; ++n)
      for (int64_t k = 0; k < K && d0 + k < D; ++k) x[n][d0 + k] = sums[n * K + k];
  }
}

// The same for one sample and numbers d to d + K of rows that are features.
template <int K, class X, class A>
CAPSROUTE_INLINE void apply_turned_back(const Matrix<X>& w, const A* y, A* x, int64_t d) {
  Vec<A> sum[K] = {};
  for (int64_t j = 0; j < w.parts; ++j) {
    const X* row = w.at + j * w.part + d;
    const auto add = [&](auto count) {
      const Vec<A> own = load(y);
#pragma GCC unroll 16
      for (int64_t l = 0; l < L<A>; ++l) ask_for(row + l * w.row + w.ahead);
#pragma GCC unroll 16
      for (int64_t k = 0; k < K; k += kTurned<A>) {
        Vec<A> weight[kTurned<A>];
        turn(row + k, w.row, count, weight);
#pragma GCC unroll 4
        for (int64_t l = 0; l < kTurned<A>; ++l) sum[k + l] += weight[l] * own;
      }
      row += L<A> * w.row, y += L<A>;
    };
    for (int64_t f = 0; f < w.whole(); f += L<A>) add(Known<L<A>>());
    if (w.missing) add(L<A> - w.missing);
  }
  const Vec<A> sums = sum_each<A, K>(sum);
  for (int64_t k = 0; k < K; ++k) x[d + k] = sums[k];
}

template <class X, class A>
void apply_turned_back(const Matrix<X>& w, const A* y, A* x, int64_t D) {
  int64_t d = 0;
  for (; d + L<A> <= D; d += L<A>) apply_turned_back<L<A>>(w, y, x, d);
  if constexpr (L<A> > 2 * kTurned<A>)
    for (; d + L<A> / 2 <= D; d += L<A> / 2) apply_turned_back<L<A> / 2>(w, y, x, d);
  for (; d < D; d += kTurned<A>) apply_turned_back<kTurned<A>>(w, y, x, d + kTurned<A> <= D ? d : D - kTurned<A>);
}

// x_n[d] = sum over f of w[d, f] y_n[f]
template <class X, class A>
void apply_transposed(const Matrix<X>& w, const A* const* y, A* const* x, int64_t D, int64_t samples) {
  constexpr int N = L<A> >= 8 ? 4 : 2, K = L<A> / N;
  for (int64_t n = 0; n < samples; n += w.turned ? 1 : N)
    if (w.turned)
      apply_turned_back(w, y[n], x[n], D);
    else if (samples - n > 1)
      apply_transposed_panel<N, K>(w, y + n, x + n, D, samples - n);
    else if (D <= L<A> / 2)
      apply_transposed_panel<1, L<A> / 2>(w, y + n, x + n, D, 1);
    else
      apply_transposed_panel<1, L<A>>(w, y + n, x + n, D, 1);
}

}  // namespace capsroute::CAPSROUTE_ISA
