// What the forward and the backward stream share: the rows of a tile, block by block, and the ways
// between rows and outputs.
#pragma once

#include "pass.h"

namespace capsroute::CAPSROUTE_ISA {

// Votes are kept between passes while those of kSamples samples fit into this; else they are made anew.
constexpr int64_t kKeptVotes = int64_t(8) << 20;
// Where they are made anew, a tile has as many samples, between these two numbers, as have V and sums that fit into
// that.
constexpr int64_t kShortTile = 4 * kSamples, kLongTile = 16 * kSamples, kTileStates = int64_t(4) << 20;

template <class X>
class Stream {
 public:
  using A = Acc<X>;

  Plan plan() const {
    Plan plan{};
    plan.keeps_votes = keep, plan.tile = schedule.tile, plan.tiles = schedule.tiles, plan.groups = schedule.groups;
    plan.by_group = schedule.by_group, plan.chunk = schedule.batch;
    return plan;
  }

  // Scratch of one thread.
  struct Scratch {
    typename Rows<X>::Scratch rows;
    A* coupling;  // [J, W]
    A* logits;    // [J, W], or their gradient
  };

  Stream(const Layout<X>& layout, int64_t batch, int64_t passes, Carver& carver, const Parallel& parallel)
      : layout(layout),
        p(layout.p),
        weights(Weights<X>::pack(layout, carver, parallel)),
        rows(layout, weights),
        keep(keeps(layout, passes)),
        together(minimum(kSamples, batch)),
        schedule(batch, tile_size(layout, keep, batch, parallel.threads), layout.groups, parallel.threads) {
    kept_ = keep ? carver.take<A>(schedule.slots * kept_size()) : nullptr;
    scratch_ = take_shares(carver, schedule.parts, [this](Carver& own) { carve_scratch(own); });
  }

  Scratch scratch(int64_t part) const {
    Carver carver = scratch_.at(part);
    return carve_scratch(carver);
  }

  // Calls visit(n, i0, block) for every block of a group and every sample n of a tile. `first` says
  // that this is the first step to see the tile's votes.
  template <class Visit>
  void for_blocks(const Tile& tile, int64_t first_sample, int64_t group, bool first, const Scratch& scratch,
                  const Visit& visit) const {
    const int64_t size = layout.block_size();
    const bool makes = p.form == Weight::pair && (first || !keep);
    Block<A> lanes{};
    for_samples(tile, first_sample, group, makes, [&](int64_t m, int64_t samples, int64_t i0) {
      const int64_t b = first_sample + tile.first + m;
      A* staged = keep ? kept_ + tile.slot * kept_size() + i0 / W<A> * together * size : scratch.rows.staged;
      if (makes) rows.make_votes(b, samples, i0, staged, scratch.rows.inputs);
      for (int64_t n = 0; n < samples; ++n) {
        if (m + n == 0 || rows.lanes_differ()) lanes = rows.lanes(b + n, i0, scratch.rows.prior);
        visit(m + n, i0, rows.block(lanes, b + n, i0, staged + n * size));
      }
    });
  }

  // sums[n] += share * sum over a group's i of h_ij for every sample n of a tile: a pass whose coupling is constant.
  void add_votes(const Tile& tile, int64_t group, A share, const Scratch& scratch, A* sums) const {
    for_samples(tile, 0, group, true, [&](int64_t m, int64_t samples, int64_t i0) {
      A *to = sums + m * layout.sums(), *votes = scratch.rows.staged;
      rows.sum_votes(tile.first + m, samples, i0, votes, scratch.rows.inputs);
      for (int64_t k = 0; k < samples * layout.sums(); k += W<A>) store(to + k, load(to + k) + load(votes + k) * share);
    });
  }

  // rows[j] = W_j^T outputs[j] for every j of some samples: from [J, O] to what rows are dotted with, [J, F]. Those of
  // two samples are the two strides apart.
  void to_rows(const A* outputs, int64_t outputs_stride, A* rows, int64_t rows_stride, int64_t samples) const {
    transform(weights.to_rows, outputs, outputs_stride, p.O, layout.O, rows, rows_stride, layout.F, samples);
  }

  // outputs[j] = W_j rows[j]: from sums of rows, [J, F], to [n][J, O].
  void to_outputs(const A* rows, int64_t rows_stride, A* outputs, int64_t samples) const {
    transform(weights.to_outputs, rows, rows_stride, p.D, layout.F, outputs, layout.outputs(), layout.O, samples);
  }

