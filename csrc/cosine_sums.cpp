// cosine_sums on the CPU. What it computes: recontrast/reference.py.
//
// Memory-bound: each feature is read once, in place. The order of iteration follows the student's layout: NCHW runs
// along positions (a block of them stays in the first cache while the channels pass), channels_last along channels.
// Every sum is taken over all channels by one thread, so that results do not depend on the number of threads.

#include <algorithm>

#include "buffer_pool.h"
#include "cosine_simd.h"
#include "simd.h"
#include "tensor_arguments.h"

namespace recontrast {
namespace {

constexpr int64_t kBlock = 4096;      // positions or channels at a time at most: a row of WideResNet's finest level
constexpr int64_t kLeastBlock = 256;  // positions: below, starting a row takes longer than reading it
constexpr int64_t kSkip = 512;        // easy positions in a row that are skipped: fewer would only stop the prefetcher
constexpr int64_t kChannels = 64;     // channels of a backward task in NCHW
constexpr int64_t kGrain = 32768;     // elements a thread takes at least

// ---- forward -------------------------------------------------------------------------------------------------------

template <typename A>
struct Buffers {  // for features that are not A side by side
  alignas(64) A x[kTogether][kBlock], y[kTogether][kBlock];
};

// Positions of a task: as many as fit while each thread still gets four tasks.
int64_t block_of(int64_t N, int64_t P) {
  const int64_t fair = N * P / (4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  return std::clamp(fair / kLeastBlock * kLeastBlock, kLeastBlock, kBlock);
}

template <typename A>
void sums_along_positions(const Source<A>& x, const Source<A>& y, A* sums, int64_t N, int64_t C, int64_t P) {
  const int64_t block = block_of(N, P), blocks = (P + block - 1) / block;
  torch::stable::parallel_for(0, N * blocks, 1, [&](int64_t begin, int64_t end) {
    Buffers<A> buffers;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, first = task % blocks * block, size = std::min(block, P - first);
      A* xy = sums + n * P + first;  // zeros
      A* xx = xy + N * P;
      A* yy = xx + N * P;
      const A* xs[kTogether];
      const A* ys[kTogether];
      for (int64_t c = 0; c < C;) {
        const int64_t together = C - c < kTogether ? 1 : kTogether;
        for (int64_t k = 0; k < together; ++k) {
          xs[k] = x.row(n * x.at.n + (c + k) * x.at.c + first * x.at.p, x.at.p, size, buffers.x[k]);
          ys[k] = y.row(n * y.at.n + (c + k) * y.at.c + first * y.at.p, y.at.p, size, buffers.y[k]);
        }
        if (together == 1)
          add_one(xs, ys, size, xy, xx, yy);
        else
          add_four(xs, ys, size, xy, xx, yy);
        c += together;
      }
    }
  });
}

template <typename A>
void sums_along_channels(const Source<A>& x, const Source<A>& y, A* sums, int64_t N, int64_t C, int64_t P) {
  torch::stable::parallel_for(0, N * P, kGrain / std::max<int64_t>(C, 1) + 1, [&](int64_t begin, int64_t end) {
    Buffers<A> buffers;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / P, p = at % P;
      A s[3] = {0, 0, 0};
      for (int64_t c = 0; c < C; c += kBlock) {
        const int64_t size = std::min(kBlock, C - c);
        const A* a = x.row(n * x.at.n + c * x.at.c + p * x.at.p, x.at.c, size, buffers.x[0]);
        const A* b = y.row(n * y.at.n + c * y.at.c + p * y.at.p, y.at.c, size, buffers.y[0]);
        dot(a, b, size, s);
      }
      for (int64_t i = 0; i < 3; ++i) sums[i * N * P + at] = s[i];
    }
  });
}

// Features in a layout with one stride for the positions; only a layout with none, such as a transposed one, is copied.
Tensor positions(const Tensor& t) { return has_position_stride(t) ? t : torch::stable::contiguous(t); }

bool along_channels(const Tensor& y) { return y.stride(1) == 1 && y.size(1) > 1; }

// Sums of one pair into zeros, (3, N, P).
template <typename A>
void sums_into(const Tensor& x_, const Tensor& y_, A* sums) {
  const Tensor x = positions(x_), y = positions(y_);
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
      sums += sums_of(x[i]);
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
    struct Run {
      int64_t from, to;
    } runs[kBlock / lanes + 1];  // stretches of positions with a weight; between them nothing is read
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
        if (count && p - runs[count - 1].to < kSkip)
          runs[count - 1].to = to;
        else
          runs[count++] = {p, to};
      }
      for (int64_t c = group * kChannels; c < std::min(C, (group + 1) * kChannels); ++c) {
        const int64_t ax = n * x.at.n + c * x.at.c + first * x.at.p, ay = n * y.at.n + c * y.at.c + first * y.at.p;
        const int64_t ad = n * dy.at.n + c * dy.at.c + first * dy.at.p;
        int64_t done = 0;
        for (int64_t r = 0; r < count; ++r) {
          const auto [from, to] = runs[r];
          if (from > done) dy.zero(ad + done * dy.at.p, dy.at.p, from - done);
          const A* a = x.row(ax + from * x.at.p, x.at.p, to - from, xs);
          const A* b = y.row(ay + from * y.at.p, y.at.p, to - from, ys);
          A* d = dy.row(ad + from * dy.at.p, dy.at.p, out);
          blend(g + from, h + from, a, b, to - from, d);
          dy.put(d, ad + from * dy.at.p, dy.at.p, to - from);
          done = to;
        }
        if (size > done) dy.zero(ad + done * dy.at.p, dy.at.p, size - done);
      }
    }
  });
}

template <typename A>
void backward_along_channels(const A* grad, const Source<A>& x, const Source<A>& y, const Sink<A>& dy, int64_t N,
                             int64_t C, int64_t P) {
  torch::stable::parallel_for(0, N * P, kGrain / C + 1, [&](int64_t begin, int64_t end) {
    alignas(64) A out[kBlock], xs[kBlock], ys[kBlock];
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / P, p = at % P, ad = n * dy.at.n + p * dy.at.p;
      const A g = grad[at], h = 2 * grad[2 * N * P + at];
      if (g == 0 && h == 0) {  // an easy point: its features are not read
        dy.zero(ad, dy.at.c, C, true);
        continue;
      }
      for (int64_t c = 0; c < C; c += kBlock) {
        const int64_t size = std::min(kBlock, C - c);
        const A* a = x.row(n * x.at.n + c * x.at.c + p * x.at.p, x.at.c, size, xs);
        const A* b = y.row(n * y.at.n + c * y.at.c + p * y.at.p, y.at.c, size, ys);
        A* d = dy.row(ad + c * dy.at.c, dy.at.c, out);
        blend_one(g, h, a, b, size, d, dy.past && d != out);
        dy.put(d, ad + c * dy.at.c, dy.at.c, size);
      }
    }
    stream_end();
  });
}

template <typename A>
Tensor gradient_of(const A* grad, const Tensor& x_, const Tensor& y_) {
  const Tensor x = positions(x_), y = positions(y_);
  Tensor out = empty_like_reused(y_);  // the student's layout
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
      part += sums_of(x[i]);
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
