// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "../common/integers.h"
#include "costs.h"
#include "panels.h"
#include "planar_plan.h"
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
constexpr int64_t kWgradFilters = 96;
constexpr int64_t kWgradTasks = 24;
// Of the gradient, for each of which a depthwise wgrad has sums of its own.
constexpr int64_t kDepthwiseSplitValues = 32 << 10;
// A wgrad reads copies of its pixels where they lie so far apart and so many filters and channels share the copies:
// what a tile reads of a block of pixels, all panels at a time, and the filters that share them.
constexpr int64_t kSpreadBytes = 512;
constexpr int64_t kSharedColumns = 64;
constexpr int64_t kPackedTileBytes = 36 << 10;
constexpr int64_t kPackedPanelBytes = 128 << 10;
constexpr int64_t kPackedFilters = 256;
constexpr int64_t kWgradPartialBytes = 32 << 20;
// Products of one sum over bands of rows, which is not cut into chunks: longer ones would round more than torch's.
constexpr int64_t kRowsSteps = 2048;
// What the wgrad of whole layers took over its prediction, beside AMX.
constexpr double kWinogradWgrad = 1.5;

// dgrad's phases. A single source row reaches each destination row by one tap at most: with a stride larger than all
// distances every row is a phase of its own, and no tap reads padding.
std::vector<Phase> gather_phases(const ConvProblem& problem) {
  ConvProblem apart = problem;
  if (problem.p == 1) apart.stride_h = problem.h + problem.pad_h + problem.r * problem.dilation_h;
  if (problem.q == 1) apart.stride_w = problem.w + problem.pad_w + problem.s * problem.dilation_w;
  return dgrad_phases(apart);
}

bool is_depthwise(const ConvProblem& problem) { return problem.c_per_group() == 1 && problem.k_per_group() == 1; }

// Sorted so that the taps of a dense rectangle stand row by row.
void sort_taps(std::vector<Tap>& taps) {
  std::sort(taps.begin(), taps.end(),
            [](const Tap& a, const Tap& b) { return a.off_h != b.off_h ? a.off_h < b.off_h : a.off_w < b.off_w; });
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

// Planes take the place of whichever direct algorithm there is, but must not make another one look better.
void consider_planes(Plan& plan) {
  plan.may_be_planar = may_run_planar(plan);
  if (plan.may_be_planar) plan.cycles = std::min(plan.cycles, planar_cycles(plan));
}

// Transforms compute in float32 and round more than one bfloat16 term may.
bool may_transform(const Plan& plan, Precision precision) {
  return precision != Precision::exact && plan.dtype != DType::float64 && usable_terms(plan, precision) != 1;
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
  consider_planes(plan);
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
        candidate.cycles * (plan.isa == Isa::amx && algorithm == Algorithm::winograd ? kWinogradWgrad : 1);
    if (choice.takes(algorithm, cycles)) plan.transform = candidate.plan;
  }
}

