// Radix sort of scores, converted to unsigned integers of the same order. The sort is stable, so its result does not
// depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel_for.h"

namespace recontrast {

template <typename T>
using KeyOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// The key of a finite score: keys have the order of the scores, and both zeros have the same key.
template <typename T>
KeyOf<T> key_of(T score) {
  using Key = KeyOf<T>;
  constexpr int top = 8 * sizeof(Key) - 1;
  constexpr Key sign = Key{1} << top;
  Key bits = std::bit_cast<Key>(score);
  bits = bits == sign ? 0 : bits;
  return bits ^ (sign | (Key{0} - (bits >> top)));  // flips the sign bit, or all bits of a negative number
}

// Inverse of key_of.
template <typename T>
T score_of(KeyOf<T> key) {
  using Key = KeyOf<T>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  return std::bit_cast<T>((key & sign) != 0 ? static_cast<Key>(key ^ sign) : static_cast<Key>(~key));
}

template <typename Key>
struct Item {
  Key key;
  uint32_t region;  // numbered over all images
};

// Sorts items [count] by their keys, ascending. Digits have eleven bits: the caches hold 2048 places to write to. A
// digit that is the same in all keys is only counted.
template <typename Key>
void radix_sort(std::unique_ptr<Item<Key>[]>& items, int64_t count, int64_t threads) {
  constexpr int bits = 11, bins = 1 << bits;
  const int64_t parts = thread_count(threads, count);
  std::vector<std::array<int64_t, bins>> next(parts);  // [parts, bins]: where to write the next item
  auto sorted = std::make_unique_for_overwrite<Item<Key>[]>(count);
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)); shift += bits) {
    const auto digit = [shift](Key key) { return static_cast<size_t>(key >> shift) & (bins - 1); };
    parallel_for(parts, parts, count, [&](int64_t part) {
      next[part].fill(0);
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) ++next[part][digit(items[i].key)];
    });
    int64_t before = 0, largest = 0;
    for (int bin = 0; bin < bins; ++bin) {
      const int64_t begin = before;
      for (auto& part_next : next) before += std::exchange(part_next[bin], before);
      largest = std::max(largest, before - begin);
    }
    if (largest == count) continue;
    parallel_for(parts, parts, count, [&](int64_t part) {
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
        sorted[next[part][digit(items[i].key)]++] = items[i];
    });
    std::swap(items, sorted);
  }
}

}  // namespace recontrast
