// One pass over a chunk of input capsules, forward and backward. With h the rows, q the query and e = ds:
//   forward:   c_ij = softmax over j of (logits_ij + h_ij . q_j),   s_j = sum over i of c_ij h_ij
//   backward:  p_ij likewise, t_ij = h_ij . e_j, db_ij = p_ij (t_ij - sum over j of p_ij t_ij),
//              dq_j = sum over i of db_ij h_ij
// Over inputs the softmax runs over i: an online softmax in registers, rescaled as the maximum grows. Where it is known
// already (in the backward, and for the returned coupling) p follows from it, and with ds the mean of t:
//   sum over i of p_ij t_ij = (s_j - bias_j) . ds_j
// but rounded in another way than t: what the db_ij then sum to over i, which should be nothing, is that mean's error.
// A lane is a sample and a warp a slice of an output capsule, so only logits cross warps, through shared memory.
// Where a block does not have all of j, a first pass leaves the softmax's statistics of each group, and merge()
// makes them one.
#pragma once

#include "rows.cuh"

namespace capsroute::cuda {

enum class Direction { forward, backward };

// Warps of a pass's block, at most: so many that their registers suffice without spills.
template <class A>
constexpr int most_warps(Direction direction) {
  return sizeof(A) == 8 ? (direction == Direction::forward ? 12 : 8) : direction == Direction::forward ? 16 : 12;
}

// Of the softmax of one (b, i): the maximum m, z = sum over j of exp(b_ij - m) and sum over j of exp(b_ij - m) t_ij.
// Merged, 1/z and the mean of t take the place of the sums. In memory [tile, i, statistic, lane]; over inputs, where a
// softmax belongs to one (b, j), [tile, j, statistic, lane].
constexpr int kStatistics = 3;

template <class A>
CAPSROUTE_DEVICE A* statistics_at(A* statistics, int64_t tile, int64_t count, int64_t index, int lane) {
  return statistics + (tile * count + index) * kStatistics * kLanes + lane;
}

template <class X>
struct Pass {
  using A = Acc<X>;
  Problem p;
  Layout layout;
  Split split;
  const X* weight;      // [I, D, J, O padded] for Source::made
  const A* query;       // [tile, j, row, lane], or null: there is none
  const A* gradient;    // likewise, e of the backward
  A* partial;           // [chunk, tile, j, row, lane], or null: the sums are not wanted
  A* group_statistics;  // [group, tile, i, 3, lane], or null: this pass does not leave them
  A* statistics;  // [tile, i, 3, lane] of all j: read where there are groups, else left for the gradients, or null;
                  // over inputs [tile, j, 3, lane], known, or null
  A* chunk_statistics;  // over inputs: [chunk, tile, j, 3, lane], m and z of the chunk, in the backward sum of db_ij
  X* coupling;          // [B, I, J], or null
  A* logits;            // likewise, before the softmax
};

// Shared memory of a pass: the stages, then twice the logits [n, slice, lane] and, in the backward, t.
template <class X, Source source, Direction direction>
constexpr int64_t pass_shared_bytes(int64_t units) {
  const int64_t exchange = kInputs * units * kLanes * int64_t(sizeof(Acc<X>));
  return Rows<X, source>::shared_bytes(units) + 2 * (direction == Direction::backward ? 2 : 1) * exchange;
}

// The sum of what the slices of an output capsule left, this lane's of the first.
template <class A>
CAPSROUTE_DEVICE A sum_slices(const A* of_first, int slices) {
  A sum = *of_first;
  CAPSROUTE_ROLL
  for (int s = 1; s < slices; ++s) sum += of_first[s * kLanes];
  return sum;
}

// The softmax over the group's j of input capsule i, by one thread for its lane. l holds the logits and t the h . e
// of the slices; they leave as c, or as db, at each j's first slice.
template <class X, Direction direction>
CAPSROUTE_DEVICE void couple(const Pass<X>& a, bool last, const Place& place, int group, int i, Acc<X>* l, Acc<X>* t) {
  using A = Acc<X>;
  constexpr bool backward = direction == Direction::backward;
  const Problem& p = a.p;
  const int slices = int(a.layout.row_slices), step = slices * kLanes;
  const bool live = takes_part(p, place.b, i), merged = a.split.groups > 1 && !a.group_statistics;
  const bool leak = p.leaky && a.split.groups == 1;
  l += place.lane, t += place.lane;
  A m = leak ? A(0) : -infinity<A>(), r = 0, mean = 0;
  CAPSROUTE_ROLL
  for (int j = 0; j < place.units / slices; ++j) {
    l[j * step] = sum_slices(l + j * step, slices);
    if constexpr (backward) t[j * step] = sum_slices(t + j * step, slices);
    m = l[j * step] > m ? l[j * step] : m;  // the next logit replaces a NaN here, but the sum becomes NaN
    if (!backward && last && a.logits && CAPSROUTE_WITHIN(place.b, p.B))
      store(a.logits + pair_at(p, place.b, i, place.first_output + j), l[j * step]);
  }
  if (merged) {
    const A* all = statistics_at(a.statistics, place.tile, p.I, i, place.lane);
    m = load(all), r = load(all + kLanes), mean = backward ? load(all + 2 * kLanes) : A(0);
  } else if (m == -infinity<A>()) {
    m = 0;  // all pairs are forbidden
  }
  A z = leak ? exp(-m) : A(0), y = 0;
  CAPSROUTE_ROLL
  for (int j = 0; j < place.units / slices; ++j) {
    const A share = exp(l[j * step] - m);
    z += share;
    if constexpr (backward) y += share * t[j * step];
    l[j * step] = l[j * step] == -infinity<A>() ? A(-1) : share;  // -1: forbidden, not only far below m
  }
  if (!merged) {
    if (a.group_statistics) {
      A* mine = statistics_at(a.group_statistics, group * a.layout.tiles + place.tile, p.I, i, place.lane);
      store(mine, m), store(mine + kLanes, z);
      if constexpr (backward) store(mine + 2 * kLanes, y);
      return;
    }
    r = z != 0 ? 1 / z : A(0), mean = y * r;
    if (backward && a.statistics) {
      A* all = statistics_at(a.statistics, place.tile, p.I, i, place.lane);
      store(all, m), store(all + kLanes, r), store(all + 2 * kLanes, mean);
    }
  }
  CAPSROUTE_ROLL
  for (int j = 0; j < place.units / slices; ++j) {
    const A share = l[j * step];
    const A c = live && share != -1 ? share * r : A(0);  // not live or forbidden: 0, not 0 * NaN
    if constexpr (backward) {
      l[j * step] = c != 0 ? c * (t[j * step] - mean) : A(0);
    } else {
      l[j * step] = c;
      if (last && a.coupling && CAPSROUTE_WITHIN(place.b, p.B))
        store(a.coupling + pair_at(p, place.b, i, place.first_output + j), from_acc<X>(c));
    }
  }
}

// The prior logit, 0 where input capsule i takes no part.
template <class X>
CAPSROUTE_DEVICE Acc<X> prior_logit(const Problem& p, int b, int i, int j, bool live) {
  const int64_t* stride = p.logits.stride;
  if (!live || !p.logits.data) return 0;
  return load_element<X>(p.logits, p.u.dtype, b * stride[0] + i * stride[1] + j * stride[2]);
}

// The softmax over i of this lane and j: online, or known already.
template <class X, Direction direction>
struct ColumnSoftmax {
  using A = Acc<X>;
  static constexpr bool backward = direction == Direction::backward;
  bool known;
  A m = -infinity<A>(), z = 0;  // the largest logit so far, and the sum of exp(logit - m); if known, 1/z
  A mean = 0, error = 0;        // of t

