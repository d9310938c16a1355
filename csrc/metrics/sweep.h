// The exact metrics of scores and masks: what recontrast/metrics/reference.py does in NumPy.
#pragma once

#include <cstdint>
#include <vector>

#include "regions.h"

namespace recontrast {

struct Sweep {
  int64_t positives = 0, negatives = 0;
  bool finite = true;
  double auroc = 0, ap = 0, f1_max = 0, f1_threshold = 0;  // undefined without both classes, or if not finite
  int64_t tp = 0, fp = 0;                                  // at that threshold
  std::vector<double> aupro;                               // at each of the limits
};

// Metrics over all scores. `begin` [pieces + 1] says where each piece (an image) starts, and `regions` [pieces] where
// its positives are; `limits` are false positive rates in (0, 1].
template <typename T>
Sweep sweep(const T* scores, const std::vector<int64_t>& begin, const std::vector<Regions>& regions,
            const std::vector<double>& limits, int64_t threads);

// Why an image has no per-image AUPRO.
enum Undefined : uint8_t { kDefined, kGoodImage, kConstantMap, kNoGoodPixel, kFewThresholds, kNotFinite, kTooWide };

// The reference's AUPRO of one image of P scores, `limit` as there; `why` says why it is NaN.
template <typename T>
double per_image_aupro(const T* scores, int64_t P, const Regions& regions, double limit, Undefined& why);

}  // namespace recontrast
