// mined_loss on the GPU; recontrast/reference.py defines it.
//
// It reads three numbers per point, where the features have hundreds, so it is bound by the latency of launches; one
// launch serves all pairs. "deviation" and "power" need two launches: summarise_pieces (each block summarises a piece,
// kPiece points) and combine_pieces (one block combines the pieces). "hardest" needs more between them
// (radix_select.cuh). With a mask, each piece also counts its points inside. Counts are integers and all other sums
// have a fixed order, so results are reproducible bit by bit.

#include "mined_pieces.cuh"

namespace recontrast {
namespace {

// Gradient of the sums. Blocks of kPiece points of one pair, of any of its images.
template <typename A, bool masked>
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
    if (masked && !arguments.counts(pair, i)) {
      for (int q = 0; q < 3; ++q) out[pair.sums + i + q * volume] = 0;
      continue;
    }
    const A weight = loss_grad * weight_of(arguments.rule, distance_at(sums, pair, i), threshold, parameter, factor);
    const A* slope = state + 1 + i / pair.P;
    for (int q = 0; q < 3; ++q) out[pair.sums + i + q * volume] = weight * slope[q * pair.N];
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Arguments without pairs. mask: contiguous, or null.
LossArguments common_arguments(const char* op, const std::string& rule, double parameter, double factor,
                               const Tensor* mask, bool shared) {
  LossArguments arguments{};
  arguments.rule = rule_of(op, rule);
  arguments.parameter = parameter;
  arguments.factor = factor;
  if (mask != nullptr) arguments.inside = {mask->const_data_ptr<bool>(), shared};
  return arguments;
}

// The launches for up to kPairs pairs, whose pieces need `total` blocks.
template <typename A, bool masked>
void launch_forward(const LossArguments& arguments, unsigned total, const Tensor& sums,
                    const std::optional<Tensor>& alpha, const Tensor& state, const Tensor& loss, bool accumulate) {
  const cudaStream_t stream = current_stream(sums);
  const A* all_sums = sums.const_data_ptr<A>();
  Tensor field_memory = torch::stable::new_empty(sums, std::array<int64_t, 1>{int64_t{total} * kFields<masked>});
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
  if (total) launch(summarise_pieces<A, masked>, total, kThreads, stream, arguments, all_sums, fields, bins);
  if (arguments.rule == Rule::hardest && total)
    for (int digit = 0; digit < Keys<A>::digits; ++digit, bins += arguments.pairs * kBins) {
      if (digit) launch(count_digits<A, masked>, total, kThreads, stream, arguments, all_sums, selections, bins, digit);
      launch(select_digit, arguments.pairs, kThreads, stream, arguments, bins, selections, digit);
    }
  const void* alpha_data = alpha.has_value() ? alpha->const_data_ptr() : nullptr;
  const bool alpha_is_double = alpha.has_value() && alpha->scalar_type() == ScalarType::Double;
  launch(combine_pieces<A, masked>, 1, kThreads, stream, arguments, fields, selections, alpha_data, alpha_is_double,
         state.mutable_data_ptr<A>(), loss.mutable_data_ptr<A>(), accumulate);
}

// Both operators; mask: that of mined_loss_inside, or null.
std::tuple<Tensor, Tensor> compute_loss(const char* op, const Tensor& sums_, const Tensor* mask, bool shared,
                                        const std::vector<int64_t>& images, const std::vector<int64_t>& points,
                                        const std::string& rule, double parameter, const std::optional<Tensor>& alpha,
                                        double factor) {
  const int64_t length = check_mined(op, sums_, images, points);
  check_alpha(op, alpha);
  if (alpha.has_value()) check_device(op, "alpha", *alpha, sums_);
  if (mask != nullptr) {
    check_inside(op, *mask, shared, images, points);
    check_device(op, "inside", *mask, sums_);
  }
  const DeviceGuard guard(sums_.get_device());
  const Tensor sums = torch::stable::contiguous(sums_);
  const Tensor plain = mask == nullptr ? Tensor() : torch::stable::contiguous(*mask);
  Tensor loss = torch::stable::new_empty(sums, {}), state = torch::stable::new_empty(sums, std::array{length});
  bool accumulate = false;
  const LossArguments common =
      common_arguments(op, rule, parameter, factor, mask == nullptr ? nullptr : &plain, shared);
  for_each_launch(images, points, common, true, [&](const LossArguments& arguments, unsigned total) {
    dispatch(op, sums.scalar_type(), [&](auto element) {
      using A = Acc<decltype(element)>;
      if (mask == nullptr)
        launch_forward<A, false>(arguments, total, sums, alpha, state, loss, accumulate);
      else
        launch_forward<A, true>(arguments, total, sums, alpha, state, loss, accumulate);
    });
    accumulate = true;
  });
  return {loss, state};
}

Tensor compute_gradient(const char* op, const Tensor& grad, const Tensor& sums_, const Tensor* mask, bool shared,
                        const Tensor& state_, const std::vector<int64_t>& images, const std::vector<int64_t>& points,
                        const std::string& rule, double parameter, double factor) {
  const int64_t length = check_mined(op, sums_, images, points);
  check_flat(op, "state", state_, length, sums_.scalar_type());
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == sums_.scalar_type(), op,
                  ": grad: wanted one number of the dtype of sums, got ", shape(grad));
  check_device(op, "grad", grad, sums_);
  check_device(op, "state", state_, sums_);
  if (mask != nullptr) {
    check_inside(op, *mask, shared, images, points);
    check_device(op, "inside", *mask, sums_);
  }
  const DeviceGuard guard(sums_.get_device());
  const Tensor sums = torch::stable::contiguous(sums_), state = torch::stable::contiguous(state_);
  const Tensor plain = mask == nullptr ? Tensor() : torch::stable::contiguous(*mask);
  Tensor out = torch::stable::empty_like(sums);
  const LossArguments common =
      common_arguments(op, rule, parameter, factor, mask == nullptr ? nullptr : &plain, shared);
  for_each_launch(images, points, common, false, [&](const LossArguments& arguments, unsigned total) {
    if (total == 0) return;
    dispatch(op, sums.scalar_type(), [&](auto element) {
      using A = Acc<decltype(element)>;
      launch(mask == nullptr ? gradient_of_sums<A, false> : gradient_of_sums<A, true>, total, kThreads,
             current_stream(sums), arguments, grad.const_data_ptr<A>(), sums.const_data_ptr<A>(),
             state.const_data_ptr<A>(), out.mutable_data_ptr<A>());
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> mined_loss(const Tensor& sums, std::vector<int64_t> images, std::vector<int64_t> points,
                                      std::string rule, double parameter, std::optional<Tensor> alpha, double factor) {
  return compute_loss("mined_loss", sums, nullptr, false, images, points, rule, parameter, alpha, factor);
}

std::tuple<Tensor, Tensor> mined_loss_inside(const Tensor& sums, const Tensor& inside, bool shared,
                                             std::vector<int64_t> images, std::vector<int64_t> points, std::string rule,
                                             double parameter, std::optional<Tensor> alpha, double factor) {
  return compute_loss("mined_loss_inside", sums, &inside, shared, images, points, rule, parameter, alpha, factor);
}

Tensor mined_loss_backward(const Tensor& grad, const Tensor& sums, const Tensor& state, std::vector<int64_t> images,
                           std::vector<int64_t> points, std::string rule, double parameter, double factor) {
  return compute_gradient("mined_loss_backward", grad, sums, nullptr, false, state, images, points, rule, parameter,
                          factor);
}

Tensor mined_loss_inside_backward(const Tensor& grad, const Tensor& sums, const Tensor& inside, bool shared,
                                  const Tensor& state, std::vector<int64_t> images, std::vector<int64_t> points,
                                  std::string rule, double parameter, double factor) {
  return compute_gradient("mined_loss_inside_backward", grad, sums, &inside, shared, state, images, points, rule,
                          parameter, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CUDA, m) {
  m.impl("mined_loss", TORCH_BOX(&mined_loss));
  m.impl("mined_loss_backward", TORCH_BOX(&mined_loss_backward));
  m.impl("mined_loss_inside", TORCH_BOX(&mined_loss_inside));
  m.impl("mined_loss_inside_backward", TORCH_BOX(&mined_loss_inside_backward));
}

}  // namespace recontrast
