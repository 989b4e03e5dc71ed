// SPDX-License-Identifier: BSD-3-Clause
// Few channels: bands of the source with their padding around them lie in L1 or L2, and every tap reads them in place.
// Neighbouring taps of a row are one run of values, and the pixels of a row lie at equal distances, so that nothing is
// gathered and no pointer is looked up.
#pragma once

#include <vector>

#include "../common/conv_problem.h"
#include "../common/phases.h"

namespace segpose {

// The runs of values that a pixel of a phase reads.
struct PhaseSpan {
  int64_t first, count;  // of the plan's offsets
  int64_t depth;         // values of a run
};

struct RowsPlan {
  int64_t images, rows;        // of a task: images, and rows of each phase
  bool along_images;           // a tile's pixels are those of several images, not of one row
  int64_t low_h, low_w;        // the first source row and column that the phases' first pixels read
  int64_t staged_h, staged_w;  // rows and columns of one staged image, padding included
  int64_t row_step;            // source rows from one phase row to the next
  // Of fprop and dgrad, from the value that phase row and column 0 of the first image would read at (low_h, low_w).
  std::vector<int64_t> offsets;
  std::vector<PhaseSpan> phases;
};

// Taps that read one run of values, in the order in which the filter is packed: as many in each run of a phase.
struct Run {
  int64_t off_h, off_w;
};

struct PhaseRuns {
  std::vector<Run> runs;
  int64_t taps;  // of each run
};

PhaseRuns merge_taps(const Phase& phase, bool adjacent_channels);

// `channels` counts those of a source pixel, in all groups; `phases` share one band.
RowsPlan plan_rows(const ConvProblem& problem, const std::vector<Phase>& phases, int64_t channels);

// Sets offsets and phases, those of the first group, whose taps are `depth` values long.
void set_spans(RowsPlan& plan, const ConvProblem& problem, const std::vector<Phase>& phases, int64_t depth);

// Where a run starts, from the value that phase row and column 0 of the first image would read at (low_h, low_w).
inline int64_t run_offset(const RowsPlan& plan, const Run& run, int64_t channels) {
  return ((run.off_h - plan.low_h) * plan.staged_w + run.off_w - plan.low_w) * channels;
}

// Values that a task stages.
inline int64_t staged_values(const RowsPlan& plan, int64_t channels) {
  return plan.images * plan.staged_h * plan.staged_w * channels;
}

}  // namespace segpose
