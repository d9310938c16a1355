// Vectors of 64 bytes that the compiler lowers to what the processor has, and rows of features read into them.
//
// A function marked VERSIONED is compiled for AVX-512, AVX2 and the baseline, and the loader takes the best one the
// processor has: a wheel built here runs on any x86-64. Elsewhere (NEON) the baseline is all there is. The bodies are
// always_inline, because only what is inlined takes over the instruction set of its caller.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "tensor_arguments.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define VERSIONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef VERSIONED
#define VERSIONED
#endif
#define INLINE [[gnu::always_inline]] inline

namespace recontrast {

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

// Like store, past the caches: a line that is written whole need not be read first. Wants 16 bytes of alignment.
template <typename V>
INLINE void stream(void* to, const V& v) {
#ifdef __SSE2__
  __m128i quarters[4];
  std::memcpy(quarters, &v, sizeof(v));
  for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, quarters[i]);
#else
  std::memcpy(to, &v, sizeof(v));
#endif
}

// After the last stream of a task: other threads see what was written.
inline void stream_end() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

INLINE bool may_stream(const void* to) { return reinterpret_cast<uintptr_t>(to) % 16 == 0; }

template <typename To, typename From>
INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

INLINE Bits32 pick(const Bits32& mask, const Bits32& yes, const Bits32& no) { return (mask & yes) | (~mask & no); }

INLINE Bits32 widen_bfloat16(const Half16& h) { return __builtin_convertvector(h, Bits32) << 16; }

// Exponent and mantissa move to their place in a float and 2^112 mends the bias, denormals included.
INLINE Bits32 widen_half(const Half16& h) {
  const Bits32 u = __builtin_convertvector(h, Bits32);
  const Bits32 magnitude = bits<Bits32>(bits<Float32>((u & 0x7fff) << 13) * 0x1p112f);
  const Bits32 special = bits<Bits32>((u & 0x7c00) == 0x7c00) & 0x7f800000;  // infinity and NaN
  return magnitude | special | ((u & 0x8000) << 16);
}

// To nearest, ties to even.
INLINE Half16 narrow_bfloat16(const Bits32& u) {
  const Bits32 nan = bits<Bits32>((u & 0x7fffffff) > 0x7f800000);
  const Bits32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(pick(nan, (u >> 16) | 0x40, rounded), Half16);
}

INLINE Half16 narrow_half(const Bits32& u) {
  const Bits32 magnitude = u & 0x7fffffff;
  // Below 2^-14 adding 0.5 shifts the mantissa to where the denormal half has it, rounded by the adder.
  const Bits32 small = bits<Bits32>(bits<Float32>(magnitude) + 0.5f) - 0x3f000000;
  const Bits32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Bits32 large = pick(bits<Bits32>(magnitude > 0x7f800000), Bits32{} + 0x7e00, Bits32{} + 0x7c00);
  Bits32 h = pick(bits<Bits32>(magnitude < 0x38800000), small, normal);
  h = pick(bits<Bits32>(magnitude >= 0x477ff000), large, h);  // 65520 and above round to infinity
  return __builtin_convertvector(h | ((u >> 16) & 0x8000), Half16);
}

// ---- rows: n numbers of any dtype, `stride` apart, as contiguous A ------------------------------------------------

template <Bits32 (*widen)(const Half16&)>
INLINE void widen_body(const uint16_t* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  Half16 h{};
  if (stride == 1)
    for (; i + 16 <= n; i += 16) {
      std::memcpy(&h, from + i, sizeof(h));
      store(to + i, bits<Float32>(widen(h)));
    }
  for (; i < n; i += 16) {  // what is left, or has a stride
    const int64_t size = n - i < 16 ? n - i : 16;
    for (int64_t k = 0; k < size; ++k) h[k] = from[(i + k) * stride];
    const Float32 v = bits<Float32>(widen(h));
    std::memcpy(to + i, &v, size * sizeof(float));
  }
}
VERSIONED inline void widen_bfloat16_row(const uint16_t* from, int64_t stride, int64_t n, float* to) {
  widen_body<widen_bfloat16>(from, stride, n, to);
}
VERSIONED inline void widen_half_row(const uint16_t* from, int64_t stride, int64_t n, float* to) {
  widen_body<widen_half>(from, stride, n, to);
}

template <Half16 (*narrow)(const Bits32&)>
INLINE void narrow_body(const float* from, int64_t n, uint16_t* to, int64_t stride) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + 16 <= n; i += 16) {
      const Half16 h = narrow(bits<Bits32>(load(from + i)));
      std::memcpy(to + i, &h, sizeof(h));
    }
  for (; i < n; i += 16) {
    const int64_t size = n - i < 16 ? n - i : 16;
    Float32 v{};
    std::memcpy(&v, from + i, size * sizeof(float));
    const Half16 h = narrow(bits<Bits32>(v));
    for (int64_t k = 0; k < size; ++k) to[(i + k) * stride] = h[k];
  }
}
VERSIONED inline void narrow_bfloat16_row(const float* from, int64_t n, uint16_t* to, int64_t stride) {
  narrow_body<narrow_bfloat16>(from, n, to, stride);
}
VERSIONED inline void narrow_half_row(const float* from, int64_t n, uint16_t* to, int64_t stride) {
  narrow_body<narrow_half>(from, n, to, stride);
}

