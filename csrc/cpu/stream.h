// What the forward and the backward stream share: the rows of a tile, block by block, and the ways
// between rows and outputs.
#pragma once

#include "pass.h"
#include "way.h"

namespace capsroute::CAPSROUTE_ISA {

// What a stream is for.
template <class A>
struct Use {
  int64_t batch, passes;
  int64_t sums;       // numbers of a sample that each block updates
  int64_t joined;     // how many of them, the first, are plain sums over i
  bool by_samples;    // a lane may be a sample
  A* votes;           // where those of a few samples are kept, if there is room
  int64_t room;       // bytes
  bool has_votes;     // they are there already, from the forward
  int64_t times = 1;  // that the stream is run
  int64_t reads = 0;  // of a pair's weight by others, each time
};

template <class X>
class Stream {
 public:
  using A = Acc<X>;

  Plan plan() const {
    Plan plan{};
    plan.kept_inputs = way.kept_inputs, plan.tile = schedule.tile, plan.tiles = schedule.tiles,
    plan.groups = schedule.groups;
    plan.by_group = schedule.by_group, plan.chunk = schedule.batch;
    plan.by_samples = way.by_samples(), plan.product_first = way.product_first, plan.handed = way.handed;
    plan.copied = weights.copied, plan.as_read = weights.as_read;
    return plan;
  }

  // Scratch of one thread.
  struct Scratch {
    typename Rows<X>::Scratch rows;
    A* coupling;  // [run][J, L]
    A* logits;    // [run][J, L], or their gradient
    typename Rows<X>::SampleScratch samples;
    A *q, *e;  // [J, F][L samples]; these, `samples` and `sums` only where a lane is a sample
    SampleSums<A> sums;
  };

  Stream(const Layout<X>& layout, const Use<A>& use, Carver& carver, const Parallel& parallel)
      : layout(layout),
        p(layout.p),
        way(layout, use.batch, use.passes, use.by_samples, use.room, parallel.threads),
        schedule(use.batch, way.tile, layout.groups, parallel.threads),
        weights(layout, reads_weights(use), carver, parallel),
        rows(layout, weights),
        votes_first(makes_votes_first(use, parallel)),
        use_(use) {
    if (way.by_samples() && way.keep && schedule.tiles > schedule.parts) weights.make_whole(carver, parallel);
    if (way.keep) kept_ = way.handed ? use.votes : carver.take<A>(schedule.slots * kept_size());
    const int64_t parts = votes_first ? minimum(parallel.threads, schedule.tiles * p.I) : schedule.parts;
    scratch_ = take_shares(carver, parts, [this](Carver& own) { carve_scratch(own); });
  }

  // Before the steps, where votes are made first: `shares` are those of the steps.
  void make_votes_first(const Schedule& shares, const Parallel& parallel) const {
    if (!votes_first) return;
    parallel_for(parallel, shares.tiles * p.I, [&](int64_t item, int64_t part) {
      const int64_t index = item / p.I, i = item % p.I;
      const Tile tile = shares.tile_at(index, index);
      A* votes = kept_block(tile, i) + i % L<A> * layout.row;
      rows.make_votes(tile.sample, tile.count, i, 1, false, votes, scratch(part).rows);
    });
  }

  // That of one thread.
  Scratch scratch(int64_t part) const {
    Carver carver = scratch_.at(part);
    return carve_scratch(carver);
  }

  Scratch carve_scratch(Carver& carver) const {
    Scratch s;
    s.rows = Rows<X>::Scratch::carve(layout, weights, divide_up(schedule.tile, kSamples) + (use_.reads > 1), carver);
    s.coupling = carver.take<A>(way.run * layout.lanes());
    s.logits = carver.take<A>(way.run * layout.lanes());
    if (!way.by_samples()) return s;
    s.samples = Rows<X>::SampleScratch::carve(layout, weights, way.keep ? 0 : way.run, carver);
    s.q = carver.take<A>(layout.sums() * L<A>);
    s.e = carver.take<A>(layout.sums() * L<A>);
    s.sums = SampleSums<A>::carve(use_.sums, carver);
    return s;
  }

  // Calls visit(n, i0, block) for every block of a group and every sample n of a tile. `first` says
  // that this is the first step to see the tile's votes.
  template <class Visit>
  void for_blocks(const Tile& tile, int64_t group, bool first, const Scratch& scratch, const Visit& visit) const {
    if (layout.shared) return for_rows(tile, group, scratch, visit);
    const int64_t size = layout.block_size();
    const bool keeps = group * kGroup < way.kept_inputs,
               there = !first || votes_first || (way.handed && use_.has_votes);
    const bool makes = p.form == Weight::pair && !(keeps && there);
    Block<A> lanes{};
    for_samples(tile, group, layout.sums(), [&](int64_t m, int64_t samples, int64_t i0, int64_t) {
      const int64_t b = tile.sample + m;
      A* staged = keeps ? kept_block(tile, i0) : scratch.rows.staged;
      if (makes) rows.make_votes(b, samples, i0, minimum(L<A>, p.I - i0), m > 0, staged, scratch.rows);
      for (int64_t n = 0; n < samples; ++n) {
        if (m + n == 0 || rows.lanes_differ()) lanes = rows.lanes(b + n, i0, scratch.rows.prior);
        visit(m + n, i0, rows.block(lanes, b + n, i0, staged + n * size));
      }
    });
  }

