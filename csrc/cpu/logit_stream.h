// The first part of the backward, by samples: see backward_plan.h.
#pragma once

#include "backward_plan.h"

namespace capsroute::CAPSROUTE_ISA {

template <class X>
class LogitStream {
 public:
  using A = Acc<X>;

  LogitStream(const BackwardPlan<X>& plan, const Kept<X>& kept, Carver& carver, const Parallel& parallel)
      : plan_(plan),
        layout_(plan.layout),
        p_(plan.p),
        kept_(kept),
        bias_(layout_.p.over_inputs ? widen_bias(layout_, carver) : nullptr),
        sums_((layout_.shared ? 2 : 1) * layout_.sums() + (plan.logit_sums ? pad<A>(plan.p.J) : 0)),
        stream_(layout_,
                {.batch = plan.chunk,
                 .passes = plan.p.R - plan.last_pass + 1,
                 .sums = sums_,
                 .joined = sums_,
                 .by_samples = !(plan.logits_by_row || plan.p.over_inputs),
                 .votes = const_cast<A*>(static_cast<const A*>(plan.out.votes)),
                 .room = plan.out.room,
                 .has_votes = plan.out.room > 0,
                 .times = divide_up(plan.p.B, maximum(1, plan.chunk)),
                 .reads = plan.keep_pairs ? 1 : 2},
                carver, parallel) {
    const Schedule& schedule = stream_.schedule;
    dV_ = carver.take<A>(schedule.slots * schedule.tile * layout_.outputs());
    s_ = carver.take<A>(schedule.slots * layout_.outputs());
    v_ = carver.take<A>(schedule.slots * schedule.tile * layout_.outputs());
    total_ = carver.take<A>(schedule.slots * schedule.tile * sums_);
    partial_ = carver.take<A>(schedule.partials * schedule.tile * sums_);
  }

  const Stream<X>& stream() const { return stream_; }

  // Samples first .. first + count of the batch, count <= chunk.
  void run(int64_t first, int64_t count, const Parallel& parallel) {
    first_ = first;
    const Schedule schedule = stream_.schedule.of(first, count);
    stream_.make_votes_first(schedule, parallel);
    run_stream(*this, schedule, p_.R - plan_.last_pass + 1, parallel);
  }

  // V^k from s^k, ds^R from the gradient of v.
  void begin(const Tile& tile) {
    A *s = s_ + tile.slot * layout_.outputs(), *v = of_tile(v_, tile, layout_.outputs());
    for (int64_t n = 0; n < tile.count; ++n) {
      A* V = dV(tile, n);  // free until the end of this loop
      read_query(p_, tile.sample + n, V, layout_);
      if (plan_.given) keep(tile.first + n, plan_.q(0), V);
      for (int64_t k = 1; k < p_.R; ++k) {
        read_s(tile.first + n, k, s);
        for (int64_t j = 0; j < p_.J; ++j) squash(s + j * layout_.O, v + j * layout_.O, layout_.O, p_.eps);
        fold_sum(V, v, layout_.outputs(), false);
        keep(tile.first + n, plan_.q(k), V);
      }
      set_zero(V, layout_.outputs());
      read_last(tile.first + n, v, s);
    }
    for (int64_t term = plan_.e(p_.R); term < plan_.terms; ++term) to_rows(tile, term);  // and all q
  }

  void group(const Tile& tile, int64_t step, int64_t group, int64_t partial, int64_t part) {
    const int64_t k = p_.R - step;
    const typename Stream<X>::Scratch scratch = stream_.scratch(part);
    A* sums = partial_ + partial * stream_.schedule.tile * sums_;
    if (stream_.way.by_samples()) return group_of_samples(tile, step, group, sums, scratch);
    set_zero(sums, tile.count * sums_);
    stream_.for_blocks(tile, group, step == 0, scratch, [&](int64_t n, int64_t i0, const Block<A>& block) {
      A* pairs = plan_.keep_pairs ? kept_.pair(tile.first + n, i0) : nullptr;
      pass(tile.first + n, k, block, pairs, scratch, sums + n * sums_);
    });
  }

