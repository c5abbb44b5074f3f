// Between two passes, for one tile and one output capsule: sums of chunks to s, v and V, and the way back.
// Columns of shared memory hold one number for each feature and lane.
#pragma once

#include "pass.cuh"

namespace capsroute::cuda {

// Feature f of a lane: neither a warp over lanes nor one over features meets itself in a bank.
CAPSROUTE_DEVICE int column_at(int64_t f, int lane) { return int(f) * kLanes + ((lane + int(f)) & (kLanes - 1)); }

// Two columns and three numbers for each lane.
template <class X>
int64_t finish_shared_bytes(const Layout& layout) {
  static_assert((2 * kMaxSlices * kFeatures<Acc<X>> + 3) * kLanes * sizeof(Acc<X>) <= kMostShared);
  return (2 * maximum(layout.row_padded, layout.out_padded) + 3) * kLanes * int64_t(sizeof(Acc<X>));
}

// One tile and one output capsule; of a shared weight also W_j [O, D], from columns to columns.
template <class X>
class Capsule {
 public:
  using A = Acc<X>;
  CAPSROUTE_DEVICE Capsule(const Problem& p, const Layout& layout, int64_t tile, int64_t j, char* memory)
      : lane(thread_index() % kLanes),
        warp(thread_index() / kLanes),
        warps(thread_count() / kLanes),
        tile(tile),
        j(j),
        keys(source_of(p) == Source::keys),
        row_at((tile * p.J + j) * layout.row_padded),
        out_at((tile * p.J + j) * layout.out_padded),
        p_(p),
        layout_(layout) {
    const int64_t size = maximum(layout.row_padded, layout.out_padded) * kLanes;
    first = reinterpret_cast<A*>(memory), second = first + size, of_lane = second + size;
  }

  // column = sum over the chunks of the partial sums, in order; where statistics are given, each times exp(m_c - m) / z
  CAPSROUTE_DEVICE void sum_chunks(A* column, const A* partial, int64_t chunks, const A* statistics = nullptr, A m = 0,
                                   A r = 1) const {
    for (int64_t f = warp; CAPSROUTE_WITHIN(f, layout_.rows); f += warps) {
      A sum = 0;
      for (int64_t c = 0; CAPSROUTE_WITHIN(c, chunks); ++c) {
        const A x = load(partial + c * layout_.row_state(p_) + (row_at + f) * kLanes + lane);
        if (!statistics)
          sum += x;
        else if (load(of_chunk(statistics, c) + kLanes) != 0)
          sum += x * exp(load(of_chunk(statistics, c)) - m);
      }
      column[column_at(f, lane)] = sum * r;
    }
    CAPSROUTE_SYNC();
  }

  // m and z of a chunk, over inputs
  CAPSROUTE_DEVICE const A* of_chunk(const A* statistics, int64_t chunk) const {
    return statistics_at(statistics, chunk * layout_.tiles + tile, p_.J, j, lane);
  }

  // The chunks' softmax as one: m = max m_c, z = sum over c of z_c exp(m_c - m)
  CAPSROUTE_DEVICE void join_chunks(const A* statistics, int64_t chunks, A& m, A& z) const {
    m = -infinity<A>(), z = 0;
    for (int64_t c = 0; CAPSROUTE_WITHIN(c, chunks); ++c) {
      const A own = load(of_chunk(statistics, c));
      if (load(of_chunk(statistics, c) + kLanes) != 0 && own > m) m = own;
    }
    if (m == -infinity<A>()) m = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      const A own = load(of_chunk(statistics, c) + kLanes);
      if (own != 0) z += own * exp(load(of_chunk(statistics, c)) - m);
    }
  }

  // second = W_j first: from rows to outputs
  CAPSROUTE_DEVICE void to_outputs() const {
    for (int64_t o = warp; CAPSROUTE_WITHIN(o, p_.O); o += warps) {
      A sum = 0;
      for (int64_t d = 0; CAPSROUTE_WITHIN(d, p_.D); ++d) sum += weight(o, d) * first[column_at(d, lane)];
      second[column_at(o, lane)] = sum;
    }
    CAPSROUTE_SYNC();
  }

  // state = W_j^T x: from outputs to rows; zeros where the state is padded
  CAPSROUTE_DEVICE void to_rows(const A* x, A* state) const {
    for (int64_t d = warp; d < layout_.row_padded; d += warps) {
      A sum = 0;
      if (CAPSROUTE_WITHIN(d, p_.D))
        for (int64_t o = 0; CAPSROUTE_WITHIN(o, p_.O); ++o) sum += weight(o, d) * x[column_at(o, lane)];
      store(state + (row_at + d) * kLanes + lane, sum);
    }
  }

