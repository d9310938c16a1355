// anomaly_map on the GPU. What it computes: recontrast/reference.py.
//
// Bound by arithmetic in shared memory, then by the one write of the map: the matrices of upsampling and blur are
// bands, about 10, 6 and 4 numbers a row for 64, 32 and 16 -> 256 pixels, and only the bands are multiplied. A tiny
// first kernel finds them and sets the maxima to minus infinity. A block of the second makes a tile of kRows x kColumns
// pixels: for each level it brings the distances and weights of the tile's bands to shared memory, makes distances @
// cols^T there (a lane is a column), then adds rows @ that in registers (a warp is a strip of rows). Float32
// throughout, no sum depends on the order of blocks, and a maximum does not either.

#include <algorithm>
#include <tuple>

#include "launch.cuh"

namespace recontrast {
namespace {

constexpr int kPairs = 32;  // pointers that travel as kernel arguments: more than any model has
constexpr int kStrip = 8;   // rows of the map that a warp keeps in registers
constexpr int kRows = kStrip * kThreads / kWarp;
constexpr int kColumns = kWarp;
constexpr int kSide = 32;       // rows and columns of distances in shared memory at once: the bands of a tile at 256 px
constexpr int kPad = 4;         // keeps rows 16-byte aligned and staging free of bank conflicts
constexpr int kTogether = 4;    // images of a block in a large batch: a weight that is loaded serves them all
constexpr int kStageWidth = 8;  // lanes along a row of a matrix while staging; the other four take the next rows

// The pairs of one level, which share their matrices.
struct Level {
  const float* rows;  // [H, h]
  const float* cols;  // [W, w]
  int h, w;
  int first, pairs;  // in Work::distances
};

struct Work {
  Level level[kPairs];
  const float* distances[kPairs];  // each [N, h, w]
  int levels, N, H, W;
  float scale;
};

__host__ __device__ inline int strips(const Work& work) { return (work.H + kStrip - 1) / kStrip; }
__host__ __device__ inline int bands_of_level(const Work& work) {
  return strips(work) + (work.W + kColumns - 1) / kColumns;
}

// Bands [from, to) of the columns that hold anything: of each kStrip rows of `rows`, then of each kColumns of `cols`.
__global__ void __launch_bounds__(kThreads) find_bands(const __grid_constant__ Work work,
                                                       int2* __restrict__ bands,       // [levels, bands_of_level]
                                                       float* __restrict__ maximum) {  // [N]
  const Level& level = work.level[blockIdx.y];
  const bool vertical = blockIdx.x < strips(work);
  const int height = vertical ? kStrip : kColumns, width = vertical ? level.h : level.w;
  const int first = (vertical ? blockIdx.x : blockIdx.x - strips(work)) * height;
  const int last = min(first + height, vertical ? work.H : work.W);
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
  if (threadIdx.x == 0) bands[blockIdx.y * bands_of_level(work) + blockIdx.x] = make_int2(from, to);
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int n = threadIdx.x; n < work.N; n += kThreads) maximum[n] = -INFINITY;
}

// Columns [k0, k0 + n) of `count` rows from y0 on, transposed: to[k][y]; zero beyond n and outside the matrix.
template <int count>
__device__ void stage(const float* __restrict__ matrix, int height, int width, int y0, int k0, int n,
                      float (*to)[count + kPad]) {
  constexpr int step = kThreads / kStageWidth;
  for (int y = threadIdx.x / kStageWidth; y < count; y += step)
    for (int k = threadIdx.x % kStageWidth; k < kSide; k += kStageWidth)
      to[k][y] = k < n && y0 + y < height ? matrix[static_cast<int64_t>(y0 + y) * width + k0 + k] : 0;
}

__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN wins, as in torch

// *to = larger(*to, value) in any order: floats of one sign compare as their bits do.
__device__ void raise(float* to, float value) {
  if (value != value) {
    atomicMax(reinterpret_cast<int*>(to), 0x7fffffff);  // a NaN above every number
  } else if (__float_as_int(value) >= 0) {
    atomicMax(reinterpret_cast<int*>(to), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(to), __float_as_uint(value));
  }
}

template <int images>
__global__ void __launch_bounds__(kThreads, images == 1 ? 4 : 2)
    blend(const __grid_constant__ Work work,
          const int2* __restrict__ bands,  // [levels, bands_of_level]
          float* __restrict__ maps,        // [N, H, W]
          float* __restrict__ maximum) {   // [N]
  constexpr int warps = kThreads / kWarp, turns = kSide / warps;
  alignas(16) __shared__ float tile[images][kSide][kSide + kPad];  // distances, then distances @ cols^T
  alignas(16) __shared__ float across[kSide][kColumns + kPad];     // cols^T
  alignas(16) __shared__ float down[kSide][kRows + kPad];          // rows^T
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int n0 = blockIdx.x * images, y0 = blockIdx.y * kRows, x0 = blockIdx.z * kColumns;
  float sum[kStrip][images] = {};

  for (int l = 0; l < work.levels; ++l) {
    const Level& level = work.level[l];
    const int2* band = bands + l * bands_of_level(work);
    const int2 horizontal = band[strips(work) + blockIdx.z];
    int2 vertical = make_int2(level.h, 0), mine = vertical;
    for (int s = 0; s < warps && y0 + s * kStrip < work.H; ++s) {
      const int2 strip = band[blockIdx.y * warps + s];
      vertical = make_int2(min(vertical.x, strip.x), max(vertical.y, strip.y));
      if (s == warp) mine = strip;
    }
    if (horizontal.x >= horizontal.y) continue;  // the same for the whole block
    for (int i0 = vertical.x; i0 < vertical.y; i0 += kSide) {
      const int height = min(kSide, vertical.y - i0);
      float product[images][turns] = {};
      for (int j0 = horizontal.x; j0 < horizontal.y; j0 += kSide) {
        const int width = min(kSide, horizontal.y - j0);
        __syncthreads();  // whoever still reads
        stage<kColumns>(level.cols, work.W, level.w, x0, j0, width, across);
        if (j0 == horizontal.x) stage<kRows>(level.rows, work.H, level.h, y0, i0, height, down);
#pragma unroll
        for (int m = 0; m < images; ++m)
          for (int i = warp; i < height; i += warps) {
            float d = 0;
            if (lane < width && n0 + m < work.N) {
              const int64_t at = (static_cast<int64_t>(n0 + m) * level.h + i0 + i) * level.w + j0 + lane;
              for (int q = 0; q < level.pairs; ++q) d += work.distances[level.first + q][at];
            }
            tile[m][i][lane] = d;
          }
        __syncthreads();
        for (int j = 0; j < width; j += 4) {  // what was staged beyond width is zero
          const float c0 = across[j][lane], c1 = across[j + 1][lane], c2 = across[j + 2][lane],
                      c3 = across[j + 3][lane];
#pragma unroll
          for (int t = 0; t < turns; ++t) {
            if (warp + t * warps >= height) break;
#pragma unroll
            for (int m = 0; m < images; ++m) {
              const float4 d = *reinterpret_cast<const float4*>(&tile[m][warp + t * warps][j]);
              product[m][t] += d.x * c0 + d.y * c1 + d.z * c2 + d.w * c3;
            }
          }
        }
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < turns; ++t)
#pragma unroll
        for (int m = 0; m < images; ++m) tile[m][warp + t * warps][lane] = product[m][t];
      __syncthreads();
      const int end = min(mine.y - i0, height);
      for (int i = max(mine.x - i0, 0); i < end; ++i) {
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
      if (n0 + m >= work.N || y >= work.H || x >= work.W) continue;
      const float value = sum[s][m] * work.scale;
      maps[(static_cast<int64_t>(n0 + m) * work.H + y) * work.W + x] = value;
      top = larger(top, value);
    }
    for (int other = kWarp / 2; other; other /= 2) top = larger(top, __shfl_xor_sync(~0u, top, other));
    if (lane == 0) tops[m][warp] = top;
  }
  __syncthreads();
  const int m = threadIdx.x;
  if (m >= images || n0 + m >= work.N) return;
  float top = tops[m][0];
  for (int w = 1; w < warps; ++w) top = larger(top, tops[m][w]);
  raise(maximum + n0 + m, top);
}

void check(size_t i, const Tensor& d, const Tensor& r, const Tensor& c, const Tensor& d0, const Tensor& r0,
           const Tensor& c0) {
  const bool is_float = d.scalar_type() == ScalarType::Float && r.scalar_type() == ScalarType::Float &&
                        c.scalar_type() == ScalarType::Float;
  const bool fits = d.dim() == 3 && r.dim() == 2 && c.dim() == 2 && d.size(0) == d0.size(0) &&
                    r.size(0) == r0.size(0) && c.size(0) == c0.size(0) && r.size(1) == d.size(1) &&
                    c.size(1) == d.size(2);
  STD_TORCH_CHECK(is_float && fits, "anomaly_map: pair ", i, " must be float32 (N, h, w), (H, h) and (W, w), got ",
                  shape(d), ", ", shape(r), " and ", shape(c));
  for (const auto& [name, t] : {std::pair{"distances", &d}, {"rows", &r}, {"cols", &c}})
    check_device("anomaly_map", name, *t, d0);
}

std::tuple<Tensor, Tensor> anomaly_map(std::vector<Tensor> distances, std::vector<Tensor> rows,
                                       std::vector<Tensor> cols, double scale) {
  const size_t pairs = distances.size();
  STD_TORCH_CHECK(pairs > 0 && pairs == rows.size() && pairs == cols.size(),
                  "anomaly_map: distances, rows and cols must be lists of one length > 0, got ", pairs, ", ",
                  rows.size(), " and ", cols.size());
  STD_TORCH_CHECK(pairs <= kPairs, "anomaly_map: at most ", kPairs, " pairs on CUDA, got ", pairs);
  for (size_t i = 0; i < pairs; ++i) check(i, distances[i], rows[i], cols[i], distances[0], rows[0], cols[0]);
  const DeviceGuard guard(distances[0].get_device());
  for (auto* list : {&distances, &rows, &cols})
    for (Tensor& t : *list) t = torch::stable::contiguous(t);

  const int64_t N = distances[0].size(0), H = rows[0].size(0), W = cols[0].size(0);
  STD_TORCH_CHECK(std::max({N, H, W}) < 1 << 20, "anomaly_map: N, H and W must be less than 1048576 on CUDA, got ", N,
                  ", ", H, " and ", W);
  Tensor maps = torch::stable::new_empty(distances[0], std::array<int64_t, 3>{N, H, W});
  if (maps.numel() == 0) return {maps, torch::stable::new_zeros(maps, std::array<int64_t, 1>{N})};
  Tensor maximum = torch::stable::new_empty(maps, std::array<int64_t, 1>{N});

  Work work{};
  work.N = static_cast<int>(N);
  work.H = static_cast<int>(H);
  work.W = static_cast<int>(W);
  work.scale = static_cast<float>(scale);
  std::vector<bool> placed(pairs);
  int next = 0;
  for (size_t i = 0; i < pairs; ++i) {
    if (placed[i]) continue;
    Level level{rows[i].const_data_ptr<float>(),
                cols[i].const_data_ptr<float>(),
                static_cast<int>(rows[i].size(1)),
                static_cast<int>(cols[i].size(1)),
                next,
                0};
    for (size_t j = i; j < pairs; ++j) {
      const bool same = level.rows == rows[j].const_data_ptr() && level.cols == cols[j].const_data_ptr() &&
                        level.h == rows[j].size(1) && level.w == cols[j].size(1);
      if (!same) continue;
      placed[j] = true;
      work.distances[next++] = distances[j].const_data_ptr<float>();
      ++level.pairs;
    }
    work.level[work.levels++] = level;
  }

  const unsigned per_level = bands_of_level(work);
  Tensor bands = torch::stable::new_empty(maps, std::array<int64_t, 3>{work.levels, per_level, 2}, ScalarType::Int);
  int2* found = reinterpret_cast<int2*>(bands.mutable_data_ptr<int32_t>());
  float* out = maps.mutable_data_ptr<float>();
  float* tops = maximum.mutable_data_ptr<float>();
  const cudaStream_t stream = current_stream(maps);
  launch(find_bands, dim3(per_level, work.levels), kThreads, stream, work, found, tops);
  const dim3 tiles(blocks(N, kTogether), blocks(H, kRows), blocks(W, kColumns));
  if (static_cast<int64_t>(tiles.x) * tiles.y * tiles.z >= 2 * processors()) {
    launch(blend<kTogether>, tiles, kThreads, stream, work, found, out, tops);
  } else {
    launch(blend<1>, dim3(N, tiles.y, tiles.z), kThreads, stream, work, found, out, tops);
  }
  return {maps, maximum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CUDA, m) { m.impl("anomaly_map", TORCH_BOX(&anomaly_map)); }

}  // namespace recontrast
