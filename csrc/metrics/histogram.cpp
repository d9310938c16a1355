// Bound by access to the histograms (a few cache lines for a smooth map) and by the atomic additions.

#include "histogram.h"

#include <algorithm>
#include <atomic>
#include <bit>

#include "parallel_for.h"

namespace recontrast {
namespace {

void atomic_add(int64_t& count, int64_t value) {
#ifdef __cpp_lib_atomic_ref
  std::atomic_ref(count).fetch_add(value, std::memory_order_relaxed);
#else  // libc++ of clang 16
  __atomic_fetch_add(&count, value, __ATOMIC_RELAXED);
#endif
}

}  // namespace

int32_t Bins::of(float score) const {
  if (!(score > 0)) return 0;
  return std::clamp((std::bit_cast<int32_t>(score) >> shift) - base, 0, count - 1);
}

void add_maps(const float* maps, int64_t P, const std::vector<Regions>& regions, const Bins& bins, int64_t* good,
              int64_t* positive, int64_t* overlap, int64_t threads) {
  const auto N = static_cast<int64_t>(regions.size());
  parallel_for(N, threads, N * P, [&](int64_t n) {
    const float* map = maps + n * P;
    for_each_good_range(regions[n], P, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) atomic_add(good[bins.of(map[i])], 1);
    });
    for (const Run& run : regions[n].runs) {
      const int64_t share = ((int64_t{2} << kUnit) / regions[n].areas[run.region] + 1) / 2;  // rounded to nearest
      for (int32_t i = run.begin; i < run.end; ++i) {
        const int32_t bin = bins.of(map[i]);
        atomic_add(positive[bin], 1);
        atomic_add(overlap[bin], share);
      }
    }
  });
}

}  // namespace recontrast
