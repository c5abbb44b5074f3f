// The forward: R times a pass and what follows it, each a launch; of small problems all in one.
#pragma once

#include "reduce.cuh"

namespace capsroute::cuda {

template <class X, Source source, Direction direction, bool over_inputs>
CAPSROUTE_KERNEL(most_warps<Acc<X>>(direction) * kLanes)
pass_kernel(CAPSROUTE_ARGUMENT Pass<X> a) {
  CAPSROUTE_SHARED(memory);
  const int block = block_index(), tiles = int(a.layout.tiles), chunks = int(a.split.chunks);
  pass<X, source, direction, over_inputs>(a, a.query, true, block % tiles, block / tiles % chunks,
                                          block / tiles / chunks, memory);
}

constexpr int kElementThreads = 256, kCapsuleThreads = 256;

// A thread has an element.
template <class Arguments, void (*body)(const Arguments&)>
CAPSROUTE_KERNEL(kElementThreads)
element_kernel(CAPSROUTE_ARGUMENT Arguments a) {
  body(a);
}

// A block has a tile and an output capsule.
template <class Arguments, void (*body)(const Arguments&, int64_t tile, int64_t j, char* memory)>
CAPSROUTE_KERNEL(kCapsuleThreads)
capsule_kernel(CAPSROUTE_ARGUMENT Arguments a) {
  CAPSROUTE_SHARED(memory);
  body(a, block_index() % a.layout.tiles, block_index() / a.layout.tiles, memory);
}

// A block has whatever its index says.
template <int threads, class Arguments, void (*body)(const Arguments&, char* memory)>
CAPSROUTE_KERNEL(threads)
block_kernel(CAPSROUTE_ARGUMENT Arguments a) {
  CAPSROUTE_SHARED(memory);
  body(a, memory);
}

// All passes of a tile, where a block has all of i and of j and the softmax runs over j.
template <class X>
struct Route {
  Pass<X> pass;
  Finish<X> finish;
};

template <class X, Source source>
CAPSROUTE_KERNEL(most_warps<Acc<X>>(Direction::forward) * kLanes)
route_kernel(CAPSROUTE_ARGUMENT Route<X> a) {
  CAPSROUTE_SHARED(memory);
  const int tile = block_index();
  const Problem& p = a.pass.p;
  for (int64_t j = 0; j < p.J && p.query.data; ++j) {
    begin(a.finish, tile, j, memory);
    CAPSROUTE_SYNC();
  }
  for (int64_t k = 0; k < p.R; ++k) {
    const Acc<X>* query = k == 0 && !p.query.data ? nullptr : a.pass.query;
    pass<X, source, Direction::forward, false>(a.pass, query, k == p.R - 1, tile, 0, 0, memory);
    CAPSROUTE_SYNC();
    for (int64_t j = 0; j < p.J; ++j) {
      finish_pass(a.finish, k, tile, j, memory);
      CAPSROUTE_SYNC();
    }
  }
}

// Calls visit(constant) with the Source as a type.
template <class Visit>
void with_source(Source source, const Visit& visit) {
  switch (source) {
    case Source::made: return visit(std::integral_constant<Source, Source::made>());
    case Source::keys: return visit(std::integral_constant<Source, Source::keys>());
    case Source::given: return visit(std::integral_constant<Source, Source::given>());
  }
}

// Where a call launches: what the launches of the forward and of the backward share.
template <class X>
struct Launcher {
  using A = Acc<X>;
  const Problem& p;
  Layout layout;
  Stream stream;
  const X* weight = nullptr;  // [I, D, J, O padded]

  Launcher(const Problem& problem, void* stream)
      : p(problem), layout(layout_of<X>(problem)), stream(static_cast<Stream>(stream)) {}

  template <class Arguments>
  void run(const char* name, void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared,
           const Arguments& arguments) const {
    launch(name, kernel, blocks, threads, shared, stream, shape_text(p), arguments);
  }

  template <auto body, class Arguments>
  void for_elements(const char* name, int64_t count, const Arguments& arguments) const {
    run(name, element_kernel<Arguments, body>, divide_up(count, kElementThreads), kElementThreads, 0, arguments);
  }

  template <auto body, class Arguments>
  void for_capsules(const char* name, const Arguments& arguments) const {
    run(name, capsule_kernel<Arguments, body>, layout.tiles * p.J, kCapsuleThreads, finish_shared_bytes<X>(layout),
        arguments);
  }

  // `shared` numbers of shared memory.
  template <int threads, auto body, class Arguments>
  void for_blocks(const char* name, int64_t blocks, int64_t shared, const Arguments& arguments) const {
    run(name, block_kernel<threads, Arguments, body>, blocks, threads, shared * int64_t(sizeof(A)), arguments);
  }

  int threads(const Split& split) const { return int(maximum(kMinWarps, split.units)) * kLanes; }

  // A weight [I, J, O, D] is read in place if it lies as [I, D, J, O] in whole slices, else copied.
  void pack_weight(Carver& carver) {
    if (p.form != Weight::pair) return;
    const int64_t *stride = p.weight.stride, D = p.D, J = p.J, O = p.O;
    weight = static_cast<const X*>(p.weight.data);
    const bool in_place = O == layout.row_padded && stride[2] == 1 && (stride[1] == O || J == 1) &&
                          (stride[3] == J * O || D == 1) && (stride[0] == D * J * O || p.I == 1) &&
                          reinterpret_cast<uintptr_t>(weight) % 16 == 0;
    if (in_place) return;
    const int64_t count = p.I * D * J * layout.row_padded;
    X* packed = carver.take<X>(count);
    weight = packed;
    if (packed) for_elements<pack<X>>("pack", count, Pack<X>{p, layout, packed});
  }

