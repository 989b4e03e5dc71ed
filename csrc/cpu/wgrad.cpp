// SPDX-License-Identifier: BSD-3-Clause
#include "wgrad.h"

#include <algorithm>
#include <utility>

#include "../common/integers.h"
#include "depthwise_wgrad.h"
#include "packing.h"
#include "row_table.h"
#include "rows_stage.h"
#include "wgrad_pack.h"

namespace segpose {
namespace {

// Values that one thread adds before another has woken up.
constexpr int64_t kSerialValues = 32 << 10;

bool is_gathered(const Plan& plan) { return plan.algorithm == Algorithm::gathered; }

bool in_rows(const Plan& plan) { return plan.algorithm == Algorithm::rows; }

// The partial sums of one split: [group][unit][filter][padded columns], where a unit is a tap, or several whose
// columns follow each other: all when gathered, a run of a row in bands of rows. With filters in the lanes
// [unit][column][padded filters].
struct PartialLayout {
  int64_t groups, units, unit_taps, filters, padded;

  explicit PartialLayout(const Plan& plan) {
    groups = plan.gemm_groups();
    unit_taps = is_gathered(plan) ? plan.problem.taps()
                : in_rows(plan)   ? merge_taps(plan.phases.front(), plan.problem.groups == 1).taps
                                  : 1;
    units = plan.problem.taps() / unit_taps;
    filters = plan.filter_lanes ? unit_taps * plan.problem.c : plan.problem.k_per_group();
    padded = plan.padded_columns();
  }
  int64_t size() const { return groups * units * filters * padded; }
  int64_t row(int64_t group, int64_t unit, int64_t filter) const {
    return ((group * units + unit) * filters + filter) * padded;
  }
};

// Pixels of a split, all of them in whole blocks.
struct PixelRange {
  int64_t begin, end;
};

PixelRange split_range(const Plan& plan, int64_t split) {
  const int64_t pixels = plan.problem.n * plan.problem.p * plan.problem.q;
  const int64_t blocks = ceil_div(pixels, plan.block_m);
  return {std::min(pixels, blocks * split / plan.splits * plan.block_m),
          std::min(pixels, blocks * (split + 1) / plan.splits * plan.block_m)};
}

// Runs of pixels [begin, end) whose tap lies inside the activation; padding contributes nothing.
template <class T>
int64_t fill_segments(const WgradLaunch<T>& launch, const Tap& tap, int64_t begin, int64_t end, Segment<T>* segments) {
  const ConvProblem& problem = launch.plan->problem;
  int64_t count = 0;
  // Columns q with 0 <= q * stride + off < w.
  const int64_t first = tap.off_w >= 0 ? 0 : ceil_div(-tap.off_w, problem.stride_w);
  const int64_t last =
      problem.w - tap.off_w <= 0 ? 0 : std::min(problem.q, ceil_div(problem.w - tap.off_w, problem.stride_w));
  int64_t q = begin % problem.q;
  int64_t p = begin / problem.q % problem.p;
  int64_t n = begin / (problem.q * problem.p);
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t run = std::min(problem.q - q, end - pixel);
    const int64_t from = std::max(q, first);
    const int64_t to = std::min(q + run, last);
    const int64_t h = p * problem.stride_h + tap.off_h;
    if (from < to && h >= 0 && h < problem.h) {
      const T* g = launch.grad.template as<T>() + launch.grad.offset(n, p, from);
      const T* x =
          launch.activation.template as<T>() + launch.activation.offset(n, h, from * problem.stride_w + tap.off_w);
      // Rows that follow each other without a gap on both sides are one run.
      Segment<T>* previous = count > 0 ? segments + count - 1 : nullptr;
      if (previous != nullptr && previous->g + previous->length * launch.grad.stride_w == g &&
          previous->x + previous->length * launch.activation.stride_w * problem.stride_w == x) {
        previous->length += to - from;
      } else {
        segments[count++] = {g, x, to - from};
      }
    }
    pixel += run;
    q = 0;
    if (++p == problem.p) {
      p = 0;
      ++n;
    }
  }
  return count;
}

template <class T>
struct Scratch {
  Segment<T>* segments;  // [block_m]
  T* gathered;           // [block_m][padded columns]: all taps of a pixel side by side
  PackedPixels<T> packed;

