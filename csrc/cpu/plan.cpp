// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "ukernels.h"

namespace segpose {
namespace {

// Pixels of a fprop or dgrad block: a multiple of every tile height. 96 rows of partial sums (24 KB at 64 columns) stay
// in L1 or L2 beside the panel.
constexpr int64_t kBlockM = 96;
constexpr int64_t kRowMultiple = 24;
// gemm_k steps between visits to the partial sums; a chunk of B (1024 x 64 floats, 256 KB) stays in L2 while the tiles
// of a block pass over it. 128 to 1024 steps are within 5% of each other; longer chunks save visits.
constexpr int64_t kChunk = 1024;
// Packed panels of a task, so that they survive in L2 from one block of pixels to the next.
constexpr int64_t kPanelBytes = 512 << 10;
// Fewer tasks than this leave threads idle.
constexpr int64_t kMinTasks = 16;
// Below this many channels the row pointers of igemm cost more than copying the taps together.
constexpr int64_t kGatherChannels = 8;
// Reduced pixels of a wgrad block: its rows of x and g stay in L2 for all the tiles that use them.
constexpr int64_t kWgradPixels = 512;
constexpr int64_t kWgradFilters = 96;
constexpr int64_t kWgradTasks = 24;
constexpr int64_t kWgradPartialBytes = 32 << 20;
// Products of one sum over bands of rows, which is not cut into chunks: longer ones would round more than torch's.
constexpr int64_t kRowsSteps = 2048;
// Partial sums of a wgrad over bands of rows.
constexpr int64_t kRowsWgradSplits = 24;
constexpr int64_t kRowsWgradValues = 1 << 20;
// Cycles of copying a tap of a pixel, and of starting a run of pixels in a wgrad tile. Panels of one vector wait for
// loads.
constexpr double kGatherCycles = 7;
constexpr double kSegmentCycles = 12;
constexpr double kNarrowWgrad = 1.8;
// Cycles of a value that comes from memory, or from a filter larger than L2 for every task.
constexpr double kMemoryCycles = 0.25;
constexpr double kFilterCycles = 0.5;
constexpr double kCacheValues = 256 << 10;
// Cycles of a destination pixel and of a pointer to a tap's row, for each panel of igemm.
constexpr double kPixelCycles = 14;
constexpr double kPointerCycles = 0.7;
// Cycles of a product of AMX tiles, of writing 16 channels of a pixel, of splitting 16 channels into a term; and of a
// pass whatever its size.
constexpr double kTileCycles = 24;
constexpr double kStoreCycles = 12;
constexpr double kSplitCycles = 4;
constexpr double kSplitPass = 75e3;
// Fewer channels than a tile is deep, at a stride: pixels are packed one by one.
constexpr double kStridedSplit = 3;
// What the transforms of whole layers took over their predictions, with AMX products in between.
constexpr double kWinograd3 = 1.5;
constexpr double kWinograd2 = 2;
// Of starting a line of tiles, and of staging a value.
constexpr double kLineCycles = 60;
constexpr double kStageCycles = 0.25;
// Of packing 16 values of a filter into tiles.
constexpr double kPackCycles = 25;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Widest panels first, then the narrowest width that holds what is left.
template <class Width>
std::vector<Panel> split_columns(int64_t columns, int widths, const Width& width) {
  std::vector<Panel> panels;
  int64_t column = 0;
  const int64_t widest = width(widths - 1);
  for (; columns - column >= widest; column += widest) panels.push_back({column, widest, widths - 1, widest});
  while (column < columns) {
    int tile = 0;
    while (width(tile) < columns - column && width(tile + 1) <= columns - column) ++tile;
    // One panel with a few idle lanes beats two that each pay for the broadcasts.
    if (width(tile) < columns - column && 8 * (columns - column) >= 5 * width(tile + 1)) ++tile;
    const int64_t valid = std::min(width(tile), columns - column);
    panels.push_back({column, valid, tile, width(tile)});
    column += valid;
  }
  return panels;
}

// dgrad's phases. A single source row reaches each destination row by one tap at most: with a stride larger than all
// distances every row is a phase of its own, and no tap reads padding.
std::vector<Phase> gather_phases(const ConvProblem& problem) {
  ConvProblem apart = problem;
  if (problem.p == 1) apart.stride_h = problem.h + problem.pad_h + problem.r * problem.dilation_h;
  if (problem.q == 1) apart.stride_w = problem.w + problem.pad_w + problem.s * problem.dilation_w;
  return dgrad_phases(apart);
}

struct Widths {
  int count;
  int64_t width[kMaxWgradTiles];
};

template <class T>
Widths rows_widths(Isa isa) {
  const Ukernels<T>& table = ukernels<T>(isa);
  Widths widths{2, {}};
  widths.width[0] = table.rows[table.rows_tiles - 1].nr;
  widths.width[1] = table.rows[0].nr;
  return widths;
}

template <class T>
Widths gemm_widths(Isa isa) {
  const Ukernels<T>& table = ukernels<T>(isa);
  Widths widths{table.gemm_tiles, {}};
  for (int i = 0; i < table.gemm_tiles; ++i) widths.width[i] = table.gemm[i].nr;
  return widths;
}

// wgrad tables are sorted wide to narrow with several heights each; panels name the first of a width.
template <class T>
Widths wgrad_widths(Isa isa) {
  const Ukernels<T>& table = ukernels<T>(isa);
  Widths widths{0, {}};
  for (int i = table.wgrad_tiles - 1; i >= 0; --i) {
    if (widths.count == 0 || widths.width[widths.count - 1] != table.wgrad[i].nr) {
      widths.width[widths.count++] = table.wgrad[i].nr;
    }
  }
  return widths;
}

bool is_depthwise(const ConvProblem& problem) { return problem.c_per_group() == 1 && problem.k_per_group() == 1; }

// Copying the taps of a pixel together is only worth it where several share a row; wgrad gathers the activation.
bool gathers(const Plan& plan) {
  const int64_t channels = plan.pass == Pass::dgrad ? plan.problem.k_per_group() : plan.problem.c_per_group();
  return channels < kGatherChannels && plan.problem.taps() > 1;
}

// Sorted so that the taps of a dense rectangle stand row by row.
void sort_taps(std::vector<Tap>& taps) {
  std::sort(taps.begin(), taps.end(),
            [](const Tap& a, const Tap& b) { return a.off_h != b.off_h ? a.off_h < b.off_h : a.off_w < b.off_w; });
}

// What a multiply-add costs in cycles with vectors of `lanes`, two of them a cycle, at the rate that the GEMMs reach.
double multiply_add_cycles(Isa isa) {
  const double lanes = isa >= Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  return 1.15 / (2 * lanes);
}

double direct_cycles(const Plan& plan, const Widths& widths) {
  const auto panels = split_columns(plan.columns(), widths.count, [&](int i) { return widths.width[i]; });
  double pixels = 0;
  double terms = 0;
  for (const Phase& phase : plan.phases) {
    const double rows = static_cast<double>(plan.problem.n * phase.rows * phase.cols);
    pixels += rows;
    terms += rows * static_cast<double>(phase.taps.size());
  }
  const double columns = static_cast<double>((panels.back().column + panels.back().nr) * plan.problem.groups);
  return terms * static_cast<double>(plan.depth()) * columns * multiply_add_cycles(plan.isa) +
         (kPixelCycles * pixels + kPointerCycles * terms) * static_cast<double>(panels.size());
}

// Steps of a line of tiles: two multiply-adds or two loads a cycle, and sums wait four cycles for themselves.
template <class T>
double line_cycles(Isa isa, int64_t pixels, int64_t width) {
  const Ukernels<T>& table = ukernels<T>(isa);
  double cycles = 0;
  for (int i = 0; i < table.rows_tiles; ++i) {
    const RowsTile<T>& tile = table.rows[i];
    if (tile.nr != width) continue;
    const double vectors = static_cast<double>(tile.nr / table.vector_length);
    const double step = std::max({0.5 * tile.mr * vectors, 0.5 * (tile.mr + vectors), 4.0});
    cycles += static_cast<double>(pixels / tile.mr) * step;
    pixels %= tile.mr;
  }
  return cycles;
}

template <class T>
double rows_cycles(const Plan& plan, const RowsPlan& rows, const std::vector<Panel>& panels) {
  double cycles = 0;
  double most_rows = 1;
  for (const Phase& phase : plan.phases) {
    most_rows = std::max(most_rows, static_cast<double>(phase.rows));
    const int64_t pixels = rows.along_images ? rows.images : phase.cols;
    const int64_t other = rows.along_images ? ceil_div(plan.problem.n, rows.images) * phase.cols : plan.problem.n;
    const double lines = static_cast<double>(phase.rows * other);
    const double steps = static_cast<double>(static_cast<int64_t>(phase.taps.size()) * plan.depth());
    for (const Panel& panel : panels) {
      cycles += lines * (kLineCycles + 1.1 * steps * line_cycles<T>(plan.isa, pixels, panel.nr));
    }
  }
  const int64_t channels = plan.depth() * plan.problem.groups;
  const double tasks = std::ceil(static_cast<double>(plan.problem.n) / static_cast<double>(rows.images)) *
                       std::ceil(most_rows / static_cast<double>(rows.rows));
  const double filter = static_cast<double>(plan.problem.taps() * plan.depth() * plan.columns() * plan.problem.groups);
  return cycles * static_cast<double>(plan.problem.groups) +
         tasks * (static_cast<double>(staged_values(rows, channels)) * kStageCycles +
                  (filter > kCacheValues ? filter * kFilterCycles : 0));
}

// Terms of a split that may be used: 0 where the machine has no tiles, the dtype has no split or a sum must be exact.
int64_t usable_terms(const Plan& plan, Precision precision) {
  if (split_ukernels(plan.isa) == nullptr) return 0;
  const bool exact = precision == Precision::exact;
  switch (plan.dtype) {
    case DType::bfloat16:
      return 1;
    case DType::float16:
      return exact ? 0 : 2;
    case DType::float32:
      return exact ? 0 : precision == Precision::highest ? 3 : precision == Precision::high ? 2 : 1;
    case DType::float64:
      return 0;
  }
  return 0;
}

// Keeps the fewest cycles, or the algorithm that was asked for.
struct Choice {
  Plan& plan;
  const PlanOptions& options;
  bool forced = false;

