// anomaly_map and anomaly_map_inside on the CPU; recontrast/reference.py defines them.
//
// Compute-bound, on data in the caches. The matrices of upsampling and blur are banded (about 10, 6 and 4 nonzeros per
// row for 64, 32 and 16 -> 256 pixels), so a map takes 1.5 M multiply-adds instead of the 8.7 M of dense products, and
// is written once. A task is a strip of rows of one image: its part of distances @ cols^T stays in the L2 cache. In a
// region of interest, only the rows and columns between its outermost pixels are computed.

#include <algorithm>
#include <limits>
#include <tuple>

#include "anomaly_map_levels.h"
#include "simd.h"
#include "tensor_arguments.h"

namespace recontrast {
namespace {

constexpr int64_t kStrip = 64;  // rows per task: enough to reuse products along x, few enough for many tasks

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

// What blends one row of the map in a region of interest.
struct InsideRow {
  const float* const* rows;     // of all levels
  const float* weights;         // of the rows
  const int64_t* ends;          // for each level, the number of rows up to its end
  const float* const* factors;  // for each level
  int64_t levels;
};

typedef int32_t Int32 __attribute__((vector_size(64)));

// All bits of the lanes that are not 0. Without a comparison, which GCC makes lane by lane for vectors wider than those
// of the processor.
INLINE Bits32 mask_nonzero(const Float32& v) {
  const Bits32 magnitude = bits<Bits32>(v) & 0x7fffffff;
  return bits<Bits32>(-bits<Int32>(magnitude) >> 31);
}

// Writes `width` vectors of the row from pixel x on, and adds their pixels inside to the maximum `top`. `finite`: as in
// Maximum.
template <int64_t width>
INLINE void blend_inside(const InsideRow& row, int64_t x, float* out, Float32& top, Float32& finite) {
  const Float32 zero{};
  Float32 sum[width]{};
  for (int64_t l = 0, i = 0; l < row.levels; ++l) {
    Float32 level[width]{};
    for (; i < row.ends[l]; ++i)
      for (int64_t k = 0; k < width; ++k) level[k] += row.weights[i] * load(row.rows[i] + x + k * kLanes);
    for (int64_t k = 0; k < width; ++k) sum[k] += level[k] * load(row.factors[l] + x + k * kLanes);
  }
  const Bits32 lowest = bits<Bits32>(zero - std::numeric_limits<float>::infinity());
  for (int64_t k = 0; k < width; ++k) {
    const Bits32 inside = mask_nonzero(load(row.factors[0] + x + k * kLanes)), value = bits<Bits32>(sum[k]);
    const Float32 shown = bits<Float32>(value & inside), counted = bits<Float32>(select(inside, value, lowest));
    store(out + x + k * kLanes, shown);
    top = counted > top ? counted : top;
    finite += 0.0f * shown;
  }
}

// Writes pixels [from, to) of one row of the map in a region of interest: for each level the sum of its rows, times its
// factors. The first factor of a pixel is 0 outside, where the map is 0 and `maximum` takes no part.
VERSIONED void blend_rows_inside(const InsideRow& row, int64_t from, int64_t to, float* out, Maximum& maximum) {
  Float32 top = maximum.top, finite = maximum.finite;
  int64_t x = from;
  for (; x + 4 * kLanes <= to; x += 4 * kLanes) blend_inside<4>(row, x, out, top, finite);
  for (; x + kLanes <= to; x += kLanes) blend_inside<1>(row, x, out, top, finite);
  maximum.top = top;
  maximum.finite = finite;
  for (; x < to; ++x) {
    float sum = 0;
    for (int64_t l = 0, i = 0; l < row.levels; ++l) {
      float level = 0;
      for (; i < row.ends[l]; ++i) level += row.weights[i] * row.rows[i][x];
      sum += level * row.factors[l][x];
    }
    const bool inside = row.factors[0][x] != 0;
    out[x] = inside ? sum : 0.0f;
    if (inside) maximum.rest = larger(maximum.rest, sum - sum == 0 ? sum : std::numeric_limits<float>::quiet_NaN());
  }
}

// A region of interest: for each level the factors (M, H, W) of its pixels, and the columns inside of each row, [M *
// H]; M is the number of images, or 1 for a region that they share.
struct Region {
  std::vector<Tensor> factors;
  std::vector<Band> columns;
  int64_t images;
};

// Writes rows [first, last) of the map of image n and returns their maximum; NaN if a value is not finite. `region`:
// null for the whole image. `products`, `sum`: memory to reuse.
float map_strip(const std::vector<Level>& levels, const Region* region, int64_t n, int64_t first, int64_t last,
                int64_t H, int64_t W, float scale, std::vector<float>& products, std::vector<float>& sum, float* map) {
  Columns columns{{0, W}, nullptr};
  const int64_t own = region && region->images > 1 ? n : 0;  // image whose region it is
  if (region) {
    columns = {{W, 0}, region->columns.data() + own * H};
    for (int64_t y = first; y < last; ++y) {
      if (columns.rows[y].from == columns.rows[y].to) continue;
      columns.all.from = std::min(columns.all.from, columns.rows[y].from);
      columns.all.to = std::max(columns.all.to, columns.rows[y].to);
    }
  }
  columns.all.to = std::max(columns.all.from, columns.all.to);  // none inside
  const int64_t width = columns.all.to - columns.all.from;
  const StripProducts plan = plan_products(levels, first, last, columns);
  multiply_by_cols(levels, plan, n, W, columns.all, scale, products, sum);
  std::vector<const float*> rows(plan.taps), factors(levels.size());
  std::vector<float> weights(plan.taps);
  std::vector<int64_t> ends(levels.size());
  Maximum maximum;
  for (int64_t y = first; y < last; ++y) {
    float* out = map + y * W;
    if (columns.rows) {
      const Band& span = columns.rows[y];
      std::fill(out, out + std::min(span.from, W), 0.0f);
      std::fill(out + std::min(span.to, W), out + W, 0.0f);
      if (span.from == span.to) {
        std::fill(out, out + W, 0.0f);
        continue;
      }
    }
    int64_t count = 0;
    for (size_t l = 0; l < levels.size(); ++l) {
      const Band& band = levels[l].along_y[y];
      const float* row = levels[l].rows.const_data_ptr<float>() + y * levels[l].h;
      for (int64_t i = band.from; i < band.to; ++i, ++count) {
        rows[count] =
            products.data() + plan.base[l] + (i - plan.low[l]) * width - columns.all.from;  // column 0 of the map
        weights[count] = row[i];
      }
      ends[l] = count;
      if (region) factors[l] = region->factors[l].const_data_ptr<float>() + (own * H + y) * W;
    }
    if (columns.rows)
      blend_rows_inside({rows.data(), weights.data(), ends.data(), factors.data(), static_cast<int64_t>(levels.size())},
                        columns.rows[y].from, columns.rows[y].to, out, maximum);
    else
      blend_rows(rows.data(), weights.data(), count, W, out, maximum);
  }
  return maximum.value();
}

// Maps and maxima of all images. `region`: null for whole images.
std::tuple<Tensor, Tensor> compute_maps(const std::vector<Level>& levels, const Region* region, int64_t N, int64_t H,
                                        int64_t W, float scale) {
  const Tensor& like = levels[0].distances[0];
  Tensor maps = torch::stable::new_empty(like, std::array<int64_t, 3>{N, H, W});
  Tensor maximum = torch::stable::new_zeros(like, std::array<int64_t, 1>{N});
  if (maps.numel() == 0) return {maps, maximum};
  const int64_t strips = (H + kStrip - 1) / kStrip;
  std::vector<float> tops(N * strips);
  float* out = maps.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, N * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> products, sum;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / strips, first = task % strips * kStrip;
      tops[task] =
          map_strip(levels, region, n, first, std::min(H, first + kStrip), H, W, scale, products, sum, out + n * H * W);
    }
  });
  for (int64_t n = 0; n < N; ++n) {
    float top = tops[n * strips];
    for (int64_t strip = 1; strip < strips; ++strip) top = larger(top, tops[n * strips + strip]);
    const bool is_empty = top == -std::numeric_limits<float>::infinity();  // no pixel inside
    maximum.mutable_data_ptr<float>()[n] = is_empty ? 0.0f : top;
  }
  return {maps, maximum};
}

