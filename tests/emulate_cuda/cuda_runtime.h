// Runs CUDA kernels on the CPU, to find wrong indexing and missing barriers where there is no GPU.
//
// A thread is a coroutine. The threads of a block run one after the other, each up to its next barrier or shuffle;
// blocks run one after the other. Stricter than a GPU: it is an error if a thread returns while others wait for it. The
// order of threads can be reversed; without a missing barrier, results do not depend on it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "numbers.h"
#include "traffic.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename T>
void __stcs(T* to, const T& value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) throw std::runtime_error("emulated: unaligned store");
  *to = value;
}

using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

inline int processors = 4;      // multiprocessors of the emulated GPU
inline bool backwards = false;  // whether threads run in reverse order
enum class State { ready, at_block, at_warp, done };

struct Thread {
  ucontext_t begin;
  jmp_buf at;
  bool begun = false;
  State state = State::ready;
  unsigned shuffles = 0;
  dim3 index;
  std::vector<char> stack = std::vector<char>(1 << 16);
};

inline std::vector<Thread> fibers;
inline std::vector<uint64_t> exchanged;  // [2, threads]
inline int running;
inline jmp_buf scheduler;
inline ucontext_t scheduler_begin;
inline const std::function<void()>* body;

inline void enter() {
  (*body)();
  counting.in_kernel = false;
  fibers[running].state = State::done;
  _longjmp(scheduler, 1);
}

inline void wait(State state) {
  counting.in_kernel = false;
  fibers[running].state = state;
  if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
  counting.in_kernel = counting.enabled;
}

inline void resume(int i) {
  running = i;
  threadIdx = fibers[i].index;
  counting.thread = i;
  counting.stack_begin = reinterpret_cast<uintptr_t>(fibers[i].stack.data());
  counting.stack_end = counting.stack_begin + fibers[i].stack.size();
  if (_setjmp(scheduler)) return;
  if (fibers[i].begun) _longjmp(fibers[i].at, 1);
  fibers[i].begun = true;
  setcontext(&fibers[i].begin);
}

// Makes threads [begin, end) ready if all of them wait at a barrier of this kind.
inline bool release(int begin, int end, State kind) {
  for (int i = begin; i < end; ++i)
    if (fibers[i].state != kind) return false;
  for (int i = begin; i < end; ++i) fibers[i].state = State::ready;
  return true;
}

inline void run_block() {
  const int count = static_cast<int>(fibers.size());
  for (Thread& fiber : fibers) {
    fiber.begun = false;
    fiber.state = State::ready;
    fiber.shuffles = 0;
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack.data();
    fiber.begin.uc_stack.ss_size = fiber.stack.size();
    fiber.begin.uc_link = nullptr;
    makecontext(&fiber.begin, enter, 0);
  }
  for (int finished = 0; finished < count;) {
    bool moved = false;
    finished = 0;
    for (int k = 0; k < count; ++k) {
      const int i = backwards ? count - 1 - k : k;
      if (fibers[i].state == State::ready) {
        resume(i);
        moved = true;
      }
      finished += fibers[i].state == State::done;
    }
    for (int w = 0; w < count; w += 32) moved |= release(w, std::min(w + 32, count), State::at_warp);
    moved |= release(0, count, State::at_block);
    if (!moved && finished < count)
      throw std::runtime_error("emulated: threads wait at a barrier that others do not reach");
  }
  end_block();
}

inline void run(dim3 grid, dim3 shape, const std::function<void()>& kernel) {
  const unsigned count = shape.x * shape.y * shape.z;
  if (!count || count > 1024 || !(grid.x * grid.y * grid.z) || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emulated: invalid grid");
  gridDim = grid;
  blockDim = shape;
  body = &kernel;
  fibers.resize(count);
  exchanged.resize(2 * count);
  for (unsigned i = 0; i < count; ++i) fibers[i].index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

// Exchanges a value with the threads of the warp: calls read(values of the 32 lanes), each in 8 bytes.
template <typename T, typename Read>
T exchange(T value, const Read& read) {
  const Paused paused;
  Thread& self = fibers[running];
  uint64_t* slots = exchanged.data() + (self.shuffles++ % 2) * fibers.size() + running / 32 * 32;
  std::memcpy(slots + running % 32, &value, sizeof(T));
  wait(State::at_warp);
  counting.in_kernel = false;
  return read([&](int lane) {
    T result;
    std::memcpy(&result, slots + lane, sizeof(T));
    return result;
  });
}

template <typename T>
T shuffle(T value, int lane) {
  return exchange(value, [&](const auto& at) { return at(lane); });
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::at_block); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::shuffle(value, (emulated::running % 32) ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  const int lane = emulated::running % 32;
  return emulated::shuffle(value, lane + by < 32 ? lane + by : lane);
}
// The lanes that have the same value.
inline unsigned __match_any_sync(unsigned, unsigned value) {
  return emulated::exchange(value, [&](const auto& at) {
    unsigned equal = 0;
    for (int lane = 0; lane < 32; ++lane) equal |= static_cast<unsigned>(at(lane) == value) << lane;
    return equal;
  });
}
// The sum over the lanes of the mask.
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulated::exchange(value, [&](const auto& at) {
    unsigned total = 0;
    for (int lane = 0; lane < 32; ++lane) total += mask >> lane & 1 ? at(lane) : 0;
    return total;
  });
}
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }

template <typename T, typename Change>
T emulated_atomic(T* to, const Change& change) {
  const emulated::Paused paused;
  emulated::record_atomic(to);
  const T before = *to;
  *to = change(before);
  return before;
}
template <typename T>
T atomicAdd(T* to, T value) {
  return emulated_atomic(to, [&](T before) { return before + value; });
}
template <typename T>
T atomicMin(T* to, T value) {
  return emulated_atomic(to, [&](T before) { return std::min(before, value); });
}
template <typename T>
T atomicMax(T* to, T value) {
  return emulated_atomic(to, [&](T before) { return std::max(before, value); });
}

inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated::processors;
  return 0;
}
template <typename... P, typename... Args>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const Args&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  emulated::begin_launch(reinterpret_cast<const void*>(kernel), uint64_t{grid.x} * grid.y * grid.z,
                         uint64_t{block.x} * block.y * block.z);
  const auto body = [&] {
    emulated::counting.in_kernel = emulated::counting.enabled;
    kernel(args...);
  };
  emulated::run(grid, block, std::ref(body));  // on the stack, whose reads are not counted
  emulated::end_launch();
  return 0;
}
inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// Called through ctypes.
extern "C" inline __attribute__((used, visibility("default"))) void emulate(int processors, bool backwards) {
  emulated::processors = processors;
  emulated::backwards = backwards;
}
