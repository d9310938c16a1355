// The kernels of norm_act on the GPU, and how their threads are mapped.
//
// Memory-bound. Channels last: a thread owns V neighbouring channels and walks over positions, and a block covers
// `lanes` vectors of channels side by side. NCHW: a block owns one channel, and its threads walk over vectors of V
// positions. In both, a step of the walk is a row.
#pragma once

#include "feature_access.cuh"
#include "norm_act.h"

namespace recontrast {

constexpr int kInFlight = 4;  // 16-byte loads of each tensor that a thread has in flight

template <typename T>
struct Features {
  T* data;  // null: absent
  int64_t n, c, p;
};

// Rows and channels of the features, and the part of them that a block processes.
struct Walk {
  bool by_rows;  // channels last
  unsigned P, C;
  unsigned rows;   // positions, or vectors of positions of a channel
  unsigned lanes;  // vectors of channels in a block; 1 in NCHW
  unsigned share;  // rows of a block

  template <int V>
  __device__ unsigned channel() const {
    return by_rows ? (blockIdx.x * lanes + threadIdx.x % lanes) * V : blockIdx.x;
  }
  __device__ unsigned first() const { return blockIdx.y * share + threadIdx.x / lanes; }
  __device__ unsigned step() const { return kThreads / lanes; }
  __device__ unsigned end() const { return min(rows, (blockIdx.y + 1) * share); }

