// The second part of the backward, by input capsules: see backward_plan.h.
#pragma once

#include "logit_stream.h"
#include "pair_gradient.h"

namespace capsroute::CAPSROUTE_ISA {

// So many input capsules share a load of e^k and q^k. The dh of these and of kSubBatch samples stays in the first-level
// cache, unless W is large.
template <class A>
inline constexpr int64_t kSubLanes = L<A> < 4 ? L<A> : 4;
// W_i and dW_i of a whole block stay in the second-level cache from one sub-batch to the next, if they fit into this.
// Else only as many capsules are taken as share such a load, and twice the samples to read W and dW less often.
constexpr int64_t kOwnedWeights = int64_t(256) << 10, kLongSubBatch = 2 * kSubBatch;

template <class X>
class RowGradients {
 public:
  using A = Acc<X>;

  RowGradients(const BackwardPlan<X>& plan, const Kept<X>& kept, const LogitStream<X>& logits, Carver& carver,
               const Parallel& parallel)
      : plan_(plan),
        layout_(plan.layout),
        p_(plan.p),
        out_(plan.out),
        kept_(kept),
        logits_(logits),
        lanes_(lanes_of(plan)),
        sub_batch_(few_inputs() ? kLongSubBatch : kSubBatch),
        dW_(layout_, out_, sub_batch_, plan.chunk, carver) {
    share_ = p_.over_inputs ? L<A> : lanes_;
    const int64_t parts = minimum(parallel.threads, maximum(1, divide_up(p_.I, share_)));
    if (plan.logits_by_row && out_.logits_B < p_.B) dlogits_ = carver.take<double>(layout_.blocks * layout_.lanes());
    scratch_ = take_shares(carver, parts, [this](Carver& own) { carve_scratch(own); });
  }

  bool few_inputs() const { return lanes_ < L<A>; }

  // Adds what the samples first .. first + count of the batch contribute.
  void run(int64_t first, int64_t count, const Parallel& parallel) {
    const bool rows = out_.u || (out_.weight && p_.form == Weight::pair);
    if (!rows && !plan_.logits_by_row) return;
    parallel_for(parallel, divide_up(p_.I, share_), [&](int64_t index, int64_t part) {
      Carver carver = scratch_.at(part);
      const int64_t i = index * share_, begin = i % L<A>;
      share_gradients(first, count, {i - begin, begin, minimum(share_, p_.I - i)}, rows, carve_scratch(carver));
    });
  }

 private:
  static int64_t lanes_of(const BackwardPlan<X>& plan) {
    const int64_t weights = 2 * plan.p.D * plan.layout.sums() * int64_t(sizeof(A));  // W_i and dW_i
    const bool few = plan.p.form == Weight::pair && plan.keep_pairs && weights * L<A> > kOwnedWeights;
    return few ? kSubLanes<A> : L<A>;
  }

  // Input capsules i0 + begin .. i0 + begin + count of the block at i0.
  struct Lanes {
    int64_t i0, begin, count;
    bool differ = false;  // from sample to sample, in which are live and in p^1
  };

  struct Scratch {
    A* prior;                            // [J, L]
    A* uniform;                          // [sub_batch][J, L]: p^1 where it has no query
    A* pairs;                            // [sub_batch][slot][J, L], where they are not kept, and
    typename Stream<X>::Scratch stream;  // what they are made with
    Coefficient<A>* coefficient;         // [terms]
    A* dh;                               // [kSubLanes][sub_batch][J, F]
    A* inputs;                           // [sub_batch][lanes][D]
    A* du;                               // [sub_batch][lanes][D]
    typename PairGradient<X>::Scratch dW;
    X* weight;   // [lanes][D, J, F], where W is brought into order as it is read
    A* dlogits;  // [J, L]
  };

