// mined_loss on the GPU. What it computes: recontrast/reference.py.
//
// Three numbers a point, against hundreds of the features: bound by the latency of launches, so that all pairs share
// each of them. "deviation" and "power" take two: pieces (what a block of points says of itself), then finish (one
// block puts the pieces together); "hardest" takes more between them (hardest.h). Counts are whole numbers and all
// other sums have a fixed order, so results repeat to the bit.

#include "radix_select.cuh"

namespace recontrast {
namespace {

constexpr int kEach = kPiece / kThreads;  // points of a thread
constexpr int kWarps = kThreads / kWarp;
constexpr int kFields = 5;  // of a piece: mean (or sum) of distances, squares about it, and the three sums

// Sums over a block, given to all its threads.
template <int count, typename A>
__device__ void add_up(A (&value)[count]) {
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
  __syncthreads();  // a second call writes where this one reads
}

// What kPiece points of an image say: kFields numbers, and for "hardest" the first digits of their distances.
template <typename A>
__global__ void __launch_bounds__(kThreads) pieces(const __grid_constant__ Work work, const A* __restrict__ all,
                                                   A* __restrict__ fields,         // [blocks, kFields]
                                                   unsigned* __restrict__ bins) {  // [pairs, kBins], zeros
  unsigned block;
  int number;
  const Member& pair = work.mine(block, number);
  const int64_t image = block / pair.pieces, begin = static_cast<int64_t>(block % pair.pieces) * kPiece;
  const int count = static_cast<int>(min(pair.P - begin, static_cast<int64_t>(kPiece)));
  const A* sums = all + pair.sums;
  const int64_t volume = pair.N * pair.P, first = image * pair.P + begin;
  A value[4] = {}, d[kEach], squares[1] = {};
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = e * kThreads + threadIdx.x;
    d[e] = 0;
    if (i >= count) continue;
    const A xy = sums[first + i], xx = sums[first + i + volume], yy = sums[first + i + 2 * volume];
    d[e] = distance_of(xy, xx, yy);
    value[0] += work.rule == Rule::power && d[e] < 0 ? 0 : d[e];
    value[1] += xy;
    value[2] += xx;
    value[3] += yy;
    if (work.rule == Rule::hardest)
      atomicAdd(bins + number * kBins + (Keys<A>::of(d[e]) >> (kDigit * (Keys<A>::digits - 1))), 1u);
  }
  add_up(value);
  if (work.rule == Rule::deviation) {
    value[0] /= static_cast<A>(count);
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      if (e * kThreads + threadIdx.x < count) squares[0] += (d[e] - value[0]) * (d[e] - value[0]);
    add_up(squares);
  }
  if (threadIdx.x) return;
  A* to = fields + static_cast<int64_t>(blockIdx.x) * kFields;
  to[0] = value[0];
  to[1] = squares[0];
  for (int q = 0; q < 3; ++q) to[2 + q] = value[1 + q];
}

// One block, a warp for each pair: pieces -> threshold, slopes and loss.
template <typename A>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Work work,
                                                   const A* __restrict__ fields,               // [blocks, kFields]
                                                   const Found* __restrict__ found,            // [pairs]
                                                   const void* __restrict__ alpha, bool wide,  // float32 or float64
                                                   A* __restrict__ states, A* __restrict__ loss, bool further) {
  __shared__ double losses[kPairs];
  const int lane = threadIdx.x % kWarp;
  for (int number = threadIdx.x / kWarp; number < work.pairs; number += kWarps) {
    const Member& pair = work.pair[number];
    const A* from = fields + static_cast<int64_t>(pair.first) * kFields;
    const int64_t blocks = pair.N * pair.pieces, points = pair.N * pair.P;
    double count = 0, mean = 0, squares = 0;  // of the pieces so far; "power": mean is a sum
    const auto join = [&](double n, double m, double s) {
      if (work.rule == Rule::power) {
        mean += m;
      } else if (n > 0) {
        const double delta = m - mean, both = count + n;
        mean += delta * (n / both);
        squares += s + delta * delta * (count * n / both);
        count = both;
      }
    };
    if (work.rule != Rule::hardest)
      for (int64_t b = lane; b < blocks; b += kWarp) {
        const int64_t begin = b % pair.pieces * kPiece;
        join(static_cast<double>(min(pair.P - begin, static_cast<int64_t>(kPiece))), from[b * kFields],
             from[b * kFields + 1]);
      }
    for (int m = kWarp / 2; m; m /= 2) {
      const double n = __shfl_down_sync(~0u, count, m), other = __shfl_down_sync(~0u, mean, m),
                   s = __shfl_down_sync(~0u, squares, m);
      if (lane < m) join(n, other, s);
    }
    double of_pair = 0;
    A* state = states + pair.state;
    for (int64_t n = lane; n < pair.N; n += kWarp) {
      double sums[3] = {}, slope[3];
      for (int64_t b = n * pair.pieces; b < (n + 1) * pair.pieces; ++b)
        for (int q = 0; q < 3; ++q) sums[q] += from[b * kFields + 2 + q];
      of_pair += slopes_of(sums[0], sums[1], sums[2], slope);
      for (int q = 0; q < 3; ++q) state[1 + q * pair.N + n] = static_cast<A>(slope[q] / static_cast<double>(pair.N));
    }
    for (int m = kWarp / 2; m; m /= 2) of_pair += __shfl_down_sync(~0u, of_pair, m);
    if (lane) continue;
    losses[number] = of_pair / static_cast<double>(pair.N);  // of no image: no number, as a mean over nothing
    double threshold = -INFINITY;
    if (work.rule == Rule::power) {
      threshold = mean / static_cast<double>(points);
    } else if (work.rule == Rule::deviation && points > 1) {
      const double times = alpha == nullptr ? work.parameter
                           : wide           ? *static_cast<const double*>(alpha)
                                            : static_cast<double>(*static_cast<const float*>(alpha));
      threshold = mean + times * std::sqrt(squares / static_cast<double>(points - 1));
    } else if (work.rule == Rule::hardest && points > 0) {
      threshold = Keys<A>::distance(found[number].prefix);
    }
    state[0] = static_cast<A>(threshold);
  }
  __syncthreads();
  if (threadIdx.x) return;
  double total = 0;
  for (int i = 0; i < work.pairs; ++i) total += losses[i];
  *loss = static_cast<A>(further ? *loss + total : total);
}

