// AUROC, AP, F1-max and AUPRO from one sort of the positives.
//
// The thresholds are the distinct scores of the positives, which are few, so only the positives are sorted. Each
// negative is read once, in place, and counted between the two thresholds that enclose it. Bound by these
// look-ups; neighbouring pixels have similar scores, so their entries of the table are in the cache.

#include "sweep.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "parallel_for.h"
#include "radix_sort.h"

namespace recontrast {
namespace {

// Compensated sum (Neumaier): small terms are not lost.
struct Sum {
  double high = 0, low = 0;
  void add(double x) {
    const double sum = high + x;
    low += std::abs(high) >= std::abs(x) ? (high - sum) + x : (x - sum) + high;
    high = sum;
  }
  double value() const { return high + low; }
};

constexpr int kFew = 4;  // thresholds per table cell that are compared without a branch

// Distinct scores of the positives, ascending.
template <typename Key>
struct Thresholds {
  std::vector<Key> key;         // [K + kFew]; no score exceeds the last kFew
  std::vector<int64_t> gain;    // [K] positives with this score
  std::vector<double> overlap;  // [K] what these add to the sum of the overlaps of all regions
};

template <typename T>
Thresholds<KeyOf<T>> thresholds_of(const T* scores, const std::vector<int64_t>& begin,
                                   const std::vector<Regions>& regions, int64_t positives, int64_t threads,
                                   bool& finite) {
  using Key = KeyOf<T>;
  const auto pieces = static_cast<int64_t>(regions.size());
  std::vector<int64_t> pixel(pieces + 1, 0), region(pieces + 1, 0);  // number before each piece
  for (int64_t n = 0; n < pieces; ++n) {
    region[n + 1] = region[n] + static_cast<int64_t>(regions[n].areas.size());
    pixel[n + 1] = std::accumulate(regions[n].areas.begin(), regions[n].areas.end(), pixel[n]);
  }
  if (positives > std::numeric_limits<int32_t>::max() - kFew)  // there are no more thresholds or regions than positives
    throw std::length_error("masks: wanted fewer than 2^31 - 4 positive pixels, got " + std::to_string(positives));
  std::vector<double> weight(region[pieces]);  // 1 / area
  auto items = std::make_unique_for_overwrite<Item<Key>[]>(positives);
  std::atomic<bool> any_nonfinite = false;
  parallel_for(pieces, threads, positives, [&](int64_t n) {
    for (size_t i = 0; i < regions[n].areas.size(); ++i)
      weight[region[n] + i] = 1.0 / static_cast<double>(regions[n].areas[i]);
    Item<Key>* item = items.get() + pixel[n];
    bool nonfinite = false;
    for (const Run& run : regions[n].runs) {
      const T* score = scores + begin[n];
      for (int32_t i = run.begin; i < run.end; ++i) {
        nonfinite |= score[i] - score[i] != 0;  // NaN for NaN and infinity
        *item++ = {key_of(score[i]), static_cast<uint32_t>(region[n] + run.region)};
      }
    }
    if (nonfinite) any_nonfinite = true;
  });
  finite = !any_nonfinite;
  radix_sort(items, positives, threads);

  Thresholds<Key> thresholds;
  for (int64_t i = 0; i < positives;) {
    const int64_t first = i;
    const Key key = items[i].key;
    Sum sum;
    for (; i < positives && items[i].key == key; ++i) sum.add(weight[items[i].region]);
    thresholds.key.push_back(key);
    thresholds.gain.push_back(i - first);
    thresholds.overlap.push_back(sum.value());
  }
  thresholds.key.insert(thresholds.key.end(), kFew, std::numeric_limits<Key>::max());
  return thresholds;
}

// Finds the slot of a key among the thresholds: 2 k + 1 at threshold k, 2 k between thresholds k - 1 and k.
template <typename Key>
class Table {
 public:
  explicit Table(const std::vector<Key>& keys) : keys_(keys), count_(static_cast<uint32_t>(keys.size() - kFew)) {
    low_ = keys[0];
    const Key span = keys[count_ - 1] - low_;
    // About as many cells as thresholds; keys of typical scores fill them evenly.
    shift_ = std::max(static_cast<int>(std::bit_width(span)) - static_cast<int>(std::bit_width(count_)), 0);
    cells_ = (span >> shift_) + 1;
    first_.resize(cells_ + 1);
    for (uint32_t k = 0, cell = 0; cell <= cells_; ++cell) {
      while (k < count_ && ((keys[k] - low_) >> shift_) < cell) ++k;
      first_[cell] = k;
    }
  }

  // Has no branch that depends on the key, except for cells with many thresholds: mispredictions would dominate the
  // time.
  uint32_t slot(Key key) const {
    const Key cell = std::min(static_cast<Key>((key < low_ ? 0 : key - low_) >> shift_), cells_);
    const uint32_t begin = first_[cell];
    uint32_t k = begin;
    for (int i = 0; i < kFew; ++i) k += keys_[begin + i] < key;  // thresholds of later cells are greater
    if (k == begin + kFew) [[unlikely]]
      k = static_cast<uint32_t>(std::lower_bound(keys_.begin() + k, keys_.begin() + first_[cell + 1], key) -
                                keys_.begin());
    return 2 * k + (keys_[k] == key);
  }

  uint32_t slots() const { return 2 * count_ + 2; }

