// Exact metrics of scores and masks; recontrast/metrics/reference.py computes the same in NumPy.
#pragma once

#include <cstdint>
#include <vector>

#include "regions.h"

namespace recontrast {

struct Sweep {
  int64_t positives = 0, negatives = 0;
  bool finite = true;
  double auroc = 0, ap = 0, f1_max = 0,
         f1_threshold = 0;    // undefined unless there are both classes and all scores are finite
  int64_t tp = 0, fp = 0;     // at f1_threshold
  std::vector<double> aupro;  // at each limit
};

// Metrics over all scores. begin [pieces + 1]: where each piece (an image) starts; regions [pieces]: its positives;
// limits: false positive rates in (0, 1].
template <typename T>
Sweep sweep(const T* scores, const std::vector<int64_t>& begin, const std::vector<Regions>& regions,
            const std::vector<double>& limits, int64_t threads);

}  // namespace recontrast
