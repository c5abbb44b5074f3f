// The last stream of the backward: from the p and db of all passes to the gradients of u (or the votes), of a weight
// [I, J, O, D] and of the logits.
//   dh_ij = sum over k of (p^k_ij ds^k_j + db^k_ij V^k_j)
//   du_i = sum over j of W_ij^T dh_ij (of a shared weight: of dh_ij as rows),   dW_ij = sum over b of dh_ij u_i^T
//   dlogits_ij = sum over k of db^k_ij
// with pass k from 0. A block has a chunk of i and a group of j. Where dW of each pair is wanted, a sum over b, it runs
// over all tiles, else over one.
#pragma once

#include "finish_backward.cuh"
#include "pass.cuh"

namespace capsroute::cuda {

constexpr int64_t kGroupedTiles = 32;  // whose dW are added before they join the long sum over the batch

// Is the coupling of pass k the same for all j, whatever the votes?
CAPSROUTE_ANYWHERE bool uniform(const Problem& p, int64_t k) {
  return k == 0 && !p.logits.data && !p.query.data && !p.over_inputs;
}

template <class X>
struct Gradients {
  using A = Acc<X>;
  Problem p;
  Layout layout;
  Split split;
  States<X> states;
  const X* weight;      // [I, D, J, O padded] for Source::made
  const A* statistics;  // [R, tile, i, 3, lane], over inputs [R, tile, j, 3, lane]
  bool all_tiles;       // one block for all tiles
  A* du_groups;         // [group, B, I, D], or null: there is one group
  X* du;                // [B, I, D], or the votes' [B, I, J, O]; null where not wanted
  A* dweight_sum;       // [I, D, J, O] between the tiles of a group
  A* dweight_groups;    // [2, I, D, J, O]: the sum of the groups so far, and what it lost; null: there is one
  X* dweight;           // [I, D, J, O], or null
  A* dlogits;           // [B, I, J] in A, or null
};

// Bytes of shared memory: the stages, then logits and targets twice, du of each slice, dh with its lanes in a row.
template <class X, Source source>
struct GradientsMemory {
  using A = Acc<X>;
  static constexpr int K = kFeatures<A>, kDepth = cuda::kDepth<A>;
  static constexpr int kSums = source == Source::made ? kDepth : source == Source::keys ? K : 0;  // for a slice
  int64_t rows, exchange, sums, dh, bytes;

  CAPSROUTE_ANYWHERE constexpr explicit GradientsMemory(int64_t units)
      : rows(Rows<X, source>::shared_bytes(units)),
        exchange(2 * 2 * kInputs * units * kLanes * int64_t(sizeof(A))),
        sums(kSums * units * kLanes * int64_t(sizeof(A))),
        dh(source == Source::made ? units * K * kPitch * int64_t(sizeof(A)) : 0),
        bytes(rows + exchange + sums + dh) {}
};

template <class X, Source source>
class GradientStream {
 public:
  using A = Acc<X>;
  using MyRows = Rows<X, source>;
  static constexpr int N = kInputs, K = MyRows::K, kDepth = MyRows::kDepth;

  // Input capsules first .. last - 1, and a group of j. Place and rows are the caller's: an object with a pointer into
  // itself, as rows have one to the place, would stay in memory, and the compiler forget what its pointers point to.
  CAPSROUTE_DEVICE GradientStream(const Gradients<X>& a, int first, int last, int group, Place& place, MyRows& rows,
                                  char* memory)
      : a_(a), p_(a.p), group_(group), first_(first), last_(last), place_(place), rows_(rows) {
    const GradientsMemory<X, source> m(a.split.units);
    exchange_ = reinterpret_cast<A*>(memory + m.rows);
    sums_ = reinterpret_cast<A*>(memory + m.rows + m.exchange);
    dh_ = reinterpret_cast<A*>(memory + m.rows + m.exchange + m.sums);
  }

