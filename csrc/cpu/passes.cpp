// SPDX-License-Identifier: BSD-3-Clause
#include "passes.h"

#include <algorithm>

#include "igemm.h"
#include "packing.h"
#include "split_conv.h"
#include "split_wgrad.h"
#include "staging.h"
#include "wgrad.h"
#include "winograd.h"

namespace segpose {
namespace {

// Calls fn with a value of the compute type.
template <class Fn>
auto dispatch_compute(DType dtype, const Fn& fn) {
  return dtype == DType::float64 ? fn(double{}) : fn(float{});
}

int64_t elements(const TensorView& view) { return view.n * view.c * view.h * view.w; }

template <class T>
TensorView staged_view(const TensorView& source, T* data) {
  return nhwc_view(data, compute_dtype<T>(), source.n, source.c, source.h, source.w);
}

// The pieces of a pass's workspace; measuring and using share this one description.
struct SplitBuffers {
  char* packed;
  float* bias;
  char* scratch;

  SplitBuffers(const GatherPass& pass, const SplitFilter& layout, int64_t workers, Arena& arena) {
    packed = arena.take<char>(layout.size());
    bias = pass.bias == nullptr ? nullptr : arena.take<float>(split_bias_size(*pass.plan));
    scratch = arena.take<char>(workers * split_scratch(*pass.plan, pass.source));
  }
};

void run_split(const GatherPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const SplitFilter layout(plan);
  Arena arena(workspace);
  const SplitBuffers buffers(pass, layout, executor.workers, arena);
  pack_split_filter(plan, layout, pass.filter, buffers.packed, executor);
  if (pass.bias != nullptr) pack_split_bias(plan, pass.bias, pass.filter.dtype, pass.bias_stride, buffers.bias);
  launch_split({&plan, &layout, pass.source, pass.destination, buffers.packed, buffers.bias, buffers.scratch,
                pass.epilogue},
               executor);
}

template <class T>
struct GatherBuffers {
  T* source;
  T* packed;
  T* bias;
  T* zeros;
  char* scratch;

  GatherBuffers(const GatherPass& pass, const PackedFilter& layout, int64_t workers, Arena& arena) {
    const TensorView& view = pass.source.view;
    source = pass.source.in_place(compute_dtype<T>()) ? nullptr : arena.take<T>(elements(view));
    const bool winograd = pass.plan->algorithm == Algorithm::winograd;
    packed = arena.take<T>(winograd ? winograd_filter_size(*pass.plan) : layout.size());
    bias = pass.bias == nullptr ? nullptr : arena.take<T>(pass.plan->padded_columns() * pass.plan->gemm_groups());
    zeros = arena.take<T>(view.c);
    scratch = arena.take<char>(workers * (winograd ? winograd_scratch<T>(*pass.plan) : gather_scratch<T>(*pass.plan)));
  }
};

template <class T>
void run_gather(const GatherPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const PackedFilter layout(plan);
  Arena arena(workspace);
  const GatherBuffers<T> buffers(pass, layout, executor.workers, arena);
  TensorView source = pass.source.view;
  if (buffers.source != nullptr) {
    stage(ukernels<T>(plan.isa), pass.source, buffers.source, executor);
    source = staged_view(source, buffers.source);
  }
  if (pass.bias != nullptr) pack_bias(plan, pass.bias, pass.filter.dtype, pass.bias_stride, buffers.bias);
  std::fill_n(buffers.zeros, source.c, T{0});
  const GatherLaunch<T> launch{&plan,          &layout,
                               source,         pass.destination,
                               buffers.packed, pass.bias == nullptr ? nullptr : buffers.bias,
                               buffers.zeros,  buffers.scratch,
                               pass.epilogue};
  if (plan.algorithm == Algorithm::winograd) {
    launch_winograd(launch, pass.filter, buffers.packed, executor);
    return;
  }
  pack_filter(plan, layout, pass.filter, buffers.packed, executor);
  launch_gather(launch, executor);
}

template <class T>
bool activation_is_staged(const WgradPass& pass) {
  return !pass.activation.in_place(compute_dtype<T>()) || wgrad_reads_past<T>(*pass.plan) > 0;
}

template <class T>
struct WgradBuffers {
  T* grad;
  T* activation;
  T* partials;
  char* scratch;

