// The innermost loops of norm_act on the CPU, over blocks of rows whose numbers are contiguous.
//
// In channels_last a row is one position with all its channels, so that each lane has its own parameters. In NCHW a row
// is one channel of one image, and its parameters are single numbers.
#pragma once

#include "norm_act.h"
#include "norm_act_lanes.h"

namespace recontrast {
namespace {

constexpr int64_t kAhead = 4096;  // bytes; 2048 and 8192 are as fast

// Parameters of a channel or, in channels_last, of each channel in the order of place_of; padded to whole vectors.
template <typename A>
struct Affine {
  const A *mean, *scale, *bias;  // pre-activation = (x - mean) * scale + bias [+ residual]
};

// A block of `rows` rows [n]; the stride of each tensor is the distance of its rows, in elements.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  // Also asks for what will be read kAhead bytes further on: the processor's own prefetcher follows one ascending
  // sequence of a page, and not four rows by turns. A prefetch past the end of the features is harmless.
  INLINE const T* at(int64_t row, int64_t i) const {
    const T* from = data + row * stride + i;
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
    return from;
  }
};
template <typename T>
struct Target {
  T* data;  // null: not wanted
  int64_t stride;
  INLINE T* at(int64_t row, int64_t i) const { return data + row * stride + i; }
};

template <typename T, bool per_lane>
INLINE Wide<T> parameter(const Acc<T>* p, int64_t i) {
  if constexpr (per_lane) return load_wide<T>(p + i);
  return repeat<T>(*p);
}

// Calls body(i, lanes) for each vector of a row: all its numbers, or the first `lanes` of the last one.
template <typename T, typename Body>
INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, std::integral_constant<int64_t, kLanes<T>>{});
  if (i < n) body(i, n - i);
}

// Calls body(first row, number of rows) with four rows at once, whose parameters are loaded once, then one by one. A
// block with parameters of its own has one row.
template <bool per_lane, typename Body>
INLINE void for_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  if constexpr (per_lane)
    for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int64_t, 4>{});
  for (; r < rows; ++r) body(r, std::integral_constant<int64_t, 1>{});
}

template <typename T, typename L>
INLINE void put(T* to, const Wide<T>& v, L lanes, bool bypass_cache = false) {
  if constexpr (std::is_same_v<L, int64_t>)
    write_first(to, v, lanes);
  else
    write(to, v, bypass_cache);
}

// Sets the numbers of the last vector of a row that are not its own to zero.
template <typename V, typename L>
INLINE V whole_or_first(const V& v, L lanes) {
  if constexpr (std::is_same_v<L, int64_t>) return first_lanes(v, lanes);
  return v;
}

// Sums over a block: of each channel in memory, or of a single channel in one vector, which stays in a register.
template <typename T, bool per_lane>
struct Sums {
  Acc<T>* to;
  Wide<T> total{};
  INLINE void add(int64_t i, const Wide<T>& v) {
    if constexpr (per_lane)
      store_wide<T>(to + i, load_wide<T>(to + i) + v);
    else
      total += v;
  }
  INLINE void finish() {
    if constexpr (!per_lane) *to += sum_lanes(total);
  }
};

// Adds x - mean and its square to the sums of each channel.
template <typename T, bool per_lane>
INLINE void moments_body(const Rows<T>& x, int64_t rows, int64_t n, const Acc<T>* mean, Acc<T>* sum, Acc<T>* squares) {
  Sums<T, per_lane> sums{sum}, all_squares{squares};
  for_rows<per_lane>(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    for_vectors<T>(n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Wide<T> m = parameter<T, per_lane>(mean, i);
      Wide<T> s{}, q{};
      for (int64_t k = 0; k < count; ++k) {
        const Wide<T> d = whole_or_first(read(x.at(r + k, i), lanes) - m, lanes);
        s += d;
        q += d * d;
      }
      sums.add(i, s);
      all_squares.add(i, q);
    });
  });
  sums.finish();
  all_squares.finish();
}

