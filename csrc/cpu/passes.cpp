// SPDX-License-Identifier: BSD-3-Clause
#include "passes.h"

#include <algorithm>
#include <tuple>

#include "depthwise.h"
#include "depthwise_blocks.h"
#include "formats.h"
#include "igemm.h"
#include "packing.h"
#include "planar.h"
#include "planar_wgrad.h"
#include "rows_conv.h"
#include "split_conv.h"
#include "split_wgrad.h"
#include "staging.h"
#include "transform_conv.h"
#include "transform_wgrad.h"
#include "wgrad.h"

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

// The pieces of a pass's workspace; measuring and using share this one description. The filter is packed here unless
// the pass brings it.
struct GatherCommon {
  char* packed;
  char* packing;

  GatherCommon(const GatherPass& pass, int64_t workers, Arena& arena) : packed(nullptr), packing(nullptr) {
    if (pass.packed != nullptr) return;
    packed = arena.take<char>(packed_filter_bytes(*pass.plan));
    packing = arena.take<char>(pack_workspace(*pass.plan, workers));
  }

  const void* filter(const GatherPass& pass, const Executor& executor) const {
    if (pass.packed != nullptr) return pass.packed;
    pack_pass_filter(*pass.plan, pass.filter, packed, packing, executor);
    return packed;
  }
};

// Of the algorithms that pack their source.
struct PackedBuffers {
  GatherCommon common;
  float* bias;
  char* scratch;

  PackedBuffers(const GatherPass& pass, int64_t workers, Arena& arena) : common(pass, workers, arena) {
    const Plan& plan = *pass.plan;
    bias = pass.bias == nullptr ? nullptr : arena.take<float>(plan.problem.groups * plan.padded_columns());
    scratch = arena.take<char>(plan.algorithm == Algorithm::split ? workers * split_scratch(plan, pass.source)
                                                                  : transform_scratch(plan, pass.source, workers));
  }
};

void run_packed(const GatherPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  Arena arena(workspace);
  const PackedBuffers buffers(pass, executor.workers, arena);
  const auto* filter = static_cast<const char*>(buffers.common.filter(pass, executor));
  if (pass.bias != nullptr) {
    pack_bias(pass.bias, pass.filter.dtype, pass.bias_stride, plan.problem.groups, plan.columns(),
              plan.padded_columns(), buffers.bias);
  }
  if (plan.algorithm == Algorithm::split) {
    const SplitFilter layout(plan);
    launch_split({&plan, &layout, pass.source, pass.destination, filter, buffers.bias, buffers.scratch, pass.epilogue},
                 executor);
  } else {
    const TransformFilter layout(plan);
    launch_transform(
        {&plan, &layout, pass.source, pass.destination, filter, buffers.bias, buffers.scratch, pass.epilogue},
        executor);
  }
}

// How a fprop or dgrad without transforms runs.
enum class Way { planar, blocks, depthwise, gather };

template <class T>
Way way_of(const GatherPass& pass) {
  const Plan& plan = *pass.plan;
  if (runs_planar<T>(plan, pass.source, pass.destination)) return Way::planar;
  if (plan.algorithm != Algorithm::depthwise) return Way::gather;
  return runs_in_blocks<T>(plan, pass.source.view, pass.destination) ? Way::blocks : Way::depthwise;
}

template <class T>
struct GatherBuffers {
  GatherCommon common;
  Way way;
  T* source;
  T* bias;
  T* zeros;
  char* scratch;

  GatherBuffers(const GatherPass& pass, int64_t workers, Arena& arena)
      : common(pass, workers, arena), way(way_of<T>(pass)) {
    const TensorView& view = pass.source.view;
    source = way == Way::planar || pass.source.in_place(compute_dtype<T>()) ? nullptr : arena.take<T>(elements(view));
    bias = pass.bias == nullptr ? nullptr : arena.take<T>(pass.plan->padded_columns() * pass.plan->gemm_groups());
    zeros = arena.take<T>(view.c);
    scratch = arena.take<char>(workers * worker_scratch(pass));
  }

 private:
  int64_t worker_scratch(const GatherPass& pass) const {
    const Plan& plan = *pass.plan;
    switch (way) {
      case Way::planar:
        return planar_scratch<T>(plan, pass.source.view, pass.destination);
      case Way::blocks:
        return blocks_scratch<T>(plan);
      case Way::depthwise:
        return depthwise_scratch<T>(plan);
      case Way::gather:
        return gather_scratch<T>(plan);
    }
    return 0;
  }
};