  // sums[n] += share * sum over a group's i of h_ij for every sample n of a tile: a pass whose coupling is constant.
  // Votes that are kept are made too.
  void add_votes(const Tile& tile, int64_t group, A share, const Scratch& scratch, A* sums) const {
    const int64_t all = layout.sums(), part = way.kept_inputs > 0 ? all : rows.part_of_sums(tile.count);
    for_samples(tile, group, part, [&](int64_t m, int64_t samples, int64_t i0, int64_t f) {
      const int64_t count = minimum(L<A>, p.I - i0), size = minimum(part, all - f);
      A *to = sums + m * all + f, *total = scratch.rows.staged;
      if (i0 < way.kept_inputs)
        rows.make_votes(tile.sample + m, samples, i0, count, m > 0, kept_block(tile, i0), scratch.rows, total);
      else
        rows.sum_votes(tile.sample + m, samples, i0, m > 0, f, size, total, scratch.rows);
      for (int64_t n = 0; n < samples; ++n) add_scaled(to + n * all, total + n * all + f, share, size);
    });
  }

  // The same for up to L samples of a tile from m on, to scratch.sums.
  void add_sample_votes(const Tile& tile, int64_t m, int64_t group, A share, const Scratch& scratch) const {
    const int64_t count = minimum(L<A>, tile.count - m), end = minimum(p.I, (group + 1) * kGroup);
    const Term<X>* u = scratch.samples.by_lane;
    for (int64_t i0 = group * kGroup; i0 < end; i0 += L<A>) {
      rows.inputs_by_lane(tile.sample + m, count, i0, scratch.samples.by_lane, scratch.samples);
      rows.template make_sample_votes<1>(i0, minimum(L<A>, p.I - i0), &u, &scratch.sums.block, scratch.samples);
      scratch.sums.join(share, layout.sums());
    }
  }

  // Where a lane is a sample, what a group needs before its samples are visited: the terms of its weight and votes that
  // are kept. Once those are made, on the `first` step to see them, no weight is read.
  void begin_group(const Tile& tile, int64_t group, bool first, const Scratch& scratch) const {
    if (way.keep && !first) return;
    rows.make_weight(group, scratch.samples);
    if (way.keep) make_kept(tile, group, scratch);
  }

