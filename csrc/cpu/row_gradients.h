// The second part of the backward, by input capsules: see backward_plan.h.
#pragma once

#include "logit_stream.h"

namespace capsroute::CAPSROUTE_ISA {

// Samples and input capsules whose dh is made together: 4 capsules share a load of e^k and q^k, and 8
// samples one of W and dW, and their dh stays in the first-level cache.
constexpr int64_t kSubBatch = 8;
template <class A>
inline constexpr int64_t kSubLanes = W<A> < 4 ? W<A> : 4;

template <class A>
CAPSROUTE_INLINE void write_as(void* to, DType dtype, int64_t at, A value) {
  switch (dtype) {
    case DType::float32: static_cast<float*>(to)[at] = float(value); break;
    case DType::float64: static_cast<double*>(to)[at] = double(value); break;
    case DType::bfloat16: static_cast<BFloat16*>(to)[at] = from_acc<BFloat16>(float(value)); break;
    case DType::float16: static_cast<Half*>(to)[at] = from_acc<Half>(float(value)); break;
  }
}

template <class X>
class RowGradients {
 public:
  using A = Acc<X>;

  RowGradients(const BackwardPlan<X>& plan, const Kept<X>& kept, const LogitStream<X>& logits, Carver& carver,
               const Parallel& parallel)
      : plan_(plan), layout_(plan.layout), p_(plan.p), out_(plan.out), kept_(kept), logits_(logits) {
    const int64_t parts = minimum(parallel.threads, maximum(1, layout_.blocks));
    if (out_.weight && p_.form == Weight::pair)
      dW_ = in_place() ? static_cast<A*>(out_.weight) : carver.take<A>(p_.I * p_.D * layout_.sums());
    // A whole batch in one write: nothing of dW is needed again.
    const bool aligned = reinterpret_cast<uintptr_t>(dW_) % CAPSROUTE_VECTOR_BYTES == 0;
    if (in_place() && aligned && p_.B <= kSubBatch) first_write_ = Write::set_past;
    if (plan.logits_by_row && out_.logits_B < p_.B) dlogits_ = carver.take<A>(layout_.blocks * layout_.lanes());
    scratch_ = take_shares(carver, parts, [this](Carver& own) { carve_scratch(own); });
  }

  // Adds what the samples first .. first + count of the batch contribute.
  void run(int64_t first, int64_t count, const Parallel& parallel) {
    const bool rows = out_.u || (out_.weight && p_.form == Weight::pair);
    if (!rows && !plan_.logits_by_row) return;
    parallel_for(parallel, layout_.blocks, [&](int64_t index, int64_t part) {
      Carver carver = scratch_.at(part);
      block_gradients(first, count, index * W<A>, rows, carve_scratch(carver), part);
    });
  }

 private:
  struct Scratch {
    A* uniform;             // [kSubBatch][J, W]: p^1 where it has no query
    A* pairs;               // [kSubBatch][slot][J, W], where they are not kept
    const A** coefficient;  // [terms], where all j share a row [terms][J]
    A* dh;                  // [kSubLanes<A>][kSubBatch][J, F]
    A* inputs;              // [kSubBatch][D]
    A* du;                  // [kSubBatch][D]
    A* dlogits;             // [J, W]
  };

  bool in_place() const { return sizeof(X) == sizeof(A) && layout_.O == p_.O; }

  Scratch carve_scratch(Carver& carver) const {
    Scratch s;
    s.uniform = carver.take<A>(kSubBatch * layout_.lanes());
    s.pairs = carver.take<A>(plan_.keep_pairs ? 0 : kSubBatch * kept_.block_pairs());
    s.coefficient = carver.take<const A*>(plan_.terms * (layout_.shared ? p_.J : 1));
    s.dh = carver.take<A>(kSubLanes<A> * kSubBatch * layout_.sums());
    s.inputs = carver.take<A>(kSubBatch * maximum(1, p_.D));
    s.du = carver.take<A>(kSubBatch * maximum(1, p_.D));
    s.dlogits = carver.take<A>(layout_.lanes());
    return s;
  }

  void block_gradients(int64_t first, int64_t count, int64_t i0, bool rows, const Scratch& scratch, int64_t part) {
    const int64_t lanes = minimum(W<A>, p_.I - i0);
    if (dlogits_ && first == 0) set_zero(dlogits_ + i0 * p_.J, layout_.lanes());
    Block<A> blocks[kSubBatch];
    for (int64_t m = 0; m < count; m += kSubBatch) {
      const int64_t samples = minimum(kSubBatch, count - m);
      if (!plan_.keep_pairs) make_pairs(first, m, samples, i0, scratch, part);
      for (int64_t n = 0; n < samples; ++n) {
        A* uniform = scratch.uniform + n * layout_.lanes();
        blocks[n] = logits_.stream().rows.lanes(first + m + n, i0, uniform);
        if (!plan_.queried(1)) logits_.couple_again(m + n, 1, blocks[n], uniform);
        if (p_.over_inputs && plan_.logits_move) correct_pairs(m + n, pairs(m, n, i0, scratch), uniform);
      }
      if (plan_.logits_by_row) logit_gradients(first, m, samples, i0, scratch);
      for (int64_t l = 0; rows && l < lanes; l += kSubLanes<A>)
        row_gradients(first, m, samples, i0, l, minimum(kSubLanes<A>, lanes - l), blocks, scratch);
    }
    if (first + count == p_.B) finish(i0, lanes);
    if (first_write_ == Write::set_past) finish_stores();
  }