  Scratch carve_scratch(Carver& carver) const {
    Scratch s;
    s.prior = carver.take<A>(layout_.lanes());
    s.uniform = carver.take<A>(sub_batch_ * layout_.lanes());
    s.pairs = carver.take<A>(plan_.keep_pairs ? 0 : kSubBatch * kept_.block_pairs());
    if (!plan_.keep_pairs) s.stream = logits_.stream().carve_scratch(carver);  // the stream's may be fewer
    s.coefficient = carver.take<Coefficient<A>>(plan_.terms);
    s.dh = carver.take<A>(kSubLanes<A> * sub_batch_ * layout_.sums());
    s.inputs = carver.take<A>(sub_batch_ * lanes_ * p_.D);
    s.du = carver.take<A>(sub_batch_ * lanes_ * p_.D);
    s.dW = dW_.carve_scratch(lanes_, carver);
    s.weight = carver.take<X>(out_.u && logits_.stream().weights.as_read ? lanes_ * p_.D * layout_.sums() : 0);
    s.dlogits = carver.take<A>(layout_.lanes());
    return s;
  }

  // The first share of a block handles the whole block's logits.
  void share_gradients(int64_t first, int64_t count, const Lanes& share, bool rows, const Scratch& scratch) {
    const int64_t i0 = share.i0, end = share.begin + share.count;
    if (first == 0) dW_.begin(i0 + share.begin, share.count);
    if (dlogits_ && first == 0 && share.begin == 0) set_zero(dlogits_ + i0 * p_.J, layout_.lanes());
    const bool differ = logits_.stream().rows.lanes_differ() || p_.over_inputs;  // else those of one serve all samples
    Block<A> blocks[kLongSubBatch];
    auto set_lanes = [&](int64_t m, int64_t n) {
      A* uniform = scratch.uniform + n * layout_.lanes();
      blocks[n] = logits_.stream().rows.lanes(first + m + n, i0, scratch.prior);
      if (!plan_.queried(1)) logits_.couple_again(m + n, 1, blocks[n], uniform, layout_.F);
    };
    if (!differ) set_lanes(0, 0);
    for (int64_t l = share.begin; l < end; l += lanes_)
      for (int64_t m = 0; m < count; m += sub_batch_) {
        const Lanes some{i0, l, minimum(lanes_, end - l), differ};
        const int64_t samples = minimum(sub_batch_, count - m);
        if (l == 0 && !plan_.keep_pairs) make_pairs(first, m, samples, i0, scratch);
        for (int64_t n = 0; differ && n < samples; ++n) {
          set_lanes(m, n);
          if (l == 0 && p_.over_inputs && plan_.logits_move)
            correct_pairs(m + n, pairs(m, n, i0, scratch), scratch.uniform + n * layout_.lanes());
        }
        if (l == 0 && plan_.logits_by_row) logit_gradients(first, m, samples, i0, scratch);
        if (!rows) continue;
        if (dW_.wanted()) logits_.stream().rows.inputs(first + m, samples, i0 + l, some.count, scratch.inputs);
        row_gradients(first, m, samples, some, blocks, scratch);
        dW_.end_sub_batch(i0 + l, some.count, first, m + samples, m + samples == count, scratch.dW);
        if (out_.u && p_.form == Weight::pair)
          for (int64_t n = 0; n < samples; ++n) {
            for (int64_t k = 0; p_.mask.data && k < some.count; ++k)  // exactly 0, also where W is not finite
              if (blocks[differ ? n : 0].live[l + k] == 0) set_zero(scratch.du + (n * some.count + k) * p_.D, p_.D);
            narrow(static_cast<X*>(out_.u) + ((first + m + n) * p_.I + i0 + l) * p_.D,
                   scratch.du + n * some.count * p_.D, some.count * p_.D);
          }
      }
    if (first + count == p_.B) {
      dW_.finish(i0 + share.begin, share.count, scratch.dW);
      if (dlogits_ && share.begin == 0) write_logits(dlogits_ + i0 * p_.J, i0, i0);
    }
  }

  A* pairs(int64_t m, int64_t n, int64_t i0, const Scratch& scratch) const {
    return plan_.keep_pairs ? kept_.pair(m + n, i0) : scratch.pairs + n * kept_.block_pairs();
  }

