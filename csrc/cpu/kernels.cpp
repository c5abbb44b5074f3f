// Compiled once for each instruction set: CAPSROUTE_ISA names it, CAPSROUTE_VECTOR_BYTES is its width.
#include "backward.h"

namespace capsroute::CAPSROUTE_ISA {
namespace {

// Calls visit(x) with a value of the storage type that a dtype stands for.
template <class Visit>
auto with_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::float64: return visit(double());
    case DType::bfloat16: return visit(BFloat16());
    case DType::float16: return visit(Half());
    default: return visit(float());
  }
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
    plan.scratch = carver.used;
    return plan;
  });
}

template <template <class> class StreamOf, class Out>
Plan plan(const Problem& p, const Out& out, int64_t threads) {
  return run<StreamOf>(p, out, nullptr, Parallel{threads, nullptr});
}

void forward(const Problem& p, const Forward& out, void* scratch, const Parallel& parallel) {
  run<ForwardStream>(p, out, scratch, parallel);
}

void backward(const Problem& p, const Backward& out, void* scratch, const Parallel& parallel) {
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
const Kernels kernels{kName, plan<ForwardStream, Forward>, forward, plan<BackwardStream, Backward>, backward};

}  // namespace capsroute::CAPSROUTE_ISA
