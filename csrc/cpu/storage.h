// Numbers as they are stored: each dtype to the type that it is accumulated in and back, one value at a time, by whole
// vectors, or some of one.
#pragma once

#include "vec.h"

namespace capsroute::CAPSROUTE_ISA {

// Storage types, one value at a time.

CAPSROUTE_INLINE float to_acc(float x) { return x; }
CAPSROUTE_INLINE double to_acc(double x) { return x; }
CAPSROUTE_INLINE float to_acc(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
CAPSROUTE_INLINE float to_acc(Half x) {
  // Exponent and mantissa moved into a float's place, and its bias made a float's. A denormal gets a leading 1, which
  // is taken away again: no float is denormal, which torch.set_flush_denormal has the processor read as 0.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float value = bits_as<float>(magnitude + 0x38000000);
  if (magnitude < 0x00800000) value = bits_as<float>(magnitude + 0x38800000) - 0x1p-14f;
  if (magnitude >= 0x0f800000) value = bits_as<float>(magnitude | 0x7f800000);  // inf and NaN
  return bits_as<float>(bits_as<uint32_t>(value) | uint32_t(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even.
template <class X>
X from_acc(Acc<X> x);
template <>
CAPSROUTE_INLINE float from_acc<float>(float x) {
  return x;
}
template <>
CAPSROUTE_INLINE double from_acc<double>(double x) {
  return x;
}
template <>
CAPSROUTE_INLINE BFloat16 from_acc<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
CAPSROUTE_INLINE Half from_acc<Half>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7e00};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to inf
  if (magnitude < 0x38800000) {                                   // a half denormal: let the float adder round at 2^-24
    const float rounded = bits_as<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bits_as<uint32_t>(rounded) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

// L values, which need not be aligned.

template <class A>
CAPSROUTE_INLINE Vec<A> load(const A* p) {
  return bits_at<Vec<A>>(p);
}

using Vec16 = typename VecOf<uint16_t, CAPSROUTE_VECTOR_BYTES / 2>::type;
using Vec32 = Vec<uint32_t>;

CAPSROUTE_INLINE Vec<float> widened(Vec16 bits, BFloat16) {
  // GCC 12 makes four instructions of what is one to widen with.
#if defined(__AVX2__) && CAPSROUTE_VECTOR_BYTES == 32
  const Vec32 wide = bits_as<Vec32>(_mm256_cvtepu16_epi32(bits_as<__m128i>(bits)));
#elif defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  const Vec32 wide = bits_as<Vec32>(_mm512_cvtepu16_epi32(bits_as<__m256i>(bits)));
#else
  const Vec32 wide = __builtin_convertvector(bits, Vec32);
#endif
  return bits_as<Vec<float>>(wide << 16);
}

CAPSROUTE_INLINE Vec<float> widened(Vec16 bits, Half) {
#if defined(__F16C__) && CAPSROUTE_VECTOR_BYTES == 32
  return bits_as<Vec<float>>(_mm256_cvtph_ps(bits_as<__m128i>(bits)));
#elif defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  return bits_as<Vec<float>>(_mm512_cvtph_ps(bits_as<__m256i>(bits)));
#else
  Vec<float> x;
  for (int64_t l = 0; l < L<float>; ++l) x[l] = to_acc(Half{bits[l]});
  return x;
#endif
}

CAPSROUTE_INLINE Vec<float> load(const BFloat16* p) { return widened(bits_at<Vec16>(p), *p); }
CAPSROUTE_INLINE Vec<float> load(const Half* p) { return widened(bits_at<Vec16>(p), *p); }

// 16 bits for each lane, of which at(k) gives four: in registers, as what is put together in memory comes late.
template <class At>
CAPSROUTE_INLINE Vec16 bits_by_fours(const At& at) {
  using Fours = typename VecOf<uint64_t, sizeof(Vec16)>::type;
  return [&]<int64_t... k>(std::integer_sequence<int64_t, k...>) {
    return bits_as<Vec16>(Fours{at(k)...});
  }(std::make_integer_sequence<int64_t, sizeof(Vec16) / 8>());
}

// The first `count` numbers of 16 bits, and zeros after them.
CAPSROUTE_INLINE Vec16 load_some_bits(const uint16_t* p, int64_t count) {
#if defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  return bits_as<Vec16>(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
#else
  return bits_by_fours([&](int64_t k) -> uint64_t {
    const int64_t there = count - 4 * k;
    const uint16_t* from = p + 4 * k;
    if (there > 3) return bits_at<uint64_t>(from);
    if (there == 3) return bits_at<uint32_t>(from) | uint64_t(from[2]) << 32;
    return there == 2 ? bits_at<uint32_t>(from) : there == 1 ? *from : 0;
  });
#endif
}

// `count` <= L numbers, and zeros after them: nothing past the last one is read.
template <class X>
CAPSROUTE_INLINE Vec<Acc<X>> load_some(const X* p, int64_t count) {
  using A = Acc<X>;
  if constexpr (sizeof(X) == 2) return widened(load_some_bits(&p->bits, count), *p);
#if defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(X) == 8) return bits_as<Vec<A>>(_mm512_maskz_loadu_pd(__mmask8(lanes), p));
  if constexpr (sizeof(X) == 4) return bits_as<Vec<A>>(_mm512_maskz_loadu_ps(__mmask16(lanes), p));
#elif defined(__AVX2__) && CAPSROUTE_VECTOR_BYTES == 32
  const __m256i lanes = bits_as<__m256i>(first_lanes<A>(count));
  if constexpr (sizeof(X) == 8) return bits_as<Vec<A>>(_mm256_maskload_pd(p, lanes));
  if constexpr (sizeof(X) == 4) return bits_as<Vec<A>>(_mm256_maskload_ps(p, lanes));
#else
  Vec<A> x{};
  if constexpr (sizeof(X) >= 4)
    for (int64_t l = 0; l < count; ++l) x[l] = p[l];
  return x;
#endif
}

template <class A>
CAPSROUTE_INLINE void store(A* p, Vec<A> x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

// Past the caches, for large memory that is written once and not read soon: a plain store would read
// it first. p is aligned to a vector V. Other threads may read it after finish_stores().
template <class A, class V>
CAPSROUTE_INLINE void store_past(A* p, V x) {
#if defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_as<__m512i>(x));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(x));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(x));
#endif
  __builtin_memcpy(p, &x, sizeof(x));
}

CAPSROUTE_INLINE void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

CAPSROUTE_INLINE Vec16 narrowed(Vec<float> x, BFloat16) {
  const Vec32 bits = bits_as<Vec32>(x);
  const Vec32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Vec16);
}

CAPSROUTE_INLINE Vec16 narrowed(Vec<float> x, Half) {
#if defined(__F16C__) && CAPSROUTE_VECTOR_BYTES == 32
  return bits_as<Vec16>(_mm256_cvtps_ph(bits_as<__m256>(x), 0));
#elif defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  return bits_as<Vec16>(_mm512_cvtps_ph(bits_as<__m512>(x), 0));
#else
  Vec16 bits;
  for (int64_t l = 0; l < L<float>; ++l) bits[l] = from_acc<Half>(x[l]).bits;
  return bits;
#endif
}

// By the instruction that only stores: measured, one that converts and stores takes longer than the two.
CAPSROUTE_INLINE void store_bits(void* p, Vec16 bits) {
#if defined(__AVX2__) && CAPSROUTE_VECTOR_BYTES == 32
  _mm_storeu_si128(static_cast<__m128i*>(p), bits_as<__m128i>(bits));
#elif defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  _mm256_storeu_si256(static_cast<__m256i*>(p), bits_as<__m256i>(bits));
#else
  __builtin_memcpy(p, &bits, sizeof(bits));
#endif
}
CAPSROUTE_INLINE void store(BFloat16* p, Vec<float> x) { store_bits(p, narrowed(x, *p)); }
CAPSROUTE_INLINE void store(Half* p, Vec<float> x) { store_bits(p, narrowed(x, *p)); }

// The first `count` <= L numbers of `from`, and zeros after them, to all L of `to`.
template <class X>
CAPSROUTE_INLINE void copy_some(X* to, const X* from, int64_t count) {
  if constexpr (sizeof(X) == 2)
    store_bits(to, load_some_bits(&from->bits, count));
  else
    store(to, load_some(from, count));
}

// The first `count` <= L numbers: nothing past the last one is written.
template <class X>
CAPSROUTE_INLINE void store_some(X* p, Vec<Acc<X>> x, int64_t count) {
#if defined(__AVX512F__) && CAPSROUTE_VECTOR_BYTES == 64
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(X) == 8) return _mm512_mask_storeu_pd(p, __mmask8(lanes), bits_as<__m512d>(x));
  if constexpr (sizeof(X) == 4) return _mm512_mask_storeu_ps(p, __mmask16(lanes), bits_as<__m512>(x));
  if constexpr (sizeof(X) == 2) return _mm256_mask_storeu_epi16(p, __mmask16(lanes), bits_as<__m256i>(narrowed(x, *p)));
#elif defined(__AVX2__) && CAPSROUTE_VECTOR_BYTES == 32
  const __m256i lanes = bits_as<__m256i>(first_lanes<Acc<X>>(count));
  if constexpr (sizeof(X) == 8) return _mm256_maskstore_pd(p, lanes, bits_as<__m256d>(x));
  if constexpr (sizeof(X) == 4) return _mm256_maskstore_ps(p, lanes, bits_as<__m256>(x));
#endif
  X whole[L<Acc<X>>];
  store(whole, x);
  for (int64_t l = 0; l < count; ++l) p[l] = whole[l];
}

// Vectors V that are whole or half ones; halves are not converted.
template <class V, class X>
CAPSROUTE_INLINE V load_as(const X* p) {
  if constexpr (sizeof(V) == CAPSROUTE_VECTOR_BYTES) return load(p);
  return bits_at<V>(p);
}

template <class V, class X>
CAPSROUTE_INLINE void store_as(X* p, V x) {
  if constexpr (sizeof(V) == CAPSROUTE_VECTOR_BYTES)
    store(p, x);
  else
    __builtin_memcpy(p, &x, sizeof(x));
}

// out[k] = in[k * stride] for k < n, then zeros up to `padded`.
template <class X, class A>
CAPSROUTE_INLINE void widen(A* out, const X* in, int64_t stride, int64_t n, int64_t padded) {
  int64_t k = 0;
  if constexpr (std::is_same_v<Acc<X>, A>)
    if (stride == 1) {
      for (; k + L<A> <= n; k += L<A>) store(out + k, load(in + k));
      if (k < n && k + L<A> <= padded) store(out + k, load_some(in + k, n - k)), k += L<A>;
      for (; k < n; ++k) out[k] = to_acc(in[k]);
    }
  for (; k < n; ++k) out[k] = to_acc(in[k * stride]);
  for (; k < padded; ++k) out[k] = 0;
}

template <class X>
CAPSROUTE_INLINE void narrow(X* out, const Acc<X>* in, int64_t n) {
  int64_t k = 0;
  for (; k + L<Acc<X>> <= n; k += L<Acc<X>>) store(out + k, load(in + k));
  if (k < n) store_some(out + k, load_some(in + k, n - k), n - k);
}

template <class X>
  requires(!std::is_same_v<X, double>)
CAPSROUTE_INLINE void narrow(X* out, const double* in, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = from_acc<X>(float(in[k]));
}

// One value, as a dtype that is known when it runs.
template <class A>
CAPSROUTE_INLINE void write_as(void* to, DType dtype, int64_t at, A value) {
  switch (dtype) {
    case DType::float32: static_cast<float*>(to)[at] = float(value); break;
    case DType::float64: static_cast<double*>(to)[at] = double(value); break;
    case DType::bfloat16: static_cast<BFloat16*>(to)[at] = from_acc<BFloat16>(float(value)); break;
    case DType::float16: static_cast<Half*>(to)[at] = from_acc<Half>(float(value)); break;
  }
}

}  // namespace capsroute::CAPSROUTE_ISA