  A* pairs(int64_t m, int64_t n, int64_t i0, const Scratch& scratch) const {
    return plan_.keep_pairs ? kept_.pair(m + n, i0) : scratch.pairs + n * kept_.block_pairs();
  }

  void make_pairs(int64_t first, int64_t m, int64_t samples, int64_t i0, const Scratch& scratch, int64_t part) const {
    const Stream<X>& stream = logits_.stream();
    const typename Stream<X>::Scratch own = stream.scratch(part);
    Block<A> lanes{};
    for (int64_t n0 = 0; n0 < samples; n0 += kSamples) {
      const int64_t some = minimum(kSamples, samples - n0);
      if (p_.form == Weight::pair) stream.rows.make_votes(first + m + n0, some, i0, own.rows.staged, own.rows.inputs);
      for (int64_t n = 0; n < some; ++n) {
        const int64_t b = first + m + n0 + n;
        if (n0 + n == 0 || stream.rows.lanes_differ()) lanes = stream.rows.lanes(b, i0, own.rows.prior);
        const Block<A> block = stream.rows.block(lanes, b, i0, own.rows.staged + n * layout_.block_size());
        const int64_t last = plan_.logits_by_row ? 1 : plan_.first_queried();
        for (int64_t k = p_.R; k >= last; --k)
          logits_.pass(m + n0 + n, k, block, pairs(m, n0 + n, i0, scratch), own, nullptr);
      }
    }
  }

  // Takes the mean's error from every db: db_ij - p_ij x_j.
  void correct_pairs(int64_t n, A* slots, const A* uniform) const {
    const int64_t lanes = layout_.lanes();
    A* logits = plan_.logits_by_row ? slots + plan_.logits_slot() * lanes : nullptr;
    for (int64_t k = 1; k <= p_.R; ++k) {
      const A *x = kept_.mean_error(n, k), *c = plan_.queried(k) ? slots + plan_.p_slot(k) * lanes : uniform;
      for (int64_t j = 0; j < p_.J; ++j) {
        const Vec<A> share = load(c + j * W<A>), error = share == 0 ? all<A>(0) : share * x[j];  // not 0 * NaN
        for (A* db : {plan_.queried(k) ? slots + plan_.db_slot(k) * lanes : nullptr, logits})
          if (db) store(db + j * W<A>, load(db + j * W<A>) - error);
      }
    }
  }

  // dh_ij = sum over terms of coefficient_ij vector_j, for the lanes l0 .. l0 + lanes of one sample; summed over j too
  // where all j share a row.
  void votes_gradient(int64_t n, const Block<A>& block, const A** coefficient, int64_t l0, A* dh) const {
    const int64_t F = layout_.F, sums = layout_.sums(), next = kSubBatch * sums, terms = plan_.terms, J = p_.J;
    const A* vectors = kept_.row(n, 0);
    const bool at_once = layout_.shared && !block.forbids;  // the vectors of all j follow each other
    if (at_once) {
      for (int64_t t = terms * J - 1; t >= 0; --t) coefficient[t] = coefficient[t / J] + t % J * W<A>;
      combine(dh, next, coefficient, l0, vectors, F, terms * J);
    }
    for (int64_t j = 0; !at_once && j < J; ++j)
      combine(dh + j * F, next, coefficient, j * W<A> + l0, vectors + j * F, sums, terms);
    for (int64_t l = 0; l < kSubLanes<A>; ++l) {  // exactly 0, also where a vector is NaN
      A* own = dh + l * next;
      if (block.live[l0 + l] == 0) set_zero(own, at_once ? F : sums);
      for (int64_t j = 0; block.forbids && j < J; ++j)
        if (coefficient[0][j * W<A> + l0 + l] == 0) set_zero(own + j * F, F);
      for (int64_t j = 1; layout_.shared && !at_once && j < J; ++j) fold_sum(own, own + j * F, F, false);
    }
  }

  // to[l] = sum over terms of coefficient[term][lane + l] vectors[term], [F], for kSubLanes lanes l
  void combine(A* to, int64_t next, const A* const* coefficient, int64_t lane, const A* vectors, int64_t stride,
               int64_t terms) const {
    constexpr int N = kSubLanes<A>;
    int64_t f = 0;
    for (; f + 2 * W<A> <= layout_.F; f += 2 * W<A>)
      combine_panel<N, 2>(to + f, next, coefficient, lane, vectors + f, stride, terms);
    for (; f < layout_.F; f += W<A>) combine_panel<N, 1>(to + f, next, coefficient, lane, vectors + f, stride, terms);
  }