// The supported algorithm with the fewest predicted cycles.
void choose_algorithm(Plan& plan, const Widths& widths, const PlanOptions& options) {
  Choice choice{plan, options};
  const Precision precision = options.precision;
  if (is_depthwise(plan.problem) && plan.problem.groups > 1) {
    plan.algorithm = Algorithm::depthwise;
    plan.cycles = depthwise_cycles(plan);
    plan.may_be_planar = may_run_planar(plan);
    return;
  }
  if (plan.pass == Pass::wgrad) return choose_wgrad(plan, widths, precision, choice);
  plan.algorithm = Algorithm::igemm;  // whose columns() and depth() the costs use
  const double direct = direct_cycles(plan, widths);
  const int64_t columns = plan.columns();
  const int64_t depth = plan.depth();
  plan.algorithm = gathers(plan) ? Algorithm::gathered : Algorithm::igemm;
  plan.cycles = direct;
  plan.panels = split_columns(columns, widths);
  choice.forced = options.algorithm == plan.algorithm;
  if (plan.problem.n > 0 && (plan.most_taps() * depth <= kRowsSteps || options.algorithm == Algorithm::rows)) {
    const bool wide = plan.dtype == DType::float64;
    const RowsPlan rows = plan_rows(plan.problem, plan.phases, depth * plan.problem.groups);
    const Widths rows_width = wide ? rows_widths<double>(plan.isa) : rows_widths<float>(plan.isa);
    std::vector<Panel> panels = split_columns(columns, rows_width);
    double cycles = rows_cycles(plan, rows, panels);
    const int64_t dots = wide ? dots_columns<double>(plan.isa, columns) : dots_columns<float>(plan.isa, columns);
    if (dots > 0) {
      const std::vector<Panel> with_dots = split_dots(columns, dots, rows_width);
      const double dots_cycles = rows_cycles(plan, rows, with_dots);
      if (dots_cycles < cycles) {
        panels = with_dots;
        cycles = dots_cycles;
      }
    }
    if (choice.takes(Algorithm::rows, cycles)) {
      plan.rows = rows;
      set_spans(plan.rows, plan.problem, plan.phases, depth);
      plan.panels = panels;
    }
  }
  consider_planes(plan);
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
    plan.panels = split_columns(plan.columns(), widths);
  }
  int64_t most_rows = 1;
  const int64_t most_taps = plan.most_taps();
  int64_t blocks = 0;
  for (const Phase& phase : plan.phases) {
    most_rows = std::max(most_rows, plan.problem.n * phase.rows * phase.cols);
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
  const int64_t columns = merged.taps * problem.c_per_group();
  plan.filter_lanes = takes_filter_lanes(problem, columns, widths);
  plan.panels = split_columns(plan.filter_lanes ? problem.k : columns, widths);
  const int64_t units = static_cast<int64_t>(merged.runs.size());
  const int64_t values = units * (plan.filter_lanes ? columns : problem.k) * plan.padded_columns();
  plan.splits = rows_wgrad_splits(problem, plan.rows, values);
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
    plan.panels = split_columns(columns, widths);
  }
  const int64_t pixels = problem.n * problem.p * problem.q;
  plan.block_m = std::clamp<int64_t>(pixels, 1, kWgradPixels);
  if (depthwise) {
    plan.k_block = 1;
    plan.k_chunk = plan.block_m;
    const int64_t fitting = kWgradPartialBytes / (problem.taps() * problem.groups * element);
    const int64_t most = std::clamp<int64_t>(std::min(problem.n * problem.p, fitting), 1, kWgradTasks);
    plan.splits = std::clamp<int64_t>(pixels * problem.groups / kDepthwiseSplitValues, 1, most);
    return;
  }
  plan.k_block = std::min(problem.k_per_group(), gathered ? problem.k_per_group() : kWgradFilters);
  plan.packs_pixels = plan.algorithm == Algorithm::igemm &&
                      std::min(problem.c_per_group(), problem.k_per_group()) >= kSharedColumns &&
                      std::max(problem.c, problem.k) * element >= kSpreadBytes;
  if (plan.packs_pixels) {
    constexpr int64_t kMostTileFilters = 8;
    const int64_t nr = plan.panels.front().nr;
    const int64_t most = kPackedTileBytes / ((nr + kMostTileFilters) * element) / kRowMultiple * kRowMultiple;
    plan.block_m = std::min(plan.block_m, most);
    plan.k_block = std::min(problem.k_per_group(), kPackedFilters);
    plan.panels_per_task = std::clamp<int64_t>(kPackedPanelBytes / (plan.block_m * nr * element), 1,
                                               static_cast<int64_t>(plan.panels.size()));
  }
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

Pass parse_pass(const std::string& name) {
  for (const Pass pass : {Pass::fprop, Pass::dgrad, Pass::wgrad}) {
    if (name == pass_name(pass)) return pass;
  }
  throw std::invalid_argument("op must be fprop, dgrad or wgrad, got '" + name + "'");
}

DType parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got '" + name + "'");
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

int64_t Plan::most_taps() const {
  size_t most = 1;
  for (const Phase& phase : phases) most = std::max(most, phase.taps.size());
  return static_cast<int64_t>(most);
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
  if (plan.packs_source()) {
    plan.may_be_planar = false;
    plan.panels.clear();
  } else if (plan.may_be_planar && plan.algorithm != Algorithm::depthwise) {
    plan.cycles = planar_cycles(plan);
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
  if (may_be_planar) out << " planes";
  out << " block_m=" << block_m << " k_chunk=" << k_chunk;
  if (pass == Pass::wgrad) {
    out << " k_block=" << k_block << " splits=" << splits << (packs_pixels ? " packed" : "");
  } else {
    out << " panels_per_task=" << panels_per_task;
  }
  out << " gflop=" << flops * 1e-9 << " mbytes=" << bytes * 1e-6;
  return out.str();
}

}  // namespace segpose