  bool takes(Algorithm algorithm, double cycles) {
    const bool asked = options.algorithm == algorithm;
    if (forced || (!asked && cycles >= plan.cycles)) return false;
    forced = asked;
    plan.algorithm = algorithm;
    plan.cycles = cycles;
    return true;
  }
};

double split_gather_cycles(const Plan& plan, const SplitPlan& split, bool prepared) {
  const ConvProblem& problem = plan.problem;
  const bool forward = plan.pass == Pass::fprop;
  double pixels = 0;
  for (const Phase& phase : plan.phases) pixels += static_cast<double>(problem.n * phase.rows * phase.cols);
  const double source =
      static_cast<double>(forward ? problem.n * problem.h * problem.w : problem.n * problem.p * problem.q);
  const double panels = static_cast<double>(ceil_div(plan.columns(), kTileColumns));
  const double filter = panels * static_cast<double>(plan.depth() * problem.taps() * problem.groups);
  const double cycles = split.steps_issued * kTileCycles + (prepared ? 0 : filter * kPackCycles) +
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
  if (transform.terms == 0 || algorithm == Algorithm::fourier) return 1;
  return transform.r == 2 ? kWinograd2 : kWinograd3;
}

// Transforms compute in float32 and round more than one bfloat16 term may.
bool may_transform(const Plan& plan, Precision precision) {
  return precision != Precision::exact && plan.dtype != DType::float64 && usable_terms(plan, precision) != 1;
}

// Columns of whole panels.
int64_t padded(int64_t columns, const Widths& widths) {
  const auto panels = split_columns(columns, widths.count, [&](int i) { return widths.width[i]; });
  return panels.back().column + panels.back().nr;
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

double rows_wgrad_cycles(const Plan& plan, const RowsPlan& rows, const PhaseRuns& merged, const Widths& widths) {
  const ConvProblem& problem = plan.problem;
  const double pixels = static_cast<double>(problem.n * problem.p * problem.q);
  const double units = static_cast<double>(merged.runs.size());
  const double columns = units * static_cast<double>(padded(merged.taps * problem.c_per_group(), widths));
  const double filters = static_cast<double>(problem.k);
  const double tasks = static_cast<double>(ceil_div(problem.n, rows.images) * ceil_div(problem.p, rows.rows));
  const double narrow = merged.taps * problem.c_per_group() <= widths.width[0] ? kNarrowWgrad : 1;
  return pixels * columns * filters * multiply_add_cycles(plan.isa) * narrow +
         pixels / static_cast<double>(problem.q) * units * std::ceil(filters / 6) * kSegmentCycles +
         tasks * static_cast<double>(staged_values(rows, problem.c)) * kStageCycles +
         kRowsWgradSplits * columns * filters * kStageCycles;
}

void choose_wgrad(Plan& plan, const Widths& widths, Precision precision, Choice& choice) {
  plan.algorithm = gathers(plan) ? Algorithm::gathered : Algorithm::igemm;
  plan.cycles = direct_wgrad_cycles(plan, widths);
  choice.forced = choice.options.algorithm == plan.algorithm;
  if (plan.problem.n == 0) return;
  const RowsPlan rows = plan_rows(plan.problem, plan.phases, plan.problem.c);
  const PhaseRuns merged = merge_taps(plan.phases.front(), plan.problem.groups == 1);
  if (!rows.along_images && choice.takes(Algorithm::rows, rows_wgrad_cycles(plan, rows, merged, widths))) {
    plan.rows = rows;
  }
  const int64_t terms = usable_terms(plan, precision);
  if (terms > 0) {
    const SplitWgradPlan split = plan_split_wgrad(plan.problem, plan.phases.front(), terms);
    if (choice.takes(Algorithm::split, split_wgrad_cycles(plan, split))) plan.split_wgrad = split;
  }
  if (!may_transform(plan, precision)) return;
  const TransformWgradQuery query{
      &plan.phases.front(),      plan.isa, plan.problem.n, plan.problem.groups, plan.problem.c_per_group(),
      plan.problem.k_per_group()};
  for (const Algorithm algorithm : {Algorithm::winograd, Algorithm::fourier}) {
    const TransformCandidate candidate =
        algorithm == Algorithm::winograd ? plan_winograd_wgrad(query) : plan_fourier_wgrad(query);
    if (candidate.plan.n == 0) continue;
    const double cycles =
        candidate.cycles * (plan.isa == Isa::amx && algorithm == Algorithm::winograd ? kWinograd3 : 1);
    if (choice.takes(algorithm, cycles)) plan.transform = candidate.plan;
  }
}

// The supported algorithm with the fewest predicted cycles.
void choose_algorithm(Plan& plan, const Widths& widths, const PlanOptions& options) {
  Choice choice{plan, options};
  const Precision precision = options.precision;
  if (is_depthwise(plan.problem) && plan.problem.groups > 1) {
    plan.algorithm = Algorithm::depthwise;
    return;
  }
  if (plan.pass == Pass::wgrad) return choose_wgrad(plan, widths, precision, choice);
  plan.algorithm = Algorithm::igemm;  // whose columns() and depth() the costs use
  const double direct = direct_cycles(plan, widths);
  const int64_t columns = plan.columns();
  const int64_t depth = plan.depth();
  plan.algorithm = gathers(plan) ? Algorithm::gathered : Algorithm::igemm;
  plan.cycles = direct;
  choice.forced = options.algorithm == plan.algorithm;
  if (plan.problem.n > 0 && (plan.problem.taps() * depth <= kRowsSteps || options.algorithm == Algorithm::rows)) {
    const bool wide = plan.dtype == DType::float64;
    const RowsPlan rows = plan_rows(plan.problem, plan.phases, depth * plan.problem.groups);
    const Widths rows_width = wide ? rows_widths<double>(plan.isa) : rows_widths<float>(plan.isa);
    const auto panels = split_columns(columns, rows_width.count, [&](int i) { return rows_width.width[i]; });
    const double cycles = wide ? rows_cycles<double>(plan, rows, panels) : rows_cycles<float>(plan, rows, panels);
    if (choice.takes(Algorithm::rows, cycles)) {
      plan.rows = rows;
      plan.panels = panels;
    }
  }
  const int64_t terms = usable_terms(plan, precision);
  // Predicted for one thread, so that the choice does not depend on their number.
  const int64_t source_w = plan.pass == Pass::fprop ? plan.problem.w : plan.problem.q;
  const auto split_for = [&](int64_t threads) {
    return plan_split_gather(plan.problem, plan.phases, columns, depth, source_w, terms, threads);
  };
  if (terms > 0) {
    const SplitPlan split = split_for(1);
    // A step of several taps multiplies neighbours by zero, which turns an infinity into NaN.
    const bool local = split.unit == kTileDepth || precision != Precision::exact;
    if (local) choice.takes(Algorithm::split, split_gather_cycles(plan, split, options.prepared));
  }
  const TransformQuery query{&plan.phases, plan.isa, plan.problem.n, plan.problem.groups,
                             columns,      depth,    terms,          options.prepared};
  if (may_transform(plan, precision)) {
    for (const Algorithm algorithm : {Algorithm::winograd, Algorithm::fourier}) {
      const TransformCandidate candidate =
          algorithm == Algorithm::winograd ? plan_winograd(query) : plan_fourier(query);
      if (candidate.plan.n == 0) continue;
      const double cycles = candidate.cycles * transform_factor(algorithm, candidate.plan);
      if (choice.takes(algorithm, cycles)) plan.transform = candidate.plan;
    }
  }
  if (plan.algorithm == Algorithm::split) {
    plan.split = split_for(options.threads);
  } else if (plan.transforms()) {
    plan.transform = cut_for_threads(plan.transform, query, options.threads);
  }
}

double tensor_bytes(const ConvProblem& problem, DType dtype) {
  const double x = static_cast<double>(problem.n * problem.h * problem.w * problem.c);
  const double y = static_cast<double>(problem.n * problem.p * problem.q * problem.k);
  const double w = static_cast<double>(problem.k * problem.c_per_group() * problem.taps());
  return (x + y + w) * static_cast<double>(dtype_size(dtype));
}

void plan_gather_passes(Plan& plan, const Widths& widths, int64_t element) {
  if (plan.algorithm == Algorithm::depthwise) {
    plan.panels = {{0, plan.columns(), 0, plan.columns()}};
  } else {
    plan.panels = split_columns(plan.columns(), widths.count, [&](int i) { return widths.width[i]; });
  }
  int64_t most_rows = 1;
  int64_t most_taps = 1;
  int64_t blocks = 0;
  for (const Phase& phase : plan.phases) {
    most_rows = std::max(most_rows, plan.problem.n * phase.rows * phase.cols);
    most_taps = std::max(most_taps, static_cast<int64_t>(phase.taps.size()));
  }
  plan.block_m = std::min(kBlockM, round_up(most_rows, kRowMultiple));
  const auto count_blocks = [&] {
    blocks = 0;
    for (const Phase& phase : plan.phases) blocks += ceil_div(plan.problem.n * phase.rows * phase.cols, plan.block_m);
  };
  for (count_blocks(); blocks < kMinTasks && plan.block_m > kRowMultiple; count_blocks()) {
    plan.block_m = round_up(plan.block_m / 2, kRowMultiple);
  }
  plan.k_chunk = kChunk;
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  const int64_t panel_bytes = most_taps * plan.depth() * plan.panels.front().nr * element;
  plan.panels_per_task = std::clamp(kPanelBytes / std::max<int64_t>(panel_bytes, 1), int64_t{1}, panels);
  int64_t all_taps = 0;
  for (Phase& phase : plan.phases) {
    all_taps += static_cast<int64_t>(phase.taps.size());
    // More taps than pixels: most taps of a pixel are padding.
    phase.batch_inner = static_cast<int64_t>(phase.taps.size()) >= phase.rows * phase.cols && plan.problem.n > 1;
  }
  plan.phases_together = all_taps * panel_bytes / most_taps * plan.panels_per_task <= kPanelBytes;
  while (plan.panels_per_task > 1 && blocks * plan.gemm_groups() * ceil_div(panels, plan.panels_per_task) < kMinTasks) {
    plan.panels_per_task = ceil_div(plan.panels_per_task, 2);
  }
}

void plan_rows_wgrad(Plan& plan, const Widths& widths) {
  const ConvProblem& problem = plan.problem;
  const PhaseRuns merged = merge_taps(plan.phases.front(), problem.groups == 1);
  plan.panels =
      split_columns(merged.taps * problem.c_per_group(), widths.count, [&](int i) { return widths.width[i]; });
  const int64_t values = problem.k * static_cast<int64_t>(merged.runs.size()) * plan.padded_columns();
  const int64_t blocks = ceil_div(problem.n, plan.rows.images) * ceil_div(problem.p, plan.rows.rows);
  plan.splits = std::min({kRowsWgradSplits, blocks, std::max<int64_t>(kRowsWgradValues / values, 1)});
  plan.k_block = problem.k_per_group();
  plan.block_m = plan.rows.images * plan.rows.rows * problem.q;
  plan.k_chunk = plan.block_m;
}

void plan_wgrad(Plan& plan, const Widths& widths, int64_t element) {
  const ConvProblem& problem = plan.problem;
  const bool gathered = plan.algorithm == Algorithm::gathered;
  const bool depthwise = plan.algorithm == Algorithm::depthwise;
  if (depthwise) {
    plan.panels = {{0, problem.groups, 0, problem.groups}};
  } else {
    const int64_t columns = problem.c_per_group() * (gathered ? problem.taps() : 1);
    plan.panels = split_columns(columns, widths.count, [&](int i) { return widths.width[i]; });
  }
  const int64_t pixels = problem.n * problem.p * problem.q;
  plan.block_m = std::clamp<int64_t>(pixels, 1, kWgradPixels);
  plan.k_block = std::min(problem.k_per_group(), gathered ? problem.k_per_group() : kWgradFilters);
  const int64_t units = gathered ? 1 : problem.taps();
  const int64_t tasks = plan.gemm_groups() * ceil_div(problem.k_per_group(), plan.k_block) * units;
  const int64_t partial = plan.gemm_groups() * problem.k_per_group() * units * plan.padded_columns() * element;
  const int64_t most = std::min(ceil_div(pixels, plan.block_m), std::max<int64_t>(kWgradPartialBytes / partial, 1));
  plan.splits = std::clamp(ceil_div(kWgradTasks, tasks), int64_t{1}, std::max<int64_t>(most, 1));
  plan.k_chunk = plan.block_m;
}

}  // namespace

const char* algorithm_name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::depthwise:
      return "depthwise";
    case Algorithm::split:
      return "split";
    case Algorithm::winograd:
      return "winograd";
    case Algorithm::fourier:
      return "fourier";
    case Algorithm::rows:
      return "rows";
    case Algorithm::gathered:
      return "gathered";
    case Algorithm::igemm:
      return "igemm";
  }
  return "unknown";
}