  Scratch(const Plan& plan, Arena& arena)
      : segments(arena.take<Segment<T>>(plan.block_m)),
        gathered(is_gathered(plan) ? arena.take<T>(plan.block_m * plan.padded_columns()) : nullptr),
        packed(plan, arena) {}
};

template <class T>
struct BandScratch {
  BandStage<T> band;
  Segment<T>* segments;

  BandScratch(const Plan& plan, TensorView activation, Arena& arena)
      : band(plan.rows, {rows_view(plan, activation), nullptr}, arena),
        segments(arena.take<Segment<T>>(plan.rows.images * plan.rows.rows)) {}

 private:
  // Measuring needs the channels only.
  static TensorView rows_view(const Plan& plan, TensorView activation) {
    if (activation.data != nullptr) return activation;
    return nhwc_view(nullptr, compute_dtype<T>(), plan.problem.n, plan.problem.c, plan.problem.h, plan.problem.w);
  }
};

// Every panel and filter tile of one block of pixels.
template <class T>
void accumulate_tiles(const Plan& plan, const Ukernels<T>& kernels, WgradArgs<T> args, int64_t g_base, int64_t x_base,
                      int64_t filters, T* out, int64_t padded) {
  args.out_step = padded;
  for (const Panel& panel : plan.panels) {
    args.x_offset = x_base + panel.column;
    for_each_tile(kernels, panel.nr, filters, [&](const WgradTile<T>& tile, int64_t filter) {
      args.g_offset = g_base + filter;
      args.out = out + filter * padded + panel.column;
      tile.run(args);
    });
  }
}

// The same from copies of the pixels.
template <class T>
void accumulate_packed(const Plan& plan, const Ukernels<T>& kernels, const WgradArgs<T>& block, int64_t g_base,
                       int64_t x_base, int64_t filters, T* out, int64_t padded, PackedPixels<T>& packed) {
  const auto panels = static_cast<int64_t>(plan.panels.size());
  int64_t packed_for = 0;
  for (int64_t first = 0; first < panels; first += plan.panels_per_task) {
    const int64_t end = std::min(first + plan.panels_per_task, panels);
    packed.load_columns(plan, block, x_base, first, end);
    for (int64_t p = first; p < end; ++p) {
      const Panel& panel = plan.panels[static_cast<size_t>(p)];
      if (panel.nr != packed_for) packed.load_filters(kernels, panel.nr, block, g_base, filters);
      packed_for = panel.nr;
      for_each_tile(kernels, panel.nr, filters, [&](const WgradTile<T>& tile, int64_t filter) {
        packed.run(tile, p - first, filter, out + filter * padded + panel.column, padded);
      });
    }
  }
}

// One split of bands of rows: every filter and run of taps.
template <class T>
void run_bands(const WgradLaunch<T>& launch, const PartialLayout& layout, int64_t split, BandStage<T>& band,
               Segment<T>* segments) {
  const Plan& plan = *launch.plan;
  const ConvProblem& problem = plan.problem;
  const RowsPlan& rows = plan.rows;
  const Ukernels<T>& kernels = ukernels<T>(plan.isa);
  T* partials = launch.partials + split * layout.size();
  std::fill_n(partials, layout.size(), T{0});
  const PhaseRuns merged = merge_taps(plan.phases.front(), problem.groups == 1);
  const int64_t bands = ceil_div(problem.p, rows.rows);
  const int64_t blocks = ceil_div(problem.n, rows.images) * bands;
  WgradArgs<T> args{};
  args.segments = segments;
  // The tile broadcasts `g` and has `x` in its lanes.
  args.g_step = launch.grad.stride_w;
  args.x_step = problem.stride_w * problem.c;
  if (plan.filter_lanes) std::swap(args.g_step, args.x_step);
  for (int64_t block = blocks * split / plan.splits; block < blocks * (split + 1) / plan.splits; ++block) {
    const int64_t image = block / bands * rows.images;
    const int64_t row = block % bands * rows.rows;
    const int64_t images = std::min(rows.images, problem.n - image);
    band.load(kernels, image, images, row);
    args.count = 0;
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t r = 0; r < std::min(rows.rows, problem.p - row); ++r) {
        const T* const grad = launch.grad.template as<T>() + launch.grad.offset(image + i, row + r, 0);
        const T* const source = band.data() + i * band.image_size() + r * rows.row_step * band.row_size();
        segments[args.count++] =
            plan.filter_lanes ? Segment<T>{source, grad, problem.q} : Segment<T>{grad, source, problem.q};
      }
    }
    for (int64_t group = 0; group < layout.groups; ++group) {
      for (int64_t unit = 0; unit < layout.units; ++unit) {
        const int64_t x = run_offset(rows, merged.runs[static_cast<size_t>(unit)], problem.c);
        if (plan.filter_lanes) {
          accumulate_tiles(plan, kernels, args, x, 0, layout.filters, partials + layout.row(0, unit, 0), layout.padded);
          continue;
        }
        accumulate_tiles(plan, kernels, args, group * layout.filters, x + group * problem.c_per_group(), layout.filters,
                         partials + layout.row(group, unit, 0), layout.padded);
      }
    }
  }
}