template <class T>
void run_gather(const GatherPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const PackedFilter layout(plan);
  Arena arena(workspace);
  const GatherBuffers<T> buffers(pass, executor.workers, arena);
  const auto* filter = static_cast<const T*>(buffers.common.filter(pass, executor));
  TensorView source = pass.source.view;
  if (buffers.source != nullptr) {
    stage(ukernels<T>(plan.isa), pass.source, buffers.source, executor);
    source = staged_view(source, buffers.source);
  }
  if (pass.bias != nullptr) {
    pack_bias(pass.bias, pass.filter.dtype, pass.bias_stride, plan.gemm_groups(), plan.columns(), plan.padded_columns(),
              buffers.bias);
  }
  std::fill_n(buffers.zeros, source.c, T{0});
  const GatherLaunch<T> launch{&plan,        &layout,       source,          pass.destination, filter,
                               buffers.bias, buffers.zeros, buffers.scratch, pass.epilogue};
  switch (buffers.way) {
    case Way::planar:
      return launch_planar(launch, executor);
    case Way::blocks:
      return launch_blocks(launch, executor);
    case Way::depthwise:
      return launch_depthwise(launch, executor);
    case Way::gather:
      return launch_gather(launch, executor);
  }
}

template <class T>
struct RowsBuffers {
  GatherCommon common;
  T* bias;
  char* scratch;

  RowsBuffers(const GatherPass& pass, int64_t workers, Arena& arena) : common(pass, workers, arena) {
    bias = pass.bias == nullptr ? nullptr : arena.take<T>(pass.plan->padded_columns() * pass.plan->gemm_groups());
    scratch = arena.take<char>(workers * rows_scratch<T>(*pass.plan, pass.source));
  }
};

template <class T>
void run_rows(const GatherPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const PackedFilter layout(plan);
  Arena arena(workspace);
  const RowsBuffers<T> buffers(pass, executor.workers, arena);
  const auto* filter = static_cast<const T*>(buffers.common.filter(pass, executor));
  if (pass.bias != nullptr) {
    pack_bias(pass.bias, pass.filter.dtype, pass.bias_stride, plan.gemm_groups(), plan.columns(), plan.padded_columns(),
              buffers.bias);
  }
  launch_rows<T>({&plan, &layout, pass.source, pass.destination, filter, buffers.bias, buffers.scratch, pass.epilogue},
                 executor);
}

template <class T>
bool runs_rows(const GatherPass& pass) {
  return pass.plan->algorithm == Algorithm::rows && !runs_planar<T>(*pass.plan, pass.source, pass.destination);
}

int64_t direct_workspace(const GatherPass& pass, int64_t workers) {
  Arena arena(nullptr);
  if (pass.plan->packs_source()) {
    const PackedBuffers buffers(pass, workers, arena);
    return arena.used();
  }
  return dispatch_compute(pass.plan->dtype, [&](auto zero) {
    if (runs_rows<decltype(zero)>(pass)) {
      const RowsBuffers<decltype(zero)> buffers(pass, workers, arena);
    } else {
      const GatherBuffers<decltype(zero)> buffers(pass, workers, arena);
    }
    return arena.used();
  });
}

void run_direct(const GatherPass& pass, void* workspace, const Executor& executor) {
  if (pass.plan->packs_source()) return run_packed(pass, workspace, executor);
  dispatch_compute(pass.plan->dtype, [&](auto zero) {
    if (runs_rows<decltype(zero)>(pass)) {
      run_rows<decltype(zero)>(pass, workspace, executor);
    } else {
      run_gather<decltype(zero)>(pass, workspace, executor);
    }
  });
}

// A destination in torch's default memory format, of which tiles write a few pixels in each plane: pixels of phases lie
// apart, and a Winograd tile has four in a row. The pass writes channels_last then, and what it wrote is transposed: 45
// instead of 73 ms for U-Net's last upsampling, 6.5 instead of 10 for DCGAN's fourth layer (Zen 3, 2 threads).
struct Detour {
  // Beyond what is kept of workspaces (workspace.h), one more copy of the result is too much memory.
  static constexpr int64_t kMostBytes = int64_t{256} << 20;

  GatherPass request;  // that writes channels_last, or the pass itself
  bool taken = false;

