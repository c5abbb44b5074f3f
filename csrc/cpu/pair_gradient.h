// The gradient of a weight of each pair, dW_i = sum over samples of dh_i u_i^T: how it is summed, and brought to where
// it goes.
#pragma once

#include "backward_plan.h"

namespace capsroute::CAPSROUTE_ISA {

// dW_i [J, O, D] is made as it is wanted, of vectors of D features, or of halves of vectors if these are no shorter
// than 16 bytes, or of parts. Those take more multiplications, so that for more samples another order is put right in
// the end.
constexpr bool kHasHalves = CAPSROUTE_VECTOR_BYTES >= 32;
constexpr int64_t kFewForHalves = 4 * kSubBatch, kFewForParts = kSubBatch / 2;
// What so many sub-batches give is summed before it joins the sum over the batch: a number that many are added to one
// by one loses the digits of each. That longer sum is one of float64, if it takes no more than kLongSumBytes.
constexpr int64_t kSummedSubBatches = 16, kLongSumBytes = int64_t(8) << 20;

template <class X>
class PairGradient {
 public:
  using A = Acc<X>;

  // Of one thread.
  struct Scratch {
    A* group;     // [lanes][D, J, O], of a group of samples
    X* narrowed;  // a piece of dW_i, before its features are put last
  };

  PairGradient(const Layout<X>& layout, const Backward& out, int64_t sub_batch, int64_t chunk, Carver& carver)
      : layout_(layout),
        p_(layout.p),
        out_(out),
        wanted_(out.weight && layout.p.form == Weight::pair),
        features_last_(out.order == Order::IJOD || out.order == Order::JIOD),
        pieces_(out.order == Order::IDJO || out.order == Order::IJOD ? 1 : p_.J),
        each_(p_.D * p_.J * p_.O),
        piece_(each_ / pieces_),
        group_(kSummedSubBatches * sub_batch) {
    // A whole batch in one write: nothing of dW is needed again.
    const bool once = p_.B <= sub_batch, aligned = uintptr_t(out.weight) % CAPSROUTE_VECTOR_BYTES == 0;
    const bool same = std::is_same_v<X, A>;
    const bool whole = p_.D % L<A> == 0;
    straight_ = features_last_ && (whole || p_.B <= (halves() ? kFewForHalves : kFewForParts));
    if (!wanted_) return;
    // Where rows of what one j gives are far apart and do not fill vectors they are better put together first.
    const bool scattered = !straight_ && pieces_ == 1 && layout.O != p_.O;
    const bool made = straight_ ? whole || same : !features_last_ && !scattered;
    const bool fits = made && (once || (same && pieces_ == 1));
    const int64_t numbers = p_.I * each_;
    const bool is_long = p_.B > group_ && numbers * int64_t(sizeof(double)) <= kLongSumBytes;
    at_once_ = !fits && p_.B <= minimum(group_, chunk);
    in_groups_ = at_once_ || p_.B > group_;
    in_place_ = (fits || (same && (pieces_ == 1 || in_groups_))) && !is_long && !at_once_;
    if (is_long)
      long_sum_ = carver.take<double>(numbers);
    else if (!in_place_ && !at_once_)
      sum_ = carver.take<A>(numbers);
    // The system zeroes pages as it gives them: new memory is in a cache then, and stores past it only lose.
    if (in_place_ && aligned && (straight_ ? whole || halves() : layout.O == p_.O) && once && !out.ask_for_pages)
      first_write_ = Write::set_past;
  }

  Scratch carve_scratch(int64_t lanes, Carver& carver) const {
    A* group = carver.take<A>(in_groups_ ? lanes * each_ : 0);
    return {group, carver.take<X>(wanted_ && features_last_ && !straight_ ? piece_ : 0)};
  }

  bool wanted() const { return wanted_; }

  // Before the first sample of `count` input capsules from i on.
  void begin(int64_t i, int64_t count) const {
    if (in_place_ || at_once_) ask_for_memory(i, count);
  }

  // Adds sum over samples of u dh^T to dW_i, with u [D], u_stride apart, and dh [J, F]; i is the l-th of those that are
  // taken together, and the samples are those from m on of the chunk that begins with `first`.
  void add(int64_t i, int64_t l, int64_t first, int64_t m, const A* u, int64_t u_stride, const A* dh, int64_t samples,
           const Scratch& scratch) const {
    if (!wanted_) return;
    auto add_to = [&](auto* dW, bool is_first) {
      const int64_t apart = in_place_ && !in_groups_ && pieces_ > 1 ? place(i, 1) - place(i, 0) : 0;
      add_outer(dW, apart, u, u_stride, dh, samples, is_first ? first_write_ : Write::add);
    };
    if (in_groups_)
      add_to(scratch.group + l * each_, m % group_ == 0);
    else if (in_place_)
      add_to(place(i, 0), first + m == 0);
    else
      add_to(sum_ + i * each_, first + m == 0);
  }

  // After the samples up to `end` of that chunk, or the `last`, for `count` input capsules from i on.
  void end_sub_batch(int64_t i, int64_t count, int64_t first, int64_t end, bool last, const Scratch& scratch) const {
    if (!in_groups_ || !(last || end % group_ == 0)) return;
    at_once_ ? write(i, count, scratch.group, scratch) : join_group(i, count, first == 0 && end <= group_, scratch);
  }

