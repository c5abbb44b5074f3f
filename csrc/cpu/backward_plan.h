// The backward, also streams over the input capsules. From the saved s^k follow V^k; with
// e^k = ds^k and q^k = V^k (W^T ds^k and W^T V^k where the weight is shared), for k = R .. 1:
//   p^k_ij = softmax over j of (logits_ij + h_ij . q^(k-1)_j),  t_ij = h_ij . e^k_j,
//   db^k_ij = p^k_ij (t_ij - sum over j of p^k_ij t_ij),
//             or, where the softmax runs over i, p^k_ij (t_ij - (s^k_j - bias_j) . ds^k_j): this mean of t is
//             known before the stream, but rounded in another way than t. What the db^k then sum to over i, which
//             should be nothing, is the mean's error x^k_j, and db^k_ij - p^k_ij x^k_j is used in the end,
//   dV^(k-1)_j = dV^k_j + sum over i of db^k_ij h_ij,  ds^(k-1) = J_squash(s^(k-1))^T dV^(k-1).
// Then, for every i,
//   dh_ij = sum over k of (p^k_ij e^k_j + db^k_ij q^(k-1)_j),
//   du_i = sum_j W_ij^T dh_ij,  dW_ij = sum_b dh_ij u_i^T,  dlogits_ij = sum over k of db^k_ij.
//
// The batch is taken in chunks: in each, LogitStream does the first part by samples, and RowGradients
// the second by input capsules, so that each dW_ij has one owner who adds it up in one order.
#pragma once

#include "forward.h"

namespace capsroute::CAPSROUTE_ISA {

// p^k and db^k, numbers for every [I, J] of a sample, are kept for a chunk of the batch within
// kChunkBytes. If that does not hold kFewestKept samples, the second part makes them anew.
constexpr int64_t kChunkBytes = int64_t(32) << 20, kFewestKept = 16;
// Every chunk reads all of W and adds to all of dW. A chunk may take kChunkWeights times as much as W, and with it more
// than kChunkBytes, but no more than kLongChunkBytes, nor three tenths of what votes would take.
constexpr int64_t kLongChunkBytes = int64_t(64) << 20, kChunkWeights = 4;
// So many samples, or twice as many, share a load of W and dW. A chunk is a multiple of the former, or the whole batch.
constexpr int64_t kSubBatch = 8;
// Without a weight for each pair nothing large is read or written once a chunk, and a small one stays
// in the cache between the parts.
constexpr int64_t kSmallChunkBytes = int64_t(4) << 20;

// The sizes of a backward and the places of what it keeps.
template <class X>
struct BackwardPlan {
  using A = Acc<X>;

  BackwardPlan(const Layout<X>& layout, const Backward& out) : layout(layout), p(layout.p), out(out) {
    const int64_t R = p.R;
    given = p.query.data ? 1 : 0;
    logits_by_row = out.logits && out.logits_I == p.I;
    logits_by_sum = out.logits && !logits_by_row;
    terms = 2 * R - 1 + given;
    slots = 2 * (R - 1 + given) + logits_by_row;
    logits_move = R > 1 || given || out.logits;
    means = p.over_inputs ? 2 * R * pad<A>(p.J) : 0;
    logit_sums = logits_by_sum || (p.over_inputs && logits_move);
    const int64_t vectors =
        (terms * (layout.outputs() + (layout.shared ? 2 * layout.sums() : 0)) + means) * int64_t(sizeof(A));
    // As if all gradients were wanted: where a batch is cut, and so the bits of sums over it, depends on sizes alone.
    const int64_t most = 2 * (R - 1 + given) + (p.logits.data && out.logits_I == p.I);
    const int64_t pairs = most * layout.blocks * layout.lanes() * int64_t(sizeof(A));
    const int64_t votes = p.I * p.J * p.O * int64_t(sizeof(A));  // bytes of those of a sample, or of a W_id of all i
    const int64_t large = minimum(kLongChunkBytes, minimum(kChunkWeights * p.D * votes, 3 * p.B * votes / 10));
    const int64_t bytes = p.form == Weight::pair ? maximum(kChunkBytes, large) : kSmallChunkBytes;
    keep_pairs = (vectors + pairs) * minimum(kFewestKept, p.B) <= maximum(kChunkBytes, bytes);
    const int64_t fitting = bytes / maximum(1, vectors + (keep_pairs ? pairs : 0)) / kSubBatch * kSubBatch;
    const int64_t chunks = divide_up(p.B, maximum(kFewestKept, fitting));
    chunk = minimum(p.B, divide_up(divide_up(p.B, maximum(1, chunks)), kSubBatch) * kSubBatch);

    const bool needs_sums = layout.shared && out.weight;
    last_pass = needs_sums || out.logits || given ? 1 : 2;  // a pass 1 without a query does not look at rows
  }

