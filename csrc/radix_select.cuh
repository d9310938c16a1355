// The k-th largest distance of each pair on the GPU, by radix selection: no sort.
//
// Distances are multiples of 2^-24 (2^-53 in float64), because 1 - cosine is rounded to them. Converted to integers,
// they are compared digit by digit, with a histogram and two launches for each digit. The leading bits of these
// integers are spread about evenly. Those of floats would not be: many atomic additions would go to the same few
// counters.
#pragma once

#include "point_blocks.cuh"

namespace recontrast {
namespace {

constexpr int kDigit = 13;  // bits per digit: two digits hold a float32 distance, five a float64 one
constexpr int kBins = 1 << kDigit;

// Distances from -1 to 3 as integers of the same order.
template <typename A>
struct Keys {
  static constexpr int fraction = std::is_same_v<A, double> ? 53 : 24;
  static constexpr int bits = fraction + 2, digits = (bits + kDigit - 1) / kDigit;
  static constexpr uint64_t last = (uint64_t{1} << bits) - 1;  // the key of NaN, which counts as largest

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

// The digits of a pair's k-th largest distance selected so far.
struct Selection {
  uint64_t prefix;  // its first digits
  long long rank;   // its rank, from 1, among the distances with these digits
};

constexpr unsigned kNoBin = ~0u;

// Adds 1 to the counter of each bin that the threads of a warp have (kNoBin: none). All 32 threads must call it.
// Equal bins of a warp are added at once, because additions to one counter wait for each other: the points of dead
// features all have the same distance.
template <int count>
__device__ __forceinline__ void count_bins(unsigned* bins, unsigned (&bin)[count]) {
#pragma unroll
  for (int e = 0; e < count; ++e) {
    unsigned times = 1;
#pragma unroll
    for (int later = e + 1; later < count; ++later)
      if (bin[later] == bin[e] && bin[e] != kNoBin) {
        bin[later] = kNoBin;
        ++times;
      }
    const unsigned equal = __match_any_sync(~0u, bin[e]), total = __reduce_add_sync(equal, times);
    if (bin[e] != kNoBin && static_cast<int>(threadIdx.x) % kWarp == __ffs(equal) - 1) atomicAdd(bins + bin[e], total);
  }
}

// Sum of the counts of all threads of a block.
__device__ __forceinline__ long long add_counts(const long long* thread_counts) {
  long long total = 0;
  for (int t = 0; t < kThreads; ++t) total += thread_counts[t];
  return total;
}

// One block per pair: the next digit of the k-th largest distance. digit: how many digits are known.
__global__ void __launch_bounds__(kThreads) select_digit(const __grid_constant__ LossArguments arguments,
                                                         const unsigned* __restrict__ bins,   // [pairs, kBins]
                                                         Selection* __restrict__ selections,  // [pairs]
                                                         int digit) {
  constexpr int bins_per_thread = kBins / kThreads;
  __shared__ long long thread_counts[kThreads];
  const PairPoints& pair = arguments.pair[blockIdx.x];
  const unsigned* pair_bins = bins + blockIdx.x * kBins;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * bins_per_thread;  // thread 0: the largest distances
  long long count = 0;
  for (int i = 0; i < bins_per_thread; ++i) count += pair_bins[top - i];
  thread_counts[threadIdx.x] = count;
  const Selection before = selections[blockIdx.x];
  __syncthreads();
  // The first histogram holds all points that count.
  const long long points = arguments.inside.points == nullptr ? pair.N * pair.P : digit ? 0 : add_counts(thread_counts);
  const auto hard = static_cast<long long>(static_cast<double>(points) * arguments.parameter);
  const long long k = digit ? before.rank : hard < 1 ? 1 : hard;
  long long above = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) above += thread_counts[t];
  if (above >= k || above + count < k) return;  // one thread goes on; none if there are no points
  int bin = top;
  for (; above + pair_bins[bin] < k; --bin) above += pair_bins[bin];
  selections[blockIdx.x] = {(digit ? before.prefix << kDigit : 0) | static_cast<uint64_t>(bin), k - above};
}

// Histogram of the next digit of all distances that begin with the selected digits. Blocks by image. masked: only of
// the points inside.
template <typename A, bool masked>
__global__ void __launch_bounds__(kThreads)
    count_digits(const __grid_constant__ LossArguments arguments, const A* __restrict__ all_sums,  // flat
                 const Selection* __restrict__ selections,                                         // [pairs]
                 unsigned* __restrict__ bins,  // [pairs, kBins], zeros
                 int digit) {
  unsigned block;
  int number;
  const PairPoints& pair = arguments.find(block, number);
  const int64_t begin = static_cast<int64_t>(block % pair.pieces) * kPiece;
  const int count = static_cast<int>(min(pair.P - begin, static_cast<int64_t>(kPiece)));
  const int64_t first = block / pair.pieces * pair.P + begin;
  const A* from = all_sums + pair.sums + first;
  const int64_t volume = pair.N * pair.P;
  bins += number * kBins;
  unsigned bin[kPiece / kThreads];
#pragma unroll
  for (int e = 0; e < kPiece / kThreads; ++e) {
    const int i = e * kThreads + threadIdx.x;
    bin[e] = kNoBin;
    if (i >= count || (masked && !arguments.counts(pair, first + i))) continue;
    const uint64_t key = Keys<A>::of(distance_of(from[i], from[i + volume], from[i + 2 * volume]));
    const int shift = kDigit * (Keys<A>::digits - 1 - digit);
    if (key >> shift >> kDigit == selections[number].prefix) bin[e] = static_cast<unsigned>((key >> shift) % kBins);
  }
  count_bins(bins, bin);
}

}  // namespace
}  // namespace recontrast