  CAPSROUTE_DEVICE void run() {
    const int begin = a_.all_tiles ? 0 : place_.tile, end = a_.all_tiles ? int(a_.layout.tiles) : place_.tile + 1;
    for (int tile = begin; tile < end; ++tile) {
      place_.at_tile(tile);
      if (first_ < last_) rows_.begin(first_);
      for (int i = first_; i < last_; i += N) {
        A h[N][K], dh[N][K];
        rows_.make(h, i, source == Source::made ? last_ : i + N);
        votes_gradient(h, dh, i);
        if constexpr (source == Source::made) {
          back_to_inputs(dh, i);
        } else if constexpr (source == Source::keys) {
          add_outputs(dh, i);
        } else {
          write_votes(dh, i);
        }
      }
    }
  }

 private:
  // dh of input capsules i .. i + N - 1, and dlogits
  CAPSROUTE_DEVICE void votes_gradient(const A (&h)[N][K], A (&dh)[N][K], int i) {
    const int64_t at = place_.template column<K>(p_, a_.layout.row_padded), state = a_.layout.row_state(p_);
    const bool active = place_.active;
    A dlogits[N], prior[N];
    bool live[N];
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      clear(dh[n]);
      dlogits[n] = 0;
      live[n] = active && CAPSROUTE_WITHIN(i + n, last_) && takes_part(p_, place_.b, i + n);
      prior[n] = prior_logit<X>(p_, place_.b, i + n, place_.j, live[n]);
      live[n] = live[n] && prior[n] != -infinity<A>();  // of a forbidden pair nothing may be used, NaN or not
    }
    for (int k = int(p_.R) - 1; k >= 0; --k) {
      A e[K], q[K];
      clear(e), clear(q);
      if (active) load_slice(e, a_.states.row_ds + k * state, at, place_.lane);
      const bool query = k > 0 || p_.query.data;  // else 0 * NaN is not added, as in pass()
      if (active && query) load_slice(q, a_.states.query + k * state, at, place_.lane);
      A logit[N], target[N];
      CAPSROUTE_UNROLL
      for (int n = 0; n < N; ++n) {  // added in the order of pass(), as its softmax is taken again
        logit[n] = place_.slice == 0 ? prior[n] : A(0);
        if (query) logit[n] += dot(h[n], q);
        target[n] = dot(h[n], e);
      }
      if (a_.layout.row_slices > 1) add_slices(logit, target);
      CAPSROUTE_UNROLL
      for (int n = 0; n < N; ++n) {
        if (!live[n]) continue;
        A p, db;
        couple_again(k, i + n, logit[n], target[n], p, db);
        dlogits[n] += db;
        CAPSROUTE_UNROLL
        for (int f = 0; f < K; ++f) dh[n][f] += query ? p * e[f] + db * q[f] : p * e[f];
      }
    }
    if (!a_.dlogits || !active || place_.slice != 0 || !CAPSROUTE_WITHIN(place_.b, p_.B)) return;
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n)
      if (CAPSROUTE_WITHIN(i + n, last_)) store(a_.dlogits + pair_at(p_, place_.b, i + n, place_.j), dlogits[n]);
  }

  // p and db of pass k from the statistics that the streams left
  CAPSROUTE_DEVICE void couple_again(int k, int i, A logit, A target, A& p, A& db) const {
    if (uniform(p_, k)) {  // no stream was needed, and nobody wants db
      p = 1 / A(p_.leaky ? p_.J + 1 : p_.J), db = 0;
      return;
    }
    const int64_t count = p_.over_inputs ? p_.J : p_.I, index = p_.over_inputs ? place_.j : i;
    const A* all = statistics_at(a_.statistics, k * a_.layout.tiles + place_.tile, count, index, place_.lane);
    p = exp(logit - load(all)) * load(all + kLanes);
    db = p == 0 ? A(0) : p * (target - load(all + 2 * kLanes));
  }

  // Sums over the slices of each j, through shared memory; the halves take turns.
  CAPSROUTE_DEVICE void add_slices(A (&logit)[N], A (&target)[N]) {
    const int size = a_.split.units * kLanes, slices = int(a_.layout.row_slices);
    A* logits = exchange_ + half_ * 2 * N * size;
    A* targets = logits + N * size;
    half_ ^= 1;
    if (place_.active) {
      CAPSROUTE_UNROLL
      for (int n = 0; n < N; ++n) {
        logits[n * size + place_.warp * kLanes + place_.lane] = logit[n];
        targets[n * size + place_.warp * kLanes + place_.lane] = target[n];
      }
    }
    CAPSROUTE_SYNC();
    if (!place_.active) return;
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      const int at = n * size + place_.leader() * kLanes + place_.lane;
      logit[n] = sum_slices(logits + at, slices), target[n] = sum_slices(targets + at, slices);
    }
  }

  // du and dW, back through the features of the stages, the last first: it is still there.
  CAPSROUTE_DEVICE void back_to_inputs(const A (&dh)[N][K], int i) {
    for (int d0 = int(p_.D - 1) / kDepth * kDepth; d0 >= 0; d0 -= kDepth) {
      const bool more = d0 > 0, fetches = more || i + N < last_;
      if (fetches) rows_.fetch(more ? i : i + N, more ? d0 - kDepth : 0);
      CAPSROUTE_UNROLL
      for (int n = 0; n < N; ++n) {
        if (i + n < last_) leave_sums(dh[n], n, d0);
        CAPSROUTE_SYNC();
        if (CAPSROUTE_WITHIN(i + n, last_)) {
          if (a_.du) add_units(i + n, d0);
          if (a_.dweight) add_samples(i + n, n, d0);
        }
        if (n == N - 1) {
          if (fetches) rows_.deposit();
          wait_copies();
        }
        CAPSROUTE_SYNC();
      }
      if (fetches) rows_.flip();
    }
  }

  // This slice's part of du, for each of the stage's features; and dh where other lanes can read it.
  CAPSROUTE_DEVICE void leave_sums(const A (&dh)[K], int n, int d0) {
    if (!place_.active) return;
    if (a_.du) {
      for (int d = 0; d < int(minimum(kDepth, p_.D - d0)); ++d) {
        A w[K];
        rows_.weight(w, n, d);
        sums_[(d * a_.split.units + place_.warp) * kLanes + place_.lane] = dot(w, dh);
      }
    }
    CAPSROUTE_UNROLL
    for (int k = 0; k < K; ++k) dh_[(place_.warp * K + k) * kPitch + place_.lane] = dh[k];
  }

  // du[d] = sum over the group's slices
  CAPSROUTE_DEVICE void add_units(int i, int d0) {
    for (int d = place_.warp; CAPSROUTE_WITHIN(d, minimum(kDepth, p_.D - d0)); d += place_.warps) {
      A sum = 0;
      for (int unit = 0; CAPSROUTE_WITHIN(unit, place_.units); ++unit)
        sum += sums_[(d * a_.split.units + unit) * kLanes + place_.lane];
      write_du(i, d0 + d, sum);
    }
  }

  CAPSROUTE_DEVICE void write_du(int i, int d, A sum) {
    if (!CAPSROUTE_WITHIN(place_.b, p_.B)) return;
    if (p_.mask.data && !takes_part(p_, place_.b, i)) sum = 0;  // W may hold what is not finite
    const int64_t to = (place_.b * p_.I + i) * p_.D + d;
    if (a_.du_groups) {
      store(a_.du_groups + group_ * p_.B * p_.I * p_.D + to, sum);
    } else {
      store(a_.du + to, from_acc<X>(sum));
    }
  }

  // dW[d, k] = sum over the tile's samples of u_d dh_k: a lane has one d of the stage and kOwn neighbouring k of its
  // warp's slice.
  CAPSROUTE_DEVICE void add_samples(int i, int n, int d0) {
    constexpr int kOwn = K * kDepth / kLanes;
    const int d = place_.lane / (K / kOwn), k0 = place_.lane % (K / kOwn) * kOwn;
    if (!place_.active || !CAPSROUTE_WITHIN(d0 + d, p_.D)) return;
    A sum[kOwn];
    clear(sum);
    const A* u = rows_.input(n, d);
    for (int b = 0; b < kLanes; ++b) {
      CAPSROUTE_UNROLL
      for (int q = 0; q < kOwn; ++q) sum[q] += u[b] * dh_[(place_.warp * K + k0 + q) * kPitch + b];
    }
    CAPSROUTE_UNROLL
    for (int q = 0; q < kOwn; ++q) {
      const int o = place_.slice * K + k0 + q;
      if (CAPSROUTE_WITHIN(o, p_.O)) add_tile(((i * p_.D + d0 + d) * p_.J + place_.j) * p_.O + o, sum[q]);
    }
  }

  // Adds a tile's x to a number of dW. The tiles of a group are added one by one; groups make a long sum, whose two
  // parts are thus read and written once in a group.
  CAPSROUTE_DEVICE void add_tile(int64_t at, A x) {
    const int64_t last = a_.layout.tiles - 1, size = p_.I * p_.D * p_.J * p_.O, in_group = place_.tile % kGroupedTiles;
    if (in_group > 0) x += load(a_.dweight_sum + at);
    if (in_group < kGroupedTiles - 1 && place_.tile < last) return store(a_.dweight_sum + at, x);
    LongSum<A> sum;
    if (place_.tile >= kGroupedTiles) sum = {load(a_.dweight_groups + at), load(a_.dweight_groups + size + at)};
    sum.add(x);
    if (place_.tile == last) return store(a_.dweight + at, from_acc<X>(sum.total()));
    store(a_.dweight_groups + at, sum.sum), store(a_.dweight_groups + size + at, sum.lost);
  }

  // Of a shared weight: du[f] = sum over the group's j of dh_j[f]
  CAPSROUTE_DEVICE void add_outputs(const A (&dh)[N][K], int i) {
    const int slices = int(a_.layout.row_slices);
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      if (place_.active) {
        CAPSROUTE_UNROLL
        for (int k = 0; k < K; ++k) sums_[(place_.warp * K + k) * kLanes + place_.lane] = dh[n][k];
      }
      CAPSROUTE_SYNC();
      if (a_.du && CAPSROUTE_WITHIN(i + n, last_)) {
        for (int d = place_.warp; CAPSROUTE_WITHIN(d, p_.D); d += place_.warps) {
          A sum = 0;
          for (int unit = 0; CAPSROUTE_WITHIN(unit, place_.units); unit += slices)
            sum += sums_[(unit * K + d) * kLanes + place_.lane];
          write_du(i + n, d, sum);
        }
      }
      if (n == N - 1) wait_copies();
      CAPSROUTE_SYNC();
    }
  }

  CAPSROUTE_DEVICE void write_votes(const A (&dh)[N][K], int i) {
    if (!a_.du || !place_.active || !CAPSROUTE_WITHIN(place_.b, p_.B)) return;
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      if (!CAPSROUTE_WITHIN(i + n, last_)) continue;
      X* to = a_.du + pair_at(p_, place_.b, i + n, place_.j) * p_.O + place_.slice * K;
      CAPSROUTE_UNROLL
      for (int k = 0; k < K; ++k)
        if (CAPSROUTE_WITHIN(place_.slice * K + k, p_.O)) store(to + k, from_acc<X>(dh[n][k]));
    }
  }

  const Gradients<X>& a_;
  const Problem& p_;
  int group_;
  int first_, last_;
  Place& place_;
  MyRows& rows_;
  A *exchange_, *sums_, *dh_;
  int half_ = 0;
};

}  // namespace capsroute::cuda