  WgradBuffers(const WgradPass& pass, int64_t workers, Arena& arena) {
    grad = pass.grad.in_place(compute_dtype<T>()) ? nullptr : arena.take<T>(elements(pass.grad.view));
    activation = activation_is_staged<T>(pass)
                     ? arena.take<T>(elements(pass.activation.view) + wgrad_reads_past<T>(*pass.plan))
                     : nullptr;
    partials = arena.take<T>(wgrad_partials<T>(*pass.plan));
    scratch = arena.take<char>(workers * wgrad_scratch<T>(*pass.plan));
  }
};

template <class T>
void run_wgrad(const WgradPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const Ukernels<T>& kernels = ukernels<T>(plan.isa);
  Arena arena(workspace);
  const WgradBuffers<T> buffers(pass, executor.workers, arena);
  WgradLaunch<T> launch{&plan,           pass.grad.view,   pass.activation.view,
                        buffers.partials, buffers.scratch, pass.destination};
  if (buffers.grad != nullptr) {
    stage(kernels, pass.grad, buffers.grad, executor);
    launch.grad = staged_view(launch.grad, buffers.grad);
  }
  if (activation_is_staged<T>(pass)) {
    stage(kernels, pass.activation, buffers.activation, executor);
    std::fill_n(buffers.activation + elements(launch.activation), wgrad_reads_past<T>(plan), T{0});
    launch.activation = staged_view(launch.activation, buffers.activation);
  }
  launch_wgrad(launch, executor);
}

template <class T>
struct GradientBuffers {
  T* scratch;
  double* sums;

  GradientBuffers(const GradientPass& pass, int64_t workers, Arena& arena) {
    scratch = arena.take<T>(gradient_scratch<T>(pass.grad.view, workers));
    sums = pass.bias_grad == nullptr ? nullptr : arena.take<double>(pass.grad.view.c);
  }
};

template <class T>
void run_gradient(const GradientPass& pass, void* workspace, const Executor& executor) {
  Arena arena(workspace);
  const GradientBuffers<T> buffers(pass, executor.workers, arena);
  const GradientStage<T> request{pass.grad, pass.masked.as<T>(), buffers.sums};
  stage_gradient(ukernels<T>(pass.isa), request, buffers.scratch, executor);
  const TensorView& grad = pass.grad.view;
  for (int64_t c = 0; pass.bias_grad != nullptr && c < grad.c; ++c) {
    store_element(pass.bias_grad, grad.dtype, c, buffers.sums[c]);
  }
}

}  // namespace

int64_t gather_workspace(const GatherPass& pass, int64_t workers) {
  if (pass.plan->algorithm == Algorithm::split) {
    Arena arena(nullptr);
    SplitBuffers buffers(pass, SplitFilter(*pass.plan), workers, arena);
    return arena.used();
  }
  return dispatch_compute(pass.plan->dtype, [&](auto zero) {
    Arena arena(nullptr);
    GatherBuffers<decltype(zero)> buffers(pass, PackedFilter(*pass.plan), workers, arena);
    return arena.used();
  });
}

void run_gather_pass(const GatherPass& pass, void* workspace, const Executor& executor) {
  if (pass.plan->algorithm == Algorithm::split) return run_split(pass, workspace, executor);
  dispatch_compute(pass.plan->dtype, [&](auto zero) { run_gather<decltype(zero)>(pass, workspace, executor); });
}

int64_t wgrad_workspace(const WgradPass& pass, int64_t workers) {
  if (pass.plan->algorithm == Algorithm::split) return split_wgrad_workspace(pass, workers);
  return dispatch_compute(pass.plan->dtype, [&](auto zero) {
    Arena arena(nullptr);
    WgradBuffers<decltype(zero)> buffers(pass, workers, arena);
    return arena.used();
  });
}

void run_wgrad_pass(const WgradPass& pass, void* workspace, const Executor& executor) {
  if (pass.plan->algorithm == Algorithm::split) return run_split_wgrad(pass, workspace, executor);
  dispatch_compute(pass.plan->dtype, [&](auto zero) { run_wgrad<decltype(zero)>(pass, workspace, executor); });
}

int64_t gradient_workspace(const GradientPass& pass, int64_t workers) {
  return dispatch_compute(pass.grad.view.dtype, [&](auto zero) {
    Arena arena(nullptr);
    GradientBuffers<decltype(zero)> buffers(pass, workers, arena);
    return arena.used();
  });
}

void run_gradient_pass(const GradientPass& pass, void* workspace, const Executor& executor) {
  dispatch_compute(pass.grad.view.dtype, [&](auto zero) { run_gradient<decltype(zero)>(pass, workspace, executor); });
}

}  // namespace segpose
