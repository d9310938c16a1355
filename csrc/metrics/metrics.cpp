// The pybind11 module recontrast._metrics: its functions check what memory safety needs, release the GIL and pass on
// the pointers of NumPy arrays. It does not need torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "histogram.h"
#include "parallel_for.h"
#include "per_image_aupro.h"
#include "regions.h"
#include "sweep.h"

namespace py = pybind11;

namespace recontrast {
namespace {

constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kPiece = 1 << 16;  // labels per piece, where there are no images

std::string shape_of(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

// Raises ValueError for an array that is not `wanted`.
void refuse(const std::string& op, const std::string& name, const std::string& wanted, const py::array& array) {
  throw py::value_error(op + ": " + name + ": wanted C-contiguous " + wanted + ", got " +
                        py::str(array.dtype()).cast<std::string>() + " of shape " + shape_of(array) +
                        ((array.flags() & py::array::c_style) == 0 ? ", not C-contiguous" : "") +
                        ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0 ? ", not aligned" : ""));
}

// Whether the array has dtype T in native byte order, and is aligned and C-contiguous.
template <typename T>
bool is_plain(const py::array& array) {
  return array.dtype().equal(py::dtype::of<T>()) && (array.flags() & py::array::c_style) != 0 &&
         (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

struct Masks {  // [N, H, W], P = H * W
  const uint8_t* data;
  int64_t N, H, W, P;
};

Masks masks_of(const std::string& op, const py::array& masks) {
  if (masks.ndim() != 3 || !(is_plain<bool>(masks) || is_plain<uint8_t>(masks)))
    refuse(op, "masks", "bool or uint8 (N, H, W)", masks);
  const int64_t N = masks.shape(0), H = masks.shape(1), W = masks.shape(2);
  if (H * W > kInt32)
    throw py::value_error(op + ": masks: wanted fewer than 2^31 pixels per image, got " + std::to_string(H * W));
  return {static_cast<const uint8_t*>(masks.data()), N, H, W, H * W};
}

void check_threads(const std::string& op, int64_t threads) {
  if (threads < 0) throw py::value_error(op + ": threads: wanted 0 or more, got " + std::to_string(threads));
}

void check_shape(const std::string& op, const std::string& name, const py::array& maps, const py::array& masks) {
  if (!maps.attr("shape").equal(masks.attr("shape")))
    throw py::value_error(op + ": " + name + ": wanted the shape of masks, " + shape_of(masks) + ", got " +
                          shape_of(maps));
}

py::tuple regions(const py::array& masks, int64_t threads) {
  const Masks m = masks_of("regions", masks);
  check_threads("regions", threads);
  py::array_t<int32_t> labels({m.N, m.H, m.W});
  py::array_t<int64_t> counts(m.N);
  int32_t* label = labels.mutable_data();  // [N, H, W]
  int64_t* count = counts.mutable_data();  // [N]
  {
    const py::gil_scoped_release release;
    const std::vector<Regions> image_regions = find_regions(m.data, m.N, m.H, m.W, threads);
    std::vector<int64_t> before(m.N + 1, 0);  // number of regions in the images before each
    for (int64_t n = 0; n < m.N; ++n) {
      count[n] = static_cast<int64_t>(image_regions[n].areas.size());
      before[n + 1] = before[n] + count[n];
    }
    if (before[m.N] > kInt32)
      throw std::length_error("regions: masks: wanted fewer than 2^31 regions, got " + std::to_string(before[m.N]));
    parallel_for(m.N, threads, m.N * m.P, [&](int64_t n) {
      int32_t* image = label + n * m.P;
      std::fill(image, image + m.P, 0);
      for (const Run& run : image_regions[n].runs)
        std::fill(image + run.begin, image + run.end, static_cast<int32_t>(before[n] + run.region + 1));
    });
  }
  return py::make_tuple(labels, counts);
}

// Calls function with a pointer to the scores of their dtype, after checking them.
template <typename Function>
auto with_scores(const std::string& op, const std::string& name, const py::array& scores, const Function& function) {
  if (is_plain<float>(scores)) return function(static_cast<const float*>(scores.data()));
  if (!is_plain<double>(scores)) refuse(op, name, "float32 or float64", scores);
  return function(static_cast<const double*>(scores.data()));
}

py::object result_of(const Sweep& result) {
  if (!result.finite || result.positives == 0 || result.negatives == 0) return py::none();
  const auto count = static_cast<double>(result.positives + result.negatives);
  const double accuracy = static_cast<double>(result.tp + result.negatives - result.fp) / count;
  return py::make_tuple(result.auroc, result.ap, result.f1_max, result.f1_threshold, accuracy, result.aupro);
}

py::object rates(const py::array& scores, const py::array& labels, int64_t threads) {
  check_threads("rates", threads);
  if (labels.ndim() != 1 || !(is_plain<bool>(labels) || is_plain<uint8_t>(labels)))
    refuse("rates", "labels", "bool or uint8 (M,)", labels);
  check_shape("rates", "scores", scores, labels);
  const auto* label = static_cast<const uint8_t*>(labels.data());  // [M]
  return result_of(with_scores("rates", "scores", scores, [&](const auto* score) {
    const py::gil_scoped_release release;
    const int64_t M = labels.size(), pieces = (M + kPiece - 1) / kPiece;
    std::vector<int64_t> begin(pieces + 1);
    for (int64_t n = 0; n <= pieces; ++n) begin[n] = std::min(n * kPiece, M);
    std::vector<Regions> positives(pieces);
    parallel_for(pieces, threads, M,
                 [&](int64_t n) { find_regions(label + begin[n], 1, begin[n + 1] - begin[n], positives[n]); });
    return sweep(score, begin, positives, {}, threads);
  }));
}

void check_limits(const std::string& op, const std::vector<double>& limits) {
  for (const double limit : limits)
    if (!(limit > 0 && limit <= 1))
      throw py::value_error(op + ": limits: wanted false positive rates in (0, 1], got " + std::to_string(limit));
}

py::object pixels(const py::array& maps, const py::array& masks, const std::vector<double>& limits, int64_t threads) {
  const Masks m = masks_of("pixels", masks);
  check_threads("pixels", threads);
  check_shape("pixels", "maps", maps, masks);
  check_limits("pixels", limits);
  return result_of(with_scores("pixels", "maps", maps, [&](const auto* map) {
    const py::gil_scoped_release release;
    std::vector<int64_t> begin(m.N + 1);
    for (int64_t n = 0; n <= m.N; ++n) begin[n] = n * m.P;
    return sweep(map, begin, find_regions(m.data, m.N, m.H, m.W, threads), limits, threads);
  }));
}

py::tuple per_image(const py::array& maps, const py::array& masks, double limit, int64_t threads) {
  const Masks m = masks_of("per_image", masks);
  check_threads("per_image", threads);
  check_shape("per_image", "maps", maps, masks);
  check_limits("per_image", {limit});
  py::array_t<double> areas(m.N);
  py::array_t<uint8_t> reasons(m.N);
  double* area = areas.mutable_data();       // [N]
  uint8_t* reason = reasons.mutable_data();  // [N]
  with_scores("per_image", "maps", maps, [&](const auto* map) {
    const py::gil_scoped_release release;
    parallel_for(m.N, threads, m.N * m.P, [&](int64_t n) {
      Regions regions;
      find_regions(m.data + n * m.P, m.H, m.W, regions);
      Undefined image_reason = kGoodImage;
      area[n] = per_image_aupro(map + n * m.P, m.P, regions, limit, image_reason);
      reason[n] = image_reason;
    });
    return 0;
  });
  return py::make_tuple(areas, reasons);
}

int64_t histogram(const py::array& maps, const py::array& masks, py::array counts, int shift, int base,
                  int64_t threads) {
  const Masks m = masks_of("histogram", masks);
  check_threads("histogram", threads);
  check_shape("histogram", "maps", maps, masks);
  if (!is_plain<float>(maps)) refuse("histogram", "maps", "float32", maps);
  if (!is_plain<int64_t>(counts) || counts.ndim() != 2 || counts.shape(0) != 3 || counts.shape(1) < 1 ||
      counts.shape(1) > kInt32 || !counts.writeable())
    refuse("histogram", "counts", "writeable int64 (3, bins)", counts);
  if (shift < 0 || shift > 30 || base < 0)
    throw py::value_error("histogram: shift and base: wanted 0 to 30 and at least 0, got " + std::to_string(shift) +
                          " and " + std::to_string(base));
  const auto* map = static_cast<const float*>(maps.data());   // [N, H, W]
  auto* good = static_cast<int64_t*>(counts.mutable_data());  // [3, bins]
  const Bins bins{shift, base, static_cast<int32_t>(counts.shape(1))};
  const py::gil_scoped_release release;
  const std::vector<Regions> regions = find_regions(m.data, m.N, m.H, m.W, threads);
  add_maps(map, m.P, regions, bins, good, good + bins.count, good + 2 * int64_t{bins.count}, threads);
  int64_t count = 0;
  for (const Regions& image : regions) count += static_cast<int64_t>(image.areas.size());
  return count;
}

}  // namespace
}  // namespace recontrast

PYBIND11_MODULE(_metrics, m, py::mod_gil_not_used()) {
  using namespace py::literals;
  m.doc() =
      "Compiled parts of recontrast.metrics, recontrast.regions and recontrast.metrics.streaming.\n\n"
      "Arrays are C-contiguous; masks and labels are bool or uint8, nonzero is positive. `threads` is the number to "
      "use "
      "at most, 0 for one per core; results do not depend on it.";
  m.def("regions", &recontrast::regions, "masks"_a, "threads"_a = 0,
        "8-connected regions of (N, H, W), numbered from 1 by their first pixel, image after image.\n\n"
        "Returns int32 labels (N, H, W), 0 outside, and the number of regions of each image, int64 (N,).");
  m.def("rates", &recontrast::rates, "scores"_a, "labels"_a, "threads"_a = 0,
        "Metrics of scores (M,), float32 or float64.\n\n"
        "Returns AUROC, AP, F1-max, its threshold, the accuracy there and an empty list; None where a score is not "
        "finite or a class is absent.");
  m.def("pixels", &recontrast::pixels, "maps"_a, "masks"_a, "limits"_a, "threads"_a = 0,
        "The same over all pixels of (N, H, W); the list has the AUPRO of the data set at each limit.");
  m.def("per_image", &recontrast::per_image, "maps"_a, "masks"_a, "limit"_a, "threads"_a = 0,
        "The reference's AUPRO of each image of (N, H, W), float64 (N,), and why it is NaN, uint8 (N,): 0 not NaN, "
        "1 no region, 2 a constant map, 3 no good pixel, 4 too few thresholds, 5 not finite, 6 too wide a range.");
  m.def(
      "histogram", &recontrast::histogram, "maps"_a, "masks"_a, "counts"_a, "shift"_a, "base"_a, "threads"_a = 0,
      "Adds float32 maps (N, H, W) to counts, int64 (3, bins): good pixels, positives, shares of regions in 2**-40.\n\n"
      "A score's bin is (its bits >> shift) - base, clamped. Returns the number of regions.");
}
