// Forward kernels of mined_loss on the GPU: the summary of each piece of points, and what follows for each pair.
#pragma once

#include "radix_select.cuh"

namespace recontrast {
namespace {

constexpr int kPointsPerThread = kPiece / kThreads;
constexpr int kWarps = kThreads / kWarp;
// Per piece: mean ("power": sum) of distances, squares about the mean, the three sums; with a mask its points inside.
template <bool masked>
constexpr int kFields = masked ? 6 : 5;

// Sums over a block, returned to all its threads.
template <int count, typename A>
__device__ void add_over_block(A (&value)[count]) {
  __shared__ A part[count][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int q = 0; q < count; ++q) {
    for (int m = kWarp / 2; m; m /= 2) value[q] += __shfl_xor_sync(~0u, value[q], m);
    if (lane == 0) part[q][warp] = value[q];
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < count; ++q) {
    value[q] = part[q][0];
    for (int w = 1; w < kWarps; ++w) value[q] += part[q][w];
  }
  __syncthreads();  // the next call overwrites what this one reads
}

// Summarises pieces of kPiece points of one image each and, for "hardest", counts the first digits of their distances.
template <typename A, bool masked>
__global__ void __launch_bounds__(kThreads)
    summarise_pieces(const __grid_constant__ LossArguments arguments, const A* __restrict__ all_sums,  // flat
                     A* __restrict__ fields,         // [blocks, kFields<masked>]
                     unsigned* __restrict__ bins) {  // [pairs, kBins], zeros
  unsigned block;
  int number;
  const PairPoints& pair = arguments.find(block, number);
  const int64_t image = block / pair.pieces, begin = static_cast<int64_t>(block % pair.pieces) * kPiece;
  const int count = static_cast<int>(min(pair.P - begin, static_cast<int64_t>(kPiece)));
  const A* sums = all_sums + pair.sums;
  const int64_t volume = pair.N * pair.P, first = image * pair.P + begin;
  A value[masked ? 5 : 4] = {}, d[kPointsPerThread], squares[1] = {};
  bool inside[kPointsPerThread] = {};
  unsigned bin[kPointsPerThread];
#pragma unroll
  for (int e = 0; e < kPointsPerThread; ++e) {
    const int i = e * kThreads + threadIdx.x;
    d[e] = 0;
    bin[e] = kNoBin;
    if (i >= count || (masked && !arguments.counts(pair, first + i))) continue;
    inside[e] = true;
    const A xy = sums[first + i], xx = sums[first + i + volume], yy = sums[first + i + 2 * volume];
    d[e] = distance_of(xy, xx, yy);
    value[0] += arguments.rule == Rule::power && d[e] < 0 ? 0 : d[e];
    value[1] += xy;
    value[2] += xx;
    value[3] += yy;
    if constexpr (masked) value[4] += 1;
    bin[e] = static_cast<unsigned>(Keys<A>::of(d[e]) >> (kDigit * (Keys<A>::digits - 1)));
  }
  if (arguments.rule == Rule::hardest) count_bins(bins + number * kBins, bin);
  add_over_block(value);
  if (arguments.rule == Rule::deviation) {
    A points = static_cast<A>(count);
    if constexpr (masked) points = value[4] > 1 ? value[4] : 1;
    value[0] /= points;
#pragma unroll
    for (int e = 0; e < kPointsPerThread; ++e)
      if (inside[e]) squares[0] += (d[e] - value[0]) * (d[e] - value[0]);
    add_over_block(squares);
  }
  if (threadIdx.x) return;
  A* to = fields + static_cast<int64_t>(blockIdx.x) * kFields<masked>;
  to[0] = value[0];
  to[1] = squares[0];
  for (int q = 0; q < 3; ++q) to[2 + q] = value[1 + q];
  if constexpr (masked) to[5] = value[4];
}

// Sum of the losses of a pair's images, for lane 0 of the warp; writes their slopes.
template <typename A, bool masked>
__device__ __forceinline__ double combine_images(const PairPoints& pair,
                                                 const A* __restrict__ fields,  // [blocks of the pair, kFields]
                                                 A* __restrict__ state,         // of the pair
                                                 int lane) {
  double loss = 0;
  for (int64_t n = lane; n < pair.N; n += kWarp) {
    double sums[3] = {}, slope[3] = {}, inside = masked ? 0 : 1;
    for (int64_t b = n * pair.pieces; b < (n + 1) * pair.pieces; ++b) {
      for (int q = 0; q < 3; ++q) sums[q] += fields[b * kFields<masked> + 2 + q];
      if constexpr (masked) inside += fields[b * kFields<masked> + 5];
    }
    // An image without points inside has no distance and no gradient.
    if (inside > 0) loss += slopes_of(sums[0], sums[1], sums[2], slope);
    for (int q = 0; q < 3; ++q) state[1 + q * pair.N + n] = static_cast<A>(slope[q] / static_cast<double>(pair.N));
  }
  for (int m = kWarp / 2; m; m /= 2) loss += __shfl_down_sync(~0u, loss, m);
  return loss;
}

// One block, a warp per pair: combines the pieces into thresholds, slopes and the loss. accumulate: add to *loss.
template <typename A, bool masked>
__global__ void __launch_bounds__(kThreads)
    combine_pieces(const __grid_constant__ LossArguments arguments,
                   const A* __restrict__ all_fields,                      // [blocks, kFields<masked>]
                   const Selection* __restrict__ selections,              // [pairs]
                   const void* __restrict__ alpha, bool alpha_is_double,  // one number, or null
                   A* __restrict__ states, A* __restrict__ loss, bool accumulate) {
  __shared__ double losses[kPairs];
  const int lane = threadIdx.x % kWarp;
  for (int number = threadIdx.x / kWarp; number < arguments.pairs; number += kWarps) {
    const PairPoints& pair = arguments.pair[number];
    const A* fields = all_fields + static_cast<int64_t>(pair.first) * kFields<masked>;
    const int64_t blocks = pair.N * pair.pieces;
    double points = masked ? 0 : static_cast<double>(pair.N * pair.P);
    double count = 0, mean = 0, squares = 0;  // of the pieces so far; "power": mean is a sum
    const auto join = [&](double n, double m, double s) {
      if (arguments.rule == Rule::power) {
        mean += m;
      } else if (n > 0) {
        const double delta = m - mean, both = count + n;
        mean += delta * (n / both);
        squares += s + delta * delta * (count * n / both);
        count = both;
      }
    };
    if (arguments.rule != Rule::hardest)
      for (int64_t b = lane; b < blocks; b += kWarp) {
        const int64_t begin = b % pair.pieces * kPiece;
        double size = static_cast<double>(min(pair.P - begin, static_cast<int64_t>(kPiece)));
        if constexpr (masked) size = fields[b * kFields<masked> + 5];
        join(size, fields[b * kFields<masked>], fields[b * kFields<masked> + 1]);
      }
    if constexpr (masked) {
      for (int64_t b = lane; b < blocks; b += kWarp) points += fields[b * kFields<masked> + 5];
      for (int m = kWarp / 2; m; m /= 2) points += __shfl_down_sync(~0u, points, m);
    }
    for (int m = kWarp / 2; m; m /= 2) {
      const double n = __shfl_down_sync(~0u, count, m), other = __shfl_down_sync(~0u, mean, m),
                   s = __shfl_down_sync(~0u, squares, m);
      if (lane < m) join(n, other, s);
    }
    A* state = states + pair.state;
    const double pair_loss = combine_images<A, masked>(pair, fields, state, lane);
    if (lane) continue;
    losses[number] = pair_loss / static_cast<double>(pair.N);  // NaN without images, like the mean of an empty tensor
    double threshold = -INFINITY;
    if (arguments.rule == Rule::power) {
      threshold = mean / points;
    } else if (arguments.rule == Rule::deviation && points > 1) {
      const double times = alpha == nullptr  ? arguments.parameter
                           : alpha_is_double ? *static_cast<const double*>(alpha)
                                             : static_cast<double>(*static_cast<const float*>(alpha));
      threshold = mean + times * std::sqrt(squares / (points - 1));
    } else if (arguments.rule == Rule::hardest && points > 0) {
      threshold = Keys<A>::distance(selections[number].prefix);
    }
    state[0] = static_cast<A>(threshold);
  }
  __syncthreads();
  if (threadIdx.x) return;
  double total = 0;
  for (int i = 0; i < arguments.pairs; ++i) total += losses[i];
  *loss = static_cast<A>(accumulate ? *loss + total : total);
}

}  // namespace
}  // namespace recontrast
