// Regions of masks for recontrast/metrics.py: the pybind11 module recontrast._metrics, on NumPy arrays, without torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int64_t kGrain = 1 << 17;  // pixels a thread takes at least: starting it costs about as much as reading them
constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();

// Positive pixels begin .. end - 1 of one row. `parent` is a run of the same region, itself or an earlier one.
struct Run {
  int32_t begin, end, parent;
};

int32_t find(std::vector<Run>& runs, int32_t i) {
  while (runs[i].parent != i) {
    runs[i].parent = runs[runs[i].parent].parent;  // halves the path
    i = runs[i].parent;
  }
  return i;
}

// The earlier root stays, so that a region's root is the run with its first pixel.
void unite(std::vector<Run>& runs, int32_t a, int32_t b) {
  a = find(runs, a);
  b = find(runs, b);
  runs[std::max(a, b)].parent = std::min(a, b);
}

// First column from `w` on whose pixel is zero or not, as asked.
int64_t next_column(const uint8_t* row, int64_t w, int64_t W, bool positive) {
  if (positive) {
    for (uint64_t eight = 0; w + 8 <= W; w += 8) {  // most pixels of most masks are zero
      std::memcpy(&eight, row + w, 8);
      if (eight != 0) break;
    }
  }
  while (w < W && (row[w] != 0) != positive) ++w;
  return w;
}

// Labels the 8-connected regions of mask [H, W] 1, 2, ... by their first pixel and returns how many there are.
// One pass finds the runs and unites those that touch; a second writes the labels. `runs` is working memory.
int32_t label_image(const uint8_t* mask, int64_t H, int64_t W, int32_t* label, std::vector<Run>& runs,
                    std::vector<int32_t>& rows) {
  runs.clear();
  rows.assign(1, 0);  // [H + 1] first run of each row
  size_t above = 0;   // first run of the row above that may still touch
  for (int64_t h = 0; h < H; ++h) {
    const uint8_t* row = mask + h * W;
    const size_t first = runs.size();
    for (int64_t w = next_column(row, 0, W, true); w < W;) {
      const int64_t end = next_column(row, w, W, false);
      const auto self = static_cast<int32_t>(runs.size());
      runs.push_back({static_cast<int32_t>(w), static_cast<int32_t>(end), self});
      while (above < first && runs[above].end < w) ++above;  // ends left of w - 1
      for (size_t i = above; i < first && runs[i].begin <= end; ++i) unite(runs, static_cast<int32_t>(i), self);
      w = next_column(row, end, W, true);
    }
    above = first;
    rows.push_back(static_cast<int32_t>(runs.size()));
  }

  int32_t count = 0;
  std::memset(label, 0, sizeof(int32_t) * H * W);
  for (int64_t h = 0; h < H; ++h) {
    for (int32_t i = rows[h]; i < rows[h + 1]; ++i) {
      Run& run = runs[i];
      // From here on `parent` of the runs before this one holds their label; a root comes before all that point to it.
      run.parent = run.parent == i ? ++count : runs[run.parent].parent;
      std::fill(label + h * W + run.begin, label + h * W + run.end, run.parent);
    }
  }
  return count;
}

// Calls work(task) for each task, with as many threads as asked for (0: one per core) and worth it.
template <typename Work>
void parallel(int64_t tasks, int64_t threads, int64_t pixels, const Work& work) {
  if (threads == 0) threads = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
  threads = std::min({threads, tasks, std::max<int64_t>(pixels / kGrain, 1)});
  std::atomic<int64_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  auto run = [&] {
    try {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) work(task);
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
      next = tasks;
    }
  };
  {
    std::vector<std::jthread> pool;
    try {
      for (int64_t i = 1; i < threads; ++i) pool.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads to have: those that there are do the work
    }
    run();
  }
  if (error) std::rethrow_exception(error);
}

py::tuple regions(const py::array& masks, int64_t threads) {
  const bool bytes = masks.dtype().kind() == 'b' || (masks.dtype().kind() == 'u' && masks.itemsize() == 1);
  if (!bytes || masks.ndim() != 3 || (masks.flags() & py::array::c_style) == 0) {
    throw py::value_error("regions: masks: wanted C-contiguous bool or uint8 (N, H, W), got " +
                          py::str(masks.dtype()).cast<std::string>() + " of shape " +
                          py::str(masks.attr("shape")).cast<std::string>() +
                          ((masks.flags() & py::array::c_style) == 0 ? ", not C-contiguous" : ""));
  }
  if (threads < 0) throw py::value_error("regions: threads: wanted 0 or more, got " + std::to_string(threads));
  const int64_t N = masks.shape(0), H = masks.shape(1), W = masks.shape(2), P = H * W;
  if (P > kInt32)
    throw py::value_error("regions: masks: wanted fewer than 2^31 pixels per image, got " + std::to_string(P));

  py::array_t<int32_t> labels({N, H, W});
  py::array_t<int64_t> counts(N);
  const auto* mask = static_cast<const uint8_t*>(masks.data());  // [N, H, W]
  int32_t* label = labels.mutable_data();                        // [N, H, W]
  int64_t* count = counts.mutable_data();                        // [N]
  {
    const py::gil_scoped_release release;
    parallel(N, threads, N * P, [&](int64_t n) {
      thread_local std::vector<Run> runs;
      thread_local std::vector<int32_t> rows;
      count[n] = label_image(mask + n * P, H, W, label + n * P, runs, rows);
    });
    std::vector<int64_t> before(N + 1, 0);  // regions of the images before
    for (int64_t n = 0; n < N; ++n) before[n + 1] = before[n] + count[n];
    if (before[N] > kInt32) throw std::overflow_error("regions: masks: more than 2^31 - 1 regions");
    parallel(N, threads, N * P, [&](int64_t n) {
      if (count[n] == 0 || before[n] == 0) return;
      const auto offset = static_cast<int32_t>(before[n]);
      for (int32_t* p = label + n * P; p != label + (n + 1) * P; ++p) *p += *p != 0 ? offset : 0;
    });
  }
  return py::make_tuple(labels, counts);
}

}  // namespace

PYBIND11_MODULE(_metrics, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled parts of recontrast.metrics.";
  m.def("regions", &regions, py::arg("masks"), py::arg("threads") = 0,
        "8-connected regions of bool or uint8 (N, H, W), numbered from 1 by their first pixel, image after image.\n\n"
        "Returns int32 labels (N, H, W), 0 outside, and the number of regions of each image, int64 (N,).\n"
        "`threads` is how many to use at most, 0 for one per core; the labels do not depend on it.");
}
