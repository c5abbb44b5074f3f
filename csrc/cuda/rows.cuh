// The rows of a stream: for each lane (a sample) and warp (a slice of an output capsule) the row of kInputs input
// capsules, in registers. The weight and u of the next stage are on their way while this one is used.
#pragma once

#include "plan.cuh"

namespace capsroute::cuda {

// What a block works on, and what this thread does in it.
struct Place {
  int lane, warp, warps;
  int tile, b;
  int first_output;  // of the group
  int units;         // slices of the group
  int j, slice;
  bool active;  // the other warps only help to stage

  CAPSROUTE_DEVICE Place(const Problem& p, const Layout& layout, const Split& split, int tile, int group)
      : lane(thread_index() % kLanes), warp(thread_index() / kLanes), warps(thread_count() / kLanes) {
    const int slices = int(layout.row_slices);
    first_output = group * int(split.outputs);
    units = int(minimum(split.outputs, p.J - first_output)) * slices;
    slice = warp % slices;
    j = first_output + warp / slices;
    active = CAPSROUTE_WITHIN(warp, units);
    at_tile(tile);
  }

  CAPSROUTE_DEVICE void at_tile(int t) { tile = t, b = t * kLanes + lane; }

  CAPSROUTE_DEVICE int leader() const { return warp - slice; }  // the warp that has slice 0 of this j

  // Where this slice's features begin in a state of `padded` features.
  template <int K>
  CAPSROUTE_DEVICE int64_t column(const Problem& p, int64_t padded) const {
    return (tile * p.J + j) * padded + slice * K;
  }
};

template <class X, Source source>
class Rows {
 public:
  using A = Acc<X>;
  static constexpr int K = kFeatures<A>, N = kInputs, kDepth = cuda::kDepth<A>;

  // Bytes of shared memory where a block has at most `units` slices: two stages.
  CAPSROUTE_ANYWHERE static constexpr int64_t shared_bytes(int64_t units) {
    return source == Source::given ? 0 : 2 * (weight_bytes(units) + kInputBytes);
  }

  CAPSROUTE_DEVICE Rows(const Problem& p, const Layout& layout, const Split& split, const X* weight, const Place& place,
                        int last, char* memory)
      : p_(p), layout_(layout), split_(split), weight_(weight), place_(place), last_(last), memory_(memory) {}

  // Stages the first features of input capsule i for make(); the block meets.
  CAPSROUTE_DEVICE void begin(int i) {
    if constexpr (source == Source::given) return;
    fetch(i, 0);
    deposit();
    wait_copies();
    CAPSROUTE_SYNC();
    flip();
  }

  // The rows h of input capsules i .. i + N - 1, and the way for those from `next` on: their first stage is there
  // once every thread has called wait_copies() and the block has met.
  CAPSROUTE_DEVICE void make(A (&h)[N][K], int i, int next) {
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) clear(h[n]);
    if constexpr (source == Source::given) {
      read(h, i);
    } else {
      for (int d0 = 0; d0 < p_.D; d0 += kDepth) {
        const bool more = d0 + kDepth < p_.D, fetches = more || next < last_;
        if (fetches) fetch(more ? i : next, more ? d0 + kDepth : 0);
        add_stage(h, i, d0);
        if (fetches) deposit();
        if (more) {
          wait_copies();
          CAPSROUTE_SYNC();
        }
        if (fetches) flip();
      }
    }
  }

  // Sends for the weight, and reads u, at features d0 .. d0 + kDepth - 1 of input capsules i .. i + N - 1.
  CAPSROUTE_DEVICE void fetch(int i, int d0) {
    if constexpr (source == Source::made) {
      const int width = place_.units * K;
      CAPSROUTE_ROLL
      for (int r = place_.warp; r < N * kDepth; r += place_.warps) {
        const int at = i + r / kDepth, d = d0 + r % kDepth;
        if (!CAPSROUTE_WITHIN(at, last_) || !CAPSROUTE_WITHIN(d, p_.D)) continue;
        const X* from = weight_ + ((at * p_.D + d) * p_.J + place_.first_output) * layout_.row_padded;
        X* to = weights(used_ ^ 1, r);
        CAPSROUTE_ROLL
        for (int x = place_.lane * kVector; CAPSROUTE_WITHIN(x, width); x += kLanes * kVector)
          copy_quad(to + x, from + x);
      }
    }
    CAPSROUTE_UNROLL
    for (int q = 0; q < kHeld; ++q) {
      const int e = thread_index() + q * thread_count(), n = e / (kDepth * kLanes);
      const int d = d0 + e % kDepth, b = place_.tile * kLanes + e / kDepth % kLanes;
      const bool needed = n < N && CAPSROUTE_WITHIN(i + n, last_) && CAPSROUTE_WITHIN(d, p_.D);
      const int64_t* stride = p_.u.stride;
      held_[q] = X{};
      if (needed && takes_part(p_, b, i + n))
        held_[q] = load(static_cast<const X*>(p_.u.data) + b * stride[0] + (i + n) * stride[1] + d * stride[2]);
    }
  }

