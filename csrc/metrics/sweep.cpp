// AUROC, AP, F1-max and AUPRO from one sort of the positives.
//
// Only distinct scores of positives are thresholds, and positives are few. So they alone are sorted; each negative,
// read once where it lies, looks up between which two thresholds it is and is counted there. Neighbours in a map have
// similar scores and find the table in the cache. What bounds it are those look-ups.

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

// A sum that does not lose what is small beside it (Neumaier).
struct Sum {
  double high = 0, low = 0;
  void add(double x) {
    const double sum = high + x;
    low += std::abs(high) >= std::abs(x) ? (high - sum) + x : (x - sum) + high;
    high = sum;
  }
  double value() const { return high + low; }
};

constexpr int kFew = 4;  // thresholds of a cell that are compared at once

// Distinct scores of the positives, upwards.
template <typename Key>
struct Thresholds {
  std::vector<Key> key;         // [K + kFew], the last ones such that no score exceeds them
  std::vector<int64_t> gain;    // [K] positives there
  std::vector<double> overlap;  // [K] what they add to the sum of the overlaps of all regions
};

template <typename T>
Thresholds<KeyOf<T>> thresholds_of(const T* scores, const std::vector<int64_t>& begin,
                                   const std::vector<Regions>& regions, int64_t positives, int64_t threads,
                                   bool& finite) {
  using Key = KeyOf<T>;
  const auto pieces = static_cast<int64_t>(regions.size());
  std::vector<int64_t> pixel(pieces + 1, 0), region(pieces + 1, 0);  // before each piece
  for (int64_t n = 0; n < pieces; ++n) {
    region[n + 1] = region[n] + static_cast<int64_t>(regions[n].areas.size());
    pixel[n + 1] = std::accumulate(regions[n].areas.begin(), regions[n].areas.end(), pixel[n]);
  }
  if (positives > std::numeric_limits<int32_t>::max() - kFew)  // thresholds and regions are no more than they
    throw std::length_error("masks: wanted fewer than 2^31 - 4 positive pixels, got " + std::to_string(positives));
  std::vector<double> weight(region[pieces]);  // 1 / area
  auto items = std::make_unique_for_overwrite<Item<Key>[]>(positives);
  std::atomic<bool> bad = false;
  parallel(pieces, threads, positives, [&](int64_t n) {
    for (size_t i = 0; i < regions[n].areas.size(); ++i)
      weight[region[n] + i] = 1.0 / static_cast<double>(regions[n].areas[i]);
    Item<Key>* item = items.get() + pixel[n];
    bool odd = false;
    for (const Run& run : regions[n].runs) {
      const T* score = scores + begin[n];
      for (int32_t i = run.begin; i < run.end; ++i) {
        odd |= score[i] - score[i] != 0;  // NaN for an infinity, too
        *item++ = {key_of(score[i]), static_cast<uint32_t>(region[n] + run.region)};
      }
    }
    if (odd) bad = true;
  });
  finite = !bad;
  radix_sort(items, positives, threads);

  Thresholds<Key> found;
  for (int64_t i = 0; i < positives;) {
    const int64_t first = i;
    const Key key = items[i].key;
    Sum sum;
    for (; i < positives && items[i].key == key; ++i) sum.add(weight[items[i].region]);
    found.key.push_back(key);
    found.gain.push_back(i - first);
    found.overlap.push_back(sum.value());
  }
  found.key.insert(found.key.end(), kFew, std::numeric_limits<Key>::max());
  return found;
}

// Where a key lies among the thresholds: 2 k + 1 at threshold k, 2 k between it and the one below.
template <typename Key>
class Table {
 public:
  explicit Table(const std::vector<Key>& keys) : keys_(keys), count_(static_cast<uint32_t>(keys.size() - kFew)) {
    low_ = keys[0];
    const Key span = keys[count_ - 1] - low_;
    // About as many cells as thresholds; the keys of the floats in use fill them evenly enough.
    shift_ = std::max(static_cast<int>(std::bit_width(span)) - static_cast<int>(std::bit_width(count_)), 0);
    cells_ = (span >> shift_) + 1;
    first_.resize(cells_ + 1);
    for (uint32_t k = 0, cell = 0; cell <= cells_; ++cell) {
      while (k < count_ && ((keys[k] - low_) >> shift_) < cell) ++k;
      first_[cell] = k;
    }
  }

