// mined_loss on the CPU; recontrast/reference.py defines it.
//
// It reads three floats per point, where the features have hundreds, so overhead dominates: eager PyTorch would call
// about thirty operators and allocate a temporary for each. A task is one image. The order of each sum depends only on
// the shape.

#include <algorithm>
#include <limits>

#include "mined_loss.h"
#include "simd.h"

namespace recontrast {
namespace {

constexpr int64_t kPiece = 1024;     // points summed in their own dtype before the sum is added to a double
constexpr int64_t kGrainImages = 4;  // images per thread at least

template <typename A>
INLINE void distances_body(const A* xy, const A* xx, const A* yy, int64_t n, A* d) {
  for (int64_t p = 0; p < n; ++p) d[p] = distance_of(xy[p], xx[p], yy[p]);
}

// Sum of term(p) over n points.
template <typename A, typename F>
INLINE double sum_body(int64_t n, const F& term) {
  constexpr int64_t lanes = Lanes<A>::count;
  double total = 0;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t end = std::min(n, first + kPiece);
    A part[lanes] = {};
    int64_t p = first;
    for (; p + lanes <= end; p += lanes)
      for (int64_t i = 0; i < lanes; ++i) part[i] += term(p + i);
    for (int64_t i = 0; p + i < end; ++i) part[i] += term(p + i);
    for (int64_t i = 0; i < lanes; ++i) total += part[i];
  }
  return total;
}

#define DEFINE_LOOPS(A)                                                                             \
  VERSIONED void distances(const A* xy, const A* xx, const A* yy, int64_t n, A* d) {                \
    distances_body(xy, xx, yy, n, d);                                                               \
  }                                                                                                 \
  VERSIONED double sum(const A* from, int64_t n) {                                                  \
    return sum_body<A>(n, [from](int64_t p) { return from[p]; });                                   \
  }                                                                                                 \
  VERSIONED double sum_positive(const A* from, int64_t n) {                                         \
    return sum_body<A>(n, [from](int64_t p) { return from[p] < 0 ? 0 : from[p]; });                 \
  }                                                                                                 \
  VERSIONED double sum_squares(const A* from, int64_t n, A mean) {                                  \
    return sum_body<A>(n, [from, mean](int64_t p) { return (from[p] - mean) * (from[p] - mean); }); \
  }                                                                                                 \
  VERSIONED void scale(const A* weight, A slope, int64_t n, A* to) {                                \
    for (int64_t p = 0; p < n; ++p) to[p] = slope * weight[p];                                      \
  }                                                                                                 \
  VERSIONED void mark(const A* d, A threshold, A factor, int64_t n, A* weight) {                    \
    for (int64_t p = 0; p < n; ++p) weight[p] = d[p] < threshold ? factor : 1;                      \
  }
DEFINE_LOOPS(float)
DEFINE_LOOPS(double)
#undef DEFINE_LOOPS

// One image of one pair.
struct Task {
  size_t pair;
  int64_t image, first;  // first: index of the pair's first element in the flat sums
};

// Tasks of all images of all pairs.
std::vector<Task> tasks_of(const std::vector<int64_t>& images, const std::vector<int64_t>& points) {
  std::vector<Task> tasks;
  int64_t first = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    for (int64_t n = 0; n < images[i]; ++n) tasks.push_back({i, n, first});
    first += 3 * images[i] * points[i];
  }
  return tasks;
}

// Threshold of a pair with `count` distances d, mining_rule are reordered. centre: their sum ("power") or mean
// ("deviation"); squares: the sum of squared differences from the mean.
template <typename A>
A threshold_of(A* d, int64_t count, Rule rule, double parameter, double centre, double squares) {
  if (rule == Rule::power) return static_cast<A>(centre / static_cast<double>(count));
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  if (rule == Rule::deviation) {
    if (count < 2) return lowest;
    return static_cast<A>(centre + parameter * std::sqrt(squares / static_cast<double>(count - 1)));
  }
  if (count == 0) return lowest;
  const auto larger = [](A a, A b) { return a > b || (a != a && b == b); };  // NaN counts as largest, as in torch
  A* kth = d + hard_points(parameter, count) - 1;
  std::nth_element(d, kth, d + count, larger);
  return *kth;
}

