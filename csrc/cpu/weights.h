// The weight as the kernels read it.
#pragma once

#include "plan.h"
#include "product.h"

namespace capsroute::CAPSROUTE_ISA {

// The terms of a weight are made once for a call, if many samples in turn need them and they take no more than this.
constexpr int64_t kWholeTerms = int64_t(8) << 20;
// To bring W_i into order as it is read takes a part of the time of a copy of all of W, which goes through memory, but
// takes it at every read. For so many reads it is less; for more where the copy takes memory that is new in every call.
constexpr int64_t kSeldom = 3, kSeldomIfLarge = 6, kLargeCopy = int64_t(32) << 20;
// It is multiplied as it lies while so few products in turn read it: they cost more so, but nothing is written.
constexpr int64_t kFewProducts = 2;
// Bytes of a W that lies in a row that are asked for ahead.
constexpr int64_t kAheadInOrder = int64_t(16) << 10;

// A weight. The kernels' memory order of a weight for each pair is [I, D, J, O]. One that lies otherwise is brought
// into that order at first, or each W_i is as it is read, or multiplied as it lies. For a shared weight its two
// products' orders, [D, O] to come from sums to outputs and [O, D] back.
template <class X>
class Weights {
 public:
  using A = Acc<X>;
  const A* to_outputs = nullptr;
  const A* to_rows = nullptr;
  bool copied = false;             // all of a pair's weight was brought into order at first, or
  bool as_read = false;            // each W_i is as it is read, or multiplied as it lies
  bool whole = false;              // the terms of all of a pair's weight are there, or will be: itself, or
  const Term<X>* terms = nullptr;  // [I, D / kTerm, J, O], null also while memory is only measured

  // `reads`: how often a call reads a W_i, all of them together.
  Weights(const Layout<X>& layout, int64_t reads, Carver& carver, const Parallel& parallel) : layout_(layout) {
    if (layout.shared) pack_shared(carver);
    if (layout.p.form != Weight::pair) return;
    pair_ = static_cast<const X*>(layout.p.weight.data);
    if (!is_in_order()) {
      const bool is_large = layout.p.I * size() * int64_t(sizeof(X)) > kLargeCopy;
      as_read = reads <= (is_large ? kSeldomIfLarge : kSeldom) * layout.p.I;
      copied = !as_read;
      if (copied) put_in_order(carver, parallel);
    }
    whole = std::is_same_v<X, A> && !as_read;
  }

  // W_i of a pair's weight: as it lies, or brought into order at `there`, where it may be already. That depends on how
  // many products read it in turn; if its features are rows, on how many of them would turn these (`turns`).
  Matrix<X> of(int64_t i, int64_t products, int64_t turns, X* there, bool is_there) const {
    if (!as_read) return {in_order(i), layout_.sums(), layout_.sums()};
    if (lies_in_rows() ? products <= kFewProducts : turns <= kFewProducts && lies_turned()) return as_it_lies(i);
    if (!is_there) bring(i, there);
    return {there, layout_.sums(), layout_.sums()};
  }

  // W_i to [D, J, O], with zeros where O is padded. What is read later is asked for.
  void bring(int64_t i, X* to) const {
    const Problem& p = layout_.p;
    const int64_t *stride = p.weight.stride, D = p.D, O = layout_.O, count = layout_.sums();
    const X* from = static_cast<const X*>(p.weight.data) + i * stride[0];
    if (features_follow()) {
      const int64_t ahead = stride[2] == D ? kAheadInOrder / int64_t(sizeof(X)) : 0;
      return transpose_rows(from, stride[2], count, D, to, count, ahead);
    }
    const int64_t later = maximum(1, kAheadInOrder / (D * p.O * int64_t(sizeof(X))));
    int64_t j = 0, later_i = later / p.J, later_j = later % p.J;
    for (const X* end = to + count; to < end; ++j, to += O) {
      bring_one(from + j * stride[1], from + later_i * stride[0] + later_j * stride[1], to, count);
      if (++later_j == p.J) later_j = 0, ++later_i;
    }
  }

  // Of several input capsules in a row, if they lie in order.
  const X* in_order(int64_t i) const { return pair_ + i * size(); }

  // Numbers of W_i, padded.
  int64_t size() const { return layout_.p.D * layout_.sums(); }

  // Makes the terms of all of a pair's weight, if they are not too large.
  void make_whole(Carver& carver, const Parallel& parallel) {
    const Problem& p = layout_.p;
    const int64_t count = layout_.sums(), each = divide_up(p.D, kTerm<X>) * count;
    if (whole || as_read || p.I * each * int64_t(sizeof(Term<X>)) > kWholeTerms) return;
    Term<X>* made = carver.take<Term<X>>(p.I * each);
    whole = true, terms = made;
    if (!carver.base) return;
    parallel_for(parallel, p.I,
                 [&](int64_t i, int64_t) { make_terms<X>(in_order(i), 1, p.D, count, made + i * each); });
  }

