// cosine_sums on the GPU; recontrast/reference.py defines it.
//
// Memory-bound: each feature is read once, in place, 16 bytes per thread, kUnroll loads of each tensor in flight before
// the first is used. "By planes" (NCHW and all other layouts) a thread sums a few neighbouring positions, and the
// threads of a block split the channels; the fewer the positions, the more threads per position. "By rows"
// (channels_last) the lanes of one position read along its channels. One launch processes all pairs of a group, so
// small levels occupy the multiprocessors that large ones leave idle. If all positions together are too few for the
// GPU, blocks split the channels too: each writes partial sums, and a second launch adds them. There are no atomics;
// the order of the sums depends only on the shapes and the number of multiprocessors.

#include "cosine_sums_backward.cuh"

namespace recontrast {
namespace {

constexpr int kSegment = 64;     // bytes that neighbouring threads read at least: two memory sectors
constexpr int kLine = 128;       // bytes of a cache line
constexpr int kResident = 2048;  // threads per multiprocessor at most

// ---- sums ----------------------------------------------------------------------------------------------------------

// The channels [begin, end) that this block sums, and where it writes the sums. `block` becomes the index among the
// blocks that cover the positions, `width` positions each.
struct ChannelSplit {
  int part, begin, end;

  __device__ __forceinline__ ChannelSplit(const Pair& pair, unsigned& block, int width) {
    const unsigned across = (pair.size.count + width - 1) / width;
    part = static_cast<int>(block / across);
    block %= across;
    begin = part * pair.share;
    end = min(pair.size.C, begin + pair.share);
  }
  template <typename A>
  __device__ __forceinline__ A* sums(const Pair& pair) const {
    if (pair.parts == nullptr) return static_cast<A*>(pair.sums);
    return static_cast<A*>(pair.parts) + static_cast<int64_t>(part) * 3 * pair.size.count;
  }
};

// Threads (lanes, channel groups): a lane has S::V positions, a channel group every `step`-th channel.
template <typename S>
__global__ void __launch_bounds__(kThreads, S::V == 8 ? 2 : kBlocks)
    sums_by_planes(const __grid_constant__ Group group) {
  using A = typename S::A;
  constexpr int V = S::V;  // with 8, only two blocks have registers for all loads of a batch
  unsigned block;
  const Pair& pair = group.find(block);
  const FeatureSize size = pair.size;
  const int lanes = pair.lanes, step = kThreads / lanes, width = lanes * V;
  const int thread = threadIdx.x, lane = thread % lanes, channel_group = thread / lanes;
  const ChannelSplit split(pair, block, width);
  const unsigned first = block * width + lane * V;
  A sum[3][V] = {};
  if (first < size.count) {
    const S xs(pair.x, first, size), ys(pair.y, first, size);
    for (int c = split.begin + channel_group; c < split.end; c += kUnroll * step) {
      const LoadBatch<S> batch(xs, ys, c, step, split.end);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A a = xs.get(batch.x[u], v), b = ys.get(batch.y[u], v);
          sum[0][v] += a * b;
          sum[1][v] += a * a;
          sum[2][v] += b * b;
        }
    }
  }
  // Adds up the channel groups of a warp, then the warps.
  __shared__ A part[kThreads / kWarp][3][kWarp * V];
#pragma unroll
  for (int q = 0; q < 3; ++q)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      for (int m = lanes; m < kWarp; m *= 2) sum[q][v] += __shfl_xor_sync(~0u, sum[q][v], m);
      if (thread % kWarp < lanes) part[thread / kWarp][q][lane * V + v] = sum[q][v];
    }
  __syncthreads();
  A* sums = split.sums<A>(pair);
  for (int i = thread; i < 3 * width; i += kThreads) {
    const int q = i / width, j = i % width;
    A total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += part[w][q][j];
    if (block * width + j < size.count) sums[static_cast<int64_t>(q) * size.count + block * width + j] = total;
  }
}

// Threads (lanes, positions): the lanes of a position read along its channels, S::V at a time.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) sums_by_rows(const __grid_constant__ Group group) {
  using A = typename S::A;
  unsigned block;
  const Pair& pair = group.find(block);
  const FeatureSize size = pair.size;
  const int lanes = pair.lanes, step = lanes * S::V, lane = threadIdx.x % lanes;
  const ChannelSplit split(pair, block, kThreads / lanes);
  const unsigned position = block * (kThreads / lanes) + threadIdx.x / lanes;
  A sum[3] = {};
  if (position < size.count) {
    const S xs(pair.x, position, size), ys(pair.y, position, size);
    for (int c = split.begin + lane * S::V; c < split.end; c += kUnroll * step) {
      const LoadBatch<S> batch(xs, ys, c, step, split.end);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < S::V; ++v) {
          const A a = xs.get(batch.x[u], v), b = ys.get(batch.y[u], v);
          sum[0] += a * b;
          sum[1] += a * a;
          sum[2] += b * b;
        }
    }
  }
  A* sums = split.sums<A>(pair);