const char* precision_name(Precision precision) {
  constexpr const char* kNames[] = {"exact", "highest", "high", "medium"};
  return kNames[static_cast<int>(precision)];
}

Precision parse_precision(const std::string& name) {
  for (const Precision p : {Precision::exact, Precision::highest, Precision::high, Precision::medium}) {
    if (name == precision_name(p)) return p;
  }
  throw std::invalid_argument("precision must be exact, highest, high or medium, got '" + name + "'");
}

std::optional<Algorithm> parse_algorithm(const std::string& name) {
  if (name.empty()) return std::nullopt;
  std::string valid;
  for (const Algorithm algorithm : {Algorithm::depthwise, Algorithm::split, Algorithm::winograd, Algorithm::fourier,
                                    Algorithm::rows, Algorithm::gathered, Algorithm::igemm}) {
    if (name == algorithm_name(algorithm)) return algorithm;
    valid += valid.empty() ? algorithm_name(algorithm) : std::string(", ") + algorithm_name(algorithm);
  }
  throw std::invalid_argument("algorithm must be one of " + valid + ", got '" + name + "'");
}

const char* pass_name(Pass pass) { return pass == Pass::fprop ? "fprop" : pass == Pass::dgrad ? "dgrad" : "wgrad"; }

int64_t Plan::columns() const {
  if (algorithm == Algorithm::depthwise) return problem.groups;
  return pass == Pass::fprop ? problem.k_per_group() : problem.c_per_group();
}

