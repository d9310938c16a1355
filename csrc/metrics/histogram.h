// Histograms of maps for recontrast/metrics/streaming.py.
#pragma once

#include <cstdint>
#include <vector>

#include "regions.h"

namespace recontrast {

// Bins of equal width in the bits of a float32, so that their width is proportional to the score. Bin 0 contains all
// scores below the second bin, also those that rounding made negative; the last bin has no upper limit.
struct Bins {
  int32_t shift, base, count;

  // The bin of a score.
  int32_t of(float score) const;
};

// A whole region counts 2^40 in the histogram of overlaps; an int64 bin can hold 2^22 regions.
constexpr int kUnit = 40;

// Adds maps [N, P] to the histograms [bins] of good pixels, of positive pixels, and of the share that each positive
// pixel has of its region. All are integers, so they do not depend on the threads or on the order of calls.
void add_maps(const float* maps, int64_t P, const std::vector<Regions>& regions, const Bins& bins, int64_t* good,
              int64_t* positive, int64_t* overlap, int64_t threads);

}  // namespace recontrast
