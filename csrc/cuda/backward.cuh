// The backward: one stream for each pass, from the last down to the second, or to the first where something is wanted
// of it, then the stream of the gradients.
#pragma once

#include "forward.cuh"
#include "gradients.cuh"

namespace capsroute::cuda {

template <class X, Source source>
CAPSROUTE_KERNEL(kMaxSlices* kLanes)
gradients_kernel(CAPSROUTE_ARGUMENT Gradients<X> a) {
  CAPSROUTE_SHARED(memory);
  const int block = block_index(), tiles = a.all_tiles ? 1 : int(a.layout.tiles), chunks = int(a.split.chunks);
  const int group = block / tiles / chunks, first = block / tiles % chunks * int(a.split.inputs);
  const int last = int(minimum(a.p.I, first + a.split.inputs));
  Place place(a.p, a.layout, a.split, block % tiles, group);
  Rows<X, source> rows(a.p, a.layout, a.split, a.weight, place, last, memory);
  GradientStream<X, source>(a, first, last, group, place, rows, memory).run();
}

template <class X>
class Backpropagation {
 public:
  using A = Acc<X>;

  Backpropagation(const Problem& p, const Backward& out, void* scratch, void* stream)
      : p_(p),
        out_(out),
        launcher_(p, stream),
        layout_(launcher_.layout),
        keys_(source_of(p) == Source::keys),
        split_(Split::of(p, layout_.row_slices, most_warps<A>(Direction::backward), 1, kChunks)),
        carver_{static_cast<char*>(scratch)} {
    launcher_.pack_weight(carver_);
    const int64_t out_state = layout_.out_state(p), row_state = layout_.row_state(p);
    states_.V = carver_.take<A>(p.R * out_state);
    states_.ds = carver_.take<A>(p.R * out_state);
    states_.query = keys_ ? carver_.take<A>(p.R * row_state) : states_.V;
    states_.row_ds = keys_ ? carver_.take<A>(p.R * row_state) : states_.ds;
    dV_ = carver_.take<A>(out_state);
    partial_ = carver_.take<A>(split_.chunks * row_state);
    statistics_ = carver_.take<A>(p.R * launcher_.statistics_size());
    if (split_.groups > 1 && !p.over_inputs)
      group_statistics_ = carver_.take<A>(split_.groups * launcher_.statistics_size());
    if (p.over_inputs) chunk_statistics_ = carver_.take<A>(split_.chunks * launcher_.statistics_size());
    if (shared_weight_gradient() || (keys_ && p.over_inputs)) partial_p_ = carver_.take<A>(split_.chunks * row_state);
    if (shared_weight_gradient()) {
      sum_p_ = carver_.take<A>(p.R * row_state);
      sum_db_ = carver_.take<A>(p.R * row_state);
    }
    carve_gradients();
  }

  int64_t scratch_bytes() const { return carver_.used; }

  void run() {
    streams();
    if (gradients_.du || gradients_.dweight || gradients_.dlogits) run_gradients();
    if (out_.bias) with_parameter(p_.bias.dtype, [&](auto x) { bias_gradient(static_cast<decltype(x)*>(out_.bias)); });
    if (out_.logits)
      with_parameter(p_.logits.dtype, [&](auto x) { logits_gradient(static_cast<decltype(x)*>(out_.logits)); });
    if (shared_weight_gradient()) run_shared_weight_gradient();
  }

 private:
  bool shared_weight_gradient() const { return keys_ && out_.weight; }

  // Calls visit with a value of the type that bias or logits have: that of u, or float.
  template <class Visit>
  void with_parameter(DType dtype, const Visit& visit) const {
    if (dtype == p_.u.dtype)
      visit(X());
    else
      visit(float());
  }

  void carve_gradients() {
    gradients_ = {p_, layout_, split_, states_, launcher_.weight, statistics_};
    gradients_.all_tiles = source_of(p_) == Source::made && out_.weight;
    gradients_.split = Split::of(p_, layout_.row_slices, kMaxSlices, gradients_.all_tiles ? 1 : layout_.tiles, kBlocks);
    gradients_.du = static_cast<X*>(out_.u);
    const bool groups = gradients_.split.groups > 1 && source_of(p_) != Source::given;
    if (out_.u && groups) gradients_.du_groups = carver_.take<A>(gradients_.split.groups * p_.B * p_.I * p_.D);
    if (gradients_.all_tiles) {
      gradients_.dweight = static_cast<X*>(out_.weight);
      if constexpr (sizeof(X) == sizeof(A))
        gradients_.dweight_sum = gradients_.dweight;
      else if (layout_.tiles > 1)
        gradients_.dweight_sum = carver_.take<A>(p_.I * p_.D * p_.J * p_.O);
      if (layout_.tiles > kGroupedTiles) gradients_.dweight_groups = carver_.take<A>(2 * p_.I * p_.D * p_.J * p_.O);
    }
    if (out_.logits) gradients_.dlogits = carver_.take<A>(p_.B * p_.I * p_.J);
    if (shared_weight_gradient()) {
      parts_ = minimum(64, divide_up(layout_.tiles, 8));
      dweight_parts_ = carver_.take<A>(parts_ * matrices() * p_.O * p_.D);
    }
  }

