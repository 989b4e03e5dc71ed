// SPDX-License-Identifier: BSD-3-Clause
#include "rows_plan.h"

#include <algorithm>

#include "../common/integers.h"

namespace segpose {
namespace {

// Staged values of a task: 128 KB of floats, which stay in L2 beside a panel of the filter; more where rows are so long
// that a task would stage mostly rows that its neighbours stage too.
constexpr int64_t kStagedValues = 32 << 10;
constexpr int64_t kMostStagedValues = 128 << 10;
// Fewer tasks leave threads idle at the end; smaller ones stage more padding.
constexpr int64_t kTasks = 16;
// Maps narrower than this fill tiles with images instead.
constexpr int64_t kNarrow = 4;
// Images side by side: the height of a tile (see Ukernels::rows).
constexpr int64_t kImageTile = 7;

}  // namespace

PhaseRuns merge_taps(const Phase& phase, bool adjacent_channels) {
  const std::vector<Tap>& taps = phase.taps;
  size_t length = 1;
  if (adjacent_channels) {
    while (length < taps.size() && taps[length].off_h == taps[0].off_h &&
           taps[length].off_w == taps[length - 1].off_w + 1)
      ++length;
    // The taps of a phase are the product of its rows and columns, so that all rows merge alike or none does.
    if (length < taps.size() && taps[length].off_h == taps[0].off_h) length = 1;
  }
  PhaseRuns merged{{}, static_cast<int64_t>(length)};
  for (size_t i = 0; i < taps.size(); i += length) merged.runs.push_back({taps[i].off_h, taps[i].off_w});
  return merged;
}

RowsPlan plan_rows(const ConvProblem& problem, const std::vector<Phase>& phases, int64_t channels) {
  RowsPlan plan{};
  int64_t high_h = 0, high_w = 0, cols = 1, rows = 1, col_step = 1;
  bool first = true;
  plan.row_step = 1;
  for (const Phase& phase : phases) {
    rows = std::max(rows, phase.rows);
    cols = std::max(cols, phase.cols);
    plan.row_step = phase.istep_h;
    col_step = phase.istep_w;
    for (const Tap& tap : phase.taps) {
      plan.low_h = first ? tap.off_h : std::min(plan.low_h, tap.off_h);
      plan.low_w = first ? tap.off_w : std::min(plan.low_w, tap.off_w);
      high_h = first ? tap.off_h : std::max(high_h, tap.off_h);
      high_w = first ? tap.off_w : std::max(high_w, tap.off_w);
      first = false;
    }
  }
  plan.along_images = cols < kNarrow && problem.n >= kNarrow;
  plan.staged_w = (cols - 1) * col_step + high_w - plan.low_w + 1;
  const auto values = [&](int64_t images, int64_t band) {
    return images * ((band - 1) * plan.row_step + high_h - plan.low_h + 1) * plan.staged_w * channels;
  };
  plan.rows = rows;
  const auto too_many = [&](int64_t band) {
    const bool shared = band * plan.row_step <= 2 * (high_h - plan.low_h);
    return values(1, band) > (shared ? kMostStagedValues : kStagedValues);
  };
  while (plan.rows > 1 && too_many(plan.rows)) plan.rows = ceil_div(plan.rows, 2);
  while (plan.rows > 4 && problem.n * ceil_div(rows, plan.rows) < kTasks) plan.rows = ceil_div(plan.rows, 2);
  plan.images = 1;
  if (plan.along_images) {
    plan.images = std::min(problem.n, kImageTile);
  } else if (plan.rows == rows) {
    while (2 * plan.images * kTasks <= problem.n && values(2 * plan.images, rows) <= kStagedValues) plan.images *= 2;
  }
  plan.staged_h = (plan.rows - 1) * plan.row_step + high_h - plan.low_h + 1;
  return plan;
}

void set_spans(RowsPlan& plan, const ConvProblem& problem, const std::vector<Phase>& phases, int64_t depth) {
  for (const Phase& phase : phases) {
    const PhaseRuns merged = merge_taps(phase, problem.groups == 1);
    plan.phases.push_back(
        {static_cast<int64_t>(plan.offsets.size()), static_cast<int64_t>(merged.runs.size()), merged.taps * depth});
    for (const Run& run : merged.runs) plan.offsets.push_back(run_offset(plan, run, depth * problem.groups));
  }
}

}  // namespace segpose
