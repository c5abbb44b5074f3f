// Compiled once for each instruction set: CAPSROUTE_ISA names it, CAPSROUTE_VECTOR_BYTES is its width. One that only
// adds instructions for bfloat16 leaves all else to the set CAPSROUTE_ELSE; and what vectors of half the width do
// faster is left to the set CAPSROUTE_HALF.
#include "backward.h"

#ifdef CAPSROUTE_ELSE
namespace capsroute::CAPSROUTE_ELSE {
extern const Kernels kernels;
}
#endif
#ifdef CAPSROUTE_HALF
namespace capsroute::CAPSROUTE_HALF {
extern const Kernels kernels;
}
#endif

namespace capsroute::CAPSROUTE_ISA {
namespace {

// Calls visit(x) with a value of the storage type that a dtype stands for.
template <class Visit>
auto with_dtype(DType dtype, const Visit& visit) {
  if (dtype == DType::bfloat16) return visit(BFloat16());
#ifndef CAPSROUTE_ELSE
  if (dtype == DType::float64) return visit(double());
  if (dtype == DType::float16) return visit(Half());
  if (dtype == DType::float32) return visit(float());
#endif
  __builtin_unreachable();
}

// The kernels for a problem, if they are not these.
const Kernels* other_kernels([[maybe_unused]] const Problem& p) {
#ifdef CAPSROUTE_ELSE
  if (p.u.dtype != DType::bfloat16) return &CAPSROUTE_ELSE::kernels;
#endif
#ifdef CAPSROUTE_HALF
  if (with_dtype(p.u.dtype, [&](auto x) { return half_vectors<decltype(x)>(p); })) return &CAPSROUTE_HALF::kernels;
#endif
  return nullptr;
}

// Over a null base a stream is only planned.
template <template <class> class StreamOf, class Out>
Plan run(const Problem& p, const Out& out, void* scratch, const Parallel& parallel) {
  return with_dtype(p.u.dtype, [&](auto x) {
    using X = decltype(x);
    const Layout<X> layout(p);
    Carver carver{static_cast<char*>(scratch)};
    StreamOf<X> stream(layout, out, carver, parallel);
    if (scratch) stream.run(parallel);
    Plan plan = stream.plan();
    plan.scratch = carver.used, plan.vector_bytes = CAPSROUTE_VECTOR_BYTES;
    return plan;
  });
}

Plan plan_forward(const Problem& p, const Forward& out, int64_t threads) {
  if (const Kernels* other = other_kernels(p)) return other->plan_forward(p, out, threads);
  return run<ForwardStream>(p, out, nullptr, Parallel{threads, nullptr});
}

void forward(const Problem& p, const Forward& out, void* scratch, const Parallel& parallel) {
  if (const Kernels* other = other_kernels(p)) return other->forward(p, out, scratch, parallel);
  run<ForwardStream>(p, out, scratch, parallel);
}

Plan plan_backward(const Problem& p, const Backward& out, int64_t threads) {
  if (const Kernels* other = other_kernels(p)) return other->plan_backward(p, out, threads);
  return run<BackwardStream>(p, out, nullptr, Parallel{threads, nullptr});
}

void backward(const Problem& p, const Backward& out, void* scratch, const Parallel& parallel) {
  if (const Kernels* other = other_kernels(p)) return other->backward(p, out, scratch, parallel);
  run<BackwardStream>(p, out, scratch, parallel);
}

}  // namespace

#define CAPSROUTE_TEXT_(name) #name
#define CAPSROUTE_TEXT(name) CAPSROUTE_TEXT_(name)
#ifdef __aarch64__  // where the baseline has vectors and fma
constexpr const char* kName = "neon";
#else
constexpr const char* kName = CAPSROUTE_TEXT(CAPSROUTE_ISA);
#endif

extern const Kernels kernels;
const Kernels kernels{kName, plan_forward, forward, plan_backward, backward, CAPSROUTE_VECTOR_BYTES};

}  // namespace capsroute::CAPSROUTE_ISA
