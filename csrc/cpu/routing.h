// The CPU kernel tier: raw pointers in, raw pointers out. It knows no Tensor, allocates nothing,
// and starts no thread of its own.
//
// Letters: B batch, I input capsules, D their features, J output capsules, O their features,
// R routing iterations. One pass over the input capsules is
//   c_ij = softmax over j of (logits_ij + h_ij . V_j),   s_j = sum over i of c_ij h_ij,
// with V^0 = 0 and V^k = V^(k-1) + squash(s^k), so the state between passes is V [B, J, O] alone.
// Where the coupling of the last pass is a constant, the backward is that of one pass, R = 1, whose prior logits are
// those that Forward saved, and which wants no gradient for them.
// A routing pass by itself is R = 1 from V^0 = query, without squash: then s is the result, not v.
#pragma once

#include <cstdint>
#include <type_traits>

namespace capsroute {

enum class DType { float32, float64, bfloat16, float16 };

// The storage types that C++ has no name for, and the type that each is accumulated in.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
template <class X>
using Acc = std::conditional_t<std::is_same_v<X, double>, double, float>;

enum class Weight {
  none,    // u holds the votes [B, I, J, O]
  pair,    // W [I, J, O, D]: h_ij = W_ij u_i
  output,  // W [J, O, D]:    h_ij = W_j u_i
  single   // W [O, D]:       h_ij = W u_i
};

// A read-only array with strides counted in elements; null data means "not given".
struct Array {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride[4] = {0, 0, 0, 0};
};

struct Problem {
  int64_t B, I, D, J, O, R;
  Weight form;
  Array u;           // [b, i, d], or the votes [b, i, j, o]
  Array weight;      // [i, j, o, d], stride 0 where it is shared; the dtype of u
  Array bias;        // [j, o]
  Array logits;      // [b, i, j]
  Array mask;        // [b, i] of bytes, 0 where the input capsule is masked
  Array query;       // [b, j, o], V^0 in the accumulation type; null means zero
  bool over_inputs;  // the softmax runs over the input capsules i, not over j
  bool leaky;
  double eps;
};

// Outputs are dense. The accumulation type is float64 for float64, else float32.
struct Forward {
  void* v;         // [B, J, O], or null: no squash after the last pass
  void* s;         // [saved, B, J, O] in the accumulation type, or null
  void* norm;      // over_inputs: [2, saved, B, J] in the accumulation type, the largest logit over i and the sum over
                   // i of exp(logit - largest); or null
  void* coupling;  // [B, I, J] of the last pass, or null
  void* logits;    // [B, I, J] of the last pass in the accumulation type, logits_ij + h_ij . V_j; or null
  int64_t saved;   // passes, the last ones, whose s and norm are wanted
  void* votes;     // where those of a few samples are kept for Backward::votes, as many as there is room for; or null
  int64_t room;    // bytes
};

// The memory orders in which dW of each pair is written, by the letters of its dimensions: the kernels' own, and
// matrices [D, O] or [O, D] one after another.
enum class Order { IDJO, IJDO, JIDO, IJOD, JIOD };

struct Backward {
  Array grad_v;   // [b, j, o] of the dtype of u, or null, and then
  Array grad_s;   // [b, j, o] of s^R in the accumulation type
  const void* s;  // what Forward saved, of all R passes
  const void* norm;
  const void* votes;           // what Forward left, or null
  int64_t room;                // as Forward's
  int64_t logits_B, logits_I;  // 1 or B, 1 or I: the dimensions that the logits themselves have
  void* u;                     // as Problem::u, or null where not wanted; so the others
  void* weight;                // of each pair as `order` says, [J, O, D] or [O, D]
  Order order;                 // the CUDA kernels write the first one alone
  void* bias;                  // [J, O], the dtype of Problem::bias
  void* logits;                // [logits_B, logits_I, J], the dtype of Problem::logits
  void* query;                 // [B, J, O] in the accumulation type
  // If dW for each pair lies in new memory, whose pages the system gives when they are written: asks for those of a
  // part that will be. Else null.
  void (*ask_for_pages)(void* start, int64_t bytes);
};

// Runs body(context, part) for part = 0 .. parts-1, at most `threads` of them at a time.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t parts, void (*body)(void* context, int64_t part), void* context);
};

// The way in which a call is computed: it follows from sizes, options, dtype and instruction set. The number of
// threads decides how long a long tile is, and with it `tiles`, `by_group`, `copied`, `as_read` and `scratch`: the bits
// depend on none of them.
struct Plan {
  int64_t scratch;        // bytes
  int64_t vector_bytes;   // those of Kernels, or half as many where rows fill such vectors and not whole ones
  bool product_first;     // the first pass, if it couples all alike, sums u with W at once, and not the votes
  bool handed;            // the forward leaves the votes that are kept to the backward
  bool by_samples;        // a lane is a sample, not a feature
  bool copied, as_read;   // a weight of each pair that is not in order is brought into it at first, or dealt with as it
                          // is read: multiplied as it lies, or brought into order
  int64_t kept_inputs;    // the first ones, whose votes are kept between a tile's passes; others are made anew in each
  int64_t tile;           // samples that read the weight together
  int64_t tiles, groups;  // of samples, and of input capsules, whose sums are added in order
  bool by_group;          // threads share out the groups of a tile, not whole tiles
  int64_t chunk;          // samples that a backward takes at a time
  bool keeps_pairs;       // the backward keeps p_ij and db_ij of all passes for the gradients
  bool few_inputs;        // it takes few input capsules at a time, as W and dW of a block would leave the cache
};

// One table for each instruction set. Scratch must be aligned to 64 bytes and may hold anything.
struct Kernels {
  const char* name;
  Plan (*plan_forward)(const Problem&, const Forward&, int64_t threads);
  void (*forward)(const Problem&, const Forward&, void* scratch, const Parallel&);
  Plan (*plan_backward)(const Problem&, const Backward&, int64_t threads);
  void (*backward)(const Problem&, const Backward&, void* scratch, const Parallel&);
  int64_t vector_bytes;
};

// The best table that this processor can run, or the one that ATEN_CPU_CAPABILITY names if it is
// lower; chosen once.
const Kernels& kernels();

// The tables that this build has and this processor can run, the best first: the n-th, or null past the last; and the
// one with a name, or null.
const Kernels* kernels_at(int64_t n);
const Kernels* kernels_named(const char* name);

}  // namespace capsroute
