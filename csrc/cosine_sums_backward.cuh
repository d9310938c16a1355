// The gradient of cosine_sums on the GPU. What it computes: recontrast/reference.py.
//
// Memory-bound like the sums (cosine.cu); channels are shared by blocks, so that few positions fill the chip as well.
#pragma once

#include "feature_pairs.cuh"

namespace recontrast {

constexpr int kChannels = 64;  // channels of a block by planes: two rounds, so that weights are read rarely

// Threads (lanes, channel groups), blocks (positions, kChannels channels each). V positions of weight 0 are not read.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_by_planes(const __grid_constant__ Group all) {
  using A = typename S::A;
  constexpr int V = S::V;
  unsigned block;
  const Pair& pair = all.mine(block);
  const Size size = pair.size;
  const int lanes = pair.lanes, step = kThreads / lanes;
  const unsigned across = (size.count + lanes * V - 1) / (lanes * V);  // blocks that cover the positions
  const unsigned first = (block % across * lanes + threadIdx.x % lanes) * V;
  if (first >= size.count) return;
  const A* grad = static_cast<const A*>(pair.sums);
  A of_x[V], of_y[V];
  bool some = false;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    of_x[v] = grad[first + v];
    of_y[v] = 2 * grad[2 * static_cast<int64_t>(size.count) + first + v];
    some = some || of_x[v] != 0 || of_y[v] != 0;
  }
  const S xs(pair.x, first, size), ys(pair.y, first, size), out(pair.dy, first, size);
  const int begin = static_cast<int>(block / across) * kChannels, end = min(size.C, begin + kChannels);
  for (int c = begin + static_cast<int>(threadIdx.x) / lanes; c < end; c += kUnroll * step) {
    const Round<S> round(xs, ys, c, step, some ? end : 0);
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

// Threads (lanes, positions). A position of weight 0 is written and not read.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_by_rows(const __grid_constant__ Group all) {
  using A = typename S::A;
  unsigned block;
  const Pair& pair = all.mine(block);
  const Size size = pair.size;
  const int lanes = pair.lanes, step = lanes * S::V;
  const unsigned position = block * (kThreads / lanes) + threadIdx.x / lanes;
  if (position >= size.count) return;
  const A* grad = static_cast<const A*>(pair.sums);
  const A of_x = grad[position], of_y = 2 * grad[2 * static_cast<int64_t>(size.count) + position];
  const S out(pair.dy, position, size);
  int c = static_cast<int>(threadIdx.x) % lanes * S::V;
  if (of_x == 0 && of_y == 0) {
    for (; c < size.C; c += step) out.zero(c);
    return;
  }
  const S xs(pair.x, position, size), ys(pair.y, position, size);
  for (; c < size.C; c += kUnroll * step) {
    const Round<S> round(xs, ys, c, step, size.C);
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

}  // namespace recontrast
