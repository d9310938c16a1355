// GELU and its derivative on vectors: x * Phi(x), with the cumulative distribution function Phi of the normal
// distribution.
#pragma once

#include <cmath>

#include "simd.h"

namespace recontrast {
namespace {

constexpr double kInverseRootTwo = 0.70710678118654752440, kInverseRootTwoPi = 0.39894228040143267794;

// exp(-v^2 / 2), and 0 below the smallest normal number.
INLINE Float32 exp_of_half_square(const Float32& v) {
  const Float32 exact = v * v * -0.72134752044448170368f;  // in powers of 2
  const Float32 e = exact < -126.0f ? Float32{} - 126.0f : exact;
  const Float32 shifted = e + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, in the lowest bits
  const Float32 f = e - (shifted - 12582912.0f);
  // Least-squares fit of 2^f for |f| <= 0.5, relative.
  Float32 p = f * 0.000153375768f + 0.00133998604f;
  p = p * f + 0.00961851953f;
  p = p * f + 0.0555032900f;
  p = p * f + 0.240226466f;
  p = p * f + 0.693147206f;
  p = p * f + 1.0f;
  const Float32 result = bits<Float32>(bits<Bits32>(p) + (bits<Bits32>(shifted) << 23));
  return exact < -126.0f ? Float32{} : result;
}

// Phi(v) from e = exp(-v^2 / 2). Relative error 6e-7, also in the lower tail.
INLINE Float32 normal_cdf(const Float32& v, const Float32& e) {
  const Float32 z = (v < 0 ? -v : v) * static_cast<float>(kInverseRootTwo);
  const Float32 t = 1.0f / (1.0f + 0.5f * z);
  // Least-squares fit of erfc(z) * exp(z^2) / t for 0 <= z <= 9.5, relative.
  Float32 p = t * 0.0151097491f - 0.138056535f;
  p = p * t + 0.462348135f;
  p = p * t - 0.712596601f;
  p = p * t + 0.454903752f;
  p = p * t - 0.115350269f;
  p = p * t + 0.231057982f;
  p = p * t + 0.237546053f;
  p = p * t + 0.282978954f;
  p = p * t + 0.282058765f;
  const Float32 tail = 0.5f * e * t * p;
  return v < 0 ? tail : 1.0f - tail;
}

INLINE Float32 gelu(const Float32& v) { return v * normal_cdf(v, exp_of_half_square(v)); }

INLINE Float32 gelu_slope(const Float32& v) {
  const Float32 e = exp_of_half_square(v);
  return normal_cdf(v, e) + v * e * static_cast<float>(kInverseRootTwoPi);
}

using Float64 = Lanes<double>::V;

INLINE Float64 gelu(Float64 v) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i) v[i] *= 0.5 * std::erfc(-v[i] * kInverseRootTwo);
  return v;
}

INLINE Float64 gelu_slope(Float64 v) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i)
    v[i] = 0.5 * std::erfc(-v[i] * kInverseRootTwo) + v[i] * std::exp(-0.5 * v[i] * v[i]) * kInverseRootTwoPi;
  return v;
}

}  // namespace
}  // namespace recontrast