  void fold(const Tile& tile, int64_t, int64_t partial, bool first) {
    fold_sum(total(tile, 0), partial_ + partial * stream_.schedule.tile * sums_, tile.count * sums_, first);
  }

  void finish(const Tile& tile, int64_t step) {
    const int64_t k = p_.R - step, sums = layout_.sums(), outputs = layout_.outputs();
    A *s = s_ + tile.slot * outputs, *v = of_tile(v_, tile, outputs);
    for (int64_t n = 0; n < tile.count; ++n) {
      const A *moved = total(tile, n), *coupled = moved + sums;
      if (p_.over_inputs && plan_.logits_move) correct_sums(tile, n, k, s);
      if (layout_.shared) {
        if (plan_.queried(k)) fold_sum(kept_.sum(tile.first + n, plan_.q(k - 1)), moved, sums, true);
        fold_sum(kept_.sum(tile.first + n, plan_.e(k)), coupled, sums, true);
      }
      if (plan_.logits_by_sum) {
        const int64_t J = pad<A>(p_.J);
        fold_sum(kept_.logit_sums + (tile.first + n) * J, total(tile, n) + sums_ - J, J, step == 0);
      }
    }
    if (!plan_.queried(k)) return;
    if (layout_.shared) stream_.to_outputs(total(tile, 0), sums_, v, tile.count);
    for (int64_t n = 0; n < tile.count; ++n) {
      fold_sum(dV(tile, n), layout_.shared ? v + n * outputs : total(tile, n), outputs, false);
      if (k > 1)
        keep_ds(tile.first + n, k - 1, dV(tile, n), s);
      else if (plan_.out.query)
        narrow_outputs(static_cast<A*>(plan_.out.query) + (tile.sample + n) * p_.J * p_.O, dV(tile, n), layout_);
    }
    if (k > 1) to_rows(tile, plan_.e(k - 1));
  }

  // Pass k over a block: p^k and db^k, and their sums over i, to `sums` if not null. `pairs` has the
  // block's slots, or is null.
  void pass(int64_t n, int64_t k, const Block<A>& block, A* pairs, const typename Stream<X>::Scratch& scratch,
            A* sums) const {
    with_features<A>(layout_.F, [&](auto F) { pass(n, k, block, pairs, scratch, sums, F); });
  }

  template <class Size>
  void pass(int64_t n, int64_t k, const Block<A>& block, A* pairs, const typename Stream<X>::Scratch& scratch, A* sums,
            Size F) const {
    const int64_t J = p_.J, lanes = layout_.lanes();
    A* c = p_slot(pairs, k, scratch);
    couple_again(n, k, block, c, F);
    if (sums && layout_.shared) add_block(block, c, J, F, sums + layout_.sums());
    if (!wants_db(k)) return;
    A* db = db_slot(pairs, k, scratch);
    const A* e = kept_.row(n, plan_.e(k));
    if (p_.over_inputs)
      couple_inputs_backward(block, c, e, J, F, kept_.mean(n, k), db);
    else
      couple_backward(block, c, e, J, F, db);
    if (sums && plan_.queried(k)) add_block(block, db, J, F, sums);
    if (sums && plan_.logit_sums)
      for (int64_t j = 0; j < J; ++j) sums[sums_ - pad<A>(J) + j] += sum_lanes(load(db + j * L<A>));
    if (pairs && plan_.logits_by_row) fold_sum(pairs + plan_.logits_slot() * lanes, db, lanes, k == p_.R);
  }

  // p^k of a block, as the forward had it.
  template <class Size>
  void couple_again(int64_t n, int64_t k, const Block<A>& block, A* c, Size F) const {
    const A* query = plan_.queried(k) ? kept_.row(n, plan_.q(k - 1)) : nullptr;
    if (!p_.over_inputs) return couple(block, query, p_.J, F, p_.leaky, c);
    const A* highest = static_cast<const A*>(plan_.out.norm) + ((k - 1) * p_.B + first_ + n) * p_.J;
    couple_inputs(block, query, p_.J, F, highest, highest + p_.R * p_.B * p_.J, c);
  }

