// The same ops on CPU tensors by the emulated kernels, as torch.ops.capsroute_emulated, and C functions that say how
// they run and what they counted.
#include "../cuda/tier.h"
#include "emulation.h"

namespace {

struct Emulated {
  explicit Emulated(const torch::stable::Tensor&) {}
  void* stream = nullptr;
};

std::string text;  // what was returned last

const char* keep(std::string what) {
  text = std::move(what);
  return text.c_str();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(capsroute_emulated, CPU, m) {
  capsroute::ops::implement<capsroute::ops::CudaTier<Emulated>>(m);
}

#define CAPSROUTE_EXPORT extern "C" __attribute__((visibility("default")))

CAPSROUTE_EXPORT void capsroute_emulation_set_order(int order) {
  capsroute::emulation::set_order(capsroute::emulation::Order(order));
}
CAPSROUTE_EXPORT const char* capsroute_emulation_take_launches() { return keep(capsroute::emulation::take_launches()); }
