// anomaly_map on the CPU; recontrast/reference.py defines it.
//
// Compute-bound, on data in the caches. The matrices of upsampling and blur are banded (about 10, 6 and 4 nonzeros per
// row for 64, 32 and 16 -> 256 pixels), so a map takes 1.5 M multiply-adds instead of the 8.7 M of dense products, and
// is written once. A task is a strip of rows of one image: its part of distances @ cols^T stays in the L2 cache.

#include <algorithm>
#include <limits>
#include <tuple>

#include "simd.h"
#include "tensor_arguments.h"

namespace recontrast {
namespace {

constexpr int64_t kStrip = 64;  // rows per task: enough to reuse products along x, few enough for many tasks
constexpr int64_t kLanes = Lanes<float>::count;

struct Band {
  int64_t from, to;  // columns [from, to) of a row; the others are zero
};

// The band of each row of a (height, width) matrix.
std::vector<Band> row_bands(const float* matrix, int64_t height, int64_t width) {
  std::vector<Band> bands(height);
  for (int64_t i = 0; i < height; ++i) {
    const float* row = matrix + i * width;
    int64_t from = 0, to = width;
    while (from < width && row[from] == 0) ++from;
    while (to > from && row[to - 1] == 0) --to;
    bands[i] = {from, to};
  }
  return bands;
}

// All pairs of one resolution; they share their matrices.
struct Level {
  std::vector<Tensor> distances;  // each (N, h, w)
  Tensor rows, cols;              // (H, h), (W, w)
  int64_t h, w;
  std::vector<Band> along_y;           // [H]: the rows of the distances that contribute to a row of the map
  std::vector<Band> along_x;           // [w]: the columns of the map to which a column of the distances contributes
  std::vector<float> cols_transposed;  // (w, W)
};

// to += weight * from, both [n].
VERSIONED void add_scaled(const float* from, float weight, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + weight * load(from + i));
  for (; i < n; ++i) to[i] += weight * from[i];
}

// The larger of two maxima; NaN if one of them is.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

// Maximum of many values, in separate lanes; NaN if a value is not finite.
struct Maximum {
  Float32 top = Float32{} - std::numeric_limits<float>::infinity();
  Float32 finite{};  // zeros while all values are finite: 0 * infinity and 0 * NaN are NaN
  float rest = -std::numeric_limits<float>::infinity();  // of the values that fill no vector

  float value() const {
    float maximum = rest;
    for (int64_t i = 0; i < kLanes; ++i) maximum = larger(maximum, finite[i] == 0 ? top[i] : finite[i]);
    return maximum;
  }
};

// Writes one row of the map, sum_i weights[i] * rows[i], and adds its values to `maximum`.
VERSIONED void blend_rows(const float* const* rows, const float* weights, int64_t count, int64_t n, float* out,
                          Maximum& maximum) {
  Float32 top = maximum.top, finite = maximum.finite;
  int64_t x = 0;
  for (; x + 2 * kLanes <= n; x += 2 * kLanes) {
    Float32 a{}, b{};
    for (int64_t i = 0; i < count; ++i) {
      a += weights[i] * load(rows[i] + x);
      b += weights[i] * load(rows[i] + x + kLanes);
    }
    store(out + x, a);
    store(out + x + kLanes, b);
    top = a > top ? a : top;
    top = b > top ? b : top;
    finite += 0.0f * a;
    finite += 0.0f * b;
  }
  maximum.top = top;
  maximum.finite = finite;
  for (; x < n; ++x) {
    float a = 0;
    for (int64_t i = 0; i < count; ++i) a += weights[i] * rows[i][x];
    out[x] = a;
    maximum.rest = larger(maximum.rest, a - a == 0 ? a : std::numeric_limits<float>::quiet_NaN());
  }
}

// Checks the arguments and groups the pairs by their matrices.
std::vector<Level> group_levels(const std::vector<Tensor>& distances, const std::vector<Tensor>& rows,
                                const std::vector<Tensor>& cols) {
  std::vector<Level> levels;
  for (size_t i = 0; i < distances.size(); ++i) {
    const bool is_float = distances[i].scalar_type() == ScalarType::Float &&
                          rows[i].scalar_type() == ScalarType::Float && cols[i].scalar_type() == ScalarType::Float;
    const bool fits = distances[i].dim() == 3 && rows[i].dim() == 2 && cols[i].dim() == 2 &&
                      distances[i].size(0) == distances[0].size(0) && rows[i].size(0) == rows[0].size(0) &&
                      cols[i].size(0) == cols[0].size(0) && rows[i].size(1) == distances[i].size(1) &&
                      cols[i].size(1) == distances[i].size(2);
    STD_TORCH_CHECK(is_float && fits, "anomaly_map: pair ", i, ": wanted float32 (N, h, w), (H, h) and (W, w), got ",
                    shape(distances[i]), ", ", shape(rows[i]), " and ", shape(cols[i]));
    const Tensor r = torch::stable::contiguous(rows[i]), c = torch::stable::contiguous(cols[i]);
    const auto same = std::find_if(levels.begin(), levels.end(), [&](const Level& level) {
      return level.rows.data_ptr() == r.data_ptr() && level.cols.data_ptr() == c.data_ptr() && level.h == r.size(1) &&
             level.w == c.size(1);
    });
    if (same != levels.end()) {
      same->distances.push_back(torch::stable::contiguous(distances[i]));
      continue;
    }
    Level level{{torch::stable::contiguous(distances[i])}, r, c, r.size(1), c.size(1), {}, {}, {}};
    const int64_t H = r.size(0), W = c.size(0);
    level.along_y = row_bands(r.const_data_ptr<float>(), H, level.h);
    level.cols_transposed.resize(level.w * W);
    const float* from = c.const_data_ptr<float>();
    for (int64_t x = 0; x < W; ++x)
      for (int64_t j = 0; j < level.w; ++j) level.cols_transposed[j * W + x] = from[x * level.w + j];
    level.along_x = row_bands(level.cols_transposed.data(), level.w, W);
    levels.push_back(std::move(level));
  }
  return levels;
}

// Where the products distances @ cols^T of a strip are stored: for each level, the rows of distances that the strip
// needs.
struct StripProducts {
  std::vector<int64_t> base;  // [levels] index of the first product
  std::vector<int64_t> low;   // [levels] first row of the distances
  int64_t size = 0;           // of all products
  int64_t taps = 0;           // rows of products that one row of the map adds up, at most
};

// The products that rows [first, last) of the map need.
StripProducts plan_products(const std::vector<Level>& levels, int64_t first, int64_t last, int64_t W) {
  StripProducts plan;
  plan.base.resize(levels.size());
  plan.low.resize(levels.size());
  for (size_t l = 0; l < levels.size(); ++l) {
    int64_t from = levels[l].h, to = 0, widest = 0;
    for (int64_t y = first; y < last; ++y) {
      const Band& band = levels[l].along_y[y];
      if (band.from == band.to) continue;
      from = std::min(from, band.from);
      to = std::max(to, band.to);
      widest = std::max(widest, band.to - band.from);
    }
    plan.base[l] = plan.size;
    plan.low[l] = from;
    plan.taps += widest;
    plan.size += std::max<int64_t>(to - from, 0) * W;
  }
  return plan;
}

// scale * distances @ cols^T of image n, for the rows in `plan`. `sum`: memory for one row of distances.
void multiply_by_cols(const std::vector<Level>& levels, const StripProducts& plan, int64_t n, int64_t W, float scale,
                      std::vector<float>& products, std::vector<float>& sum) {
  products.assign(plan.size, 0.0f);
  for (size_t l = 0; l < levels.size(); ++l) {
    const Level& level = levels[l];
    const int64_t end = l + 1 < levels.size() ? plan.base[l + 1] : plan.size;
    sum.resize(level.w);
    for (int64_t i = plan.low[l], product = plan.base[l]; product < end; ++i, product += W) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const Tensor& d : level.distances)
        add_scaled(d.const_data_ptr<float>() + (n * level.h + i) * level.w, scale, level.w, sum.data());
      for (int64_t j = 0; j < level.w; ++j) {
        const auto [from, to] = level.along_x[j];
        add_scaled(level.cols_transposed.data() + j * W + from, sum[j], to - from, products.data() + product + from);
      }
    }
  }
}

