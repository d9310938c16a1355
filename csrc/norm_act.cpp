// norm_act on the CPU; recontrast/reference.py defines it.
//
// Memory-bound. Forward reads x twice and writes y; backward reads grad and x twice and writes dx (once in eval mode,
// where the gradient does not depend on sums). The second pass goes backwards, so that it begins with what the first
// one left in the caches. Statistics: sums of x - centre and of its square in each tile, merged in float64 in an order
// that does not depend on the number of threads (Chan, Golub and LeVeque, The American Statistician 37, 1983). The
// centre of the first tile of a task is its mean, so that it is read twice, while it is in the L2 cache; that of each
// further tile is the mean of those before it. Its distance from the tile's own mean is harmless: the rounding error is
// in proportion to n times the square of the distance, of which the merge adds at least half to the result.

#include <algorithm>
#include <optional>
#include <vector>

#include "buffer_pool.h"
#include "norm_act_plan.h"

namespace recontrast {
namespace {

constexpr int64_t kPooled = 32ll << 20;  // bytes; the memory of smaller results is shared with those of other layers

// Two sums for each channel of each task, in the order of place_in, merged over the tasks in a fixed order.
struct Partial {
  std::vector<double> first, second;  // [tasks, width of a task]
  explicit Partial(const Plan& plan) : first(plan.tasks * plan.width()), second(first.size()) {}

  // Calls body(task, first sum, second sum) for the sums of channel c in turn.
  template <typename T, typename Body>
  void for_sums(const Plan& plan, int64_t c, const Body& body) const {
    for (int64_t task = plan.per_lane ? 0 : c; task < (plan.per_lane ? plan.tasks : c + 1); ++task) {
      const int64_t place = plan.per_lane ? task * plan.width() + place_of<T>(c) : task;
      body(task, first[place], second[place]);
    }
  }
};

// ---- statistics -------------------------------------------------------------------------------------------------

// Adds n values with the given mean and sum of squared deviations to those that `count` values have.
struct Merge {
  double share, between;
  Merge(double count, double n) : share(n / (count + n)), between(count * share) {}

  void operator()(double mean, double squares, double& all_mean, double& all_squares) const {
    const double delta = mean - all_mean;
    all_mean += delta * share;
    all_squares += squares + delta * delta * between;
  }
};

template <typename T>
void moments_of_task(const Plan& plan, const View<const T>& x, int64_t task, double* mean, double* squares) {
  using A = Acc<T>;
  const int64_t width = plan.width();
  Channels<A> centre = padded<A>(width), sum = centre, deviations = centre;
  double count = 0;
  plan.for_tiles(task, false, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
    const Rows<T> tile{x.tile(c, image, p), x.strides.p};
    const double values = static_cast<double>(plan.per_lane ? rows : n);
    const auto add_up = [&] {
      std::fill(sum.begin(), sum.end(), A{});
      std::fill(deviations.begin(), deviations.end(), A{});
      moments(plan.per_lane, tile, rows, n, centre.data(), sum.data(), deviations.data());
    };
    if (2 * count < values) {
      std::fill(centre.begin(), centre.end(), A{});
      add_up();
      for (int64_t k = 0; k < width; ++k) centre[k] = static_cast<A>(sum[k] / values);
    } else {
      for (int64_t k = 0; k < width; ++k) centre[k] = static_cast<A>(mean[k]);
    }
    add_up();
    const Merge merge(count, values);
    for (int64_t k = 0; k < width; ++k) {
      const double offset = sum[k] / values;
      merge(centre[k] + offset, deviations[k] - offset * sum[k], mean[k], squares[k]);
    }
    count += values;
  });
}

// Writes mean and biased variance of channels to `out` [2, C].
template <typename T>
void merge_moments(const Plan& plan, const Partial& partial, int64_t begin, int64_t end, Acc<T>* out) {
  for (int64_t c = begin; c < end; ++c) {
    double count = 0, mean = 0, squares = 0;
    partial.for_sums<T>(plan, c, [&](int64_t task, double task_mean, double task_squares) {
      const double n = static_cast<double>(plan.values_of(task));
      Merge(count, n)(task_mean, task_squares, mean, squares);
      count += n;
    });
    out[c] = static_cast<Acc<T>>(mean);
    out[plan.C + c] = static_cast<Acc<T>>(squares / count);
  }
}

// ---- forward ----------------------------------------------------------------------------------------------------

// Whether a result is written past the caches: it is large, and all its vectors are aligned.
template <typename T>
bool bypasses_cache(const Plan& plan, const View<T>& y) {
  const int64_t row = plan.per_lane ? y.strides.p : y.strides.c, vector = kLanes<T> * static_cast<int64_t>(sizeof(T));
  return plan.values() * plan.C * static_cast<int64_t>(sizeof(T)) > kCached && is_aligned_16(y.data) &&
         row * static_cast<int64_t>(sizeof(T)) % vector == 0;
}

// Takes mean and variance from `moments` [2, C]; in training mode it computes and writes them.
template <typename T>
void forward(const Plan& plan, Act act, const View<const T>& x, const View<const T>& residual, const View<T>& y,
             Parameters<T> parameters, bool training, double eps, Acc<T>* moments) {
  const bool bypass_cache = bypasses_cache(plan, y);
  const auto apply_all = [&](int64_t task) {
    plan.for_tiles(task, true, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
      apply(plan.per_lane, act, Rows<T>{x.tile(c, image, p), x.strides.p},
            Rows<T>{residual.tile(c, image, p), residual.strides.p}, Target<T>{y.tile(c, image, p), y.strides.p}, rows,
            n, parameters.at(c), bypass_cache);
    });
  };
  if (!training) {
    parameters.set_moments(plan, moments, eps, 0, plan.C);
    return plan.parallel(false, apply_all);
  }
  Partial partial(plan);
  plan.run(
      [&](int64_t task) {
        moments_of_task(plan, x, task, &partial.first[task * plan.width()], &partial.second[task * plan.width()]);
      },
      [&](int64_t begin, int64_t end) {
        merge_moments<T>(plan, partial, begin, end, moments);
        parameters.set_moments(plan, moments, eps, begin, end);
      },
      apply_all);
}

std::tuple<Tensor, Tensor> norm_act(const Tensor& x_, std::optional<Tensor> residual, std::optional<Tensor> weight,
                                    std::optional<Tensor> bias, std::optional<Tensor> mean, std::optional<Tensor> var,
                                    std::string activation, double eps) {
  check_features("norm_act", x_, residual);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "norm_act: mean and var: wanted both or none");
  const Act act = act_of("norm_act", activation);
  const int64_t C = x_.size(1);
  std::optional<Tensor> result = empty_like_pooled(x_, kPooled);  // in the layout of x
  Tensor y = walkable(*result);
  Tensor moments = torch::stable::new_zeros(x_, std::array<int64_t, 2>{2, C}, acc_type(x_));
  const Tensor x = in_order_of(y, x_);
  if (residual) residual = in_order_of(y, *residual);
  dispatch_native("norm_act", x.scalar_type(), [&](auto number) {
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
    forward(plan, act, view_of<T>(x), view_of<T>(residual), output_of<T>(y),
            Parameters<T>("norm_act", plan, weight, bias), !mean, eps, out);
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

// The first pass over a task: adds the masked gradient, alone and times x - mean, to the sums.
template <typename T>
void reduce_task(const Plan& plan, Act act, const BackwardViews<T>& views, const Parameters<T>& parameters,
                 int64_t task, double* sums, double* dots) {
  using A = Acc<T>;
  const int64_t width = plan.width();
  Channels<A> sum = padded<A>(width), dot = sum;
  plan.for_tiles(task, false, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
    std::fill(sum.begin(), sum.end(), A{});
    std::fill(dot.begin(), dot.end(), A{});
    reduce(plan.per_lane, act, views.tile(c, image, p, rows, n, parameters.at(c)), sum.data(), dot.data());
    for (int64_t k = 0; k < width; ++k) {
      sums[k] += sum[k];
      dots[k] += dot[k];
    }
  });
}

// Writes the gradients of weight and bias to `out` [2, C]. In training mode, all values contribute to mean and
// variance; the second pass subtracts (x - mean) * slope + offset for it.
template <typename T>
struct Statistics {
  const Plan& plan;
  const Parameters<T>& parameters;
  const Acc<T>* moments;
  double eps;
  Acc<T>* out;
  Channels<Acc<T>> slope = padded<Acc<T>>(plan.C), offset = slope;  // in the order of place_in

  void finish(const Partial& partial, int64_t begin, int64_t end) {
    const double n = static_cast<double>(plan.values());
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0, dot = 0;
      partial.for_sums<T>(plan, c, [&](int64_t, double task_sum, double task_dot) {
        sum += task_sum;
        dot += task_dot;
      });
      const int64_t place = place_in<T>(plan, c);
      const double scale = parameters.scale[place], var = static_cast<double>(moments[plan.C + c]) + eps;
      out[c] = static_cast<Acc<T>>(sum);
      out[plan.C + c] = static_cast<Acc<T>>(dot / std::sqrt(var));
      slope[place] = static_cast<Acc<T>>(scale * dot / n / var);
      offset[place] = static_cast<Acc<T>>(scale * sum / n);
    }
  }
};