  CAPSROUTE_DEVICE ColumnSoftmax(const Pass<X>& a, const Place& place, bool known) : known(known) {
    if (!known || !place.active) return;
    const A* all = statistics_at(a.statistics, place.tile, a.p.J, place.j, place.lane);
    m = load(all), z = load(all + kLanes), mean = backward ? load(all + 2 * kLanes) : A(0);
  }

  // c, or db, of input capsule i from the slices' logits l and t; `sum` is rescaled as the maximum grows.
  template <int K>
  CAPSROUTE_DEVICE A couple(const Pass<X>& a, const Place& place, bool last_pass, int i, bool used, const A* l,
                            const A* t, A (&sum)[K]) {
    const int slices = int(a.layout.row_slices);
    const bool leaves = !backward && last_pass && place.slice == 0 && CAPSROUTE_WITHIN(place.b, a.p.B);
    const A logit = sum_slices(l, slices), target = backward ? sum_slices(t, slices) : A(0);
    if (leaves && a.logits) store(a.logits + pair_at(a.p, place.b, i, place.j), logit);
    if (known) {
      const A share = used ? exp(logit - m) * z : A(0);
      const A c = !backward ? share : share != 0 ? share * (target - mean) : A(0);
      error += c;
      if (leaves && a.coupling) store(a.coupling + pair_at(a.p, place.b, i, place.j), from_acc<X>(c));
      return c;
    }
    if (!used) return 0;
    const A highest = logit > m ? logit : m, scale = exp(m - highest), c = exp(logit - highest);
    CAPSROUTE_UNROLL
    for (int k = 0; k < K; ++k) sum[k] *= scale;
    m = highest, z = z * scale + c;
    return c;
  }

