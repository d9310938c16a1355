// Shared by the CPU and CUDA versions of mined_loss: argument checks, the layout of its state, the formulas of a point.
#pragma once

#include <cmath>
#include <optional>

#include "tensor_arguments.h"

#ifndef NAN  // MinGW hides it in C++
#define NAN __builtin_nanf("")
#endif

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace recontrast {

constexpr double kEps = 1e-8;  // reference.EPS

enum class Rule { deviation, hardest, power };

inline Rule rule_of(const char* op, const std::string& name) {
  if (name == "deviation") return Rule::deviation;
  if (name == "hardest") return Rule::hardest;
  STD_TORCH_CHECK(name == "power", op, ": rule: wanted deviation, hardest or power, got ", name);
  return Rule::power;
}

// Length of a pair's state: its threshold, then the slopes of its images [3, N].
inline int64_t state_length(int64_t images) { return 1 + 3 * images; }

// Mask of the points that count: P bytes per pair if its images share them, else N * P; null if all points count.
struct Inside {
  const bool* points = nullptr;
  bool shared = false;

  int64_t length(int64_t images, int64_t points_per_image) const {
    return shared ? points_per_image : images * points_per_image;
  }
};

// Checks the mask of all pairs.
inline void check_inside(const char* op, const Tensor& inside, bool shared, const std::vector<int64_t>& images,
                         const std::vector<int64_t>& points) {
  int64_t total = 0;
  for (size_t i = 0; i < images.size(); ++i) total += Inside{nullptr, shared}.length(images[i], points[i]);
  check_flat(op, "inside", inside, total, ScalarType::Bool);
}

// Checks the sums of all pairs. Returns the length of the state.
inline int64_t check_mined(const char* op, const Tensor& sums, const std::vector<int64_t>& images,
                           const std::vector<int64_t>& points) {
  STD_TORCH_CHECK(!images.empty() && images.size() == points.size(), op,
                  ": images and points: wanted lists of one length > 0, got ", images.size(), " and ", points.size());
  int64_t total = 0, state = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    STD_TORCH_CHECK(images[i] >= 0 && points[i] >= 0, op, ": images and points: wanted at least 0 each, got fewer");
    total += 3 * images[i] * points[i];
    state += state_length(images[i]);
  }
  const ScalarType type = sums.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": sums: wanted float32 or float64, got ", torch::headeronly::toString(type));
  check_flat(op, "sums", sums, total, type);
  return state;
}

inline void check_alpha(const char* op, const std::optional<Tensor>& alpha) {
  if (!alpha.has_value()) return;
  const ScalarType type = alpha->scalar_type();
  STD_TORCH_CHECK(alpha->numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double), op,
                  ": alpha: wanted one float32 or float64, got ", torch::headeronly::toString(type), " ",
                  shape(*alpha));
}

// Number of hard points: the `fraction` of the points with the largest distances, at smallest 1.
inline int64_t hard_points(double fraction, int64_t points) {
  const auto k = static_cast<int64_t>(static_cast<double>(points) * fraction);
  return k < 1 ? 1 : k;
}

// Square root of `square`, at smallest kEps.
template <typename A>
HOST_DEVICE A norm_of(A square) {
  const A smallest = static_cast<A>(kEps * kEps);
  return std::sqrt(square < smallest ? smallest : square);
}

// Product of both norms. NaN if a square overflowed to infinity: the cosine is unknown, not 0.
template <typename A>
HOST_DEVICE A norms_of(A xx, A yy) {
  const A norms = norm_of(xx) * norm_of(yy);
  return norms == static_cast<A>(INFINITY) ? static_cast<A>(NAN) : norms;
}

// 1 - cosine. The backward pass computes it again and gets the same bits: nothing here can become a fused multiply-add.
template <typename A>
HOST_DEVICE A distance_of(A xy, A xx, A yy) {
  return 1 - xy / norms_of(xx, yy);
}

// Loss of one image from the sums <x, y>, <x, x> and <y, y> of the whole image. slope [3]: its derivatives by the sums.
template <typename A>
HOST_DEVICE A slopes_of(A xy, A xx, A yy, A* slope) {
  const A inverse = 1 / norms_of(xx, yy), smallest = static_cast<A>(kEps * kEps);
  slope[0] = -inverse;
  slope[1] = xx < smallest ? 0 : xy * inverse / (2 * xx);
  slope[2] = yy < smallest ? 0 : xy * inverse / (2 * yy);
  return 1 - xy * inverse;
}

// Weight of a point with distance `d` in the gradient.
template <typename A>
HOST_DEVICE A weight_of(Rule rule, A d, A threshold, A parameter, A factor) {
  if (rule != Rule::power) return d < threshold ? factor : 1;
  return threshold > 0 ? std::pow((d < 0 ? 0 : d) / threshold, parameter) : 1;
}

}  // namespace recontrast
