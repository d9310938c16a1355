// Histograms of maps for recontrast/metrics/streaming.py.
#pragma once

#include <cstdint>
#include <vector>

#include "regions.h"

namespace recontrast {

// Bins of equal width in the bits of a float32, so that their width is a share of the score. Bin 0 takes all below
// 2 ** lowest, and what rounding made negative; the last one all from its lower end on.
struct Bins {
  int32_t shift, base, count;

  int32_t of(float score) const;
};

constexpr int kUnit =
    40;  // a whole region is 2 ** 40 in the histogram of overlaps: 2^22 of them fit with room to spare

// Adds maps [N, P] to the histograms [bins] of good pixels, of positives and of the positives' shares of their regions.
// They are whole numbers, so that neither threads nor the order of calls change them.
void add_maps(const float* maps, int64_t P, const std::vector<Regions>& regions, const Bins& bins, int64_t* good,
              int64_t* positive, int64_t* overlap, int64_t threads);

}  // namespace recontrast
