// How CUDA kernels read and write features (N, C, H, W) in place, with any strides and dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace recontrast {

constexpr int kBytes = 16;  // of the widest load of a thread
// Loads of each tensor that a thread has in flight. The latency of memory is about 0.7 us: to sustain 3.35 TB/s (H100;
// H200: 4.8), 2.3 MB (3.4) must be in flight, 18 kB (25) for each of 132 multiprocessors. The threads of a block of 256
// have 8 loads of 16 bytes each in flight, 32 kB, and a multiprocessor runs three blocks: enough while half of them add
// up or wait at a barrier. One batch of loads covers 128 channels by rows in float32 (256 in 16 bits) and 32 by planes;
// the channel counts of WideResNet-50-2 are multiples of these, so no batch is partly empty.
constexpr int kUnroll = 4;

// Number of elements in a 16-byte load.
template <typename T>
constexpr int kVector = kBytes / sizeof(T);

__host__ __device__ constexpr int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// A feature tensor as kernels see it; strides in elements.
struct FeatureView {
  void* data;
  ScalarType type;
  bool one_stride;  // stride p covers all positions; h and w are not needed
  int64_t n, c, p, h, w;
};

// FeatureSize of both tensors of a pair.
struct FeatureSize {
  unsigned count;  // N * P
  unsigned P, W;
  int C;
};

inline FeatureView view_of(const Tensor& t) {
  const bool one_stride = has_position_stride(t);
  const Strides s = one_stride ? strides_of(t) : Strides{t.stride(0), t.stride(1), 0};
  // mutable_data_ptr would copy a lazy clone. Kernels write only to new tensors, which are no clones.
  void* data = const_cast<void*>(t.const_data_ptr());
  return {data, t.scalar_type(), one_stride, s.n, s.c, s.p, t.stride(2), t.stride(3)};
}

inline FeatureSize size_of(const char* op, const Tensor& t) {
  const int64_t C = t.size(1), P = t.size(2) * t.size(3), count = t.size(0) * P;
  STD_TORCH_CHECK(C < 1 << 22 && count <= 1 << 30, op,
                  ": x and y: wanted C below 2^22 and N * H * W at most 2^30 on CUDA, got ", shape(t));
  return {static_cast<unsigned>(count), static_cast<unsigned>(P), static_cast<unsigned>(t.size(3)),
          static_cast<int>(C)};
}

// 16 bytes of T, kept in registers as 32-bit words; an element is extracted where it is used.
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

// One element of T.
template <typename T>
struct Scalar {
  T value;
  __device__ __forceinline__ Acc<T> get(int) const { return static_cast<Acc<T>>(value); }
  __device__ __forceinline__ void set(const Acc<T> (&from)[1]) { value = static_cast<T>(from[0]); }
};

// V consecutive numbers, 16 bytes at a time where they are aligned: element by element, the lanes of a warp would ask
// for each sector V times. `aligned` must be equal for all threads.
template <typename A, int V>
__device__ __forceinline__ void load_numbers(const A* from, bool aligned, A (&to)[V]) {
  constexpr int per_load = kVector<A>;
  if constexpr (V % per_load == 0)
    if (aligned) {
#pragma unroll
      for (int i = 0; i < V; i += per_load) {
        const auto words = *reinterpret_cast<const Words<A>*>(from + i);
#pragma unroll
        for (int v = 0; v < per_load; ++v) to[i + v] = words.get(v);
      }
      return;
    }
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = from[v];
}

// Accesses V elements at once: V neighbouring positions (by planes) or channels (by rows) of one dtype.
template <typename T, int V_>
struct VectorAccess {
  using A = Acc<T>;
  using Raw = std::conditional_t<V_ == 1, Scalar<T>, Words<T>>;
  static constexpr int V = V_, bytes = sizeof(Raw);
  static constexpr bool by_rows = true;
  T* pointer;    // channel 0 of the position
  int64_t step;  // from channel to channel, in elements

  __device__ VectorAccess(const FeatureView& f, unsigned position, const FeatureSize& size)
      : pointer(static_cast<T*>(f.data) + position / size.P * f.n + position % size.P * f.p), step(f.c) {}
  __device__ __forceinline__ Raw load(int c) const { return *reinterpret_cast<const Raw*>(pointer + c * step); }
  __device__ __forceinline__ A get(const Raw& raw, int v) const { return raw.get(v); }
  __device__ __forceinline__ void store(int c, const A (&value)[V]) const {
    Raw raw;
    raw.set(value);
    *reinterpret_cast<Raw*>(pointer + c * step) = raw;
  }
  // Writes V zeros, which are evicted from the cache first: nothing reads them soon.
  __device__ __forceinline__ void zero(int c) const {
    if constexpr (V == 1)
      pointer[c * step] = static_cast<T>(0.f);
    else
      __stcs(reinterpret_cast<uint4*>(pointer + c * step), make_uint4(0, 0, 0, 0));
  }
};