  Detour(const GatherPass& pass, Arena& arena) : request(pass) {
    const TensorView& view = pass.destination;
    const int64_t bytes = elements(view) * dtype_size(view.dtype);
    const bool scattered = pass.plan->phases.size() > 1 || pass.plan->transforms();
    if (!scattered || view.c == 1 || view.h * view.w == 1 || bytes > kMostBytes || !is_contiguous(view)) return;
    if (reads_planes(pass)) return;  // which writes planes too
    request.destination = nhwc_view(arena.take<char>(bytes), view.dtype, view.n, view.c, view.h, view.w);
    taken = true;
  }
};

template <class T>
bool activation_is_staged(const WgradPass& pass) {
  return !pass.activation.in_place(compute_dtype<T>()) || wgrad_reads_past<T>(*pass.plan) > 0;
}

template <class T>
bool runs_planar(const WgradPass& pass) {
  return pass.grad.mask == nullptr && pass.activation.mask == nullptr &&
         wgrad_runs_planar<T>(*pass.plan, pass.grad.view, pass.activation.view);
}

template <class T>
struct PlanarWgradBuffers {
  T* partials;
  char* scratch;

  PlanarWgradBuffers(const WgradPass& pass, int64_t workers, Arena& arena) {
    const TensorView &grad = pass.grad.view, &activation = pass.activation.view;
    partials = arena.take<T>(planar_wgrad_partials<T>(*pass.plan, grad, activation));
    scratch = arena.take<char>(workers * planar_wgrad_scratch<T>(*pass.plan, grad, activation));
  }
};

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
  if (runs_planar<T>(pass)) {
    const PlanarWgradBuffers<T> buffers(pass, executor.workers, arena);
    launch_planar_wgrad<T>(
        {&plan, pass.grad.view, pass.activation.view, buffers.partials, buffers.scratch, pass.destination}, executor);
    return;
  }
  const WgradBuffers<T> buffers(pass, executor.workers, arena);
  WgradLaunch<T> launch{&plan,           pass.grad.view,  pass.activation.view, buffers.partials,
                        buffers.scratch, pass.destination};
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

bool masks_planes(const GradientPass& pass) {
  const DType compute = compute_dtype_of(pass.grad.view.dtype);
  return pass.grad.has_planes(compute) && pass.masked.has_planes(compute);
}

template <class T>
struct GradientBuffers {
  T* scratch = nullptr;
  double* plane_sums = nullptr;
  double* sums = nullptr;

  GradientBuffers(const GradientPass& pass, int64_t workers, Arena& arena) {
    const TensorView& grad = pass.grad.view;
    const bool has_bias = pass.bias_grad != nullptr;
    if (!masks_planes(pass)) {
      scratch = arena.take<T>(gradient_scratch<T>(ukernels<T>(pass.isa), grad, workers));
    } else if (has_bias) {
      plane_sums = arena.take<double>(grad.n * grad.c);
    }
    if (has_bias) sums = arena.take<double>(grad.c);
  }
};

template <class T>
void run_gradient(const GradientPass& pass, void* workspace, const Executor& executor) {
  Arena arena(workspace);
  const GradientBuffers<T> buffers(pass, executor.workers, arena);
  const GradientStage<T> request{pass.grad, pass.masked.data, pass.masked.dtype, buffers.sums};
  const Ukernels<T>& kernels = ukernels<T>(pass.isa);
  if (masks_planes(pass)) {
    stage_gradient_planes(kernels, request, buffers.plane_sums, executor);
  } else {
    stage_gradient(kernels, request, buffers.scratch, executor);
  }
  const TensorView& grad = pass.grad.view;
  for (int64_t c = 0; pass.bias_grad != nullptr && c < grad.c; ++c) {
    store_element(pass.bias_grad, grad.dtype, c, buffers.sums[c]);
  }
}

bool same_taps(const Phase& a, const Phase& b) {
  return std::equal(a.taps.begin(), a.taps.end(), b.taps.begin(), b.taps.end(),
                    [](const Tap& x, const Tap& y) { return x.r == y.r && x.s == y.s; });
}

bool same_panels(const Panel& a, const Panel& b) {
  return a.column == b.column && a.columns == b.columns && a.nr == b.nr;
}

bool same_steps(const std::vector<PlaneStep>& a, const std::vector<PlaneStep>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const PlaneStep& x, const PlaneStep& y) { return x.taps == y.taps; });
}

}  // namespace