 private:
  const std::vector<Key>& keys_;
  std::vector<uint32_t> first_;  // [cells + 1] first threshold of each cell
  Key low_, cells_;
  uint32_t count_;
  int shift_;
};

// Number of negatives in each slot of the table.
template <typename T>
std::vector<int64_t> count_negatives(const T* scores, const std::vector<int64_t>& begin,
                                     const std::vector<Regions>& regions, const Table<KeyOf<T>>& table, int64_t threads,
                                     bool& finite) {
  const auto pieces = static_cast<int64_t>(regions.size());
  const int64_t parts = std::min(thread_count(threads, begin.back()), pieces);
  std::vector<int64_t> total(table.slots(), 0);
  std::atomic<int64_t> next = 0;
  std::atomic<bool> any_nonfinite = false;
  std::mutex mutex;
  parallel_for(parts, parts, begin.back(), [&](int64_t) {
    std::vector<uint32_t> count(table.slots(), 0);  // half the cache footprint of 64-bit counters
    int64_t counted = 0;
    const auto flush = [&] {
      const std::lock_guard lock(mutex);
      for (size_t i = 0; i < count.size(); ++i) total[i] += count[i];
    };
    for (int64_t n; (n = next.fetch_add(1)) < pieces;) {
      const T* score = scores + begin[n];
      const int64_t P = begin[n + 1] - begin[n];
      if ((counted += P) > std::numeric_limits<uint32_t>::max()) {
        flush();
        std::fill(count.begin(), count.end(), 0);
        counted = P;
      }
      bool nonfinite = false;
      for_each_good_range(regions[n], P, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          nonfinite |= score[i] - score[i] != 0;
          ++count[table.slot(key_of(score[i]))];
        }
      });
      if (nonfinite) any_nonfinite = true;
    }
    flush();
  });
  finite = !any_nonfinite;
  return total;
}

// Areas under a piecewise linear curve up to each of the stops, divided by the stop; segments are added from left to
// right.
class Area {
 public:
  explicit Area(const std::vector<double>& stops) : stops_(stops), order_(stops.size()), areas_(stops.size()) {
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::sort(order_.begin(), order_.end(), [&](size_t a, size_t b) { return stops_[a] < stops_[b]; });
  }

  // Adds the segment to (x, y).
  void line(double x, double y) {
    for (; next_ < order_.size() && stops_[order_[next_]] <= x; ++next_) {
      const double stop = stops_[order_[next_]], run = stop - x_;
      const double rise = x > x_ ? (y - y_) * run / (x - x_) : 0;
      areas_[order_[next_]] = (sum_.value() + run * (y_ + y_ + rise) / 2) / stop;
    }
    sum_.add((x - x_) * (y_ + y) / 2);
    x_ = x;
    y_ = y;
  }

  const std::vector<double>& areas() const { return areas_; }

 private:
  std::vector<double> stops_;
  std::vector<size_t> order_;
  std::vector<double> areas_;
  size_t next_ = 0;
  double x_ = 0, y_ = 0;
  Sum sum_;
};

}  // namespace

template <typename T>
Sweep sweep(const T* scores, const std::vector<int64_t>& begin, const std::vector<Regions>& regions,
            const std::vector<double>& limits, int64_t threads) {
  Sweep result;
  size_t region_count = 0;
  for (const Regions& piece : regions) {
    region_count += piece.areas.size();
    result.positives = std::accumulate(piece.areas.begin(), piece.areas.end(), result.positives);
  }
  result.negatives = begin.back() - result.positives;
  if (result.positives == 0 || result.negatives == 0) return result;
  bool positives_finite = false, negatives_finite = false;
  const auto thresholds = thresholds_of(scores, begin, regions, result.positives, threads, positives_finite);
  const Table<KeyOf<T>> table(thresholds.key);
  const std::vector<int64_t> negatives = count_negatives(scores, begin, regions, table, threads, negatives_finite);
  result.finite = positives_finite && negatives_finite;
  if (!result.finite) return result;

  const auto P = static_cast<double>(result.positives), N = static_cast<double>(result.negatives);
  std::vector<double> stops(limits);
  for (double& stop : stops) stop *= N;
  Area area(stops);
  Sum ap, overlap;
  unsigned __int128 below = 0;  // twice the number of correctly ordered pairs; a tie counts one half
  int64_t tp = 0, fp = negatives[2 * thresholds.gain.size()];
  for (size_t k = thresholds.gain.size(); k-- > 0;) {
    const int64_t above = fp, gain = thresholds.gain[k];
    tp += gain;
    area.line(static_cast<double>(above), overlap.value());
    fp += negatives[2 * k + 1];
    overlap.add(thresholds.overlap[k] / static_cast<double>(region_count));
    area.line(static_cast<double>(fp), overlap.value());
    below += static_cast<unsigned __int128>(gain) * static_cast<uint64_t>(2 * result.negatives - above - fp);
    const auto true_positives = static_cast<double>(tp), predicted = static_cast<double>(tp + fp);
    ap.add(static_cast<double>(gain) * (true_positives / predicted));
    if (const double f1 = 2 * true_positives / (predicted + P); f1 > result.f1_max) {
      result.f1_max = f1;
      result.f1_threshold = static_cast<double>(score_of<T>(thresholds.key[k]));
      result.tp = tp;
      result.fp = fp;
    }
    fp += negatives[2 * k];
  }
  area.line(N, overlap.value());
  result.auroc = static_cast<double>(static_cast<long double>(below) / (2.0L * P * N));
  result.ap = ap.value() / P;
  result.aupro = area.areas();
  return result;
}

template Sweep sweep(const float*, const std::vector<int64_t>&, const std::vector<Regions>&, const std::vector<double>&,
                     int64_t);
template Sweep sweep(const double*, const std::vector<int64_t>&, const std::vector<Regions>&,
                     const std::vector<double>&, int64_t);

}  // namespace recontrast
