// AUPRO of a single image, as the reference implementation computes it.
#pragma once

#include "regions.h"

namespace recontrast {

// Why the AUPRO of an image is undefined.
enum Undefined : uint8_t { kDefined, kGoodImage, kConstantMap, kNoGoodPixel, kFewThresholds, kNotFinite, kTooWide };

// AUPRO of an image of P scores up to the false positive rate `limit`. reason: kDefined, or why the result is NaN.
template <typename T>
double per_image_aupro(const T* scores, int64_t P, const Regions& regions, double limit, Undefined& reason);

}  // namespace recontrast