  // For up to L samples of a tile from m on, where a lane is a sample: visit(i, l, block, q, e) for every input
  // capsule i of a group, the l-th of a run of them, with its votes and the queries that it is given, [J, F][L] or
  // null, or their dot products, as the block says; then add(run, i, first) for the run that begins with i, the `first`
  // of a block or not, to scratch.sums.block, which joins scratch.sums.total after the block.
  template <class Visit, class Add>
  void for_inputs(const Tile& tile, int64_t m, int64_t group, const A* q, const A* e, const Scratch& scratch,
                  const Visit& visit, const Add& add) const {
    const A* const query[] = {q, e};
    A* const* dots = scratch.samples.dots;
    const bool dotted = !way.keep && layout.F == L<A>;
    const int64_t b = tile.sample + m, count = minimum(L<A>, tile.count - m);
    const int64_t end = minimum(p.I, (group + 1) * kGroup), next = layout.sums() * L<A>;
    for (int64_t i0 = group * kGroup; i0 < end; i0 += L<A>) {
      const int64_t block_end = minimum(i0 + L<A>, p.I);
      if (!way.keep) rows.inputs_by_lane(b, count, i0, scratch.samples.by_lane, scratch.samples);
      for (int64_t first = i0; first < block_end; first += way.run) {
        const int64_t inputs = minimum(way.run, block_end - first);
        A* votes = way.keep ? kept(tile, m, first) : scratch.samples.votes;
        for (int64_t l = 0; l < inputs; ++l) {
          const Term<X>* u = scratch.samples.by_lane + (first + l - i0) * rows.terms() * L<A>;
          A* own = votes + l * next;
          if (dotted) {
            rows.make_votes_and_dots(first + l, u, own, query, dots, scratch.samples);
            const auto block = rows.samples(b, count, first + l, own, scratch.samples.prior, dots);
            visit(first + l, l, DottedBlock<A>{block}, q ? dots[0] : nullptr, e ? dots[1] : nullptr);
          } else {
            if (!way.keep) rows.template make_sample_votes<1>(first + l, 1, &u, &own, scratch.samples);
            visit(first + l, l, rows.samples(b, count, first + l, own, scratch.samples.prior), q, e);
          }
        }
        add(Run<A>{votes, next, nullptr, 0, inputs}, first, first == i0);
      }
      scratch.sums.join(A(1), use_.joined);
    }
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
  const Way<X> way;
  const Schedule schedule;
  Weights<X> weights;
  const Rows<X> rows;
  const bool votes_first;  // those that are kept are made before the steps, in which some threads have no group

 private:
  bool makes_votes_first(const Use<A>& use, const Parallel& parallel) const {
    const bool in_first_step = way.keep && way.kept_inputs == p.I && !way.by_samples() && !way.product_first;
    const bool has_votes = way.handed && use.has_votes;
    return p.form == Weight::pair && in_first_step && !has_votes && schedule.tiles * layout.groups < parallel.threads;
  }

  // How often a call reads the weights W_i of a pair, all of them together: each for a tile, or a vector's samples, and
  // in each pass that makes votes.
  int64_t reads_weights(const Use<A>& use) const {
    const int64_t kept = way.handed && use.has_votes ? 0 : way.kept_inputs;
    const int64_t passes = kept + (p.I - way.kept_inputs) * use.passes;
    return use.times * ((way.by_samples() ? divide_up(use.batch, L<A>) : schedule.tiles) * passes + p.I * use.reads);
  }

  // The votes of a group, to be kept, where a lane is a sample: of twice L samples at a time.
  void make_kept(const Tile& tile, int64_t group, const Scratch& scratch) const {
    const int64_t end = minimum(p.I, (group + 1) * kGroup);
    const int64_t terms = rows.terms() * L<A>, lanes = L<A> * terms;
    for (int64_t i0 = group * kGroup; i0 < end; i0 += L<A>)
      for (int64_t m = 0; m < tile.count; m += 2 * L<A>) {
        const bool both = m + L<A> < tile.count;
        for (int64_t n = m; n < minimum(m + 2 * L<A>, tile.count); n += L<A>)
          rows.inputs_by_lane(tile.sample + n, minimum(L<A>, tile.count - n), i0,
                              scratch.samples.by_lane + (n - m) / L<A> * lanes, scratch.samples);
        for (int64_t l = 0; l < minimum(L<A>, p.I - i0); ++l) {
          const Term<X>* u = scratch.samples.by_lane + l * terms;
          const Term<X>* from[] = {u, u + lanes};
          A* to[] = {kept(tile, m, i0 + l), kept(tile, m + L<A>, i0 + l)};
          if (both)
            rows.template make_sample_votes<2>(i0 + l, 1, from, to, scratch.samples);
          else
            rows.template make_sample_votes<1>(i0 + l, 1, from, to, scratch.samples);
        }
      }
  }

  // Calls visit(m, samples, i0, f) for every block of a group, every `part` numbers of its sums, from f on, and up to
  // kSamples samples m, .. of a tile at a time.
  template <class Visit>
  void for_samples(const Tile& tile, int64_t group, int64_t part, const Visit& visit) const {
    const int64_t end = minimum(p.I, (group + 1) * kGroup);
    for (int64_t i0 = group * kGroup; i0 < end; i0 += L<A>)
      for (int64_t f = 0; f < layout.sums(); f += part)
        for (int64_t m = 0; m < tile.count; m += kSamples) visit(m, minimum(kSamples, tile.count - m), i0, f);
  }

  // The same where no weight is read: sample by sample, so that a sample's query and sums stay in the cache.
  template <class Visit>
  void for_rows(const Tile& tile, int64_t group, const Scratch& scratch, const Visit& visit) const {
    const int64_t start = group * kGroup, end = minimum(p.I, start + kGroup);
    Block<A> lanes[kGroup / L<A>];
    for (int64_t n = 0; n < tile.count; ++n)
      for (int64_t i0 = start; i0 < end; i0 += L<A>) {
        const int64_t b = tile.sample + n, place = (i0 - start) / L<A>;
        if (n == 0 || rows.lanes_differ())
          lanes[place] = rows.lanes(b, i0, scratch.rows.prior + place * layout.lanes());
        visit(n, i0, rows.block(lanes[place], b, i0, scratch.rows.staged));
      }
  }

  A* kept_block(const Tile& tile, int64_t i0) const {
    return kept_ + tile.slot * kept_size() + i0 / L<A> * way.together * layout.block_size();
  }
  A* kept(const Tile& tile, int64_t m, int64_t i) const {
    return kept_ + tile.slot * kept_size() + (m / L<A> * p.I + i) * layout.sums() * L<A>;
  }

  int64_t kept_size() const {
    return way.by_samples() ? schedule.tile * p.I * layout.sums()
                            : divide_up(way.kept_inputs, L<A>) * way.together * layout.block_size();
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
        apply(Matrix<A>{matrices + matrix * terms * size, size, size}, x, terms, y, count);
      }
  }

  const Use<A> use_;
  A* kept_ = nullptr;  // [slots][blocks][together][L, row], or by samples [slots][tile / L][I][J, F][L]
  Shares scratch_;
};

}  // namespace capsroute::CAPSROUTE_ISA
