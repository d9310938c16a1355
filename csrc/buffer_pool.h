// A pool of memory for large results on the CPU, reused from call to call.
//
// The C library maps fresh pages for each block of more than 32 MB and unmaps them when the block is freed. Linux
// clears every fresh page at its first touch. For a 64 MB gradient this takes longer (26 ms in pages of 4 KB, at least
// 6 ms in huge pages) than computing it (8 ms; two cores of an EPYC). A training step needs the same sizes each time,
// so the pool keeps freed blocks for the next step: at most kCapacity bytes; the oldest blocks are released first.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "tensor_arguments.h"

namespace recontrast {

// Memory whose address is a multiple of `alignment`, or nullptr; `bytes` is one too. Windows has functions of its own.
inline void* allocate_aligned(int64_t alignment, int64_t bytes) {
#ifdef _WIN32
  return _aligned_malloc(bytes, alignment);
#else
  return std::aligned_alloc(alignment, bytes);
#endif
}

inline void free_aligned(void* block) {
#ifdef _WIN32
  _aligned_free(block);
#else
  std::free(block);
#endif
}

class BufferPool {
 public:
  static constexpr int64_t kHugePage = 2 << 20;        // bytes; block sizes are multiples of it
  static constexpr int64_t kSmallest = 2 * kHugePage;  // bytes; the C library reuses smaller blocks itself
  static constexpr int64_t kCapacity = 512ll << 20;    // bytes; gradients of all pairs, WideResNet-50-2, batch 32

  // Never destroyed: a tensor may outlive the library's static objects.
  static BufferPool& instance() {
    static BufferPool* pool = new BufferPool;
    return *pool;
  }

  // A block of `bytes`, a multiple of kHugePage; a free one of this size where there is one.
  void* take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      const auto reusable =
          std::find_if(free_.rbegin(), free_.rend(), [&](auto& block) { return block.first == bytes; });
      if (reusable != free_.rend()) {
        void* block = reusable->second;
        free_.erase(std::next(reusable).base());
        free_bytes_ -= bytes;
        return block;
      }
    }
    void* block = allocate_aligned(kHugePage, bytes);
    STD_TORCH_CHECK(block, "recontrast: not enough memory for a result of ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(block, bytes, MADV_HUGEPAGE);  // only advice: where it fails, memory is slower
#endif
    return block;
  }

  // Takes back a block for a later `take`.
  void give(void* block, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    free_.emplace_back(bytes, block);
    free_bytes_ += bytes;
    while (free_bytes_ > kCapacity) {
      free_bytes_ -= free_.front().first;
      free_aligned(free_.front().second);
      free_.erase(free_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<int64_t, void*>> free_;  // (bytes, block), the oldest first
  int64_t free_bytes_ = 0;                       // of all blocks in free_
};

// torch.empty_like; results of at least `smallest` bytes come from the pool.
inline Tensor empty_like_pooled(const Tensor& like, int64_t smallest = BufferPool::kSmallest) {
  Tensor out = torch::stable::empty_like(like);  // for its strides; none of its memory is touched
  const int64_t size = out.numel() * static_cast<int64_t>(out.element_size());
  if (size < smallest) return out;
  const int64_t bytes = (size + BufferPool::kHugePage - 1) / BufferPool::kHugePage * BufferPool::kHugePage;
  void* block = BufferPool::instance().take(bytes);
  return torch::stable::from_blob(block, out.sizes(), out.strides(), out.device(), out.scalar_type(),
                                  [bytes](void* freed) { BufferPool::instance().give(freed, bytes); });
}

}  // namespace recontrast
