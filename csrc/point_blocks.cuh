// How the points of all pairs are distributed over blocks on the GPU, for the kernels of mined_loss.
#pragma once

#include "launch.cuh"
#include "mined_loss.h"

namespace recontrast {
namespace {

constexpr int kPairs = 32;            // pairs per launch; they are passed as kernel arguments
constexpr int kPiece = 4 * kThreads;  // points per block

// The points of one pair and the blocks that work on them.
struct PairPoints {
  int64_t sums, state;     // index of the pair's first element in the flat sums and in the state
  int64_t inside;          // and in the mask of the points that count
  int64_t N, P;            // images, points per image
  unsigned first, pieces;  // first block of the pair; number of blocks per image
};

// Arguments of every kernel of mined_loss.
struct LossArguments {
  PairPoints pair[kPairs];
  int pairs;
  Rule rule;
  double parameter, factor;
  Inside inside;  // mask of all pairs; null if all points count

  // Whether point i of a pair counts, 0 <= i < N * P.
  __device__ __forceinline__ bool counts(const PairPoints& pair, int64_t i) const {
    return inside.points[pair.inside + (inside.shared ? i % pair.P : i)];
  }

  // The pair that this block works on. block: its index among the blocks of that pair; number: the index of the pair.
  __device__ __forceinline__ const PairPoints& find(unsigned& block, int& number) const {
    number = 0;
    while (number + 1 < pairs && blockIdx.x >= pair[number + 1].first) ++number;
    block = blockIdx.x - pair[number].first;
    return pair[number];
  }
};
static_assert(sizeof(LossArguments) <= 4096);  // bytes; the kernel arguments that every GPU accepts

// Distance of point i of a pair, whose sums [3, N * P] start at `sums`.
template <typename A>
__device__ __forceinline__ A distance_at(const A* sums, const PairPoints& pair, int64_t i) {
  const int64_t volume = pair.N * pair.P;
  return distance_of(sums[i], sums[i + volume], sums[i + 2 * volume]);
}

// Calls f(arguments, blocks) for every kPairs pairs. by_image: the points of a block belong to one image, else to one
// pair.
template <typename F>
void for_each_launch(const std::vector<int64_t>& images, const std::vector<int64_t>& points,
                     const LossArguments& common, bool by_image, const F& f) {
  int64_t sums = 0, state = 0, inside = 0;
  for (size_t i = 0; i < images.size();) {
    LossArguments arguments = common;
    int64_t total = 0;
    for (; i < images.size() && arguments.pairs < kPairs; ++i) {
      const int64_t N = images[i], P = points[i], pieces = blocks(by_image ? P : N * P, kPiece);
      arguments.pair[arguments.pairs++] = {
          sums, state, inside, N, P, static_cast<unsigned>(total), static_cast<unsigned>(pieces)};
      inside += common.inside.length(N, P);
      sums += 3 * N * P;
      state += state_length(N);
      total += by_image ? N * pieces : pieces;
    }
    STD_TORCH_CHECK(total < int64_t{1} << 31, "mined_loss: too many points for one launch");
    f(arguments, static_cast<unsigned>(total));
  }
}

}  // namespace
}  // namespace recontrast
