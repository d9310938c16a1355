// 8-connected regions of masks.
#pragma once

#include <cstdint>
#include <vector>

namespace recontrast {

// Positive pixels begin .. end - 1 of an image, all in one row, and the number of their region, from 0.
struct Run {
  int32_t begin, end, region;
};

// The regions of one image, numbered by their first pixel.
struct Regions {
  std::vector<Run> runs;       // in the order of their pixels
  std::vector<int64_t> areas;  // pixels of each region
};

// Regions of mask [H, W], whose pixels count as positive where they are not 0; H * W < 2^31.
void find_regions(const uint8_t* mask, int64_t H, int64_t W, Regions& found);

// Regions of masks [N, H, W], image by image.
std::vector<Regions> find_regions(const uint8_t* masks, int64_t N, int64_t H, int64_t W, int64_t threads);

// Calls good(begin, end) for each stretch between the runs of an image of P pixels.
template <typename Work>
void between(const Regions& regions, int64_t P, const Work& good) {
  int64_t begin = 0;
  for (const Run& run : regions.runs) {
    if (begin < run.begin) good(begin, static_cast<int64_t>(run.begin));
    begin = run.end;
  }
  if (begin < P) good(begin, P);
}

}  // namespace recontrast
