// Regions by runs and union-find in one pass over the mask, eight pixels at a time where there is nothing: what bounds
// it is reading the mask.

#include "regions.h"

#include <algorithm>
#include <cstring>

#include "parallel_for.h"

namespace recontrast {
namespace {

// While regions are being found, `region` of a run is another run of the same one: itself or an earlier one.
int32_t find(std::vector<Run>& runs, int32_t i) {
  while (runs[i].region != i) {
    runs[i].region = runs[runs[i].region].region;  // halves the path
    i = runs[i].region;
  }
  return i;
}

// The earlier root stays, so that a region's root is the run with its first pixel.
void unite(std::vector<Run>& runs, int32_t a, int32_t b) {
  a = find(runs, a);
  b = find(runs, b);
  runs[std::max(a, b)].region = std::min(a, b);
}

// First column from `w` on whose pixel is zero or not, as asked.
int64_t next_column(const uint8_t* row, int64_t w, int64_t W, bool positive) {
  if (positive) {
    for (uint64_t eight = 0; w + 8 <= W; w += 8) {  // most pixels of most masks are zero
      std::memcpy(&eight, row + w, 8);
      if (eight != 0) break;
    }
  }
  while (w < W && (row[w] != 0) != positive) ++w;
  return w;
}

}  // namespace

void find_regions(const uint8_t* mask, int64_t H, int64_t W, Regions& found) {
  std::vector<Run>& runs = found.runs;
  runs.clear();
  found.areas.clear();
  size_t above = 0;  // first run of the row above that may still touch
  for (int64_t h = 0; h < H; ++h) {
    const uint8_t* row = mask + h * W;
    const size_t first = runs.size();
    for (int64_t w = next_column(row, 0, W, true); w < W;) {
      const int64_t stop = next_column(row, w, W, false), begin = h * W + w, end = h * W + stop;
      const auto self = static_cast<int32_t>(runs.size());
      runs.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end), self});
      while (above < first && runs[above].end + W < begin) ++above;  // ends left of w - 1
      for (size_t i = above; i < first && runs[i].begin + W <= end; ++i) unite(runs, static_cast<int32_t>(i), self);
      w = next_column(row, stop, W, true);
    }
    above = first;
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    Run& run = runs[i];
    if (run.region == static_cast<int32_t>(i)) {  // a root comes before all that point to it
      run.region = static_cast<int32_t>(found.areas.size());
      found.areas.push_back(0);
    } else {
      run.region = runs[run.region].region;
    }
    found.areas[run.region] += run.end - run.begin;
  }
}

std::vector<Regions> find_regions(const uint8_t* masks, int64_t N, int64_t H, int64_t W, int64_t threads) {
  std::vector<Regions> found(N);
  parallel(N, threads, N * H * W, [&](int64_t n) { find_regions(masks + n * H * W, H, W, found[n]); });
  return found;
}

}  // namespace recontrast