// Blocks of kPiece points of a pair, whatever their image.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    weigh(const __grid_constant__ Work work, const A* __restrict__ grad, const A* __restrict__ all,
          const A* __restrict__ states, A* __restrict__ out) {
  unsigned block;
  int number;
  const Member& pair = work.mine(block, number);
  const A *sums = all + pair.sums, *state = states + pair.state;
  const A threshold = state[0], of_loss = *grad;
  const A parameter = static_cast<A>(work.parameter), factor = static_cast<A>(work.factor);
  const int64_t volume = pair.N * pair.P, begin = static_cast<int64_t>(block) * kPiece;
  const int64_t end = min(volume, begin + kPiece);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const A weight = of_loss * weight_of(work.rule, distance_at(sums, pair, i), threshold, parameter, factor);
    const A* slope = state + 1 + i / pair.P;
    for (int q = 0; q < 3; ++q) out[pair.sums + i + q * volume] = weight * slope[q * pair.N];
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

Work work_of(const char* op, const std::string& rule, double parameter, double factor) {
  Work work{};
  work.rule = rule_of(op, rule);
  work.parameter = parameter;
  work.factor = factor;
  return work;
}

std::tuple<Tensor, Tensor> mined_loss(const Tensor& sums_, std::vector<int64_t> images, std::vector<int64_t> points,
                                      std::string rule, double parameter, std::optional<Tensor> alpha, double factor) {
  const int64_t length = check_mined("mined_loss", sums_, images, points);
  check_alpha("mined_loss", alpha);
  if (alpha.has_value()) check_device("mined_loss", "alpha", *alpha, sums_);
  const DeviceGuard guard(sums_.get_device());
  const Tensor sums = torch::stable::contiguous(sums_);
  const cudaStream_t stream = current_stream(sums);
  Tensor loss = torch::stable::new_empty(sums, {}), state = torch::stable::new_empty(sums, std::array{length});
  const void* level = alpha.has_value() ? alpha->const_data_ptr() : nullptr;
  const bool wide = alpha.has_value() && alpha->scalar_type() == ScalarType::Double;
  bool further = false;
  in_groups(images, points, work_of("mined_loss", rule, parameter, factor), true,
            [&](const Work& work, unsigned total) {
              dispatch("mined_loss", sums.scalar_type(), [&](auto element) {
                using A = Acc<decltype(element)>;
                const A* from = sums.const_data_ptr<A>();
                Tensor fields = torch::stable::new_empty(sums, std::array<int64_t, 1>{int64_t{total} * kFields});
                A* parts = fields.mutable_data_ptr<A>();
                Tensor bins, places;
                unsigned* counts = nullptr;
                Found* found = nullptr;
                if (work.rule == Rule::hardest) {
                  bins = torch::stable::new_zeros(sums, std::array<int64_t, 3>{Keys<A>::digits, work.pairs, kBins},
                                                  ScalarType::Int);
                  places = torch::stable::new_zeros(sums, std::array<int64_t, 2>{work.pairs, 2}, ScalarType::Long);
                  counts = reinterpret_cast<unsigned*>(bins.mutable_data_ptr<int32_t>());
                  found = reinterpret_cast<Found*>(places.mutable_data_ptr<int64_t>());
                }
                if (total) launch(pieces<A>, total, kThreads, stream, work, from, parts, counts);
                if (work.rule == Rule::hardest && total)
                  for (int turn = 0; turn < Keys<A>::digits; ++turn, counts += work.pairs * kBins) {
                    if (turn) launch(refine<A>, total, kThreads, stream, work, from, found, counts, turn);
                    launch(select, work.pairs, kThreads, stream, work, counts, found, turn);
                  }
                launch(finish<A>, 1, kThreads, stream, work, parts, found, level, wide, state.mutable_data_ptr<A>(),
                       loss.mutable_data_ptr<A>(), further);
              });
              further = true;
            });
  return {loss, state};
}

Tensor mined_loss_backward(const Tensor& grad, const Tensor& sums_, const Tensor& state_, std::vector<int64_t> images,
                           std::vector<int64_t> points, std::string rule, double parameter, double factor) {
  const int64_t length = check_mined("mined_loss_backward", sums_, images, points);
  check_flat("mined_loss_backward", "state", state_, length, sums_.scalar_type());
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == sums_.scalar_type(),
                  "mined_loss_backward: grad must be one number of the dtype of sums, got ", shape(grad));
  check_device("mined_loss_backward", "grad", grad, sums_);
  check_device("mined_loss_backward", "state", state_, sums_);
  const DeviceGuard guard(sums_.get_device());
  const Tensor sums = torch::stable::contiguous(sums_), state = torch::stable::contiguous(state_);
  Tensor out = torch::stable::empty_like(sums);
  const Work like = work_of("mined_loss_backward", rule, parameter, factor);
  in_groups(images, points, like, false, [&](const Work& work, unsigned total) {
    if (total == 0) return;
    dispatch("mined_loss_backward", sums.scalar_type(), [&](auto element) {
      using A = Acc<decltype(element)>;
      launch(weigh<A>, total, kThreads, current_stream(sums), work, grad.const_data_ptr<A>(), sums.const_data_ptr<A>(),
             state.const_data_ptr<A>(), out.mutable_data_ptr<A>());
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
