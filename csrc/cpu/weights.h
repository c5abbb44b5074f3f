// The weight in the order that the kernels read.
#pragma once

#include "plan.h"
#include "terms.h"

namespace capsroute::CAPSROUTE_ISA {

// The terms of a weight are made once for a call, if many samples in turn need them and they take no more than this.
constexpr int64_t kWholeTerms = int64_t(8) << 20;

// A weight in the kernels' memory order: for a pair [I, D, J, O], in place where it already is so;
// for a shared weight its two products' orders, [D, O] to come from sums to outputs and [O, D] back.
template <class X>
struct Weights {
  using A = Acc<X>;
  const X* pair = nullptr;  // + i * D * J * O
  const A* to_outputs = nullptr;
  const A* to_rows = nullptr;
  bool whole = std::is_same_v<X, A>;  // the terms of all of a pair's weight are there, or will be: itself, or
  const Term<X>* terms = nullptr;     // [I, D / kTerm, J, O], null also while memory is only measured

  static Weights pack(const Layout<X>& layout, Carver& carver, const Parallel& parallel) {
    const Problem& p = layout.p;
    const int64_t *stride = p.weight.stride, D = p.D, J = p.J, O = layout.O, F = layout.F;
    const X* weight = static_cast<const X*>(p.weight.data);
    Weights packed;
    if (layout.shared) {
      A* to_outputs = carver.take<A>(layout.weights * D * O);
      A* to_rows = carver.take<A>(layout.weights * p.O * F);
      packed.to_outputs = to_outputs, packed.to_rows = to_rows;
      if (!carver.base) return packed;
      for (int64_t j = 0; j < layout.weights; ++j) {
        const X* from = weight + j * stride[1];
        for (int64_t d = 0; d < D; ++d) widen(to_outputs + (j * D + d) * O, from + d * stride[3], stride[2], p.O, O);
        for (int64_t o = 0; o < p.O; ++o) widen(to_rows + (j * p.O + o) * F, from + o * stride[2], stride[3], D, F);
      }
    } else if (p.form == Weight::pair) {
      packed.pair = weight;
      const bool in_place = stride[2] == 1 && (stride[1] == O || J == 1) && (stride[3] == J * O || D == 1) &&
                            (stride[0] == D * J * O || p.I == 1) && O == p.O;
      if (in_place) return packed;
      X* copy = carver.take<X>(p.I * D * J * O);
      packed.pair = copy;
      if (!carver.base) return packed;
      parallel_for(parallel, p.I, [&](int64_t i, int64_t) {
        const X* from = weight + i * stride[0];
        X* to = copy + i * D * J * O;
        if (O == p.O && stride[3] == 1 && stride[1] == O * stride[2])  // as torch allocates [I, J, O, D]
          return transpose_rows(from, stride[2], J * O, D, to, J * O);
        for (int64_t d = 0; d < D; ++d)
          for (int64_t j = 0; j < J; ++j, to += O) {
            for (int64_t o = 0; o < p.O; ++o) to[o] = from[j * stride[1] + o * stride[2] + d * stride[3]];
            for (int64_t o = p.O; o < O; ++o) to[o] = X{};
          }
      });
    }
    return packed;
  }

  // Makes the terms of all of a pair's weight, if they are not too large.
  void make_whole(const Layout<X>& layout, Carver& carver, const Parallel& parallel) {
    const Problem& p = layout.p;
    const int64_t count = layout.sums(), size = divide_up(p.D, kTerm<X>) * count;
    if (whole || p.I * size * int64_t(sizeof(Term<X>)) > kWholeTerms) return;
    Term<X>* made = carver.take<Term<X>>(p.I * size);
    whole = true, terms = made;
    if (!carver.base) return;
    parallel_for(parallel, p.I,
                 [&](int64_t i, int64_t) { make_terms<X>(pair + i * p.D * count, 1, p.D, count, made + i * size); });
  }
};

}  // namespace capsroute::CAPSROUTE_ISA
