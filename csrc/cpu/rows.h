// Where the rows of a pass come from: L input capsules of one sample at a time, as a Block.
#pragma once

#include "samples.h"
#include "weights.h"

namespace capsroute::CAPSROUTE_ISA {

// Where a lane is a sample and the weight must be widened, this is done for a whole group at once, if the result is no
// larger than that.
constexpr int64_t kGroupWeight = int64_t(512) << 10;
// The weight of a block that samples in turn multiply, kSamples at a time, for as many features of each row as stay in
// the second-level cache.
constexpr int64_t kPartWeight = int64_t(256) << 10, kFewestVectors = 8;

// Up to L input capsules of one sample. Lanes that are masked, or past the last one, are not live: the former have rows
// of zeros, the latter have no rows.
template <class A>
struct Block {
  const A* rows;  // h_ij[f] at rows[l * row + j * column + f]
  int64_t row, column;
  int64_t count;   // lanes with rows
  Vec<A> live;     // 1, or 0
  const A* prior;  // [J, L] prior logits, 0 where not live, or null
  bool forbids;    // some prior logit of a live lane is -inf: that pair's row is zero
};

// One input capsule of L samples: a lane is a sample. Those past the end of a tile are not live.
template <class A>
struct SampleBlock {
  const A* rows;   // h_ij[f] at rows[(j * F + f) * L], by lanes
  Vec<A> live;     // 1, or 0
  const A* prior;  // [J, L], as above
  bool forbids;
};

// The same where the dot products with a query are known already: they are given in its place.
template <class A>
struct DottedBlock : SampleBlock<A> {};

// Calls visit with a pointer to the numbers of a bias or logits: those of u's type X, its `own`, or float.
template <class X, class Visit>
CAPSROUTE_INLINE void with_parameter(const Array& array, DType own, const Visit& visit) {
  if (array.dtype == own)
    visit(static_cast<const X*>(array.data));
  else
    visit(static_cast<const float*>(array.data));
}

template <class X>
class Rows {
 public:
  using A = Acc<X>;
  Rows(const Layout<X>& layout, const Weights<X>& weights) : layout_(layout), p_(layout.p), weights_(weights) {}

  // Scratch of one thread: a block's input capsules for kSamples samples, its votes, and its prior logits, or a group's
  // if the weight is shared.
  struct Scratch {
    A* inputs;
    Term<X>* terms;  // of these, where they are pairs
    A* staged;
    A* prior;
    int64_t products;  // in turn, that a W_i is read for
    X* weight;         // W_i, where it is brought into order as it is read, of a block if that is for several
    int64_t next;      // numbers from one W_i to the next, or 0
    static Scratch carve(const Layout<X>& layout, const Weights<X>& weights, int64_t products, Carver& carver) {
      Scratch s;
      const bool again = products > 1;
      s.products = products;
      s.next = again ? weights.size() : 0;
      s.weight = weights.as_read ? carver.take<X>((again ? L<A> : 1) * weights.size()) : nullptr;
      s.inputs = carver.take<A>(kSamples * L<A> * maximum(layout.p.D, 1));
      s.terms = kTerm<X> > 1 ? carver.take<Term<X>>(kSamples * L<A> * divide_up(layout.p.D, kTerm<X>)) : nullptr;
      const bool may_spread = layout.shared && layout.p.logits.data;
      s.staged = carver.take<A>(kSamples * layout.block_size() + (may_spread ? L<A> * layout.sums() : 0));
      s.prior = carver.take<A>((layout.shared ? kGroup / L<A> : 1) * layout.lanes());
      return s;
    }
  };

