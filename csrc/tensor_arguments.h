// How every operator treats its tensor arguments: checks, dispatch on dtype, accumulation dtype, strides.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace recontrast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float16, bfloat16 and float32 accumulate in float32, float64 in float64.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline std::string shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

// The dtypes of `dispatch`.
inline bool has_kernel(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_pair(const char* op, const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x: wanted (N, C, H, W), got ", shape(x));
  STD_TORCH_CHECK(x.sizes().equals(y.sizes()), op, ": y: wanted the shape of x, ", shape(x), ", got ", shape(y));
  STD_TORCH_CHECK(has_kernel(x.scalar_type()) && has_kernel(y.scalar_type()), op,
                  ": x and y: wanted float16, bfloat16, float32 or float64, got ",
                  torch::headeronly::toString(x.scalar_type()), " and ", torch::headeronly::toString(y.scalar_type()));
}

inline void check_gradient(const char* op, const Tensor& grad, const Tensor& y, ScalarType acc) {
  const bool fits = grad.dim() == 4 && grad.size(0) == 3 && grad.size(1) == y.size(0) && grad.size(2) == y.size(2) &&
                    grad.size(3) == y.size(3);
  STD_TORCH_CHECK(fits, op, ": grad: wanted (3, N, H, W) for y ", shape(y), ", got ", shape(grad));
  STD_TORCH_CHECK(grad.scalar_type() == acc, op, ": grad: wanted ", torch::headeronly::toString(acc), ", got ",
                  torch::headeronly::toString(grad.scalar_type()));
}

// Accumulation dtype of a pair.
inline ScalarType acc_type(const Tensor& x, const Tensor& y) {
  const bool is_double = x.scalar_type() == ScalarType::Double || y.scalar_type() == ScalarType::Double;
  return is_double ? ScalarType::Double : ScalarType::Float;
}

// Number of elements in the sums (3, N, P) of a pair.
inline int64_t sums_length(const Tensor& x) { return 3 * x.size(0) * x.size(2) * x.size(3); }

// Checks a group of pairs. Returns its accumulation dtype and the length of its flat sums.
inline std::pair<ScalarType, int64_t> check_group(const char* op, const std::vector<Tensor>& x,
                                                  const std::vector<Tensor>& y) {
  STD_TORCH_CHECK(!x.empty() && x.size() == y.size(), op, ": x and y: wanted lists of one length > 0, got ", x.size(),
                  " and ", y.size());
  ScalarType acc = ScalarType::Float;
  int64_t total = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    check_pair(op, x[i], y[i]);
    if (acc_type(x[i], y[i]) == ScalarType::Double) acc = ScalarType::Double;
    total += sums_length(x[i]);
  }
  return {acc, total};
}

inline void check_flat(const char* op, const char* name, const Tensor& t, int64_t length, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == 1 && t.numel() == length && t.scalar_type() == type, op, ": ", name, ": wanted ",
                  torch::headeronly::toString(type), " (", length, "), got ",
                  torch::headeronly::toString(t.scalar_type()), " ", shape(t));
}

// Strides of features (N, C, P) in elements, P = H * W.
struct Strides {
  int64_t n, c, p;
};

// Whether a single stride covers all H * W positions: true for NCHW, channels_last and slices of either.
inline bool has_position_stride(const Tensor& t) {
  return t.size(2) == 1 || t.size(3) == 1 || t.stride(2) == t.size(3) * t.stride(3);
}

// Strides of `t`, for which has_position_stride must be true.
inline Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.size(3) == 1 ? t.stride(2) : t.stride(3)};
}

// Calls f with a value of the C++ type of `type`, so that f(auto element) is compiled for each dtype.
template <typename F>
void dispatch(const char* op, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default: STD_TORCH_CHECK(false, op, ": no kernel for dtype ", torch::headeronly::toString(type));
  }
}

}  // namespace recontrast
