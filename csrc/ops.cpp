// The ops on the CPU: torch's threads, and scratch.
#include "ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>

namespace capsroute::ops {
namespace {

Parallel torch_threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t parts, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, parts, 1, [body, context](int64_t begin, int64_t end) {
              for (int64_t part = begin; part < end; ++part) body(context, part);
            });
          }};
}

// More bytes than kNewMemory the C library takes from the system anew in every call (glibc keeps none so large). New
// memory costs a page fault for every 4 KiB, and reading much of it a walk through the tables of pages,
// unless the system is asked for pages of 2 MiB. Not for more than kMostLarge: a virtual machine that reports free
// large pages to its host, and so loses them, pays up to 5 ms for each when it needs many again.
constexpr int64_t kNewMemory = int64_t(32) << 20, kMostLarge = int64_t(64) << 20;
constexpr int64_t kPage = int64_t(4) << 10, kLargePage = int64_t(2) << 20;

void ask_for_large_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(start), first = (begin + kLargePage - 1) / kLargePage;
  const uintptr_t end = (begin + uintptr_t(bytes < kMostLarge ? bytes : kMostLarge)) / kLargePage;
  madvise(reinterpret_cast<void*>(first * kLargePage), (end - first) * kLargePage, MADV_HUGEPAGE);  // it may refuse
#endif
}

// Asks for the pages that begin in a part all at once: that takes a third less than their faults one by one.
void ask_for_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, of Linux 5.14 and glibc 2.35; an older system refuses
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes) + kPage - 1) / kPage;
  madvise(reinterpret_cast<void*>(first * kPage), (end - first) * kPage, kPopulateWrite);
#endif
}

// Whether memory comes from the system anew: another C library may have kept it.
bool is_new([[maybe_unused]] void* start, int64_t bytes) {
  if (bytes <= kNewMemory) return false;
  unsigned char is_there = 0;
#if defined(__linux__)
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes) - 1) / kPage;
  mincore(reinterpret_cast<void*>(last * kPage), 1, &is_there);
#endif
  return !(is_there & 1);
}

// Scratch is kept by the calling thread for its next call: fresh memory would cost a page fault for
// every 4 KiB. More than kKeptScratch is given back at once; the backward of 1000 output capsules of 16 features takes
// up to 80 MiB.
constexpr int64_t kLine = 64, kKeptScratch = int64_t(96) << 20;

struct Scratch {
  void* start = nullptr;
  int64_t bytes = 0;

  void* reserve(int64_t wanted) {
    if (wanted > bytes) {
      release();
      const int64_t unit = wanted < 2 * kLargePage ? kLine : kLargePage, whole = (wanted + unit - 1) / unit * unit;
      start = std::aligned_alloc(unit, whole);
      STD_TORCH_CHECK(start, "capsroute: no memory for ", whole, " bytes of scratch");
      bytes = whole;
      if (unit == kLargePage) ask_for_large_pages(start, bytes);
    }
    return start;
  }
  void release() {
    std::free(start);
    start = nullptr, bytes = 0;
  }
  ~Scratch() { release(); }
};

thread_local Scratch scratch;

class Cpu {
 public:
  static bool writes(Order) { return true; }
  static Tensor empty(const Tensor&, const std::vector<int64_t>& shape, ScalarType dtype) {
    // torch::stable::empty asks the dispatcher, which takes several times as long as this.
    int64_t strides[5], stride = 1;
    for (int64_t d = int64_t(shape.size()) - 1; d >= 0; --d) strides[d] = stride, stride *= shape[d] > 1 ? shape[d] : 1;
    AtenTensorHandle handle = nullptr;
    const auto failed = aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides, int32_t(dtype),
                                                 aoti_torch_device_type_cpu(), 0, &handle);
    STD_TORCH_CHECK(!failed, "capsroute: no memory for a result of ", stride, " numbers");
    Tensor tensor(handle);
    void* start = tensor.mutable_data_ptr();
    if (is_new(start, bytes(tensor))) ask_for_large_pages(start, bytes(tensor));
    return tensor;
  }
  static void forward(const Problem& p, const Forward& out, const Tensor&) {
    launch(p, out, kernels().plan_forward, kernels().forward);
  }
  static void backward(const Problem& p, const Backward& out, const Tensor&) {
    launch(p, out, kernels().plan_backward, kernels().backward);
  }
  static auto pages_of(const Tensor& x) {
    return x.numel() && is_new(x.mutable_data_ptr(), bytes(x)) ? ask_for_pages : nullptr;
  }

 private:
  template <class Out>
  static void launch(const Problem& p, const Out& out, Plan (*plan)(const Problem&, const Out&, int64_t),
                     void (*run)(const Problem&, const Out&, void*, const Parallel&)) {
    const Parallel parallel = torch_threads();
    run(p, out, scratch.reserve(plan(p, out, parallel.threads).scratch), parallel);
    if (scratch.bytes > kKeptScratch) scratch.release();
  }
};

// How a call would be computed, as "name=number" with spaces between; a backward that wants du and dW.
std::string plan(const Tensor& u, const Optional& weight, const Optional& bias, const Optional& logits,
                 const Optional& mask, int64_t iterations, bool over_inputs, bool leaky, double eps, int64_t room,
                 bool backward) {
  Problem p = route_of(u, weight, bias, logits, mask, iterations, over_inputs, leaky, eps);
  const int64_t threads = torch_threads().threads;
  Forward forward{};
  forward.v = &p, forward.room = room * (p.u.dtype == DType::float64 ? 8 : 4);
  Backward gradients{};
  if (p.form == Weight::pair) gradients.order = order_of(p).value_or(Order::IDJO);
  gradients.u = &p, gradients.weight = weight ? &p : nullptr, gradients.room = forward.room;
  const Plan found =
      backward ? kernels().plan_backward(p, gradients, threads) : kernels().plan_forward(p, forward, threads);
  const std::pair<const char*, int64_t> numbers[] = {{"scratch", found.scratch},
                                                     {"half_vectors", found.vector_bytes < kernels().vector_bytes},
                                                     {"kept_inputs", found.kept_inputs},
                                                     {"tile", found.tile},
                                                     {"tiles", found.tiles},
                                                     {"groups", found.groups},
                                                     {"by_group", found.by_group},
                                                     {"chunk", found.chunk},
                                                     {"keeps_pairs", found.keeps_pairs},
                                                     {"few_inputs", found.few_inputs},
                                                     {"product_first", found.product_first},
                                                     {"handed", found.handed},
                                                     {"by_samples", found.by_samples},
                                                     {"copied", found.copied},
                                                     {"as_read", found.as_read},
                                                     {"threads", threads}};
  std::string text;
  for (const auto& [name, number] : numbers)
    text += std::string(text.empty() ? "" : " ") + name + "=" + std::to_string(number);
  return text;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace
}  // namespace capsroute::ops

STABLE_TORCH_LIBRARY_FRAGMENT(capsroute, m) {
#include "schemas.inc"  // of capsroute/schemas.txt
  m.def(
      "plan(Tensor u, Tensor? weight, Tensor? bias, Tensor? logits, Tensor? mask, int iterations, bool over_inputs, "
      "bool leaky, float eps, int room, bool backward) -> str");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(capsroute, CPU, m) {
  capsroute::ops::implement<capsroute::ops::Cpu>(m);
  m.impl("plan", TORCH_BOX(&capsroute::ops::plan));
}

STABLE_TORCH_LIBRARY_IMPL(capsroute, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&capsroute::ops::cpu_capability));
}
