// norm_act on the GPU; recontrast/reference.py defines it.
//
// Forward is three launches: moments_part, prepare (merges the parts; parameters of the channels) and apply; in eval
// mode without the first. Backward is prepare, sums_part, combine_sums and, in training mode, gradient. Parts are
// merged in float64 in a fixed order, so results are reproducible bit by bit.

#include "norm_act.cuh"

namespace recontrast {
namespace {

constexpr int kLanes = 32;                  // channels of a block in the small kernels
constexpr int kSlices = kThreads / kLanes;  // of the parts of a channel, which threads merge side by side
constexpr int kBlocks = 4;                  // of a reduction, for each multiprocessor
constexpr int kMaxParts = 65535;            // second dimension of a grid

// Numbers (C,) of any dtype.
struct ChannelNumbers {
  const void* data;  // null: absent
  ScalarType type;
  int64_t step;

  ChannelNumbers() : data(nullptr), type(ScalarType::Float), step(0) {}
  ChannelNumbers(const std::optional<Tensor>& t) : ChannelNumbers() {
    if (t) *this = ChannelNumbers(*t, t->const_data_ptr(), t->stride(0));
  }
  ChannelNumbers(const Tensor& t, const void* data, int64_t step) : data(data), type(t.scalar_type()), step(step) {}

  __device__ double get(unsigned c, double otherwise) const {
    if (!data) return otherwise;
    const int64_t i = c * step;
    if (type == ScalarType::Double) return static_cast<const double*>(data)[i];
    if (type == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (type == ScalarType::Half) return static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[i]);
    return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[i]);
  }
};

struct Parts {
  unsigned count;     // 0: the moments are given
  double share, all;  // values of each part but the last, and of all
  __device__ double values(unsigned part) const { return min(share, all - part * share); }
};

// Moments of each channel, merged from the parts or given, and its parameters.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    prepare(const A* __restrict__ found, Parts parts, unsigned C,  // [parts][2][C]
            ChannelNumbers mean_, ChannelNumbers var_, ChannelNumbers weight, ChannelNumbers bias, double eps,
            A* __restrict__ moments, A* __restrict__ affine) {  // (2, C), (3, C)
  __shared__ double shared[3][kThreads];
  const unsigned slice = threadIdx.x / kLanes, c = blockIdx.x * kLanes + threadIdx.x % kLanes;
  double count = 0, mean = 0, squares = 0;
  const auto merge = [&](double n, double m, double s) {
    if (n == 0) return;
    const double delta = m - mean, share = n / (count + n);
    mean += delta * share;
    squares += s + delta * delta * count * share;
    count += n;
  };
  if (c < C)
    for (unsigned i = slice; i < parts.count; i += kSlices) {
      const A* part = found + static_cast<int64_t>(i) * 2 * C + c;
      merge(parts.values(i), part[0], part[C]);
    }
  shared[0][threadIdx.x] = count;
  shared[1][threadIdx.x] = mean;
  shared[2][threadIdx.x] = squares;
  __syncthreads();
  if (slice || c >= C) return;
  for (unsigned t = threadIdx.x + kLanes; t < kThreads; t += kLanes) merge(shared[0][t], shared[1][t], shared[2][t]);
  const A m = static_cast<A>(parts.count ? mean : mean_.get(c, 0));
  const A var = static_cast<A>(parts.count ? squares / count : var_.get(c, 0));
  moments[c] = m;
  moments[C + c] = var;
  affine[c] = m;
  affine[C + c] = static_cast<A>(weight.get(c, 1) / sqrt(static_cast<double>(var) + eps));
  affine[2 * C + c] = static_cast<A>(bias.get(c, 0));
}