 private:
  // A group where a lane is a sample.
  void group_of_samples(const Tile& tile, int64_t step, int64_t group, A* to,
                        const typename Stream<X>::Scratch& scratch) const {
    const int64_t k = p_.R - step, rows = layout_.sums(), stride = plan_.terms * rows;
    const bool queried = plan_.queried(k), kept = plan_.keep_pairs && queried;
    const int64_t next = kept ? kept_.block_pairs() : layout_.lanes();  // from one input capsule's db to that after it
    stream_.begin_group(tile, group, step == 0, scratch);
    for (int64_t m = 0; m < tile.count; m += L<A>) {
      const int64_t n = tile.first + m, count = minimum(L<A>, tile.count - m);
      if (queried) to_lanes(kept_.row(n, plan_.q(k - 1)), stride, count, rows, scratch.q);
      to_lanes(kept_.row(n, plan_.e(k)), stride, count, rows, scratch.e);
      scratch.sums.clear();
      auto pairs_of = [&](int64_t i) { return kept ? kept_.pair_of_samples(n, i) : nullptr; };
      auto visit = [&](int64_t i, int64_t l, const auto& block, const A* q, const A* e) {
        A *c = p_slot(pairs_of(i), k, scratch), *db = db_slot(pairs_of(i - l), k, scratch) + l * next;
        with_features<A>(layout_.F, [&](auto F) {
          couple(block, q, p_.J, F, p_.leaky, c);
          if (wants_db(k)) couple_backward(block, c, e, p_.J, F, db);
        });
      };
      auto add = [&](Run<A> run, int64_t i, bool first) {
        run.c = db_slot(pairs_of(i), k, scratch), run.c_next = next;
        A* sums = scratch.sums.block;
        if (queried)
          add_run(sums, run, p_.J, layout_.F, first);
        else if (first)
          set_zero(sums, rows * L<A>);
        if (plan_.logit_sums) add_logits(sums + rows * L<A>, run, first);
      };
      stream_.for_inputs(tile, m, group, queried ? scratch.q : nullptr, scratch.e, scratch, visit, add);
      from_lanes(scratch.sums.total, sums_, to + m * sums_, sums_, count);
    }
  }

  // sums [J][L] += sum over the run of db
  void add_logits(A* sums, const Run<A>& run, bool first) const {
    if (first) set_zero(sums, pad<A>(p_.J) * L<A>);
    for (int64_t l = 0; l < run.count; ++l) fold_sum(sums, run.c + l * run.c_next, layout_.lanes(), false);
  }

  bool wants_db(int64_t k) const { return plan_.queried(k) || plan_.out.logits; }

  // Where p^k and db^k go: to their places among the pairs, if these are kept and pass k has some.
  A* p_slot(A* pairs, int64_t k, const typename Stream<X>::Scratch& scratch) const {
    return pairs && plan_.queried(k) ? pairs + plan_.p_slot(k) * layout_.lanes() : scratch.coupling;
  }
  A* db_slot(A* pairs, int64_t k, const typename Stream<X>::Scratch& scratch) const {
    return pairs && plan_.queried(k) ? pairs + plan_.db_slot(k) * layout_.lanes() : scratch.logits;
  }

  A* dV(const Tile& tile, int64_t n) const { return of_tile(dV_, tile, layout_.outputs()) + n * layout_.outputs(); }
  A* total(const Tile& tile, int64_t n) const { return of_tile(total_, tile, sums_) + n * sums_; }