// Features (N, C, P) of any dtype, read as rows of A.
template <typename A>
struct Source {
  const char* data;
  ScalarType type;
  int64_t size;  // bytes of an element
  Strides at;

  explicit Source(const Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())),
        type(t.scalar_type()),
        size(static_cast<int64_t>(t.element_size())),
        at(strides(t)) {}

  // Where the row that starts at element `first` can be read: in place, or from `buffer` after conversion.
  const A* row(int64_t first, int64_t stride, int64_t n, A* buffer) const {
    const char* from = data + first * size;
    if (type == ScalarType::BFloat16 || type == ScalarType::Half) {
      const auto* numbers = reinterpret_cast<const uint16_t*>(from);
      const auto widen = type == ScalarType::Half ? widen_half_row : widen_bfloat16_row;
      if constexpr (std::is_same_v<A, float>) {
        widen(numbers, stride, n, buffer);
      } else {
        float part[64];
        for (int64_t i = 0; i < n; i += 64) {
          const int64_t k = n - i < 64 ? n - i : 64;
          widen(numbers + i * stride, stride, k, part);
          for (int64_t j = 0; j < k; ++j) buffer[i + j] = part[j];
        }
      }
      return buffer;
    }
    if (type == ScalarType::Float) return numbers<float>(from, stride, n, buffer);
    return numbers<double>(from, stride, n, buffer);
  }

 private:
  template <typename T>
  static const A* numbers(const char* from, int64_t stride, int64_t n, A* buffer) {
    const T* t = reinterpret_cast<const T*>(from);
    if constexpr (std::is_same_v<T, A>)
      if (stride == 1) return t;
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(t[i * stride]);
    return buffer;
  }
};

constexpr int64_t kCached = 32 << 20;  // bytes: a larger result has left the caches before it is read

// Features (N, C, P) of any dtype, written as rows of A.
template <typename A>
struct Sink {
  char* data;
  ScalarType type;
  int64_t size;  // bytes of an element
  Strides at;
  bool past;  // the caches

  explicit Sink(const Tensor& t)
      : data(static_cast<char*>(t.mutable_data_ptr())),
        type(t.scalar_type()),
        size(static_cast<int64_t>(t.element_size())),
        at(strides(t)),
        past(t.numel() * size > kCached) {}

  // Where to write the row: in place, or into `buffer`, which `put` then converts.
  A* row(int64_t first, int64_t stride, A* buffer) const {
    const bool same = type == (std::is_same_v<A, float> ? ScalarType::Float : ScalarType::Double);
    return same && stride == 1 ? reinterpret_cast<A*>(data + first * size) : buffer;
  }

  void put(const A* row, int64_t first, int64_t stride, int64_t n) const {
    char* to = data + first * size;
    if (reinterpret_cast<const char*>(row) == to) return;  // written in place
    if (type == ScalarType::Float) return numbers<float>(row, n, to, stride);
    if (type == ScalarType::Double) return numbers<double>(row, n, to, stride);
    auto* halves = reinterpret_cast<uint16_t*>(to);
    const auto narrow = type == ScalarType::Half ? narrow_half_row : narrow_bfloat16_row;
    if constexpr (std::is_same_v<A, float>) {
      narrow(row, n, halves, stride);
    } else {
      float part[64];
      for (int64_t i = 0; i < n; i += 64) {
        const int64_t k = n - i < 64 ? n - i : 64;
        for (int64_t j = 0; j < k; ++j) part[j] = static_cast<float>(row[i + j]);
        narrow(part, k, halves + i * stride, stride);
      }
    }
  }

  // Writes zeros, past the caches if the result is large and the caller calls stream_end. All dtypes have zero as zero
  // bytes.
  void zero(int64_t first, int64_t stride, int64_t n, bool streams = false) const {
    char* to = data + first * size;
    if (stride == 1) {
      int64_t bytes = n * size;
      if (streams && past && may_stream(to))
        for (; bytes >= 64; bytes -= 64, to += 64) stream(to, Bits32{});
      std::memset(to, 0, bytes);
    } else {
      for (int64_t i = 0; i < n; ++i) std::memset(to + i * stride * size, 0, size);
    }
  }

 private:
  template <typename T>
  static void numbers(const A* row, int64_t n, char* to, int64_t stride) {
    T* t = reinterpret_cast<T*>(to);
    for (int64_t i = 0; i < n; ++i) t[i * stride] = static_cast<T>(row[i]);
  }
};

}  // namespace recontrast
