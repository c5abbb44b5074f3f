// What surrounds the streams: the weight in the kernels' order, groups' statistics made one, and sums in a fixed order.
#pragma once

#include "finish_backward.cuh"
#include "pass.cuh"

namespace capsroute::cuda {

// This thread's element, where each thread has one.
CAPSROUTE_DEVICE int64_t own_element() { return int64_t(block_index()) * thread_count() + thread_index(); }

// W [I, J, O, D] of any strides to [I, D, J, O padded], zeros where padded.
template <class X>
struct Pack {
  Problem p;
  Layout layout;
  X* packed;
};

template <class X>
CAPSROUTE_DEVICE void pack(const Pack<X>& a) {
  const Problem& p = a.p;
  const int64_t* stride = p.weight.stride;
  int64_t e = own_element();
  if (!CAPSROUTE_WITHIN(e, p.I * p.D * p.J * a.layout.row_padded)) return;
  X* to = a.packed + e;
  const int64_t o = e % a.layout.row_padded;
  e /= a.layout.row_padded;
  const int64_t j = e % p.J, d = e / p.J % p.D, i = e / p.J / p.D;
  const X* from = static_cast<const X*>(p.weight.data) + i * stride[0] + j * stride[1] + d * stride[3];
  store(to, CAPSROUTE_WITHIN(o, p.O) ? load(from + o * stride[2]) : X{});
}

// The statistics of all groups as one: with M = max m_g, z = sum over g of z_g exp(m_g - M) (and the leak's exp(-M)),
// likewise y; then 1/z and the mean y/z.
template <class X>
struct Merge {
  using A = Acc<X>;
  Problem p;
  int64_t tiles, groups;
  bool backward;
  const A* group_statistics;  // [group, tile, i, 3, lane]
  A* statistics;              // [tile, i, 3, lane]
};

template <class X>
CAPSROUTE_DEVICE void merge(const Merge<X>& a) {
  using A = Acc<X>;
  const int64_t e = own_element(), lanes = a.tiles * a.p.I * kLanes;
  if (!CAPSROUTE_WITHIN(e, lanes)) return;
  const int64_t at = e / kLanes * kStatistics * kLanes + e % kLanes, size = lanes * kStatistics;
  A M = a.p.leaky ? A(0) : -infinity<A>();
  for (int64_t g = 0; CAPSROUTE_WITHIN(g, a.groups); ++g) {
    const A m = load(a.group_statistics + g * size + at), z = load(a.group_statistics + g * size + at + kLanes);
    if (z != 0 && m > M) M = m;  // a group that is all forbidden has z = 0
  }
  if (M == -infinity<A>()) M = 0;
  A z = a.p.leaky ? exp(-M) : A(0), y = 0;
  for (int64_t g = 0; g < a.groups; ++g) {
    const A* of_group = a.group_statistics + g * size + at;
    const A own = load(of_group + kLanes);
    if (own == 0) continue;
    const A scale = exp(load(of_group) - M);
    z += own * scale;
    if (a.backward) y += load(of_group + 2 * kLanes) * scale;
  }
  const A r = z != 0 ? 1 / z : A(0);
  store(a.statistics + at, M), store(a.statistics + at + kLanes, r);
  if (a.backward) store(a.statistics + at + 2 * kLanes, y * r);
}

// total[e] = sum over parts of part[e], in order
template <class A, class To>
struct Fold {
  int64_t count, parts;
  const A* part;  // [parts, count]
  To* total;
};

template <class A, class To>
CAPSROUTE_DEVICE void fold(const Fold<A, To>& a) {
  const int64_t e = own_element();
  if (!CAPSROUTE_WITHIN(e, a.count)) return;
  LongSum<A> sum;
  for (int64_t part = 0; CAPSROUTE_WITHIN(part, a.parts); ++part) sum.add(load(a.part + part * a.count + e));
  store(a.total + e, from_acc<To>(sum.total()));
}

constexpr int kSumThreads = 128;  // a power of two

// The sum of a number of each of them, as a tree, for thread 0.
template <class A>
CAPSROUTE_DEVICE A sum_threads(A x, A* memory) {
  const int own = thread_index();
  memory[own] = x;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    CAPSROUTE_SYNC();
    if (CAPSROUTE_WITHIN(own, half)) memory[own] += memory[own + half];
  }
  return memory[own];
}

// dbias[j, o] = sum over k and b of ds^k_j. A block has one (j, o).
template <class X, class Parameter>
struct BiasGradient {
  using A = Acc<X>;
  Problem p;
  Layout layout;
  const A* ds;       // [R, tile, j, o, lane]
  Parameter* dbias;  // [J, O]
};

template <class X, class Parameter>
CAPSROUTE_DEVICE void bias_gradient(const BiasGradient<X, Parameter>& a, char* memory) {
  using A = Acc<X>;
  const Problem& p = a.p;
  const int64_t block = block_index(), j = block / p.O, o = block % p.O, tiles = a.layout.tiles;
  LongSum<A> own;
  for (int64_t k = 0; k < p.R; ++k)
    for (int64_t e = thread_index(); CAPSROUTE_WITHIN(e, tiles * kLanes); e += thread_count()) {
      const int64_t tile = e / kLanes, lane = e % kLanes;
      own.add(load(a.ds + k * a.layout.out_state(p) + ((tile * p.J + j) * a.layout.out_padded + o) * kLanes + lane));
    }
  const A sum = sum_threads(own.total(), reinterpret_cast<A*>(memory));
  if (thread_index() == 0) store(a.dbias + block, from_acc<Parameter>(sum));
}

