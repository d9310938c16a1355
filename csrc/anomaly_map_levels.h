// Levels of an anomaly map: pairs of features of one resolution, their banded matrices, and their products with the
// distances.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"
#include "tensor_arguments.h"

namespace recontrast {
namespace {

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

// Columns of a strip of the map that are computed, and those of each of its rows.
struct Columns {
  Band all;
  const Band* rows;  // null: all of them
};

// The products that rows [first, last) of the map need; rows without columns need none.
StripProducts plan_products(const std::vector<Level>& levels, int64_t first, int64_t last, const Columns& columns) {
  StripProducts plan;
  plan.base.resize(levels.size());
  plan.low.resize(levels.size());
  for (size_t l = 0; l < levels.size(); ++l) {
    int64_t from = levels[l].h, to = 0, widest = 0;
    for (int64_t y = first; y < last; ++y) {
      const Band& band = levels[l].along_y[y];
      if (band.from == band.to || (columns.rows && columns.rows[y].from == columns.rows[y].to)) continue;
      from = std::min(from, band.from);
      to = std::max(to, band.to);
      widest = std::max(widest, band.to - band.from);
    }
    plan.base[l] = plan.size;
    plan.low[l] = from;
    plan.taps += widest;
    plan.size += std::max<int64_t>(to - from, 0) * (columns.all.to - columns.all.from);
  }
  return plan;
}

// scale * distances @ cols^T of image n, for the rows in `plan` and the columns in `span`. `sum`: memory for one row of
// distances.
void multiply_by_cols(const std::vector<Level>& levels, const StripProducts& plan, int64_t n, int64_t W, Band span,
                      float scale, std::vector<float>& products, std::vector<float>& sum) {
  products.assign(plan.size, 0.0f);
  for (size_t l = 0; l < levels.size(); ++l) {
    const Level& level = levels[l];
    const int64_t end = l + 1 < levels.size() ? plan.base[l + 1] : plan.size;
    sum.resize(level.w);
    for (int64_t i = plan.low[l], product = plan.base[l]; product < end; ++i, product += span.to - span.from) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const Tensor& d : level.distances)
        add_scaled(d.const_data_ptr<float>() + (n * level.h + i) * level.w, scale, level.w, sum.data());
      for (int64_t j = 0; j < level.w; ++j) {
        const int64_t from = std::max(level.along_x[j].from, span.from), to = std::min(level.along_x[j].to, span.to);
        if (from >= to) continue;
        add_scaled(level.cols_transposed.data() + j * W + from, sum[j], to - from,
                   products.data() + product + from - span.from);
      }
    }
  }
}

}  // namespace
}  // namespace recontrast
