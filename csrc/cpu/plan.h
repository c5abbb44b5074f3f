// What a call needs before any arithmetic: padded sizes, memory, and who does what.
#pragma once

#include "vec.h"

namespace capsroute::CAPSROUTE_ISA {

// Sums over i are added in groups of this many input capsules, then group by group: the same bits
// whether one thread runs over all of i or many share it. A multiple of every L.
constexpr int64_t kGroup = 64;

CAPSROUTE_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
CAPSROUTE_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
CAPSROUTE_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class A>
CAPSROUTE_INLINE int64_t pad(int64_t n) {
  return divide_up(n, L<A>) * L<A>;
}

// Hands out parts of one buffer. Run over a null base, it measures how large the buffer must be.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class A>
  A* take(int64_t count) {
    A* part = base ? reinterpret_cast<A*>(base + used) : nullptr;
    used += divide_up(count * int64_t(sizeof(A)), 64) * 64;
    return part;
  }
};

// Equal shares of one buffer, one for each thread.
struct Shares {
  char* start = nullptr;
  int64_t size = 0;
  Carver at(int64_t index) const { return {start + index * size}; }
};

// `count` shares, each of the size that carve(carver) takes.
template <class Carve>
Shares take_shares(Carver& carver, int64_t count, const Carve& carve) {
  Carver one{nullptr};
  carve(one);
  return {carver.take<char>(count * one.used), one.used};
}

// Sizes of a problem, with feature axes padded to whole vectors. A row is what one pass streams:
// the votes h_ij with O features or, where the weight is shared, u_i itself with D features, for
//   h_ij . V_j = u_i . (W_j^T V_j)   and   s_j = W_j (sum over i of c_ij u_i).
template <class X>
struct Layout {
  using A = Acc<X>;
  explicit Layout(const Problem& problem)
      : p(problem),
        shared(p.form == Weight::output || p.form == Weight::single),
        weights(p.form == Weight::output ? p.J : 1),
        O(pad<A>(p.O)),
        features(shared ? p.D : p.O),
        F(pad<A>(features)),
        column(shared ? 0 : F),
        row(odd_lines(shared ? F : p.J * F)),
        groups(maximum(1, divide_up(p.I, kGroup))),
        blocks(divide_up(p.I, L<A>)) {}

  const Problem& p;
  bool shared;
  int64_t weights;   // how many matrices a shared weight holds
  int64_t O;         // padded
  int64_t features;  // of a row
  int64_t F;         // padded
  int64_t column;    // from one j to the next in a staged row
  int64_t row;       // from one i to the next in a staged block
  int64_t groups, blocks;

  int64_t outputs() const { return p.J * O; }  // elements of V or s of one sample
  int64_t sums() const { return p.J * F; }     // elements of a sum over i of rows
  int64_t block_size() const { return L<A> * row; }
  int64_t lanes() const { return p.J * L<A>; }  // elements of a block's logits or coupling

 private:
  // Rows a multiple of 1 KiB apart would fall into few sets of the first-level cache.
  static int64_t odd_lines(int64_t count) {
    return count * int64_t(sizeof(A)) % 1024 == 0 ? count + 64 / int64_t(sizeof(A)) : count;
  }
};

// body(item, part) for every item; a part is one thread's share and indexes its scratch.
template <class Body>
void parallel_for(const Parallel& parallel, int64_t items, const Body& body) {
  struct Context {
    int64_t items, parts;
    const Body* body;
  } context{items, minimum(items, parallel.threads), &body};
  if (items == 0) return;
  auto run_part = [](void* pointer, int64_t part) {
    const Context& c = *static_cast<Context*>(pointer);
    const int64_t end = c.items * (part + 1) / c.parts;
    for (int64_t item = c.items * part / c.parts; item < end; ++item) (*c.body)(item, part);
  };
  if (context.parts == 1) return run_part(&context, 0);
  parallel.run(context.parts, run_part, &context);
}

struct Tile {
  int64_t first, count;  // samples, of those that are scheduled
  int64_t sample;        // the first one, of the whole batch
  int64_t slot;
  int64_t most;  // samples that a slot has room for
};

// How the samples and input capsules of a call are shared out. A tile is up to `tile` samples that
// read the weight together. With enough tiles a thread takes whole tiles; with few, the groups of
// input capsules of every tile are shared out too, step by step. Both add the same numbers in the
// same order.
struct Schedule {
  Schedule(int64_t batch, int64_t tile, int64_t groups, int64_t threads)
      : batch(batch), tile(tile), groups(groups), tiles(divide_up(batch, tile)) {
    by_group = tiles < threads && groups > 1;
    parts = minimum(threads, by_group ? tiles * groups : tiles);
    slots = by_group ? tiles : parts;
    partials = by_group ? tiles * groups : parts;
  }

  Tile tile_at(int64_t index, int64_t slot) const {
    const int64_t first = index * tile;
    return {first, minimum(tile, batch - first), sample + first, slot, tile};
  }

  // The same shares for a part of the batch that is no larger.
  Schedule of(int64_t first, int64_t count) const {
    Schedule other = *this;
    other.sample = first, other.batch = count, other.tiles = divide_up(count, tile);
    return other;
  }

  int64_t sample = 0;  // the first one, of the whole batch
  int64_t batch, tile, groups, tiles;
  bool by_group;
  int64_t parts;     // threads at work: each has its scratch
  int64_t slots;     // tiles under way at a time: each has its state
  int64_t partials;  // sums over one group that are held at a time
};

// The states of a tile's samples, each of so many numbers.
template <class A>
CAPSROUTE_INLINE A* of_tile(A* states, const Tile& tile, int64_t size) {
  return states + tile.slot * tile.most * size;
}

// Runs a stream's steps over all tiles. A stream has
//   begin(tile), group(tile, step, group, partial, part), fold(tile, step, partial, is_first),
//   finish(tile, step).
// Every other step goes through the groups backwards: what was read last is still in a cache.
template <class Stream>
void run_stream(Stream& stream, const Schedule& schedule, int64_t steps, const Parallel& parallel) {
  const int64_t groups = schedule.groups;
  auto nth_group = [&](int64_t step, int64_t n) { return step % 2 == 0 ? groups - 1 - n : n; };
  if (!schedule.by_group) {
    parallel_for(parallel, schedule.tiles, [&](int64_t index, int64_t part) {
      const Tile tile = schedule.tile_at(index, part);
      stream.begin(tile);
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t n = 0; n < groups; ++n) {
          stream.group(tile, step, nth_group(step, n), part, part);
          stream.fold(tile, step, part, n == 0);
        }
        stream.finish(tile, step);
      }
    });
    return;
  }
  parallel_for(parallel, schedule.tiles, [&](int64_t index, int64_t) { stream.begin(schedule.tile_at(index, index)); });
  for (int64_t step = 0; step < steps; ++step) {
    parallel_for(parallel, schedule.tiles * groups, [&](int64_t item, int64_t part) {
      stream.group(schedule.tile_at(item / groups, item / groups), step, nth_group(step, item % groups), item, part);
    });
    parallel_for(parallel, schedule.tiles, [&](int64_t index, int64_t) {
      const Tile tile = schedule.tile_at(index, index);
      for (int64_t n = 0; n < groups; ++n) stream.fold(tile, step, index * groups + n, n == 0);
      stream.finish(tile, step);
    });
  }
}

}  // namespace capsroute::CAPSROUTE_ISA
