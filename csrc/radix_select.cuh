// The k-th largest distance of each pair on the GPU, without a sort; and how points are shared out to blocks.
//
// Distances are multiples of 2^-24 (2^-53 in float64), because 1 - cosine rounds to them. As whole numbers they are
// told apart digit by digit, with a histogram for each digit: two launches a digit. Their leading bits are about evenly
// spread, those of a float would not be, and blocks would queue for a few counters.
#pragma once

#include "launch.cuh"
#include "mined_loss.h"

namespace recontrast {
namespace {

constexpr int kPairs = 32;            // of a launch: they travel as kernel arguments
constexpr int kPiece = 4 * kThreads;  // points of a block
constexpr int kDigit = 13;            // bits: two digits hold a float32 distance, five a float64 one
constexpr int kBins = 1 << kDigit;

// Distances as whole numbers, from -1 to 3.
template <typename A>
struct Keys {
  static constexpr int fraction = std::is_same_v<A, double> ? 53 : 24;
  static constexpr int bits = fraction + 2, digits = (bits + kDigit - 1) / kDigit;
  static constexpr uint64_t last = (uint64_t{1} << bits) - 1;  // of what is no number, which counts as largest

  static __device__ uint64_t of(A d) {
    constexpr A scale = static_cast<A>(uint64_t{1} << fraction);
    if (!(d < 3)) return last;
    if (!(d > -1)) return 0;
    return static_cast<uint64_t>(static_cast<int64_t>(d * scale) + (int64_t{1} << fraction));
  }
  static __device__ A distance(uint64_t key) {
    constexpr A scale = static_cast<A>(uint64_t{1} << fraction);
    if (key == last) return static_cast<A>(NAN);
    return static_cast<A>(static_cast<int64_t>(key) - (int64_t{1} << fraction)) / scale;
  }
};

struct Found {
  uint64_t prefix;     // digits of the k-th largest so far
  long long position;  // of it among the distances that begin with them, from 1
};

struct Member {
  int64_t sums, state;  // first element of this pair
  int64_t N, P;
  unsigned first, pieces;  // block, and blocks of an image
};

struct Work {
  Member pair[kPairs];
  int pairs;
  Rule rule;
  double parameter, factor;

  __device__ __forceinline__ const Member& mine(unsigned& block, int& number) const {
    number = 0;
    while (number + 1 < pairs && blockIdx.x >= pair[number + 1].first) ++number;
    block = blockIdx.x - pair[number].first;
    return pair[number];
  }
};
static_assert(sizeof(Work) <= 4096);

template <typename A>
__device__ __forceinline__ A distance_at(const A* sums, const Member& pair, int64_t at) {
  const int64_t volume = pair.N * pair.P;
  return distance_of(sums[at], sums[at + volume], sums[at + 2 * volume]);
}

// Calls f(work, blocks) for each kPairs pairs. `whole`: a piece has points of one image alone; else of one pair.
template <typename F>
void in_groups(const std::vector<int64_t>& images, const std::vector<int64_t>& points, const Work& like, bool whole,
               const F& f) {
  int64_t sums = 0, state = 0;
  for (size_t i = 0; i < images.size();) {
    Work work = like;
    int64_t total = 0;
    for (; i < images.size() && work.pairs < kPairs; ++i) {
      const int64_t N = images[i], P = points[i], pieces_ = blocks(whole ? P : N * P, kPiece);
      work.pair[work.pairs++] = {sums, state, N, P, static_cast<unsigned>(total), static_cast<unsigned>(pieces_)};
      sums += 3 * N * P;
      state += state_of(N);
      total += whole ? N * pieces_ : pieces_;
    }
    STD_TORCH_CHECK(total < int64_t{1} << 31, "mined_loss: too many points for one launch");
    f(work, static_cast<unsigned>(total));
  }
}

// A block for each pair: the digit of the k-th largest distance among those that begin with its digits so far.
__global__ void __launch_bounds__(kThreads) select(const __grid_constant__ Work work,
                                                   const unsigned* __restrict__ bins,  // [pairs, kBins]
                                                   Found* __restrict__ found,          // [pairs]
                                                   int turn) {
  constexpr int mine = kBins / kThreads;
  __shared__ long long own[kThreads];
  const Member& pair = work.pair[blockIdx.x];
  const unsigned* from = bins + blockIdx.x * kBins;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * mine;  // thread 0 has the largest distances
  long long count = 0;
  for (int i = 0; i < mine; ++i) count += from[top - i];
  own[threadIdx.x] = count;
  const Found before = found[blockIdx.x];
  const long long points = pair.N * pair.P;
  const auto share = static_cast<long long>(static_cast<double>(points) * work.parameter);
  const long long k = turn ? before.position : share < 1 ? 1 : share;
  __syncthreads();
  long long above = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) above += own[t];
  if (above >= k || above + count < k) return;  // one thread stays, none where there is no point
  int bin = top;
  for (; above + from[bin] < k; --bin) above += from[bin];
  found[blockIdx.x] = {(turn ? before.prefix << kDigit : 0) | static_cast<uint64_t>(bin), k - above};
}

// The next digits of the distances that begin with those found.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    refine(const __grid_constant__ Work work, const A* __restrict__ all, const Found* __restrict__ found,
           unsigned* __restrict__ bins, int turn) {
  unsigned block;
  int number;
  const Member& pair = work.mine(block, number);
  const int64_t begin = static_cast<int64_t>(block % pair.pieces) * kPiece;
  const int count = static_cast<int>(min(pair.P - begin, static_cast<int64_t>(kPiece)));
  const A* from = all + pair.sums + block / pair.pieces * pair.P + begin;
  const int64_t volume = pair.N * pair.P;
  bins += number * kBins;
#pragma unroll
  for (int e = 0; e < kPiece / kThreads; ++e) {
    const int i = e * kThreads + threadIdx.x;
    if (i >= count) break;
    const uint64_t key = Keys<A>::of(distance_of(from[i], from[i + volume], from[i + 2 * volume]));
    const int shift = kDigit * (Keys<A>::digits - 1 - turn);
    if (key >> shift >> kDigit == found[number].prefix) atomicAdd(bins + (key >> shift) % kBins, 1u);
  }
}

}  // namespace
}  // namespace recontrast
