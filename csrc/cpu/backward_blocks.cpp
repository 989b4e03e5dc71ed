// SPDX-License-Identifier: BSD-3-Clause
#include "backward_blocks.h"

#include <algorithm>

#include "../common/integers.h"
#include "packing.h"
#include "passes.h"

namespace segpose {
namespace {

// What a block reads and writes, beside which 2 MB of L2 keep the filters and stages.
constexpr int64_t kBlockBytes = 512 << 10;
// Fewer blocks would leave threads idle.
constexpr int64_t kLeastBlocks = 8;
// Every block has a gradient of the filter of its own.
constexpr int64_t kMostFilterValues = 8 << 10;
// A smaller layer stays in the cache anyhow.
constexpr int64_t kLeastBytes = 512 << 10;
// Values that one thread adds before another has woken up.
constexpr int64_t kSerialValues = 64 << 10;

int64_t image_bytes(const TensorView& view) { return view.c * view.h * view.w * dtype_size(view.dtype); }

int64_t bytes_of_image(const LayerBackward& layer) {
  int64_t bytes = image_bytes(layer.grad.view);
  if (layer.grad.mask != nullptr) bytes += 2 * image_bytes(layer.grad.view);
  bytes += image_bytes(layer.input);
  if (layer.grad_input.data != nullptr) bytes += image_bytes(layer.grad_input);
  return bytes;
}

int64_t filter_values(const ConvProblem& problem) { return problem.k * problem.c_per_group() * problem.taps(); }

TensorView images_of(TensorView view, int64_t first, int64_t count) {
  if (view.data == nullptr) return view;
  view.data = static_cast<char*>(view.data) + first * view.stride_n * dtype_size(view.dtype);
  view.n = count;
  return view;
}

// [filter][tap][channel], in the compute type.
FilterView partial_view(const ConvProblem& problem, DType dtype, void* data) {
  const int64_t channels = problem.c_per_group();
  return {data, dtype, problem.taps() * channels, 1, problem.s * channels, channels};
}

// One block: the views of its images, and its passes.
struct Block {
  MaskedSource grad;
  SourceMask mask{};
  TensorView input, grad_input;
  bool copies;  // the gradient, masked or in the compute type

  Block(const LayerBackward& layer, int64_t first, int64_t count)
      : grad{images_of(layer.grad.view, first, count), nullptr},
        input(images_of(layer.input, first, count)),
        grad_input(images_of(layer.grad_input, first, count)),
        copies(!layer.grad.in_place(compute_dtype_of(layer.grad.view.dtype))) {
    if (layer.grad.mask == nullptr) return;
    mask = *layer.grad.mask;
    mask.output = images_of(mask.output, first, count);
    grad.mask = &mask;
  }
  Block(const Block&) = delete;

  TensorView masked(void* data) const {
    const TensorView& view = grad.view;
    return nhwc_view(data, view.dtype, view.n, view.c, view.h, view.w);
  }
  int64_t masked_bytes() const { return copies ? grad.view.n * image_bytes(grad.view) : 0; }
  MaskedSource source(void* masked_data) const { return copies ? MaskedSource{masked(masked_data), nullptr} : grad; }

  GradientPass gradient_pass(Isa isa, void* masked_data, void* bias) const {
    return {grad, isa, masked(copies ? masked_data : nullptr), bias};
  }
  GatherPass gather_pass(const LayerBackward& layer, const Plan& plan, void* masked_data, const void* packed) const {
    return {&plan, source(masked_data), layer.filter, packed, nullptr, 0, grad_input, {Activation::none, 1.0}};
  }
  WgradPass wgrad_pass(const LayerBackward& layer, const Plan& plan, void* masked_data, FilterView partial) const {
    const MaskedSource activation{input, nullptr};
    if (layer.transposed) return {&plan, activation, source(masked_data), partial};
    return {&plan, source(masked_data), activation, partial};
  }
};

// Every block has filter and bias sums of its own, every worker a masked gradient and room for one pass.
template <class T>
struct Buffers {
  char* packed;
  char* packing;
  T* filters;
  T* biases;
  char* masked;
  char* passes;
  int64_t masked_bytes, pass_bytes = 0;

  Buffers(const BlockwiseBackward& backward, int64_t workers, Arena& arena) {
    const LayerBackward& layer = *backward.layer;
    const int64_t blocks = ceil_div(layer.problem.n, backward.images);
    const bool by_input = backward.plans.input != nullptr;
    packed = by_input ? arena.take<char>(packed_filter_bytes(*backward.plans.input)) : nullptr;
    packing = by_input ? arena.take<char>(pack_workspace(*backward.plans.input, workers)) : nullptr;
    filters = arena.take<T>(blocks * filter_values(layer.problem));
    biases = arena.take<T>(blocks * layer.grad.view.c);
    const Block whole(layer, 0, backward.images);
    masked_bytes = round_up(whole.masked_bytes(), kLineBytes);
    count_passes(layer, whole, backward.plans, packed);
    const Block rest(layer, 0, rest_images(backward));
    count_passes(layer, rest, backward.last, nullptr);
    pass_bytes = round_up(pass_bytes, kLineBytes);
    masked = arena.take<char>(workers * masked_bytes);
    passes = arena.take<char>(workers * pass_bytes);
  }

