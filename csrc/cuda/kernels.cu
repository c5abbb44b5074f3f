// Compiled once for each storage type: CAPSROUTE_STORAGE, and the name of its dtype, CAPSROUTE_DTYPE.
#include "backward.cuh"
#include "kernels.h"

#define CAPSROUTE_JOIN_(a, b) a##b
#define CAPSROUTE_JOIN(a, b) CAPSROUTE_JOIN_(a, b)

namespace capsroute::cuda {

static_assert(most_features(DType::CAPSROUTE_DTYPE) == kMaxSlices * kFeatures<Acc<CAPSROUTE_STORAGE>>);

const Kernels CAPSROUTE_JOIN(kernels_, CAPSROUTE_DTYPE) = {forward<CAPSROUTE_STORAGE>, backward<CAPSROUTE_STORAGE>};

}  // namespace capsroute::cuda