#pragma unroll
  for (int q = 0; q < 3; ++q) {
    for (int m = lanes / 2; m; m /= 2) sum[q] += __shfl_xor_sync(~0u, sum[q], m);
    if (lane == 0 && position < size.count) sums[static_cast<int64_t>(q) * size.count + position] = sum[q];
  }
}

// Adds the partial sums of the pairs that have them, in order.
template <typename A>
__global__ void __launch_bounds__(kThreads) add_parts(const __grid_constant__ Group group) {
  unsigned block;
  const Pair& pair = group.find(block);
  const int64_t volume = 3 * static_cast<int64_t>(pair.size.count);
  const int64_t i = static_cast<int64_t>(block) * kThreads + threadIdx.x;
  if (i >= volume) return;
  const A* parts = static_cast<const A*>(pair.parts) + i;
  A total = 0;
  for (int c = 0; c < pair.size.C; c += pair.share, parts += volume) total += *parts;
  static_cast<A*>(pair.sums)[i] = total;
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Lanes by planes: fewer, down to kSegment bytes, while there are too few blocks to occupy the GPU.
template <typename S>
int plane_lanes(const Group& group) {
  int lanes = kWarp;
  while (lanes * S::bytes > kSegment && positions_of(group) < 8 * processors() * lanes * S::V) lanes /= 2;
  return lanes;
}

// Lanes by rows: one cache line, because adding up lanes takes time; more for few positions, fewer for few channels.
template <typename S>
int row_lanes(const Group& group, const FeatureSize& size) {
  int lanes = std::min(kLine / S::bytes, kWarp);
  while (lanes < kWarp && positions_of(group) * lanes < kResident * processors()) lanes *= 2;
  while (lanes > 1 && lanes / 2 * S::V >= size.C) lanes /= 2;
  return lanes;
}

// Sets the first block of each pair and launches the kernel. blocks_of: number of blocks for a pair.
template <typename Blocks>
void launch_group(void (*kernel)(Group), Group& group, cudaStream_t stream, const Blocks& blocks_of) {
  int64_t total = 0;
  for (int i = 0; i < group.pairs; ++i) {
    group.pair[i].first = static_cast<unsigned>(total);
    total += blocks_of(group.pair[i]);
  }
  STD_TORCH_CHECK(total < int64_t{1} << 31, "cosine_sums: too many positions for one launch");
  launch(kernel, static_cast<unsigned>(total), kThreads, stream, group);
}

// Splits the channels of the pairs between blocks until there are kBlocks blocks per multiprocessor, or one load per
// thread. across_of: number of blocks that cover the positions of a pair; step_of: channels that the threads of a block
// load at once. Returns the memory of the partial sums, if any.
template <typename A, typename Across, typename Step>
Tensor split_channels(Group& group, const Tensor& like, const Across& across_of, const Step& step_of) {
  int64_t total = 0, volume = 0;
  for (int i = 0; i < group.pairs; ++i) total += across_of(group.pair[i]);
  const int64_t wanted = blocks(kBlocks * processors(), total);
  const auto parts_of = [&](Pair& pair) -> int64_t {
    const int64_t step = step_of(pair), steps = std::max<int64_t>(blocks(pair.size.C, step), 1);
    pair.share = static_cast<int>(step * blocks(steps, std::min(steps, wanted)));
    return std::max<int64_t>(blocks(pair.size.C, pair.share), 1);
  };
  for (int i = 0; i < group.pairs; ++i) {
    const int64_t parts = parts_of(group.pair[i]);
    if (parts > 1) volume += 3 * parts * group.pair[i].size.count;
  }
  if (volume == 0) return {};
  Tensor partial_sums = torch::stable::new_empty(like, std::array<int64_t, 1>{volume});
  A* next = partial_sums.mutable_data_ptr<A>();
  for (int i = 0; i < group.pairs; ++i) {
    Pair& pair = group.pair[i];
    const int64_t parts = parts_of(pair);
    if (parts == 1) continue;
    pair.parts = next;
    next += 3 * parts * pair.size.count;
  }
  return partial_sums;
}

// Computes the sums of the pairs or, if `backward`, the gradient of the features. sums: the sums or their gradient.
void run(const char* op, const std::vector<Pair>& pairs, bool backward, const Tensor& sums) {
  const cudaStream_t stream = current_stream(sums);
  for_each_launch(pairs, backward, sums.scalar_type(), [&](const Kind& kind, Group group) {
    with_access(op, kind, [&](auto tag) {
      using S = typename decltype(tag)::type;
      using A = typename S::A;
      const bool rows = S::by_rows && kind.rows;
      for (int i = 0; i < group.pairs; ++i)
        group.pair[i].lanes = rows ? row_lanes<S>(group, group.pair[i].size) : backward ? kWarp : plane_lanes<S>(group);
      const auto across = [&](const Pair& pair) -> int64_t {  // blocks that cover the positions
        return blocks(pair.size.count, rows ? kThreads / pair.lanes : pair.lanes * S::V);
      };
      if (backward) {
        if constexpr (S::by_rows)
          if (rows) return launch_group(gradient_by_rows<S>, group, stream, across);
        return launch_group(gradient_by_planes<S>, group, stream,
                            [&](const Pair& pair) { return across(pair) * blocks(pair.size.C, kChannels); });
      }
      const auto step = [&](const Pair& pair) { return rows ? pair.lanes * S::V : kThreads / pair.lanes; };
      const Tensor parts = split_channels<A>(group, sums, across, step);
      const auto blocks_of = [&](const Pair& pair) {
        return across(pair) * std::max(1u, blocks(pair.size.C, pair.share));
      };
      auto* kernel = sums_by_planes<S>;
      if constexpr (S::by_rows) kernel = rows ? sums_by_rows<S> : kernel;
      launch_group(kernel, group, stream, blocks_of);
      if (parts.defined())
        launch_group(add_parts<A>, group, stream, [](const Pair& pair) -> int64_t {
          return pair.parts == nullptr ? 0 : blocks(3 * static_cast<int64_t>(pair.size.count), kThreads);
        });
    });
  });
}

// ---- operators -----------------------------------------------------------------------------------------------------

// The pair whose sums, or their gradient, start at element `first` of `sums`.
Pair pair_of(const char* op, const Tensor& x, const Tensor& y, const Tensor& sums, int64_t first) {
  char* pair_sums = static_cast<char*>(const_cast<void*>(sums.const_data_ptr())) + first * sums.element_size();
  return {view_of(x), view_of(y), {}, pair_sums, size_of(op, x), nullptr, 0, 0, 0};
}

Tensor cosine_sums(const Tensor& x, const Tensor& y) {
  check_pair("cosine_sums", x, y);
  check_device("cosine_sums", "y", y, x);
  const DeviceGuard guard(x.get_device());
  const ScalarType acc = acc_type(x, y);
  Tensor out = torch::stable::new_empty(x, std::array<int64_t, 4>{3, x.size(0), x.size(2), x.size(3)}, acc);
  if (out.numel()) run("cosine_sums", {pair_of("cosine_sums", x, y, out, 0)}, false, out);
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
  for (size_t i = 0; i < x.size(); first += sums_length(x[i++]))
    if (sums_length(x[i])) pairs.push_back(pair_of("cosine_sums_group", x[i], y[i], out, first));
  run("cosine_sums_group", pairs, false, out);
  return out;
}

Tensor cosine_sums_backward(const Tensor& grad_, const Tensor& x, const Tensor& y) {
  const ScalarType acc = acc_type(x, y);
  check_pair("cosine_sums_backward", x, y);
  check_gradient("cosine_sums_backward", grad_, y, acc);
  check_device("cosine_sums_backward", "x", x, grad_);
  check_device("cosine_sums_backward", "y", y, grad_);
  const DeviceGuard guard(x.get_device());
  const Tensor grad = torch::stable::contiguous(grad_);  // copies little: it has no channels
  Tensor out = torch::stable::empty_like(y);
  if (out.numel() == 0) return out;
  Pair pair = pair_of("cosine_sums_backward", x, y, grad, 0);
  pair.dy = view_of(out);
  run("cosine_sums_backward", {pair}, true, grad);
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
  for (size_t i = 0; i < x.size(); first += sums_length(x[i++])) {
    out.push_back(torch::stable::empty_like(y[i]));
    if (out[i].numel() == 0) continue;
    pairs.push_back(pair_of("cosine_sums_group_backward", x[i], y[i], grad, first));
    pairs.back().dy = view_of(out[i]);
  }
  run("cosine_sums_group_backward", pairs, true, grad);
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
