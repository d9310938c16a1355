// cosine_sums on the CPU; recontrast/reference.py defines it.
//
// Memory-bound: each feature is read once, in place. The loop order follows the layout of the student's features y: in
// NCHW along positions (the sums of a block of positions stay in the L1 cache while its channels are read), in
// channels_last along channels. One thread computes each sum over all channels, so results do not depend on the number
// of threads.

#include <algorithm>

#include "buffer_pool.h"
#include "cosine_simd.h"
#include "feature_rows.h"
#include "tensor_arguments.h"

namespace recontrast {
namespace {

constexpr int64_t kBlock = 4096;  // positions or channels per block at most: one channel of WideResNet's finest level
constexpr int64_t kLeastBlock = 256;  // positions per block at least: the overhead per row outweighs shorter ones
constexpr int64_t kSkip = 512;  // consecutive easy positions worth skipping: shorter gaps only interrupt the prefetcher
constexpr int64_t kChannels = 64;  // channels per backward task in NCHW
constexpr int64_t kGrain = 32768;  // elements per thread at least

// ---- forward -------------------------------------------------------------------------------------------------------

template <typename A>
struct Buffers {  // for features that are not contiguous numbers of type A
  alignas(64) A x[kChannelsAtOnce][kBlock], y[kChannelsAtOnce][kBlock];
};

// Positions per task: as many as possible while each thread still gets four tasks.
int64_t block_of(int64_t N, int64_t P) {
  const int64_t positions = N * P / (4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  return std::clamp(positions / kLeastBlock * kLeastBlock, kLeastBlock, kBlock);
}

template <typename A>
void sums_along_positions(const Source<A>& x, const Source<A>& y, A* sums, int64_t N, int64_t C, int64_t P) {
  const int64_t block = block_of(N, P), blocks = (P + block - 1) / block;
  torch::stable::parallel_for(0, N * blocks, 1, [&](int64_t begin, int64_t end) {
    Buffers<A> buffers;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, first = task % blocks * block, size = std::min(block, P - first);
      A* xy = sums + n * P + first;  // contains zeros
      A* xx = xy + N * P;
      A* yy = xx + N * P;
      const A* xs[kChannelsAtOnce];
      const A* ys[kChannelsAtOnce];
      for (int64_t c = 0; c < C;) {
        const int64_t channels = C - c < kChannelsAtOnce ? 1 : kChannelsAtOnce;
        for (int64_t k = 0; k < channels; ++k) {
          xs[k] = x.row(n * x.strides.n + (c + k) * x.strides.c + first * x.strides.p, x.strides.p, size, buffers.x[k]);
          ys[k] = y.row(n * y.strides.n + (c + k) * y.strides.c + first * y.strides.p, y.strides.p, size, buffers.y[k]);
        }
        if (channels == 1)
          add_one(xs, ys, size, xy, xx, yy);
        else
          add_four(xs, ys, size, xy, xx, yy);
        c += channels;
      }
    }
  });
}

template <typename A>
void sums_along_channels(const Source<A>& x, const Source<A>& y, A* sums, int64_t N, int64_t C, int64_t P) {
  torch::stable::parallel_for(0, N * P, kGrain / std::max<int64_t>(C, 1) + 1, [&](int64_t begin, int64_t end) {
    Buffers<A> buffers;
    for (int64_t position = begin; position < end; ++position) {
      const int64_t n = position / P, p = position % P;
      A s[3] = {0, 0, 0};
      for (int64_t c = 0; c < C; c += kBlock) {
        const int64_t size = std::min(kBlock, C - c);
        const A* a = x.row(n * x.strides.n + c * x.strides.c + p * x.strides.p, x.strides.c, size, buffers.x[0]);
        const A* b = y.row(n * y.strides.n + c * y.strides.c + p * y.strides.p, y.strides.c, size, buffers.y[0]);
        dot(a, b, size, s);
      }
      for (int64_t i = 0; i < 3; ++i) sums[i * N * P + position] = s[i];
    }
  });
}

// `t`, or a contiguous copy if no single stride covers its positions (a transposed layout, for example).
Tensor with_position_stride(const Tensor& t) { return has_position_stride(t) ? t : torch::stable::contiguous(t); }

bool along_channels(const Tensor& y) { return y.stride(1) == 1 && y.size(1) > 1; }

// Adds the sums of one pair to `sums` (3, N, P), which contains zeros.
template <typename A>
void sums_into(const Tensor& x_, const Tensor& y_, A* sums) {
  const Tensor x = with_position_stride(x_), y = with_position_stride(y_);
  const int64_t N = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  if (N * P == 0) return;
  const auto kernel = along_channels(y) ? sums_along_channels<A> : sums_along_positions<A>;
  kernel(Source<A>(x), Source<A>(y), sums, N, C, P);
}

Tensor cosine_sums(const Tensor& x, const Tensor& y) {
  check_pair("cosine_sums", x, y);
  Tensor out = torch::stable::new_zeros(x, std::array<int64_t, 4>{3, x.size(0), x.size(2), x.size(3)}, acc_type(x, y));
  dispatch("cosine_sums", out.scalar_type(), [&](auto number) {
    using A = Acc<decltype(number)>;
    sums_into<A>(x, y, out.mutable_data_ptr<A>());
  });
  return out;
}

Tensor cosine_sums_group(std::vector<Tensor> x, std::vector<Tensor> y) {
  const auto [acc, total] = check_group("cosine_sums_group", x, y);
  Tensor out = torch::stable::new_zeros(x[0], std::array<int64_t, 1>{total}, acc);
  dispatch("cosine_sums_group", acc, [&](auto number) {
    using A = Acc<decltype(number)>;
    A* sums = out.mutable_data_ptr<A>();
    for (size_t i = 0; i < x.size(); ++i) {
      sums_into<A>(x[i], y[i], sums);
      sums += sums_length(x[i]);
    }
  });
  return out;
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <typename A>
void backward_along_positions(const A* grad, const Source<A>& x, const Source<A>& y, const Sink<A>& dy, int64_t N,
                              int64_t C, int64_t P) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t block = block_of(N, P), blocks = (P + block - 1) / block, groups = (C + kChannels - 1) / kChannels;
  const int64_t grain = kGrain / (std::min(P, block) * std::min(C, kChannels)) + 1;
  torch::stable::parallel_for(0, N * groups * blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) A h[kBlock], out[kBlock], xs[kBlock], ys[kBlock];
    struct Segment {
      int64_t from, to;
    } segments[kBlock / lanes + 1];  // positions with a weight; the features between the segments are not read
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (groups * blocks), group = task / blocks % groups;
      const int64_t first = task % blocks * block, size = std::min(block, P - first);
      const A* g = grad + n * P + first;
      const A* g_yy = g + 2 * N * P;
      int64_t count = 0;
      for (int64_t p = 0; p < size; p += lanes) {
        const int64_t to = std::min(p + lanes, size);
        bool any = false;
        for (int64_t i = p; i < to; ++i) {
          h[i] = 2 * g_yy[i];
          any |= g[i] != 0 || h[i] != 0;
        }
        if (!any) continue;
        if (count && p - segments[count - 1].to < kSkip)
          segments[count - 1].to = to;
        else
          segments[count++] = {p, to};
      }
      for (int64_t c = group * kChannels; c < std::min(C, (group + 1) * kChannels); ++c) {
        const int64_t x_row = n * x.strides.n + c * x.strides.c + first * x.strides.p;
        const int64_t y_row = n * y.strides.n + c * y.strides.c + first * y.strides.p;
        const int64_t dy_row = n * dy.strides.n + c * dy.strides.c + first * dy.strides.p;
        int64_t done = 0;
        for (int64_t r = 0; r < count; ++r) {
          const auto [from, to] = segments[r];
          if (from > done) dy.zero(dy_row + done * dy.strides.p, dy.strides.p, from - done);
          const A* a = x.row(x_row + from * x.strides.p, x.strides.p, to - from, xs);
          const A* b = y.row(y_row + from * y.strides.p, y.strides.p, to - from, ys);
          A* d = dy.row(dy_row + from * dy.strides.p, dy.strides.p, out);
          gradient_row(g + from, h + from, a, b, to - from, d);
          dy.put(d, dy_row + from * dy.strides.p, dy.strides.p, to - from);
          done = to;
        }
        if (size > done) dy.zero(dy_row + done * dy.strides.p, dy.strides.p, size - done);
      }
    }
  });
}

