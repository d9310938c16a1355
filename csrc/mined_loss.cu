// mined_loss on the GPU; recontrast/reference.py defines it.
//
// It reads three numbers per point, where the features have hundreds, so it is bound by the latency of launches; one
// launch serves all pairs. "deviation" and "power" need two launches: summarise_pieces (each block summarises a piece,
// kPiece points) and combine_pieces (one block combines the pieces). "hardest" needs more between them
// (radix_select.cuh). Counts are integers and all other sums have a fixed order, so results are reproducible bit by
// bit.

#include "radix_select.cuh"

namespace recontrast {
namespace {

constexpr int kPointsPerThread = kPiece / kThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFields = 5;  // per piece: mean ("power": sum) of distances, squares about the mean, the three sums

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
template <typename A>
__global__ void __launch_bounds__(kThreads)
    summarise_pieces(const __grid_constant__ LossArguments arguments, const A* __restrict__ all_sums,  // flat
                     A* __restrict__ fields,         // [blocks, kFields]
                     unsigned* __restrict__ bins) {  // [pairs, kBins], zeros
  unsigned block;
  int number;
  const PairPoints& pair = arguments.find(block, number);
  const int64_t image = block / pair.pieces, begin = static_cast<int64_t>(block % pair.pieces) * kPiece;
  const int count = static_cast<int>(min(pair.P - begin, static_cast<int64_t>(kPiece)));
  const A* sums = all_sums + pair.sums;
  const int64_t volume = pair.N * pair.P, first = image * pair.P + begin;
  A value[4] = {}, d[kPointsPerThread], squares[1] = {};
  unsigned bin[kPointsPerThread];
#pragma unroll
  for (int e = 0; e < kPointsPerThread; ++e) {
    const int i = e * kThreads + threadIdx.x;
    d[e] = 0;
    bin[e] = kNoBin;
    if (i >= count) continue;
    const A xy = sums[first + i], xx = sums[first + i + volume], yy = sums[first + i + 2 * volume];
    d[e] = distance_of(xy, xx, yy);
    value[0] += arguments.rule == Rule::power && d[e] < 0 ? 0 : d[e];
    value[1] += xy;
    value[2] += xx;
    value[3] += yy;
    bin[e] = static_cast<unsigned>(Keys<A>::of(d[e]) >> (kDigit * (Keys<A>::digits - 1)));
  }
  if (arguments.rule == Rule::hardest) count_bins(bins + number * kBins, bin);
  add_over_block(value);
  if (arguments.rule == Rule::deviation) {
    value[0] /= static_cast<A>(count);
#pragma unroll
    for (int e = 0; e < kPointsPerThread; ++e)
      if (e * kThreads + threadIdx.x < count) squares[0] += (d[e] - value[0]) * (d[e] - value[0]);
    add_over_block(squares);
  }
  if (threadIdx.x) return;
  A* to = fields + static_cast<int64_t>(blockIdx.x) * kFields;
  to[0] = value[0];
  to[1] = squares[0];
  for (int q = 0; q < 3; ++q) to[2 + q] = value[1 + q];
}

// Sum of the losses of a pair's images, for lane 0 of the warp; writes their slopes.
template <typename A>
__device__ __forceinline__ double combine_images(const PairPoints& pair,
                                                 const A* __restrict__ fields,  // [blocks of the pair, kFields]
                                                 A* __restrict__ state,         // of the pair
                                                 int lane) {
  double loss = 0;
  for (int64_t n = lane; n < pair.N; n += kWarp) {
    double sums[3] = {}, slope[3];
    for (int64_t b = n * pair.pieces; b < (n + 1) * pair.pieces; ++b)
      for (int q = 0; q < 3; ++q) sums[q] += fields[b * kFields + 2 + q];
    loss += slopes_of(sums[0], sums[1], sums[2], slope);
    for (int q = 0; q < 3; ++q) state[1 + q * pair.N + n] = static_cast<A>(slope[q] / static_cast<double>(pair.N));
  }
  for (int m = kWarp / 2; m; m /= 2) loss += __shfl_down_sync(~0u, loss, m);
  return loss;
}

// One block, a warp per pair: combines the pieces into thresholds, slopes and the loss. accumulate: add to *loss.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    combine_pieces(const __grid_constant__ LossArguments arguments,
                   const A* __restrict__ all_fields,                      // [blocks, kFields]
                   const Selection* __restrict__ selections,              // [pairs]
                   const void* __restrict__ alpha, bool alpha_is_double,  // one number, or null
                   A* __restrict__ states, A* __restrict__ loss, bool accumulate) {
  __shared__ double losses[kPairs];
  const int lane = threadIdx.x % kWarp;
  for (int number = threadIdx.x / kWarp; number < arguments.pairs; number += kWarps) {
    const PairPoints& pair = arguments.pair[number];
    const A* fields = all_fields + static_cast<int64_t>(pair.first) * kFields;
    const int64_t blocks = pair.N * pair.pieces, points = pair.N * pair.P;
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
        join(static_cast<double>(min(pair.P - begin, static_cast<int64_t>(kPiece))), fields[b * kFields],
             fields[b * kFields + 1]);
      }
    for (int m = kWarp / 2; m; m /= 2) {
      const double n = __shfl_down_sync(~0u, count, m), other = __shfl_down_sync(~0u, mean, m),
                   s = __shfl_down_sync(~0u, squares, m);
      if (lane < m) join(n, other, s);
    }
    A* state = states + pair.state;
    const double pair_loss = combine_images(pair, fields, state, lane);
    if (lane) continue;
    losses[number] = pair_loss / static_cast<double>(pair.N);  // NaN without images, like the mean of an empty tensor
    double threshold = -INFINITY;
    if (arguments.rule == Rule::power) {
      threshold = mean / static_cast<double>(points);
    } else if (arguments.rule == Rule::deviation && points > 1) {
      const double times = alpha == nullptr  ? arguments.parameter
                           : alpha_is_double ? *static_cast<const double*>(alpha)
                                             : static_cast<double>(*static_cast<const float*>(alpha));
      threshold = mean + times * std::sqrt(squares / static_cast<double>(points - 1));
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

// Gradient of the sums. Blocks of kPiece points of one pair, of any of its images.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    gradient_of_sums(const __grid_constant__ LossArguments arguments, const A* __restrict__ grad,  // one number
                     const A* __restrict__ all_sums, const A* __restrict__ states, A* __restrict__ out) {
  unsigned block;
  int number;
  const PairPoints& pair = arguments.find(block, number);
  const A *sums = all_sums + pair.sums, *state = states + pair.state;
  const A threshold = state[0], loss_grad = *grad;
  const A parameter = static_cast<A>(arguments.parameter), factor = static_cast<A>(arguments.factor);
  const int64_t volume = pair.N * pair.P, begin = static_cast<int64_t>(block) * kPiece;
  const int64_t end = min(volume, begin + kPiece);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const A weight = loss_grad * weight_of(arguments.rule, distance_at(sums, pair, i), threshold, parameter, factor);
    const A* slope = state + 1 + i / pair.P;
    for (int q = 0; q < 3; ++q) out[pair.sums + i + q * volume] = weight * slope[q * pair.N];
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Arguments without pairs.
LossArguments common_arguments(const char* op, const std::string& rule, double parameter, double factor) {
  LossArguments arguments{};
  arguments.rule = rule_of(op, rule);
  arguments.parameter = parameter;
  arguments.factor = factor;
  return arguments;
}

// The launches for up to kPairs pairs, whose pieces need `total` blocks.
template <typename A>
void launch_forward(const LossArguments& arguments, unsigned total, const Tensor& sums,
                    const std::optional<Tensor>& alpha, const Tensor& state, const Tensor& loss, bool accumulate) {
  const cudaStream_t stream = current_stream(sums);
  const A* all_sums = sums.const_data_ptr<A>();
  Tensor field_memory = torch::stable::new_empty(sums, std::array<int64_t, 1>{int64_t{total} * kFields});
  A* fields = field_memory.mutable_data_ptr<A>();
  Tensor bin_memory, selection_memory;
  unsigned* bins = nullptr;
  Selection* selections = nullptr;
  if (arguments.rule == Rule::hardest) {
    bin_memory = torch::stable::new_zeros(sums, std::array<int64_t, 3>{Keys<A>::digits, arguments.pairs, kBins},
                                          ScalarType::Int);
    selection_memory = torch::stable::new_zeros(sums, std::array<int64_t, 2>{arguments.pairs, 2}, ScalarType::Long);
    bins = reinterpret_cast<unsigned*>(bin_memory.mutable_data_ptr<int32_t>());
    selections = reinterpret_cast<Selection*>(selection_memory.mutable_data_ptr<int64_t>());
  }
  if (total) launch(summarise_pieces<A>, total, kThreads, stream, arguments, all_sums, fields, bins);
  if (arguments.rule == Rule::hardest && total)
    for (int digit = 0; digit < Keys<A>::digits; ++digit, bins += arguments.pairs * kBins) {
      if (digit) launch(count_digits<A>, total, kThreads, stream, arguments, all_sums, selections, bins, digit);
      launch(select_digit, arguments.pairs, kThreads, stream, arguments, bins, selections, digit);
    }
  const void* alpha_data = alpha.has_value() ? alpha->const_data_ptr() : nullptr;
  const bool alpha_is_double = alpha.has_value() && alpha->scalar_type() == ScalarType::Double;
  launch(combine_pieces<A>, 1, kThreads, stream, arguments, fields, selections, alpha_data, alpha_is_double,
         state.mutable_data_ptr<A>(), loss.mutable_data_ptr<A>(), accumulate);
}

std::tuple<Tensor, Tensor> mined_loss(const Tensor& sums_, std::vector<int64_t> images, std::vector<int64_t> points,
                                      std::string rule, double parameter, std::optional<Tensor> alpha, double factor) {
  const int64_t length = check_mined("mined_loss", sums_, images, points);
  check_alpha("mined_loss", alpha);
  if (alpha.has_value()) check_device("mined_loss", "alpha", *alpha, sums_);
  const DeviceGuard guard(sums_.get_device());
  const Tensor sums = torch::stable::contiguous(sums_);
  Tensor loss = torch::stable::new_empty(sums, {}), state = torch::stable::new_empty(sums, std::array{length});
  bool accumulate = false;
  const LossArguments common = common_arguments("mined_loss", rule, parameter, factor);
  for_each_launch(images, points, common, true, [&](const LossArguments& arguments, unsigned total) {
    dispatch("mined_loss", sums.scalar_type(), [&](auto element) {
      launch_forward<Acc<decltype(element)>>(arguments, total, sums, alpha, state, loss, accumulate);
    });
    accumulate = true;
  });
  return {loss, state};
}

Tensor mined_loss_backward(const Tensor& grad, const Tensor& sums_, const Tensor& state_, std::vector<int64_t> images,
                           std::vector<int64_t> points, std::string rule, double parameter, double factor) {
  const int64_t length = check_mined("mined_loss_backward", sums_, images, points);
  check_flat("mined_loss_backward", "state", state_, length, sums_.scalar_type());
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == sums_.scalar_type(),
                  "mined_loss_backward: grad: wanted one number of the dtype of sums, got ", shape(grad));
  check_device("mined_loss_backward", "grad", grad, sums_);
  check_device("mined_loss_backward", "state", state_, sums_);
  const DeviceGuard guard(sums_.get_device());
  const Tensor sums = torch::stable::contiguous(sums_), state = torch::stable::contiguous(state_);
  Tensor out = torch::stable::empty_like(sums);
  const LossArguments common = common_arguments("mined_loss_backward", rule, parameter, factor);
  for_each_launch(images, points, common, false, [&](const LossArguments& arguments, unsigned total) {
    if (total == 0) return;
    dispatch("mined_loss_backward", sums.scalar_type(), [&](auto element) {
      using A = Acc<decltype(element)>;
      launch(gradient_of_sums<A>, total, kThreads, current_stream(sums), arguments, grad.const_data_ptr<A>(),
             sums.const_data_ptr<A>(), state.const_data_ptr<A>(), out.mutable_data_ptr<A>());
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CUDA, m) {
  m.impl("mined_loss", TORCH_BOX(&mined_loss));
  m.impl("mined_loss_backward", TORCH_BOX(&mined_loss_backward));
}

}  // namespace recontrast
