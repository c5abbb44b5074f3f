// Sizes of a problem: who does what, and where it lies in memory. They follow from the shape and the dtype alone,
// so that the same inputs give the same bits on any GPU.
//
// A lane is a sample, a tile is 32 of them. A warp is a slice: kFeatures of the features of one output capsule.
// What the passes hand on lies in tiles: [tile, j, feature, lane], so that every access is 32 neighbours.
#pragma once

#include <string>

#include "../cpu/routing.h"
#include "portable.cuh"

namespace capsroute::cuda {

constexpr int kInputs = 2;          // input capsules at a time: their votes stay in registers through the softmax
constexpr int kMinWarps = 8;        // warps of a block, at least: the others help to stage
constexpr int kMaxSlices = 8;       // of one output capsule
constexpr int kPitch = kLanes + 4;  // of a row of inputs in shared memory: 16-byte rows, few bank conflicts
// Chunks of i for each tile, whatever the batch, so that a sample's bits do not depend on its neighbours; and blocks of
// the gradients, whose chunks change no sum.
constexpr int64_t kChunks = 32, kBlocks = 256;
// With no more input capsules than this, one block runs all the passes of a tile, if one group has all j and the
// softmax runs over j.
constexpr int64_t kOneLaunch = 64;

// Features of a slice, 64 bytes of registers, and features of input capsules in a stage of shared memory.
template <class A>
constexpr int kFeatures = 64 / int(sizeof(A));
template <class A>
constexpr int kDepth = 32 / int(sizeof(A));

CAPSROUTE_ANYWHERE constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
CAPSROUTE_ANYWHERE constexpr int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
CAPSROUTE_ANYWHERE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the rows of a pass come from: what is dotted with the query and summed over i.
enum class Source {
  made,  // the votes h_ij = W_ij u_i
  keys,  // u_i itself where the weight is shared: h_ij . V_j = u_i . (W_j^T V_j)
  given  // the votes
};

CAPSROUTE_ANYWHERE Source source_of(const Problem& p) {
  return p.form == Weight::pair ? Source::made : p.form == Weight::none ? Source::given : Source::keys;
}

// How a stream over the input capsules is shared out: a block takes a tile, a group of output capsules and a chunk
// of input capsules.
struct Split {
  int64_t groups, outputs;  // groups of so many j
  int64_t chunks, inputs;   // chunks of so many i
  int units;                // slices of a group, at most

  // At most `warps` slices in a block, and chunks for about `blocks` blocks in all of `tiles`.
  static Split of(const Problem& p, int64_t slices, int64_t warps, int64_t tiles, int64_t blocks) {
    Split s;
    s.groups = divide_up(p.J, maximum(1, warps / slices));
    s.outputs = divide_up(p.J, s.groups);
    s.groups = divide_up(p.J, s.outputs);
    s.units = int(s.outputs * slices);
    const int64_t wanted = maximum(1, divide_up(blocks, maximum(1, tiles * s.groups)));
    s.inputs = maximum(kInputs, divide_up(divide_up(p.I, wanted), kInputs) * kInputs);
    s.chunks = maximum(1, divide_up(p.I, s.inputs));
    return s;
  }
};

// Sizes that every kernel needs.
struct Layout {
  int64_t tiles;
  int64_t rows, row_slices;  // features of a row, and their slices
  int64_t row_padded;        // in whole slices
  int64_t out_padded;        // O in whole slices
  bool quads;                // given rows can be read 16 bytes at a time

