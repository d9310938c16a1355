// anomaly_map on the GPU; recontrast/reference.py defines it.
//
// Bound by arithmetic on shared memory, then by writing the map once. The matrices of upsampling and blur are banded,
// about 10, 6 and 4 nonzeros per row for 64, 32 and 16 -> 256 pixels, and only the bands are multiplied. A small first
// kernel finds the bands and sets the maxima to minus infinity. A block of the second kernel computes a tile of kRows x
// kColumns pixels: for each level it copies the distances and weights of the tile's bands to shared memory, computes
// distances @ cols^T there (a lane per column), then adds rows @ (distances @ cols^T) in registers (a warp per strip of
// rows). All numbers are float32; neither sums nor maxima depend on the order of blocks.

#include <algorithm>
#include <tuple>

#include "launch.cuh"

namespace recontrast {
namespace {

constexpr int kPairs = 32;  // pairs per launch, passed as kernel arguments; more than any model has
constexpr int kStrip = 8;   // rows of the map per warp, kept in registers
constexpr int kRows = kStrip * kThreads / kWarp;
constexpr int kColumns = kWarp;
constexpr int kSide = 32;       // rows and columns of distances in shared memory at once: those of a tile at 256 px
constexpr int kPad = 4;         // keeps rows aligned to 16 bytes and avoids bank conflicts
constexpr int kImages = 4;      // images per block in a large batch: they share each loaded weight
constexpr int kStageWidth = 8;  // lanes that copy along a row of a matrix; the rest of the warp copies the next rows

// All pairs of one resolution; they share their matrices.
struct Level {
  const float* rows;  // [H, h]
  const float* cols;  // [W, w]
  int h, w;
  int first, pairs;  // range in MapArguments::distances
};

struct MapArguments {
  Level level[kPairs];
  const float* distances[kPairs];  // each [N, h, w]
  int levels, N, H, W;
  float scale;
};

__host__ __device__ inline int strips(const MapArguments& arguments) { return (arguments.H + kStrip - 1) / kStrip; }
__host__ __device__ inline int bands_of_level(const MapArguments& arguments) {
  return strips(arguments) + (arguments.W + kColumns - 1) / kColumns;
}

// Bands [from, to) of the columns with nonzeros: of every kStrip rows of `rows`, then of every kColumns rows of `cols`.
__global__ void __launch_bounds__(kThreads) find_bands(const __grid_constant__ MapArguments arguments,
                                                       int2* __restrict__ bands,       // [levels, bands_of_level]
                                                       float* __restrict__ maximum) {  // [N]
  const Level& level = arguments.level[blockIdx.y];
  const bool vertical = blockIdx.x < strips(arguments);
  const int height = vertical ? kStrip : kColumns, width = vertical ? level.h : level.w;
  const int first = (vertical ? blockIdx.x : blockIdx.x - strips(arguments)) * height;
  const int last = min(first + height, vertical ? arguments.H : arguments.W);
  const float* matrix = vertical ? level.rows : level.cols;
  __shared__ int from, to;
  if (threadIdx.x == 0) {
    from = width;
    to = 0;
  }
  __syncthreads();
  for (int y = first + threadIdx.x / kWarp; y < last; y += kThreads / kWarp)
    for (int x = threadIdx.x % kWarp; x < width; x += kWarp)
      if (matrix[static_cast<int64_t>(y) * width + x] != 0) {
        atomicMin(&from, x);
        atomicMax(&to, x + 1);
      }
  __syncthreads();
  if (threadIdx.x == 0) bands[blockIdx.y * bands_of_level(arguments) + blockIdx.x] = make_int2(from, to);
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int n = threadIdx.x; n < arguments.N; n += kThreads) maximum[n] = -INFINITY;
}

// Copies columns [k0, k0 + n) of `count` rows from y0 on, transposed to to[k][y]; zeros beyond n and outside the
// matrix.
template <int count>
__device__ void copy_transposed(const float* __restrict__ matrix, int height, int width, int y0, int k0, int n,
                                float (*to)[count + kPad]) {
  constexpr int step = kThreads / kStageWidth;
  for (int y = threadIdx.x / kStageWidth; y < count; y += step)
    for (int k = threadIdx.x % kStageWidth; k < kSide; k += kStageWidth)
      to[k][y] = k < n && y0 + y < height ? matrix[static_cast<int64_t>(y0 + y) * width + k0 + k] : 0;
}

__device__ __forceinline__ float larger(float a, float b) {
  return a > b || a != a ? a : b;
}  // NaN counts as largest, as in torch

// Atomic *to = larger(*to, value): floats of the same sign are ordered like their bits.
__device__ void atomic_larger(float* to, float value) {
  if (value != value) {
    atomicMax(reinterpret_cast<int*>(to), 0x7fffffff);  // a NaN with the largest bits
  } else if (__float_as_int(value) >= 0) {
    atomicMax(reinterpret_cast<int*>(to), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(to), __float_as_uint(value));
  }
}

// product += distances @ cols^T over `width` columns of distances; a warp has every `warps`-th of `height` rows.
template <int images, int rows_per_warp>
__device__ __forceinline__ void multiply_by_cols(const float (&tile)[images][kSide][kSide + kPad],  // distances
                                                 const float (&across)[kSide][kColumns + kPad],     // cols^T
                                                 int lane, int warp, int height, int width,
                                                 float (&product)[images][rows_per_warp]) {
  constexpr int warps = kThreads / kWarp;
  for (int j = 0; j < width; j += 4) {  // columns beyond width are zero
    const float c0 = across[j][lane], c1 = across[j + 1][lane], c2 = across[j + 2][lane], c3 = across[j + 3][lane];
#pragma unroll
    for (int t = 0; t < rows_per_warp; ++t) {
      if (warp + t * warps >= height) break;
#pragma unroll
      for (int m = 0; m < images; ++m) {
        const float4 d = *reinterpret_cast<const float4*>(&tile[m][warp + t * warps][j]);
        product[m][t] += d.x * c0 + d.y * c1 + d.z * c2 + d.w * c3;
      }
    }
  }
}

// A block computes a tile of `images` maps. Not divided further: nvcc would order the instructions differently, and
// only a measurement on a GPU can tell what that costs.
template <int images>
__global__ void __launch_bounds__(kThreads, images == 1 ? 4 : 2)
    compute_tile(const __grid_constant__ MapArguments arguments,
                 const int2* __restrict__ bands,  // [levels, bands_of_level]
                 float* __restrict__ maps,        // [N, H, W]
                 float* __restrict__ maximum) {   // [N]
  constexpr int warps = kThreads / kWarp, rows_per_warp = kSide / warps;
  alignas(16) __shared__ float tile[images][kSide][kSide + kPad];  // distances, then distances @ cols^T
  alignas(16) __shared__ float across[kSide][kColumns + kPad];     // cols^T
  alignas(16) __shared__ float down[kSide][kRows + kPad];          // rows^T
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int n0 = blockIdx.x * images, y0 = blockIdx.y * kRows, x0 = blockIdx.z * kColumns;
  float sum[kStrip][images] = {};

  for (int l = 0; l < arguments.levels; ++l) {
    const Level& level = arguments.level[l];
    const int2* band = bands + l * bands_of_level(arguments);
    const int2 horizontal = band[strips(arguments) + blockIdx.z];
    int2 vertical = make_int2(level.h, 0), warp_band = vertical;
    for (int s = 0; s < warps && y0 + s * kStrip < arguments.H; ++s) {
      const int2 strip = band[blockIdx.y * warps + s];
      vertical = make_int2(min(vertical.x, strip.x), max(vertical.y, strip.y));
      if (s == warp) warp_band = strip;
    }
    if (horizontal.x >= horizontal.y) continue;  // for all threads of the block
    for (int i0 = vertical.x; i0 < vertical.y; i0 += kSide) {
      const int height = min(kSide, vertical.y - i0);
      float product[images][rows_per_warp] = {};
      for (int j0 = horizontal.x; j0 < horizontal.y; j0 += kSide) {
        const int width = min(kSide, horizontal.y - j0);
        __syncthreads();  // until no thread reads the previous contents
        copy_transposed<kColumns>(level.cols, arguments.W, level.w, x0, j0, width, across);
        if (j0 == horizontal.x) copy_transposed<kRows>(level.rows, arguments.H, level.h, y0, i0, height, down);
#pragma unroll
        for (int m = 0; m < images; ++m)
          for (int i = warp; i < height; i += warps) {
            float d = 0;
            if (lane < width && n0 + m < arguments.N) {
              const int64_t index = (static_cast<int64_t>(n0 + m) * level.h + i0 + i) * level.w + j0 + lane;
              for (int q = 0; q < level.pairs; ++q) d += arguments.distances[level.first + q][index];
            }
            tile[m][i][lane] = d;
          }
        __syncthreads();
        multiply_by_cols(tile, across, lane, warp, height, width, product);
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < rows_per_warp; ++t)
#pragma unroll
        for (int m = 0; m < images; ++m) tile[m][warp + t * warps][lane] = product[m][t];
      __syncthreads();
      const int end = min(warp_band.y - i0, height);
      for (int i = max(warp_band.x - i0, 0); i < end; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(&down[i][warp * kStrip]);
        const float4 b = *reinterpret_cast<const float4*>(&down[i][warp * kStrip + 4]);
        const float weight[kStrip] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int m = 0; m < images; ++m) {
          const float p = tile[m][i][lane];
#pragma unroll
          for (int s = 0; s < kStrip; ++s) sum[s][m] += weight[s] * p;
        }
      }
    }
  }

