// Vectors of 64 bytes, which the compiler lowers to the registers of the target, and conversions of float16 and
// bfloat16.
//
// A function marked VERSIONED is compiled for AVX-512, AVX2 and the baseline; the loader picks the best version that
// the processor supports, so a wheel runs on any x86-64. On other architectures (NEON) there is only the baseline.
// Function bodies are always_inline: only an inlined function is compiled for the instruction set of its caller.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#ifdef RECONTRAST_SANITIZE  // one version of each function, and nothing inlined: it compiles in a fraction of the time
#define VERSIONED
#define INLINE inline
#else
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define VERSIONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef VERSIONED
#define VERSIONED
#endif
// A function marked NATIVE_BFLOAT16 may run only where has_native_bfloat16() is true. Clang does not take vectors of 64
// bytes as operands of its asm statements in functions that are compiled for the baseline.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define NATIVE_BFLOAT16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#endif
#define INLINE [[gnu::always_inline]] inline
#endif

namespace recontrast {

// Whether the processor has instructions for bfloat16 (AVX512-BF16).
inline bool has_native_bfloat16() {
#ifdef NATIVE_BFLOAT16
  static const bool has = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// A vector V of `count` numbers.
template <typename A>
struct Lanes {
  typedef A V __attribute__((vector_size(64)));
  static constexpr int64_t count = 64 / sizeof(A);
};
typedef uint16_t Half16 __attribute__((vector_size(32)));  // the bits of 16 half or bfloat16 numbers
typedef uint32_t Bits32 __attribute__((vector_size(64)));  // the bits of 16 float numbers
using Float32 = Lanes<float>::V;

template <typename A>
INLINE typename Lanes<A>::V load(const A* from) {
  typename Lanes<A>::V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename A>
INLINE void store(A* to, const typename Lanes<A>::V& v) {
  std::memcpy(to, &v, sizeof(v));
}

// Like store, but bypasses the caches: a cache line that is written whole need not be read first. `to` must be aligned
// to 16 bytes.
template <typename V>
INLINE void store_nontemporal(void* to, const V& v) {
#ifdef __SSE2__
  constexpr int count = sizeof(V) / sizeof(__m128i);
  __m128i parts[count];
  std::memcpy(parts, &v, sizeof(v));
  for (int i = 0; i < count; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, parts[i]);
#else
  std::memcpy(to, &v, sizeof(v));
#endif
}

// Call after the last store_nontemporal of a task: makes the stores visible to other threads.
inline void fence_nontemporal() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

INLINE bool is_aligned_16(const void* to) { return reinterpret_cast<uintptr_t>(to) % 16 == 0; }

// The bits of `from` as a To.
template <typename To, typename From>
INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// mask ? yes : no, bit by bit.
INLINE Bits32 select(const Bits32& mask, const Bits32& yes, const Bits32& no) { return (mask & yes) | (~mask & no); }

INLINE Bits32 widen_bfloat16(const Half16& h) { return __builtin_convertvector(h, Bits32) << 16; }

// Shifts exponent and mantissa to their position in a float; the factor 2^112 corrects the exponent bias, also for
// denormals.
INLINE Bits32 widen_half(const Half16& h) {
  const Bits32 u = __builtin_convertvector(h, Bits32);
  const Bits32 magnitude = bits<Bits32>(bits<Float32>((u & 0x7fff) << 13) * 0x1p112f);
  const Bits32 special = bits<Bits32>((u & 0x7c00) == 0x7c00) & 0x7f800000;  // infinity and NaN
  return magnitude | special | ((u & 0x8000) << 16);
}

// Rounds to nearest, ties to even.
INLINE Half16 narrow_bfloat16(const Bits32& u) {
  const Bits32 nan = bits<Bits32>((u & 0x7fffffff) > 0x7f800000);
  const Bits32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(select(nan, (u >> 16) | 0x40, rounded), Half16);
}

// Rounds to nearest, ties to even.
INLINE Half16 narrow_half(const Bits32& u) {
  const Bits32 magnitude = u & 0x7fffffff;
  // Below 2^-14, adding 0.5 shifts the mantissa to the position of a denormal half and rounds it.
  const Bits32 small = bits<Bits32>(bits<Float32>(magnitude) + 0.5f) - 0x3f000000;
  const Bits32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Bits32 large = select(bits<Bits32>(magnitude > 0x7f800000), Bits32{} + 0x7e00, Bits32{} + 0x7c00);
  Bits32 h = select(bits<Bits32>(magnitude < 0x38800000), small, normal);
  h = select(bits<Bits32>(magnitude >= 0x477ff000), large, h);  // 65520 and above round to infinity
  return __builtin_convertvector(h | ((u >> 16) & 0x8000), Half16);
}

}  // namespace recontrast