constexpr int kMixed = 4;  // elements that MixedAccess accesses at once: 16 bytes of float32, 8 of 16-bit dtypes

// Accesses kMixed neighbouring positions (by planes) or channels (by rows) of float32, bfloat16 or float16, known only
// at run time: pairs of two dtypes, as autocast makes them.
struct MixedAccess {
  using A = float;
  using Raw = Words<float>;  // 16-bit elements fill the first half
  static constexpr int V = kMixed, bytes = sizeof(Raw);
  static constexpr bool by_rows = true;
  char* pointer;  // channel 0 of the position
  int64_t step;   // from channel to channel, in bytes
  ScalarType type;

  __device__ MixedAccess(const FeatureView& f, unsigned position, const FeatureSize& size)
      : pointer(static_cast<char*>(f.data) + (position / size.P * f.n + position % size.P * f.p) * bytes_of(f.type)),
        step(f.c * bytes_of(f.type)),
        type(f.type) {}
  __device__ __forceinline__ Raw load(int c) const {
    const char* from = pointer + c * step;
    if (type == ScalarType::Float) return *reinterpret_cast<const Raw*>(from);
    const uint2 half = *reinterpret_cast<const uint2*>(from);
    return {{half.x, half.y, 0, 0}};
  }
  __device__ __forceinline__ float get(const Raw& raw, int v) const {
    if (type == ScalarType::Float) return __uint_as_float(raw.word[v]);
    const unsigned word = raw.word[v / 2];
    if (type == ScalarType::BFloat16) return __uint_as_float(v % 2 ? word & 0xffff0000u : word << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(v % 2 ? word >> 16 : word)));
  }
  __device__ __forceinline__ void store(int c, const float (&value)[V]) const {
    char* to = pointer + c * step;
    if (type == ScalarType::Float) {
      Raw raw;
      raw.set(value);
      *reinterpret_cast<Raw*>(to) = raw;
    } else if (type == ScalarType::BFloat16) {
      const __nv_bfloat162 low = __floats2bfloat162_rn(value[0], value[1]);
      const __nv_bfloat162 high = __floats2bfloat162_rn(value[2], value[3]);
      *reinterpret_cast<uint2*>(to) =
          make_uint2(*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high));
    } else {
      const __half2 low = __floats2half2_rn(value[0], value[1]), high = __floats2half2_rn(value[2], value[3]);
      *reinterpret_cast<uint2*>(to) =
          make_uint2(*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high));
    }
  }
  __device__ __forceinline__ void zero(int c) const {
    if (type == ScalarType::Float)
      __stcs(reinterpret_cast<uint4*>(pointer + c * step), make_uint4(0, 0, 0, 0));
    else
      __stcs(reinterpret_cast<uint2*>(pointer + c * step), make_uint2(0, 0));
  }
};

// Accesses one element, with any strides and a dtype known only at run time: rare layouts, float64 beside another
// dtype.
template <typename A_>
struct GenericAccess {
  using A = A_;
  using Raw = uint64_t;  // unconverted bits: converting would wait for the load
  static constexpr int V = 1, bytes = sizeof(float);
  static constexpr bool by_rows = false;
  char* pointer;  // channel 0 of the position
  int64_t step;   // from channel to channel, in bytes
  ScalarType type;

  __device__ GenericAccess(const FeatureView& f, unsigned position, const FeatureSize& size)
      : step(f.c * bytes_of(f.type)), type(f.type) {
    const unsigned p = position % size.P;
    pointer =
        static_cast<char*>(f.data) + (position / size.P * f.n + p / size.W * f.h + p % size.W * f.w) * bytes_of(type);
  }
  __device__ __forceinline__ Raw load(int c) const {
    const char* from = pointer + c * step;
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
    char* to = pointer + c * step;
    const float single = static_cast<float>(value[0]);
    if (type == ScalarType::Double) *reinterpret_cast<double*>(to) = value[0];
    if (type == ScalarType::Float) *reinterpret_cast<float*>(to) = single;
    if (type == ScalarType::BFloat16) *reinterpret_cast<torch::headeronly::BFloat16*>(to) = single;
    if (type == ScalarType::Half) *reinterpret_cast<torch::headeronly::Half*>(to) = single;
  }
};

// Loads kUnroll channels c, c + step, ... of x and y, all in flight before the first is used; zeros from channel `end`
// on.
template <typename S>
struct LoadBatch {
  typename S::Raw x[kUnroll], y[kUnroll];

  __device__ __forceinline__ LoadBatch(const S& xs, const S& ys, int c, int step, int end) {
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
