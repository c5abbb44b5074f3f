// The forward: R passes, each one stream over the input capsules.
#pragma once

#include "stream.h"

namespace capsroute::CAPSROUTE_ISA {

// A [J, O] in the accumulation type and padded.
template <class From, class X>
void widen_outputs(Acc<X>* to, const From* from, int64_t j_stride, int64_t o_stride, const Layout<X>& layout) {
  for (int64_t j = 0; j < layout.p.J; ++j)
    widen(to + j * layout.O, from + j * j_stride, o_stride, layout.p.O, layout.O);
}

// The way back: padded [J, O] to dense.
template <class To, class X>
void narrow_outputs(To* to, const Acc<X>* from, const Layout<X>& layout) {
  for (int64_t j = 0; j < layout.p.J; ++j) narrow(to + j * layout.p.O, from + j * layout.O, layout.p.O);
}

// The bias [J, O] in the accumulation type and padded, or null.
template <class X>
const Acc<X>* widen_bias(const Layout<X>& layout, Carver& carver) {
  using A = Acc<X>;
  const Problem& p = layout.p;
  if (!p.bias.data) return nullptr;
  A* bias = carver.take<A>(layout.outputs());
  if (!carver.base) return bias;
  const int64_t* stride = p.bias.stride;
  with_parameter<X>(p.bias, p.u.dtype,
                    [&](const auto* from) { widen_outputs(bias, from, stride[0], stride[1], layout); });
  return bias;
}

// V^0 of sample b, [J, O] padded: the query, or zeros.
template <class X>
void read_query(const Problem& p, int64_t b, Acc<X>* V, const Layout<X>& layout) {
  if (!p.query.data) return set_zero(V, layout.outputs());
  const int64_t* stride = p.query.stride;
  widen_outputs(V, static_cast<const Acc<X>*>(p.query.data) + b * stride[0], stride[1], stride[2], layout);
}

template <class X>
class ForwardStream {
 public:
  using A = Acc<X>;

  ForwardStream(const Layout<X>& layout, const Forward& out, Carver& carver, const Parallel& parallel)
      : out_(out),
        p_(layout.p),
        layout_(layout),
        bias_(widen_bias(layout, carver)),
        // With a softmax over i the coupling is known only after the last pass, and takes a step of its own.
        steps_(layout.p.R + (layout.p.over_inputs && out.coupling)),
        state_(layout.sums() + (layout.p.over_inputs ? 2 * pad<A>(layout.p.J) : 0)),
        stream_(layout,
                {.batch = layout.p.B,
                 .passes = steps_,
                 .sums = state_,
                 .joined = layout.sums(),
                 .by_samples = steps_ == layout.p.R,
                 .votes = static_cast<A*>(out.votes),
                 .room = out.room,
                 .has_votes = false},
                carver, parallel) {
    const Schedule& schedule = stream_.schedule;
    total_ = carver.take<A>(schedule.slots * schedule.tile * state_);
    s_ = layout.shared ? carver.take<A>(schedule.slots * schedule.tile * layout.outputs()) : nullptr;
    V_ = carver.take<A>(schedule.slots * schedule.tile * layout.outputs());
    v_ = carver.take<A>(schedule.slots * layout.outputs());
    query_ = layout.shared ? carver.take<A>(schedule.slots * schedule.tile * layout.sums()) : V_;
    partial_ = carver.take<A>(schedule.partials * schedule.tile * state_);
  }

  Plan plan() const { return stream_.plan(); }

  void run(const Parallel& parallel) {
    stream_.make_votes_first(stream_.schedule, parallel);
    run_stream(*this, stream_.schedule, steps_, parallel);
  }

  void begin(const Tile& tile) {
    A* V = of_tile(V_, tile, layout_.outputs());
    for (int64_t n = 0; n < tile.count; ++n) read_query(p_, tile.first + n, V + n * layout_.outputs(), layout_);
    if (p_.query.data) compare_with(V, tile);
  }

