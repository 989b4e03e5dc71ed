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
// gemm_k steps between visits to the partial sums; a chunk of B (1024 x 64 floats, 256 KB) stays in L2 while the tiles of
// a block pass over it. 128 to 1024 steps are within 5% of each other; longer chunks save visits.
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

bool supports(Algorithm algorithm, const Plan& plan) {
  switch (algorithm) {
    case Algorithm::depthwise:
      return is_depthwise(plan.problem) && plan.problem.groups > 1;
    case Algorithm::gathered: {
      // Only worth it where several taps share a row; wgrad gathers the activation, whatever the pass before it.
      const int64_t channels = plan.pass == Pass::dgrad ? plan.problem.k_per_group() : plan.problem.c_per_group();
      return channels < kGatherChannels && plan.problem.taps() > 1;
    }
    case Algorithm::igemm:
      return true;
  }
  return false;
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
  const int64_t partial =
      plan.gemm_groups() * problem.k_per_group() * units * plan.padded_columns() * element;
  const int64_t most = std::min(ceil_div(pixels, plan.block_m), std::max<int64_t>(kWgradPartialBytes / partial, 1));
  plan.splits = std::clamp(ceil_div(kWgradTasks, tasks), int64_t{1}, std::max<int64_t>(most, 1));
  plan.k_chunk = plan.block_m;
}

}  // namespace

const char* algorithm_name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::depthwise:
      return "depthwise";
    case Algorithm::gathered:
      return "gathered";
    case Algorithm::igemm:
      return "igemm";
  }
  return "unknown";
}

const char* pass_name(Pass pass) {
  return pass == Pass::fprop ? "fprop" : pass == Pass::dgrad ? "dgrad" : "wgrad";
}

int64_t Plan::columns() const {
  if (algorithm == Algorithm::depthwise) return problem.groups;
  return pass == Pass::fprop ? problem.k_per_group() : problem.c_per_group();
}

int64_t Plan::depth() const {
  if (algorithm == Algorithm::depthwise) return 1;
  return pass == Pass::fprop ? problem.c_per_group() : problem.k_per_group();
}

int64_t Plan::padded_columns() const { return panels.empty() ? 0 : panels.back().column + panels.back().nr; }

Plan plan_conv(const ConvProblem& problem, Pass pass, DType dtype, Isa isa) {
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
  for (const Algorithm candidate : {Algorithm::depthwise, Algorithm::gathered, Algorithm::igemm}) {
    plan.algorithm = candidate;
    if (supports(candidate, plan)) break;
  }
  const bool wide = dtype == DType::float64;
  const int64_t element = wide ? 8 : 4;
  if (pass == Pass::wgrad) {
    plan_wgrad(plan, wide ? wgrad_widths<double>(isa) : wgrad_widths<float>(isa), element);
  } else {
    plan_gather_passes(plan, wide ? gemm_widths<double>(isa) : gemm_widths<float>(isa), element);
  }
  plan.flops = problem.flops();
  plan.bytes = tensor_bytes(problem, dtype);
  return plan;
}

std::string Plan::str() const {
  std::ostringstream out;
  out << pass_name(pass) << ' ' << algorithm_name(algorithm) << ' ' << dtype_name(dtype) << " __" << isa_name(isa)
      << " phases=" << phases.size() << " panels=" << panels.size();
  if (!panels.empty()) out << 'x' << panels.front().nr;
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
