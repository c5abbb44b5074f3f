// The CUDA kernel tier under the ops: scratch and outputs come from torch's allocator of u's device, work goes to its
// current stream. On says which: a class made from u, alive while the tier launches, with a member `stream`.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../ops.h"
#include "kernels.h"

namespace capsroute::ops {

template <class On>
struct CudaTier {
  static bool writes(Order order) { return order == Order::IDJO; }
  static std::nullptr_t pages_of(const Tensor&) { return nullptr; }
  static Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
  }
  static void forward(const Problem& p, const Forward& out, const Tensor& u) {
    run(p, out, u, cuda::kernels_of(p.u.dtype).forward);
  }
  static void backward(const Problem& p, const Backward& out, const Tensor& u) {
    run(p, out, u, cuda::kernels_of(p.u.dtype).backward);
  }

 private:
  template <class Out>
  static void run(const Problem& p, const Out& out, const Tensor& u,
                  int64_t (*kernel)(const Problem&, const Out&, void* scratch, void* stream)) {
    const int64_t most = cuda::most_features(p.u.dtype);
    const bool shared = p.form == Weight::output || p.form == Weight::single;
    STD_TORCH_CHECK(p.O <= most && (!shared || p.D <= most),
                    "capsroute: the CUDA kernels take O (and D of a shared weight) up to ", most,
                    " in this dtype, got O=", p.O, " and D=", p.D);
    STD_TORCH_CHECK(std::max({p.B, p.I, p.D, p.J}) <= cuda::kMostIndices,
                    "capsroute: the CUDA kernels take B, I, D and J up to ", cuda::kMostIndices, ", got B=", p.B,
                    " I=", p.I, " D=", p.D, " J=", p.J);
    const On on(u);
    const Tensor scratch = empty(u, {kernel(p, out, nullptr, on.stream)}, ScalarType::Byte);
    kernel(p, out, scratch.mutable_data_ptr(), on.stream);
  }
};

}  // namespace capsroute::ops
