// Finds regions by runs and union-find in one pass over the mask, eight pixels at a time where all are zero. Bound by
// reading the mask.

#include "regions.h"

#include <algorithm>
#include <cstring>

#include "parallel_for.h"

namespace recontrast {
namespace {

// The root of run i. During the pass, `region` of a run is the index of a run of the same region: itself (a root) or an
// earlier one.
int32_t find_root(std::vector<Run>& runs, int32_t i) {
  while (runs[i].region != i) {
    runs[i].region = runs[runs[i].region].region;  // path halving
    i = runs[i].region;
  }
  return i;
}

// Merges the regions of runs a and b. The earlier root stays, so a region's root is the run with its first pixel.
void merge(std::vector<Run>& runs, int32_t a, int32_t b) {
  a = find_root(runs, a);
  b = find_root(runs, b);
  runs[std::max(a, b)].region = std::min(a, b);
}

// First column from `w` on whose pixel is positive or, if not `positive`, zero; W if there is none.
int64_t next_column(const uint8_t* row, int64_t w, int64_t W, bool positive) {
  if (positive) {
    for (uint64_t eight = 0; w + 8 <= W; w += 8) {  // most pixels are zero
      std::memcpy(&eight, row + w, 8);
      if (eight != 0) break;
    }
  }
  while (w < W && (row[w] != 0) != positive) ++w;
  return w;
}

}  // namespace

void find_regions(const uint8_t* mask, int64_t H, int64_t W, Regions& regions) {
  std::vector<Run>& runs = regions.runs;
  runs.clear();
  regions.areas.clear();
  size_t above = 0;  // first run of the row above that may touch a later run of this row
  for (int64_t h = 0; h < H; ++h) {
    const uint8_t* row = mask + h * W;
    const size_t first = runs.size();
    for (int64_t w = next_column(row, 0, W, true); w < W;) {
      // From w + 1 on: a run never becomes empty, whose region would have no area, even if another thread writes here.
      const int64_t stop = next_column(row, w + 1, W, false), begin = h * W + w, end = h * W + stop;
      const auto self = static_cast<int32_t>(runs.size());
      runs.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end), self});
      while (above < first && runs[above].end + W < begin) ++above;  // ends left of w - 1
      for (size_t i = above; i < first && runs[i].begin + W <= end; ++i) merge(runs, static_cast<int32_t>(i), self);
      w = next_column(row, stop, W, true);
    }
    above = first;
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    Run& run = runs[i];
    if (run.region == static_cast<int32_t>(i)) {  // a root comes before the runs that point to it
      run.region = static_cast<int32_t>(regions.areas.size());
      regions.areas.push_back(0);
    } else {
      run.region = runs[run.region].region;
    }
    regions.areas[run.region] += run.end - run.begin;
  }
}

std::vector<Regions> find_regions(const uint8_t* masks, int64_t N, int64_t H, int64_t W, int64_t threads) {
  std::vector<Regions> regions(N);
  parallel_for(N, threads, N * H * W, [&](int64_t n) { find_regions(masks + n * H * W, H, W, regions[n]); });
  return regions;
}

}  // namespace recontrast