  CAPSROUTE_ANYWHERE int64_t row_state(const Problem& p) const { return tiles * p.J * row_padded * kLanes; }
  CAPSROUTE_ANYWHERE int64_t out_state(const Problem& p) const { return tiles * p.J * out_padded * kLanes; }
};

template <class X>
Layout layout_of(const Problem& p) {
  constexpr int64_t K = kFeatures<Acc<X>>;
  Layout l;
  l.tiles = divide_up(p.B, kLanes);
  l.rows = source_of(p) == Source::keys ? p.D : p.O;
  l.row_slices = divide_up(l.rows, K);
  l.row_padded = l.row_slices * K;
  l.out_padded = divide_up(p.O, K) * K;
  const int64_t vector = 16 / int64_t(sizeof(X)), *stride = p.u.stride;
  l.quads = source_of(p) == Source::given && stride[3] == 1 && p.O % K == 0 &&
            reinterpret_cast<uintptr_t>(p.u.data) % 16 == 0 && stride[0] % vector == 0 && stride[1] % vector == 0 &&
            stride[2] % vector == 0;
  return l;
}

inline std::string shape_text(const Problem& p) {
  auto text = [](const char* letter, int64_t n) { return std::string(letter) + "=" + std::to_string(n); };
  return text("B", p.B) + " " + text("I", p.I) + " " + text("D", p.D) + " " + text("J", p.J) + " " + text("O", p.O) +
         " " + text("R", p.R);
}

// Hands out parts of one buffer. Over a null base it measures how large the buffer must be.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    T* part = base ? reinterpret_cast<T*>(base + used) : nullptr;
    if (part) mark_scratch(part, count * int64_t(sizeof(T)));
    used += divide_up(count * int64_t(sizeof(T)) + 1, kAlignment) *
            kAlignment;  // one unowned byte between parts, so that a sanitizer sees an overrun
    return part;
  }
};

// Dot products and sums of a slice.
template <class A, int K>
CAPSROUTE_DEVICE A dot(const A (&x)[K], const A (&y)[K]) {
  A sum = 0;
  CAPSROUTE_UNROLL
  for (int k = 0; k < K; ++k) sum += x[k] * y[k];
  return sum;
}

template <class A, int K>
CAPSROUTE_DEVICE void clear(A (&x)[K]) {
  CAPSROUTE_UNROLL
  for (int k = 0; k < K; ++k) x[k] = 0;
}

// A long sum: beside it what its roundings lost (Knuth's two-sum), so that its error does not grow with its length.
// Six float32 additions take less time than loading what is added; of float64, which a consumer's GPU adds at 1/64 of
// the rate, a conversion and one addition would take more.
template <class A>
struct LongSum {
  A sum = 0, lost = 0;

  CAPSROUTE_DEVICE void add(A x) {
    const A next = sum + x, added = next - sum;
    lost += (sum - (next - added)) + (x - added);
    sum = next;
  }

  // Of an infinite sum NaN is lost.
  CAPSROUTE_DEVICE A total() const { return lost == lost ? sum + lost : sum; }
};

// A slice of one lane's column of a state.
template <class A, int K>
CAPSROUTE_DEVICE void load_slice(A (&x)[K], const A* state, int64_t at, int lane) {
  CAPSROUTE_UNROLL
  for (int k = 0; k < K; ++k) x[k] = load(state + (at + k) * kLanes + lane);
}

template <class A>
CAPSROUTE_ANYWHERE A infinity() {
  return A(__builtin_inf());
}

// An element of an array whose dtype is that of u or float32.
template <class X>
CAPSROUTE_DEVICE Acc<X> load_element(const Array& array, DType own, int64_t at) {
  if (array.dtype == own) return to_acc(load(static_cast<const X*>(array.data) + at));
  return Acc<X>(load(static_cast<const float*>(array.data) + at));
}

// Where a pair is in a dense [B, I, J].
CAPSROUTE_ANYWHERE int64_t pair_at(const Problem& p, int64_t b, int64_t i, int64_t j) {
  return (b * p.I + i) * p.J + j;
}

// Does input capsule i of sample b take part? Samples past the batch do not.
CAPSROUTE_DEVICE bool takes_part(const Problem& p, int b, int i) {
  if (!CAPSROUTE_WITHIN(b, p.B)) return false;
  const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data);
  return !mask || load(mask + b * p.mask.stride[0] + i * p.mask.stride[1]);
}

}  // namespace capsroute::cuda
