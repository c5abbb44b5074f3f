// The ops on CUDA tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tier.h"

namespace {

// Makes u's device current, and finds its current stream.
struct OnCuda {
  explicit OnCuda(const torch::stable::Tensor& u) : guard(u.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(u.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(capsroute, CUDA, m) { capsroute::ops::implement<capsroute::ops::CudaTier<OnCuda>>(m); }