  // V = query, and of a shared weight its rows; zeros where padded
  CAPSROUTE_DEVICE void read_query(A* V, A* rows) const {
    const int64_t* stride = p_.query.stride;
    read(first, static_cast<const A*>(p_.query.data) + j * stride[1], stride[0], stride[2]);
    for (int64_t o = warp; o < layout_.out_padded; o += warps)
      store(V + (out_at + o) * kLanes + lane, CAPSROUTE_WITHIN(o, p_.O) ? first[column_at(o, lane)] : A(0));
    if (keys) to_rows(first, rows);
  }

  // column = x[b, o] for the tile's b, from memory whose strides these are; zeros past the batch
  template <class T>
  CAPSROUTE_DEVICE void read(A* column, const T* x, int64_t stride_b, int64_t stride_o) const {
    for (int e = thread_index(); e < kLanes * p_.O; e += thread_count()) {
      const int n = e / int(p_.O), o = e % int(p_.O);
      const int64_t b = tile * kLanes + n;
      column[column_at(o, n)] = CAPSROUTE_WITHIN(b, p_.B) ? A(to_acc(load(x + b * stride_b + o * stride_o))) : A(0);
    }
    CAPSROUTE_SYNC();
  }

  // to[b, j, o] = scale_b column, dense, in the type of To
  template <class To>
  CAPSROUTE_DEVICE void write(To* to, const A* column, const A* scale = nullptr) const {
    for (int e = thread_index(); e < kLanes * p_.O; e += thread_count()) {
      const int n = e / int(p_.O), o = e % int(p_.O);
      const int64_t b = tile * kLanes + n;
      const A x = column[column_at(o, n)] * (scale ? scale[n] : A(1));
      if (CAPSROUTE_WITHIN(b, p_.B)) store(to + (b * p_.J + j) * p_.O + o, from_acc<To>(x));
    }
  }

  // of_lane = n2 / (1 + n2) / sqrt(n2 + eps), n2 = |s|^2: squash(s) = s times this
  CAPSROUTE_DEVICE void squash_scale(const A* s) const {
    if (warp == 0) {
      const A n2 = product(s, s, 1);
      of_lane[lane] = n2 / (1 + n2) / sqrt(n2 + A(p_.eps));
    }
    CAPSROUTE_SYNC();
  }

  // ds = J_squash(s)^T g, to memory and to the column g. With r = sqrt(n2 + eps), f = n2 / (1 + n2) / r, sh = s / r:
  //   ds = f g + (2 r / (1 + n2) / (1 + n2) - f) (sh . g) sh,
  // the form that neither overflows nor cancels for |s| up to 1e18 in float.
  CAPSROUTE_DEVICE void squash_backward(const A* s, A* g, A* state) const {
    if (warp == 0) {
      const A n2 = product(s, s, 1), r = sqrt(n2 + A(p_.eps)), inverse = 1 / r, q = 1 / (1 + n2);
      const A f = n2 * q * inverse;
      of_lane[lane] = inverse, of_lane[kLanes + lane] = f;
      of_lane[2 * kLanes + lane] = (2 * r * q * q - f) * product(s, g, inverse);
    }
    CAPSROUTE_SYNC();
    for (int64_t o = warp; o < layout_.out_padded; o += warps) {
      A ds = 0;
      if (CAPSROUTE_WITHIN(o, p_.O)) {
        const int at = column_at(o, lane);
        ds = g[at] * of_lane[kLanes + lane] + s[at] * of_lane[lane] * of_lane[2 * kLanes + lane];
        g[at] = ds;
      }
      store(state + (out_at + o) * kLanes + lane, ds);
    }
    CAPSROUTE_SYNC();
  }

  CAPSROUTE_DEVICE A bias(int64_t o) const {
    if (!p_.bias.data) return 0;
    return load_element<X>(p_.bias, p_.u.dtype, j * p_.bias.stride[0] + o * p_.bias.stride[1]);
  }

  int lane, warp, warps;
  int64_t tile, j;
  bool keys;
  int64_t row_at, out_at;  // where this capsule's features begin in a state
  A *first, *second, *of_lane;