  __shared__ float tops[images][warps];
#pragma unroll
  for (int m = 0; m < images; ++m) {
    float top = -INFINITY;
#pragma unroll
    for (int s = 0; s < kStrip; ++s) {
      const int y = y0 + warp * kStrip + s, x = x0 + lane;
      if (n0 + m >= arguments.N || y >= arguments.H || x >= arguments.W) continue;
      const float value = sum[s][m] * arguments.scale;
      maps[(static_cast<int64_t>(n0 + m) * arguments.H + y) * arguments.W + x] = value;
      top = larger(top, value - value == 0 ? value : NAN);  // infinity as well: the score of such a map is NaN
    }
    for (int other = kWarp / 2; other; other /= 2) top = larger(top, __shfl_xor_sync(~0u, top, other));
    if (lane == 0) tops[m][warp] = top;
  }
  __syncthreads();
  const int m = threadIdx.x;
  if (m >= images || n0 + m >= arguments.N) return;
  float top = tops[m][0];
  for (int w = 1; w < warps; ++w) top = larger(top, tops[m][w]);
  atomic_larger(maximum + n0 + m, top);
}

void check(size_t i, const Tensor& d, const Tensor& r, const Tensor& c, const Tensor& d0, const Tensor& r0,
           const Tensor& c0) {
  const bool is_float = d.scalar_type() == ScalarType::Float && r.scalar_type() == ScalarType::Float &&
                        c.scalar_type() == ScalarType::Float;
  const bool fits = d.dim() == 3 && r.dim() == 2 && c.dim() == 2 && d.size(0) == d0.size(0) &&
                    r.size(0) == r0.size(0) && c.size(0) == c0.size(0) && r.size(1) == d.size(1) &&
                    c.size(1) == d.size(2);
  STD_TORCH_CHECK(is_float && fits, "anomaly_map: pair ", i, ": wanted float32 (N, h, w), (H, h) and (W, w), got ",
                  shape(d), ", ", shape(r), " and ", shape(c));
  for (const auto& [name, t] : {std::pair{"distances", &d}, {"rows", &r}, {"cols", &c}})
    check_device("anomaly_map", name, *t, d0);
}