void check_lists(const char* op, size_t distances, size_t rows, size_t cols) {
  STD_TORCH_CHECK(distances && distances == rows && rows == cols, op,
                  ": distances, rows and cols: wanted lists of one length > 0, got ", distances, ", ", rows, " and ",
                  cols);
}

std::tuple<Tensor, Tensor> anomaly_map(std::vector<Tensor> distances, std::vector<Tensor> rows,
                                       std::vector<Tensor> cols, double scale) {
  check_lists("anomaly_map", distances.size(), rows.size(), cols.size());
  const std::vector<Level> levels = group_levels(distances, rows, cols);
  return compute_maps(levels, nullptr, distances[0].size(0), rows[0].size(0), cols[0].size(0),
                      static_cast<float>(scale));
}

// The columns from the first to the last pixel inside of each row of `factors` (M, H, W), with the others of their
// vectors.
std::vector<Band> find_columns(const Tensor& factors) {
  const int64_t rows = factors.size(0) * factors.size(1), W = factors.size(2);
  std::vector<Band> columns = row_bands(factors.const_data_ptr<float>(), rows, W);
  for (Band& band : columns)
    if (band.from < band.to)
      band = {band.from / kLanes * kLanes, std::min((band.to + kLanes - 1) / kLanes * kLanes, W)};
  return columns;
}

