// What both tests of kernels keep their numbers in: memory of one dtype and of its exact size, NaN before it is
// written.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/routing.h"

using Vector = std::vector<double>;

inline capsroute::DType accumulated(capsroute::DType dtype) {
  return dtype == capsroute::DType::float64 ? dtype : capsroute::DType::float32;
}

#if defined(__aarch64__)
using Float16 = __fp16;  // GCC 12 has no _Float16 there in C++
#else
using Float16 = _Float16;
#endif

struct Store {
  using DType = capsroute::DType;
  DType dtype = DType::float32;
  int64_t count = 0;
  std::vector<char> bytes;

  Store() = default;
  Store(DType dtype, int64_t count) : dtype(dtype), count(count), bytes(count * size(), char(0xff)) {}
  Store(DType dtype, const Vector& from) : Store(dtype, int64_t(from.size())) {
    for (int64_t k = 0; k < count; ++k) set(k, from[k]);
  }
  int64_t size() const { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
  void* data() { return count ? bytes.data() : nullptr; }

  void set(int64_t k, double value) {
    const float narrow = float(value);
    const Float16 half = Float16(narrow);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const uint16_t high = uint16_t(bits >> 16);
    const void* from = dtype == DType::float64    ? static_cast<const void*>(&value)
                       : dtype == DType::float32  ? static_cast<const void*>(&narrow)
                       : dtype == DType::bfloat16 ? static_cast<const void*>(&high)
                                                  : static_cast<const void*>(&half);
    std::memcpy(&bytes[k * size()], from, size());
  }
  double get(int64_t k) const {
    double value;
    float narrow;
    Float16 half;
    uint16_t high;
    const char* from = &bytes[k * size()];
    if (dtype == DType::float64) return std::memcpy(&value, from, 8), value;
    if (dtype == DType::float32) return std::memcpy(&narrow, from, 4), narrow;
    if (dtype == DType::float16) return std::memcpy(&half, from, 2), double(half);
    std::memcpy(&high, from, 2);
    const uint32_t bits = uint32_t(high) << 16;
    return std::memcpy(&narrow, &bits, 4), narrow;
  }
  Vector all() const {
    Vector x(count);
    for (int64_t k = 0; k < count; ++k) x[k] = get(k);
    return x;
  }
};