  void make_pairs(int64_t first, int64_t m, int64_t samples, int64_t i0, const Scratch& scratch) const {
    const Stream<X>& stream = logits_.stream();
    const typename Stream<X>::Scratch& own = scratch.stream;
    Block<A> lanes{};
    for (int64_t n0 = 0; n0 < samples; n0 += kSamples) {
      const int64_t some = minimum(kSamples, samples - n0);
      if (p_.form == Weight::pair)
        stream.rows.make_votes(first + m + n0, some, i0, minimum(L<A>, p_.I - i0), m + n0 > 0, own.rows.staged,
                               own.rows);
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
        const Vec<A> share = load(c + j * L<A>), error = share == 0 ? all<A>(0) : share * x[j];  // not 0 * NaN
        for (A* db : {plan_.queried(k) ? slots + plan_.db_slot(k) * lanes : nullptr, logits})
          if (db) store(db + j * L<A>, load(db + j * L<A>) - error);
      }
    }
  }

  // dh_ij = sum over terms of coefficient_ij vector_j, for kSubLanes lanes of one sample from l0 on; summed over j too
  // where all j share a row.
  template <class Size>
  void votes_gradient(int64_t n, const Block<A>& block, const Coefficient<A>* coefficient, int64_t l0, A* dh,
                      Size F) const {
    const int64_t sums = layout_.sums(), next = sub_batch_ * sums, terms = plan_.terms, J = p_.J;
    const A* vectors = kept_.row(n, 0);
    const bool at_once = layout_.shared && !block.forbids;  // the vectors of all j follow each other
    if (at_once) combine(dh, next, coefficient, l0, 0, vectors, F, terms, J, F);
    for (int64_t j = 0; !at_once && j < J; ++j)
      combine(dh + j * F, next, coefficient, l0, j, vectors + j * F, sums, terms, Known<1>(), F);
    for (int64_t l = 0; l < kSubLanes<A>; ++l) {  // exactly 0, also where a vector is NaN
      A* own = dh + l * next;
      if (block.live[l0 + l] == 0) set_zero(own, at_once ? F : sums);
      for (int64_t j = 0; block.forbids && j < J; ++j)
        if (!couples(coefficient, l0 + l, j)) set_zero(own + j * F, F);
      for (int64_t j = 1; layout_.shared && !at_once && j < J; ++j) fold_sum(own, own + j * F, F, false);
    }
  }

  // Whether any term has a coefficient other than 0 for that pair: a forbidden one has none, in any pass.
  bool couples(const Coefficient<A>* coefficient, int64_t lane, int64_t j) const {
    for (int64_t t = 0; t < plan_.terms; ++t)
      if (coefficient[t].at[lane * coefficient[t].next + j * L<A>] != 0) return true;
    return false;
  }

  // to[l] = sum over terms and J of them of coefficient[term][j0 + j, lane + l] vectors[term, j], [F], for kSubLanes l
  template <class Count, class Size>
  void combine(A* to, int64_t next, const Coefficient<A>* coefficient, int64_t lane, int64_t j0, const A* vectors,
               int64_t stride, int64_t terms, Count J, Size F) const {
    constexpr int N = kSubLanes<A>;
    int64_t f = 0;
    for (; f + 2 * L<A> <= F; f += 2 * L<A>)
      combine_panel<N, 2>(to + f, next, coefficient, lane, j0, vectors + f, stride, terms, J);
    for (; f < F; f += L<A>) combine_panel<N, 1>(to + f, next, coefficient, lane, j0, vectors + f, stride, terms, J);
  }

  // Asks for a part of `count` numbers.
  CAPSROUTE_INLINE static void ask_for_part(const A* next, int64_t count, int64_t part, int64_t parts) {
    for (int64_t k = count * part / parts; k < count * (part + 1) / parts; k += 64 / int64_t(sizeof(A)))
      ask_for(next + k);
  }

