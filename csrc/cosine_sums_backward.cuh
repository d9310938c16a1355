// The gradient of cosine_sums on the GPU; recontrast/reference.py defines it.
//
// Memory-bound like the sums (cosine_sums.cu). Blocks split the channels, so that few positions occupy the whole GPU
// too. Blocks walk from the last pair and position to the first: the L2 cache still holds what the sums read last.
#pragma once

#include "feature_pairs.cuh"

namespace recontrast {

constexpr int kChannels = 64;  // channels per block by planes: two batches of loads for each read of the weights

// Threads (lanes, channel groups), blocks (positions, kChannels channels each). V positions that all have weight 0 are
// not read.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_by_planes(const __grid_constant__ Group group) {
  using A = typename S::A;
  constexpr int V = S::V;
  unsigned block;
  const Pair& pair = group.find_backwards(block);
  const FeatureSize size = pair.size;
  const int lanes = pair.lanes, step = kThreads / lanes;
  // Blocks of the same positions are neighbours, as in the order in which the sums read the features.
  const unsigned parts = (static_cast<unsigned>(size.C) + kChannels - 1) / kChannels;
  const unsigned first = (block / parts * lanes + threadIdx.x % lanes) * V;
  if (first >= size.count) return;
  const A* grad = static_cast<const A*>(pair.sums);
  A of_x[V], of_y[V];
  bool any_weight = false;
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % kBytes == 0 && size.count % kVector<A> == 0;
  load_numbers(grad + first, aligned, of_x);
  load_numbers(grad + 2 * static_cast<int64_t>(size.count) + first, aligned, of_y);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    of_y[v] *= 2;
    any_weight = any_weight || of_x[v] != 0 || of_y[v] != 0;
  }
  const S xs(pair.x, first, size), ys(pair.y, first, size), out(pair.dy, first, size);
  const int begin = static_cast<int>(block % parts) * kChannels, end = min(size.C, begin + kChannels);
  for (int c = begin + static_cast<int>(threadIdx.x) / lanes; c < end; c += kUnroll * step) {
    const LoadBatch<S> batch(xs, ys, c, step, any_weight ? end : 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (c + u * step >= end) break;
      A value[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A sum = of_x[v] * xs.get(batch.x[u], v) + of_y[v] * ys.get(batch.y[u], v);
        value[v] = of_x[v] != 0 || of_y[v] != 0 ? sum : 0;  // the features of weight 0 may be NaN
      }
      out.store(c + u * step, value);
    }
  }
}

// Threads (lanes, positions). Positions of weight 0 are not read.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_by_rows(const __grid_constant__ Group group) {
  using A = typename S::A;
  unsigned block;
  const Pair& pair = group.find_backwards(block);
  const FeatureSize size = pair.size;
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
    const LoadBatch<S> batch(xs, ys, c, step, size.C);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      A value[S::V];
#pragma unroll
      for (int v = 0; v < S::V; ++v) value[v] = of_x * xs.get(batch.x[u], v) + of_y * ys.get(batch.y[u], v);
      if (c + u * step < size.C) out.store(c + u * step, value);  // a break would hold back loads of the batch
    }
  }
}

}  // namespace recontrast