  void row_gradients(int64_t first, int64_t m, int64_t samples, int64_t i0, int64_t l0, int64_t lanes,
                     const Block<A>* blocks, const Scratch& scratch) const {
    const int64_t sums = layout_.sums();
    for (int64_t n = 0; n < samples; ++n) {
      const A* kept = pairs(m, n, i0, scratch);
      const A** coefficient = scratch.coefficient;
      if (!plan_.queried(1)) coefficient[0] = scratch.uniform + n * layout_.lanes();
      for (int64_t k = plan_.first_queried(); k <= p_.R; ++k) {
        coefficient[plan_.e(k)] = kept + plan_.p_slot(k) * layout_.lanes();
        coefficient[plan_.q(k - 1)] = kept + plan_.db_slot(k) * layout_.lanes();
      }
      votes_gradient(m + n, blocks[n], coefficient, l0, scratch.dh + n * sums);
    }
    for (int64_t l = 0; l < lanes; ++l) {
      const A* dh = scratch.dh + l * kSubBatch * sums;
      if (p_.form == Weight::pair)
        pair_gradients(first + m, samples, i0 + l0 + l, dh, scratch);
      else
        for (int64_t n = 0; n < samples; ++n) given_gradient(first + m + n, i0 + l0 + l, dh + n * sums);
    }
  }

  // dW_i += sum over samples of u_i dh_i^T, du_i = W_i^T dh_i
  void pair_gradients(int64_t b, int64_t samples, int64_t i, const A* dh, const Scratch& scratch) const {
    const int64_t sums = layout_.sums(), D = p_.D;
    const Stream<X>& stream = logits_.stream();
    if (dW_) {
      for (int64_t n = 0; n < samples; ++n) stream.rows.input(b + n, i, scratch.inputs + n * D);
      outer(dW_ + i * D * sums, sums, scratch.inputs, D, D, dh, sums, sums, samples, b > 0 ? Write::add : first_write_);
    }
    if (!out_.u) return;
    const A* from[kSubBatch];
    A* to[kSubBatch];
    for (int64_t n = 0; n < samples; ++n) from[n] = dh + n * sums, to[n] = scratch.du + n * D;
    apply_transposed(stream.weights.pair + i * D * sums, sums, from, sums, to, D, samples);
    for (int64_t n = 0; n < samples; ++n) narrow(static_cast<X*>(out_.u) + ((b + n) * p_.I + i) * D, to[n], D);
  }

  // The gradient of given rows: of the votes, or of an input capsule that all j share.
  void given_gradient(int64_t b, int64_t i, const A* dh) const {
    const int64_t n = layout_.features, outputs = layout_.shared ? 1 : p_.J;
    X* to = static_cast<X*>(out_.u) + (b * p_.I + i) * n * outputs;
    for (int64_t j = 0; j < outputs; ++j) narrow(to + j * n, dh + j * layout_.F, n);
  }

  void logit_gradients(int64_t first, int64_t m, int64_t samples, int64_t i0, const Scratch& scratch) const {
    const int64_t lanes = layout_.lanes();
    for (int64_t n = 0; n < samples; ++n) {
      const A* db = pairs(m, n, i0, scratch) + plan_.logits_slot() * lanes;
      if (dlogits_)
        fold_sum(scratch.dlogits, db, lanes, n == 0);
      else
        write_logits(db, (first + m + n) * p_.I + i0, i0);
    }
    if (dlogits_) fold_sum(dlogits_ + i0 * p_.J, scratch.dlogits, lanes, false);
  }

  void write_logits(const A* db, int64_t row, int64_t i0) const {
    for (int64_t l = 0; l < minimum(W<A>, p_.I - i0); ++l)
      for (int64_t j = 0; j < p_.J; ++j) write_as(out_.logits, p_.logits.dtype, (row + l) * p_.J + j, db[j * W<A> + l]);
  }

  // After the last chunk: sums over the batch, to their own dtype and shape.
  void finish(int64_t i0, int64_t lanes) const {
    if (dW_ && !in_place())
      for (int64_t row = i0 * p_.D * p_.J; row < (i0 + lanes) * p_.D * p_.J; ++row)
        narrow(static_cast<X*>(out_.weight) + row * p_.O, dW_ + row * layout_.O, p_.O);
    if (dlogits_) write_logits(dlogits_ + i0 * p_.J, i0, i0);
  }

  const BackwardPlan<X>& plan_;
  const Layout<X>& layout_;
  const Problem& p_;
  const Backward& out_;
  const Kept<X>& kept_;
  const LogitStream<X>& logits_;
  A* dW_ = nullptr;  // [I, D, J, O]
  Write first_write_ = Write::set;
  A* dlogits_ = nullptr;  // [block][J, W], summed over the batch
  Shares scratch_;
};

}  // namespace capsroute::CAPSROUTE_ISA
