// The ops on the CPU: torch's threads, and scratch.
#include "ops.h"

#include <cstdlib>

namespace capsroute::ops {
namespace {

Parallel torch_threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t parts, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, parts, 1, [body, context](int64_t begin, int64_t end) {
              for (int64_t part = begin; part < end; ++part) body(context, part);
            });
          }};
}

// Scratch is kept by the calling thread for its next call: fresh memory would cost a page fault for
// every 4 KiB. More than kKeptScratch is given back at once.
constexpr int64_t kAlignment = 64, kKeptScratch = int64_t(48) << 20;

struct Scratch {
  void* start = nullptr;
  int64_t bytes = 0;

  void* reserve(int64_t wanted) {
    if (wanted > bytes) {
      release();
      bytes = (wanted + kAlignment - 1) / kAlignment * kAlignment;
      start = std::aligned_alloc(kAlignment, bytes);
      STD_TORCH_CHECK(start, "capsroute: no memory for ", bytes, " bytes of scratch");
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
  static Tensor empty(const Tensor&, const std::vector<int64_t>& shape, ScalarType dtype) {
    // torch::stable::empty asks the dispatcher, which takes several times as long as this.
    int64_t strides[4], stride = 1;
    for (int64_t d = int64_t(shape.size()) - 1; d >= 0; --d) strides[d] = stride, stride *= shape[d] > 1 ? shape[d] : 1;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides, int32_t(dtype),
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
  static void forward(const Problem& p, const Forward& out, const Tensor&) {
    launch(p, out, kernels().forward_scratch, kernels().forward);
  }
  static void backward(const Problem& p, const Backward& out, const Tensor&) {
    launch(p, out, kernels().backward_scratch, kernels().backward);
  }

 private:
  template <class Out>
  static void launch(const Problem& p, const Out& out, int64_t (*measure)(const Problem&, const Out&, int64_t),
                     void (*run)(const Problem&, const Out&, void*, const Parallel&)) {
    const Parallel parallel = torch_threads();
    run(p, out, scratch.reserve(measure(p, out, parallel.threads)), parallel);
    if (scratch.bytes > kKeptScratch) scratch.release();
  }
};

std::string cpu_capability() { return kernels().name; }

}  // namespace
}  // namespace capsroute::ops

STABLE_TORCH_LIBRARY_IMPL(capsroute, CPU, m) { capsroute::ops::implement<capsroute::ops::Cpu>(m); }

STABLE_TORCH_LIBRARY_IMPL(capsroute, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&capsroute::ops::cpu_capability));
}
