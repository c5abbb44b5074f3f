// The forward: R passes, each one stream over the input capsules.
#pragma once

#include "stream.h"

namespace capsroute::CAPSROUTE_ISA {

// The bias [J, O] in the accumulation type and padded, or null.
template <class X>
const Acc<X>* widen_bias(const Layout<X>& layout, Carver& carver) {
  using A = Acc<X>;
  const Problem& p = layout.p;
  if (!p.bias.data) return nullptr;
  A* bias = carver.take<A>(layout.outputs());
  for (int64_t j = 0; carver.base && j < p.J; ++j) {
    const int64_t at = j * p.bias.stride[0];
    if (p.bias.dtype == p.u.dtype)
      widen(bias + j * layout.O, static_cast<const X*>(p.bias.data) + at, p.bias.stride[1], p.O, layout.O);
    else
      widen(bias + j * layout.O, static_cast<const float*>(p.bias.data) + at, p.bias.stride[1], p.O, layout.O);
  }
  return bias;
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
        stream_(layout, layout.p.B, layout.p.R, carver, parallel) {
    const Schedule& schedule = stream_.schedule;
    total_ = carver.take<A>(schedule.slots * schedule.tile * layout.sums());
    s_ = layout.shared ? carver.take<A>(schedule.slots * layout.outputs()) : nullptr;
    V_ = carver.take<A>(schedule.slots * schedule.tile * layout.outputs());
    v_ = carver.take<A>(schedule.slots * layout.outputs());
    query_ = layout.shared ? carver.take<A>(schedule.slots * schedule.tile * layout.sums()) : V_;
    partial_ = carver.take<A>(schedule.partials * schedule.tile * layout.sums());
  }

  void run(const Parallel& parallel) { run_stream(*this, stream_.schedule, p_.R, parallel); }

  void begin(const Tile& tile) { set_zero(of_tile(V_, tile, layout_.outputs()), tile.count * layout_.outputs()); }

  // partial_j = sum over the group's i of c_ij (row of i, j)
  void group(const Tile& tile, int64_t step, int64_t group, int64_t partial, int64_t part) {
    const typename Stream<X>::Scratch scratch = stream_.scratch(part);
    const int64_t sums = layout_.sums();
    const A* query = step > 0 ? of_tile(query_, tile, sums) : nullptr;
    A* sum = partial_ + partial * stream_.schedule.tile * sums;
    set_zero(sum, tile.count * sums);
    stream_.for_blocks(tile, 0, group, step == 0, scratch, [&](int64_t n, int64_t i0, const Block<A>& block) {
      couple(block, query ? query + n * sums : nullptr, p_.J, layout_.F, p_.leaky, scratch.coupling);
      add_block(block, scratch.coupling, p_.J, layout_.F, sum + n * sums);
      if (out_.coupling && step == p_.R - 1) write_coupling(tile.first + n, i0, scratch.coupling);
    });
  }

  void fold(const Tile& tile, int64_t, int64_t partial, bool first) {
    const int64_t sums = layout_.sums();
    fold_sum(of_tile(total_, tile, sums), partial_ + partial * stream_.schedule.tile * sums, tile.count * sums, first);
  }

  // s = W total + bias, v = squash(s), V = V + v
  void finish(const Tile& tile, int64_t step) {
    for (int64_t n = 0; n < tile.count; ++n) {
      A* V = of_tile(V_, tile, layout_.outputs()) + n * layout_.outputs();
      A* s = of_tile(total_, tile, layout_.sums()) + n * layout_.sums();
      A* v = v_ + tile.slot * layout_.outputs();
      if (layout_.shared) {
        A* outputs = s_ + tile.slot * layout_.outputs();
        stream_.to_outputs(s, outputs);
        s = outputs;
      }
      if (bias_) fold_sum(s, bias_, layout_.outputs(), false);
      for (int64_t j = 0; j < p_.J; ++j) squash(s + j * layout_.O, v + j * layout_.O, layout_.O, p_.eps);
      const int64_t b = tile.first + n;
      if (out_.s) write(static_cast<A*>(out_.s) + (step * p_.B + b) * p_.J * p_.O, s);
      if (step == p_.R - 1) {
        write(static_cast<X*>(out_.v) + b * p_.J * p_.O, v);
      } else {
        fold_sum(V, v, layout_.outputs(), false);
        if (layout_.shared) stream_.to_rows(V, of_tile(query_, tile, layout_.sums()) + n * layout_.sums());
      }
    }
  }

 private:
  A* of_tile(A* states, const Tile& tile, int64_t size) const {
    return states + tile.slot * stream_.schedule.tile * size;
  }

  // Padded [J, O] to dense.
  template <class To>
  void write(To* to, const A* from) const {
    for (int64_t j = 0; j < p_.J; ++j) narrow(to + j * p_.O, from + j * layout_.O, p_.O);
  }

  void write_coupling(int64_t b, int64_t i0, const A* c) const {
    X* to = static_cast<X*>(out_.coupling) + (b * p_.I + i0) * p_.J;
    for (int64_t l = 0; l < minimum(W<A>, p_.I - i0); ++l)
      for (int64_t j = 0; j < p_.J; ++j) to[l * p_.J + j] = from_acc<X>(c[j * W<A> + l]);
  }

  const Forward& out_;
  const Problem& p_;
  const Layout<X>& layout_;
  const A* bias_;
  Stream<X> stream_;
  A *total_, *s_, *V_, *v_, *query_, *partial_;
};

}  // namespace capsroute::CAPSROUTE_ISA