  // The same where a lane is a sample.
  struct SampleScratch {
    A* inputs;         // [L samples][L, D]
    A* numbers;        // [L, D][L samples]
    Term<X>* by_lane;  // [2][L, terms][L samples]
    Term<X>* weight;   // [L or kGroup, terms, J, F], or null where there are such terms of the whole weight
    bool by_group;     // those of a group are made at once
    X* ordered;        // W_i, where terms are made of it and it is brought into order as it is read
    A* votes;          // [run][J, F][L samples]
    A* prior;          // [J][L samples]
    A* dots[2];        // [J][L samples]
    static SampleScratch carve(const Layout<X>& layout, const Weights<X>& weights, int64_t run, Carver& carver) {
      SampleScratch s;
      s.inputs = carver.take<A>(L<A> * L<A> * layout.p.D);
      s.numbers = kTerm<X> > 1 ? carver.take<A>(L<A> * L<A> * layout.p.D) : nullptr;
      const int64_t terms = divide_up(layout.p.D, kTerm<X>), weight = terms * layout.sums();
      s.by_lane = carver.take<Term<X>>(2 * L<A> * L<A> * terms);
      s.by_group = kGroup * weight * int64_t(sizeof(Term<X>)) <= kGroupWeight;
      s.weight = weights.whole ? nullptr : carver.take<Term<X>>((s.by_group ? kGroup : L<A>)*weight);
      s.ordered = weights.as_read && !std::is_same_v<X, A> ? carver.take<X>(weights.size()) : nullptr;
      s.votes = carver.take<A>(run * layout.sums() * L<A>);
      s.prior = carver.take<A>(layout.lanes());
      for (A*& dots : s.dots) dots = carver.take<A>(layout.lanes());
      return s;
    }
  };

  // Input capsule u_i of sample b, [D], in the accumulation type; zeros where it is masked.
  void input(int64_t b, int64_t i, A* u) const {
    const int64_t* stride = p_.u.stride;
    if (masked(b, i))
      set_zero(u, p_.D);
    else
      widen(u, static_cast<const X*>(p_.u.data) + b * stride[0] + i * stride[1], stride[2], p_.D, p_.D);
  }

  // `count` <= L input capsules from i0 on for `samples` samples, to to[n][count][D].
  void inputs(int64_t b, int64_t samples, int64_t i0, int64_t count, A* to) const {
    const int64_t numbers = count * p_.D;
    for (int64_t n = 0; n < samples; ++n)
      if (inputs_follow() && !p_.mask.data)
        widen(to + n * numbers, first_input(b + n, i0), 1, numbers, numbers);
      else
        for (int64_t l = 0; l < count; ++l) input(b + n, i0 + l, to + n * numbers + l * p_.D);
  }

  // Weight::pair: the votes h_ij = W_ij u_i of `count` input capsules of a block from i0 on, for `samples` <= kSamples
  // samples, to staged[n][l][J, F]; and what sum_votes gives, if wanted, while a weight is near. `again`: for other
  // samples it was made last.
  void make_votes(int64_t b, int64_t samples, int64_t i0, int64_t count, bool again, A* staged, const Scratch& scratch,
                  A* total = nullptr) const {
    const int64_t D = p_.D, votes = layout_.sums();
    const Term<X>* u = input_terms(b, samples, i0, count, scratch);
    for (int64_t l = 0; l < count; ++l) {
      const Term<X>* x[kSamples];
      A* to[kSamples];
      for (int64_t n = 0; n < samples; ++n)
        x[n] = u + (n * count + l) * terms(), to[n] = staged + n * layout_.block_size() + l * layout_.row;
      const Matrix<X> weight = weight_of(i0 + l, l, again, scratch);
      apply(weight, x, D, to, samples);
      if (!total) continue;
      for (int64_t n = 0; n < samples; ++n) to[n] = total + n * votes;
      apply(weight, x, D, to, samples, l == 0);
    }
  }

  // Weight::pair: y_n = sum over the block's i of h_ij, [J, F], for which no single vote is needed; `size` numbers of
  // it from f on.
  void sum_votes(int64_t b, int64_t samples, int64_t i0, bool again, int64_t f, int64_t size, A* y,
                 const Scratch& scratch) const {
    const int64_t count = minimum(L<A>, p_.I - i0), votes = layout_.sums();
    const Term<X>* u = input_terms(b, samples, i0, count, scratch);
    const int64_t some = p_.D % kTerm<X> || weights_.as_read ? 1 : count;  // a term is of one input capsule
    for (int64_t l = 0; l < count; l += some) {
      const Term<X>* x[kSamples];
      A* to[kSamples];
      for (int64_t n = 0; n < samples; ++n) x[n] = u + (n * count + l) * terms(), to[n] = y + n * votes + f;
      Matrix<X> weight = weight_of(i0 + l, l, again || f > 0, scratch);
      if (size < votes) weight.at += f, weight.size = size;
      apply(weight, x, some * p_.D, to, samples, l == 0);
    }
  }

  // How many numbers of [J, F] of such sums are made at a time for `samples` samples.
  int64_t part_of_sums(int64_t samples) const {
    if (samples <= (weights_.as_read ? kFewProducts : 1) * kSamples) return layout_.sums();
    const int64_t vector = L<A> * L<A> * p_.D * int64_t(sizeof(X));  // bytes of the weight of a block, for L numbers
    return minimum(layout_.sums(), maximum(kFewestVectors, kPartWeight / vector) * L<A>);
  }

