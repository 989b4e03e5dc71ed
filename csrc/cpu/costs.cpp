// SPDX-License-Identifier: BSD-3-Clause
#include "costs.h"

#include <algorithm>
#include <cmath>

#include "../common/integers.h"
#include "line_tiles.h"
#include "planar_plan.h"

namespace segpose {
namespace {

// Cycles of copying a tap of a pixel, and of starting a run of pixels in a wgrad tile. Panels of one vector wait for
// loads.
constexpr double kGatherCycles = 7;
constexpr double kSegmentCycles = 12;
constexpr double kNarrowWgrad = 1.8;
// Splits of a wgrad over bands of rows: most of them, values of their partial sums, and the fewest pixels of one, whose
// products outweigh adding up another split. The first few, which keep threads from idling, need fewer: in four
// FCN 8x's wgrad took 5.2 ms and Keypoint R-CNN's 9.7, in one 6.3 and 10.4 (Zen 3, two threads).
constexpr int64_t kMostSplits = 24;
constexpr int64_t kPartialValues = 1 << 20;
constexpr int64_t kSplitPixels = 1 << 10;
constexpr int64_t kFirstSplits = 4;
constexpr int64_t kFirstSplitPixels = 1 << 8;
// Cycles of a sum of a wgrad over bands of rows that every band reads and writes beyond L2: 16 bands of 2 M sums took
// 42 ms where igemm takes 12 (Zen 3, two threads).
constexpr double kSumCycles = 5;
// Sums that bands still read fast enough: with 512 KB of L2 256 K of them took 18.7 ms where igemm takes 10.7, while
// 128 K took 11.5 where it takes 14.4 (Zen 3). Processors with AVX-512 mostly have more.
double most_resident_sums(Isa isa) { return isa >= Isa::avx512 ? 256 << 10 : 192 << 10; }
// Cycles of a value that comes from memory.
constexpr double kMemoryCycles = 0.25;
constexpr double kCacheValues = 256 << 10;
// Cycles of a byte of a filter that does not stay in L2, for every block that reads it.
constexpr double kFilterCycles = 0.14;
constexpr double kFilterBytes = 1280 << 10;
// Below this many channels the row pointers of igemm cost more than copying the taps together.
constexpr int64_t kGatherChannels = 8;
// Cycles of a destination pixel and of a pointer to a tap's row, for each panel of igemm; of copying a tap of a pixel
// instead; and of a phase.
constexpr double kPixelCycles = 14;
constexpr double kPointerCycles = 0.7;
constexpr double kCopyCycles = 3.5;
constexpr double kPhaseCycles = 3e3;
// Cycles of a product of AMX tiles, of writing 16 channels of a pixel, of splitting 16 channels into a term; of a phase
// of a block, and of a pass whatever its size.
constexpr double kTileCycles = 20;
constexpr double kStoreCycles = 12;
constexpr double kSplitCycles = 4;
constexpr double kSplitPhase = 2e3;
constexpr double kSplitPass = 20e3;
// Fewer channels than a tile is deep, at a stride: pixels are packed one by one.
constexpr double kStridedSplit = 2;
// What the transforms of whole layers took over their predictions, with AMX products in between, and with floats.
constexpr double kWinograd3 = 1.2;
constexpr double kWinograd2 = 1.8;
constexpr double kWinograd2Float = 1.25;
// Of starting a line of tiles, and of staging a value.
constexpr double kLineCycles = 60;
// A filter beyond L1 that a panel of one vector waits for.
constexpr double kRowsFilterBytes = 32 << 10;
constexpr double kNarrowRows = 1.4;
// Of adding up the lanes of a tile.
constexpr double kDotsTile = 40;
constexpr double kStageCycles = 0.25;
// Of a value's way into planes or out of them: with it, grouped layers of 56 x 56 took 1.1 to 1.8 times as long over
// their prediction as a GEMM over its own (Zen 3).
constexpr double kPlaneCycles = 0.7;
constexpr double kStridedPlanes = 3;
// Of a result that is not a float32.
constexpr double kConvertCycles = 1;
// Of packing 16 values of a filter into tiles.
constexpr double kPackCycles = 25;

// Of the taps that read the source anywhere.
double filter_values(const Plan& plan) {
  double taps = 0;
  for (const Phase& phase : plan.phases) taps += static_cast<double>(static_cast<int64_t>(phase.taps.size()));
  return taps * static_cast<double>(plan.problem.c_per_group() * plan.problem.k);
}

// Of reading a filter `times`.
double filter_cycles(double bytes, double times) { return bytes > kFilterBytes ? bytes * times * kFilterCycles : 0; }

double converted(const Plan& plan, double results) { return dtype_size(plan.dtype) < 4 ? results * kConvertCycles : 0; }

// Pixels that a pass writes.
double written_pixels(const Plan& plan) {
  double pixels = 0;
  for (const Phase& phase : plan.phases) pixels += static_cast<double>(plan.problem.n * phase.rows * phase.cols);
  return pixels;
}

// Pixels that it reads for them.
double read_taps(const Plan& plan) {
  double taps = 0;
  for (const Phase& phase : plan.phases) {
    taps += static_cast<double>(plan.problem.n * phase.rows * phase.cols * static_cast<int64_t>(phase.taps.size()));
  }
  return taps;
}

// What a multiply-add costs in cycles with vectors of `lanes`, two of them a cycle, at the rate that the GEMMs reach.
double multiply_add_cycles(Isa isa) {
  const double lanes = isa >= Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  return 1.15 / (2 * lanes);
}

// Of both sides' way through planes.
double plane_cycles(const ConvProblem& problem) {
  const double x = static_cast<double>(problem.n * problem.c * problem.h * problem.w);
  const double y = static_cast<double>(problem.n * problem.k * problem.p * problem.q);
  return (x * (problem.stride_w > 1 ? kStridedPlanes : 1) + y) * kPlaneCycles;
}

// Cycles of a step of a line of tiles.
template <class T>
double line_cycles(const LineTiles<T>& tiles, int64_t pixels, double vectors) {
  double cycles = 0;
  while (pixels > 0) {
    const int64_t rows = tiles.first(pixels).mr;
    cycles += tiles.step_cycles(rows, vectors);
    pixels -= rows;
  }
  return cycles;
}

// Of a line of tiles of few columns, whose pixels read `runs` of so many values.
template <class T>
double dots_cycles(Isa isa, int64_t pixels, int64_t width, int64_t runs, int64_t values) {
  const Ukernels<T>& table = ukernels<T>(isa);
  const double vectors = static_cast<double>(runs * ceil_div(values, table.vector_length));
  for (int i = 0; i < table.dots.count; ++i) {
    const RowsTile<T>& tile = table.dots.tiles[i];
    if (tile.nr != width || tile.mr > pixels) continue;
    const double step = std::max({0.5 * tile.mr * tile.nr, 0.5 * (tile.mr + tile.nr), 4.0});
    return static_cast<double>(ceil_div(pixels, tile.mr)) * (vectors * step + kDotsTile);
  }
  return 0;
}

template <class T>
double rows_cycles_as(const Plan& plan, const RowsPlan& rows, const std::vector<Panel>& panels) {
  const PanelTiles<T>& tiles = panel_tiles<T>(plan.isa);
  double cycles = 0;
  double most_rows = 1;
  for (const Phase& phase : plan.phases) {
    most_rows = std::max(most_rows, static_cast<double>(phase.rows));
    const int64_t pixels = rows.along_images ? rows.images : phase.cols;
    const int64_t other = rows.along_images ? ceil_div(plan.problem.n, rows.images) * phase.cols : plan.problem.n;
    const double lines = static_cast<double>(phase.rows * other);
    const double steps = static_cast<double>(static_cast<int64_t>(phase.taps.size()) * plan.depth());
    const PhaseRuns merged = merge_taps(phase, plan.problem.groups == 1);
    for (const Panel& panel : panels) {
      const auto vectors = static_cast<double>(panel.nr / ukernels<T>(plan.isa).vector_length);
      const bool waits = panel.nr <= ukernels<T>(plan.isa).vector_length &&
                         steps * static_cast<double>(panel.nr) * sizeof(T) > kRowsFilterBytes;
      const double line = panel.dots
                              ? dots_cycles<T>(plan.isa, pixels, panel.nr, static_cast<int64_t>(merged.runs.size()),
                                               merged.taps * plan.depth())
                              : steps * line_cycles(tiles.of(panel.nr), pixels, vectors) * (waits ? kNarrowRows : 1);
      cycles += lines * (kLineCycles + 1.1 * line);
    }
  }
  const int64_t channels = plan.depth() * plan.problem.groups;
  const double tasks = std::ceil(static_cast<double>(plan.problem.n) / static_cast<double>(rows.images)) *
                       std::ceil(most_rows / static_cast<double>(rows.rows));
  const double results = written_pixels(plan) * static_cast<double>(plan.columns() * plan.problem.groups);
  return cycles * static_cast<double>(plan.problem.groups) + converted(plan, results) +
         tasks * static_cast<double>(staged_values(rows, channels)) * kStageCycles +
         filter_cycles(filter_values(plan) * sizeof(T), tasks);
}

}  // namespace

// Copying the taps of a pixel together is only worth it where several share a row; wgrad gathers the activation.
bool gathers(const Plan& plan) {
  const int64_t channels = plan.pass == Pass::dgrad ? plan.problem.k_per_group() : plan.problem.c_per_group();
  return channels < kGatherChannels && plan.problem.taps() > 1;
}

double depthwise_cycles(const Plan& plan) {
  return read_taps(plan) * static_cast<double>(plan.problem.groups) * multiply_add_cycles(plan.isa) +
         plane_cycles(plan.problem);
}

double planar_cycles(const Plan& plan) {
  const ConvProblem& problem = plan.problem;
  const int64_t lanes =
      plan.dtype == DType::float64 ? ukernels<double>(plan.isa).vector_length : ukernels<float>(plan.isa).vector_length;
  // Of a plane's share of a tap: whole vectors, the last of which begins early. The phase of a wgrad is that of fprop.
  double products = 0;
  for (const Phase& phase : plan.phases) {
    products += static_cast<double>(problem.n * phase.rows * round_up(phase.cols, lanes) *
                                    static_cast<int64_t>(phase.taps.size()));
  }
  if (plan.pass == Pass::wgrad) {
    products *= static_cast<double>(problem.k * problem.c_per_group());
  } else {
    const int64_t results = planar_results(plan);
    const int64_t computed = results < kPlanarChannels ? results : round_up(results, int64_t{kPlanarChannels});
    products *= static_cast<double>(planar_groups(plan) * planar_depth(plan) * computed);
  }
  return products * multiply_add_cycles(plan.isa) + plane_cycles(problem);
}

double direct_cycles(const Plan& plan, const Widths& widths) {
  const auto panels = split_columns(plan.columns(), widths);
  const double pixels = written_pixels(plan);
  const double terms = read_taps(plan);
  const double columns = static_cast<double>((panels.back().column + panels.back().nr) * plan.problem.groups);
  const double tap = gathers(plan) ? kCopyCycles : kPointerCycles;
  const double results = pixels * static_cast<double>(plan.columns() * plan.problem.groups);
  return filter_cycles(filter_values(plan) * 4, 1) + converted(plan, results) +
         static_cast<double>(static_cast<int64_t>(plan.phases.size())) * kPhaseCycles +
         terms * static_cast<double>(plan.depth()) * columns * multiply_add_cycles(plan.isa) +
         (kPixelCycles * pixels + tap * terms) * static_cast<double>(panels.size());
}

double rows_cycles(const Plan& plan, const RowsPlan& rows, const std::vector<Panel>& panels) {
  if (plan.dtype == DType::float64) return rows_cycles_as<double>(plan, rows, panels);
  return rows_cycles_as<float>(plan, rows, panels);
}

double split_gather_cycles(const Plan& plan, const SplitPlan& split, bool prepared) {
  const ConvProblem& problem = plan.problem;
  const bool forward = plan.pass == Pass::fprop;
  const double pixels = written_pixels(plan);
  const double source =
      static_cast<double>(forward ? problem.n * problem.h * problem.w : problem.n * problem.p * problem.q);
  const double panels = static_cast<double>(ceil_div(plan.columns(), kTileColumns));
  const double filter = panels * static_cast<double>(plan.depth() * problem.taps() * problem.groups);
  int64_t rows = 1;
  for (const Phase& phase : plan.phases) rows = std::max(rows, phase.rows);
  const double blocks = static_cast<double>(ceil_div(problem.n, split.images) * ceil_div(rows, split.rows));
  const double phases = blocks * static_cast<double>(static_cast<int64_t>(plan.phases.size()) * problem.groups);
  // As packed, whole tiles of it: a phase may have few taps and channels.
  double tiles = 0;
  for (const auto& steps : split.steps) tiles += static_cast<double>(steps.size());
  tiles *= panels * static_cast<double>(split.channel_blocks * split.terms * problem.groups);
  const double cycles = split.steps_issued * kTileCycles + (prepared ? 0 : filter * kPackCycles) +
                        phases * kSplitPhase + filter_cycles(tiles * kTileBytes, blocks) +
                        static_cast<double>(problem.groups) *
                            (pixels * panels * kStoreCycles +
                             source * static_cast<double>(ceil_div(plan.depth(), 16) * split.terms) * kSplitCycles);
  const bool strided = forward && problem.stride_w > 1 && plan.depth() < kTileDepth;
  return kSplitPass + cycles * (strided ? kStridedSplit : 1);
}

double split_wgrad_cycles(const Plan& plan, const SplitWgradPlan& split) {
  const ConvProblem& problem = plan.problem;
  const double grad = static_cast<double>(problem.n * problem.p * problem.q * ceil_div(problem.k, 16));
  const double source = static_cast<double>(problem.n * problem.h * problem.w * ceil_div(problem.c, 16));
  // Sums leave the tiles after fewer steps than in fprop.
  return kSplitPass + 1.4 * split.steps_issued * kTileCycles +
         (grad + source) * static_cast<double>(split.terms) * 3 * kSplitCycles;
}

double transform_factor(Algorithm algorithm, const TransformPlan& transform) {
  if (algorithm == Algorithm::fourier) return 1;
  if (transform.terms == 0) return transform.r == 2 ? kWinograd2Float : 1;
  return transform.r == 2 ? kWinograd2 : kWinograd3;
}

double direct_wgrad_cycles(const Plan& plan, const Widths& widths) {
  const ConvProblem& problem = plan.problem;
  const double pixels = static_cast<double>(problem.n * problem.p * problem.q);
  const double taps = static_cast<double>(problem.taps());
  const double filters = static_cast<double>(problem.k);
  if (plan.algorithm == Algorithm::gathered) {
    const double columns = static_cast<double>(padded(problem.taps() * problem.c_per_group(), widths));
    return pixels * (columns * filters * multiply_add_cycles(plan.isa) +
                     taps * static_cast<double>(problem.groups) * kGatherCycles);
  }
  const double columns = taps * static_cast<double>(padded(problem.c_per_group(), widths));
  const double runs = problem.p * problem.q == 1 ? pixels / kWgradPixels : pixels / static_cast<double>(problem.q);
  const double values = static_cast<double>(problem.n) *
                        static_cast<double>(problem.p * problem.q * problem.k + problem.h * problem.w * problem.c);
  return pixels * columns * filters * multiply_add_cycles(plan.isa) +
         (runs + 1) * taps * std::ceil(filters / 6) * kSegmentCycles +
         (values > 4 * kCacheValues ? values * taps * kMemoryCycles : 0);
}

int64_t rows_wgrad_splits(const ConvProblem& problem, const RowsPlan& rows, int64_t values) {
  const int64_t blocks = ceil_div(problem.n, rows.images) * ceil_div(problem.p, rows.rows);
  const int64_t pixels = problem.n * problem.p * problem.q;
  const int64_t worth = std::max(pixels / kSplitPixels, std::min(pixels / kFirstSplitPixels, kFirstSplits));
  return std::max<int64_t>(std::min({kMostSplits, blocks, kPartialValues / values, worth}), 1);
}

double rows_wgrad_cycles(const Plan& plan, const RowsPlan& rows, const PhaseRuns& merged, const Widths& widths) {
  const ConvProblem& problem = plan.problem;
  const double pixels = static_cast<double>(problem.n * problem.p * problem.q);
  const double units = static_cast<double>(merged.runs.size());
  const int64_t run = merged.taps * problem.c_per_group();
  const bool filter_lanes = takes_filter_lanes(problem, run, widths);
  const double columns = units * static_cast<double>(filter_lanes ? run : padded(run, widths));
  const double filters = static_cast<double>(problem.k);
  const double tasks = static_cast<double>(ceil_div(problem.n, rows.images) * ceil_div(problem.p, rows.rows));
  const double narrow = (filter_lanes ? problem.k : run) <= widths.width[0] ? kNarrowWgrad : 1;
  const double sums = columns * filters;
  const double splits = static_cast<double>(rows_wgrad_splits(problem, rows, static_cast<int64_t>(sums)));
  return pixels * columns * filters * multiply_add_cycles(plan.isa) * narrow +
         pixels / static_cast<double>(problem.q) * units * std::ceil(filters / 6) * kSegmentCycles +
         tasks * static_cast<double>(staged_values(rows, problem.c)) * kStageCycles + splits * sums * kStageCycles +
         (sums > most_resident_sums(plan.isa) ? tasks * sums * kSumCycles : 0);
}

}  // namespace segpose