  const Layout<X>& layout;
  const Problem& p;
  const Weights<X> weights;
  const Rows<X> rows;
  const bool keep;
  const int64_t together;  // samples whose votes are made together
  const Schedule schedule;

 private:
  static bool keeps(const Layout<X>& layout, int64_t passes) {
    const int64_t bytes = layout.blocks * kSamples * layout.block_size() * int64_t(sizeof(A));
    return layout.p.form == Weight::pair && passes > 1 && bytes <= kKeptVotes;
  }

  // Samples that read the weight together: few where their votes are kept in the cache, else as many as keep V and sums
  // there, so that the weight comes from memory as seldom as can be. Each thread has a share of the tiles.
  static int64_t tile_size(const Layout<X>& layout, bool keep, int64_t batch, int64_t threads) {
    if (keep || layout.p.form != Weight::pair) return kSamples;
    const int64_t most = kTileStates / (2 * layout.outputs() * int64_t(sizeof(A)));
    const int64_t tile = minimum(kLongTile, maximum(kShortTile, most));
    const int64_t tiles = divide_up(maximum(1, divide_up(batch, tile)), threads) * threads;
    const int64_t even = divide_up(divide_up(batch, tiles), kSamples) * kSamples;
    return even < kShortTile ? tile : even;
  }

  // Calls visit(m, samples, i0) for every block of a group and up to kSamples samples m, .. of a tile at a time.
  // `asks` for the inputs of the next ones.
  template <class Visit>
  void for_samples(const Tile& tile, int64_t first_sample, int64_t group, bool asks, const Visit& visit) const {
    const int64_t end = minimum(p.I, (group + 1) * kGroup);
    for (int64_t i0 = group * kGroup; i0 < end; i0 += W<A>)
      for (int64_t m = 0; m < tile.count; m += kSamples) {
        const bool last = m + kSamples >= tile.count;
        const int64_t next = last ? 0 : m + kSamples, b = first_sample + tile.first + next;
        if (asks) rows.ask_for_inputs(b, minimum(kSamples, tile.count - next), last ? i0 + W<A> : i0, W<A>);
        visit(m, minimum(kSamples, tile.count - m), i0);
      }
  }

  int64_t kept_size() const { return layout.blocks * together * layout.block_size(); }

  Scratch carve_scratch(Carver& carver) const {
    Scratch s;
    s.rows = Rows<X>::Scratch::carve(layout, carver);
    s.coupling = carver.take<A>(layout.lanes());
    s.logits = carver.take<A>(layout.lanes());
    return s;
  }

  // to_nj = matrix_j from_nj; a matrix is read once for kSamples n, or, if it is one for all j, n and j.
  void transform(const A* matrices, const A* from, int64_t from_n, int64_t terms, int64_t from_j, A* to, int64_t to_n,
                 int64_t size, int64_t samples) const {
    const bool one = layout.weights == 1;
    const int64_t J = p.J, items = samples * (one ? J : 1);
    for (int64_t matrix = 0; matrix < layout.weights; ++matrix)
      for (int64_t first = 0, n = 0, j = matrix; first < items; first += kSamples) {
        const int64_t count = minimum(kSamples, items - first);
        const A* x[kSamples];
        A* y[kSamples];
        for (int64_t k = 0; k < count; ++k) {
          x[k] = from + n * from_n + j * from_j, y[k] = to + n * to_n + j * size;
          if (one && j + 1 < J)
            ++j;
          else
            ++n, j = matrix;
        }
        apply(matrices + matrix * terms * size, size, x, terms, y, size, count);
      }
  }

  A* kept_;  // [slots][blocks][together][W, row]
  Shares scratch_;
};

template <class A>
CAPSROUTE_INLINE void set_zero(A* to, int64_t count) {
  __builtin_memset(to, 0, count * sizeof(A));
}

// total = partial, or total += partial
template <class A>
CAPSROUTE_INLINE void fold_sum(A* total, const A* partial, int64_t count, bool first) {
  for (int64_t k = 0; k < count; k += W<A>)
    store(total + k, first ? load(partial + k) : load(total + k) + load(partial + k));
}

}  // namespace capsroute::CAPSROUTE_ISA
