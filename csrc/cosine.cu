// cosine_sums on the GPU. What it computes: recontrast/reference.py.
//
// Memory-bound: each feature is read once, in place, 16 bytes a thread, kUnroll loads of each tensor in flight before
// the first is used. "By planes" (NCHW, and whatever is neither) a thread owns a few neighbouring positions, and the
// threads of a block share the channels, the more the fewer positions there are; "by rows" (channels_last) the lanes of
// one position run along its channels. Sums are added in an order that only the shape decides, without atomics.

#include <algorithm>
#include <initializer_list>

#include "features.h"

namespace recontrast {
namespace {

constexpr int kSegment = 64;     // bytes at least that neighbouring threads read: two sectors of memory
constexpr int kLine = 128;       // bytes of a cache line
constexpr int kResident = 2048;  // threads of a multiprocessor
constexpr int kChannels = 64;    // channels of a backward block: two rounds, so that weights are read rarely
constexpr int kBlocks = 3;       // a multiprocessor holds at least: bounds the registers without a spill

// ---- sums ----------------------------------------------------------------------------------------------------------

// Block (lanes, channel groups): lane -> S::V positions, group -> every blockDim.y-th channel.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) sums_by_planes(Features x, Features y,
                                                                    typename S::A* __restrict__ sums,  // [3, N, P]
                                                                    Size size) {
  using A = typename S::A;
  constexpr int V = S::V;
  const int lanes = blockDim.x, step = blockDim.y, width = lanes * V;
  const unsigned first = blockIdx.x * width + threadIdx.x * V;
  A sum[3][V] = {};
  if (first < size.count) {
    const S xs(x, first, size), ys(y, first, size);
    for (int c = threadIdx.y; c < size.C; c += kUnroll * step) {
      const Round<S> round(xs, ys, c, step, size.C);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A a = xs.get(round.x[u], v), b = ys.get(round.y[u], v);
          sum[0][v] += a * b;
          sum[1][v] += a * a;
          sum[2][v] += b * b;
        }
    }
  }
  // The groups of a warp first, then the warps.
  __shared__ A part[kThreads / kWarp][3][kWarp * V];
  const int thread = threadIdx.y * lanes + threadIdx.x;
#pragma unroll
  for (int q = 0; q < 3; ++q)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      for (int m = lanes; m < kWarp; m *= 2) sum[q][v] += __shfl_xor_sync(~0u, sum[q][v], m);
      if (thread % kWarp < lanes) part[thread / kWarp][q][threadIdx.x * V + v] = sum[q][v];
    }
  __syncthreads();
  for (int i = thread; i < 3 * width; i += kThreads) {
    const int q = i / width, j = i % width;
    A total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += part[w][q][j];
    if (blockIdx.x * width + j < size.count)
      sums[static_cast<int64_t>(q) * size.count + blockIdx.x * width + j] = total;
  }
}

// Block (lanes, positions): the lanes of a position run along its channels, S::V at a time.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) sums_by_rows(Features x, Features y,
                                                                  typename S::A* __restrict__ sums,  // [3, N, P]
                                                                  Size size) {
  using A = typename S::A;
  const int step = blockDim.x * S::V;
  const unsigned position = blockIdx.x * blockDim.y + threadIdx.y;
  A sum[3] = {};
  if (position < size.count) {
    const S xs(x, position, size), ys(y, position, size);
    for (int c = threadIdx.x * S::V; c < size.C; c += kUnroll * step) {
      const Round<S> round(xs, ys, c, step, size.C);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < S::V; ++v) {
          const A a = xs.get(round.x[u], v), b = ys.get(round.y[u], v);
          sum[0] += a * b;
          sum[1] += a * a;
          sum[2] += b * b;
        }
    }
  }
#pragma unroll
  for (int q = 0; q < 3; ++q) {
    for (int m = blockDim.x / 2; m; m /= 2) sum[q] += __shfl_xor_sync(~0u, sum[q], m);
    if (threadIdx.x == 0 && position < size.count) sums[static_cast<int64_t>(q) * size.count + position] = sum[q];
  }
}

