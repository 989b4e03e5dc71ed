// SPDX-License-Identifier: BSD-3-Clause
#include "planar_wgrad.h"

#include <algorithm>

#include "../common/integers.h"
#include "packing.h"
#include "planar_plan.h"

namespace segpose {
namespace {

// Of channel rows a stride apart, whose way into planes costs more: at stride two 256 channels into 128 in 32 groups
// took 3.0 ms in planes and take 1.5 where they lie, 128 into 128 1.4 and 1.3, 96 into 96 0.9 and 1.6 (4 images of 56 x
// 56).
constexpr int64_t kMostStrided = 7;
// Of channel rows: a cache line of floats.
constexpr int64_t kBundledChannels = 16;
// Fewer tasks would leave threads idle.
constexpr int64_t kLeastTasks = 16;

// How the work is cut: by the problem and the formats alone, so that results do not depend on the threads.
template <class T>
struct Cut {
  const ConvProblem& problem;
  const Phase& phase;
  PlanarBand band;
  int64_t steps;             // of a filter: [tap][channel]
  int64_t padded;            // partial sums of a filter, with room for a ragged tile
  bool stages_grad;          // or reads it where it lies
  int64_t bundle, bundles;   // groups that are staged together
  int64_t row_bands, bands;  // of an image
  int64_t splits;            // of all bands

  Cut(const Plan& plan, const TensorView& grad, const TensorView& activation)
      : problem(plan.problem),
        phase(plan.phases.front()),
        band(planar_wgrad_band(plan)),
        steps(problem.taps() * problem.c_per_group()),
        padded(steps + kPlanarWgradSteps),
        stages_grad(!is_planar(grad, compute_dtype<T>())) {
    const bool planar = !stages_grad && is_planar(activation, compute_dtype<T>());
    const int64_t fewest = std::min(problem.c_per_group(), problem.k_per_group());
    bundle = planar ? 1 : std::min(ceil_div(kBundledChannels, fewest), problem.groups);
    bundles = ceil_div(problem.groups, bundle);
    row_bands = ceil_div(problem.p, band.rows);
    bands = row_bands * ceil_div(problem.q, band.cols);
    splits = std::clamp<int64_t>(ceil_div(kLeastTasks, bundles), 1, problem.n * bands);
  }

  int64_t grad_plane() const { return band.rows * band.cols; }
};

template <class T>
struct Scratch {
  int64_t* offsets;  // [step], the last one again for a ragged tile
  T* staged;         // [group of a bundle][plane][row][residue][column]
  T* grad;           // [filter of a bundle][row][column]

  Scratch(const Cut<T>& cut, Arena& arena)
      : offsets(arena.take<int64_t>(cut.padded)),
        staged(arena.take<T>(cut.bundle * cut.band.size())),
        grad(cut.stages_grad ? arena.take<T>(cut.bundle * cut.problem.k_per_group() * cut.grad_plane()) : nullptr) {}
};

// The bands of one split, for some groups.
template <class T>
class BundleWgrad {
 public:
  BundleWgrad(const WgradLaunch<T>& launch, const Cut<T>& cut, const Scratch<T>& scratch, int64_t bundle)
      : launch_(launch),
        cut_(cut),
        kernels_(ukernels<T>(launch.plan->isa)),
        scratch_(scratch),
        group_(bundle * cut.bundle),
        groups_(std::min(cut.bundle, cut.problem.groups - group_)) {
    int64_t step = 0;
    for (const Tap& tap : cut.phase.taps) {
      for (int64_t c = 0; c < cut.band.depth; ++c) scratch.offsets[step++] = cut.band.offset(cut.phase, tap, c);
    }
    std::fill(scratch.offsets + step, scratch.offsets + cut.padded, scratch.offsets[step - 1]);
  }

  void run(int64_t split) {
    const int64_t filters = cut_.problem.k_per_group();
    T* const out = launch_.partials + (split * cut_.problem.k + group_ * filters) * cut_.padded;
    std::fill_n(out, groups_ * filters * cut_.padded, T{0});
    const int64_t all = cut_.problem.n * cut_.bands;
    for (int64_t i = all * split / cut_.splits; i < all * (split + 1) / cut_.splits; ++i) {
      const int64_t band = i % cut_.bands;
      run_band(i / cut_.bands, band % cut_.row_bands * cut_.band.rows, band / cut_.row_bands * cut_.band.cols, out);
    }
  }