  // partial_j = sum over the group's i of c_ij (row of i, j)
  void group(const Tile& tile, int64_t step, int64_t group, int64_t partial, int64_t part) {
    const typename Stream<X>::Scratch scratch = stream_.scratch(part);
    const int64_t sums = layout_.sums(), J = p_.J, F = layout_.F;
    const A* queries = queried(step) ? of_tile(query_, tile, sums) : nullptr;
    A *sum = partial_ + partial * stream_.schedule.tile * state_, *c = scratch.coupling;
    A* logits = out_.logits && step == p_.R - 1 ? scratch.logits : nullptr;
    if (step < p_.R) clear(sum, tile.count);
    const bool alike = step == 0 && is_uniform();
    if (alike && p_.R == 1) write_alike(tile, group, scratch.coupling);
    if (stream_.way.by_samples()) return group_of_samples(tile, step, group, queries, logits, sum, scratch);
    if (alike && stream_.way.product_first) return stream_.add_votes(tile, group, share(), scratch, sum);
    stream_.for_blocks(tile, group, step == 0, scratch, [&](int64_t n, int64_t i0, const Block<A>& block) {
      if (alike) return add_block_alike(block, share(), sums, sum + n * state_);
      const A* query = queries ? queries + n * sums : nullptr;
      if (step == p_.R) {
        const Online<A> whole = online(of_tile(total_, tile, state_), n);
        couple_inputs(block, query, J, F, whole.highest, whole.total, c);
      } else {
        with_features<A>(layout_.F, [&](auto F) {
          if (p_.over_inputs)
            couple_online(block, query, J, F, online(sum, n), c, logits);
          else
            couple(block, query, J, F, p_.leaky, c, logits);
          add_block(block, c, J, F, sum + n * state_);
        });
      }
      write_pairs(tile.first + n, 1, i0, block.count, step, c, logits);
    });
  }

  void fold(const Tile& tile, int64_t step, int64_t partial, bool first) {
    if (step == p_.R) return;
    A *total = of_tile(total_, tile, state_), *sum = partial_ + partial * stream_.schedule.tile * state_;
    if (first || !p_.over_inputs) return fold_sum(total, sum, tile.count * state_, first);
    for (int64_t n = 0; n < tile.count; ++n) join_online(online(total, n), online(sum, n), p_.J, layout_.F);
  }

  // s = W total + bias, v = squash(s), V = V + v
  void finish(const Tile& tile, int64_t step) {
    if (step == p_.R) return;
    const int64_t outputs = layout_.outputs();
    A *total = of_tile(total_, tile, state_), *V = of_tile(V_, tile, outputs), *v = v_ + tile.slot * outputs;
    for (int64_t n = 0; p_.over_inputs && n < tile.count; ++n) normalise(online(total, n), step, tile.first + n);
    A* sums = layout_.shared ? of_tile(s_, tile, outputs) : total;
    if (layout_.shared) stream_.to_outputs(total, state_, sums, tile.count);
    for (int64_t n = 0; n < tile.count; ++n) {
      const int64_t b = tile.first + n;
      A* s = sums + n * (layout_.shared ? outputs : state_);
      if (bias_) fold_sum(s, bias_, outputs, false);
      if (out_.s && saved(step) >= 0)
        narrow_outputs(static_cast<A*>(out_.s) + (saved(step) * p_.B + b) * p_.J * p_.O, s, layout_);
      if (step == p_.R - 1 && !out_.v) continue;
      for (int64_t j = 0; j < p_.J; ++j) squash(s + j * layout_.O, v + j * layout_.O, layout_.O, p_.eps);
      if (step == p_.R - 1)
        narrow_outputs(static_cast<X*>(out_.v) + b * p_.J * p_.O, v, layout_);
      else
        fold_sum(V + n * outputs, v, outputs, false);
    }
    if (step < p_.R - 1) compare_with(V, tile);
  }

 private:
  // The same where a lane is a sample.
  void group_of_samples(const Tile& tile, int64_t step, int64_t group, const A* queries, A* logits, A* sum,
                        const typename Stream<X>::Scratch& scratch) const {
    const int64_t sums = layout_.sums(), lanes = layout_.lanes(), J = p_.J;
    const bool sums_alone = step == 0 && is_uniform() && stream_.way.product_first;
    A* c = scratch.coupling;
    stream_.begin_group(tile, group, step == 0, scratch);
    for (int64_t m = 0; m < tile.count; m += L<A>) {
      const int64_t count = minimum(L<A>, tile.count - m);
      if (queries) to_lanes(queries + m * sums, sums, count, sums, scratch.q);
      scratch.sums.clear();
      for (int64_t j = 0; p_.over_inputs && j < J; ++j)
        store(online_lanes(scratch).highest + j * L<A>, all(kForbidden<A>));
      auto visit = [&](int64_t i, int64_t l, const auto& block, const A* q, const A*) {
        A* own = c + l * lanes;
        with_features<A>(layout_.F, [&](auto F) {
          if (p_.over_inputs)
            online_logits(block, q, J, F, own, logits);
          else
            couple(block, q, J, F, p_.leaky, own, logits);
        });
        write_pairs(tile.first + m, count, i, 1, step, own, logits);
      };
      auto add = [&](Run<A> run, int64_t, bool first) {
        if (p_.over_inputs) couple_online(c, run.count, J, layout_.F, online_lanes(scratch));
        run.c = c, run.c_next = lanes;
        add_run(scratch.sums.block, run, J, layout_.F, first);
      };
      if (sums_alone)
        stream_.add_sample_votes(tile, m, group, share(), scratch);
      else
        stream_.for_inputs(tile, m, group, queries ? scratch.q : nullptr, nullptr, scratch, visit, add);
      from_lanes(scratch.sums.total, state_, sum + m * state_, state_, count);
    }
  }

