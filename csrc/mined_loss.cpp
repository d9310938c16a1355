// mined_loss on the CPU; recontrast/reference.py defines it.
//
// It reads three floats per point, where the features have hundreds, so overhead dominates: eager PyTorch would call
// about thirty operators and allocate a temporary for each. A task is one image. The order of each sum depends only on
// the shape and the mask. mined_loss_inside packs the points inside of an image together, a piece at a time, and then
// works like mined_loss; images that are inside as a whole give the same bits.

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
  VERSIONED void scale_inside(const A* weight, A slope, const bool* inside, int64_t n, A* to) {     \
    for (int64_t p = 0; p < n; ++p) to[p] = inside[p] ? slope * weight[p] : 0;                      \
  }                                                                                                 \
  VERSIONED void mark(const A* d, A threshold, A factor, int64_t n, A* weight) {                    \
    for (int64_t p = 0; p < n; ++p) weight[p] = d[p] < threshold ? factor : 1;                      \
  }
DEFINE_LOOPS(float)
DEFINE_LOOPS(double)
#undef DEFINE_LOOPS

VERSIONED int64_t count_points(const bool* inside, int64_t n) {
  int64_t count = 0;
  for (int64_t p = 0; p < n; ++p) count += inside[p];
  return count;
}

// One image of one pair.
struct Task {
  size_t pair;
  int64_t image, first;  // first: index of the pair's first element in the flat sums
  const bool* inside;    // [P], or null
  int64_t count;         // points inside
  int64_t start;         // index of the image's first distance; those of a pair are contiguous
};

// Tasks of all images of all pairs.
std::vector<Task> tasks_of(const std::vector<int64_t>& images, const std::vector<int64_t>& points, Inside inside) {
  std::vector<Task> tasks;
  int64_t first = 0, start = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t P = points[i];
    for (int64_t n = 0; n < images[i]; ++n) {
      const bool* own = inside.points == nullptr ? nullptr : inside.points + (inside.shared ? 0 : n * P);
      const bool is_same = n > 0 && own == tasks.back().inside;
      const int64_t count = own == nullptr ? P : is_same ? tasks.back().count : count_points(own, P);
      tasks.push_back({i, n, first, own, count, start});
      start += count;
    }
    first += 3 * images[i] * P;
    if (inside.points != nullptr) inside.points += inside.length(images[i], P);
  }
  return tasks;
}