// y = act((x - mean) * scale + bias [+ residual]).
template <typename T, Act act, bool has_residual, bool per_lane>
INLINE void apply_body(const Rows<T>& x, const Rows<T>& residual, const Target<T>& y, int64_t rows, int64_t n,
                       const Affine<Acc<T>>& p, bool bypass_cache) {
  for_rows<per_lane>(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    for_vectors<T>(n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Wide<T> mean = parameter<T, per_lane>(p.mean, i), scale = parameter<T, per_lane>(p.scale, i);
      const Wide<T> bias = parameter<T, per_lane>(p.bias, i);
      for (int64_t k = 0; k < count; ++k) {
        Wide<T> v = (read(x.at(r + k, i), lanes) - mean) * scale + bias;
        if constexpr (has_residual) v = rounded<T>(v) + read(residual.at(r + k, i), lanes);
        if constexpr (act == Act::relu) v = relu(v);
        if constexpr (act == Act::gelu) v = gelu(v);
        put(y.at(r + k, i), v, lanes, bypass_cache);
      }
    });
  });
}

// Arguments of the two passes of backward. `masked` is the gradient before the activation.
template <typename T>
struct Backward {
  Rows<T> grad, x, kept;
  Target<T> masked, dx;  // what the first pass writes; dx = masked * scale, the gradient in eval mode
  int64_t rows, n;
  Affine<Acc<T>> affine;
};

template <typename T, Act act, Kept kept, bool per_lane, typename L>
INLINE Wide<T> masked_gradient(const Backward<T>& b, const Wide<T>& centred, int64_t r, int64_t i, L lanes) {
  const Wide<T> g = read(b.grad.at(r, i), lanes);
  if constexpr (act == Act::none) return g;
  if constexpr (kept == Kept::output) return where_positive(read(b.kept.at(r, i), lanes), g);
  Wide<T> v = centred * parameter<T, per_lane>(b.affine.scale, i) + parameter<T, per_lane>(b.affine.bias, i);
  if constexpr (kept == Kept::residual) v = rounded<T>(v) + read(b.kept.at(r, i), lanes);
  if constexpr (act == Act::gelu) return g * gelu_slope(v);
  return where_positive(v, g);
}

// The first pass: adds the masked gradient and its product with x - mean to the sums, and writes what is wanted.
template <typename T, Act act, Kept kept, bool per_lane>
INLINE void reduce_body(const Backward<T>& b, Acc<T>* sum, Acc<T>* dot) {
  const bool masked = b.masked.data, dx = b.dx.data;
  Sums<T, per_lane> sums{sum}, dots{dot};
  for_rows<per_lane>(b.rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    for_vectors<T>(b.n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Wide<T> mean = parameter<T, per_lane>(b.affine.mean, i);
      Wide<T> s{}, d{};
      for (int64_t k = 0; k < count; ++k) {
        const Wide<T> centred = whole_or_first(read(b.x.at(r + k, i), lanes) - mean, lanes);
        const Wide<T> g = masked_gradient<T, act, kept, per_lane>(b, centred, r + k, i, lanes);
        if (masked) put(b.masked.at(r + k, i), g, lanes);
        if (dx) put(b.dx.at(r + k, i), g * parameter<T, per_lane>(b.affine.scale, i), lanes);
        s += g;
        d += g * centred;
      }
      sums.add(i, s);
      dots.add(i, d);
    });
  });
  sums.finish();
  dots.finish();
}

// The second pass: dx = masked * scale - (x - mean) * slope - offset. `grad` is already masked unless act is relu.
template <typename T, Act act, bool per_lane>
INLINE void gradient_body(const Backward<T>& b, const Acc<T>* slope, const Acc<T>* offset, bool bypass_cache) {
  for_rows<per_lane>(b.rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    for_vectors<T>(b.n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Wide<T> mean = parameter<T, per_lane>(b.affine.mean, i), scale = parameter<T, per_lane>(b.affine.scale, i);
      const Wide<T> by_x = parameter<T, per_lane>(slope, i), constant = parameter<T, per_lane>(offset, i);
      for (int64_t k = 0; k < count; ++k) {
        const Wide<T> centred = read(b.x.at(r + k, i), lanes) - mean;
        const Wide<T> g = masked_gradient<T, act, Kept::none, per_lane>(b, centred, r + k, i, lanes);
        put(b.dx.at(r + k, i), g * scale - centred * by_x - constant, lanes, bypass_cache);
      }
    });
  });
}

