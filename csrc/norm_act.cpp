// norm_act on the CPU; recontrast/reference.py defines it.
//
// Memory-bound. Forward reads x twice and writes y; backward reads grad and x twice and writes dx (once in eval mode,
// where the gradient does not depend on sums). The second pass goes backwards, so that it begins with what the first
// one left in the caches. Statistics: mean and squared deviations of a tile by the corrected two-pass algorithm while
// the tile is in the L2 cache (Chan, Golub and LeVeque, The American Statistician 37, 1983), then merged in float64 in
// an order that does not depend on the number of threads.

#include <algorithm>
#include <optional>
#include <vector>

#include "buffer_pool.h"
#include "norm_act_plan.h"

namespace recontrast {
namespace {

// ---- statistics -------------------------------------------------------------------------------------------------

// Two sums for each channel of each task, merged over the tasks in a fixed order.
struct Partial {
  std::vector<double> first, second;  // [tasks, channels of a task]
  explicit Partial(const Plan& plan) : first(plan.tasks * plan.channels_of_task()), second(first.size()) {}
};

// Adds `n` values with the given mean and sum of squared deviations to those that `count` values have.
inline void merge(double count, double n, double mean, double squares, double& all_mean, double& all_squares) {
  const double delta = mean - all_mean, share = n / (count + n);
  all_mean += delta * share;
  all_squares += squares + delta * delta * count * share;
}

template <typename T>
void moments_of_task(const Plan& plan, const View<const T>& x, int64_t task, double* mean, double* squares) {
  using A = Acc<T>;
  const int64_t channels = plan.channels_of_task();
  Channels<A> zero = padded<A>(channels), sum = zero, centre = zero, rest = zero, deviations = zero;
  double count = 0;
  plan.for_tiles(task, false, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
    const Rows<T> tile{x.tile(c, image, p), x.strides.p};
    const double values = static_cast<double>(plan.per_lane ? rows : n);
    for (Channels<A>* sums : {&sum, &rest, &deviations}) std::fill(sums->begin(), sums->end(), A{});
    moments(plan.per_lane, tile, rows, n, zero.data(), sum.data(), deviations.data());
    for (int64_t k = 0; k < channels; ++k) centre[k] = static_cast<A>(sum[k] / values);
    std::fill(deviations.begin(), deviations.end(), A{});
    moments(plan.per_lane, tile, rows, n, centre.data(), rest.data(), deviations.data());
    for (int64_t k = 0; k < channels; ++k) {  // the correction: what the rounding of the centre left
      const double offset = rest[k] / values;
      merge(count, values, centre[k] + offset, deviations[k] - offset * rest[k], mean[k], squares[k]);
    }
    count += values;
  });
}

// Writes mean and biased variance of each channel to `out` (2, C).
template <typename T>
void compute_moments(const Plan& plan, const View<const T>& x, Acc<T>* out) {
  Partial partial(plan);
  const int64_t channels = plan.channels_of_task();
  torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      moments_of_task(plan, x, task, &partial.first[task * channels], &partial.second[task * channels]);
  });
  for (int64_t c = 0; c < plan.C; ++c) {
    double count = 0, mean = 0, squares = 0;
    const int64_t parts = plan.per_lane ? plan.tasks : plan.N;
    for (int64_t i = 0; i < parts; ++i) {
      const double n = plan.per_lane ? static_cast<double>(plan.values() * (i + 1) / parts - plan.values() * i / parts)
                                     : static_cast<double>(plan.P);
      merge(count, n, partial.first[i * plan.C + c], partial.second[i * plan.C + c], mean, squares);
      count += n;
    }
    out[c] = static_cast<Acc<T>>(mean);
    out[plan.C + c] = static_cast<Acc<T>>(squares / count);
  }
}

// ---- forward ----------------------------------------------------------------------------------------------------

// Calls body(task, backwards) for all tasks, each thread from its last task to its first if `backwards`.
template <typename Body>
void for_tasks(const Plan& plan, bool backwards, const Body& body) {
  torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i);
    fence_nontemporal();
  });
}

// Whether a result is written past the caches: it is large, and all its vectors are aligned.
template <typename T>
bool bypasses_cache(const Plan& plan, const View<T>& y) {
  const int64_t row = plan.per_lane ? y.strides.p : y.strides.c, vector = kLanes<T> * static_cast<int64_t>(sizeof(T));
  return plan.values() * plan.C * static_cast<int64_t>(sizeof(T)) > kCached && is_aligned_16(y.data) &&
         row * static_cast<int64_t>(sizeof(T)) % vector == 0;
}

