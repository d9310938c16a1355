// Parallel loops of the metrics, with std::thread: the module is built without torch and OpenMP.
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

constexpr int64_t kGrain = 1 << 17;  // pixels per thread at least: reading fewer is faster than starting a thread

// Number of threads to use for `pixels`: at most `threads` (0: one per core).
inline int64_t thread_count(int64_t threads, int64_t pixels) {
  if (threads == 0) threads = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
  return std::min(threads, std::max<int64_t>(pixels / kGrain, 1));
}

// Threads that are joined at the end of their scope. libc++ of clang 16 has no std::jthread.
struct JoinedThreads {
  std::vector<std::thread> threads;
  ~JoinedThreads() {
    for (std::thread& thread : threads) thread.join();
  }
};

// Calls work(task) for each task, on thread_count(threads, pixels) threads; rethrows an exception of `work`.
template <typename Work>
void parallel_for(int64_t tasks, int64_t threads, int64_t pixels, const Work& work) {
  threads = std::min(thread_count(threads, pixels), tasks);
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
    JoinedThreads pool;
    try {
      for (int64_t i = 1; i < threads; ++i) pool.threads.emplace_back(run);
    } catch (const std::system_error&) {  // the system has no more threads: continue with those that were started
    }
    run();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace recontrast