int64_t Plan::depth() const {
  if (algorithm == Algorithm::depthwise) return 1;
  return pass == Pass::fprop ? problem.c_per_group() : problem.k_per_group();
}

int64_t Plan::padded_columns() const {
  if (algorithm == Algorithm::split) return split.panels * 2 * kTileColumns;
  if (packs_source()) return transform.panels * transform.panel_columns;
  return panels.empty() ? 0 : panels.back().column + panels.back().nr;
}

Plan plan_conv(const ConvProblem& problem, Pass pass, DType dtype, Isa isa, const PlanOptions& options) {
  Plan plan{};
  plan.problem = problem;
  plan.pass = pass;
  plan.dtype = dtype;
  plan.isa = isa;
  if (pass == Pass::dgrad) {
    plan.phases = gather_phases(problem);
  } else {
    plan.phases = {fprop_phase(problem)};
  }
  for (Phase& phase : plan.phases) sort_taps(phase.taps);
  const bool wide = dtype == DType::float64;
  const int64_t element = wide ? 8 : 4;
  const Widths widths = wide ? gemm_widths<double>(isa) : gemm_widths<float>(isa);
  choose_algorithm(plan,
                   pass != Pass::wgrad ? widths
                   : wide              ? wgrad_widths<double>(isa)
                                       : wgrad_widths<float>(isa),
                   options);
  if (pass == Pass::wgrad && plan.algorithm == Algorithm::split) {
    plan.block_m = plan.split_wgrad.images * plan.split_wgrad.rows * problem.q;
    plan.k_chunk = plan.block_m;
    plan.splits = 1;
  } else if (pass == Pass::wgrad && plan.packs_source()) {
    plan.block_m = plan.transform.tiles;
    plan.k_chunk = plan.block_m;
    plan.splits = 1;
  } else if (pass == Pass::wgrad && plan.algorithm == Algorithm::rows) {
    plan_rows_wgrad(plan, wide ? wgrad_widths<double>(isa) : wgrad_widths<float>(isa));
  } else if (pass == Pass::wgrad) {
    plan_wgrad(plan, wide ? wgrad_widths<double>(isa) : wgrad_widths<float>(isa), element);
  } else {
    if (plan.algorithm == Algorithm::split) {
      plan.block_m = plan.split.images * plan.split.rows * plan.split.planes.cols;
      plan.k_chunk = plan.split.chunk_blocks * plan.split.unit;
    } else if (plan.packs_source()) {
      plan.block_m = plan.transform.tiles;
      plan.k_chunk = plan.depth();
    } else if (plan.algorithm == Algorithm::rows) {
      plan.block_m = plan.rows.images * plan.rows.rows;
      plan.k_chunk = plan.depth();
    } else {
      plan_gather_passes(plan, widths, element);
    }
  }
  plan.flops = problem.flops();
  plan.bytes = tensor_bytes(problem, dtype);
  return plan;
}