// Kernel arguments for contiguous tensors: groups the pairs by their matrices.
MapArguments map_arguments(const std::vector<Tensor>& distances, const std::vector<Tensor>& rows,
                           const std::vector<Tensor>& cols, double scale) {
  MapArguments arguments{};
  arguments.N = static_cast<int>(distances[0].size(0));
  arguments.H = static_cast<int>(rows[0].size(0));
  arguments.W = static_cast<int>(cols[0].size(0));
  arguments.scale = static_cast<float>(scale);
  std::vector<bool> assigned(distances.size());
  int next = 0;
  for (size_t i = 0; i < distances.size(); ++i) {
    if (assigned[i]) continue;
    Level level{rows[i].const_data_ptr<float>(),
                cols[i].const_data_ptr<float>(),
                static_cast<int>(rows[i].size(1)),
                static_cast<int>(cols[i].size(1)),
                next,
                0};
    for (size_t j = i; j < distances.size(); ++j) {
      const bool same = level.rows == rows[j].const_data_ptr() && level.cols == cols[j].const_data_ptr() &&
                        level.h == rows[j].size(1) && level.w == cols[j].size(1);
      if (!same) continue;
      assigned[j] = true;
      arguments.distances[next++] = distances[j].const_data_ptr<float>();
      ++level.pairs;
    }
    arguments.level[arguments.levels++] = level;
  }
  return arguments;
}