  // A pass over all of i; where there are groups of j, first their statistics, unless they are known.
  template <Direction direction>
  void run_pass(Pass<X> a, A* group_statistics) const {
    with_source(source_of(p), [&](auto constant) {
      constexpr Source source = decltype(constant)::value;
      static_assert(pass_shared_bytes<X, source, direction>(most_warps<A>(direction)) <= kMostShared);
      const int64_t blocks = layout.tiles * a.split.chunks * a.split.groups;
      const int64_t shared = pass_shared_bytes<X, source, direction>(a.split.units);
      auto pass = [&](const char* name, const Pass<X>& arguments) {
        auto kernel =
            p.over_inputs ? pass_kernel<X, source, direction, true> : pass_kernel<X, source, direction, false>;
        run(name, kernel, blocks, threads(a.split), shared, arguments);
      };
      if (group_statistics) {
        Pass<X> first = a;
        first.partial = nullptr, first.coupling = nullptr, first.logits = nullptr;
        first.group_statistics = group_statistics;
        pass("statistics", first);
        for_elements<merge<X>>("merge", layout.tiles * p.I * kLanes,
                               Merge<X>{p, layout.tiles, a.split.groups, direction == Direction::backward,
                                        group_statistics, a.statistics});
      }
      if (a.split.groups == 1 || p.over_inputs || a.partial) pass("pass", a);
    });
  }

  int64_t statistics_size() const { return layout.tiles * (p.over_inputs ? p.J : p.I) * kStatistics * kLanes; }
};

// All passes in one launch.
template <class X>
void run_route(const Launcher<X>& launcher, const Pass<X>& pass, const Finish<X>& finish) {
  with_source(source_of(pass.p), [&](auto constant) {
    constexpr Source source = decltype(constant)::value;
    const int64_t shared = maximum(pass_shared_bytes<X, source, Direction::forward>(pass.split.units),
                                   finish_shared_bytes<X>(launcher.layout));
    launcher.run("route", route_kernel<X, source>, launcher.layout.tiles, launcher.threads(pass.split), shared,
                 Route<X>{pass, finish});
  });
}

// Each pass, and what follows it, in launches of their own. The last leaves logits and coupling, where they are wanted.
template <class X>
void run_passes(const Launcher<X>& launcher, const Pass<X>& last, Finish<X> finish, Acc<X>* group_statistics) {
  const Problem& p = last.p;
  if (p.query.data) launcher.template for_capsules<begin<X>>("begin", finish);
  for (int64_t k = 0; k < p.R; ++k) {
    Pass<X> pass = last;
    pass.query = k == 0 && !p.query.data ? nullptr : finish.query;
    if (k < p.R - 1) pass.coupling = nullptr, pass.logits = nullptr;
    launcher.template run_pass<Direction::forward>(pass, group_statistics);
    finish.pass = k;
    launcher.template for_capsules<cuda::finish<X>>("finish", finish);
  }
}

template <class X>
int64_t forward(const Problem& p, const Forward& out, void* scratch, void* stream) {
  using A = Acc<X>;
  Launcher<X> launcher(p, stream);
  const Layout& layout = launcher.layout;
  Carver carver{static_cast<char*>(scratch)};
  launcher.pack_weight(carver);

  const Split split =
      Split::of(p, layout.row_slices, most_warps<A>(Direction::forward), 1, p.I <= kOneLaunch ? 1 : kChunks);
  Pass<X> pass{p, layout, split, launcher.weight};
  Finish<X> finish{p, layout, split.chunks};
  finish.partial = pass.partial = carver.take<A>(split.chunks * layout.row_state(p));
  finish.V = carver.take<A>(layout.out_state(p));
  finish.query = source_of(p) == Source::keys ? carver.take<A>(layout.row_state(p)) : finish.V;
  finish.s = static_cast<A*>(out.s), finish.v = static_cast<X*>(out.v), finish.norm = static_cast<A*>(out.norm);
  finish.saved = out.saved;
  A *statistics = nullptr, *group_statistics = nullptr;
  if (split.groups > 1 || p.over_inputs) statistics = carver.take<A>(launcher.statistics_size());
  if (p.over_inputs) {
    finish.chunk_statistics = pass.chunk_statistics = carver.take<A>(split.chunks * launcher.statistics_size());
    finish.statistics = statistics;
  } else if (split.groups > 1) {
    group_statistics = carver.take<A>(split.groups * launcher.statistics_size());
    pass.statistics = statistics;
  }
  if (!scratch) return carver.used;

  X* coupling = static_cast<X*>(out.coupling);
  pass.logits = static_cast<A*>(out.logits), pass.coupling = p.over_inputs ? nullptr : coupling;
  if (split.groups == 1 && split.chunks == 1 && !p.over_inputs) {
    pass.query = finish.query;
    run_route(launcher, pass, finish);
  } else {
    run_passes(launcher, pass, finish, group_statistics);
  }
  if (coupling && p.over_inputs) {  // it is known only now; V is still that of the last pass
    pass.query = p.R == 1 && !p.query.data ? nullptr : finish.query;
    pass.statistics = statistics, pass.partial = nullptr, pass.coupling = coupling, pass.logits = nullptr;
    launcher.template run_pass<Direction::forward>(pass, nullptr);
  }
  return carver.used;
}

}  // namespace capsroute::cuda