  // Whether pass k compares rows with a query q^(k-1). That is zero for k = 1, unless it was given.
  bool queried(int64_t k) const { return k >= first_queried(); }
  int64_t first_queried() const { return given ? 1 : 2; }
  // Indices among the terms of dh: e^1 .. e^R, then q^(first_queried() - 1) .. q^(R-1).
  int64_t e(int64_t k) const { return k - 1; }
  int64_t q(int64_t k) const { return p.R + k - 1 + given; }
  // Slots of p^k and db^k for the queried k: another p^1 needs no rows.
  int64_t p_slot(int64_t k) const { return 2 * (k - first_queried()); }
  int64_t db_slot(int64_t k) const { return 2 * (k - first_queried()) + 1; }
  int64_t logits_slot() const { return slots - 1; }

  const Layout<X>& layout;
  const Problem& p;
  const Backward& out;
  int64_t given;                      // 1 if V^0 is, else 0
  bool logits_by_row, logits_by_sum;  // dlogits: for every i, or summed over i with each pass
  bool keep_pairs;
  int64_t last_pass;  // the passes R .. last_pass are streamed
  int64_t terms;      // of dh
  int64_t slots;      // numbers kept for every [I, J]
  int64_t means;      // numbers kept for a softmax over i: (s^k_j - bias_j) . ds^k_j, and their errors
  bool logits_move;   // whether any db^k_ij is wanted
  bool logit_sums;    // whether the sums over i of db^k_ij are wanted
  int64_t chunk;      // samples
};

// What the first part leaves to the second, for a chunk of samples.
template <class X>
struct Kept {
  using A = Acc<X>;

  Kept(const BackwardPlan<X>& plan, Carver& carver)
      : plan(plan), layout(plan.layout), sub_tiles(divide_up(plan.chunk, L<A>)) {
    const int64_t vectors = plan.chunk * plan.terms;
    outputs = carver.take<A>(vectors * layout.outputs());
    rows = layout.shared ? carver.take<A>(vectors * layout.sums()) : outputs;
    sums = layout.shared ? carver.take<A>(vectors * layout.sums()) : nullptr;
    means = carver.take<A>(plan.chunk * plan.means);
    pairs = plan.keep_pairs ? carver.take<A>(sub_tiles * L<A> * layout.blocks * block_pairs()) : nullptr;
    logit_sums = plan.logits_by_sum ? carver.take<A>(plan.chunk * pad<A>(plan.p.J)) : nullptr;
  }

  int64_t block_pairs() const { return plan.slots * layout.lanes(); }
  A* output(int64_t n, int64_t term) const { return outputs + (n * plan.terms + term) * layout.outputs(); }
  A* row(int64_t n, int64_t term) const { return rows + (n * plan.terms + term) * layout.sums(); }
  A* sum(int64_t n, int64_t term) const { return sums + (n * plan.terms + term) * layout.sums(); }
  A* mean(int64_t n, int64_t k) const { return means + n * plan.means + 2 * (k - 1) * pad<A>(plan.p.J); }
  A* mean_error(int64_t n, int64_t k) const { return mean(n, k) + pad<A>(plan.p.J); }
  A* pair(int64_t n, int64_t i0) const { return pairs + (i0 / L<A> * plan.chunk + n) * block_pairs(); }
  A* pair_of_samples(int64_t n, int64_t i) const {
    return pairs + ((i / L<A> * sub_tiles + n / L<A>)*L<A> + i % L<A>)*block_pairs() + n % L<A>;
  }

  const BackwardPlan<X>& plan;
  const Layout<X>& layout;
  const int64_t sub_tiles;
  A* outputs;     // [n][term][J, O]: ds^k and V^k
  A* rows;        // [n][term][J, F]: e^k and q^k
  A* sums;        // [n][term][J, F]: sum over i of p^k_ij u_i and of db^k_ij u_i, for a shared weight
  A* means;       // [n][k][2][J], for a softmax over i
  A* pairs;       // [block][n][slot][J, L inputs], or by samples [block][n / L][i][slot][J, L samples]
  A* logit_sums;  // [n][J]
};

}  // namespace capsroute::CAPSROUTE_ISA
