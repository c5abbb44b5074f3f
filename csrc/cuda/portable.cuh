// The one place where nvcc and the emulation differ: every `#if` on the compiler is here. Under nvcc these are
// CUDA's own words; under g++ the same kernels run on the CPU, a fiber for each thread (csrc/emulation).
#pragma once

#include <cstdint>
#include <cstring>

#include "../cpu/routing.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define CAPSROUTE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define CAPSROUTE_ARGUMENT const __grid_constant__
#define CAPSROUTE_DEVICE __device__ __forceinline__
#define CAPSROUTE_ANYWHERE __host__ __device__ __forceinline__
#define CAPSROUTE_UNROLL _Pragma("unroll")
#define CAPSROUTE_ROLL _Pragma("unroll 1")
// All threads of a block meet. The emulation can leave out any one of these, to see that a test notices.
#define CAPSROUTE_SYNC() __syncthreads()
// index < count. The emulation can loosen any one of these by one. A plain < stands where reading one past is harmless.
#define CAPSROUTE_WITHIN(index, count) ((index) < (count))
// The block's shared memory, whose size the launch gives.
#define CAPSROUTE_SHARED(name) extern __shared__ __align__(16) char name[]
#else
#include "../emulation/emulation.h"

#define CAPSROUTE_KERNEL(threads) void
#define CAPSROUTE_ARGUMENT const
#define CAPSROUTE_DEVICE inline
#define CAPSROUTE_ANYWHERE inline
#define CAPSROUTE_UNROLL
#define CAPSROUTE_ROLL
#define CAPSROUTE_SYNC()                                                            \
  do {                                                                              \
    static const int site = capsroute::emulation::barrier_site(__FILE__, __LINE__); \
    capsroute::emulation::barrier(site);                                            \
  } while (false)
#define CAPSROUTE_WITHIN(index, count)                                                    \
  ([&] {                                                                                  \
    static const int site = capsroute::emulation::bound_site(__FILE__, __LINE__, #index); \
    return (index) < (count) + (capsroute::emulation::loosened(site) ? 1 : 0);            \
  }())
#define CAPSROUTE_SHARED(name) char* name = capsroute::emulation::shared_memory()
#endif

namespace capsroute::cuda {

constexpr int kLanes = 32;
constexpr int64_t kMostShared = 64 * 1024;  // bytes that a block may have on every target: sm_75's

template <class To, class From>
CAPSROUTE_ANYWHERE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

CAPSROUTE_ANYWHERE float to_acc(float x) { return x; }
CAPSROUTE_ANYWHERE double to_acc(double x) { return x; }
CAPSROUTE_ANYWHERE float to_acc(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

template <class X>
CAPSROUTE_ANYWHERE X from_acc(Acc<X> x) {
  return x;
}
template <>
CAPSROUTE_ANYWHERE BFloat16 from_acc<BFloat16>(float x) {  // to the nearest, ties to even; a NaN stays one
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// 16 bytes at once.
struct alignas(16) Quad {
  uint32_t words[4];
};

#ifdef __CUDACC__

CAPSROUTE_DEVICE float to_acc(Half x) { return __half2float(__ushort_as_half(x.bits)); }
template <>
CAPSROUTE_DEVICE Half from_acc<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// x y, rounded before it is added to anything: nvcc makes one fma of a product and a sum, the emulation never.
CAPSROUTE_DEVICE float rounded_product(float x, float y) { return __fmul_rn(x, y); }
CAPSROUTE_DEVICE double rounded_product(double x, double y) { return __dmul_rn(x, y); }

CAPSROUTE_DEVICE int thread_index() { return int(threadIdx.x); }
CAPSROUTE_DEVICE int thread_count() { return int(blockDim.x); }
CAPSROUTE_DEVICE int block_index() { return int(blockIdx.x); }

// Global memory is read and written with these alone, so that the emulation can count bytes.
template <class T>
CAPSROUTE_DEVICE T load(const T* from) {
  return *from;
}
// The same address in all lanes of a warp: read once.
template <class T>
CAPSROUTE_DEVICE T load_uniform(const T* from) {
  return *from;
}
CAPSROUTE_DEVICE Quad load_quad(const void* from) {
  const uint4 x = *static_cast<const uint4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
template <class T>
CAPSROUTE_DEVICE void store(T* to, T x) {
  *to = x;
}
CAPSROUTE_DEVICE Quad shared_quad(const void* from) {
  const uint4 x = *static_cast<const uint4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}

// 16 bytes from global to shared memory, there only after this thread's wait_copies().
CAPSROUTE_DEVICE void copy_quad(void* to, const void* from) { __pipeline_memcpy_async(to, from, 16); }
CAPSROUTE_DEVICE void wait_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* kernel, const std::string& shape) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + " failed for " + shape + ": " +
                             cudaGetErrorString(error));
}

// kernel(arguments) on `blocks` blocks. More than 48 KiB of shared memory must be asked for: always the most, since the
// limit belongs to the kernel and not to a launch, and another thread may launch it with more.
template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared, Stream stream,
            const std::string& shape, const Arguments& arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) check(cudaErrorInvalidConfiguration, name, shape);  // the cast would wrap around
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kMostShared)), name, shape);
  kernel<<<unsigned(blocks), threads, size_t(shared), stream>>>(arguments);
  check(cudaGetLastError(), name, shape);
}

inline void mark_scratch(void*, int64_t) {}

#else

CAPSROUTE_DEVICE float to_acc(Half x) { return float(bits_as<_Float16>(x.bits)); }
template <>
inline Half from_acc<Half>(float x) {
  return {bits_as<uint16_t>(_Float16(x))};
}

template <class A>
A rounded_product(A x, A y) {
  return x * y;
}

using emulation::block_index;
using emulation::copy_quad;
using emulation::launch;
using emulation::mark_scratch;
using emulation::thread_count;
using emulation::thread_index;
using emulation::wait_copies;
using std::exp;
using std::sqrt;

template <class T>
T load(const T* from) {
  emulation::count_load(sizeof(T));
  return *from;
}
template <class T>
T load_uniform(const T* from) {
  if (thread_index() % kLanes == 0) emulation::count_load(sizeof(T));
  return *from;
}
inline Quad load_quad(const void* from) { return load(static_cast<const Quad*>(from)); }
template <class T>
void store(T* to, T x) {
  emulation::count_store(sizeof(T));
  *to = x;
}
inline Quad shared_quad(const void* from) { return *static_cast<const Quad*>(from); }

using Stream = void*;

#endif

}  // namespace capsroute::cuda
