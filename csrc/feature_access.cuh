// How CUDA kernels read features (N, C, H, W) in place, whatever their strides and dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace recontrast {

constexpr int kBytes = 16;  // the widest load of a thread
// Loads of each tensor that a thread has in flight. Memory answers after 0.7 us or so: to keep 3.35 TB/s (H100; H200:
// 4.8) coming, 2.3 MB (3.4) must be on their way, 18 kB (25) for each of 132 multiprocessors. A block of 256 threads
// has 8 loads of 16 bytes a thread on their way, 32 kB, and a multiprocessor holds three blocks: enough while half of
// them add up or wait for a barrier. All levels of WideResNet-50-2 fill whole rounds by rows (128 channels in float32,
// 256 in 16 bits) and by planes (32 channels): none has a round that is half empty.
constexpr int kUnroll = 4;

// Elements of a 16-byte load.
template <typename T>
constexpr int kVector = kBytes / sizeof(T);

// One tensor as the kernels see it; strides in elements.
struct Features {
  void* data;
  ScalarType type;
  bool one_stride;  // p walks through all positions
  int64_t n, c, p, h, w;
};

// The size of the tensors of a pair.
struct Size {
  unsigned count;  // N * P
  unsigned P, W;
  int C;
};

inline Features features(const Tensor& t) {
  const bool one = has_position_stride(t);
  const Strides s = one ? strides(t) : Strides{t.stride(0), t.stride(1), 0};
  void* data =
      const_cast<void*>(t.const_data_ptr());  // mutable_data_ptr would copy a lazy clone; only new tensors are written
  return {data, t.scalar_type(), one, s.n, s.c, s.p, t.stride(2), t.stride(3)};
}

inline Size size_of(const char* op, const Tensor& t) {
  const int64_t C = t.size(1), P = t.size(2) * t.size(3), count = t.size(0) * P;
  STD_TORCH_CHECK(C < 1 << 22 && count <= 1 << 30, op,
                  ": C must be less than 2^22 and N * H * W at most 2^30 on CUDA, got ", shape(t));
  return {static_cast<unsigned>(count), static_cast<unsigned>(P), static_cast<unsigned>(t.size(3)),
          static_cast<int>(C)};
}

// 16 bytes of T as they lie in registers: whole words, taken apart only where an element is used.
template <typename T>
struct alignas(kBytes) Words {
  unsigned word[kBytes / 4];

  __device__ __forceinline__ Acc<T> get(int v) const {
    if constexpr (std::is_same_v<T, double>) return __hiloint2double(word[2 * v + 1], word[2 * v]);
    if constexpr (std::is_same_v<T, float>) return __uint_as_float(word[v]);
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
      return __uint_as_float(v % 2 ? word[v / 2] & 0xffff0000u : word[v / 2] << 16);
    if constexpr (std::is_same_v<T, torch::headeronly::Half>)
      return __half2float(__ushort_as_half(static_cast<unsigned short>(v % 2 ? word[v / 2] >> 16 : word[v / 2])));
  }

  __device__ __forceinline__ void set(const Acc<T> (&value)[kVector<T>]) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      if constexpr (std::is_same_v<T, double>)
        word[i] = i % 2 ? __double2hiint(value[i / 2]) : __double2loint(value[i / 2]);
      if constexpr (std::is_same_v<T, float>) word[i] = __float_as_uint(value[i]);
      if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
        word[i] = *reinterpret_cast<const unsigned*>(&two);
      }
      if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
        const __half2 two = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
        word[i] = *reinterpret_cast<const unsigned*>(&two);
      }
    }
  }
};

template <typename T>
struct One {
  T value;
  __device__ __forceinline__ Acc<T> get(int) const { return static_cast<Acc<T>>(value); }
  __device__ __forceinline__ void set(const Acc<T> (&from)[1]) { value = static_cast<T>(from[0]); }
};