template <typename T>
void forward(const Plan& plan, Act act, const View<const T>& x, const View<const T>& residual, const View<T>& y,
             const Parameters<Acc<T>>& parameters) {
  const bool bypass_cache = bypasses_cache(plan, y);
  for_tasks(plan, true, [&](int64_t task) {
    plan.for_tiles(task, true, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
      apply(plan.per_lane, act, Rows<T>{x.tile(c, image, p), x.strides.p},
            Rows<T>{residual.tile(c, image, p), residual.strides.p}, Target<T>{y.tile(c, image, p), y.strides.p}, rows,
            n, parameters.at(c), bypass_cache);
    });
  });
}

std::tuple<Tensor, Tensor> norm_act(const Tensor& x_, std::optional<Tensor> residual, std::optional<Tensor> weight,
                                    std::optional<Tensor> bias, std::optional<Tensor> mean, std::optional<Tensor> var,
                                    std::string activation, double eps) {
  check_features("norm_act", x_, residual);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "norm_act: mean and var: wanted both or none");
  const Act act = act_of("norm_act", activation);
  const int64_t C = x_.size(1);
  std::optional<Tensor> result = empty_like_pooled(x_);  // in the layout of x
  Tensor y = walkable(*result);
  Tensor moments = torch::stable::new_zeros(x_, std::array<int64_t, 2>{2, C}, acc_type(x_));
  const Tensor x = in_order_of(y, x_);
  if (residual) residual = in_order_of(y, *residual);
  dispatch("norm_act", x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using A = Acc<T>;
    A* out = moments.mutable_data_ptr<A>();
    if (mean) {
      const Channels<A> means = read_channels<A>("norm_act", mean, C, 0),
                        vars = read_channels<A>("norm_act", var, C, 0);
      std::copy_n(means.begin(), C, out);
      std::copy_n(vars.begin(), C, out + C);
    }
    if (y.numel() == 0) return;
    const Plan plan(y);
    const View<const T> input(x, x.const_data_ptr<T>());
    if (!mean) compute_moments(plan, input, out);
    forward(plan, act, input, view_of<T>(residual), View<T>(y, y.mutable_data_ptr<T>()),
            make_parameters<A>("norm_act", weight, bias, out, C, eps));
  });
  deliver(result, y);
  return {*result, moments};
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardViews {
  View<const T> grad, x, kept;
  View<T> masked, dx;

  Backward<T> tile(int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n, const Affine<Acc<T>>& affine) const {
    return {{grad.tile(c, image, p), grad.strides.p},
            {x.tile(c, image, p), x.strides.p},
            {kept.tile(c, image, p), kept.strides.p},
            {masked.tile(c, image, p), masked.strides.p},
            {dx.tile(c, image, p), dx.strides.p},
            rows,
            n,
            affine};
  }
};

// The first pass. Writes the sums of the masked gradient, alone and times x - mean, to `sums` [2][C].
template <typename T>
void reduce_all(const Plan& plan, Act act, const BackwardViews<T>& views, const Parameters<Acc<T>>& parameters,
                std::vector<double>* sums) {
  using A = Acc<T>;
  Partial partial(plan);
  const int64_t channels = plan.channels_of_task();
  for_tasks(plan, false, [&](int64_t task) {
    Channels<A> sum = padded<A>(channels), dot = sum;
    plan.for_tiles(task, false, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
      std::fill(sum.begin(), sum.end(), A{});
      std::fill(dot.begin(), dot.end(), A{});
      reduce(plan.per_lane, act, views.tile(c, image, p, rows, n, parameters.at(c)), sum.data(), dot.data());
      for (int64_t k = 0; k < channels; ++k) {
        partial.first[task * channels + k] += sum[k];
        partial.second[task * channels + k] += dot[k];
      }
    });
  });
  const int64_t parts = plan.per_lane ? plan.tasks : plan.N;
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t c = 0; c < plan.C; ++c) {
      sums[0][c] += partial.first[i * plan.C + c];
      sums[1][c] += partial.second[i * plan.C + c];
    }
}