  static int64_t rest_images(const BlockwiseBackward& backward) {
    return backward.layer->problem.n - (blocks_of(backward) - 1) * backward.images;
  }
  static int64_t blocks_of(const BlockwiseBackward& backward) {
    return ceil_div(backward.layer->problem.n, backward.images);
  }

 private:
  void count_passes(const LayerBackward& layer, const Block& block, const BlockPlans& plans, const void* filter) {
    const auto needs = [&](int64_t bytes) { pass_bytes = std::max(pass_bytes, bytes); };
    needs(gradient_workspace(block.gradient_pass(selected_isa(), nullptr, layer.grad_bias), 1));
    if (plans.input != nullptr) needs(gather_workspace(block.gather_pass(layer, *plans.input, nullptr, filter), 1));
    if (plans.weight != nullptr) needs(wgrad_workspace(block.wgrad_pass(layer, *plans.weight, nullptr, {}), 1));
  }
};

template <class T>
void run_blocks(const BlockwiseBackward& backward, void* workspace, const Executor& executor) {
  const LayerBackward& layer = *backward.layer;
  const ConvProblem& problem = layer.problem;
  Arena arena(workspace);
  const Buffers<T> buffers(backward, executor.workers, arena);
  const int64_t blocks = buffers.blocks_of(backward);
  const int64_t values = filter_values(problem);
  const int64_t channels = layer.grad.view.c;
  const Executor serial{1, nullptr};
  if (backward.plans.input != nullptr) {
    pack_pass_filter(*backward.plans.input, layer.filter, buffers.packed, buffers.packing, executor);
  }
  for_each_task(executor, blocks, [&](int64_t task, int64_t worker) {
    const int64_t first = task * backward.images;
    const bool rest = problem.n - first < backward.images;
    const Block block(layer, first, rest ? problem.n - first : backward.images);
    const BlockPlans& plans = rest ? backward.last : backward.plans;
    void* const masked = buffers.masked + worker * buffers.masked_bytes;
    void* const scratch = buffers.passes + worker * buffers.pass_bytes;
    T* const bias = layer.grad_bias == nullptr ? nullptr : buffers.biases + task * channels;
    if (block.copies || bias != nullptr) {
      run_gradient_pass(block.gradient_pass(selected_isa(), masked, bias), scratch, serial);
    }
    if (plans.input != nullptr) {
      const bool shared = !rest || same_packing(*plans.input, *backward.plans.input);
      run_gather_pass(block.gather_pass(layer, *plans.input, masked, shared ? buffers.packed : nullptr), scratch,
                      serial);
    }
    if (plans.weight != nullptr) {
      const FilterView partial = partial_view(problem, compute_dtype<T>(), buffers.filters + task * values);
      run_wgrad_pass(block.wgrad_pass(layer, *plans.weight, masked, partial), scratch, serial);
    }
  });
  if (layer.grad_bias != nullptr) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += static_cast<double>(buffers.biases[b * channels + c]);
      store_element(layer.grad_bias, layer.grad.view.dtype, c, sum);
    }
  }
  if (backward.plans.weight == nullptr) return;
  const int64_t filter = values / problem.k;
  for_each_task(blocks * values < kSerialValues ? serial : executor, problem.k, [&](int64_t k, int64_t) {
    // Into the first block's, which is read only here.
    T* const sums = buffers.filters + k * filter;
    for (int64_t b = 1; b < blocks; ++b) {
      const T* const partial = sums + b * values;
      for (int64_t i = 0; i < filter; ++i) sums[i] += partial[i];
    }
    scatter_filter(layer.grad_filter, k * layer.grad_filter.stride_k, problem, sums);
  });
}

template <class Fn>
auto dispatch(DType dtype, const Fn& fn) {
  return dtype == DType::float64 ? fn(double{}) : fn(float{});
}

}  // namespace

int64_t block_images(const LayerBackward& layer) {
  const ConvProblem& problem = layer.problem;
  const DType dtype = layer.grad.view.dtype;
  const bool worth =
      layer.grad_filter.data != nullptr && (layer.grad_input.data != nullptr || layer.grad.mask != nullptr);
  if (!worth || dtype != compute_dtype_of(dtype) || problem.groups > 1 || problem.n < kLeastBlocks) return 0;
  if (filter_values(problem) > kMostFilterValues || problem.n * bytes_of_image(layer) < kLeastBytes) return 0;
  const int64_t most = std::min(problem.n / kLeastBlocks, kBlockBytes / bytes_of_image(layer));
  return ceil_div(problem.n, ceil_div(problem.n, std::max<int64_t>(most, 1)));
}

bool can_run_in_blocks(const BlockPlans& plans) {
  return (plans.input == nullptr || !plans.input->transforms()) &&
         (plans.weight == nullptr || !plans.weight->packs_source());
}

int64_t blockwise_workspace(const BlockwiseBackward& backward, int64_t workers) {
  return dispatch(backward.layer->grad.view.dtype, [&](auto zero) {
    Arena arena(nullptr);
    const Buffers<decltype(zero)> buffers(backward, workers, arena);
    return arena.used();
  });
}

void run_blockwise_backward(const BlockwiseBackward& backward, void* workspace, const Executor& executor) {
  dispatch(backward.layer->grad.view.dtype,
           [&](auto zero) { run_blocks<decltype(zero)>(backward, workspace, executor); });
}

}  // namespace segpose