// Source of V elements at once, of neighbouring positions (by planes) or channels (by rows).
template <typename T, int V_>
struct Packed {
  using A = Acc<T>;
  using Raw = std::conditional_t<V_ == 1, One<T>, Words<T>>;
  static constexpr int V = V_, bytes = sizeof(Raw);
  static constexpr bool by_rows = true;
  T* at;
  int64_t step;

  __device__ Packed(const Features& f, unsigned position, const Size& size)
      : at(static_cast<T*>(f.data) + position / size.P * f.n + position % size.P * f.p), step(f.c) {}
  __device__ __forceinline__ Raw load(int c) const { return *reinterpret_cast<const Raw*>(at + c * step); }
  __device__ __forceinline__ A get(const Raw& raw, int v) const { return raw.get(v); }
  __device__ __forceinline__ void store(int c, const A (&value)[V]) const {
    Raw raw;
    raw.set(value);
    *reinterpret_cast<Raw*>(at + c * step) = raw;
  }
  // Zeros of V elements; they are first to leave the cache, which is better kept for what is read.
  __device__ __forceinline__ void zero(int c) const {
    if constexpr (V == 1)
      at[c * step] = static_cast<T>(0.f);
    else
      __stcs(reinterpret_cast<uint4*>(at + c * step), make_uint4(0, 0, 0, 0));
  }
};

// Source of one element, of any strides and a type known at run time only: mixed dtypes (autocast) and rare layouts.
template <typename A_>
struct Any {
  using A = A_;
  using Raw = uint64_t;  // bits alone: a load that is not used yet does not wait
  static constexpr int V = 1, bytes = sizeof(float);
  static constexpr bool by_rows = false;
  char* at;
  int64_t step;  // bytes
  ScalarType type;

  static __device__ int64_t width(ScalarType type) {
    return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  }
  __device__ Any(const Features& f, unsigned position, const Size& size) : step(f.c * width(f.type)), type(f.type) {
    const unsigned p = position % size.P;
    at = static_cast<char*>(f.data) + (position / size.P * f.n + p / size.W * f.h + p % size.W * f.w) * width(type);
  }
  __device__ __forceinline__ Raw load(int c) const {
    const char* from = at + c * step;
    if (type == ScalarType::Double) return *reinterpret_cast<const uint64_t*>(from);
    if (type == ScalarType::Float) return *reinterpret_cast<const uint32_t*>(from);
    return *reinterpret_cast<const uint16_t*>(from);
  }
  __device__ __forceinline__ A get(Raw raw, int) const {
    if (type == ScalarType::Double) return static_cast<A>(__longlong_as_double(static_cast<long long>(raw)));
    if (type == ScalarType::Float) return static_cast<A>(__uint_as_float(static_cast<unsigned>(raw)));
    if (type == ScalarType::BFloat16) return static_cast<A>(__uint_as_float(static_cast<unsigned>(raw) << 16));
    return static_cast<A>(__half2float(__ushort_as_half(static_cast<unsigned short>(raw))));
  }
  __device__ __forceinline__ void store(int c, const A (&value)[1]) const {
    char* to = at + c * step;
    const float single = static_cast<float>(value[0]);
    if (type == ScalarType::Double) *reinterpret_cast<double*>(to) = value[0];
    if (type == ScalarType::Float) *reinterpret_cast<float*>(to) = single;
    if (type == ScalarType::BFloat16) *reinterpret_cast<torch::headeronly::BFloat16*>(to) = single;
    if (type == ScalarType::Half) *reinterpret_cast<torch::headeronly::Half*>(to) = single;
  }
};

// kUnroll loads of channels c, c + step, ... of x and y, all on their way before the first is used; zeros from `end`
// on.
template <typename S>
struct Round {
  typename S::Raw x[kUnroll], y[kUnroll];

  __device__ __forceinline__ Round(const S& xs, const S& ys, int c, int step, int end) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      x[u] = y[u] = {};
      if (c + u * step < end) {
        x[u] = xs.load(c + u * step);
        y[u] = ys.load(c + u * step);
      }
    }
  }
};

}  // namespace recontrast
