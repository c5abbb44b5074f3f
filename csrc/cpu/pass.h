// One pass over a block, forward and backward: its lanes are input capsules of one sample, or samples of one input
// capsule. Blocks are passed by value: a store could change one that is passed by reference.
#pragma once

#include "rows.h"

namespace capsroute::CAPSROUTE_ISA {

// h_ij . q_j for the block's lanes; q is [J, F], and [J, F][L] where lanes are samples.
template <class A, class Size>
CAPSROUTE_INLINE Vec<A> dot(const Block<A> block, const A* q, int64_t j, Size F) {
  return dot_rows(block.rows + j * block.column, block.row, block.count, q + j * F, F);
}

template <class A, class Size>
CAPSROUTE_INLINE Vec<A> dot(const SampleBlock<A> block, const A* q, int64_t j, Size F) {
  return dot_samples(block.rows + j * F * L<A>, q + j * F * L<A>, F);
}

template <class A, class Size>
CAPSROUTE_INLINE Vec<A> dot(const DottedBlock<A>, const A* dots, int64_t j, Size) {
  return load(dots + j * L<A>);
}

// logits_ij + h_ij . q_j, and -inf for a forbidden pair, whatever q_j is.
template <class Lanes, class A, class Size>
CAPSROUTE_INLINE Vec<A> logit_of(const Lanes block, const A* q, int64_t j, Size F) {
  Vec<A> logit = q ? dot(block, q, j, F) : all<A>(0);
  if (!block.prior) return logit;
  const Vec<A> prior = load(block.prior + j * L<A>);
  logit += prior;
  return block.forbids ? (prior == all(kForbidden<A>) ? prior : logit) : logit;
}

// The lanes whose pairs are all forbidden. Logits that are all -inf do not say so: agreements may overflow to that.
template <class Lanes>
CAPSROUTE_INLINE auto forbids_all(const Lanes block, int64_t J) {
  using A = std::remove_cvref_t<decltype(*block.prior)>;
  Vec<A> highest = all(kForbidden<A>);
  for (int64_t j = 0; j < J; ++j) {
    const Vec<A> prior = load(block.prior + j * L<A>);
    highest = prior == all(kForbidden<A>) ? highest : prior;
  }
  return highest == all(kForbidden<A>);
}

// The coupling of a pass that couples all j alike.
template <class A>
CAPSROUTE_INLINE A equal_share(int64_t J, bool leaky) {
  return A(1) / A(leaky ? J + 1 : J);
}

// c_ij = softmax over j of (logits_ij + h_ij . q_j), to c[j, lane]; 0 in lanes that are not live and
// for forbidden pairs. A null query counts as zero: then rows are not read. The logits are left too, if wanted.
template <class Lanes, class A, class Size>
void couple(const Lanes block, const A* q, int64_t J, Size F, bool leaky, A* c, A* logits = nullptr) {
  const Mask<A> live = block.live != 0;
  if (!q && !block.prior && !logits) {
    const Vec<A> uniform = live ? all(equal_share<A>(J, leaky)) : all<A>(0);
    for (int64_t j = 0; j < J; ++j) store(c + j * L<A>, uniform);
    return;
  }
  Vec<A> highest = all<A>(leaky ? A(0) : kForbidden<A>);
  for (int64_t j = 0; j < J; ++j) {
    Vec<A> logit = logit_of(block, q, j, F);
    highest = highest > logit ? highest : logit;  // the next logit replaces a NaN here, but the sum becomes NaN
    store(c + j * L<A>, logit);
  }
  if (logits) __builtin_memcpy(logits, c, J * L<A> * sizeof(A));
  if (block.forbids) highest = forbids_all(block, J) ? all<A>(0) : highest;
  Vec<A> sum = leaky ? exp_negative<A>(-highest) : all<A>(0);
  for (int64_t j = 0; j < J; ++j) {
    const Vec<A> share = exp_negative<A>(load(c + j * L<A>) - highest);
    sum += share;
    store(c + j * L<A>, share);
  }
  const Mask<A> used = live & (sum != 0);  // a lane whose pairs are all forbidden couples with 0
  const Vec<A> scale = used ? 1 / sum : all<A>(0);
  for (int64_t j = 0; j < J; ++j) {
    Vec<A> share = load(c + j * L<A>);
    share = used ? share * scale : all<A>(0);
    if (block.forbids) share = load(block.prior + j * L<A>) == kForbidden<A> ? all<A>(0) : share;
    store(c + j * L<A>, share);
  }
}

// What a softmax over i is made of as the stream goes by, for one sample: for every j the largest logit so far, the
// sum over i of exp(logit - largest), and the sum over i of exp(logit - largest) h_ij.
template <class A>
struct Online {
  A* sums;     // [J, F]
  A* highest;  // [J]
  A* total;    // [J]
};

// exp(from - to) where from <= to; the largest of no logits is -inf.
template <class A>
CAPSROUTE_INLINE A rescale(A from, A to) {
  return exp_negative<A>(all<A>(from == to ? A(0) : from - to))[0];
}

// A logit of a softmax over i, where what does not take part has -inf.
template <class Lanes, class A, class Size>
CAPSROUTE_INLINE Vec<A> online_logit(const Lanes block, const A* q, int64_t j, Size F) {
  const Vec<A> logit = logit_of(block, q, j, F);
  return block.live != 0 ? logit : all(kForbidden<A>);
}

// Those of a block, to c[j, lane], and also to `logits`, if wanted.
template <class Lanes, class A, class Size>
void online_logits(const Lanes block, const A* q, int64_t J, Size F, A* c, A* logits) {
  for (int64_t j = 0; j < J; ++j) store(c + j * L<A>, online_logit(block, q, j, F));
  if (logits) __builtin_memcpy(logits, c, J * L<A> * sizeof(A));
}

// Softmax over i, on the way: c_ij = exp(logits_ij + h_ij . q_j - highest_j), to c[j, lane], for the largest logit up
// to and with this block, to which total and sums are brought. The logits are left too, if wanted.
template <class A, class Size>
void couple_online(const Block<A> block, const A* q, int64_t J, Size F, const Online<A>& online, A* c,
                   A* logits = nullptr) {
  for (int64_t j = 0; j < J; ++j) {
    const Vec<A> logit = online_logit(block, q, j, F);
    if (logits) store(logits + j * L<A>, logit);
    A highest = online.highest[j];
    for (int64_t l = 0; l < L<A>; ++l) highest = logit[l] > highest ? logit[l] : highest;
    if (highest > online.highest[j]) {
      const A scale = rescale(online.highest[j], highest);
      online.highest[j] = highest, online.total[j] *= scale;
      A* sums = online.sums + j * F;
      for (int64_t f = 0; f < F; f += L<A>) store(sums + f, load(sums + f) * scale);
    }
    const Vec<A> share = exp_negative<A>(highest == kForbidden<A> ? logit : logit - highest);
    online.total[j] += sum_lanes(share);
    store(c + j * L<A>, share);
  }
}

// The same for the input capsules of a block, [count][J, L], where a lane is a sample: their logits become c. What was
// found so far is given by lanes too.
template <class A, class Size>
void couple_online(A* c, int64_t count, int64_t J, Size F, const Online<A>& online) {
  for (int64_t j = 0; j < J; ++j) {
    A *own = c + j * L<A>, *total = online.total + j * L<A>;
    const Vec<A> before = load(online.highest + j * L<A>);
    Vec<A> highest = before;
    for (int64_t l = 0; l < count; ++l) {
      const Vec<A> logit = load(own + l * J * L<A>);
      highest = logit > highest ? logit : highest;
    }
    if (any(highest > before)) {
      const Vec<A> scale = exp_negative<A>(before == highest ? all<A>(0) : before - highest);
      store(online.highest + j * L<A>, highest), store(total, load(total) * scale);
      A* sums = online.sums + j * F * L<A>;
      for (int64_t f = 0; f < F; ++f) store(sums + f * L<A>, load(sums + f * L<A>) * scale);
    }
    Vec<A> sum = all<A>(0);
    for (int64_t l = 0; l < count; ++l) {
      const Vec<A> logit = load(own + l * J * L<A>);
      const Vec<A> share = exp_negative<A>(highest == all(kForbidden<A>) ? logit : logit - highest);
      sum = l == 0 ? share : sum + share;
      store(own + l * J * L<A>, share);
    }
    store(total, load(total) + sum);
  }
}

// Joins what two parts of the stream found.
template <class A>
void join_online(const Online<A>& to, const Online<A>& from, int64_t J, int64_t F) {
  for (int64_t j = 0; j < J; ++j) {
    const A highest = to.highest[j] > from.highest[j] ? to.highest[j] : from.highest[j];
    const A own = rescale(to.highest[j], highest), other = rescale(from.highest[j], highest);
    to.highest[j] = highest, to.total[j] = to.total[j] * own + from.total[j] * other;
    for (int64_t f = j * F; f < (j + 1) * F; f += L<A>)
      store(to.sums + f, load(to.sums + f) * own + load(from.sums + f) * other);
  }
}

// The same softmax over i again, where the largest logit and the total are known.
template <class A, class Size>
void couple_inputs(const Block<A> block, const A* q, int64_t J, Size F, const A* highest, const A* total, A* c) {
  const Mask<A> live = block.live != 0;
  for (int64_t j = 0; j < J; ++j) {
    const Vec<A> logit = logit_of(block, q, j, F);
    const Mask<A> used = block.forbids ? live & (load(block.prior + j * L<A>) != kForbidden<A>) : live;
    const A scale = total[j] == 0 ? 0 : 1 / total[j];
    store(c + j * L<A>, used ? exp_negative<A>(logit - highest[j]) * scale : all<A>(0));
  }
}

// Its logits' gradient: with t_ij = h_ij . e_j and mean_j = sum over i of c_ij t_ij = (s_j - bias_j) . e_j,
//   db_ij = c_ij (t_ij - mean_j).
template <class A, class Size>
void couple_inputs_backward(const Block<A> block, const A* c, const A* e, int64_t J, Size F, const A* mean, A* db) {
  for (int64_t j = 0; j < J; ++j) {
    const Vec<A> t = dot(block, e, j, F);
    const Vec<A> share = load(c + j * L<A>);
    store(db + j * L<A>, share == 0 ? all<A>(0) : share * (t - mean[j]));
  }
}

// With t_ij = h_ij . e_j, the gradient of the logits: db_ij = c_ij (t_ij - sum over j of c_ij t_ij).
template <class Lanes, class A, class Size>
void couple_backward(const Lanes block, const A* c, const A* e, int64_t J, Size F, A* db) {
  Vec<A> mean = all<A>(0);
  for (int64_t j = 0; j < J; ++j) {
    const Vec<A> t = dot(block, e, j, F);
    const Vec<A> share = load(c + j * L<A>);
    mean = share == 0 ? mean : mean + share * t;  // not 0 * NaN
    store(db + j * L<A>, t);
  }
  for (int64_t j = 0; j < J; ++j) {
    const Vec<A> share = load(c + j * L<A>);
    const Vec<A> gradient = share * (load(db + j * L<A>) - mean);
    store(db + j * L<A>, share == 0 ? all<A>(0) : gradient);  // not live or forbidden: 0, not 0 * NaN
  }
}

// s_j += sum over the block's i of c_ij h_ij
template <class A, class Count, class Size>
CAPSROUTE_INLINE void add_block(const Block<A> block, Count count, const A* c, int64_t J, Size F, A* s) {
  int64_t j = 0;
  if (block.column == 0)  // the same rows for all j
    for (; j + 4 <= J; j += 4) add_rows<4>(s + j * F, block.rows, block.row, count, c + j * L<A>, F);
  for (; j < J; ++j) add_rows<1>(s + j * F, block.rows + j * block.column, block.row, count, c + j * L<A>, F);
}

template <class A, class Size>
void add_block(const Block<A> block, const A* c, int64_t J, Size F, A* s) {
  if (block.count == L<A>)
    add_block(block, Known<L<A>>(), c, J, F, s);
  else
    add_block(block, block.count, c, J, F, s);
}

// The same where c_ij is a `share` for all, and rows hold [J, F] numbers that follow each other.
template <class A>
void add_block_alike(const Block<A> block, A share, int64_t numbers, A* s) {
  if (block.count == L<A>)
    add_rows<1>(s, block.rows, block.row, Known<L<A>>(), all<A>(share), numbers);
  else
    add_rows<1>(s, block.rows, block.row, block.count, all<A>(share), numbers);
}

// v = squash(s) = n2 / (1 + n2) * s / sqrt(n2 + eps), n2 = |s|^2
template <class A>
void squash(const A* s, A* v, int64_t O, double eps) {
  Vec<A> squares = all<A>(0);
  for (int64_t o = 0; o < O; o += L<A>) squares += load(s + o) * load(s + o);
  const A n2 = sum_lanes(squares);
  const A scale = n2 / (1 + n2) / A(__builtin_sqrt(n2 + A(eps)));
  for (int64_t o = 0; o < O; o += L<A>) store(v + o, load(s + o) * scale);
}

// ds = J_squash(s)^T g. With r = sqrt(n2 + eps), f = n2 / (1 + n2) / r, sh = s / r:
//   ds = f g + (2 r / (1 + n2) / (1 + n2) - f) (sh . g) sh,
// the form that neither overflows nor cancels for |s| up to 1e18 in float.
template <class A>
void squash_backward(const A* s, const A* g, A* ds, int64_t O, double eps) {
  Vec<A> squares = all<A>(0), products = all<A>(0);
  for (int64_t o = 0; o < O; o += L<A>) squares += load(s + o) * load(s + o);
  const A n2 = sum_lanes(squares);
  const A r = A(__builtin_sqrt(n2 + A(eps)));
  const A f = n2 / (1 + n2) / r;
  for (int64_t o = 0; o < O; o += L<A>) products += load(s + o) / r * load(g + o);
  const A along = (2 * r / (1 + n2) / (1 + n2) - f) * sum_lanes(products);
  for (int64_t o = 0; o < O; o += L<A>) store(ds + o, load(g + o) * f + load(s + o) / r * along);
}

}  // namespace capsroute::CAPSROUTE_ISA