// Writes rows [first, last) of the map of image n and returns their maximum; NaN if a value is not finite. `products`,
// `sum`: memory to reuse.
float map_strip(const std::vector<Level>& levels, int64_t n, int64_t first, int64_t last, int64_t W, float scale,
                std::vector<float>& products, std::vector<float>& sum, float* map) {
  const StripProducts plan = plan_products(levels, first, last, W);
  multiply_by_cols(levels, plan, n, W, scale, products, sum);
  std::vector<const float*> rows(plan.taps);
  std::vector<float> weights(plan.taps);
  Maximum maximum;
  for (int64_t y = first; y < last; ++y) {
    int64_t count = 0;
    for (size_t l = 0; l < levels.size(); ++l) {
      const Band& band = levels[l].along_y[y];
      const float* row = levels[l].rows.const_data_ptr<float>() + y * levels[l].h;
      for (int64_t i = band.from; i < band.to; ++i, ++count) {
        rows[count] = products.data() + plan.base[l] + (i - plan.low[l]) * W;
        weights[count] = row[i];
      }
    }
    blend_rows(rows.data(), weights.data(), count, W, map + y * W, maximum);
  }
  return maximum.value();
}

std::tuple<Tensor, Tensor> anomaly_map(std::vector<Tensor> distances, std::vector<Tensor> rows,
                                       std::vector<Tensor> cols, double scale) {
  STD_TORCH_CHECK(!distances.empty() && distances.size() == rows.size() && rows.size() == cols.size(),
                  "anomaly_map: distances, rows and cols: wanted lists of one length > 0, got ", distances.size(), ", ",
                  rows.size(), " and ", cols.size());
  const std::vector<Level> levels = group_levels(distances, rows, cols);
  const int64_t N = distances[0].size(0), H = rows[0].size(0), W = cols[0].size(0);
  Tensor maps = torch::stable::new_empty(distances[0], std::array<int64_t, 3>{N, H, W});
  Tensor maximum = torch::stable::new_zeros(distances[0], std::array<int64_t, 1>{N});
  if (maps.numel() == 0) return {maps, maximum};
  const int64_t strips = (H + kStrip - 1) / kStrip;
  std::vector<float> tops(N * strips);
  float* out = maps.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, N * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> products, sum;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / strips, first = task % strips * kStrip;
      tops[task] = map_strip(levels, n, first, std::min(H, first + kStrip), W, static_cast<float>(scale), products, sum,
                             out + n * H * W);
    }
  });
  for (int64_t n = 0; n < N; ++n) {
    float top = tops[n * strips];
    for (int64_t strip = 1; strip < strips; ++strip) top = larger(top, tops[n * strips + strip]);
    maximum.mutable_data_ptr<float>()[n] = top;
  }
  return {maps, maximum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CPU, m) { m.impl("anomaly_map", TORCH_BOX(&anomaly_map)); }

}  // namespace recontrast