std::string Plan::str() const {
  std::ostringstream out;
  out << pass_name(pass) << ' ' << algorithm_name(algorithm) << ' ' << dtype_name(dtype) << ' ' << isa_name(isa)
      << " phases=" << phases.size() << " panels=" << panels.size();
  if (!panels.empty()) out << 'x' << panels.front().nr;
  if (algorithm == Algorithm::winograd || algorithm == Algorithm::fourier) {
    out << (algorithm == Algorithm::winograd ? " F(" : " DFT(") << transform.m << 'x' << transform.m << ','
        << transform.r << 'x' << transform.r << ") terms=" << transform.terms << " group=" << transform.group_panels
        << 'x' << transform.panel_columns << " columns/" << transform.column_splits;
  }
  if (algorithm == Algorithm::rows) {
    out << (rows.along_images ? " along=images" : " along=columns") << " images=" << rows.images
        << " rows=" << rows.rows;
  }
  if (algorithm == Algorithm::split && pass == Pass::wgrad) {
    out << " terms=" << split_wgrad.terms << " inner=" << split_wgrad.inner << " images=" << split_wgrad.images
        << " rows=" << split_wgrad.rows;
  } else if (algorithm == Algorithm::split) {
    const char* const names[] = {"columns", "line", "images"};
    out << " terms=" << split.terms << " tiles=" << names[static_cast<int>(split.row_tiles)]
        << " images=" << split.images << " rows=" << split.rows << " columns/" << split.column_splits;
  }
  out << " block_m=" << block_m << " k_chunk=" << k_chunk;
  if (pass == Pass::wgrad) {
    out << " k_block=" << k_block << " splits=" << splits;
  } else {
    out << " panels_per_task=" << panels_per_task;
  }
  out << " gflop=" << flops * 1e-9 << " mbytes=" << bytes * 1e-6;
  return out.str();
}

}  // namespace segpose
