// Reads and writes rows of features of any dtype and stride as contiguous float or double numbers, on the CPU.
#pragma once

#include "simd.h"
#include "tensor_arguments.h"

namespace recontrast {

// `n` half or bfloat16 numbers, `stride` apart, to float.
template <Bits32 (*widen)(const Half16&)>
INLINE void widen_body(const uint16_t* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  Half16 h{};
  if (stride == 1)
    for (; i + 16 <= n; i += 16) {
      std::memcpy(&h, from + i, sizeof(h));
      store(to + i, bits<Float32>(widen(h)));
    }
  for (; i < n; i += 16) {  // the remainder, or a row with a stride
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

// `n` float numbers to half or bfloat16, `stride` apart.
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
  Strides strides;

  explicit Source(const Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())),
        type(t.scalar_type()),
        size(static_cast<int64_t>(t.element_size())),
        strides(strides_of(t)) {}

  // A row [n] that starts at element `first`: in place if it is contiguous and of type A, else converted into `buffer`.
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

constexpr int64_t kCached = 32 << 20;  // bytes; a larger result is evicted from the caches before it is read

// Features (N, C, P) of any dtype, written as rows of A.
template <typename A>
struct Sink {
  char* data;
  ScalarType type;
  int64_t size;  // bytes of an element
  Strides strides;
  bool bypass_cache;

  explicit Sink(const Tensor& t)
      : data(static_cast<char*>(t.mutable_data_ptr())),
        type(t.scalar_type()),
        size(static_cast<int64_t>(t.element_size())),
        strides(strides_of(t)),
        bypass_cache(t.numel() * size > kCached) {}

  // Where to write a row: in place if it is contiguous and of type A, else `buffer`, which `put` converts.
  A* row(int64_t first, int64_t stride, A* buffer) const {
    const bool same = type == (std::is_same_v<A, float> ? ScalarType::Float : ScalarType::Double);
    return same && stride == 1 ? reinterpret_cast<A*>(data + first * size) : buffer;
  }

  // Writes the `row` [n] that `row()` returned to its place, unless it is there already.
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

  // Writes zeros, which are zero bytes in every dtype. `nontemporal`: bypass the caches if the result is large; the
  // caller then calls fence_nontemporal.
  void zero(int64_t first, int64_t stride, int64_t n, bool nontemporal = false) const {
    char* to = data + first * size;
    if (stride == 1) {
      int64_t bytes = n * size;
      if (nontemporal && bypass_cache && is_aligned_16(to))
        for (; bytes >= 64; bytes -= 64, to += 64) store_nontemporal(to, Bits32{});
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