  // After the last chunk: sums over the batch, to where they go.
  void finish(int64_t i, int64_t count, const Scratch& scratch) const {
    if (sum_ || long_sum_) ask_for_memory(i, count);
    if (sum_) write(i, count, sum_ + i * each_, scratch);
    if (long_sum_) write(i, count, long_sum_ + i * each_, scratch);
    for (int64_t l = 0; in_place_ && features_last_ && !straight_ && l < count; ++l)
      for (int64_t j = 0; j < pieces_; ++j) {
        std::memcpy(scratch.narrowed, place(i + l, j), piece_ * sizeof(X));
        put_last(scratch.narrowed, place(i + l, j));
      }
    if (first_write_ == Write::set_past) finish_stores();
  }

 private:
  // Where the j-th piece of dW_i goes, which lies in a row.
  X* place(int64_t i, int64_t j) const {
    const bool inputs_inside = out_.order == Order::JIDO || out_.order == Order::JIOD;
    return static_cast<X*>(out_.weight) + (inputs_inside ? j * p_.I + i : i * pieces_ + j) * piece_;
  }

  // Visits the rows of dW_i, as it is made, that lie in a row in its j-th piece too, before features are put last
  // there: visit(at, from, count), with the place in the piece and that in dW_i.
  template <class Visit>
  void for_rows(int64_t j, const Visit& visit) const {
    if (straight_ || pieces_ == 1) return visit(0, j * piece_, piece_);
    for (int64_t d = 0; d < p_.D; ++d) visit(d * p_.O, (d * p_.J + j) * p_.O, p_.O);
  }

  // Whether rows of D features are made of halves of vectors.
  bool halves() const { return kHasHalves && p_.D % L<A> != 0 && p_.D % (L<A> / 2) == 0; }

  void put_last(const X* piece, X* to) const { transpose_rows(piece, piece_ / p_.D, p_.D, piece_ / p_.D, to, p_.D); }

  // `apart`: from what one j gives to that of the next, where each of these is [D, O] by itself; else 0.
  template <class T>
  void add_outer(T* dW, int64_t apart, const A* u, int64_t u_stride, const A* dh, int64_t samples, Write write) const {
    const int64_t sums = layout_.sums(), D = p_.D, O = p_.O;
    const bool at_once = apart == 0 && O == layout_.O;
    const int64_t features = at_once ? sums : O, row = apart ? O : p_.J * O;
    const int64_t next = apart ? apart : straight_ ? O * D : O;
    for (int64_t j = 0; j < (at_once ? 1 : p_.J); ++j, dW += next, dh += layout_.O)
      if (!straight_)
        outer<Vec<A>>(dW, row, u, u_stride, D, dh, sums, features, samples, write);
      else if (!halves())
        outer<Vec<A>>(dW, D, dh, sums, features, u, u_stride, D, samples, write);
      else if constexpr (std::is_same_v<T, A> && kHasHalves)
        outer<HalfVec<A>>(dW, D, dh, sums, features, u, u_stride, D, samples, write);
  }

  // dW_i += what a group of samples gave.
  void join_group(int64_t i, int64_t count, bool is_first, const Scratch& scratch) const {
    auto add_to = [&](auto* to, const A* from, int64_t numbers) {
      for (int64_t k = 0; k < numbers; ++k) to[k] = is_first ? from[k] : to[k] + from[k];
    };
    if (long_sum_) return add_to(long_sum_ + i * each_, scratch.group, count * each_);
    if (sum_) return add_to(sum_ + i * each_, scratch.group, count * each_);
    if constexpr (std::is_same_v<X, A>)
      for (int64_t l = 0; l < count; ++l)
        for (int64_t j = 0; j < pieces_; ++j)
          for_rows(j, [&](int64_t at, int64_t from, int64_t numbers) {
            add_to(place(i + l, j) + at, scratch.group + l * each_ + from, numbers);
          });
  }

  void ask_for_memory(int64_t i, int64_t count) const {
    const int64_t each = p_.D * p_.J * p_.O * int64_t(sizeof(X));
    if (out_.ask_for_pages && place(1, 0) - place(0, 0) == pieces_ * piece_)  // not if pieces of all i lie between
      out_.ask_for_pages(place(i, 0), count * each);
  }

  // dW_i, as it is made, to its dtype, shape and order.
  template <class T>
  void write(int64_t i, int64_t count, const T* dW, const Scratch& scratch) const {
    for (int64_t l = 0; l < count; ++l, dW += each_)
      for (int64_t j = 0; j < pieces_; ++j) {
        X *to = place(i + l, j), *own = features_last_ && !straight_ ? scratch.narrowed : to;
        for_rows(j, [&](int64_t at, int64_t from, int64_t numbers) { narrow(own + at, dW + from, numbers); });
        if (own != to) put_last(own, to);
      }
  }

  const Layout<X>& layout_;
  const Problem& p_;
  const Backward& out_;
  const bool wanted_, features_last_;
  const int64_t pieces_;        // dW_i goes to so many places, 1 or J,
  const int64_t each_, piece_;  // and is of so many numbers, a piece of so many, [D, J, O] or [D, O]
  const int64_t group_;         // samples whose sums are made apart, if there are more
  bool straight_;               // dW_i is made as [J, O, D], of rows of dh and vectors of u; else as [D, J, O]
  bool in_place_ = false;       // it is made where it goes, or
  bool at_once_ = false;        // in one group, and then written to where it goes, or
  A* sum_ = nullptr;            // of all I, or
  double* long_sum_ = nullptr;  // the same, of many groups
  bool in_groups_ = false;      // of samples, whose dW are summed apart
  Write first_write_ = Write::set;
};

}  // namespace capsroute::CAPSROUTE_ISA