 private:
  void run_band(int64_t n, int64_t row, int64_t col, T* out) {
    const int64_t filters = cut_.problem.k_per_group();
    const int64_t rows = std::min(cut_.band.rows, cut_.problem.p - row);
    const int64_t columns = std::min(cut_.band.cols, cut_.problem.q - col);
    const TensorView& source = launch_.activation;
    const T* const first =
        source.template as<const T>() + n * source.stride_n + group_ * cut_.band.depth * source.stride_c;
    stage_planes(kernels_, cut_.phase, cut_.band, source, first, groups_ * cut_.band.depth, row, rows, col,
                 scratch_.staged);
    const TensorView& grad = launch_.grad;
    const T* g = grad.template as<const T>() + grad.offset(n, row, col) + group_ * filters * grad.stride_c;
    PlanarWgradArgs<T> args{};
    args.g_step = grad.stride_h;
    args.g_filter = grad.stride_c;
    if (cut_.stages_grad) {
      args.g_step = cut_.band.cols;
      args.g_filter = cut_.grad_plane();
      for (int64_t r = 0; r < rows; ++r) {
        copy_plane_lines(kernels_, grad, g + r * grad.stride_h, grad.stride_w, columns, groups_ * filters,
                         scratch_.grad + r * args.g_step, args.g_filter);
      }
      g = scratch_.grad;
    }
    args.x_step = cut_.phase.istep_h * cut_.band.row_size;
    args.rows = rows;
    args.columns = columns;
    args.out_filter = cut_.padded;
    for (int64_t i = 0; i < groups_; ++i) {
      args.x = scratch_.staged + i * cut_.band.size();
      run_group(args, g + i * filters * args.g_filter, out + i * filters * cut_.padded);
    }
  }

  void run_group(PlanarWgradArgs<T>& args, const T* g, T* out) {
    const int64_t filters = cut_.problem.k_per_group();
    int64_t filter = 0;
    for (const PlanarWgradTile<T>& tile : kernels_.planar_wgrad) {
      for (; filter + tile.filters <= filters; filter += tile.filters) {
        args.g = g + filter * args.g_filter;
        for (int64_t step = 0; step < cut_.steps; step += tile.steps) {
          args.offsets = scratch_.offsets + step;
          args.out = out + filter * cut_.padded + step;
          tile.run(args);
        }
      }
    }
  }

  const WgradLaunch<T>& launch_;
  const Cut<T>& cut_;
  const Ukernels<T>& kernels_;
  const Scratch<T>& scratch_;
  int64_t group_, groups_;
};

}  // namespace

template <class T>
bool wgrad_runs_planar(const Plan& plan, const TensorView& grad, const TensorView& activation) {
  if (!plan.may_be_planar) return false;
  const DType dtype = compute_dtype<T>();
  const ConvProblem& problem = plan.problem;
  const auto fits = [&](const TensorView& view) { return is_planar(view, dtype) || view.has_channel_rows(dtype); };
  if (!fits(grad) || !fits(activation)) return false;
  if (is_planar(grad, dtype) || is_planar(activation, dtype)) return true;
  // Depthwise, channel rows are vectors already.
  return plan.algorithm != Algorithm::depthwise && (problem.stride_w == 1 || problem.c_per_group() <= kMostStrided);
}

template <class T>
int64_t planar_wgrad_partials(const Plan& plan, const TensorView& grad, const TensorView& activation) {
  const Cut<T> cut(plan, grad, activation);
  return cut.splits * cut.problem.k * cut.padded;
}

template <class T>
int64_t planar_wgrad_scratch(const Plan& plan, const TensorView& grad, const TensorView& activation) {
  Arena arena(nullptr);
  const Scratch<T> scratch(Cut<T>(plan, grad, activation), arena);
  return arena.used();
}

template <class T>
void launch_planar_wgrad(const WgradLaunch<T>& launch, const Executor& executor) {
  const Cut<T> cut(*launch.plan, launch.grad, launch.activation);
  const int64_t scratch_bytes = planar_wgrad_scratch<T>(*launch.plan, launch.grad, launch.activation);
  for_each_task(executor, cut.bundles * cut.splits, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch<T> scratch(cut, arena);
    BundleWgrad<T>(launch, cut, scratch, task % cut.bundles).run(task / cut.bundles);
  });
  const ConvProblem& problem = cut.problem;
  for (int64_t k = 0; k < problem.k; ++k) {
    // Into the first split's.
    T* const sums = launch.partials + k * cut.padded;
    for (int64_t split = 1; split < cut.splits; ++split) {
      const T* const partial = sums + split * problem.k * cut.padded;
      for (int64_t step = 0; step < cut.steps; ++step) sums[step] += partial[step];
    }
    scatter_filter(launch.destination, k * launch.destination.stride_k, problem, sums);
  }
}

#define SEGPOSE_INSTANTIATE(T)                                                                  \
  template bool wgrad_runs_planar<T>(const Plan&, const TensorView&, const TensorView&);        \
  template int64_t planar_wgrad_partials<T>(const Plan&, const TensorView&, const TensorView&); \
  template int64_t planar_wgrad_scratch<T>(const Plan&, const TensorView&, const TensorView&);  \
  template void launch_planar_wgrad<T>(const WgradLaunch<T>&, const Executor&);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
