// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <sstream>

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
// Winograd: outputs of a tile along an axis; fewer channels than this leave the GEMMs too small.
constexpr int64_t kWinogradM = 4;
constexpr int64_t kWinogradChannels = 16;
// Its costs in multiply-adds: short GEMMs run slower, a transformed value and a transformed weight each cost
// several operations.
constexpr double kWinogradGemm = 1.15;
constexpr double kWinogradTransform = 16;
constexpr double kWinogradFilter = 24;
// Cycles of a destination pixel and of a pointer to a tap's row, for each panel of igemm.
constexpr double kPixelCycles = 10;
constexpr double kPointerCycles = 0.7;
// Cycles of a product of AMX tiles, of writing 16 channels of a pixel, of splitting 16 channels into a term.
constexpr double kTileCycles = 18;
constexpr double kStoreCycles = 4;
constexpr double kSplitCycles = 4;
// Transformed tiles of a block, input and product together, that stay in L2.
constexpr int64_t kWinogradBytes = 768 << 10;
constexpr int64_t kWinogradColumns = 128;
constexpr int64_t kWinogradFilterBytes = 4 << 20;

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

struct Widths {
  int count;
  int64_t width[kMaxWgradTiles];
};

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

// Edge of the phase's taps when they are a dense square at unit stride, else 0. Expects sorted taps.
int64_t dense_edge(const Phase& phase) {
  if (phase.istep_h != 1 || phase.istep_w != 1) return 0;
  int64_t edge = 1;
  while (edge * edge < static_cast<int64_t>(phase.taps.size())) ++edge;
  if (edge * edge != static_cast<int64_t>(phase.taps.size())) return 0;
  for (int64_t i = 0; i < edge * edge; ++i) {
    const Tap& tap = phase.taps[static_cast<size_t>(i)];
    if (tap.off_h != phase.taps.front().off_h + i / edge || tap.off_w != phase.taps.front().off_w + i % edge) return 0;
  }
  return edge;
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

// Cycles of F(4 x 4, r x r) and its r, which is 0 where a phase is no dense square. Transforms cost about
// (n^2 + m^2) * 6 operations a tile and channel on either side, and the filters are transformed on every call.
double winograd_cycles(Plan& plan) {
  const ConvProblem& problem = plan.problem;
  plan.winograd_r = 0;
  if (plan.pass == Pass::wgrad || plan.dtype == DType::float64) return 0;
  if (problem.c_per_group() < kWinogradChannels || problem.k_per_group() < kWinogradChannels) return 0;
  int64_t edge = 0;
  double terms = 0;
  const double channels = static_cast<double>(problem.c_per_group() * problem.k_per_group());
  for (Phase& phase : plan.phases) {
    sort_taps(phase.taps);
    const int64_t phase_edge = dense_edge(phase);
    if (phase_edge == 0 || (edge != 0 && phase_edge != edge) || (phase_edge != 3 && phase_edge != 2)) return 0;
    edge = phase_edge;
    const int64_t n = kWinogradM + edge - 1;
    const double frequencies = static_cast<double>(n * n);
    const double tiles =
        static_cast<double>(problem.n * ceil_div(phase.rows, kWinogradM) * ceil_div(phase.cols, kWinogradM));
    terms += tiles * frequencies * channels * kWinogradGemm;
    terms +=
        tiles * frequencies * kWinogradTransform * static_cast<double>(problem.c_per_group() + problem.k_per_group());
    terms += frequencies * kWinogradFilter * channels;
  }
  plan.winograd_r = edge;
  return terms * static_cast<double>(problem.groups) * multiply_add_cycles(plan.isa);
}

// Cycles of the split GEMM, which is planned here: 0 where the machine has no tiles or the dtype no terms.
double split_cycles(Plan& plan, bool exact) {
  const int64_t terms = split_terms(plan.dtype);
  plan.split = {};
  if (split_ukernels(plan.isa) == nullptr || terms == 0 || (exact && terms > 1) || plan.pass == Pass::wgrad) return 0;
  const ConvProblem& problem = plan.problem;
  const bool forward = plan.pass == Pass::fprop;
  const int64_t source_w = forward ? problem.w : problem.q;
  plan.split = plan_split_gather(problem, plan.phases, plan.columns(), plan.depth(), source_w, terms);
  double pixels = 0;
  for (const Phase& phase : plan.phases) pixels += static_cast<double>(problem.n * phase.rows * phase.cols);
  const double source = static_cast<double>(problem.n * (forward ? problem.h : problem.p) * source_w);
  const double panels = static_cast<double>(ceil_div(plan.columns(), kTileColumns));
  return plan.split.steps_issued * kTileCycles +
         static_cast<double>(problem.groups) *
             (pixels * panels * kStoreCycles +
              source * static_cast<double>(ceil_div(plan.depth(), 16) * terms) * kSplitCycles);
}

double split_wgrad_cycles(Plan& plan, bool exact) {
  const int64_t terms = split_terms(plan.dtype);
  if (split_ukernels(plan.isa) == nullptr || terms == 0 || (exact && terms > 1)) return 0;
  const ConvProblem& problem = plan.problem;
  plan.split_wgrad = plan_split_wgrad(problem, plan.phases.front(), terms);
  const double grad = static_cast<double>(problem.n * problem.p * problem.q * ceil_div(problem.k, 16));
  const double source = static_cast<double>(problem.n * problem.h * problem.w * ceil_div(problem.c, 16));
  return plan.split_wgrad.steps_issued * kTileCycles +
         (grad + source) * static_cast<double>(terms) * 2 * kSplitCycles;
}

// The supported algorithm with the fewest predicted cycles.
void choose_algorithm(Plan& plan, const Widths& widths, bool exact) {
  plan.algorithm = Algorithm::igemm;  // whose columns() and depth() the costs use
  if (is_depthwise(plan.problem) && plan.problem.groups > 1) {
    plan.algorithm = Algorithm::depthwise;
    return;
  }
  if (plan.pass == Pass::wgrad) {
    if (gathers(plan)) plan.algorithm = Algorithm::gathered;
    plan.cycles = 0.5 * plan.problem.flops() * multiply_add_cycles(plan.isa);
    const double split = split_wgrad_cycles(plan, exact);
    if (plan.split_wgrad.terms != 0 && split < plan.cycles) {
      plan.algorithm = Algorithm::split;
      plan.cycles = split;
    }
    return;
  }
  Algorithm best = gathers(plan) ? Algorithm::gathered : Algorithm::igemm;
  plan.cycles = direct_cycles(plan, widths);
  const double winograd = exact ? 0 : winograd_cycles(plan);
  if (plan.winograd_r != 0 && winograd < plan.cycles) {
    best = Algorithm::winograd;
    plan.cycles = winograd;
  }
  const double split = split_cycles(plan, exact);
  if (plan.split.terms != 0 && split < plan.cycles) {
    best = Algorithm::split;
    plan.cycles = split;
  }
  if (best != Algorithm::winograd) plan.winograd_r = 0;
  plan.algorithm = best;
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
  for (const Phase& phase : plan.phases) blocks += ceil_div(plan.problem.n * phase.rows * phase.cols, plan.block_m);
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

void plan_winograd(Plan& plan, int64_t edge) {
  const int64_t n = kWinogradM + edge - 1;
  plan.winograd_m = kWinogradM;
  plan.winograd_r = edge;
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  plan.panels_per_task = std::clamp(kWinogradColumns / plan.panels.front().nr, int64_t{1}, panels);
  const int64_t columns = std::min(kWinogradColumns, plan.padded_columns());
  const int64_t tile_bytes = n * n * (plan.depth() + columns) * 4;
  int64_t most_tiles = 1;
  int64_t blocks = 0;
  for (const Phase& phase : plan.phases) {
    most_tiles =
        std::max(most_tiles, plan.problem.n * ceil_div(phase.rows, kWinogradM) * ceil_div(phase.cols, kWinogradM));
  }
  plan.block_m = std::clamp(kWinogradBytes / tile_bytes / kRowMultiple * kRowMultiple, kRowMultiple, 4 * kRowMultiple);
  // Filters that do not fit in L2 are read once per block: then fewer, larger blocks.
  if (n * n * plan.depth() * plan.padded_columns() * 4 > kWinogradFilterBytes) plan.block_m = 4 * kRowMultiple;
  plan.block_m = std::min(plan.block_m, round_up(most_tiles, kRowMultiple));
  for (const Phase& phase : plan.phases) {
    blocks +=
        ceil_div(plan.problem.n * ceil_div(phase.rows, kWinogradM) * ceil_div(phase.cols, kWinogradM), plan.block_m);
  }
  plan.splits = std::clamp(kMinTasks / std::max<int64_t>(blocks * plan.gemm_groups(), 1), int64_t{1}, panels);
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
    case Algorithm::gathered:
      return "gathered";
    case Algorithm::igemm:
      return "igemm";
  }
  return "unknown";
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

int64_t Plan::padded_columns() const { return panels.empty() ? 0 : panels.back().column + panels.back().nr; }

Plan plan_conv(const ConvProblem& problem, Pass pass, DType dtype, Isa isa, bool exact) {
  Plan plan{};
  plan.problem = problem;
  plan.pass = pass;
  plan.dtype = dtype;
  plan.isa = isa;
  if (pass == Pass::dgrad) {
    plan.phases = dgrad_phases(problem);
  } else {
    plan.phases = {fprop_phase(problem)};
  }
  const bool wide = dtype == DType::float64;
  const int64_t element = wide ? 8 : 4;
  const Widths widths = wide ? gemm_widths<double>(isa) : gemm_widths<float>(isa);
  choose_algorithm(plan, widths, exact);
  if (pass == Pass::wgrad && plan.algorithm == Algorithm::split) {
    plan.block_m = plan.split_wgrad.images * plan.split_wgrad.rows * problem.q;
    plan.k_chunk = plan.block_m;
    plan.splits = 1;
  } else if (pass == Pass::wgrad) {
    plan_wgrad(plan, wide ? wgrad_widths<double>(isa) : wgrad_widths<float>(isa), element);
  } else {
    if (plan.algorithm == Algorithm::split) {
      plan.block_m = plan.split.images * plan.split.rows * plan.split.planes.cols;
      plan.k_chunk = plan.split.chunk_blocks * plan.split.unit;
    } else {
      plan_gather_passes(plan, widths, element);
    }
    if (plan.algorithm == Algorithm::winograd) plan_winograd(plan, plan.winograd_r);
  }
  plan.flops = problem.flops();
  plan.bytes = tensor_bytes(problem, dtype);
  return plan;
}

int64_t split_terms(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return 1;
    case DType::float16:
      return 2;
    case DType::float32:
      return 3;
    case DType::float64:
      return 0;
  }
  return 0;
}

std::string Plan::str() const {
  std::ostringstream out;
  out << pass_name(pass) << ' ' << algorithm_name(algorithm) << ' ' << dtype_name(dtype) << ' ' << isa_name(isa)
      << " phases=" << phases.size() << " panels=" << panels.size();
  if (!panels.empty()) out << 'x' << panels.front().nr;
  if (winograd_r != 0) {
    out << " F(" << winograd_m << 'x' << winograd_m << ',' << winograd_r << 'x' << winograd_r << ')';
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