// The three sums of an image, over all its points or those inside, and the distances of these points.
template <typename A>
void sum_image(const A* xy, const A* xx, const A* yy, int64_t P, const Task& task, A* d, double (&total)[3]) {
  if (task.count == P) {
    distances(xy, xx, yy, P, d);
    total[0] = sum(xy, P), total[1] = sum(xx, P), total[2] = sum(yy, P);
    return;
  }
  A packed[3][kPiece];
  total[0] = total[1] = total[2] = 0;
  int64_t filled = 0;
  const auto flush = [&] {
    distances(packed[0], packed[1], packed[2], filled, d);
    for (int q = 0; q < 3; ++q) total[q] += sum(packed[q], filled);
    d += filled;
    filled = 0;
  };
  for (int64_t p = 0; p < P; ++p) {
    packed[0][filled] = xy[p], packed[1][filled] = xx[p], packed[2][filled] = yy[p];  // kept if it is inside
    filled += task.inside[p];
    if (filled == kPiece) flush();
  }
  flush();
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
void forward(const A* sums, const std::vector<int64_t>& images, const std::vector<int64_t>& points, Inside inside,
             Rule rule, double parameter, A* d, A* loss, A* state) {
  const std::vector<Task> tasks = tasks_of(images, points, inside);
  std::vector<double> losses(tasks.size()), centres(tasks.size());
  std::vector<A> slopes(3 * tasks.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), kGrainImages, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Task& task = tasks[t];
      const int64_t P = points[task.pair], N = images[task.pair], row = task.first + task.image * P, volume = N * P;
      A* image_d = d + task.start;
      double whole[3], slope[3] = {};
      sum_image(sums + row, sums + row + volume, sums + row + 2 * volume, P, task, image_d, whole);
      // An image without points inside has no distance and no gradient.
      const bool has_points = task.inside == nullptr || task.count > 0;
      losses[t] = has_points ? slopes_of(whole[0], whole[1], whole[2], slope) : 0;
      for (int q = 0; q < 3; ++q) slopes[3 * t + q] = static_cast<A>(slope[q] / static_cast<double>(N));
      const int64_t count = task.count;
      centres[t] = rule == Rule::power       ? sum_positive(image_d, count)
                   : rule == Rule::deviation ? sum(image_d, count)
                                             : 0;
    }
  });
  double total = 0;
  size_t t = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    int64_t count = 0;
    double centre = 0, squares = 0, pair_loss = 0;
    for (int64_t n = 0; n < images[i]; ++n, ++t) {
      count += tasks[t].count;
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

// Both operators; mask: that of mined_loss_inside.
std::tuple<Tensor, Tensor> compute_loss(const char* op, const Tensor& sums_, const Tensor* mask, bool shared,
                                        const std::vector<int64_t>& images, const std::vector<int64_t>& points,
                                        const std::string& rule, double parameter, const std::optional<Tensor>& alpha) {
  const int64_t length = check_mined(op, sums_, images, points);
  if (mask != nullptr) check_inside(op, *mask, shared, images, points);
  check_alpha(op, alpha);
  const Rule mining_rule = rule_of(op, rule);
  if (alpha.has_value())
    parameter =
        alpha->scalar_type() == ScalarType::Float ? *alpha->const_data_ptr<float>() : *alpha->const_data_ptr<double>();
  const Tensor sums = torch::stable::contiguous(sums_);
  const Tensor plain = mask == nullptr ? Tensor() : torch::stable::contiguous(*mask);
  const Inside inside{mask == nullptr ? nullptr : plain.const_data_ptr<bool>(), shared};
  Tensor loss = torch::stable::new_empty(sums, {}), state = torch::stable::new_empty(sums, std::array{length});
  Tensor d = torch::stable::new_empty(sums, std::array{sums.numel() / 3});
  dispatch(op, sums.scalar_type(), [&](auto number) {
    using A = Acc<decltype(number)>;
    forward<A>(sums.const_data_ptr<A>(), images, points, inside, mining_rule, parameter, d.mutable_data_ptr<A>(),
               loss.mutable_data_ptr<A>(), state.mutable_data_ptr<A>());
  });
  return {loss, state};
}

std::tuple<Tensor, Tensor> mined_loss(const Tensor& sums, std::vector<int64_t> images, std::vector<int64_t> points,
                                      std::string rule, double parameter, std::optional<Tensor> alpha,
                                      double) {  // factor is needed by the backward pass only
  return compute_loss("mined_loss", sums, nullptr, false, images, points, rule, parameter, alpha);
}

std::tuple<Tensor, Tensor> mined_loss_inside(const Tensor& sums, const Tensor& inside, bool shared,
                                             std::vector<int64_t> images, std::vector<int64_t> points, std::string rule,
                                             double parameter, std::optional<Tensor> alpha, double) {
  return compute_loss("mined_loss_inside", sums, &inside, shared, images, points, rule, parameter, alpha);
}

template <typename A>
void backward(A grad, const A* sums, const A* state, const std::vector<int64_t>& images,
              const std::vector<int64_t>& points, Inside inside, Rule rule, double parameter, double factor, A* out) {
  std::vector<const A*> states;
  for (const int64_t n : images) {
    states.push_back(state);
    state += state_length(n);
  }
  const std::vector<Task> tasks = tasks_of(images, points, inside);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), kGrainImages, [&](int64_t begin, int64_t end) {
    A d[kPiece], weight[kPiece];
    for (int64_t t = begin; t < end; ++t) {
      const Task& task = tasks[t];
      const int64_t P = points[task.pair], N = images[task.pair], volume = N * P;
      const A threshold = states[task.pair][0], *slope = states[task.pair] + 1 + task.image;
      for (int64_t p = 0; p < P; p += kPiece) {
        const int64_t at = task.first + task.image * P + p, n = std::min(kPiece, P - p);
        const bool* piece = task.count == P ? nullptr : task.inside + p;
        if (piece != nullptr && count_points(piece, n) == 0) {
          for (int q = 0; q < 3; ++q) std::fill_n(out + at + q * volume, n, A{0});
          continue;
        }
        distances(sums + at, sums + at + volume, sums + at + 2 * volume, n, d);
        if (rule == Rule::power)
          for (int64_t i = 0; i < n; ++i) weight[i] = weight_of<A>(rule, d[i], threshold, static_cast<A>(parameter), 0);
        else
          mark(d, threshold, static_cast<A>(factor), n, weight);
        for (int64_t q = 0; q < 3; ++q) {
          A* to = out + at + q * volume;
          if (piece == nullptr)
            scale(weight, grad * slope[q * N], n, to);
          else
            scale_inside(weight, grad * slope[q * N], piece, n, to);
        }
      }
    }
  });
}

Tensor compute_gradient(const char* op, const Tensor& grad, const Tensor& sums_, const Tensor* mask, bool shared,
                        const Tensor& state_, const std::vector<int64_t>& images, const std::vector<int64_t>& points,
                        const std::string& rule, double parameter, double factor) {
  const int64_t length = check_mined(op, sums_, images, points);
  if (mask != nullptr) check_inside(op, *mask, shared, images, points);
  check_flat(op, "state", state_, length, sums_.scalar_type());
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == sums_.scalar_type(), op,
                  ": grad: wanted one number of the dtype of sums, got ", shape(grad));
  const Tensor sums = torch::stable::contiguous(sums_), state = torch::stable::contiguous(state_);
  const Tensor plain = mask == nullptr ? Tensor() : torch::stable::contiguous(*mask);
  const Inside inside{mask == nullptr ? nullptr : plain.const_data_ptr<bool>(), shared};
  const Rule mining_rule = rule_of(op, rule);
  Tensor out = torch::stable::empty_like(sums);
  dispatch(op, sums.scalar_type(), [&](auto number) {
    using A = Acc<decltype(number)>;
    backward<A>(*grad.const_data_ptr<A>(), sums.const_data_ptr<A>(), state.const_data_ptr<A>(), images, points, inside,
                mining_rule, parameter, factor, out.mutable_data_ptr<A>());
  });
  return out;
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

STABLE_TORCH_LIBRARY_IMPL(recontrast, CPU, m) {
  m.impl("mined_loss", TORCH_BOX(&mined_loss));
  m.impl("mined_loss_backward", TORCH_BOX(&mined_loss_backward));
  m.impl("mined_loss_inside", TORCH_BOX(&mined_loss_inside));
  m.impl("mined_loss_inside_backward", TORCH_BOX(&mined_loss_inside_backward));
}

}  // namespace recontrast