// The instances for the arguments of a call.
template <typename T, bool per_lane>
INLINE void apply_any(Act act, const Rows<T>& x, const Rows<T>& residual, const Target<T>& y, int64_t rows, int64_t n,
                      const Affine<Acc<T>>& p, bool bypass_cache) {
  if (residual.data) {
    if (act == Act::relu) return apply_body<T, Act::relu, true, per_lane>(x, residual, y, rows, n, p, bypass_cache);
    if (act == Act::gelu) return apply_body<T, Act::gelu, true, per_lane>(x, residual, y, rows, n, p, bypass_cache);
    return apply_body<T, Act::none, true, per_lane>(x, residual, y, rows, n, p, bypass_cache);
  }
  if (act == Act::relu) return apply_body<T, Act::relu, false, per_lane>(x, residual, y, rows, n, p, bypass_cache);
  if (act == Act::gelu) return apply_body<T, Act::gelu, false, per_lane>(x, residual, y, rows, n, p, bypass_cache);
  apply_body<T, Act::none, false, per_lane>(x, residual, y, rows, n, p, bypass_cache);
}

template <typename T, bool per_lane>
INLINE void reduce_any(Act act, const Backward<T>& b, Acc<T>* sum, Acc<T>* dot) {
  if (act == Act::none) return reduce_body<T, Act::none, Kept::none, per_lane>(b, sum, dot);
  if (act == Act::relu && b.kept.data) return reduce_body<T, Act::relu, Kept::output, per_lane>(b, sum, dot);
  if (act == Act::relu) return reduce_body<T, Act::relu, Kept::none, per_lane>(b, sum, dot);
  if (b.kept.data) return reduce_body<T, Act::gelu, Kept::residual, per_lane>(b, sum, dot);
  reduce_body<T, Act::gelu, Kept::none, per_lane>(b, sum, dot);
}

template <typename T, bool per_lane>
INLINE void gradient_any(Act act, const Backward<T>& b, const Acc<T>* slope, const Acc<T>* offset, bool bypass_cache) {
  if (act == Act::relu) return gradient_body<T, Act::relu, per_lane>(b, slope, offset, bypass_cache);
  gradient_body<T, Act::none, per_lane>(b, slope, offset, bypass_cache);
}

// Overloads instead of template instances: VERSIONED cannot be put on a template. float64 is for tests: one version.
#define DEFINE_LOOPS(T, VERSION)                                                                                  \
  VERSION void moments(bool per_lane, const Rows<T>& x, int64_t rows, int64_t n, const Acc<T>* mean, Acc<T>* sum, \
                       Acc<T>* squares) {                                                                         \
    per_lane ? moments_body<T, true>(x, rows, n, mean, sum, squares)                                              \
             : moments_body<T, false>(x, rows, n, mean, sum, squares);                                            \
  }                                                                                                               \
  VERSION void apply(bool per_lane, Act act, const Rows<T>& x, const Rows<T>& residual, const Target<T>& y,       \
                     int64_t rows, int64_t n, const Affine<Acc<T>>& p, bool bypass_cache) {                       \
    per_lane ? apply_any<T, true>(act, x, residual, y, rows, n, p, bypass_cache)                                  \
             : apply_any<T, false>(act, x, residual, y, rows, n, p, bypass_cache);                                \
  }                                                                                                               \
  VERSION void reduce(bool per_lane, Act act, const Backward<T>& b, Acc<T>* sum, Acc<T>* dot) {                   \
    per_lane ? reduce_any<T, true>(act, b, sum, dot) : reduce_any<T, false>(act, b, sum, dot);                    \
  }                                                                                                               \
  VERSION void gradient(bool per_lane, Act act, const Backward<T>& b, const Acc<T>* slope, const Acc<T>* offset,  \
                        bool bypass_cache) {                                                                      \
    per_lane ? gradient_any<T, true>(act, b, slope, offset, bypass_cache)                                         \
             : gradient_any<T, false>(act, b, slope, offset, bypass_cache);                                       \
  }
DEFINE_LOOPS(float, VERSIONED)
DEFINE_LOOPS(double, )
DEFINE_LOOPS(torch::headeronly::Half, VERSIONED)
DEFINE_LOOPS(torch::headeronly::BFloat16, VERSIONED)
#ifdef NATIVE_BFLOAT16
DEFINE_LOOPS(NativeBFloat16, NATIVE_BFLOAT16)
#endif
#undef DEFINE_LOOPS

}  // namespace
}  // namespace recontrast