// ---- gradient ------------------------------------------------------------------------------------------------------

// Blocks (lanes, channel groups) in a grid (positions, kChannels channels each). V positions of weight 0 are not read.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_by_planes(const typename S::A* __restrict__ grad,  // [3, N, P]
                       Features x, Features y, Features dy, Size size) {
  using A = typename S::A;
  constexpr int V = S::V;
  const unsigned first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (first >= size.count) return;
  A of_x[V], of_y[V];
  bool any = false;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    of_x[v] = grad[first + v];
    of_y[v] = 2 * grad[2 * static_cast<int64_t>(size.count) + first + v];
    any = any || of_x[v] != 0 || of_y[v] != 0;
  }
  const S xs(x, first, size), ys(y, first, size), out(dy, first, size);
  const int step = blockDim.y, end = min(size.C, static_cast<int>(blockIdx.y + 1) * kChannels);
  for (int c = blockIdx.y * kChannels + threadIdx.y; c < end; c += kUnroll * step) {
    const Round<S> round(xs, ys, c, step, any ? end : 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (c + u * step >= end) break;
      A value[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A sum = of_x[v] * xs.get(round.x[u], v) + of_y[v] * ys.get(round.y[u], v);
        value[v] = of_x[v] != 0 || of_y[v] != 0 ? sum : 0;  // the features may hold NaN there
      }
      out.store(c + u * step, value);
    }
  }
}

// Block (lanes, positions). A position of weight 0 is written and not read.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_by_rows(const typename S::A* __restrict__ grad,  // [3, N, P]
                     Features x, Features y, Features dy, Size size) {
  using A = typename S::A;
  const unsigned position = blockIdx.x * blockDim.y + threadIdx.y;
  if (position >= size.count) return;
  const A of_x = grad[position], of_y = 2 * grad[2 * static_cast<int64_t>(size.count) + position];
  const bool any = of_x != 0 || of_y != 0;
  const S xs(x, position, size), ys(y, position, size), out(dy, position, size);
  const int step = blockDim.x * S::V;
  for (int c = threadIdx.x * S::V; c < size.C; c += kUnroll * step) {
    const Round<S> round(xs, ys, c, step, any ? size.C : 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (c + u * step >= size.C) break;
      A value[S::V];
#pragma unroll
      for (int v = 0; v < S::V; ++v) value[v] = of_x * xs.get(round.x[u], v) + of_y * ys.get(round.y[u], v);
      out.store(c + u * step, value);
    }
  }
}

// ---- which kernel --------------------------------------------------------------------------------------------------

template <typename T>
struct Tag {
  using type = T;
};

// Calls by_planes or by_rows with a Tag of the source that reads all tensors, which have one size, in place.
template <typename Planes, typename Rows>
void choose(const char* op, std::initializer_list<Features> all, const Size& size, bool wide, const Planes& by_planes,
            const Rows& by_rows) {
  const auto every = [&](auto condition) { return std::all_of(all.begin(), all.end(), condition); };
  const ScalarType type = all.begin()->type;
  if (!every([&](const Features& f) { return f.one_stride && f.type == type; }))
    return wide ? by_planes(Tag<Any<double>>{}) : by_planes(Tag<Any<float>>{});
  const bool rows = size.C > 1 && every([](const Features& f) { return f.c == 1; });
  dispatch(op, type, [&](auto element) {
    using T = decltype(element);
    constexpr int V = kVector<T>;
    const bool vectors = (rows ? size.C : size.P) % V == 0 && every([&](const Features& f) {
                           return (rows || f.p == 1) && reinterpret_cast<uintptr_t>(f.data) % kBytes == 0 &&
                                  f.n % V == 0 && (rows ? f.p : f.c) % V == 0;
                         });
    if (rows) return vectors ? by_rows(Tag<Packed<T, V>>{}) : by_rows(Tag<Packed<T, 1>>{});
    return vectors ? by_planes(Tag<Packed<T, V>>{}) : by_planes(Tag<Packed<T, 1>>{});
  });
}

