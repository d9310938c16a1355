// How norm_act walks through its features on the CPU: layouts, tiles and tasks, and the parameters of the channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "norm_act.h"
#include "norm_act_simd.h"

namespace recontrast {
namespace {

constexpr int64_t kTile = 64 << 10;      // bytes of a tile at most, which is read twice from the L2 cache
constexpr int64_t kPerTask = 256 << 10;  // bytes of a task at least, whose partial sums are merged
constexpr int64_t kTasks = 64;           // tasks of a reduction at most in channels_last; each has sums of all channels
constexpr int64_t kCached = 32 << 20;    // bytes; a larger result is evicted from the caches before it is read

// Features (N, C, P) as blocks of rows. Channels last: rows are positions, a tile holds all channels of some of them.
// NCHW: each row, one channel of an image or a part of it, is a tile.
struct Plan {
  bool per_lane;  // channels last
  int64_t N, C, P, tile, tasks;

  explicit Plan(const Tensor& y)
      : per_lane(is_along_channels(y)), N(y.size(0)), C(y.size(1)), P(y.size(2) * y.size(3)) {
    const int64_t size = static_cast<int64_t>(y.element_size());
    if (per_lane) {
      tile = std::clamp<int64_t>(kTile / (C * size), 4, 256);
      tasks = std::clamp<int64_t>(N * P * C * size / kPerTask, 1, std::min(kTasks, N * P));
    } else {
      tile = std::min(P, kTile / size);
      tasks = N * C;
    }
  }
  int64_t channels_of_task() const { return per_lane ? C : 1; }
  int64_t values() const { return N * P; }  // of each channel

  // Calls body(first channel, image, first position, rows, numbers of a row) for each tile of a task in turn.
  template <typename Body>
  void for_tiles(int64_t task, bool backwards, const Body& body) const {
    const int64_t from = per_lane ? N * P * task / tasks : 0, to = per_lane ? N * P * (task + 1) / tasks : P;
    const int64_t image = per_lane ? 0 : task / C, channel = per_lane ? 0 : task % C;
    // A tile of positions ends with its image, because the images of a slice are not adjacent.
    std::vector<std::pair<int64_t, int64_t>> tiles;
    for (int64_t p = from; p < to;) {
      const int64_t end = std::min({p + tile, to, per_lane ? (p / P + 1) * P : to});
      tiles.emplace_back(p, end);
      p = end;
    }
    if (backwards) std::reverse(tiles.begin(), tiles.end());
    for (const auto& [p, end] : tiles) {
      if (per_lane)
        body(0, p / P, p % P, end - p, C);
      else
        body(channel, image, p, 1, end - p);
    }
  }
};

// Tensors of one call, whose pointers to a tile `at` computes.
template <typename T>
struct View {
  T* data = nullptr;
  Strides strides{};
  View() = default;
  template <typename Pointer>
  View(const Tensor& t, Pointer pointer) : data(pointer), strides(strides_of(t)) {}

  T* tile(int64_t channel, int64_t image, int64_t position) const {
    return data ? data + image * strides.n + channel * strides.c + position * strides.p : nullptr;
  }
};
template <typename T>
View<const T> view_of(const std::optional<Tensor>& t) {
  return t ? View<const T>(*t, t->const_data_ptr<T>()) : View<const T>();
}
template <typename T>
View<T> output_of(std::optional<Tensor>& t) {
  return t ? View<T>(*t, t->mutable_data_ptr<T>()) : View<T>();
}

// ---- parameters -------------------------------------------------------------------------------------------------

template <typename A>
using Channels = std::vector<A>;  // [C], padded with zeros to whole vectors

template <typename A>
Channels<A> padded(int64_t C) {
  return Channels<A>((C + Lanes<A>::count - 1) / Lanes<A>::count * Lanes<A>::count);
}

// Numbers [C] of any floating dtype; `otherwise` where there is no tensor.
template <typename A>
Channels<A> read_channels(const char* op, const std::optional<Tensor>& t, int64_t C, A otherwise) {
  check_channels(op, t, C);
  Channels<A> out = padded<A>(C);
  std::fill(out.begin(), out.begin() + C, otherwise);
  if (!t) return out;
  dispatch(op, t->scalar_type(), [&](auto number) {
    const auto* from = t->const_data_ptr<decltype(number)>();
    for (int64_t c = 0; c < C; ++c) out[c] = static_cast<A>(from[c * t->stride(0)]);
  });
  return out;
}

template <typename A>
struct Parameters {
  Channels<A> mean, scale, bias;
  Affine<A> at(int64_t c) const { return {mean.data() + c, scale.data() + c, bias.data() + c}; }
};

template <typename A>
Parameters<A> make_parameters(const char* op, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                              const A* moments, int64_t C, double eps) {
  Parameters<A> p{padded<A>(C), read_channels<A>(op, weight, C, 1), read_channels<A>(op, bias, C, 0)};
  for (int64_t c = 0; c < C; ++c) {
    p.mean[c] = moments[c];
    p.scale[c] /= std::sqrt(moments[C + c] + static_cast<A>(eps));
  }
  return p;
}

}  // namespace
}  // namespace recontrast
