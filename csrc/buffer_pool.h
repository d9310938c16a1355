// Memory for large results on the CPU that is reused from call to call.
//
// The C library maps fresh pages for each block of more than 32 MB and hands them back when it is freed. The kernel
// then clears every page anew at its first touch, which for a 64 MB gradient takes longer (26 ms in pages of 4 KB, 6 ms
// and more in huge ones) than to compute it (8 ms; two cores of an EPYC). A training step wants the same sizes each
// time, so freed blocks wait here for the next step: at most kKept bytes, the oldest go first.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "tensor_arguments.h"

namespace recontrast {

class Pages {
 public:
  static constexpr int64_t kHugePage = 2 << 20;     // bytes; blocks are multiples of it
  static constexpr int64_t kLeast = 2 * kHugePage;  // smaller blocks come from the C library, which keeps them itself
  static constexpr int64_t kKept = 512ll << 20;     // gradients of all six pairs, WideResNet-50-2, batch 32

  // Never destroyed: tensors may outlive the library's statics.
  static Pages& instance() {
    static Pages* pages = new Pages;
    return *pages;
  }

  void* take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = std::find_if(free_.rbegin(), free_.rend(), [&](auto& block) { return block.first == bytes; });
      if (found != free_.rend()) {
        void* block = found->second;
        free_.erase(std::next(found).base());
        kept_ -= bytes;
        return block;
      }
    }
    void* block = std::aligned_alloc(kHugePage, bytes);
    STD_TORCH_CHECK(block, "recontrast: not enough memory for a result of ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(block, bytes, MADV_HUGEPAGE);  // advice: its failure costs only time
#endif
    return block;
  }

  void give(void* block, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    free_.emplace_back(bytes, block);
    kept_ += bytes;
    while (kept_ > kKept) {
      kept_ -= free_.front().first;
      std::free(free_.front().second);
      free_.erase(free_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<int64_t, void*>> free_;  // the oldest first
  int64_t kept_ = 0;                             // bytes in free_
};

// torch.empty_like, in memory that is reused where the result is large.
inline Tensor empty_like_reused(const Tensor& like) {
  Tensor out = torch::stable::empty_like(like);  // its strides; of the memory nothing is touched yet
  const int64_t size = out.numel() * static_cast<int64_t>(out.element_size());
  if (size < Pages::kLeast) return out;
  const int64_t bytes = (size + Pages::kHugePage - 1) / Pages::kHugePage * Pages::kHugePage;
  void* block = Pages::instance().take(bytes);
  return torch::stable::from_blob(block, out.sizes(), out.strides(), out.device(), out.scalar_type(),
                                  [bytes](void* freed) { Pages::instance().give(freed, bytes); });
}

}  // namespace recontrast