  // What is multiplied for the features of an input capsule: so many terms.
  int64_t terms() const { return divide_up(p_.D, kTerm<X>); }

  // The input capsules of the block at i0 for `samples` <= L samples, a lane for each, to by_lane[L, terms][L].
  void inputs_by_lane(int64_t b, int64_t samples, int64_t i0, Term<X>* by_lane, const SampleScratch& scratch) const {
    const int64_t count = minimum(L<A>, p_.I - i0), numbers = count * p_.D;
    if constexpr (std::is_same_v<X, A>)
      if (inputs_follow() && !p_.mask.data)
        return to_lanes(first_input(b, i0), p_.u.stride[0], samples, numbers, by_lane);
    inputs(b, samples, i0, count, scratch.inputs);
    if constexpr (kTerm<X> == 1) {
      to_lanes(scratch.inputs, numbers, samples, numbers, by_lane);
    } else {
      to_lanes(scratch.inputs, numbers, samples, numbers, scratch.numbers);
      make_terms<X>(scratch.numbers, count, p_.D, L<A>, by_lane);
    }
  }

  // The weight of a whole group, for all samples that follow, if it is to be made at once.
  void make_weight(int64_t group, const SampleScratch& scratch) const {
    if (scratch.weight && scratch.by_group)
      make_weight(group * kGroup, minimum(kGroup, p_.I - group * kGroup), scratch);
  }

  // Weight::pair: the votes h_ij = W_ij u_i of input capsule i, given by lane, to votes[J, F][L], for G groups of
  // samples; or the sum of those of `inputs` capsules from i on.
  template <int G>
  void make_sample_votes(int64_t i, int64_t inputs, const Term<X>* const* u, A* const* votes,
                         const SampleScratch& scratch) const {
    votes_of_samples<G>(sample_weight(i, inputs, scratch), u, inputs * terms(), layout_.sums(), votes);
  }

  // The same for one group, where F = L, with their dot products with up to two queries, to dots[J][L].
  void make_votes_and_dots(int64_t i, const Term<X>* u, A* votes, const A* const* query, A* const* dots,
                           const SampleScratch& scratch) const {
    const Term<X>* weight = sample_weight(i, 1, scratch);
    if (p_.D == 8)
      votes_and_dots(weight, u, Known<8 / kTerm<X>>(), p_.J, votes, query, dots);
    else
      votes_and_dots(weight, u, terms(), p_.J, votes, query, dots);
  }

  // Input capsule i of L samples from b on, as lanes with their votes: which are live, and their prior logits.
  SampleBlock<A> samples(int64_t b, int64_t count, int64_t i, A* votes, A* prior, A* const* dots = nullptr) const {
    SampleBlock<A> block{votes, all<A>(1), nullptr, false};
    if (count < L<A> || p_.mask.data)
      for (int64_t n = 0; n < L<A>; ++n) block.live[n] = n < count && !masked(b + n, i);
    if (p_.logits.data) {
      with_parameter<X>(p_.logits, p_.u.dtype,
                        [&](const auto* logits) { gather_prior(block, logits, b, count, i, prior); });
      if (block.forbids) clear_forbidden(block, votes, dots);
    }
    return block;
  }

  // The block at i0 of sample b without its rows: which lanes are live, and their prior logits.
  Block<A> lanes(int64_t b, int64_t i0, A* prior) const {
    const int64_t count = minimum(L<A>, p_.I - i0);
    Block<A> block{nullptr, 0, 0, count, all<A>(1), nullptr, false};
    if (count < L<A> || p_.mask.data)
      for (int64_t l = 0; l < L<A>; ++l) block.live[l] = l < count && !masked(b, i0 + l);
    if (p_.logits.data)
      with_parameter<X>(p_.logits, p_.u.dtype,
                        [&](const auto* logits) { gather_prior(block, logits, b, i0, count, prior); });
    return block;
  }

  // Whether samples have lanes of their own, not one mask and prior logits for all.
  bool lanes_differ() const {
    return (p_.mask.data && p_.mask.stride[0] != 0) || (p_.logits.data && p_.logits.stride[0] != 0);
  }

