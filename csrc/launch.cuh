// How CUDA kernels are launched: stream, grid size, device checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "tensor_arguments.h"

namespace recontrast {

using torch::stable::accelerator::DeviceGuard;

constexpr int kThreads = 256;  // threads per block: eight warps, so that several blocks fit on a multiprocessor
constexpr int kWarp = 32;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Number of multiprocessors of the current device.
inline int64_t processors() {
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Number of blocks for n items, `per` items each.
inline unsigned blocks(int64_t n, int64_t per) { return static_cast<unsigned>((n + per - 1) / per); }

// Launches `kernel` and checks for errors.
template <typename... P, typename... Args>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device() == first.get_device(), op, ": ", name, ": wanted CUDA device ",
                  static_cast<int>(first.get_device()), " like the first argument");
}

}  // namespace recontrast