template <typename T>
void backward(const Plan& plan, Act act, const BackwardViews<T>& views, Parameters<T> parameters, const Acc<T>* moments,
              double eps, bool training, Acc<T>* out) {
  parameters.set_moments(plan, moments, eps, 0, plan.C);
  const bool has_second = training && views.dx.data,
             keeps_masked = views.masked.data || (act == Act::gelu && has_second);
  BackwardViews<T> first = views, second = views;
  if (training) first.dx = {};
  if (has_second && act == Act::gelu && !views.masked.data) first.masked = views.dx;  // until the second pass
  if (keeps_masked) {
    second.grad.data = first.masked.data;
    second.grad.strides = first.masked.strides;
  }
  second.masked = {};
  second.kept = {};
  const Act second_act = keeps_masked ? Act::none : act;
  Partial partial(plan);
  Statistics<T> statistics{plan, parameters, moments, eps, out};
  const bool bypass_cache = bypasses_cache(plan, views.dx);
  plan.run(
      [&](int64_t task) {
        reduce_task(plan, act, first, parameters, task, &partial.first[task * plan.width()],
                    &partial.second[task * plan.width()]);
      },
      [&](int64_t begin, int64_t end) { statistics.finish(partial, begin, end); },
      [&](int64_t task) {
        if (!has_second) return;
        plan.for_tiles(task, true, [&](int64_t c, int64_t image, int64_t p, int64_t rows, int64_t n) {
          gradient(plan.per_lane, second_act, second.tile(c, image, p, rows, n, parameters.at(c)), &statistics.slope[c],
                   &statistics.offset[c], bypass_cache);
        });
      });
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
  if (wants_x) dx = empty_like_pooled(x_, kPooled);
  if (kept && act != Act::none) residual = empty_like_pooled(x_, kPooled);
  std::optional<Tensor> dx_out, residual_out;
  if (dx) dx_out = walkable(*dx);
  if (residual) residual_out = walkable(*residual);
  const Tensor grad = in_order_of(layout, grad_), x = in_order_of(layout, x_);
  if (kept) kept = in_order_of(layout, *kept);
  Tensor sums = torch::stable::new_zeros(x_, std::array<int64_t, 2>{2, C}, acc_type(x_));
  dispatch_native("norm_act_backward", x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using A = Acc<T>;
    if (x.numel() == 0) return;
    const Plan plan(layout);
    const BackwardViews<T> views{view_of<T>(grad), view_of<T>(x), view_of<T>(kept), output_of<T>(residual_out),
                                 output_of<T>(dx_out)};
    backward(plan, act, views, Parameters<T>("norm_act_backward", plan, weight, bias), moments.const_data_ptr<A>(), eps,
             training, sums.mutable_data_ptr<A>());
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