  template <int V, typename T>
  __device__ T* at(const Features<T>& f, unsigned row, unsigned channel) const {
    const unsigned position = by_rows ? row : row * V;
    return f.data + position / P * f.n + position % P * f.p + channel * f.c;
  }
};

template <typename T, int V>
using Raw = std::conditional_t<V == 1, Scalar<T>, Words<T>>;

template <typename T, int V>
__device__ __forceinline__ Raw<T, V> load_raw(const Walk& walk, const Features<T>& f, unsigned row, unsigned channel) {
  return *reinterpret_cast<const Raw<T, V>*>(walk.at<V>(f, row, channel));
}

template <typename T, int V>
__device__ __forceinline__ void store_raw(const Walk& walk, const Features<T>& f, unsigned row, unsigned channel,
                                          const Acc<T> (&value)[V]) {
  Raw<T, V> raw;
  raw.set(value);
  *reinterpret_cast<Raw<T, V>*>(walk.at<V>(f, row, channel)) = raw;
}

// Calls body(row, vectors of f...) for the rows of a thread, with kInFlight rows loaded before the first is used.
template <typename T, int V, int count, typename Body>
__device__ __forceinline__ void for_rows(const Walk& walk, const Features<T> (&f)[count], unsigned channel,
                                         const Body& body) {
  const unsigned end = walk.end(), step = walk.step();
  for (unsigned row = walk.first(); row < end; row += kInFlight * step) {
    Raw<T, V> raw[kInFlight][count];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (row + u * step < end && f[i].data) raw[u][i] = load_raw<T, V>(walk, f[i], row + u * step, channel);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      if (row + u * step < end) body(row + u * step, raw[u]);
  }
}

// Numbers (C,) of the channels of a thread. Vectors of channels are aligned: V divides C.
template <typename A, int V>
__device__ __forceinline__ void load_channels(const A* from, const Walk& walk, unsigned channel, A (&to)[V]) {
  if (walk.by_rows) return load_numbers(from + channel, true, to);
  to[0] = from[channel];
#pragma unroll
  for (int v = 1; v < V; ++v) to[v] = to[0];
}

// Parameters of the channels, (3, C): mean, scale, bias.
template <typename A, int V>
struct ChannelParameters {
  A mean[V], scale[V], bias[V];
  __device__ ChannelParameters(const A* affine, const Walk& walk, unsigned channel) {
    load_channels(affine, walk, channel, mean);
    load_channels(affine + walk.C, walk, channel, scale);
    load_channels(affine + 2 * walk.C, walk, channel, bias);
  }
};

template <typename T>
__device__ __forceinline__ Acc<T> rounded(Acc<T> v) {
  return static_cast<Acc<T>>(static_cast<T>(v));
}

template <typename A>
__device__ __forceinline__ A normal_cdf(A v) {
  return A(0.5) * (A(1) + erf(v * A(0.70710678118654752440)));
}

// ---- reductions --------------------------------------------------------------------------------------------------

// Merges what the threads of a block know about the same channels, in a fixed order; lane k of the block then holds the
// result of its channels. Values are counts, means and squares (`is_moments`), or two sums.
template <typename A, int V, bool is_moments>
__device__ void merge_block(const Walk& walk, A (&first)[V], A (&second)[V], A count) {
  __shared__ A shared[3][kThreads];
  const unsigned t = threadIdx.x;
  for (int v = 0; v < V; ++v) {
    shared[0][t] = first[v];
    shared[1][t] = second[v];
    shared[2][t] = count;
    __syncthreads();
    for (unsigned half = kThreads / 2; half >= walk.lanes; half /= 2) {
      if (t < half) {
        const A a = shared[2][t], b = shared[2][t + half];
        if constexpr (is_moments) {
          if (b > 0) {
            const A delta = shared[0][t + half] - shared[0][t], share = b / (a + b);
            shared[0][t] += delta * share;
            shared[1][t] += shared[1][t + half] + delta * delta * a * share;
          }
        } else {
          shared[0][t] += shared[0][t + half];
          shared[1][t] += shared[1][t + half];
        }
        shared[2][t] = a + b;
      }
      __syncthreads();
    }
    first[v] = shared[0][t];
    second[v] = shared[1][t];
    __syncthreads();
  }
}

// Writes what a block found: out [3][C] of its part, with the count of values in the third row.
template <typename A, int V>
__device__ void store_part(const Walk& walk, unsigned channel, const A (&first)[V], const A (&second)[V], A* all) {
  if (threadIdx.x >= walk.lanes) return;
  A* out = all + static_cast<int64_t>(blockIdx.y) * 2 * walk.C;
  for (int v = 0; v < V; ++v) {
    if (!walk.by_rows && v) return;
    if (channel + v >= walk.C) return;
    out[channel + v] = first[v];
    out[walk.C + channel + v] = second[v];
  }
}

// In NCHW the V sums of a thread are of one channel.
template <typename A, int V>
__device__ void add_lanes(const Walk& walk, A (&sum)[V]) {
  if (walk.by_rows) return;
  for (int v = 1; v < V; ++v) sum[0] += sum[v];
}

// Mean and sum of squared deviations of the rows of a block; parts [parts][2][C].
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    moments_part(const __grid_constant__ Walk walk, const __grid_constant__ Features<T> x,  // (N, C, P)
                 Acc<T>* __restrict__ parts) {
  using A = Acc<T>;
  const unsigned channel = walk.channel<V>();
  A pivot[V] = {}, sum[V] = {}, squares[V] = {}, rows = 0;
  const Features<T> inputs[1] = {x};
  if (channel < walk.C)
    for_rows<T, V>(walk, inputs, channel, [&](unsigned, const Raw<T, V>(&raw)[1]) {
      if (rows == 0)  // a value of the channel, so that the sums of squares do not cancel
        for (int v = 0; v < V; ++v) pivot[v] = raw[0].get(walk.by_rows ? v : 0);
      rows += 1;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A d = raw[0].get(v) - pivot[v];
        sum[v] += d;
        squares[v] += d * d;
      }
    });
  add_lanes(walk, sum);
  add_lanes(walk, squares);
  const A count = walk.by_rows ? rows : rows * V;
  for (int v = 0; v < V; ++v) {
    const A mean = count > 0 ? sum[v] / count : A(0);
    squares[v] = count > 0 ? squares[v] - mean * sum[v] : A(0);
    sum[v] = pivot[v] + mean;
  }
  merge_block<A, V, true>(walk, sum, squares, count);
  store_part(walk, channel, sum, squares, parts);
}