bool same_packing(const Plan& a, const Plan& b) {
  const auto key = [](const Plan& p) {
    const TransformPlan& t = p.transform;
    return std::tuple(p.algorithm, p.pass, p.dtype, p.isa, p.problem.c, p.problem.k, p.problem.r, p.problem.s,
                      p.problem.groups, t.n, t.m, t.r, t.codelet, t.terms, t.panel_columns, t.panels, p.split.terms,
                      p.split.unit, p.split.channel_blocks, p.split.panels);
  };
  return key(a) == key(b) && packed_filter_bytes(a) == packed_filter_bytes(b) &&
         std::equal(a.phases.begin(), a.phases.end(), b.phases.begin(), b.phases.end(), same_taps) &&
         std::equal(a.panels.begin(), a.panels.end(), b.panels.begin(), b.panels.end(), same_panels) &&
         std::equal(a.split.steps.begin(), a.split.steps.end(), b.split.steps.begin(), b.split.steps.end(), same_steps);
}

int64_t packed_filter_bytes(const Plan& plan) {
  if (plan.algorithm == Algorithm::split) return SplitFilter(plan).size();
  if (plan.packs_source()) return TransformFilter(plan).size;
  return PackedFilter(plan).size() * dtype_size(compute_dtype_of(plan.dtype));
}

int64_t pack_workspace(const Plan& plan, int64_t workers) {
  return plan.transforms() ? workers * transform_filter_scratch(plan) : 0;
}

void pack_pass_filter(const Plan& plan, const FilterView& filter, void* packed, void* workspace,
                      const Executor& executor) {
  if (plan.algorithm == Algorithm::split) {
    pack_split_filter(plan, SplitFilter(plan), filter, static_cast<char*>(packed), executor);
  } else if (plan.packs_source()) {
    pack_transform_filter(plan, TransformFilter(plan), filter, static_cast<char*>(packed),
                          static_cast<char*>(workspace), executor);
  } else {
    dispatch_compute(plan.dtype, [&](auto zero) {
      pack_filter(plan, PackedFilter(plan), filter, static_cast<decltype(zero)*>(packed), executor);
    });
  }
}

bool can_pool(const Plan& plan, const TensorView& destination) {
  if (plan.algorithm == Algorithm::split) {
    return split_can_pool(plan) && (destination.stride_c == 1 || destination.c == 1);
  }
  return plan.transforms() && transform_can_pool(plan) && destination.has_channel_rows(DType::float32);
}

int64_t gather_workspace(const GatherPass& pass, int64_t workers) {
  Arena arena(nullptr);
  const Detour detour(pass, arena);
  return arena.used() + direct_workspace(detour.request, workers);
}

void run_gather_pass(const GatherPass& pass, void* workspace, const Executor& executor) {
  Arena arena(workspace);
  const Detour detour(pass, arena);
  run_direct(detour.request, static_cast<char*>(workspace) + arena.used(), executor);
  if (detour.taken) transpose_pixels(detour.request.destination, pass.destination, executor);
}

bool reads_planes(const GatherPass& pass) {
  return dispatch_compute(pass.plan->dtype, [&](auto zero) {
    return runs_planar<decltype(zero)>(*pass.plan, pass.source, pass.destination);
  });
}

bool reads_planes(const WgradPass& pass) {
  return dispatch_compute(pass.plan->dtype, [&](auto zero) { return runs_planar<decltype(zero)>(pass); });
}

int64_t wgrad_workspace(const WgradPass& pass, int64_t workers) {
  if (pass.plan->algorithm == Algorithm::split) return split_wgrad_workspace(pass, workers);
  if (pass.plan->packs_source()) return transform_wgrad_workspace(pass, workers);
  return dispatch_compute(pass.plan->dtype, [&](auto zero) {
    Arena arena(nullptr);
    if (runs_planar<decltype(zero)>(pass)) {
      const PlanarWgradBuffers<decltype(zero)> buffers(pass, workers, arena);
    } else {
      const WgradBuffers<decltype(zero)> buffers(pass, workers, arena);
    }
    return arena.used();
  });
}

void run_wgrad_pass(const WgradPass& pass, void* workspace, const Executor& executor) {
  if (pass.plan->algorithm == Algorithm::split) return run_split_wgrad(pass, workspace, executor);
  if (pass.plan->packs_source()) return run_transform_wgrad(pass, workspace, executor);
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