  // Takes the mean's error x_j from sum over i of db_ij h_ij, and keeps it for the db_ij themselves.
  void correct_sums(const Tile& tile, int64_t n, int64_t k, A* s) const {
    A *sums = total(tile, n), *x = sums + sums_ - pad<A>(p_.J), *coupled = layout_.shared ? sums + layout_.sums() : s;
    if (!layout_.shared) read_coupled(tile.first + n, k, s);
    for (int64_t j = 0; j < p_.J; ++j)
      for (int64_t f = j * layout_.F; f < (j + 1) * layout_.F; f += L<A>)
        store(sums + f, load(sums + f) - rounded<A>(x[j] * load(coupled + f)));  // as db_ij h_ij are
    fold_sum(kept_.mean_error(tile.first + n, k), x, pad<A>(p_.J), true);
    for (int64_t j = 0; j < pad<A>(p_.J); j += L<A>) store(x + j, load(x + j) - load(x + j));  // 0, or NaN as it was
  }

  // s^k - bias = sum over i of p^k_ij h_ij
  void read_coupled(int64_t n, int64_t k, A* s) const {
    read_s(n, k, s);
    for (int64_t o = 0; bias_ && o < layout_.outputs(); o += L<A>) store(s + o, load(s + o) - load(bias_ + o));
  }

  void read_s(int64_t n, int64_t k, A* s) const {
    const A* from = static_cast<const A*>(plan_.out.s) + ((k - 1) * p_.B + first_ + n) * p_.J * p_.O;
    widen_outputs(s, from, p_.O, 1, layout_);
  }

  // ds^R, from the gradient of v or as it is given.
  void read_last(int64_t n, A* grad, A* s) const {
    const bool squashed = plan_.out.grad_v.data;
    const Array& from = squashed ? plan_.out.grad_v : plan_.out.grad_s;
    const int64_t *stride = from.stride, at = (first_ + n) * stride[0];
    if (squashed) {
      widen_outputs(grad, static_cast<const X*>(from.data) + at, stride[1], stride[2], layout_);
      keep_ds(n, p_.R, grad, s);
    } else {
      widen_outputs(grad, static_cast<const A*>(from.data) + at, stride[1], stride[2], layout_);
      keep(n, plan_.e(p_.R), grad);
      if (p_.over_inputs) keep_means(n, p_.R, s);
    }
  }

  void keep(int64_t n, int64_t term, const A* outputs) const {
    fold_sum(kept_.output(n, term), outputs, layout_.outputs(), true);
  }

  // e^k from ds^k, or q^k from V^k, of a tile.
  void to_rows(const Tile& tile, int64_t term) const {
    const int64_t n = tile.first, terms = plan_.terms;
    if (layout_.shared)
      stream_.to_rows(kept_.output(n, term), terms * layout_.outputs(), kept_.row(n, term), terms * layout_.sums(),
                      tile.count);
  }

  // ds^k = J_squash(s^k)^T g
  void keep_ds(int64_t n, int64_t k, const A* g, A* s) const {
    A* ds = kept_.output(n, plan_.e(k));
    read_s(n, k, s);
    for (int64_t j = 0; j < p_.J; ++j) {
      const int64_t at = j * layout_.O;
      squash_backward(s + at, g + at, ds + at, layout_.O, p_.eps);
    }
    if (p_.over_inputs) keep_means(n, k, s);
  }

  // (s^k_j - bias_j) . ds^k_j = sum over i of p^k_ij t_ij
  void keep_means(int64_t n, int64_t k, A* s) const {
    const A* ds = kept_.output(n, plan_.e(k));
    read_coupled(n, k, s);
    for (int64_t j = 0; j < p_.J; ++j) {
      Vec<A> sum = all<A>(0);
      for (int64_t o = j * layout_.O; o < (j + 1) * layout_.O; o += L<A>) sum += load(s + o) * load(ds + o);
      kept_.mean(n, k)[j] = sum_lanes(sum);
    }
  }

  const BackwardPlan<X>& plan_;
  const Layout<X>& layout_;
  const Problem& p_;
  const Kept<X>& kept_;
  const A* bias_;       // for a softmax over i
  const int64_t sums_;  // of one sample: [sum of db h | if shared, sum of p u | if logit_sums, sum of db]
  const Stream<X> stream_;
  int64_t first_ = 0;
  A *dV_, *s_, *v_, *total_, *partial_;
};

}  // namespace capsroute::CAPSROUTE_ISA