template <typename A>
void forward(const A* sums, const std::vector<int64_t>& images, const std::vector<int64_t>& points, Rule rule,
             double parameter, A* d, A* loss, A* state) {
  const std::vector<Task> tasks = tasks_of(images, points);
  std::vector<double> losses(tasks.size()), centres(tasks.size());
  std::vector<A> slopes(3 * tasks.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), kGrainImages, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto [pair, image, first] = tasks[t];
      const int64_t P = points[pair], row = first + image * P, volume = images[pair] * P;
      const A *xy = sums + row, *xx = xy + volume, *yy = xx + volume;
      distances(xy, xx, yy, P, d + first / 3 + image * P);
      double slope[3];
      losses[t] = slopes_of(sum(xy, P), sum(xx, P), sum(yy, P), slope);
      for (int q = 0; q < 3; ++q) slopes[3 * t + q] = static_cast<A>(slope[q] / static_cast<double>(images[pair]));
      const A* image_d = d + first / 3 + image * P;
      centres[t] = rule == Rule::power ? sum_positive(image_d, P) : rule == Rule::deviation ? sum(image_d, P) : 0;
    }
  });
  double total = 0;
  size_t t = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t count = images[i] * points[i];
    double centre = 0, squares = 0, pair_loss = 0;
    for (int64_t n = 0; n < images[i]; ++n, ++t) {
      centre += centres[t];
      pair_loss += losses[t];
      for (int64_t q = 0; q < 3; ++q) state[1 + q * images[i] + n] = slopes[3 * t + q];
    }
    if (rule == Rule::deviation && count > 1) {
      centre /= static_cast<double>(count);
      squares = sum_squares(d, count, static_cast<A>(centre));
    }
    state[0] = threshold_of(d, count, rule, parameter, centre, squares);
    total += pair_loss / static_cast<double>(images[i]);  // NaN without images, like the mean of an empty tensor
    d += count;
    state += state_length(images[i]);
  }
  *loss = static_cast<A>(total);
}

std::tuple<Tensor, Tensor> mined_loss(const Tensor& sums_, std::vector<int64_t> images, std::vector<int64_t> points,
                                      std::string rule, double parameter, std::optional<Tensor> alpha,
                                      double) {  // factor is needed by the backward pass only
  const int64_t length = check_mined("mined_loss", sums_, images, points);
  check_alpha("mined_loss", alpha);
  const Rule mining_rule = rule_of("mined_loss", rule);
  if (alpha.has_value())
    parameter =
        alpha->scalar_type() == ScalarType::Float ? *alpha->const_data_ptr<float>() : *alpha->const_data_ptr<double>();
  const Tensor sums = torch::stable::contiguous(sums_);
  Tensor loss = torch::stable::new_empty(sums, {}), state = torch::stable::new_empty(sums, std::array{length});
  Tensor d = torch::stable::new_empty(sums, std::array{sums.numel() / 3});
  dispatch("mined_loss", sums.scalar_type(), [&](auto number) {
    using A = Acc<decltype(number)>;
    forward<A>(sums.const_data_ptr<A>(), images, points, mining_rule, parameter, d.mutable_data_ptr<A>(),
               loss.mutable_data_ptr<A>(), state.mutable_data_ptr<A>());
  });
  return {loss, state};
}

template <typename A>
void backward(A grad, const A* sums, const A* state, const std::vector<int64_t>& images,
              const std::vector<int64_t>& points, Rule rule, double parameter, double factor, A* out) {
  std::vector<const A*> states;
  for (const int64_t n : images) {
    states.push_back(state);
    state += state_length(n);
  }
  const std::vector<Task> tasks = tasks_of(images, points);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), kGrainImages, [&](int64_t begin, int64_t end) {
    A d[kPiece], weight[kPiece];
    for (int64_t t = begin; t < end; ++t) {
      const auto [pair, image, first] = tasks[t];
      const int64_t P = points[pair], N = images[pair], volume = N * P;
      const A threshold = states[pair][0], *slope = states[pair] + 1 + image;
      for (int64_t p = 0; p < P; p += kPiece) {
        const int64_t at = first + image * P + p, n = std::min(kPiece, P - p);
        distances(sums + at, sums + at + volume, sums + at + 2 * volume, n, d);
        if (rule == Rule::power)
          for (int64_t i = 0; i < n; ++i) weight[i] = weight_of<A>(rule, d[i], threshold, static_cast<A>(parameter), 0);
        else
          mark(d, threshold, static_cast<A>(factor), n, weight);
        for (int64_t q = 0; q < 3; ++q) scale(weight, grad * slope[q * N], n, out + at + q * volume);
      }
    }
  });
}

Tensor mined_loss_backward(const Tensor& grad, const Tensor& sums_, const Tensor& state_, std::vector<int64_t> images,
                           std::vector<int64_t> points, std::string rule, double parameter, double factor) {
  const int64_t length = check_mined("mined_loss_backward", sums_, images, points);
  check_flat("mined_loss_backward", "state", state_, length, sums_.scalar_type());
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == sums_.scalar_type(),
                  "mined_loss_backward: grad: wanted one number of the dtype of sums, got ", shape(grad));
  const Tensor sums = torch::stable::contiguous(sums_), state = torch::stable::contiguous(state_);
  const Rule mining_rule = rule_of("mined_loss_backward", rule);
  Tensor out = torch::stable::empty_like(sums);
  dispatch("mined_loss_backward", sums.scalar_type(), [&](auto number) {
    using A = Acc<decltype(number)>;
    backward<A>(*grad.const_data_ptr<A>(), sums.const_data_ptr<A>(), state.const_data_ptr<A>(), images, points,
                mining_rule, parameter, factor, out.mutable_data_ptr<A>());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CPU, m) {
  m.impl("mined_loss", TORCH_BOX(&mined_loss));
  m.impl("mined_loss_backward", TORCH_BOX(&mined_loss_backward));
}

}  // namespace recontrast
