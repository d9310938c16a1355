// What the CPU and the GPU share of mined_loss: its arguments, the layout of its state, and the formulas of a point.
#pragma once

#include <cmath>
#include <optional>

#include "tensor_arguments.h"

#ifdef __CUDACC__
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline
#endif

namespace recontrast {

constexpr double kEps = 1e-8;  // reference.EPS

enum class Rule { deviation, hardest, power };

inline Rule rule_of(const char* op, const std::string& name) {
  if (name == "deviation") return Rule::deviation;
  if (name == "hardest") return Rule::hardest;
  STD_TORCH_CHECK(name == "power", op, ": rule must be deviation, hardest or power, got ", name);
  return Rule::power;
}

// The state of a pair: its threshold, then the slopes of its images, [3, N].
inline int64_t state_of(int64_t images) { return 1 + 3 * images; }

inline int64_t check_mined(const char* op, const Tensor& sums, const std::vector<int64_t>& images,
                           const std::vector<int64_t>& points) {
  STD_TORCH_CHECK(!images.empty() && images.size() == points.size(), op,
                  ": images and points must be lists of one length > 0, got ", images.size(), " and ", points.size());
  int64_t total = 0, state = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    STD_TORCH_CHECK(images[i] >= 0 && points[i] >= 0, op, ": images and points must not be negative");
    total += 3 * images[i] * points[i];
    state += state_of(images[i]);
  }
  const ScalarType type = sums.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": sums must be float32 or float64, got ", torch::headeronly::toString(type));
  check_flat(op, "sums", sums, total, type);
  return state;
}

inline void check_alpha(const char* op, const std::optional<Tensor>& alpha) {
  if (!alpha.has_value()) return;
  const ScalarType type = alpha->scalar_type();
  STD_TORCH_CHECK(alpha->numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double), op,
                  ": alpha must be one float32 or float64, got ", torch::headeronly::toString(type), " ",
                  shape(*alpha));
}

// How many of the largest distances are hard.
inline int64_t hard_points(double fraction, int64_t points) {
  const auto k = static_cast<int64_t>(static_cast<double>(points) * fraction);
  return k < 1 ? 1 : k;
}

template <typename A>
BOTH A norm_of(A square) {
  const A least = static_cast<A>(kEps * kEps);
  return std::sqrt(square < least ? least : square);
}

// 1 - cosine. Computed again by the backward pass, to the same bits: nothing here can be contracted.
template <typename A>
BOTH A distance_of(A xy, A xx, A yy) {
  return 1 - xy / (norm_of(xx) * norm_of(yy));
}

// Loss of one image and its slopes, from the sums of the whole image.
template <typename A>
BOTH A slopes_of(A xy, A xx, A yy, A* slope) {
  const A inverse = 1 / (norm_of(xx) * norm_of(yy)), least = static_cast<A>(kEps * kEps);
  slope[0] = -inverse;
  slope[1] = xx < least ? 0 : xy * inverse / (2 * xx);
  slope[2] = yy < least ? 0 : xy * inverse / (2 * yy);
  return 1 - xy * inverse;
}

template <typename A>
BOTH A weight_of(Rule rule, A d, A threshold, A parameter, A factor) {
  if (rule != Rule::power) return d < threshold ? factor : 1;
  return threshold > 0 ? std::pow((d < 0 ? 0 : d) / threshold, parameter) : 1;
}

}  // namespace recontrast
