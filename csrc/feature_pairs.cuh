// Pairs of features that go into one launch: which pairs one kernel can take together, and how a block finds its own.
#pragma once

#include <algorithm>

#include "feature_access.cuh"

namespace recontrast {

// Pairs of a launch, more than any model here has. They travel as kernel arguments: no table is copied to the device,
// and a captured graph holds the pointers.
constexpr int kPairs = 16;
constexpr int kBlocks = 3;  // a multiprocessor holds at least: bounds the registers without a spill

struct Pair {
  Features x, y, dy;
  void* sums;  // [3, N, P] of this pair: the sums, or their gradient
  Size size;
  void* parts;     // [splits, 3, N, P]: partial sums, each over `share` channels; null where one block has all of them
  int share;       // channels of a block of the sums
  unsigned first;  // block
  int lanes;       // neighbouring threads that run along memory
};

struct Group {
  Pair pair[kPairs];
  int pairs;

  // The pair of the running block, whose number is then counted from the pair's first.
  __device__ __forceinline__ const Pair& mine(unsigned& block) const {
    int i = 0;
    while (i + 1 < pairs && blockIdx.x >= pair[i + 1].first) ++i;
    block = blockIdx.x - pair[i].first;
    return pair[i];
  }
};
static_assert(sizeof(Group) <= 4096);  // bytes of kernel arguments that every GPU takes

// What decides the kernel; pairs that agree in it share a launch.
struct Kind {
  ScalarType type;
  bool any, rows, vectors;
  bool operator==(const Kind&) const = default;
};

// How to read x and y, and write dy (`backward`), in place; acc: the dtype of the sums.
inline Kind kind_of(const Pair& pair, bool backward, ScalarType acc) {
  const auto every = [&](auto condition) {
    return condition(pair.x) && condition(pair.y) && (!backward || condition(pair.dy));
  };
  const ScalarType type = pair.x.type;
  const bool wide = (type == ScalarType::Double) == (acc == ScalarType::Double);
  if (!wide || !every([&](const Features& f) { return f.one_stride && f.type == type; }))
    return {acc, true, false, false};
  const bool rows = pair.size.C > 1 && every([](const Features& f) { return f.c == 1; });
  const int64_t V = kBytes / (type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2);
  const bool vectors = (rows ? pair.size.C : pair.size.P) % V == 0 && every([&](const Features& f) {
                         return (rows || f.p == 1) && reinterpret_cast<uintptr_t>(f.data) % kBytes == 0 &&
                                f.n % V == 0 && (rows ? f.p : f.c) % V == 0;
                       });
  return {type, false, rows, vectors};
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls f with a Tag of the source that reads pairs of `kind`.
template <typename F>
void with_source(const char* op, const Kind& kind, const F& f) {
  if (kind.any) return kind.type == ScalarType::Double ? f(Tag<Any<double>>{}) : f(Tag<Any<float>>{});
  dispatch(op, kind.type, [&](auto element) {
    using T = decltype(element);
    kind.vectors ? f(Tag<Packed<T, kVector<T>>>{}) : f(Tag<Packed<T, 1>>{});
  });
}

// Calls f(kind, group) for each launch that the pairs need; pairs with nothing to do must be left out.
template <typename F>
void in_groups(std::vector<Pair> pairs, bool backward, ScalarType acc, const F& f) {
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

// Positions of all pairs.
inline int64_t positions_of(const Group& group) {
  int64_t count = 0;
  for (int i = 0; i < group.pairs; ++i) count += group.pair[i].size.count;
  return count;
}

}  // namespace recontrast
