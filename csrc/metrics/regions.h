// 8-connected regions of masks.
#pragma once

#include <cstdint>
#include <vector>

namespace recontrast {

// Positive pixels [begin, end) of an image, all in one row, and the number of their region, from 0.
struct Run {
  int32_t begin, end, region;
};

// The regions of one image, numbered by their first pixel.
struct Regions {
  std::vector<Run> runs;       // ordered by their pixels
  std::vector<int64_t> areas;  // pixels of each region
};

// Finds the regions of mask [H, W]; nonzero pixels are positive. H * W < 2^31.
void find_regions(const uint8_t* mask, int64_t H, int64_t W, Regions& regions);

// Regions of masks [N, H, W], image by image.
std::vector<Regions> find_regions(const uint8_t* masks, int64_t N, int64_t H, int64_t W, int64_t threads);

// Calls good(begin, end) for all good (not positive) pixels of an image of P pixels, range by range.
template <typename Function>
void for_each_good_range(const Regions& regions, int64_t P, const Function& good) {
  int64_t begin = 0;
  for (const Run& run : regions.runs) {
    if (begin < run.begin) good(begin, static_cast<int64_t>(run.begin));
    begin = run.end;
  }
  if (begin < P) good(begin, P);
}

}  // namespace recontrast
