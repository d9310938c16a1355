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

// Features (N, C, P) as blocks of rows. Channels last: rows are positions, a tile holds all channels of some of them,
// and a task is a range of positions of all images. NCHW: a tile is one row, positions of one channel of an image, and
// a task is a channel.
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
      tasks = C;
    }
  }
  int64_t values() const { return N * P; }  // of each channel
  int64_t values_of(int64_t task) const {
    return per_lane ? values() * (task + 1) / tasks - values() * task / tasks : values();
  }
  // Sums of a task: one for each channel, padded to whole vectors, or one alone.
  int64_t width() const { return per_lane ? (C + kMostLanes - 1) / kMostLanes * kMostLanes : 1; }

  // Calls body(first channel, image, first position, rows, numbers of a row) for each tile of a task in turn. A tile
  // ends with its image, because the images of a slice are not adjacent.
  template <typename Body>
  void for_tiles(int64_t task, bool backwards, const Body& body) const {
    const int64_t from = per_lane ? values() * task / tasks : 0, to = from + values_of(task);
    const auto call = [&](int64_t begin, int64_t end) {
      if (per_lane)
        body(0, begin / P, begin % P, end - begin, C);
      else
        body(task, begin / P, begin % P, 1, end - begin);
    };
    if (backwards) {
      for (int64_t end = to, begin; end > from; end = begin)
        call(begin = std::max({end - tile, from, (end - 1) / P * P}), end);
    } else {
      for (int64_t begin = from, end; begin < to; begin = end)
        call(begin, end = std::min({begin + tile, to, (begin / P + 1) * P}));
    }
  }

  // Runs first(task), then finish(first channel, end of channels), then second(task) where it is wanted: on all tasks
  // one after the other, in the second pass from the last one on; but task by task where each has channels of its own,
  // which then may still be in the L2 cache.
  template <typename First, typename Finish, typename Second>
  void run(const First& first, const Finish& finish, const Second& second) const {
    if (per_lane) {
      parallel(false, first);
      finish(0, C);
      parallel(true, second);
    } else {
      parallel(false, [&](int64_t task) {
        first(task);
        finish(task, task + 1);
        second(task);
      });
    }
  }

  // Calls body(task) for all tasks, each thread from its last task to its first if `backwards`.
  template <typename Body>
  void parallel(bool backwards, const Body& body) const {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i);
      fence_nontemporal();
    });
  }
};

// Tensors of one call, whose pointers to a tile `at` computes.
template <typename T>
struct View {
  T* data = nullptr;
  Strides strides{};
  View() = default;
  View(const Tensor& t, T* pointer) : data(pointer), strides(strides_of(t)) {}

  T* tile(int64_t channel, int64_t image, int64_t position) const {
    return data ? data + image * strides.n + channel * strides.c + position * strides.p : nullptr;
  }
};
// The dtype of tensors whose numbers are read as T.
template <typename T>
using Stored = std::conditional_t<kIsBFloat16<T>, torch::headeronly::BFloat16, T>;

template <typename T>
View<const T> view_of(const Tensor& t) {
  return View<const T>(t, reinterpret_cast<const T*>(t.const_data_ptr<Stored<T>>()));
}
template <typename T>
View<const T> view_of(const std::optional<Tensor>& t) {
  return t ? view_of<T>(*t) : View<const T>();
}
template <typename T>
View<T> output_of(Tensor& t) {
  return View<T>(t, reinterpret_cast<T*>(t.mutable_data_ptr<Stored<T>>()));
}
template <typename T>
View<T> output_of(std::optional<Tensor>& t) {
  return t ? output_of<T>(*t) : View<T>();
}

// Like dispatch, but with NativeBFloat16 where the processor has it.
template <typename F>
void dispatch_native(const char* op, ScalarType type, const F& f) {
#ifdef NATIVE_BFLOAT16
  if (type == ScalarType::BFloat16 && has_native_bfloat16()) return f(NativeBFloat16{});
#endif
  dispatch(op, type, f);
}

// ---- parameters -------------------------------------------------------------------------------------------------

template <typename A>
using Channels = std::vector<A>;  // [C], padded with zeros to whole vectors

template <typename A>
Channels<A> padded(int64_t C) {
  return Channels<A>((C + kMostLanes - 1) / kMostLanes * kMostLanes);
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

// Where the number of channel c is in arrays that the loops read: in channels_last whole vectors of channels.
template <typename T>
int64_t place_in(const Plan& plan, int64_t c) {
  return plan.per_lane ? place_of<T>(c) : c;
}

template <typename T>
struct Parameters {
  using A = Acc<T>;
  Channels<A> mean, scale, bias;  // in the order of place_in

  Parameters(const char* op, const Plan& plan, const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_)
      : mean(padded<A>(plan.C)), scale(mean), bias(mean) {
    const Channels<A> weights = read_channels<A>(op, weight_, plan.C, 1),
                      biases = read_channels<A>(op, bias_, plan.C, 0);
    for (int64_t c = 0; c < plan.C; ++c) {
      scale[place_in<T>(plan, c)] = weights[c];
      bias[place_in<T>(plan, c)] = biases[c];
    }
  }

  // Takes the moments [2, C] of these channels, once.
  void set_moments(const Plan& plan, const A* moments, double eps, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t place = place_in<T>(plan, c);
      mean[place] = moments[c];
      scale[place] /= std::sqrt(moments[plan.C + c] + static_cast<A>(eps));
    }
  }

  Affine<A> at(int64_t c) const { return {mean.data() + c, scale.data() + c, bias.data() + c}; }
};

}  // namespace
}  // namespace recontrast