  // As `online`, by lanes.
  Online<A> online_lanes(const typename Stream<X>::Scratch& scratch) const {
    A *sums = scratch.sums.total, *highest = sums + layout_.sums() * L<A>;
    return {sums, highest, highest + pad<A>(p_.J) * L<A>};
  }

  // V of a tile becomes what its rows are dotted with.
  void compare_with(const A* V, const Tile& tile) const {
    const int64_t sums = layout_.sums();
    if (layout_.shared) stream_.to_rows(V, layout_.outputs(), of_tile(query_, tile, sums), sums, tile.count);
  }

  // The place of a step among the saved ones, negative if it is none.
  int64_t saved(int64_t step) const { return step - (p_.R - out_.saved); }

  // Whether the first pass couples all votes alike, by a share, and its logits are not wanted.
  bool is_uniform() const {
    const bool alike = !p_.over_inputs && !queried(0) && !p_.logits.data;
    return p_.form == Weight::pair && alike && (p_.R > 1 || !out_.logits);
  }
  A share() const { return equal_share<A>(p_.J, p_.leaky); }

  bool queried(int64_t step) const { return p_.query.data || minimum(step, p_.R - 1) > 0; }

  Online<A> online(A* states, int64_t n) const {
    A* sums = states + n * state_;
    return {sums, sums + layout_.sums(), sums + layout_.sums() + pad<A>(p_.J)};
  }

  void clear(A* states, int64_t count) const {
    set_zero(states, count * state_);
    for (int64_t n = 0; p_.over_inputs && n < count; ++n)
      for (int64_t j = 0; j < p_.J; ++j) online(states, n).highest[j] = kForbidden<A>;
  }

  // The sums over i of exp(logit - highest) h_ij become those of c_ij h_ij; an output capsule without inputs gets 0.
  void normalise(const Online<A>& online, int64_t step, int64_t b) const {
    A* norm = out_.norm && saved(step) >= 0 ? static_cast<A*>(out_.norm) + (saved(step) * p_.B + b) * p_.J : nullptr;
    for (int64_t j = 0; j < p_.J; ++j) {
      const A scale = online.total[j] == 0 ? 0 : 1 / online.total[j];
      for (int64_t f = j * layout_.F; f < (j + 1) * layout_.F; f += L<A>)
        store(online.sums + f, load(online.sums + f) * scale);
      if (!norm) continue;
      norm[j] = online.total[j] == 0 ? 0 : online.highest[j];
      norm[out_.saved * p_.B * p_.J + j] = online.total[j];
    }
  }

  // The coupling of a group, where such a pass is the only one.
  void write_alike(const Tile& tile, int64_t group, A* c) const {
    if (!out_.coupling) return;
    for (int64_t n = 0; n < tile.count; ++n)
      for (int64_t i0 = group * kGroup; i0 < minimum(p_.I, (group + 1) * kGroup); i0 += L<A>) {
        const Block<A> lanes = stream_.rows.lanes(tile.sample + n, i0, nullptr);  // there are no prior logits
        couple(lanes, static_cast<const A*>(nullptr), p_.J, layout_.F, p_.leaky, c);
        write_pairs(tile.first + n, 1, i0, lanes.count, 0, c, nullptr);
      }
  }

  // What is wanted of the pairs of a pass: [J, L], of so many samples and input capsules, one of which is 1.
  void write_pairs(int64_t b, int64_t samples, int64_t i0, int64_t inputs, int64_t step, const A* c,
                   const A* logits) const {
    if (logits) write_pairs(static_cast<A*>(out_.logits), b, samples, i0, inputs, logits);
    if (out_.coupling && step == steps_ - 1) write_pairs(static_cast<X*>(out_.coupling), b, samples, i0, inputs, c);
  }

  template <class To>
  void write_pairs(To* to, int64_t b, int64_t samples, int64_t i0, int64_t inputs, const A* pairs) const {
    to += (b * p_.I + i0) * p_.J;
    const int64_t next = (samples > 1 ? p_.I : 1) * p_.J;
    for (int64_t l = 0; l < samples * inputs; ++l)
      for (int64_t j = 0; j < p_.J; ++j) to[l * next + j] = from_acc<To>(pairs[j * L<A> + l]);
  }

  const Forward& out_;
  const Problem& p_;
  const Layout<X>& layout_;
  const A* bias_;
  const int64_t steps_;
  const int64_t state_;  // of one sample: the sums over i, and of a softmax over i its largest logits and totals
  Stream<X> stream_;
  A *total_, *s_, *V_, *v_, *query_, *partial_;
};

}  // namespace capsroute::CAPSROUTE_ISA
