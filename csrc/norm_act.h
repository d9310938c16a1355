// What norm_act checks on every device.
#pragma once

#include <optional>
#include <string>

#include "tensor_arguments.h"

namespace recontrast {

enum class Act { none, relu, gelu };
enum class Kept { none, output, residual };  // what backward reads beside x: ReLU's output, or the residual of GELU

inline Act act_of(const char* op, const std::string& name) {
  if (name == "none") return Act::none;
  if (name == "relu") return Act::relu;
  STD_TORCH_CHECK(name == "gelu", op, ": act: wanted none, relu or gelu, got ", name);
  return Act::gelu;
}

inline ScalarType acc_type(const Tensor& x) { return acc_type(x, x); }

inline void check_features(const char* op, const Tensor& x, const std::optional<Tensor>& other) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x: wanted (N, C, H, W), got ", shape(x));
  STD_TORCH_CHECK(has_kernel(x.scalar_type()), op, ": x: wanted float16, bfloat16, float32 or float64, got ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(!other || other->sizes().equals(x.sizes()), op, ": wanted all features in the shape of x, ", shape(x),
                  ", got ", shape(*other));
}

// `t` is a parameter or a statistic of C channels, of any dtype with a kernel.
inline void check_channels(const char* op, const std::optional<Tensor>& t, int64_t C) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == C && has_kernel(t->scalar_type()), op,
                  ": weight, bias, mean and var: wanted floating-point (", C, "), got ",
                  torch::headeronly::toString(t->scalar_type()), " ", shape(*t));
}

inline void check_moments(const char* op, const Tensor& moments, const Tensor& x) {
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == 2 && moments.size(1) == x.size(1) &&
                      moments.scalar_type() == acc_type(x),
                  op, ": moments: wanted ", torch::headeronly::toString(acc_type(x)), " (2, ", x.size(1), "), got ",
                  torch::headeronly::toString(moments.scalar_type()), " ", shape(moments));
}

inline bool is_along_channels(const Tensor& t) { return t.stride(1) == 1 && t.size(1) > 1; }

// Whether kernels can walk through `t` along contiguous channels or positions.
inline bool is_walkable(const Tensor& t, bool along_channels) {
  if (!has_position_stride(t)) return false;
  return along_channels ? t.stride(1) == 1 : t.size(2) * t.size(3) <= 1 || strides_of(t).p == 1;
}

// `t`, or a tensor of its shape that kernels can walk through.
inline Tensor walkable(const Tensor& t) {
  return is_walkable(t, is_along_channels(t)) ? t : torch::stable::new_empty(t, t.sizes());
}

// `t` if kernels can walk through it along the same axis as through `y`, else a copy in the layout and dtype of y.
inline Tensor in_order_of(const Tensor& y, const Tensor& t) {
  if (t.scalar_type() == y.scalar_type() && is_walkable(t, is_along_channels(y))) return t;
  Tensor copy = torch::stable::empty_like(y);
  torch::stable::copy_(copy, t);
  return copy;
}

// Copies a result into the tensor that the caller gets, unless it is this tensor.
inline void deliver(std::optional<Tensor>& to, const std::optional<Tensor>& result) {
  if (to && to->get() != result->get()) torch::stable::copy_(*to, *result);
}

// A tensor of the result that is not wanted.
inline Tensor or_empty(const std::optional<Tensor>& t, const Tensor& x) {
  return t ? *t : torch::stable::new_empty(x, std::array<int64_t, 1>{0});
}

}  // namespace recontrast
