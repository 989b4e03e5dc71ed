// SPDX-License-Identifier: BSD-3-Clause
// Plans of the split GEMM on AMX tiles: how the source is packed, which products form a step, how the work is cut.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../common/conv_problem.h"
#include "planes.h"
#include "split_ukernels.h"

namespace segpose {

// Which destination pixels stand in the 16 rows of a tile.
enum class RowTiles {
  columns,  // neighbours in one image row; the last tile of a row overlaps the one before
  line,     // neighbours along the plane, row after row: padding between rows is computed and dropped
  images,   // the same pixel of 16 images: taps that only read padding are skipped
};

// A step of gemm_k: 32 values that start at a pixel of a plane. With a whole block of channels to a pixel they belong
// to one tap; with fewer channels, neighbouring pixels complete them, and those may be taps too.
struct PlaneStep {
  PlaneTap at;
  std::vector<std::pair<int64_t, int64_t>> taps;  // (pixel within the step, tap of the phase)
};

struct SplitPlan {
  int64_t terms = 0;  // 0: not planned
  Planes planes;
  int64_t unit = 32;                          // channels of a pixel in a plane: 32, or a lower power of two
  int64_t channel_blocks = 1;                 // of `unit`, more than one only for 32
  std::vector<std::vector<PlaneStep>> steps;  // [phase]
  RowTiles row_tiles = RowTiles::columns;
  int64_t images = 1, rows = 1;  // of a block of destination pixels
  int64_t column_splits = 1;     // pieces of the columns, tasks of their own
  int64_t chunk_blocks = 1;      // channel blocks between visits to the sums
  int64_t panels = 0;            // of 32 columns, the last one of 16 where that holds what is left
  double steps_issued = 0;       // tile products of the pass

  int64_t panel_tiles(int64_t columns, int64_t panel) const { return columns - panel * 32 > 16 ? 2 : 1; }
};

// wgrad: the pixels of a block stand in a line, [image][height][pitch][inner image], on both sides. Tap t of the filter
// is the sum over positions p of grad[p] * plane[p + shift(t)]. The plane is packed in pairs of positions, a cache line
// each, so that an even shift moves by whole lines; odd shifts read a second copy, paired one position later. With taps
// as columns of one call, 256 filters and channels on 4 maps of 64 x 64 took 14 ms where 20 ms were needed with a
// shifted gradient against 32 channels (one thread, bfloat16): bytes out of L2 decide.
struct SplitWgradPlan {
  int64_t terms = 0;
  Planes planes;
  int64_t inner = 1;             // images side by side, so that small maps fill the steps and shifts are even
  int64_t copies = 1;            // of the planes: 2 where a shift is odd
  int64_t images = 1, rows = 1;  // of a block; images is a multiple of `inner`
  int64_t grad_tiles = 0;        // of 16 filters
  int64_t block_tiles = 0;       // of them, that stay in L2 while all channels pass
  double steps_issued = 0;

  int64_t height() const { return rows + planes.span_h; }
  // Positions of a line, whole steps.
  int64_t positions() const {
    return (images / inner * height() * planes.pitch * inner + kTileDepth - 1) / kTileDepth * kTileDepth;
  }
  int64_t shift(const PlaneTap& tap) const { return (tap.dh * planes.pitch + tap.dw) * inner; }
  int64_t most_shift() const { return (planes.span_h * planes.pitch + planes.span_w) * inner; }
};

SplitWgradPlan plan_split_wgrad(const ConvProblem& problem, const Phase& phase, int64_t terms);

// fprop and dgrad. `columns` and `depth` are those of one group.
SplitPlan plan_split_gather(const ConvProblem& problem, const std::vector<Phase>& phases, int64_t columns,
                            int64_t depth, int64_t source_w, int64_t terms, int64_t threads);

}  // namespace segpose