  // What the chunk adds to the softmax or, in the backward, to the mean's error.
  CAPSROUTE_DEVICE void leave(const Pass<X>& a, const Place& place, int chunk) const {
    if (place.slice != 0 || (known && !backward)) return;
    A* own = statistics_at(a.chunk_statistics, chunk * a.layout.tiles + place.tile, a.p.J, place.j, place.lane);
    store(own, backward ? error : m);
    if constexpr (!backward) store(own + kLanes, z);
  }
};

// This slice's part of the logit of input capsule i and, in the backward, of t, to where the block reads them. Says
// whether the pair takes part: if not, h becomes 0, whatever it holds.
template <class X, Direction direction, int K>
CAPSROUTE_DEVICE bool leave_logit(const Pass<X>& a, const Place& place, int i, Acc<X> (&h)[K], bool query,
                                  const Acc<X> (&q)[K], const Acc<X> (&e)[K], Acc<X>* l, Acc<X>* t) {
  using A = Acc<X>;
  bool used = takes_part(a.p, place.b, i);
  A logit = prior_logit<X>(a.p, place.b, i, place.j, used), target = 0;
  used = used && logit != -infinity<A>();
  logit = place.slice == 0 ? logit : A(0);
  if (used) {
    if (query) logit += dot(h, q);  // not 0 * NaN
    if constexpr (direction == Direction::backward) target = dot(h, e);
  } else {
    clear(h);
  }
  l[place.warp * kLanes + place.lane] = logit;
  if constexpr (direction == Direction::backward) t[place.warp * kLanes + place.lane] = target;
  return used;
}

// `last_pass` says that it leaves coupling and logits, if they are wanted.
template <class X, Source source, Direction direction, bool over_inputs>
CAPSROUTE_DEVICE void pass(const Pass<X>& a, const Acc<X>* query, bool last_pass, int tile, int chunk, int group,
                           char* memory) {
  using A = Acc<X>;
  using MyRows = Rows<X, source>;
  constexpr bool backward = direction == Direction::backward;
  constexpr int N = kInputs, K = MyRows::K;
  const Problem& p = a.p;
  const Place place(p, a.layout, a.split, tile, group);
  const int first = chunk * int(a.split.inputs), last = int(minimum(p.I, first + a.split.inputs));
  const int64_t at = place.template column<K>(p, a.layout.row_padded);
  const int size = a.split.units * kLanes;  // the logits of one input capsule
  A* const exchange = reinterpret_cast<A*>(memory + MyRows::shared_bytes(a.split.units));

  A q[K], e[K], sum[K];
  clear(q), clear(e), clear(sum);
  if (place.active && query) load_slice(q, query, at, place.lane);
  if (place.active && backward) load_slice(e, a.gradient, at, place.lane);
  ColumnSoftmax<X, direction> column(a, place, over_inputs && a.statistics);

  MyRows rows(p, a.layout, a.split, a.weight, place, last, memory);
  if (first < last) rows.begin(first);
  int half = 0;  // of the exchange: the next logits need not wait for those who still read these
  for (int i = first; i < last; i += N, half ^= 1) {
    A h[N][K];
    rows.make(h, i, i + N);
    A* logits = exchange + half * (backward ? 2 : 1) * N * size;
    A* targets = logits + (backward ? N * size : 0);
    bool used[N];
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n)
      used[n] = place.active && CAPSROUTE_WITHIN(i + n, last) &&
                leave_logit<X, direction>(a, place, i + n, h[n], query, q, e, logits + n * size, targets + n * size);
    CAPSROUTE_SYNC();
    CAPSROUTE_ROLL
    for (int n = place.warp; n < N && !over_inputs; n += place.warps)
      if (CAPSROUTE_WITHIN(i + n, last))
        couple<X, direction>(a, last_pass, place, group, i + n, logits + n * size, targets + n * size);
    wait_copies();
    CAPSROUTE_SYNC();
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      if (!place.active || !CAPSROUTE_WITHIN(i + n, last)) continue;
      const int own = n * size + place.leader() * kLanes + place.lane;
      A c = logits[own];
      if constexpr (over_inputs)
        c = column.couple(a, place, last_pass, i + n, used[n], logits + own, targets + own, sum);
      CAPSROUTE_UNROLL
      for (int k = 0; k < K; ++k) sum[k] += c * h[n][k];
    }
  }
  if (!place.active || !a.partial) return;
  if constexpr (over_inputs) column.leave(a, place, chunk);
  const int64_t to = chunk * a.layout.row_state(p) + at * kLanes + place.lane;
  CAPSROUTE_UNROLL
  for (int k = 0; k < K; ++k) store(a.partial + to + k * kLanes, sum[k]);
}

}  // namespace capsroute::cuda
