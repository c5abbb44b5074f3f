// The CUDA kernel tier's whole interface: raw device pointers in the Problem, Forward and Backward that the CPU tier
// takes too, work queued on a stream. It knows no Tensor and allocates nothing.
#pragma once

#include "../cpu/routing.h"

namespace capsroute::cuda {

// One table for each storage type. Over null scratch a call launches nothing; each returns the bytes of scratch that
// it needs, aligned to 256. A CUDA error is a std::runtime_error that names the kernel and the shape.
struct Kernels {
  int64_t (*forward)(const Problem&, const Forward&, void* scratch, void* stream);
  int64_t (*backward)(const Problem&, const Backward&, void* scratch, void* stream);
};
extern const Kernels kernels_float32, kernels_float64, kernels_bfloat16, kernels_float16;

inline const Kernels& kernels_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return kernels_float64;
    case DType::bfloat16: return kernels_bfloat16;
    case DType::float16: return kernels_float16;
    default: return kernels_float32;
  }
}

// Of B, I, D and J, at most: counters of single dimensions are 32 bits wide, offsets 64.
constexpr int64_t kMostIndices = int64_t(1) << 30;

// Features of a row (O, or D of a shared weight) and of an output capsule, at most. capsroute/_backends.py says so too.
constexpr int64_t most_features(DType dtype) { return dtype == DType::float64 ? 64 : 128; }

}  // namespace capsroute::cuda