  void row_gradients(int64_t first, int64_t m, int64_t samples, const Lanes& lanes, const Block<A>* blocks,
                     const Scratch& scratch) const {
    const int64_t sums = layout_.sums(), size = kept_.block_pairs();
    Coefficient<A>* coefficient = scratch.coefficient;
    const bool by_samples = plan_.keep_pairs && logits_.stream().way.by_samples();
    const int64_t next = by_samples ? size : 1;
    for (int64_t l = 0; l < lanes.count; l += kSubLanes<A>) {
      for (int64_t n = 0; n < samples; ++n) {
        const A* kept = by_samples ? kept_.pair_of_samples(m + n, lanes.i0) : pairs(m, n, lanes.i0, scratch);
        const int64_t own = lanes.differ ? n : 0;
        if (by_samples)  // the pairs of the next capsules, and those of the next sub-batch, follow in memory
          ask_for_part(kept + (lanes.begin + l + kSubLanes<A>)*size, kSubLanes<A> * size, n, samples);
        else if (plan_.keep_pairs)
          ask_for_part(kept + sub_batch_ * size, size, l / kSubLanes<A>, lanes_ / kSubLanes<A>);
        if (!plan_.queried(1)) coefficient[0] = {scratch.uniform + own * layout_.lanes(), 1};
        for (int64_t k = plan_.first_queried(); k <= p_.R; ++k) {
          coefficient[plan_.e(k)] = {kept + plan_.p_slot(k) * layout_.lanes(), next};
          coefficient[plan_.q(k - 1)] = {kept + plan_.db_slot(k) * layout_.lanes(), next};
        }
        with_features<A>(layout_.F, [&](auto F) {
          votes_gradient(m + n, blocks[own], coefficient, lanes.begin + l, scratch.dh + n * sums, F);
        });
      }
      for (int64_t k = 0; k < minimum(kSubLanes<A>, lanes.count - l); ++k) {
        const A* dh = scratch.dh + k * sub_batch_ * sums;
        if (p_.form == Weight::pair)
          pair_gradients(first, m, samples, lanes, l + k, dh, scratch);
        else
          for (int64_t n = 0; n < samples; ++n)
            given_gradient(first + m + n, lanes.i0 + lanes.begin + l + k, dh + n * sums);
      }
    }
  }

  // dW_i += sum over samples of u_i dh_i^T, du_i = W_i^T dh_i
  void pair_gradients(int64_t first, int64_t m, int64_t samples, const Lanes& lanes, int64_t l, const A* dh,
                      const Scratch& scratch) const {
    const int64_t sums = layout_.sums(), D = p_.D, i = lanes.i0 + lanes.begin + l;
    dW_.add(i, l, first, m, scratch.inputs + l * D, lanes.count * D, dh, samples, scratch.dW);
    if (!out_.u) return;
    const A* from[kLongSubBatch];
    A* to[kLongSubBatch];
    for (int64_t n = 0; n < samples; ++n) from[n] = dh + n * sums, to[n] = scratch.du + (n * lanes.count + l) * D;
    const Weights<X>& weights = logits_.stream().weights;
    X* brought = scratch.weight + l * D * sums;
    apply_transposed(weights.of(i, divide_up(p_.B, kSamples), p_.B, brought, m > 0), from, to, D, samples);
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
    for (int64_t k = 0; dlogits_ && k < lanes; ++k) dlogits_[i0 * p_.J + k] += scratch.dlogits[k];
  }

  template <class T>
  void write_logits(const T* db, int64_t row, int64_t i0) const {
    for (int64_t l = 0; l < minimum(L<A>, p_.I - i0); ++l)
      for (int64_t j = 0; j < p_.J; ++j) write_as(out_.logits, p_.logits.dtype, (row + l) * p_.J + j, db[j * L<A> + l]);
  }

  const BackwardPlan<X>& plan_;
  const Layout<X>& layout_;
  const Problem& p_;
  const Backward& out_;
  const Kept<X>& kept_;
  const LogitStream<X>& logits_;
  int64_t lanes_, sub_batch_;  // of a block, and samples, that are taken together
  int64_t share_;              // of a block that one thread takes: all where its pairs are corrected in place
  PairGradient<X> dW_;
  double* dlogits_ = nullptr;  // [block][J, L], summed over the batch
  Shares scratch_;
};

}  // namespace capsroute::CAPSROUTE_ISA