// Gradients in bias and weight, and what the second pass of backward subtracts.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    combine_sums(const A* __restrict__ found, Parts parts, unsigned C, const A* __restrict__ moments,
                 const A* __restrict__ affine, double eps, A* __restrict__ sums, A* __restrict__ slopes) {  // (2, C)
  __shared__ double shared[2][kThreads];
  const unsigned slice = threadIdx.x / kLanes, c = blockIdx.x * kLanes + threadIdx.x % kLanes;
  double sum = 0, dot = 0;
  if (c < C)
    for (unsigned i = slice; i < parts.count; i += kSlices) {
      const A* part = found + static_cast<int64_t>(i) * 2 * C + c;
      sum += part[0];
      dot += part[C];
    }
  shared[0][threadIdx.x] = sum;
  shared[1][threadIdx.x] = dot;
  __syncthreads();
  if (slice || c >= C) return;
  for (unsigned t = threadIdx.x + kLanes; t < kThreads; t += kLanes) {
    sum += shared[0][t];
    dot += shared[1][t];
  }
  const double var = static_cast<double>(moments[C + c]) + eps, scale = affine[C + c];
  sums[c] = static_cast<A>(sum);
  sums[C + c] = static_cast<A>(dot / sqrt(var));
  slopes[c] = static_cast<A>(scale * dot / parts.all / var);
  slopes[C + c] = static_cast<A>(scale * sum / parts.all);
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <typename T>
Features<T> features_of(const std::optional<Tensor>& t) {
  if (!t || t->numel() == 0) return {};
  const Strides s = strides_of(*t);
  return {static_cast<T*>(const_cast<void*>(t->const_data_ptr())), s.n, s.c, s.p};
}

// Whether vectors of V elements are aligned in all features.
template <typename T>
bool fits_vectors(const std::vector<Features<T>>& all, bool by_rows, int64_t C, int64_t P) {
  constexpr int64_t V = kVector<T>;
  bool fits = (by_rows ? C : P) % V == 0;
  for (const Features<T>& f : all)
    if (f.data)
      fits =
          fits && reinterpret_cast<uintptr_t>(f.data) % kBytes == 0 && f.n % V == 0 && (by_rows ? f.p : f.c) % V == 0;
  return fits;
}

unsigned round_up(int64_t n, int64_t to) { return static_cast<unsigned>((n + to - 1) / to * to); }

// The walk of a reduction, or of an elementwise kernel, and its grid.
struct Launch {
  Walk walk;
  dim3 grid;

  Launch(const FeatureSize& size, bool by_rows, int64_t V, bool reduces) : walk{by_rows, size.P, 0, 0, 1, 0} {
    const int64_t C = size.C;
    walk.C = static_cast<unsigned>(C);
    walk.rows = static_cast<unsigned>(by_rows ? size.count : size.count / V);
    if (by_rows)
      while (walk.lanes < kLanes && walk.lanes * V < C) walk.lanes *= 2;
    const int64_t columns = by_rows ? blocks(C, walk.lanes * V) : C, step = kThreads / walk.lanes;
    int64_t parts = std::max<int64_t>(walk.rows / (step * kInFlight), 1);
    if (reduces) parts = std::min(parts, blocks(kBlocks * processors(), columns) + int64_t{0});
    walk.share = round_up(blocks(walk.rows, std::min<int64_t>(parts, kMaxParts)), step);
    grid = dim3(static_cast<unsigned>(columns), blocks(walk.rows, walk.share));
  }
  Parts parts(int64_t V, const FeatureSize& size) const {
    return {grid.y, static_cast<double>(walk.share) * (walk.by_rows ? 1 : V), static_cast<double>(size.count)};
  }
};

Tensor scratch(const Tensor& x, int64_t rows) {
  return torch::stable::new_empty(x, std::array<int64_t, 2>{rows, x.size(1)}, acc_type(x));
}

template <typename T, int V>
void forward(const Tensor& x, const Tensor& y, const Features<T>& in, const Features<T>& residual,
             const Features<T>& out, Act act, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps, Acc<T>* moments) {
  using A = Acc<T>;
  const cudaStream_t stream = current_stream(x);
  const FeatureSize size = size_of("norm_act", x);
  const bool by_rows = is_along_channels(y);
  const Launch reduction(size, by_rows, V, true), elementwise(size, by_rows, V, false);
  Tensor affine = scratch(x, 3), found = scratch(x, mean ? 0 : 2 * reduction.grid.y);
  A* parts = found.mutable_data_ptr<A>();
  if (!mean) launch(moments_part<T, V>, reduction.grid, dim3(kThreads), stream, reduction.walk, in, parts);
  launch(prepare<A>, dim3(blocks(size.C, kLanes)), dim3(kThreads), stream, static_cast<const A*>(parts),
         mean ? Parts{} : reduction.parts(V, size), static_cast<unsigned>(size.C), ChannelNumbers(mean),
         ChannelNumbers(var), ChannelNumbers(weight), ChannelNumbers(bias), eps, moments, affine.mutable_data_ptr<A>());
  launch(apply<T, V>, elementwise.grid, dim3(kThreads), stream, elementwise.walk, in, residual, out,
         static_cast<const A*>(affine.mutable_data_ptr<A>()), act);
}

std::tuple<Tensor, Tensor> norm_act(const Tensor& x_, std::optional<Tensor> residual, std::optional<Tensor> weight,
                                    std::optional<Tensor> bias, std::optional<Tensor> mean, std::optional<Tensor> var,
                                    std::string activation, double eps) {
  check_features("norm_act", x_, residual);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "norm_act: mean and var: wanted both or none");
  for (const auto* t : {&residual, &weight, &bias, &mean, &var})
    if (*t) check_device("norm_act", "each argument", **t, x_);
  for (const auto* t : {&weight, &bias, &mean, &var}) check_channels("norm_act", *t, x_.size(1));
  const Act act = act_of("norm_act", activation);
  const DeviceGuard guard(x_.get_device());
  std::optional<Tensor> result = torch::stable::empty_like(x_);  // in the layout of x
  Tensor y = walkable(*result);
  Tensor moments = torch::stable::new_zeros(x_, std::array<int64_t, 2>{2, x_.size(1)}, acc_type(x_));
  if (x_.numel() == 0) {
    for (int i = 0; i < 2 && mean; ++i) {
      Tensor row = torch::stable::select(moments, 0, i);
      torch::stable::copy_(row, i ? *var : *mean);
    }
    return {*result, moments};
  }
  const Tensor x = in_order_of(y, x_);
  if (residual) residual = in_order_of(y, *residual);
  dispatch("norm_act", x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const Features<T> in = features_of<T>(x), other = features_of<T>(residual), out = features_of<T>(y);
    Acc<T>* to = moments.mutable_data_ptr<Acc<T>>();
    const bool fits = fits_vectors<T>({in, other, out}, is_along_channels(y), x.size(1), x.size(2) * x.size(3));
    const auto run = fits ? forward<T, kVector<T>> : forward<T, 1>;
    run(x, y, in, other, out, act, weight, bias, mean, var, eps, to);
  });
  deliver(result, y);
  return {*result, moments};
}