// One task: the filters [first, first + count) of one group and unit, over one split of the pixels.
template <class T>
void run_task(const WgradLaunch<T>& launch, const PartialLayout& layout, int64_t group, int64_t unit, int64_t first,
              int64_t count, int64_t split, Scratch<T>& scratch) {
  const Plan& plan = *launch.plan;
  const ConvProblem& problem = plan.problem;
  const Ukernels<T>& kernels = ukernels<T>(plan.isa);
  T* out = launch.partials + split * layout.size() + layout.row(group, unit, first);
  std::fill_n(out, count * layout.padded, T{0});
  const PixelRange range = split_range(plan, split);
  WgradArgs<T> args{};
  args.segments = scratch.segments;
  args.g_step = launch.grad.stride_w;
  args.x_step = launch.activation.stride_w * problem.stride_w;
  for (int64_t begin = range.begin; begin < range.end; begin += plan.block_m) {
    const int64_t end = std::min(begin + plan.block_m, range.end);
    if (is_gathered(plan)) {
      // The reduced pixels are rows of `gathered`; those of the gradient follow each other within an image row.
      const int64_t columns = problem.taps() * problem.c_per_group();
      gather_rows(plan.phases.front(), launch.activation, group * problem.c_per_group(), problem.c_per_group(), begin,
                  end - begin, layout.padded, scratch.gathered);
      for (int64_t m = 0; m < end - begin; ++m) {
        std::fill(scratch.gathered + m * layout.padded + columns, scratch.gathered + (m + 1) * layout.padded, T{0});
      }
      args.count = 0;
      for (int64_t pixel = begin; pixel < end;) {
        const int64_t q = pixel % problem.q;
        const int64_t run = std::min(problem.q - q, end - pixel);
        const int64_t row = pixel / problem.q;
        const T* g = launch.grad.template as<T>() + launch.grad.offset(row / problem.p, row % problem.p, q);
        scratch.segments[args.count++] = {g, scratch.gathered + (pixel - begin) * layout.padded, run};
        pixel += run;
      }
      args.x_step = layout.padded;
      accumulate_tiles(plan, kernels, args, group * problem.k_per_group() + first, 0, count, out, layout.padded);
      continue;
    }
    const Tap& tap = plan.phases.front().taps[static_cast<size_t>(unit)];
    if (problem.p * problem.q == 1) {
      // One pixel an image: the images are the run.
      const bool inside = tap.off_h >= 0 && tap.off_h < problem.h && tap.off_w >= 0 && tap.off_w < problem.w;
      args.g_step = launch.grad.stride_n;
      args.x_step = launch.activation.stride_n;
      args.count = inside ? 1 : 0;
      scratch.segments[0] = {launch.grad.template as<T>() + launch.grad.offset(begin, 0, 0),
                             launch.activation.template as<T>() + launch.activation.offset(begin, tap.off_h, tap.off_w),
                             end - begin};
    } else {
      args.count = fill_segments(launch, tap, begin, end, scratch.segments);
    }
    if (args.count == 0) continue;
    if (plan.packs_pixels) {
      accumulate_packed(plan, kernels, args, group * problem.k_per_group() + first, group * problem.c_per_group(),
                        count, out, layout.padded, scratch.packed);
    } else {
      accumulate_tiles(plan, kernels, args, group * problem.k_per_group() + first, group * problem.c_per_group(), count,
                       out, layout.padded);
    }
  }
}