 private:
  // sum over o of scale x_o y_o
  CAPSROUTE_DEVICE A product(const A* x, const A* y, A scale) const {
    A sum = 0;
    for (int64_t o = 0; CAPSROUTE_WITHIN(o, p_.O); ++o) sum += x[column_at(o, lane)] * scale * y[column_at(o, lane)];
    return sum;
  }

  CAPSROUTE_DEVICE A weight(int64_t o, int64_t d) const {
    const int64_t* stride = p_.weight.stride;
    return to_acc(load_uniform(static_cast<const X*>(p_.weight.data) + j * stride[1] + o * stride[2] + d * stride[3]));
  }

  const Problem& p_;
  const Layout& layout_;
};

// After pass k of the forward: s = sum (+ bias), v = squash(s), V = V + v.
template <class X>
struct Finish {
  using A = Acc<X>;
  Problem p;
  Layout layout;
  int64_t chunks;
  const A* partial;           // [chunk, tile, j, row, lane]
  const A* chunk_statistics;  // over inputs: [chunk, tile, j, 3, lane]
  A* statistics;              // over inputs: [tile, j, 3, lane], m and 1/z are left here
  A* V;                       // [tile, j, o, lane]
  A* query;                   // of a shared weight, W_j^T V_j: [tile, j, row, lane]
  A* s;                       // [saved, B, J, O], or null
  A* norm;                    // [2, saved, B, J], or null
  int64_t saved;              // of the R passes, the last ones
  X* v;                       // [B, J, O], or null
  int64_t pass;               // of a launch of its own
};

// V^0 = query, before the first pass.
template <class X>
CAPSROUTE_DEVICE void begin(const Finish<X>& a, int64_t tile, int64_t j, char* memory) {
  const Capsule<X> capsule(a.p, a.layout, tile, j, memory);
  capsule.read_query(a.V, a.query);
}

template <class X>
CAPSROUTE_DEVICE void finish_pass(const Finish<X>& a, int64_t pass, int64_t tile, int64_t j, char* memory) {
  using A = Acc<X>;
  const Problem& p = a.p;
  const Capsule<X> capsule(p, a.layout, tile, j, memory);
  const int lane = capsule.lane;
  const int64_t kept = pass - (p.R - a.saved);  // the place among the saved passes
  if (p.over_inputs) {
    A m, z;
    capsule.join_chunks(a.chunk_statistics, a.chunks, m, z);
    const A r = z != 0 ? 1 / z : A(0);
    capsule.sum_chunks(capsule.first, a.partial, a.chunks, a.chunk_statistics, m, r);
    if (capsule.warp == 0) {
      A* all = statistics_at(a.statistics, tile, p.J, j, lane);
      store(all, m), store(all + kLanes, r);
      const int64_t b = tile * kLanes + lane, to = (kept * p.B + b) * p.J + j;
      if (a.norm && kept >= 0 && CAPSROUTE_WITHIN(b, p.B))
        store(a.norm + to, m), store(a.norm + a.saved * p.B * p.J + to, z);
    }
  } else {
    capsule.sum_chunks(capsule.first, a.partial, a.chunks);
  }
  if (capsule.keys) capsule.to_outputs();
  A* s = capsule.keys ? capsule.second : capsule.first;
  if (p.bias.data) {
    for (int64_t o = capsule.warp; CAPSROUTE_WITHIN(o, p.O); o += capsule.warps)
      s[column_at(o, lane)] += capsule.bias(o);
    CAPSROUTE_SYNC();
  }
  if (a.s && kept >= 0) capsule.write(a.s + kept * p.B * p.J * p.O, s);
  if (!a.v) return;
  capsule.squash_scale(s);
  if (pass == p.R - 1) {
    capsule.write(a.v, s, capsule.of_lane);
    return;
  }
  for (int64_t o = capsule.warp; o < a.layout.out_padded; o += capsule.warps) {
    A* state = a.V + (capsule.out_at + o) * kLanes + lane;
    A V = pass == 0 ? A(0) : load(state);
    if (CAPSROUTE_WITHIN(o, p.O)) {
      V += s[column_at(o, lane)] * capsule.of_lane[lane];
      if (capsule.keys) capsule.first[column_at(o, lane)] = V;
    }
    store(state, V);
  }
  if (capsule.keys) {
    CAPSROUTE_SYNC();
    capsule.to_rows(capsule.first, a.query);
  }
}

template <class X>
CAPSROUTE_DEVICE void finish(const Finish<X>& a, int64_t tile, int64_t j, char* memory) {
  finish_pass(a, a.pass, tile, j, memory);
}

}  // namespace capsroute::cuda
