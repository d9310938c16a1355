// The innermost loops of cosine_sums on the CPU, over contiguous numbers.
#pragma once

#include "simd.h"

namespace recontrast {
namespace {

constexpr int64_t kChannelsAtOnce = 4;  // channels added per pass over the sums

// Adds x * y, x * x and y * y of `channels` rows [n] to the sums xy, xx and yy [n].
template <typename A, int64_t channels>
INLINE void add_body(const A* const* x, const A* const* y, int64_t n, A* xy, A* xx, A* yy) {
  constexpr int64_t lanes = Lanes<A>::count;
  int64_t p = 0;
  for (; p + lanes <= n; p += lanes) {
    auto sxy = load(xy + p), sxx = load(xx + p), syy = load(yy + p);
    for (int64_t c = 0; c < channels; ++c) {
      const auto a = load(x[c] + p), b = load(y[c] + p);
      sxy += a * b;
      sxx += a * a;
      syy += b * b;
    }
    store(xy + p, sxy);
    store(xx + p, sxx);
    store(yy + p, syy);
  }
  for (; p < n; ++p)
    for (int64_t c = 0; c < channels; ++c) {
      xy[p] += x[c][p] * y[c][p];
      xx[p] += x[c][p] * x[c][p];
      yy[p] += y[c][p] * y[c][p];
    }
}

// Sum of the elements of v.
template <typename A>
INLINE A total(const typename Lanes<A>::V& v) {
  A sum = 0;
  for (int64_t i = 0; i < Lanes<A>::count; ++i) sum += v[i];
  return sum;
}

// Adds <x, y>, <x, x> and <y, y> over n channels to sums [3].
template <typename A>
INLINE void dot_body(const A* x, const A* y, int64_t n, A* sums) {
  constexpr int64_t lanes = Lanes<A>::count;
  typename Lanes<A>::V xy{}, xx{}, yy{}, xy2{}, xx2{}, yy2{};  // two accumulators of each, so that additions overlap
  int64_t c = 0;
  for (; c + 2 * lanes <= n; c += 2 * lanes) {
    const auto a = load(x + c), b = load(y + c), a2 = load(x + c + lanes), b2 = load(y + c + lanes);
    xy += a * b;
    xx += a * a;
    yy += b * b;
    xy2 += a2 * b2;
    xx2 += a2 * a2;
    yy2 += b2 * b2;
  }
  A s[3] = {total<A>(xy + xy2), total<A>(xx + xx2), total<A>(yy + yy2)};
  for (; c < n; ++c) {
    s[0] += x[c] * y[c];
    s[1] += x[c] * x[c];
    s[2] += y[c] * y[c];
  }
  for (int i = 0; i < 3; ++i) sums[i] += s[i];
}

// out = g * x + h * y, all [n]: the gradient of one channel, with a weight for each position.
template <typename A>
INLINE void gradient_row_body(const A* g, const A* h, const A* x, const A* y, int64_t n, A* out) {
  constexpr int64_t lanes = Lanes<A>::count;
  int64_t p = 0;
  for (; p + lanes <= n; p += lanes) store(out + p, load(g + p) * load(x + p) + load(h + p) * load(y + p));
  for (; p < n; ++p) out[p] = g[p] * x[p] + h[p] * y[p];
}

// out = g * x + h * y for x, y and out [n]: the gradient at one position, whose weight all channels share.
template <typename A>
INLINE void gradient_point_body(A g, A h, const A* x, const A* y, int64_t n, A* out, bool bypass_cache) {
  constexpr int64_t lanes = Lanes<A>::count;
  int64_t c = 0;
  if (bypass_cache && is_aligned_16(out))
    for (; c + lanes <= n; c += lanes) store_nontemporal(out + c, g * load(x + c) + h * load(y + c));
  for (; c + lanes <= n; c += lanes) store(out + c, g * load(x + c) + h * load(y + c));
  for (; c < n; ++c) out[c] = g * x[c] + h * y[c];
}

// Overloads instead of template instances: VERSIONED cannot be put on a template.
#define DEFINE_LOOPS(A)                                                                                   \
  VERSIONED void add_four(const A* const* x, const A* const* y, int64_t n, A* xy, A* xx, A* yy) {         \
    add_body<A, kChannelsAtOnce>(x, y, n, xy, xx, yy);                                                    \
  }                                                                                                       \
  VERSIONED void add_one(const A* const* x, const A* const* y, int64_t n, A* xy, A* xx, A* yy) {          \
    add_body<A, 1>(x, y, n, xy, xx, yy);                                                                  \
  }                                                                                                       \
  VERSIONED void dot(const A* x, const A* y, int64_t n, A* sums) { dot_body<A>(x, y, n, sums); }          \
  VERSIONED void gradient_row(const A* g, const A* h, const A* x, const A* y, int64_t n, A* out) {        \
    gradient_row_body<A>(g, h, x, y, n, out);                                                             \
  }                                                                                                       \
  VERSIONED void gradient_point(A g, A h, const A* x, const A* y, int64_t n, A* out, bool bypass_cache) { \
    gradient_point_body<A>(g, h, x, y, n, out, bypass_cache);                                             \
  }
DEFINE_LOOPS(float)
DEFINE_LOOPS(double)
#undef DEFINE_LOOPS

}  // namespace
}  // namespace recontrast
