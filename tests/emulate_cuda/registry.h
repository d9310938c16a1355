// Included first: registers the kernels as recontrast_emulated::* on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(recontrast_emulated, CPU, m, STABLE_UID)
#define is_cuda is_cpu

namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(int32_t) {}
  ~EmulatedGuard() {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedGuard
