// Scores as unsigned integers of the same order, and their radix sort. The result does not depend on the threads: the
// sort is stable.
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

// Keys are ordered as the finite scores are; both zeros have one key.
template <typename T>
KeyOf<T> key_of(T score) {
  using Key = KeyOf<T>;
  constexpr int top = 8 * sizeof(Key) - 1;
  constexpr Key sign = Key{1} << top;
  Key bits = std::bit_cast<Key>(score);
  bits = bits == sign ? 0 : bits;
  return bits ^ (sign | (Key{0} - (bits >> top)));  // a negative number has all its bits turned
}

template <typename T>
T score_of(KeyOf<T> key) {
  using Key = KeyOf<T>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  return std::bit_cast<T>((key & sign) != 0 ? static_cast<Key>(key ^ sign) : static_cast<Key>(~key));
}

template <typename Key>
struct Item {
  Key key;
  uint32_t region;  // of all images
};

// Sorts items [count] by their keys, upwards. Eleven bits at a time: 2048 places to write to are what the caches hold.
// Digits that all keys share cost only their count.
template <typename Key>
void radix_sort(std::unique_ptr<Item<Key>[]>& items, int64_t count, int64_t threads) {
  constexpr int bits = 11, places = 1 << bits;
  const int64_t parts = worth(threads, count);
  std::vector<std::array<int64_t, places>> where(parts);
  auto sorted = std::make_unique_for_overwrite<Item<Key>[]>(count);
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)); shift += bits) {
    const auto digit = [shift](Key key) { return static_cast<size_t>(key >> shift) & (places - 1); };
    parallel(parts, parts, count, [&](int64_t part) {
      where[part].fill(0);
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) ++where[part][digit(items[i].key)];
    });
    int64_t before = 0, largest = 0;
    for (int place = 0; place < places; ++place) {
      const int64_t begin = before;
      for (auto& of : where) before += std::exchange(of[place], before);
      largest = std::max(largest, before - begin);
    }
    if (largest == count) continue;
    parallel(parts, parts, count, [&](int64_t part) {
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
        sorted[where[part][digit(items[i].key)]++] = items[i];
    });
    std::swap(items, sorted);
  }
}

}  // namespace recontrast