// The second pass, in training mode: subtracts what each value contributes through mean and variance.
template <typename T>
void subtract_all(const Plan& plan, Act act, const BackwardViews<T>& views, const Parameters<Acc<T>>& parameters,
                  const Acc<T>* moments, double eps, const std::vector<double>* sums) {
  using A = Acc<T>;
  Channels<A> slope = padded<A>(plan.C), offset = slope;
  for (int64_t c = 0; c < plan.C; ++c) {
    const double n = static_cast<double>(plan.values()), scale = parameters.scale[c];
    slope[c] = static_cast<A>(scale * sums[1][c] / n / (static_cast<double>(moments[plan.C + c]) + eps));
    offset[c] = static_cast<A>(scale * sums[0][c] / n);
  }
  const bool bypass_cache = bypasses_cache(plan, views.dx);
  for_tasks(plan, true, [&](int64_t task) {
    plan.for_tiles(task, true, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
      gradient(plan.per_lane, act, views.tile(c, image, p, rows, n, parameters.at(c)), &slope[c], &offset[c],
               bypass_cache);
    });
  });
}

template <typename T>
void backward(const Plan& plan, Act act, BackwardViews<T> views, const Parameters<Acc<T>>& parameters,
              const Acc<T>* moments, double eps, bool training, Acc<T>* out) {
  std::vector<double> sums[2] = {std::vector<double>(plan.C), std::vector<double>(plan.C)};
  const View<T> dx = views.dx;
  const bool writes_residual = views.masked.data;
  if (training) views.dx = {};
  if (training && dx.data && act == Act::gelu && !writes_residual) views.masked = dx;  // until the second pass
  reduce_all(plan, act, views, parameters, sums);
  for (int64_t c = 0; c < plan.C; ++c) {
    out[c] = static_cast<Acc<T>>(sums[0][c]);
    out[plan.C + c] = static_cast<Acc<T>>(sums[1][c] / std::sqrt(static_cast<double>(moments[plan.C + c]) + eps));
  }
  if (!training || !dx.data) return;
  if (views.masked.data) {  // the masked gradient is in memory
    views.grad.data = views.masked.data;
    views.grad.strides = views.masked.strides;
    act = Act::none;
  }
  views.masked = {};
  views.kept = {};
  views.dx = dx;
  subtract_all(plan, act, views, parameters, moments, eps, sums);
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_, const Tensor& x_, std::optional<Tensor> kept,
                                                     std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                     const Tensor& moments_, bool training, std::string activation,
                                                     double eps, bool wants_x) {
  check_features("norm_act_backward", x_, grad_);
  check_features("norm_act_backward", x_, kept);
  const Act act = act_of("norm_act_backward", activation);
  const int64_t C = x_.size(1);
  check_moments("norm_act_backward", moments_, x_);
  const Tensor moments = torch::stable::contiguous(moments_);
  const Tensor layout = walkable(torch::stable::empty_like(x_));  // for its strides; none of its memory is touched
  std::optional<Tensor> dx, residual;
  if (wants_x) dx = empty_like_pooled(x_);
  if (kept && act != Act::none) residual = empty_like_pooled(x_);
  std::optional<Tensor> dx_out, residual_out;
  if (dx) dx_out = walkable(*dx);
  if (residual) residual_out = walkable(*residual);
  const Tensor grad = in_order_of(layout, grad_), x = in_order_of(layout, x_);
  if (kept) kept = in_order_of(layout, *kept);
  Tensor sums = torch::stable::new_zeros(x_, std::array<int64_t, 2>{2, C}, acc_type(x_));
  dispatch("norm_act_backward", x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using A = Acc<T>;
    if (x.numel() == 0) return;
    const BackwardViews<T> views{View<const T>(grad, grad.const_data_ptr<T>()), View<const T>(x, x.const_data_ptr<T>()),
                                 view_of<T>(kept), output_of<T>(residual_out), output_of<T>(dx_out)};
    const A* read = moments.const_data_ptr<A>();
    const Parameters<A> parameters = make_parameters<A>("norm_act_backward", weight, bias, read, C, eps);
    backward(Plan(layout), act, views, parameters, read, eps, training, sums.mutable_data_ptr<A>());
  });
  deliver(dx, dx_out);
  deliver(residual, residual_out);
  return {or_empty(dx, x_), or_empty(residual, x_), sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}

}  // namespace recontrast