std::tuple<Tensor, Tensor> anomaly_map(std::vector<Tensor> distances, std::vector<Tensor> rows,
                                       std::vector<Tensor> cols, double scale) {
  const size_t pairs = distances.size();
  STD_TORCH_CHECK(pairs > 0 && pairs == rows.size() && pairs == cols.size(),
                  "anomaly_map: distances, rows and cols: wanted lists of one length > 0, got ", pairs, ", ",
                  rows.size(), " and ", cols.size());
  STD_TORCH_CHECK(pairs <= kPairs, "anomaly_map: distances: wanted at most ", kPairs, " pairs on CUDA, got ", pairs);
  for (size_t i = 0; i < pairs; ++i) check(i, distances[i], rows[i], cols[i], distances[0], rows[0], cols[0]);
  const DeviceGuard guard(distances[0].get_device());
  for (auto* list : {&distances, &rows, &cols})
    for (Tensor& t : *list) t = torch::stable::contiguous(t);

  const int64_t N = distances[0].size(0), H = rows[0].size(0), W = cols[0].size(0);
  STD_TORCH_CHECK(std::max({N, H, W}) < 1 << 20, "anomaly_map: N, H and W: wanted less than 1048576 on CUDA, got ", N,
                  ", ", H, " and ", W);
  Tensor maps = torch::stable::new_empty(distances[0], std::array<int64_t, 3>{N, H, W});
  if (maps.numel() == 0) return {maps, torch::stable::new_zeros(maps, std::array<int64_t, 1>{N})};
  Tensor maximum = torch::stable::new_empty(maps, std::array<int64_t, 1>{N});

  const MapArguments arguments = map_arguments(distances, rows, cols, scale);
  const unsigned per_level = bands_of_level(arguments);
  Tensor bands =
      torch::stable::new_empty(maps, std::array<int64_t, 3>{arguments.levels, per_level, 2}, ScalarType::Int);
  int2* band_data = reinterpret_cast<int2*>(bands.mutable_data_ptr<int32_t>());
  float* out = maps.mutable_data_ptr<float>();
  float* tops = maximum.mutable_data_ptr<float>();
  const cudaStream_t stream = current_stream(maps);
  launch(find_bands, dim3(per_level, arguments.levels), kThreads, stream, arguments, band_data, tops);
  const dim3 tiles(blocks(N, kImages), blocks(H, kRows), blocks(W, kColumns));
  if (static_cast<int64_t>(tiles.x) * tiles.y * tiles.z >= 2 * processors()) {
    launch(compute_tile<kImages>, tiles, kThreads, stream, arguments, band_data, out, tops);
  } else {
    launch(compute_tile<1>, dim3(N, tiles.y, tiles.z), kThreads, stream, arguments, band_data, out, tops);
  }
  return {maps, maximum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CUDA, m) { m.impl("anomaly_map", TORCH_BOX(&anomaly_map)); }

}  // namespace recontrast