// Lanes by planes: as few as keep reads whole while blocks are too few to fill the chip.
template <typename S>
unsigned plane_lanes(const Size& size) {
  unsigned lanes = kWarp;
  while (lanes * S::bytes > kSegment && blocks(size.count, lanes * S::V) < 4 * processors()) lanes /= 2;
  return lanes;
}

// Lanes by rows: a cache line, as adding up lanes costs time; more for few positions, fewer for few channels.
template <typename S>
unsigned row_lanes(const Size& size) {
  unsigned lanes = std::min(kLine / S::bytes, kWarp);
  while (lanes < kWarp && static_cast<int64_t>(size.count) * lanes < kResident * processors()) lanes *= 2;
  while (lanes > 1 && static_cast<int>(lanes / 2 * S::V) >= size.C) lanes /= 2;
  return lanes;
}

Tensor cosine_sums(const Tensor& x, const Tensor& y) {
  check_pair("cosine_sums", x, y);
  check_device("cosine_sums", "y", y, x);
  const DeviceGuard guard(x.get_device());
  const ScalarType acc = acc_type(x, y);
  Tensor out = torch::stable::new_empty(x, std::array<int64_t, 4>{3, x.size(0), x.size(2), x.size(3)}, acc);
  if (out.numel() == 0) return out;

  const Size size = size_of("cosine_sums", x);
  const Features fx = features(x), fy = features(y);
  const auto run = [&](auto tag, auto kernel, unsigned lanes, unsigned per_block) {
    using A = typename decltype(tag)::type::A;
    launch(kernel, blocks(size.count, per_block), dim3(lanes, kThreads / lanes), current_stream(x), fx, fy,
           out.mutable_data_ptr<A>(), size);
  };
  choose(
      "cosine_sums", {fx, fy}, size, acc == ScalarType::Double,
      [&](auto tag) {
        using S = typename decltype(tag)::type;
        const unsigned lanes = plane_lanes<S>(size);
        run(tag, sums_by_planes<S>, lanes, lanes * S::V);
      },
      [&](auto tag) {
        using S = typename decltype(tag)::type;
        const unsigned lanes = row_lanes<S>(size);
        run(tag, sums_by_rows<S>, lanes, kThreads / lanes);
      });
  return out;
}

Tensor cosine_sums_backward(const Tensor& grad_, const Tensor& x, const Tensor& y) {
  const ScalarType acc = acc_type(x, y);
  check_pair("cosine_sums_backward", x, y);
  check_gradient("cosine_sums_backward", grad_, y, acc);
  check_device("cosine_sums_backward", "x", x, grad_);
  check_device("cosine_sums_backward", "y", y, grad_);
  const DeviceGuard guard(x.get_device());
  const Tensor grad = torch::stable::contiguous(grad_);  // small: it has no channels
  Tensor out = torch::stable::empty_like(y);
  if (out.numel() == 0) return out;

  const Size size = size_of("cosine_sums_backward", y);
  const Features fx = features(x), fy = features(y), to = features(out);
  const auto run = [&](auto tag, auto kernel, dim3 grid, unsigned lanes) {
    using A = typename decltype(tag)::type::A;
    launch(kernel, grid, dim3(lanes, kThreads / lanes), current_stream(x), grad.const_data_ptr<A>(), fx, fy, to, size);
  };
  choose(
      "cosine_sums_backward", {fx, fy, to}, size, acc == ScalarType::Double,
      [&](auto tag) {
        using S = typename decltype(tag)::type;
        run(tag, gradient_by_planes<S>, dim3(blocks(size.count, kWarp * S::V), blocks(size.C, kChannels)), kWarp);
      },
      [&](auto tag) {
        using S = typename decltype(tag)::type;
        const unsigned lanes = row_lanes<S>(size);
        run(tag, gradient_by_rows<S>, blocks(size.count, kThreads / lanes), lanes);
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CUDA, m) {
  m.impl("cosine_sums", TORCH_BOX(&cosine_sums));
  m.impl("cosine_sums_backward", TORCH_BOX(&cosine_sums_backward));
}

}  // namespace recontrast