  // What fetch() read goes to shared memory: the loads were on their way meanwhile.
  CAPSROUTE_DEVICE void deposit() {
    CAPSROUTE_UNROLL
    for (int q = 0; q < kHeld; ++q) {
      const int e = thread_index() + q * thread_count(), row = e / (kDepth * kLanes) * kDepth + e % kDepth;
      if (row < N * kDepth) inputs(used_ ^ 1, row)[e / kDepth % kLanes] = to_acc(held_[q]);
    }
  }

  CAPSROUTE_DEVICE void flip() { used_ ^= 1; }

  // u of the used stage at feature d0 + d of input capsule i + n, for all lanes; and this warp's slice of W there.
  CAPSROUTE_DEVICE const A* input(int n, int d) const { return inputs(used_, n * kDepth + d); }
  CAPSROUTE_DEVICE void weight(A (&w)[K], int n, int d) const {
    unpack(w, weights(used_, n * kDepth + d) + place_.warp * K);
  }

 private:
  static constexpr int kVector = 16 / int(sizeof(X));
  static constexpr int kHeld = N * kDepth / kMinWarps;
  static constexpr int kInputBytes = N * kDepth * kPitch * int(sizeof(A));

  CAPSROUTE_ANYWHERE static constexpr int weight_bytes(int64_t units) {
    return source == Source::made ? int(units) * N * kDepth * K * int(sizeof(X)) : 0;
  }
  CAPSROUTE_DEVICE char* stage(int index) const { return memory_ + index * (weight_bytes(split_.units) + kInputBytes); }
  CAPSROUTE_DEVICE A* inputs(int index, int row) const { return reinterpret_cast<A*>(stage(index)) + row * kPitch; }
  CAPSROUTE_DEVICE X* weights(int index, int row) const {
    return reinterpret_cast<X*>(stage(index) + kInputBytes) + row * split_.units * K;
  }

  CAPSROUTE_DEVICE static void unpack(A (&w)[K], const X* from) {
    CAPSROUTE_UNROLL
    for (int k = 0; k < K; k += kVector) widen(&w[k], shared_quad(from + k));
  }
  CAPSROUTE_DEVICE static void widen(A* to, const Quad& quad) {
    X x[kVector];
    memcpy(x, &quad, sizeof(quad));
    CAPSROUTE_UNROLL
    for (int v = 0; v < kVector; ++v) to[v] = to_acc(x[v]);
  }

  // made: h_n += sum over the stage's d of W_d u_d;  keys: h_n's own features among the stage's
  CAPSROUTE_DEVICE void add_stage(A (&h)[N][K], int i, int d0) {
    if (!place_.active) return;
    const int depth = int(minimum(kDepth, p_.D - d0));
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      if (i + n >= last_) continue;
      if constexpr (source == Source::made) {
        CAPSROUTE_ROLL
        for (int d = 0; d < depth; ++d) {
          const A x = input(n, d)[place_.lane];
          A w[K];
          weight(w, n, d);
          CAPSROUTE_UNROLL
          for (int k = 0; k < K; ++k) h[n][k] += w[k] * x;
        }
      } else {
        const int first = place_.slice * K - d0;
        CAPSROUTE_UNROLL
        for (int k = 0; k < K; ++k)
          if (first + k >= 0 && CAPSROUTE_WITHIN(first + k, depth)) h[n][k] = input(n, first + k)[place_.lane];
      }
    }
  }

  CAPSROUTE_DEVICE void read(A (&h)[N][K], int i) {
    const int64_t* stride = p_.u.stride;
    const int count = int(p_.O) - place_.slice * K;
    CAPSROUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      if (!place_.active || !CAPSROUTE_WITHIN(i + n, last_) || !takes_part(p_, place_.b, i + n)) continue;
      const X* from = static_cast<const X*>(p_.u.data) + place_.b * stride[0] + (i + n) * stride[1] +
                      place_.j * stride[2] + place_.slice * K * stride[3];
      if (layout_.quads) {
        CAPSROUTE_UNROLL
        for (int k = 0; k < K; k += kVector) widen(&h[n][k], load_quad(from + k));
      } else {
        CAPSROUTE_UNROLL
        for (int k = 0; k < K; ++k, from += stride[3])
          if (CAPSROUTE_WITHIN(k, count)) h[n][k] = to_acc(load(from));
      }
    }
  }

  const Problem& p_;
  const Layout& layout_;
  const Split& split_;
  const X* weight_;  // [I, D, J, O padded]
  const Place& place_;
  int last_;
  char* memory_;
  int used_ = 1;  // of the two stages, the one that is read
  X held_[kHeld];
};

}  // namespace capsroute::cuda