template <typename T, int V>
void backward(const Tensor& x, BackwardFeatures<T> f, bool by_rows, Act act, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, const Tensor& moments, bool training, double eps, Acc<T>* sums) {
  using A = Acc<T>;
  const cudaStream_t stream = current_stream(x);
  const FeatureSize size = size_of("norm_act_backward", x);
  const Launch reduction(size, by_rows, V, true), elementwise(size, by_rows, V, false);
  const unsigned C = static_cast<unsigned>(size.C);
  const dim3 small(blocks(C, kLanes)), block(kThreads);
  Tensor affine_ = scratch(x, 3), copy = scratch(x, 2), slopes_ = scratch(x, 2),
         parts = scratch(x, 2 * reduction.grid.y);
  A *affine = affine_.mutable_data_ptr<A>(), *slopes = slopes_.mutable_data_ptr<A>(),
    *read = copy.mutable_data_ptr<A>();
  const A* given = moments.const_data_ptr<A>();
  launch(prepare<A>, small, block, stream, given, Parts{}, C, ChannelNumbers(moments, given, 1),
         ChannelNumbers(moments, given + C, 1), ChannelNumbers(weight), ChannelNumbers(bias), eps, read, affine);
  const Features<T> dx = f.dx;
  const bool writes_residual = f.masked.data;
  if (training) f.dx = {};
  if (training && dx.data && act == Act::gelu && !writes_residual) f.masked = dx;  // until the second pass
  launch(sums_part<T, V>, reduction.grid, block, stream, reduction.walk, f, static_cast<const A*>(affine), act,
         parts.mutable_data_ptr<A>());
  launch(combine_sums<A>, small, block, stream, static_cast<const A*>(parts.mutable_data_ptr<A>()),
         reduction.parts(V, size), C, given, static_cast<const A*>(affine), eps, sums, slopes);
  if (!training || !dx.data) return;
  if (f.masked.data) {  // the masked gradient is in memory
    f.grad = f.masked;
    act = Act::none;
  }
  f.dx = dx;
  launch(gradient<T, V>, elementwise.grid, block, stream, elementwise.walk, f, static_cast<const A*>(affine),
         static_cast<const A*>(slopes), act);
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_, const Tensor& x_, std::optional<Tensor> kept,
                                                     std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                     const Tensor& moments_, bool training, std::string activation,
                                                     double eps, bool wants_x) {
  check_features("norm_act_backward", x_, grad_);
  check_features("norm_act_backward", x_, kept);
  check_moments("norm_act_backward", moments_, x_);
  for (const auto* t : {&kept, &weight, &bias})
    if (*t) check_device("norm_act_backward", "each argument", **t, x_);
  for (const auto* t : {&weight, &bias}) check_channels("norm_act_backward", *t, x_.size(1));
  check_device("norm_act_backward", "grad", grad_, x_);
  const Act act = act_of("norm_act_backward", activation);
  const DeviceGuard guard(x_.get_device());
  const Tensor moments = torch::stable::contiguous(moments_), layout = walkable(torch::stable::empty_like(x_));
  std::optional<Tensor> dx, residual;
  if (wants_x) dx = torch::stable::empty_like(x_);
  if (kept && act != Act::none) residual = torch::stable::empty_like(x_);
  std::optional<Tensor> dx_out, residual_out;
  if (dx) dx_out = walkable(*dx);
  if (residual) residual_out = walkable(*residual);
  Tensor sums = torch::stable::new_zeros(x_, std::array<int64_t, 2>{2, x_.size(1)}, acc_type(x_));
  if (x_.numel()) {
    const Tensor grad = in_order_of(layout, grad_), x = in_order_of(layout, x_);
    if (kept) kept = in_order_of(layout, *kept);
    dispatch("norm_act_backward", x.scalar_type(), [&](auto number) {
      using T = decltype(number);
      const bool by_rows = is_along_channels(layout);
      const BackwardFeatures<T> f{features_of<T>(grad), features_of<T>(x), features_of<T>(kept),
                                  features_of<T>(residual_out), features_of<T>(dx_out)};
      const bool fits =
          fits_vectors<T>({f.grad, f.x, f.kept, f.masked, f.dx}, by_rows, x.size(1), x.size(2) * x.size(3));
      const auto run = fits ? backward<T, kVector<T>> : backward<T, 1>;
      run(x, f, by_rows, act, weight, bias, moments, training, eps, sums.mutable_data_ptr<Acc<T>>());
    });
  }
  deliver(dx, dx_out);
  deliver(residual, residual_out);
  return {or_empty(dx, x_), or_empty(residual, x_), sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recontrast, CUDA, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}

}  // namespace recontrast