 private:
  void pack_shared(Carver& carver) {
    const Problem& p = layout_.p;
    const int64_t *stride = p.weight.stride, D = p.D, O = layout_.O, F = layout_.F;
    A* outputs = carver.take<A>(layout_.weights * D * O);
    A* rows = carver.take<A>(layout_.weights * p.O * F);
    to_outputs = outputs, to_rows = rows;
    if (!carver.base) return;
    for (int64_t j = 0; j < layout_.weights; ++j) {
      const X* from = static_cast<const X*>(p.weight.data) + j * stride[1];
      for (int64_t d = 0; d < D; ++d) widen(outputs + (j * D + d) * O, from + d * stride[3], stride[2], p.O, O);
      for (int64_t o = 0; o < p.O; ++o) widen(rows + (j * p.O + o) * F, from + o * stride[2], stride[3], D, F);
    }
  }

  bool is_in_order() const {
    const Problem& p = layout_.p;
    const int64_t *stride = p.weight.stride, O = layout_.O, sums = layout_.sums();
    return O == p.O && stride[2] == 1 && (stride[1] == O || p.J == 1) && (stride[3] == sums || p.D == 1) &&
           (stride[0] == size() || p.I == 1);
  }

  void put_in_order(Carver& carver, const Parallel& parallel) {
    X* copy = carver.take<X>(layout_.p.I * size());
    if (carver.base) parallel_for(parallel, layout_.p.I, [&](int64_t i, int64_t) { bring(i, copy + i * size()); });
    pair_ = copy;
  }

  // Whether the features of all j lie one after another, as torch allocates [I, J, O, D].
  bool features_follow() const {
    const Problem& p = layout_.p;
    const int64_t* stride = p.weight.stride;
    return stride[3] == 1 && layout_.O == p.O && (stride[1] == p.O * stride[2] || p.J == 1);
  }

  // Whether products can read W_ij as it lies: its rows are [O], or [D], in whole terms, and turned.
  bool lies_in_rows() const { return layout_.p.weight.stride[2] == 1; }
  bool lies_turned() const {
    const Problem& p = layout_.p;
    return p.weight.stride[3] == 1 && p.D >= kTurned<A> * kTerm<X> && p.D % kTerm<X> == 0 &&
           p.weight.stride[2] % kTerm<X> == 0;
  }

  Matrix<X> as_it_lies(int64_t i) const {
    const Problem& p = layout_.p;
    const int64_t* stride = p.weight.stride;
    const int64_t each = p.D * p.O * int64_t(sizeof(X)), all = p.J * each;  // bytes
    const bool turned = !lies_in_rows(), one = turned && features_follow();
    // Of a later W_i, or, if that is far, of a later j.
    const int64_t ahead = all <= 4 * kAheadInOrder ? maximum(1, kAheadInOrder / all) * stride[0]
                                                   : maximum(1, kAheadInOrder / each) * stride[1];
    return {static_cast<const X*>(p.weight.data) + i * stride[0],
            stride[turned ? 2 : 3],
            one ? layout_.sums() : layout_.O,
            one ? 1 : p.J,
            stride[1],
            layout_.O - p.O,
            turned,
            ahead};
  }

  // W_ij to [D, O], its rows `next_row` apart; `later` is another matrix, which is asked for.
  void bring_one(const X* from, const X* later, X* to, int64_t next_row) const {
    const Problem& p = layout_.p;
    const int64_t *stride = p.weight.stride, D = p.D;
    if (stride[2] == 1) return copy_rows(from, later, stride[3], to, next_row);
    if (stride[3] == 1)
      transpose_rows(from, stride[2], p.O, D, to, next_row, stride[2] == D ? later - from : 0);
    else
      for (int64_t d = 0; d < D; ++d)
        for (int64_t o = 0; o < p.O; ++o) to[d * next_row + o] = from[d * stride[3] + o * stride[2]];
    for (int64_t d = 0; d < D && layout_.O > p.O; ++d)
      for (int64_t o = p.O; o < layout_.O; ++o) to[d * next_row + o] = X{};
  }

  void copy_rows(const X* from, const X* later, int64_t stride, X* to, int64_t next_row) const {
    // Sizes of their own: for all that the compiler knows a copy of bytes could change those of the layout.
    const int64_t D = layout_.p.D, O = layout_.p.O, whole = O / L<A> * L<A>;
    for (int64_t o = 0; o < whole; o += L<A>)
      for (int64_t d = 0; d < D; ++d) {
        ask_for(later + d * stride + o);
        __builtin_memcpy(to + d * next_row + o, from + d * stride + o, L<A> * sizeof(X));
      }
    for (int64_t d = 0; d < D && whole < O; ++d)
      copy_some(to + d * next_row + whole, from + d * stride + whole, O - whole);
  }

  const Layout<X>& layout_;
  const X* pair_ = nullptr;  // + i * size(), or as it was given, if it is brought into order as it is read
};

}  // namespace capsroute::CAPSROUTE_ISA