  // Whether some pair may be forbidden; and whether one is: by its prior logit, and where the softmax runs over i by
  // the mask too.
  bool may_forbid() const { return p_.logits.data || (p_.mask.data && p_.over_inputs); }
  bool forbids(int64_t b, int64_t i, int64_t j) const {
    if (masked(b, i) || !p_.logits.data) return masked(b, i) && p_.over_inputs;
    const int64_t* stride = p_.logits.stride;
    bool found = false;
    with_parameter<X>(p_.logits, p_.u.dtype, [&](const auto* logits) {
      found = to_acc(logits[b * stride[0] + i * stride[1] + j * stride[2]]) == kForbidden<A>;
    });
    return found;
  }

  // The block at i0 of sample b, from its lanes. `staged` holds its votes if make_votes made them, and is where
  // a block is copied that cannot be read in place.
  Block<A> block(Block<A> block, int64_t b, int64_t i0, A* staged) const {
    block.rows = staged, block.row = layout_.row, block.column = layout_.column;
    if (p_.form != Weight::pair && !read_in_place(block, b, i0)) stage(block, b, i0, staged);
    if (block.forbids) clear_forbidden(block, staged);
    return block;
  }

 private:
  // W_i of the l-th input capsule of those that are taken together.
  Matrix<X> weight_of(int64_t i, int64_t l, bool again, const Scratch& scratch) const {
    return weights_.of(i, scratch.products, scratch.products, scratch.weight + l * scratch.next, again);
  }

  // What `inputs` gives, as terms: [n][count][terms].
  const Term<X>* input_terms(int64_t b, int64_t samples, int64_t i0, int64_t count, const Scratch& scratch) const {
    inputs(b, samples, i0, count, scratch.inputs);
    if constexpr (kTerm<X> == 1) {
      return scratch.inputs;
    } else {
      make_terms<X>(scratch.inputs, samples * count, p_.D, scratch.terms);
      return scratch.terms;
    }
  }

  // Whether the input capsules of a sample lie one after another.
  bool inputs_follow() const { return p_.u.stride[1] == p_.D && p_.u.stride[2] == 1; }
  const X* first_input(int64_t b, int64_t i0) const {
    return static_cast<const X*>(p_.u.data) + b * p_.u.stride[0] + i0 * p_.D;
  }

  void make_weight(int64_t i, int64_t inputs, const SampleScratch& scratch) const {
    const int64_t count = layout_.sums(), size = terms() * count;
    if (!weights_.as_read) return make_terms<X>(weights_.in_order(i), inputs, p_.D, count, scratch.weight);
    for (int64_t l = 0; l < inputs; ++l)
      if constexpr (std::is_same_v<X, A>) {
        weights_.bring(i + l, scratch.weight + l * size);
      } else {
        weights_.bring(i + l, scratch.ordered);
        make_terms<X>(scratch.ordered, 1, p_.D, count, scratch.weight + l * size);
      }
  }

  // [inputs][terms, J, F]
  const Term<X>* sample_weight(int64_t i, int64_t inputs, const SampleScratch& scratch) const {
    const int64_t size = terms() * layout_.sums();
    if (weights_.whole) {
      if constexpr (std::is_same_v<X, A>) return weights_.in_order(i);
      return weights_.terms + i * size;
    }
    if (scratch.by_group) return scratch.weight + i % kGroup * size;
    make_weight(i, inputs, scratch);
    return scratch.weight;
  }

  bool masked(int64_t b, int64_t i) const {
    const auto* mask = static_cast<const uint8_t*>(p_.mask.data);
    return mask && !mask[b * p_.mask.stride[0] + i * p_.mask.stride[1]];
  }

  template <class From>
  void gather_prior(Block<A>& block, const From* logits, int64_t b, int64_t i0, int64_t count, A* prior) const {
    const int64_t* stride = p_.logits.stride;
    logits += b * stride[0] + i0 * stride[1];
    for (int64_t l = 0; l < L<A>; ++l) {
      const From* from = logits + l * stride[1];
      const bool live = l < count && block.live[l] != 0;
      for (int64_t j = 0; j < p_.J; ++j) prior[j * L<A> + l] = live ? A(to_acc(from[j * stride[2]])) : 0;
    }
    block.prior = prior;
    Mask<A> never{};
    for (int64_t j = 0; j < p_.J; ++j) never |= load(prior + j * L<A>) == kForbidden<A>;
    block.forbids = any(never);
  }