template <typename A>
void backward_along_channels(const A* grad, const Source<A>& x, const Source<A>& y, const Sink<A>& dy, int64_t N,
                             int64_t C, int64_t P) {
  torch::stable::parallel_for(0, N * P, kGrain / C + 1, [&](int64_t begin, int64_t end) {
    alignas(64) A out[kBlock], xs[kBlock], ys[kBlock];
    for (int64_t position = begin; position < end; ++position) {
      const int64_t n = position / P, p = position % P, dy_row = n * dy.strides.n + p * dy.strides.p;
      const A g = grad[position], h = 2 * grad[2 * N * P + position];
      if (g == 0 && h == 0) {  // an easy point: its features need not be read
        dy.zero(dy_row, dy.strides.c, C, true);
        continue;
      }
      for (int64_t c = 0; c < C; c += kBlock) {
        const int64_t size = std::min(kBlock, C - c);
        const A* a = x.row(n * x.strides.n + c * x.strides.c + p * x.strides.p, x.strides.c, size, xs);
        const A* b = y.row(n * y.strides.n + c * y.strides.c + p * y.strides.p, y.strides.c, size, ys);
        A* d = dy.row(dy_row + c * dy.strides.c, dy.strides.c, out);
        gradient_point(g, h, a, b, size, d, dy.bypass_cache && d != out);
        dy.put(d, dy_row + c * dy.strides.c, dy.strides.c, size);
      }
    }
    fence_nontemporal();
  });
}