  void streams() const {
    FinishBackward<X> finish{p_, layout_, states_, out_.grad_v, out_.grad_s, static_cast<const A*>(out_.s)};
    finish.norm = static_cast<const A*>(out_.norm), finish.statistics = statistics_;
    finish.chunks = split_.chunks, finish.partial = partial_, finish.chunk_statistics = chunk_statistics_,
    finish.partial_p = partial_p_;
    finish.sum_p = sum_p_, finish.sum_db = sum_db_;
    launcher_.template for_capsules<begin_backward<X>>("begin_backward", finish);

    Pass<X> pass{p_, layout_, split_, launcher_.weight};
    for (int64_t k = p_.R - 1; k >= 0; --k) {
      finish.dV = k > 0 ? dV_ : nullptr;
      finish.dquery = k == 0 ? static_cast<A*>(out_.query) : nullptr;
      // Over inputs db_ij is known only after its sum: the gradients of the logits and, with a query, of the votes use
      // it.
      const bool corrects = p_.over_inputs && (out_.logits || p_.query.data);
      const bool sums = finish.dV || finish.dquery || sum_db_ || corrects;
      if (!sums && (uniform(p_, k) || p_.over_inputs)) return;  // p is known without
      pass.query = k > 0 || p_.query.data ? states_.query + k * layout_.row_state(p_) : nullptr;
      pass.gradient = states_.row_ds + k * layout_.row_state(p_);
      pass.chunk_statistics = chunk_statistics_;
      pass.statistics = statistics_ + k * launcher_.statistics_size();
      pass.partial = sums ? partial_ : nullptr;
      launcher_.template run_pass<Direction::backward>(pass, group_statistics_);
      if (!sums) return;
      if (partial_p_) {  // the sums that the forward made, once more
        Pass<X> again = pass;
        again.gradient = nullptr, again.partial = partial_p_;
        launcher_.template run_pass<Direction::forward>(again, nullptr);
      }
      finish.pass = k;
      launcher_.template for_capsules<finish_backward<X>>("finish_backward", finish);
    }
  }

  void run_gradients() const {
    with_source(source_of(p_), [&](auto constant) {
      constexpr Source source = decltype(constant)::value;
      static_assert(GradientsMemory<X, source>(kMaxSlices).bytes <= kMostShared);
      const Split& split = gradients_.split;
      const int64_t tiles = gradients_.all_tiles ? 1 : layout_.tiles;
      const GradientsMemory<X, source> memory(split.units);
      launcher_.run("gradients", gradients_kernel<X, source>, tiles * split.chunks * split.groups,
                    launcher_.threads(split), memory.bytes, gradients_);
    });
    if (gradients_.du_groups) fold(gradients_.du_groups, gradients_.split.groups, p_.B * p_.I * p_.D, gradients_.du);
  }

  template <class To>
  void fold(const A* part, int64_t parts, int64_t count, To* total) const {
    launcher_.template for_elements<cuda::fold<A, To>>("fold", count, Fold<A, To>{count, parts, part, total});
  }

  template <class Parameter>
  void bias_gradient(Parameter* dbias) const {
    launcher_.template for_blocks<kSumThreads, cuda::bias_gradient<X, Parameter>>(
        "bias_gradient", p_.J * p_.O, kSumThreads, BiasGradient<X, Parameter>{p_, layout_, states_.ds, dbias});
  }

  template <class Parameter>
  void logits_gradient(Parameter* dlogits) const {
    if (out_.logits_B == p_.B && out_.logits_I == p_.I && p_.I > 1)  // nothing is summed
      return fold(gradients_.dlogits, 1, p_.B * p_.I * p_.J, dlogits);
    launcher_.template for_blocks<kSumThreads, cuda::logits_gradient<X, Parameter>>(
        "logits_gradient", out_.logits_B * out_.logits_I * p_.J, kSumThreads,
        LogitsGradient<X, Parameter>{p_, out_.logits_B, out_.logits_I, gradients_.dlogits, dlogits});
  }

  int64_t matrices() const { return p_.form == Weight::single ? 1 : p_.J; }

  void run_shared_weight_gradient() const {
    SharedWeightGradient<X> a{p_, layout_, states_, sum_p_, sum_db_};
    a.parts = parts_, a.dweight = dweight_parts_;
    const int64_t blocks = parts_ * matrices() * divide_up(p_.O, kSquare) * divide_up(p_.D, kSquare);
    const int64_t shared = 2 * kSquare * (kLanes + 1);
    launcher_.template for_blocks<kSquare * kSquare, cuda::shared_weight_gradient<X>>("shared_weight_gradient", blocks,
                                                                                      shared, a);
    fold(dweight_parts_, parts_, matrices() * p_.O * p_.D, static_cast<X*>(out_.weight));
  }

  const Problem& p_;
  const Backward& out_;
  Launcher<X> launcher_;
  const Layout& layout_;
  bool keys_;
  Split split_;
  Carver carver_;
  States<X> states_{};
  Gradients<X> gradients_{};
  A *dV_ = nullptr, *partial_ = nullptr, *partial_p_ = nullptr, *statistics_ = nullptr, *group_statistics_ = nullptr,
    *chunk_statistics_ = nullptr;
  A *sum_p_ = nullptr, *sum_db_ = nullptr, *dweight_parts_ = nullptr;
  int64_t parts_ = 1;
};

template <class X>
int64_t backward(const Problem& p, const Backward& out, void* scratch, void* stream) {
  Backpropagation<X> backpropagation(p, out, scratch, stream);
  if (scratch) backpropagation.run();
  return backpropagation.scratch_bytes();
}

}  // namespace capsroute::cuda
