// Between two passes of the backward, for one tile and one output capsule. With pass k from 0:
//   V_k = sum of squash(s_k') over k' < k,   dV_k = dV_(k+1) + sum over i of db_ij h_ij,
//   ds_(R-1) = J_squash(s_(R-1))^T grad_v,   ds_(k-1) = J_squash(s_(k-1))^T dV_k
#pragma once

#include "finish.cuh"

namespace capsroute::cuda {

// What the backward keeps for every pass.
template <class X>
struct States {
  using A = Acc<X>;
  A* V;       // [R, tile, j, o, lane]; V_0 only where there is a query
  A* ds;      // [R, tile, j, o, lane]
  A* query;   // the same as rows: of a shared weight W_j^T V_j, else V itself
  A* row_ds;  // of a shared weight e_j = W_j^T ds_j, else ds itself
};

template <class X>
struct FinishBackward {
  using A = Acc<X>;
  Problem p;
  Layout layout;
  States<X> states;
  Array grad_v;  // else there is grad_s
  Array grad_s;
  const A* s;     // [R, B, J, O]
  const A* norm;  // over inputs: [2, R, B, J]
  A* statistics;  // over inputs: [R, tile, j, 3, lane] are left here
  int64_t pass;
  int64_t chunks;
  const A* partial;           // of pass `pass`: sums of db_ij h_ij
  const A* chunk_statistics;  // over inputs: sums of db_ij, [chunk, tile, j, 3, lane]
  const A* partial_p;  // of a shared weight, over inputs or if its gradient is wanted: sums of p_ij h_ij, or null
  A* dV;               // [tile, j, o, lane], added up; null where no earlier pass wants it
  A* sum_db;           // [R, tile, j, row, lane]: the two sums themselves for that gradient, or null
  A* sum_p;
  A* dquery;  // [B, J, O], or null
};

// What follows from ds of a pass, the column `first`, where `second` is s: its rows and, over inputs, the statistics.
template <class X>
CAPSROUTE_DEVICE void use_ds(const FinishBackward<X>& a, const Capsule<X>& capsule, int64_t pass) {
  using A = Acc<X>;
  const Problem& p = a.p;
  const int lane = capsule.lane;
  if (p.over_inputs && capsule.warp == 0) {
    const int64_t b = capsule.tile * kLanes + lane, at = (pass * p.B + b) * p.J + capsule.j;
    A* all = statistics_at(a.statistics, pass * a.layout.tiles + capsule.tile, p.J, capsule.j, lane);
    A m = 0, z = 0, mean = 0;
    if (CAPSROUTE_WITHIN(b, p.B)) m = load(a.norm + at), z = load(a.norm + p.R * p.B * p.J + at);
    store(all, m), store(all + kLanes, z != 0 ? 1 / z : A(0));
    for (int64_t o = 0; CAPSROUTE_WITHIN(o, p.O); ++o)
      mean += (capsule.second[column_at(o, lane)] - capsule.bias(o)) * capsule.first[column_at(o, lane)];
    store(all + 2 * kLanes, mean);
  }
  if (capsule.keys) capsule.to_rows(capsule.first, a.states.row_ds + pass * a.layout.row_state(p));
}

template <class X>
CAPSROUTE_DEVICE void read_s(const FinishBackward<X>& a, const Capsule<X>& capsule, Acc<X>* column, int64_t pass) {
  const Problem& p = a.p;
  const int64_t row = p.J * p.O;
  capsule.read(column, a.s + pass * p.B * row + capsule.j * p.O, row, 1);
}

// Before the first stream: V of every pass, ds of the last.
template <class X>
CAPSROUTE_DEVICE void begin_backward(const FinishBackward<X>& a, int64_t tile, int64_t j, char* memory) {
  using A = Acc<X>;
  const Problem& p = a.p;
  const Capsule<X> capsule(p, a.layout, tile, j, memory);
  const int64_t out_state = a.layout.out_state(p), row_state = a.layout.row_state(p);
  if (p.query.data) capsule.read_query(a.states.V, a.states.query);
  for (int64_t pass = 0; pass + 1 < p.R; ++pass) {
    read_s(a, capsule, capsule.second, pass);
    capsule.squash_scale(capsule.second);
    for (int64_t o = capsule.warp; o < a.layout.out_padded; o += capsule.warps) {
      A V = 0;
      if (CAPSROUTE_WITHIN(o, p.O)) {
        const int at = column_at(o, capsule.lane);
        V = capsule.second[at] * capsule.of_lane[capsule.lane] + (pass > 0 ? capsule.first[at] : A(0));
        capsule.first[at] = V;
      }
      store(a.states.V + (pass + 1) * out_state + (capsule.out_at + o) * kLanes + capsule.lane, V);
    }
    CAPSROUTE_SYNC();
    if (capsule.keys) capsule.to_rows(capsule.first, a.states.query + (pass + 1) * row_state);
  }
  read_s(a, capsule, capsule.second, p.R - 1);
  const int64_t last = p.R - 1;
  if (a.grad_v.data) {
    const int64_t* stride = a.grad_v.stride;
    capsule.read(capsule.first, static_cast<const X*>(a.grad_v.data) + j * stride[1], stride[0], stride[2]);
    capsule.squash_backward(capsule.second, capsule.first, a.states.ds + last * out_state);
  } else {
    const int64_t* stride = a.grad_s.stride;
    capsule.read(capsule.first, static_cast<const A*>(a.grad_s.data) + j * stride[1], stride[0], stride[2]);
    for (int64_t o = capsule.warp; o < a.layout.out_padded; o += capsule.warps)
      store(a.states.ds + last * out_state + (capsule.out_at + o) * kLanes + capsule.lane,
            CAPSROUTE_WITHIN(o, p.O) ? capsule.first[column_at(o, capsule.lane)] : A(0));
  }
  use_ds(a, capsule, last);
}

// Keeps a column of rows for the gradient of a shared weight.
template <class X>
CAPSROUTE_DEVICE void keep_rows(const FinishBackward<X>& a, const Capsule<X>& capsule, const Acc<X>* column,
                                Acc<X>* rows) {
  const int64_t state = a.pass * a.layout.row_state(a.p);
  for (int64_t f = capsule.warp; f < a.layout.rows; f += capsule.warps)
    store(rows + state + (capsule.row_at + f) * kLanes + capsule.lane, column[column_at(f, capsule.lane)]);
}

// Over inputs: the error of the mean of t: added to the mean, so taken from every db_ij.
template <class X>
CAPSROUTE_DEVICE Acc<X> correct_mean(const FinishBackward<X>& a, const Capsule<X>& capsule) {
  Acc<X> error = 0;
  for (int64_t c = 0; CAPSROUTE_WITHIN(c, a.chunks); ++c) error += load(capsule.of_chunk(a.chunk_statistics, c));
  if (capsule.warp == 0) {
    Acc<X>* mean = statistics_at(a.statistics, a.pass * a.layout.tiles + capsule.tile, a.p.J, capsule.j, capsule.lane) +
                   2 * kLanes;
    store(mean, load(mean) + error);
  }
  return error;
}

// Takes that error from every db_ij: from their sum, the column `first`, error times the sum over i of p_ij h_ij, which
// of a shared weight is the column `second`. Before any W, and rounded as db_ij h_ij was: of votes so long that all
// couple with one input capsule, nothing may be left.
template <class X>
CAPSROUTE_DEVICE void correct_sum(const FinishBackward<X>& a, const Capsule<X>& capsule, Acc<X> error) {
  using A = Acc<X>;
  if (!capsule.keys) read_s(a, capsule, capsule.second, a.pass);
  for (int64_t f = capsule.warp; f < a.layout.rows; f += capsule.warps) {
    const int at = column_at(f, capsule.lane);
    const A sum_p = capsule.second[at] - (capsule.keys ? A(0) : capsule.bias(f));
    capsule.first[at] -= rounded_product(error, sum_p);
  }
  CAPSROUTE_SYNC();
}

// After the stream of pass k: dV_k, then ds_(k-1) or, of the first pass, the query's gradient; of a shared weight also
// the sums over i that its gradient is made of.
template <class X>
CAPSROUTE_DEVICE void finish_backward(const FinishBackward<X>& a, int64_t tile, int64_t j, char* memory) {
  using A = Acc<X>;
  const Problem& p = a.p;
  const Capsule<X> capsule(p, a.layout, tile, j, memory);
  const A error = p.over_inputs && a.chunk_statistics ? correct_mean(a, capsule) : A(0);
  if (!a.dV && !a.dquery && !a.sum_db) return;
  if (a.partial_p) {
    capsule.sum_chunks(capsule.second, a.partial_p, a.chunks);
    if (a.sum_p) keep_rows(a, capsule, capsule.second, a.sum_p);
  }
  capsule.sum_chunks(capsule.first, a.partial, a.chunks);
  if (p.over_inputs) correct_sum(a, capsule, error);
  if (a.sum_db) keep_rows(a, capsule, capsule.first, a.sum_db);
  if (!a.dV && !a.dquery) return;
  if (capsule.keys) capsule.to_outputs();
  const A* x = capsule.keys ? capsule.second : capsule.first;
  for (int64_t o = capsule.warp; CAPSROUTE_WITHIN(o, p.O); o += capsule.warps) {
    const int at = column_at(o, capsule.lane);
    A dV = x[at];
    if (a.dV) {
      A* state = a.dV + (capsule.out_at + o) * kLanes + capsule.lane;
      dV += a.pass == p.R - 1 ? A(0) : load(state);
      store(state, dV);
    }
    capsule.first[at] = dV;
  }
  CAPSROUTE_SYNC();
  if (!a.dV) {
    capsule.write(a.dquery, capsule.first);
    return;
  }
  read_s(a, capsule, capsule.second, a.pass - 1);
  capsule.squash_backward(capsule.second, capsule.first, a.states.ds + (a.pass - 1) * a.layout.out_state(p));
  use_ds(a, capsule, a.pass - 1);
}

}  // namespace capsroute::cuda