// dlogits of logits that broadcast: summed over b, over i or over both. A block has one element.
template <class X, class Parameter>
struct LogitsGradient {
  using A = Acc<X>;
  Problem p;
  int64_t own_B, own_I;
  const A* all;        // [B, I, J]
  Parameter* dlogits;  // [own_B, own_I, J]
};

template <class X, class Parameter>
CAPSROUTE_DEVICE void logits_gradient(const LogitsGradient<X, Parameter>& a, char* memory) {
  using A = Acc<X>;
  const Problem& p = a.p;
  const int64_t block = block_index(), j = block % p.J, own_i = block / p.J % a.own_I, own_b = block / p.J / a.own_I;
  const int64_t count_b = a.own_B == p.B ? 1 : p.B, count_i = a.own_I == p.I ? 1 : p.I;
  LongSum<A> own;
  for (int64_t e = thread_index(); CAPSROUTE_WITHIN(e, count_b * count_i); e += thread_count()) {
    const int64_t b = own_b + e / count_i, i = own_i + e % count_i;
    own.add(load(a.all + pair_at(p, b, i, j)));
  }
  A sum = sum_threads(own.total(), reinterpret_cast<A*>(memory));
  if (p.over_inputs && a.own_I == 1) sum -= sum;  // a softmax over i gives nothing to what all i share; a NaN stays
  if (thread_index() == 0) store(a.dlogits + block, from_acc<Parameter>(sum));
}

// Of a shared weight: dW_j = sum over k and b of ds^k_j (sum_i p_ij u_i)^T + V^k_j (sum_i db_ij u_i)^T, of a weight
// [O, D] summed over j too. A block has a square of kSquare o and d, and one part of the tiles.
constexpr int kSquare = 16;

template <class X>
struct SharedWeightGradient {
  using A = Acc<X>;
  Problem p;
  Layout layout;
  States<X> states;
  const A* sum_p;  // [R, tile, j, row, lane]
  const A* sum_db;
  int64_t parts;  // of the tiles
  A* dweight;     // [part, J or 1, O, D]
};

// Are all pairs of output capsule j of sample b forbidden, by their prior logits or, over inputs, by the mask?
template <class X>
CAPSROUTE_DEVICE bool forbidden(const Problem& p, int b, int j) {
  if (!p.logits.data && !(p.over_inputs && p.mask.data)) return false;
  for (int i = 0; CAPSROUTE_WITHIN(i, p.I); ++i) {
    const bool live = takes_part(p, b, i);
    if (live ? prior_logit<X>(p, b, i, j, live) != -infinity<Acc<X>>() : !p.over_inputs) return false;
  }
  return true;
}

template <class X>
CAPSROUTE_DEVICE void shared_weight_gradient(const SharedWeightGradient<X>& a, char* memory) {
  using A = Acc<X>;
  constexpr int kRow = kLanes + 1;
  const Problem& p = a.p;
  const Layout& layout = a.layout;
  const bool one = p.form == Weight::single;
  A* left = reinterpret_cast<A*>(memory);
  A* right = left + kSquare * kRow;
  int64_t block = block_index();
  const int64_t squares_d = divide_up(p.D, kSquare), squares_o = divide_up(p.O, kSquare), matrices = one ? 1 : p.J;
  const int64_t d0 = block % squares_d * kSquare, o0 = (block /= squares_d) % squares_o * kSquare;
  const int64_t matrix = (block /= squares_o) % matrices, part = block / matrices;
  const int64_t per_part = divide_up(layout.tiles, a.parts), first = part * per_part;
  const int own_o = thread_index() / kSquare, own_d = thread_index() % kSquare;

  LongSum<A> sum;
  auto add = [&](const A* outputs, const A* rows, int64_t tile, int64_t j) {
    for (int e = thread_index(); e < kSquare * kLanes; e += thread_count()) {
      const int f = e / kLanes, lane = e % kLanes;
      const int64_t o = (tile * p.J + j) * layout.out_padded + o0 + f,
                    d = (tile * p.J + j) * layout.row_padded + d0 + f;
      A x = o0 + f < p.O ? load(outputs + o * kLanes + lane) : A(0);
      // What is not finite adds nothing where no pair is used; 0 times it would be NaN.
      if (x - x != 0 && forbidden<X>(p, int(tile) * kLanes + lane, int(j))) x = 0;
      left[f * kRow + lane] = x;
      right[f * kRow + lane] = d0 + f < p.D ? load(rows + d * kLanes + lane) : A(0);
    }
    CAPSROUTE_SYNC();
    A of_tile = 0;
    for (int lane = 0; lane < kLanes; ++lane) of_tile += left[own_o * kRow + lane] * right[own_d * kRow + lane];
    sum.add(of_tile);
    CAPSROUTE_SYNC();
  };
  for (int64_t tile = first; CAPSROUTE_WITHIN(tile, minimum(first + per_part, layout.tiles)); ++tile)
    for (int64_t j = one ? 0 : matrix; j <= (one ? p.J - 1 : matrix); ++j) {
      CAPSROUTE_ROLL
      for (int64_t term = 0; term < 2 * p.R; ++term) {
        const int64_t k = term / 2, out = k * layout.out_state(p), row = k * layout.row_state(p);
        if (term == 1 && !p.query.data) continue;
        add((term % 2 ? a.states.V : a.states.ds) + out, (term % 2 ? a.sum_db : a.sum_p) + row, tile, j);
      }
    }
  if (CAPSROUTE_WITHIN(o0 + own_o, p.O) && CAPSROUTE_WITHIN(d0 + own_d, p.D))
    store(a.dweight + ((part * matrices + matrix) * p.O + o0 + own_o) * p.D + d0 + own_d, sum.total());
}

}  // namespace capsroute::cuda