// ---- elementwise -------------------------------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    apply(const __grid_constant__ Walk walk, const __grid_constant__ Features<T> x,  // (N, C, P)
          const __grid_constant__ Features<T> residual, const __grid_constant__ Features<T> y,
          const Acc<T>* __restrict__ affine, Act act) {  // (3, C)
  const unsigned channel = walk.channel<V>();
  if (channel >= walk.C) return;
  const ChannelParameters<Acc<T>, V> p(affine, walk, channel);
  const Features<T> inputs[2] = {x, residual};
  for_rows<T, V>(walk, inputs, channel, [&](unsigned row, const Raw<T, V>(&raw)[2]) {
    Acc<T> out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = (raw[0].get(v) - p.mean[v]) * p.scale[v] + p.bias[v];
      if (residual.data) out[v] = rounded<T>(out[v]) + raw[1].get(v);
      if (act == Act::relu && out[v] < 0) out[v] = 0;  // NaN stays NaN
      if (act == Act::gelu) out[v] *= normal_cdf(out[v]);
    }
    store_raw<T, V>(walk, y, row, channel, out);
  });
}

// Arguments of the two passes of backward; absent features are null.
template <typename T>
struct BackwardFeatures {
  Features<T> grad, x, kept;
  Features<T> masked, dx;  // what the first pass writes: the gradient before the activation, and that in eval mode
};

template <typename T>
__device__ __forceinline__ Acc<T> masked_gradient(Acc<T> g, Acc<T> centred, Acc<T> scale, Acc<T> bias, Act act,
                                                  bool has_kept, Acc<T> kept) {
  using A = Acc<T>;
  if (act == Act::none) return g;
  if (act == Act::relu && has_kept) return kept <= 0 ? A(0) : g;
  A v = centred * scale + bias;
  if (has_kept) v = rounded<T>(v) + kept;
  if (act == Act::relu) return v <= 0 ? A(0) : g;
  return g * (normal_cdf(v) + v * exp(A(-0.5) * v * v) * A(0.39894228040143267794));
}

// Sums of the masked gradient, alone and times x - mean, over the rows of a block; parts [parts][2][C].
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    sums_part(const __grid_constant__ Walk walk, const __grid_constant__ BackwardFeatures<T> f,
              const Acc<T>* __restrict__ affine, Act act, Acc<T>* __restrict__ parts) {
  using A = Acc<T>;
  const unsigned channel = walk.channel<V>();
  A sum[V] = {}, dot[V] = {};
  if (channel < walk.C) {
    const ChannelParameters<A, V> p(affine, walk, channel);
    const Features<T> inputs[3] = {f.grad, f.x, f.kept};
    for_rows<T, V>(walk, inputs, channel, [&](unsigned row, const Raw<T, V>(&raw)[3]) {
      A masked[V], dx[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A centred = raw[1].get(v) - p.mean[v], kept = f.kept.data ? raw[2].get(v) : A(0);
        masked[v] = masked_gradient<T>(raw[0].get(v), centred, p.scale[v], p.bias[v], act, f.kept.data, kept);
        dx[v] = masked[v] * p.scale[v];
        sum[v] += masked[v];
        dot[v] += masked[v] * centred;
      }
      if (f.masked.data) store_raw<T, V>(walk, f.masked, row, channel, masked);
      if (f.dx.data) store_raw<T, V>(walk, f.dx, row, channel, dx);
    });
  }
  add_lanes(walk, sum);
  add_lanes(walk, dot);
  merge_block<A, V, false>(walk, sum, dot, A(0));
  store_part(walk, channel, sum, dot, parts);
}

// dx = masked * scale - (x - mean) * slope - offset, in training mode; slopes (2, C).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    gradient(const __grid_constant__ Walk walk, const __grid_constant__ BackwardFeatures<T> f,
             const Acc<T>* __restrict__ affine, const Acc<T>* __restrict__ slopes, Act act) {
  using A = Acc<T>;
  const unsigned channel = walk.channel<V>();
  if (channel >= walk.C) return;
  const ChannelParameters<A, V> p(affine, walk, channel);
  A slope[V], offset[V];
  load_channels(slopes, walk, channel, slope);
  load_channels(slopes + walk.C, walk, channel, offset);
  const Features<T> inputs[2] = {f.grad, f.x};
  for_rows<T, V>(walk, inputs, channel, [&](unsigned row, const Raw<T, V>(&raw)[2]) {
    A dx[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A centred = raw[1].get(v) - p.mean[v];
      const A g = masked_gradient<T>(raw[0].get(v), centred, p.scale[v], p.bias[v], act, false, A(0));
      dx[v] = g * p.scale[v] - centred * slope[v] - offset[v];
    }
    store_raw<T, V>(walk, f.dx, row, channel, dx);
  });
}

}  // namespace recontrast
