// The backward of the whole operator: its two parts, and what is summed over the batch beside them.
#pragma once

#include "row_gradients.h"

namespace capsroute::CAPSROUTE_ISA {

constexpr int64_t kSumBlock = 64;  // terms that are added before they join a longer sum, of float64

template <class X>
class BatchSums {
 public:
  using A = Acc<X>;

  BatchSums(const BackwardPlan<X>& plan, const Kept<X>& kept, const Rows<X>& rows, Carver& carver,
            const Parallel& parallel)
      : plan_(plan), layout_(plan.layout), p_(plan.p), out_(plan.out), kept_(kept), rows_(rows) {
    block_ = carver.take<A>(maximum(layout_.outputs(), pad<A>(p_.J)));
    dbias_ = out_.bias ? carver.take<double>(layout_.outputs()) : nullptr;
    dlogits_ = plan.logits_by_sum ? carver.take<double>(pad<A>(p_.J)) : nullptr;
    dW_ = out_.weight && layout_.shared ? carver.take<double>(layout_.weights * p_.O * layout_.F) : nullptr;
    const int64_t parts = out_.weight && layout_.shared ? minimum(parallel.threads, layout_.weights * quads()) : 0;
    block_dW_ = take_shares(carver, parts, [this](Carver& own) { own.take<A>(4 * layout_.F); });
  }

  void run(int64_t first, int64_t count, const Parallel& parallel) {
    const int64_t J = pad<A>(p_.J), outputs = layout_.outputs();
    if (first == 0) clear();
    if (dbias_)  // dbias = sum over samples and k of ds^k
      for (int64_t k = 1; k <= p_.R; ++k)
        add(dbias_, kept_.output(0, plan_.e(k)), plan_.terms * outputs, count, outputs);
    if (dlogits_ && out_.logits_B == 1) add(dlogits_, kept_.logit_sums, J, count, J);
    if (dlogits_ && out_.logits_B > 1)
      for (int64_t n = 0; n < count; ++n) write_logits(kept_.logit_sums + n * J, first + n);
    if (dW_ && rows_.may_forbid()) clear_forbidden(first, count);
    if (dW_) weight_gradient(count, parallel);
    if (first + count == p_.B) finish();
  }

 private:
  void clear() {
    if (dbias_) set_zero(dbias_, layout_.outputs());
    if (dlogits_) set_zero(dlogits_, pad<A>(p_.J));
    if (dW_) set_zero(dW_, layout_.weights * p_.O * layout_.F);
  }

  int64_t quads() const { return divide_up(p_.O, 4); }

  static void join(double* to, const A* from, int64_t size) {
    for (int64_t k = 0; k < size; ++k) to[k] += from[k];
  }

  void add(double* to, const A* from, int64_t stride, int64_t count, int64_t size) {
    for (int64_t n0 = 0; n0 < count; n0 += kSumBlock) {
      const int64_t end = minimum(count, n0 + kSumBlock);
      for (int64_t n = n0; n < end; ++n) fold_sum(block_, from + n * stride, size, n == n0);
      join(to, block_, size);
    }
  }

  // An output capsule whose pairs are all forbidden adds nothing to dW, also where its vector is NaN.
  void clear_forbidden(int64_t first, int64_t count) const {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t j = 0; j < p_.J; ++j) {
        int64_t i = 0;
        while (i < p_.I && rows_.forbids(first + n, i, j)) ++i;
        for (int64_t term = 0; i == p_.I && term < plan_.terms; ++term)
          set_zero(kept_.output(n, term) + j * layout_.O, layout_.O);
      }
  }

  // dW_j = sum over samples and k of ds^k_j (sum_i p^k_ij u_i)^T + V^(k-1)_j (sum_i db^k_ij u_i)^T, by
  // four rows o at a time. Where all j share one matrix they are only more terms, which follow each other.
  void weight_gradient(int64_t count, const Parallel& parallel) {
    const bool one = p_.form == Weight::single;
    const int64_t F = layout_.F, O = layout_.O;
    const int64_t terms = count * plan_.terms * (one ? p_.J : 1), next = one ? 1 : p_.J;
    parallel_for(parallel, layout_.weights * quads(), [&](int64_t item, int64_t part) {
      const int64_t j = item / quads(), o = item % quads() * 4, rows = minimum(4, p_.O - o);
      A* block = block_dW_.at(part).template take<A>(4 * F);
      for (int64_t n = 0; n < terms; n += kSumBlock) {
        outer<Vec<A>>(block, F, kept_.outputs + (n * next + j) * O + o, next * O, rows, kept_.sums + (n * next + j) * F,
                      next * F, F, minimum(kSumBlock, terms - n), Write::set);
        join(dW_ + (j * p_.O + o) * F, block, rows * F);
      }
    });
  }

  template <class T>
  void write_logits(const T* sums, int64_t row) const {
    for (int64_t j = 0; j < p_.J; ++j) write_as(out_.logits, p_.logits.dtype, row * p_.J + j, sums[j]);
  }

  void finish() const {
    for (int64_t j = 0; dbias_ && j < p_.J; ++j)
      for (int64_t o = 0; o < p_.O; ++o) write_as(out_.bias, p_.bias.dtype, j * p_.O + o, dbias_[j * layout_.O + o]);
    if (dlogits_ && out_.logits_B == 1) write_logits(dlogits_, 0);
    for (int64_t row = 0; dW_ && row < layout_.weights * p_.O; ++row)
      narrow(static_cast<X*>(out_.weight) + row * p_.D, dW_ + row * layout_.F, p_.D);
  }

  const BackwardPlan<X>& plan_;
  const Layout<X>& layout_;
  const Problem& p_;
  const Backward& out_;
  const Kept<X>& kept_;
  const Rows<X>& rows_;
  A* block_;
  double *dbias_, *dlogits_, *dW_;  // over the whole batch
  Shares block_dW_;
};

template <class X>
class BackwardStream {
 public:
  BackwardStream(const Layout<X>& layout, const Backward& out, Carver& carver, const Parallel& parallel)
      : plan_(layout, out),
        kept_(plan_, carver),
        logits_(plan_, kept_, carver, parallel),
        rows_(plan_, kept_, logits_, carver, parallel),
        sums_(plan_, kept_, logits_.stream().rows, carver, parallel) {}

  Plan plan() const {
    Plan plan = logits_.stream().plan();
    plan.keeps_pairs = plan_.keep_pairs, plan.few_inputs = rows_.few_inputs();
    return plan;
  }

  void run(const Parallel& parallel) {
    for (int64_t first = 0; first < plan_.p.B; first += plan_.chunk) {
      const int64_t count = minimum(plan_.chunk, plan_.p.B - first);
      logits_.run(first, count, parallel);
      rows_.run(first, count, parallel);
      sums_.run(first, count, parallel);
    }
  }

 private:
  const BackwardPlan<X> plan_;
  const Kept<X> kept_;
  LogitStream<X> logits_;
  RowGradients<X> rows_;
  BatchSums<X> sums_;
};

}  // namespace capsroute::CAPSROUTE_ISA