  // No branch that depends on the key, but for cells of many thresholds: guessed wrong, it would cost most of the time.
  uint32_t slot(Key key) const {
    const Key cell = std::min(static_cast<Key>((key < low_ ? 0 : key - low_) >> shift_), cells_);
    const uint32_t begin = first_[cell];
    uint32_t k = begin;
    for (int i = 0; i < kFew; ++i) k += keys_[begin + i] < key;  // those of later cells are above it
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

// Negatives in each slot of the table.
template <typename T>
std::vector<int64_t> count_negatives(const T* scores, const std::vector<int64_t>& begin,
                                     const std::vector<Regions>& regions, const Table<KeyOf<T>>& table, int64_t threads,
                                     bool& finite) {
  const auto pieces = static_cast<int64_t>(regions.size());
  const int64_t parts = std::min(worth(threads, begin.back()), pieces);
  std::vector<int64_t> total(table.slots(), 0);
  std::atomic<int64_t> next = 0;
  std::atomic<bool> bad = false;
  std::mutex mutex;
  parallel(parts, parts, begin.back(), [&](int64_t) {
    std::vector<uint32_t> count(table.slots(), 0);  // half of what 64 bits would take from the cache
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
      bool odd = false;
      between(regions[n], P, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          odd |= score[i] - score[i] != 0;
          ++count[table.slot(key_of(score[i]))];
        }
      });
      if (odd) bad = true;
    }
    flush();
  });
  finite = !bad;
  return total;
}

// Areas under a curve that rises to the right, up to each of the stops, while its pieces come.
class Area {
 public:
  explicit Area(const std::vector<double>& stops) : stops_(stops), order_(stops.size()), areas_(stops.size()) {
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::sort(order_.begin(), order_.end(), [&](size_t a, size_t b) { return stops_[a] < stops_[b]; });
  }

  void line(double x, double y) {  // to (x, y)
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
  size_t areas = 0;
  for (const Regions& of : regions) {
    areas += of.areas.size();
    result.positives = std::accumulate(of.areas.begin(), of.areas.end(), result.positives);
  }
  result.negatives = begin.back() - result.positives;
  if (result.positives == 0 || result.negatives == 0) return result;
  bool first = false, second = false;
  const auto levels = thresholds_of(scores, begin, regions, result.positives, threads, first);
  const Table<KeyOf<T>> table(levels.key);
  const std::vector<int64_t> good = count_negatives(scores, begin, regions, table, threads, second);
  result.finite = first && second;
  if (!result.finite) return result;

  const auto P = static_cast<double>(result.positives), N = static_cast<double>(result.negatives);
  std::vector<double> stops(limits);
  for (double& stop : stops) stop *= N;
  Area area(stops);
  Sum ap, overlap;
  unsigned __int128 below = 0;  // pairs in order, twice: a tie counts one half
  int64_t tp = 0, fp = good[2 * levels.gain.size()];
  for (size_t k = levels.gain.size(); k-- > 0;) {
    const int64_t above = fp, gain = levels.gain[k];
    tp += gain;
    area.line(static_cast<double>(above), overlap.value());
    fp += good[2 * k + 1];
    overlap.add(levels.overlap[k] / static_cast<double>(areas));
    area.line(static_cast<double>(fp), overlap.value());
    below += static_cast<unsigned __int128>(gain) * static_cast<uint64_t>(2 * result.negatives - above - fp);
    const auto found = static_cast<double>(tp), called = static_cast<double>(tp + fp);
    ap.add(static_cast<double>(gain) * (found / called));
    if (const double f1 = 2 * found / (called + P); f1 > result.f1_max) {
      result.f1_max = f1;
      result.f1_threshold = static_cast<double>(score_of<T>(levels.key[k]));
      result.tp = tp;
      result.fp = fp;
    }
    fp += good[2 * k];
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
