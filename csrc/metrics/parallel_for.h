// Threads of the metrics: plain std::thread, because the module is built without torch and OpenMP.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace recontrast {

constexpr int64_t kGrain = 1 << 17;  // pixels a thread takes at least: starting it costs about as much as reading them

// How many threads work of that many pixels is worth, of those asked for (0: one per core).
inline int64_t worth(int64_t threads, int64_t pixels) {
  if (threads == 0) threads = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
  return std::min(threads, std::max<int64_t>(pixels / kGrain, 1));
}

// Calls work(task) for each task, with as many threads as asked for (0: one per core) and worth it.
template <typename Work>
void parallel(int64_t tasks, int64_t threads, int64_t pixels, const Work& work) {
  threads = std::min(worth(threads, pixels), tasks);
  std::atomic<int64_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  auto run = [&] {
    try {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) work(task);
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
      next = tasks;
    }
  };
  {
    std::vector<std::jthread> pool;
    try {
      for (int64_t i = 1; i < threads; ++i) pool.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads to have: those that there are do the work
    }
    run();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace recontrast
