// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise_wgrad.h"

#include <algorithm>

#include "../common/integers.h"
#include "packing.h"
#include "row_table.h"

namespace segpose {
namespace {

// Sums of a tap, padded to whole vectors of any instruction set and whole cache lines.
constexpr int64_t kPadding = 16;

int64_t padded_channels(const Plan& plan) { return round_up(plan.problem.groups, kPadding); }

int64_t split_values(const Plan& plan) { return plan.problem.taps() * padded_channels(plan); }

template <class T>
struct Scratch {
  DepthwiseWgradTap<T>* taps;  // [taps and a ragged tile]
  T* unused;                   // [channels] the sums of a ragged tile's other taps

  Scratch(const Plan& plan, Arena& arena)
      : taps(arena.take<DepthwiseWgradTap<T>>(plan.problem.taps() + kDepthwiseWgradTaps)),
        unused(arena.take<T>(padded_channels(plan))) {}
};

// The rows of the gradient one by one, into the sums of a split.
template <class T>
class RowSums {
 public:
  RowSums(const WgradLaunch<T>& launch, const Scratch<T>& scratch, T* sums)
      : launch_(launch), problem_(launch.plan->problem), scratch_(scratch), sums_(sums) {}

  // Pixels of which a tap sees the padding on the left or right one by one, what lies between in one run.
  void add(int64_t n, int64_t row) {
    int64_t begin = 0;
    int64_t end = problem_.q;
    for (const Tap& tap : launch_.plan->phases.front().taps) {
      begin = std::max(begin, first_inside(tap.off_w, problem_.stride_w, 0, problem_.q));
      end = std::min(end, first_inside(tap.off_w, problem_.stride_w, problem_.w, problem_.q));
    }
    if (begin > end) begin = end = problem_.q;
    for (int64_t col = 0; col < begin; ++col) add_run(n, row, col, 1);
    if (begin < end) add_run(n, row, begin, end - begin);
    for (int64_t col = end; col < problem_.q; ++col) add_run(n, row, col, 1);
  }

 private:
  void add_run(int64_t n, int64_t row, int64_t col, int64_t pixels) {
    const TensorView &grad = launch_.grad, &source = launch_.activation;
    DepthwiseWgradArgs<T> args{};
    args.taps = scratch_.taps;
    T* sums = sums_;
    for (const Tap& tap : launch_.plan->phases.front().taps) {
      const int64_t h = row * problem_.stride_h + tap.off_h, w = col * problem_.stride_w + tap.off_w;
      if (h >= 0 && h < source.h && w >= 0 && w < source.w) {
        scratch_.taps[args.count++] = {source.as<const T>() + source.offset(n, h, w), sums};
      }
      sums += padded_channels(*launch_.plan);
    }
    if (args.count == 0) return;
    for (int64_t i = 0; i < kDepthwiseWgradTaps; ++i)
      scratch_.taps[args.count + i] = {scratch_.taps->x, scratch_.unused};
    args.g = grad.as<const T>() + grad.offset(n, row, col);
    args.g_step = grad.stride_w;
    args.x_step = problem_.stride_w * source.stride_w;
    args.pixels = pixels;
    args.channels = problem_.groups;
    ukernels<T>(launch_.plan->isa).depthwise_wgrad(args);
  }

  const WgradLaunch<T>& launch_;
  const ConvProblem& problem_;
  const Scratch<T>& scratch_;
  T* sums_;  // [tap][padded channels], as the plan orders its taps
};

}  // namespace

int64_t depthwise_wgrad_partials(const Plan& plan) { return plan.splits * split_values(plan); }

template <class T>
int64_t depthwise_wgrad_scratch(const Plan& plan) {
  Arena arena(nullptr);
  const Scratch<T> scratch(plan, arena);
  return arena.used();
}

template <class T>
void launch_depthwise_wgrad(const WgradLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const ConvProblem& problem = plan.problem;
  const int64_t scratch_bytes = depthwise_wgrad_scratch<T>(plan);
  const int64_t values = split_values(plan);
  const int64_t rows = problem.n * problem.p;
  for_each_task(executor, plan.splits, [&](int64_t split, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch<T> scratch(plan, arena);
    T* const sums = launch.partials + split * values;
    std::fill_n(sums, values, T{0});
    std::fill_n(scratch.unused, padded_channels(plan), T{0});
    RowSums<T> split_sums(launch, scratch, sums);
    for (int64_t row = rows * split / plan.splits; row < rows * (split + 1) / plan.splits; ++row) {
      split_sums.add(row / problem.p, row % problem.p);
    }
  });
  // Into the first split's.
  T* const sums = launch.partials;
  for (int64_t split = 1; split < plan.splits; ++split) {
    const T* const partial = sums + split * values;
    for (int64_t i = 0; i < values; ++i) sums[i] += partial[i];
  }
  for (int64_t k = 0; k < problem.k; ++k) {
    T* const filter = reinterpret_cast<T*>(launch.scratch);
    for (size_t t = 0; t < plan.phases.front().taps.size(); ++t) {
      const Tap& tap = plan.phases.front().taps[t];
      filter[tap.r * problem.s + tap.s] = sums[static_cast<int64_t>(t) * padded_channels(plan) + k];
    }
    scatter_filter(launch.destination, k * launch.destination.stride_k, problem, filter);
  }
}

template int64_t depthwise_wgrad_scratch<float>(const Plan&);
template int64_t depthwise_wgrad_scratch<double>(const Plan&);
template void launch_depthwise_wgrad<float>(const WgradLaunch<float>&, const Executor&);
template void launch_depthwise_wgrad<double>(const WgradLaunch<double>&, const Executor&);

}  // namespace segpose