// Adds the splits in order and writes [K][C / groups][R][S] with the filter's strides and dtype.
template <class T>
void reduce_and_store(const WgradLaunch<T>& launch, const PartialLayout& layout, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const ConvProblem& problem = plan.problem;
  const int64_t channels = problem.c_per_group();
  const int64_t scratch_bytes = wgrad_scratch<T>(plan);
  const Executor serial{1, nullptr};
  const Executor& chosen = plan.splits * layout.size() < kSerialValues ? serial : executor;
  for_each_task(chosen, problem.k, [&](int64_t k, int64_t worker) {
    T* const line = reinterpret_cast<T*>(launch.scratch + worker * scratch_bytes);  // [taps][channels]
    for (int64_t t = 0; t < problem.taps(); ++t) {
      const int64_t column = t % layout.unit_taps * channels;
      const int64_t unit = t / layout.unit_taps;
      const int64_t base = plan.filter_lanes ? layout.row(0, unit, column) + k
                                             : layout.row(k / layout.filters, unit, k % layout.filters) + column;
      const int64_t step = plan.filter_lanes ? layout.padded : 1;
      T* const sums = line + t * channels;
      for (int64_t split = 0; split < plan.splits; ++split) {
        const T* const partial = launch.partials + split * layout.size() + base;
        if (split == 0) {
          for (int64_t c = 0; c < channels; ++c) sums[c] = partial[c * step];
        } else if (step == 1) {
          for (int64_t c = 0; c < channels; ++c) sums[c] += partial[c];
        } else {
          for (int64_t c = 0; c < channels; ++c) sums[c] += partial[c * step];
        }
      }
    }
    scatter_filter(launch.destination, k * launch.destination.stride_k, problem, line);
  });
}

}  // namespace

template <class T>
int64_t wgrad_reads_past(const Plan& plan) {
  if (plan.algorithm != Algorithm::igemm) return 0;
  return plan.padded_columns() - plan.problem.c_per_group();
}

template <class T>
int64_t wgrad_partials(const Plan& plan) {
  if (plan.algorithm == Algorithm::depthwise) return depthwise_wgrad_partials(plan);
  return plan.splits * PartialLayout(plan).size();
}

template <class T>
int64_t wgrad_scratch(const Plan& plan) {
  if (plan.algorithm == Algorithm::depthwise) return depthwise_wgrad_scratch<T>(plan);
  Arena arena(nullptr);
  if (in_rows(plan)) {
    const BandScratch<T> scratch(plan, {}, arena);
  } else {
    const Scratch<T> scratch(plan, arena);
  }
  // Afterwards a filter on its way to the destination.
  Arena afterwards(nullptr);
  afterwards.take<T>(plan.problem.taps() * plan.problem.c_per_group());
  return std::max(arena.used(), afterwards.used());
}

template <class T>
void launch_wgrad(const WgradLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  if (plan.algorithm == Algorithm::depthwise) return launch_depthwise_wgrad(launch, executor);
  const PartialLayout layout(plan);
  const int64_t k_blocks = ceil_div(layout.filters, plan.k_block);
  const int64_t scratch_bytes = wgrad_scratch<T>(plan);
  if (in_rows(plan)) {
    for_each_task(executor, plan.splits, [&](int64_t split, int64_t worker) {
      Arena arena(launch.scratch + worker * scratch_bytes);
      BandScratch<T> scratch(plan, launch.activation, arena);
      run_bands(launch, layout, split, scratch.band, scratch.segments);
    });
    return reduce_and_store(launch, layout, executor);
  }
  for_each_task(executor, plan.splits * layout.groups * layout.units * k_blocks, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    Scratch<T> scratch(plan, arena);
    const int64_t first = task % k_blocks * plan.k_block;
    const int64_t unit = task / k_blocks % layout.units;
    const int64_t group = task / (k_blocks * layout.units) % layout.groups;
    const int64_t split = task / (k_blocks * layout.units * layout.groups);
    run_task(launch, layout, group, unit, first, std::min(plan.k_block, layout.filters - first), split, scratch);
  });
  reduce_and_store(launch, layout, executor);
}

#define SEGPOSE_INSTANTIATE(T)                       \
  template int64_t wgrad_reads_past<T>(const Plan&); \
  template int64_t wgrad_partials<T>(const Plan&);   \
  template int64_t wgrad_scratch<T>(const Plan&);    \
  template void launch_wgrad<T>(const WgradLaunch<T>&, const Executor&);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