std::tuple<Tensor, Tensor> anomaly_map_inside(std::vector<Tensor> distances, std::vector<Tensor> rows,
                                              std::vector<Tensor> cols, std::vector<Tensor> factors, double scale) {
  check_lists("anomaly_map_inside", distances.size(), rows.size(), cols.size());
  const int64_t N = distances[0].size(0), H = rows[0].size(0), W = cols[0].size(0);
  STD_TORCH_CHECK(factors.size() == distances.size(), "anomaly_map_inside: factors: wanted ", distances.size(),
                  ", one for each pair, got ", factors.size());
  std::vector<Level> levels;
  Region region;
  for (size_t i = 0; i < distances.size(); ++i) {  // each pair is a level: two may have factors of their own
    const Tensor& f = factors[i];
    const bool fits = f.scalar_type() == ScalarType::Float && f.dim() == 3 && f.size(1) == H && f.size(2) == W &&
                      (f.size(0) == 1 || f.size(0) == N) && f.size(0) == factors[0].size(0);
    STD_TORCH_CHECK(fits, "anomaly_map_inside: factors[", i, "]: wanted float32 (", N, ", ", H, ", ", W, ") or (1, ", H,
                    ", ", W, "), as the others, got ", shape(f));
    levels.push_back(std::move(group_levels({distances[i]}, {rows[i]}, {cols[i]})[0]));
    region.factors.push_back(torch::stable::contiguous(f));
  }
  for (const Level& level : levels)
    STD_TORCH_CHECK(level.distances[0].size(0) == N && level.rows.size(0) == H && level.cols.size(0) == W,
                    "anomaly_map_inside: wanted ", N, " images and maps of ", H, " x ", W, " for each pair");
  region.images = factors[0].size(0);
  region.columns = find_columns(region.factors[0]);
  return compute_maps(levels, &region, N, H, W, static_cast<float>(scale));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CPU, m) {
  m.impl("anomaly_map", TORCH_BOX(&anomaly_map));
  m.impl("anomaly_map_inside", TORCH_BOX(&anomaly_map_inside));
}

}  // namespace recontrast
