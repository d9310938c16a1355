// The reference's per-image AUPRO: what compute_pro does in 200 labellings and comparisons of the image, by one rank of
// each pixel among the thresholds. They are evenly spaced, so that the rank is a division and a look beside it.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "sweep.h"

namespace recontrast {
namespace {

constexpr int kThresholds = 200;  // of the reference

// np.arange(low, high, step) as NumPy forms it of scalars of type T: step and count in T, the values in float64.
template <typename T>
std::vector<double> arange(T low, T high, T step) {
  const auto count = static_cast<size_t>(std::ceil(static_cast<double>((high - low) / step)));
  std::vector<double> values(count);
  const double start = low, delta = static_cast<double>(static_cast<T>(low + step)) - start;
  for (size_t i = 0; i < count; ++i) values[i] = start + static_cast<double>(i) * delta;
  return values;
}

}  // namespace

template <typename T>
double per_image_aupro(const T* scores, int64_t P, const Regions& regions, double limit, Undefined& why) {
  constexpr double undefined = std::numeric_limits<double>::quiet_NaN();
  why = kGoodImage;
  if (regions.areas.empty()) return undefined;
  T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::lowest();
  bool odd = false;
  for (int64_t i = 0; i < P; ++i) {
    odd |= scores[i] - scores[i] != 0;
    low = scores[i] < low ? scores[i] : low;
    high = scores[i] > high ? scores[i] : high;
  }
  why = kNotFinite;
  if (odd) return undefined;
  const T step = (high - low) / kThresholds;
  why = kTooWide;
  if (step - step != 0) return undefined;
  why = kConstantMap;
  if (step == 0) return undefined;
  int64_t good = P;
  for (const Run& run : regions.runs) good -= run.end - run.begin;
  why = kNoGoodPixel;
  if (good == 0) return undefined;

  const std::vector<double> thresholds = arange(low, high, step);
  const auto count = static_cast<int64_t>(thresholds.size());
  const T scale = 1 / step;           // infinite where the range is denormal: clamped below
  const auto passed = [&](T score) {  // thresholds below it: it is found above them
    const T guess = (score - low) * scale;
    int64_t i = guess > 0 ? (guess < static_cast<T>(count) ? static_cast<int64_t>(guess) : count) : 0;
    while (i < count && thresholds[i] < score) ++i;
    while (i > 0 && thresholds[i - 1] >= score) --i;
    return i;
  };
  std::vector<int64_t> called(count + 1, 0);  // good pixels by the number of thresholds that they pass
  between(regions, P, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++called[passed(scores[i])];
  });
  std::vector<double> found(count + 1, 0);  // the same of what positives add to the mean overlap
  for (const Run& run : regions.runs) {
    const double weight =
        1.0 / static_cast<double>(regions.areas[run.region] * static_cast<int64_t>(regions.areas.size()));
    for (int32_t i = run.begin; i < run.end; ++i) found[passed(scores[i])] += weight;
  }

  // From the highest threshold down, as long as the rate is below the limit.
  double area = 0, overlap = 0, fpr = 0, last_overlap = 0, last = 0;
  int64_t above = 0, kept = 0;
  for (int64_t i = count; i-- > 0;) {
    above += called[i + 1];
    overlap += found[i + 1];
    fpr = static_cast<double>(above) / static_cast<double>(good);
    if (!(fpr < limit)) break;
    if (kept++ > 0) area += (fpr - last) * (overlap + last_overlap) / 2;
    last = fpr;
    last_overlap = overlap;
  }
  why = kFewThresholds;
  if (kept < 2 || last == 0) return undefined;
  why = kDefined;
  return area / last;
}

template double per_image_aupro(const float*, int64_t, const Regions&, double, Undefined&);
template double per_image_aupro(const double*, int64_t, const Regions&, double, Undefined&);

}  // namespace recontrast
