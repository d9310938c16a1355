// Groups pairs of features into launches: which pairs one kernel can process together, and which pair a block works on.
#pragma once

#include <algorithm>

#include "feature_access.cuh"

namespace recontrast {

// Pairs per launch; more than any model here has. They are passed as kernel arguments, so no table is copied to the
// device and a captured CUDA graph contains the pointers.
constexpr int kPairs = 16;
constexpr int kBlocks = 3;  // per multiprocessor at least: limits the registers of a thread, without spills

struct Pair {
  FeatureView x, y, dy;
  void* sums;  // [3, N, P]: the sums of this pair (forward) or their gradient (backward)
  FeatureSize size;
  void* parts;     // [splits, 3, N, P]: partial sums, each over `share` channels; null if one block sums all channels
  int share;       // channels per block (forward)
  unsigned first;  // first block of this pair
  int lanes;       // neighbouring threads that read neighbouring addresses
};

struct Group {
  Pair pair[kPairs];
  int pairs;

  // The pair that this block works on. block: its index among the blocks of that pair.
  __device__ __forceinline__ const Pair& find(unsigned& block) const { return find(blockIdx.x, block); }
  // The same, where blocks start with the last one.
  __device__ __forceinline__ const Pair& find_backwards(unsigned& block) const {
    return find(gridDim.x - 1 - blockIdx.x, block);
  }

 private:
  __device__ __forceinline__ const Pair& find(unsigned index, unsigned& block) const {
    int i = 0;
    while (i + 1 < pairs && index >= pair[i + 1].first) ++i;
    block = index - pair[i].first;
    return pair[i];
  }
};
static_assert(sizeof(Group) <= 4096);  // bytes; the kernel arguments that every GPU accepts

// Determines the kernel; pairs of the same kind share a launch.
struct Kind {
  ScalarType type;
  bool generic;  // GenericAccess or MixedAccess (vectors), else VectorAccess
  bool rows;     // by rows (channels_last), else by planes
  bool vectors;  // 16 bytes at once, else one element
  bool operator==(const Kind&) const = default;
};

// How to read x and y, and write dy (if `backward`), in place. acc: dtype of the sums.
inline Kind kind_of(const Pair& pair, bool backward, ScalarType acc) {
  const auto all_views = [&](auto condition) {
    return condition(pair.x) && condition(pair.y) && (!backward || condition(pair.dy));
  };
  const ScalarType type = pair.x.type;
  const bool acc_fits = (type == ScalarType::Double) == (acc == ScalarType::Double);
  const bool one_type = acc_fits && all_views([&](const FeatureView& f) { return f.type == type; });
  const bool mixed =
      acc == ScalarType::Float && all_views([](const FeatureView& f) { return f.type != ScalarType::Double; });
  if (!(one_type || mixed) || !all_views([](const FeatureView& f) { return f.one_stride; }))
    return {acc, true, false, false};
  const bool rows = pair.size.C > 1 && all_views([](const FeatureView& f) { return f.c == 1; });
  const int64_t V = one_type ? kBytes / bytes_of(type) : kMixed;
  const bool vectors = (rows ? pair.size.C : pair.size.P) % V == 0 && all_views([&](const FeatureView& f) {
                         return (rows || f.p == 1) &&
                                reinterpret_cast<uintptr_t>(f.data) % (V * bytes_of(f.type)) == 0 && f.n % V == 0 &&
                                (rows ? f.p : f.c) % V == 0;
                       });
  if (one_type) return {type, false, rows, vectors};
  return {acc, true, rows && vectors, vectors};
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f with the TypeTag of the access class for pairs of `kind`.
template <typename F>
void with_access(const char* op, const Kind& kind, const F& f) {
  if (kind.generic && kind.vectors) return f(TypeTag<MixedAccess>{});
  if (kind.generic)
    return kind.type == ScalarType::Double ? f(TypeTag<GenericAccess<double>>{}) : f(TypeTag<GenericAccess<float>>{});
  dispatch(op, kind.type, [&](auto element) {
    using T = decltype(element);
    kind.vectors ? f(TypeTag<VectorAccess<T, kVector<T>>>{}) : f(TypeTag<VectorAccess<T, 1>>{});
  });
}

// Calls f(kind, group) for each launch that the pairs need. Empty pairs must be left out. Blocks with many channels
// come first in a launch: last, they would run alone.
template <typename F>
void for_each_launch(std::vector<Pair> pairs, bool backward, ScalarType acc, const F& f) {
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.size.C > b.size.C; });
  while (!pairs.empty()) {
    const Kind kind = kind_of(pairs[0], backward, acc);
    Group group{};
    std::vector<Pair> later;
    for (const Pair& pair : pairs) {
      if (group.pairs < kPairs && kind_of(pair, backward, acc) == kind)
        group.pair[group.pairs++] = pair;
      else
        later.push_back(pair);
    }
    f(kind, group);
    pairs = later;
  }
}

// Number of positions of all pairs.
inline int64_t positions_of(const Group& group) {
  int64_t count = 0;
  for (int i = 0; i < group.pairs; ++i) count += group.pair[i].size.count;
  return count;
}

}  // namespace recontrast
