// cosine_sums on the GPU. What it computes: recontrast/reference.py.
//
// Memory-bound: each feature is read once, in place, 16 bytes a thread, kUnroll loads of each tensor in flight before
// the first is used. "By planes" (NCHW, and whatever is neither) a thread owns a few neighbouring positions, and the
// threads of a block share the channels, the more the fewer positions there are; "by rows" (channels_last) the lanes of
// one position run along its channels. Sums are added in an order that only the shape decides, without atomics. All
// pairs of a group go into one launch: the small levels fill what the large ones leave of the chip.

#include "group.h"

namespace recontrast {
namespace {

constexpr int kSegment = 64;     // bytes at least that neighbouring threads read: two sectors of memory
constexpr int kLine = 128;       // bytes of a cache line
constexpr int kResident = 2048;  // threads of a multiprocessor
constexpr int kChannels = 64;    // channels of a backward block: two rounds, so that weights are read rarely
constexpr int kBlocks = 3;       // a multiprocessor holds at least: bounds the registers without a spill

// ---- sums ----------------------------------------------------------------------------------------------------------

// Threads (lanes, channel groups): lane -> S::V positions, group -> every so many-th channel.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) sums_by_planes(const __grid_constant__ Group all) {
  using A = typename S::A;
  constexpr int V = S::V;
  unsigned block;
  const Pair& pair = all.mine(block);
  const Size size = pair.size;
  const int lanes = pair.lanes, step = kThreads / lanes, width = lanes * V;
  const int thread = threadIdx.x, lane = thread % lanes, group = thread / lanes;
  const unsigned first = block * width + lane * V;
  A sum[3][V] = {};
  if (first < size.count) {
    const S xs(pair.x, first, size), ys(pair.y, first, size);
    for (int c = group; c < size.C; c += kUnroll * step) {
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
#pragma unroll
  for (int q = 0; q < 3; ++q)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      for (int m = lanes; m < kWarp; m *= 2) sum[q][v] += __shfl_xor_sync(~0u, sum[q][v], m);
      if (thread % kWarp < lanes) part[thread / kWarp][q][lane * V + v] = sum[q][v];
    }
  __syncthreads();
  A* sums = static_cast<A*>(pair.sums);
  for (int i = thread; i < 3 * width; i += kThreads) {
    const int q = i / width, j = i % width;
    A total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += part[w][q][j];
    if (block * width + j < size.count) sums[static_cast<int64_t>(q) * size.count + block * width + j] = total;
  }
}

// Threads (lanes, positions): the lanes of a position run along its channels, S::V at a time.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) sums_by_rows(const __grid_constant__ Group all) {
  using A = typename S::A;
  unsigned block;
  const Pair& pair = all.mine(block);
  const Size size = pair.size;
  const int lanes = pair.lanes, step = lanes * S::V, lane = threadIdx.x % lanes;
  const unsigned position = block * (kThreads / lanes) + threadIdx.x / lanes;
  A sum[3] = {};
  if (position < size.count) {
    const S xs(pair.x, position, size), ys(pair.y, position, size);
    for (int c = lane * S::V; c < size.C; c += kUnroll * step) {
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
  A* sums = static_cast<A*>(pair.sums);
#pragma unroll
  for (int q = 0; q < 3; ++q) {
    for (int m = lanes / 2; m; m /= 2) sum[q] += __shfl_xor_sync(~0u, sum[q], m);
    if (lane == 0 && position < size.count) sums[static_cast<int64_t>(q) * size.count + position] = sum[q];
  }
}

// ---- gradient ------------------------------------------------------------------------------------------------------

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

// ---- launches ------------------------------------------------------------------------------------------------------

// Lanes by planes: as few as keep reads whole while blocks are too few to fill the chip.
template <typename S>
int plane_lanes(const Group& group) {
  int lanes = kWarp;
  while (lanes * S::bytes > kSegment && positions_of(group) < 4 * processors() * lanes * S::V) lanes /= 2;
  return lanes;
}

// Lanes by rows: a cache line, as adding up lanes costs time; more for few positions, fewer for few channels.
template <typename S>
int row_lanes(const Group& group, const Size& size) {
  int lanes = std::min(kLine / S::bytes, kWarp);
  while (lanes < kWarp && positions_of(group) * lanes < kResident * processors()) lanes *= 2;
  while (lanes > 1 && lanes / 2 * S::V >= size.C) lanes /= 2;
  return lanes;
}

// Sets the lanes and first block of each pair, and launches.
template <typename Lanes, typename Blocks>
void start(void (*kernel)(Group), Group group, cudaStream_t stream, const Lanes& lanes_of, const Blocks& blocks_of) {
  int64_t total = 0;
  for (int i = 0; i < group.pairs; ++i) {
    Pair& pair = group.pair[i];
    pair.lanes = lanes_of(pair.size);
    pair.first = static_cast<unsigned>(total);
    total += blocks_of(pair);
  }
  STD_TORCH_CHECK(total < int64_t{1} << 31, "cosine_sums: too many positions for one launch");
  launch(kernel, static_cast<unsigned>(total), kThreads, stream, group);
}

// The sums of the pairs, or their gradient.
void run(const char* op, const std::vector<Pair>& pairs, bool backward, ScalarType acc, cudaStream_t stream) {
  in_groups(pairs, backward, acc, [&](const Kind& kind, const Group& group) {
    with_source(op, kind, [&](auto tag) {
      using S = typename decltype(tag)::type;
      if constexpr (S::by_rows)
        if (kind.rows)
          return start(
              backward ? gradient_by_rows<S> : sums_by_rows<S>, group, stream,
              [&](const Size& size) { return row_lanes<S>(group, size); },
              [](const Pair& pair) { return blocks(pair.size.count, kThreads / pair.lanes); });
      start(
          backward ? gradient_by_planes<S> : sums_by_planes<S>, group, stream,
          [&](const Size&) { return backward ? kWarp : plane_lanes<S>(group); },
          [&](const Pair& pair) {
            const int64_t across = blocks(pair.size.count, pair.lanes * S::V);
            return backward ? across * blocks(pair.size.C, kChannels) : across;
          });
    });
  });
}

// ---- operators -----------------------------------------------------------------------------------------------------

// The pair whose sums are, or will be, at element `first` of `sums`.
Pair pair_of(const char* op, const Tensor& x, const Tensor& y, const Tensor& sums, int64_t first) {
  char* at = static_cast<char*>(const_cast<void*>(sums.const_data_ptr())) + first * sums.element_size();
  return {features(x), features(y), {}, at, size_of(op, x), 0, 0};
}

Tensor cosine_sums(const Tensor& x, const Tensor& y) {
  check_pair("cosine_sums", x, y);
  check_device("cosine_sums", "y", y, x);
  const DeviceGuard guard(x.get_device());
  const ScalarType acc = acc_type(x, y);
  Tensor out = torch::stable::new_empty(x, std::array<int64_t, 4>{3, x.size(0), x.size(2), x.size(3)}, acc);
  if (out.numel()) run("cosine_sums", {pair_of("cosine_sums", x, y, out, 0)}, false, acc, current_stream(x));
  return out;
}

Tensor cosine_sums_group(std::vector<Tensor> x, std::vector<Tensor> y) {
  const auto [acc, total] = check_group("cosine_sums_group", x, y);
  for (const auto* list : {&x, &y})
    for (const Tensor& t : *list) check_device("cosine_sums_group", "each feature", t, x[0]);
  const DeviceGuard guard(x[0].get_device());
  Tensor out = torch::stable::new_empty(x[0], std::array<int64_t, 1>{total}, acc);
  std::vector<Pair> pairs;
  int64_t first = 0;
  for (size_t i = 0; i < x.size(); first += sums_of(x[i++]))
    if (sums_of(x[i])) pairs.push_back(pair_of("cosine_sums_group", x[i], y[i], out, first));
  run("cosine_sums_group", pairs, false, acc, current_stream(x[0]));
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
  Pair pair = pair_of("cosine_sums_backward", x, y, grad, 0);
  pair.dy = features(out);
  run("cosine_sums_backward", {pair}, true, acc, current_stream(x));
  return out;
}

std::vector<Tensor> cosine_sums_group_backward(const Tensor& grad_, std::vector<Tensor> x, std::vector<Tensor> y) {
  const auto [acc, total] = check_group("cosine_sums_group_backward", x, y);
  check_flat("cosine_sums_group_backward", "grad", grad_, total, acc);
  for (const auto* list : {&x, &y})
    for (const Tensor& t : *list) check_device("cosine_sums_group_backward", "each feature", t, grad_);
  const DeviceGuard guard(grad_.get_device());
  const Tensor grad = torch::stable::contiguous(grad_);
  std::vector<Tensor> out;
  std::vector<Pair> pairs;
  int64_t first = 0;
  for (size_t i = 0; i < x.size(); first += sums_of(x[i++])) {
    out.push_back(torch::stable::empty_like(y[i]));
    if (out[i].numel() == 0) continue;
    pairs.push_back(pair_of("cosine_sums_group_backward", x[i], y[i], grad, first));
    pairs.back().dy = features(out[i]);
  }
  run("cosine_sums_group_backward", pairs, true, acc, current_stream(grad));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CUDA, m) {
  m.impl("cosine_sums", TORCH_BOX(&cosine_sums));
  m.impl("cosine_sums_backward", TORCH_BOX(&cosine_sums_backward));
  m.impl("cosine_sums_group", TORCH_BOX(&cosine_sums_group));
  m.impl("cosine_sums_group_backward", TORCH_BOX(&cosine_sums_group_backward));
}

}  // namespace recontrast