template <typename A>
Tensor gradient_of(const A* grad, const Tensor& x_, const Tensor& y_) {
  const Tensor x = with_position_stride(x_), y = with_position_stride(y_);
  Tensor out = empty_like_pooled(y_);  // in the student's layout
  if (out.numel() == 0) return out;
  Tensor dy = has_position_stride(out) ? out : torch::stable::empty_like(y);
  const auto kernel = along_channels(dy) ? backward_along_channels<A> : backward_along_positions<A>;
  kernel(grad, Source<A>(x), Source<A>(y), Sink<A>(dy), x.size(0), x.size(1), x.size(2) * x.size(3));
  if (dy.get() != out.get()) torch::stable::copy_(out, dy);
  return out;
}

Tensor cosine_sums_backward(const Tensor& grad_, const Tensor& x, const Tensor& y) {
  check_pair("cosine_sums_backward", x, y);
  check_gradient("cosine_sums_backward", grad_, y, acc_type(x, y));
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor out;
  dispatch("cosine_sums_backward", grad.scalar_type(), [&](auto number) {
    using A = Acc<decltype(number)>;
    out = gradient_of<A>(grad.const_data_ptr<A>(), x, y);
  });
  return out;
}

std::vector<Tensor> cosine_sums_group_backward(const Tensor& grad_, std::vector<Tensor> x, std::vector<Tensor> y) {
  const auto [acc, total] = check_group("cosine_sums_group_backward", x, y);
  check_flat("cosine_sums_group_backward", "grad", grad_, total, acc);
  const Tensor grad = torch::stable::contiguous(grad_);
  std::vector<Tensor> out;
  dispatch("cosine_sums_group_backward", acc, [&](auto number) {
    using A = Acc<decltype(number)>;
    const A* part = grad.const_data_ptr<A>();
    for (size_t i = 0; i < x.size(); ++i) {
      out.push_back(gradient_of<A>(part, x[i], y[i]));
      part += sums_length(x[i]);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CPU, m) {
  m.impl("cosine_sums", TORCH_BOX(&cosine_sums));
  m.impl("cosine_sums_backward", TORCH_BOX(&cosine_sums_backward));
  m.impl("cosine_sums_group", TORCH_BOX(&cosine_sums_group));
  m.impl("cosine_sums_group_backward", TORCH_BOX(&cosine_sums_group_backward));
}

}  // namespace recontrast