  template <class From>
  void gather_prior(SampleBlock<A>& block, const From* logits, int64_t b, int64_t count, int64_t i, A* prior) const {
    const int64_t* stride = p_.logits.stride;
    logits += b * stride[0] + i * stride[1];
    const Mask<A> live = block.live != 0;
    Mask<A> never{};
    for (int64_t j = 0; j < p_.J; ++j) {
      Vec<A> own = all<A>(to_acc(logits[j * stride[2]]));
      for (int64_t n = 1; stride[0] != 0 && n < L<A>; ++n)
        own[n] = n < count ? A(to_acc(logits[n * stride[0] + j * stride[2]])) : 0;
      own = live ? own : all<A>(0);
      store(prior + j * L<A>, own);
      never |= own == kForbidden<A>;
    }
    block.prior = prior, block.forbids = any(never);
  }

  // Rows given in the accumulation type, in whole vectors and none masked, need no copy.
  bool read_in_place(Block<A>& block, int64_t b, int64_t i0) const {
    const int64_t* stride = p_.u.stride;
    if constexpr (sizeof(X) == sizeof(A)) {
      const bool dense = stride[layout_.shared ? 2 : 3] == 1 && layout_.F == layout_.features;
      if (!dense || block.forbids || sum_lanes(block.live) < block.count) return false;
      block.rows = static_cast<const A*>(p_.u.data) + b * stride[0] + i0 * stride[1];
      block.row = stride[1], block.column = layout_.shared ? 0 : stride[2];
      return true;
    }
    return false;
  }

  void stage(const Block<A>& block, int64_t b, int64_t i0, A* staged) const {
    const int64_t* stride = p_.u.stride;
    const int64_t outputs = layout_.shared ? 1 : p_.J, F = layout_.F;
    for (int64_t l = 0; l < block.count; ++l) {
      A* row = staged + l * layout_.row;
      const X* from = static_cast<const X*>(p_.u.data) + b * stride[0] + (i0 + l) * stride[1];
      if (block.live[l] == 0)
        set_zero(row, outputs * F);
      else if (layout_.shared)
        widen(row, from, stride[2], layout_.features, F);
      else
        for (int64_t j = 0; j < outputs; ++j) widen(row + j * F, from + j * stride[2], stride[3], layout_.features, F);
    }
  }

  // Forbidden pairs couple with 0, but 0 * NaN is NaN: their rows must be zeros.
  void clear_forbidden(Block<A>& block, A* staged) const {
    if (layout_.shared) {
      bool all_finite = true;  // then 0 times a row is 0; row by row, as what lies between them may be anything
      for (int64_t l = 0; l < block.count; ++l) all_finite = all_finite && finite(staged + l * layout_.row, layout_.F);
      if (all_finite) return;
      spread(block, staged);
    }
    for (int64_t j = 0; j < p_.J; ++j)
      for (int64_t l = 0; l < block.count; ++l)
        if (block.prior[j * L<A> + l] == kForbidden<A>) set_zero(staged + l * block.row + j * block.column, layout_.F);
  }

  void clear_forbidden(const SampleBlock<A>& block, A* votes, A* const* dots) const {
    for (int64_t j = 0; j < p_.J; ++j) {
      const Mask<A> never = load(block.prior + j * L<A>) == kForbidden<A>;
      for (int t = 0; dots && t < 2; ++t) store(dots[t] + j * L<A>, never ? all<A>(0) : load(dots[t] + j * L<A>));
      for (int64_t k = j * layout_.F; k < (j + 1) * layout_.F; ++k)
        store(votes + k * L<A>, never ? all<A>(0) : load(votes + k * L<A>));
    }
  }

  // One row for every j, in place of one for all: from the last on, so that no row is overwritten before it is moved; a
  // row and the place that it goes to may overlap.
  void spread(Block<A>& block, A* staged) const {
    if (p_.J == 1) return;
    block.row = p_.J * layout_.F, block.column = layout_.F;
    for (int64_t l = block.count - 1; l >= 0; --l)
      for (int64_t j = p_.J - 1; j >= 0; --j)
        std::memmove(staged + l * block.row + j * block.column, staged + l * layout_.row, layout_.F * sizeof(A));
  }

  static bool finite(const A* x, int64_t count) {
    A zero = 0;
    for (int64_t k = 0; k < count; ++k) zero += x[k] * 0;
    return zero == 0;
  }

  const Layout<X>& layout_;
  const Problem& p_;
  const Weights<X>& weights_;
};

}  // namespace capsroute::CAPSROUTE_ISA
