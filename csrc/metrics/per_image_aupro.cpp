// Per-image AUPRO. The reference implementation (compute_pro) compares the image with each of 200 thresholds and labels
// its regions each time. This one ranks each pixel once among the thresholds: they are evenly spaced, so the rank is a
// multiplication, corrected by comparing with the neighbouring thresholds.

#include "per_image_aupro.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace recontrast {
namespace {

constexpr int kThresholds = 200;  // as in the reference implementation

// np.arange(low, high, step) as NumPy computes it for scalars of type T: step and count in T, values in float64.
template <typename T>
std::vector<double> arange(T low, T high, T step) {
  const auto count = static_cast<size_t>(std::ceil(static_cast<double>((high - low) / step)));
  std::vector<double> values(count);
  const double start = low, delta = static_cast<double>(static_cast<T>(low + step)) - start;
  for (size_t i = 0; i < count; ++i) values[i] = start + static_cast<double>(i) * delta;
  return values;
}

// Minimum and maximum of the scores [P]; false if a score is not finite.
template <typename T>
bool finite_range(const T* scores, int64_t P, T& low, T& high) {
  low = std::numeric_limits<T>::max();
  high = std::numeric_limits<T>::lowest();
  bool nonfinite = false;
  for (int64_t i = 0; i < P; ++i) {
    nonfinite |= scores[i] - scores[i] != 0;  // NaN for NaN and infinity
    low = scores[i] < low ? scores[i] : low;
    high = scores[i] > high ? scores[i] : high;
  }
  return !nonfinite;
}

}  // namespace

template <typename T>
double per_image_aupro(const T* scores, int64_t P, const Regions& regions, double limit, Undefined& reason) {
  constexpr double undefined = std::numeric_limits<double>::quiet_NaN();
  reason = kGoodImage;
  if (regions.areas.empty()) return undefined;
  T low, high;
  reason = kNotFinite;
  if (!finite_range(scores, P, low, high)) return undefined;
  const T step = (high - low) / kThresholds;
  reason = kTooWide;
  if (step - step != 0) return undefined;
  reason = kConstantMap;
  if (step == 0) return undefined;
  int64_t good = P;
  for (const Run& run : regions.runs) good -= run.end - run.begin;
  reason = kNoGoodPixel;
  if (good == 0) return undefined;

  const std::vector<double> thresholds = arange(low, high, step);
  const auto count = static_cast<int64_t>(thresholds.size());
  const T scale = 1 / step;         // infinite if the range is denormal: clamped below
  const auto rank = [&](T score) {  // number of thresholds below the score
    const T guess = (score - low) * scale;
    int64_t i = guess > 0 ? (guess < static_cast<T>(count) ? static_cast<int64_t>(guess) : count) : 0;
    while (i < count && thresholds[i] < score) ++i;
    while (i > 0 && thresholds[i - 1] >= score) --i;
    return i;
  };
  std::vector<int64_t> good_pixels(count + 1, 0);  // good pixels of each rank
  for_each_good_range(regions, P, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++good_pixels[rank(scores[i])];
  });
  std::vector<double> overlaps(count + 1, 0);  // what the positive pixels of each rank add to the mean overlap
  for (const Run& run : regions.runs) {
    const double weight =
        1.0 / static_cast<double>(regions.areas[run.region] * static_cast<int64_t>(regions.areas.size()));
    for (int32_t i = run.begin; i < run.end; ++i) overlaps[rank(scores[i])] += weight;
  }

  // From the highest threshold down, while the false positive rate is below the limit.
  double area = 0, overlap = 0, fpr = 0, last_overlap = 0, last = 0;
  int64_t above = 0, points = 0;
  for (int64_t i = count; i-- > 0;) {
    above += good_pixels[i + 1];
    overlap += overlaps[i + 1];
    fpr = static_cast<double>(above) / static_cast<double>(good);
    if (!(fpr < limit)) break;
    if (points++ > 0) area += (fpr - last) * (overlap + last_overlap) / 2;
    last = fpr;
    last_overlap = overlap;
  }
  reason = kFewThresholds;
  if (points < 2 || last == 0) return undefined;
  reason = kDefined;
  return area / last;
}

template double per_image_aupro(const float*, int64_t, const Regions&, double, Undefined&);
template double per_image_aupro(const double*, int64_t, const Regions&, double, Undefined&);

}  // namespace recontrast
