// SPDX-License-Identifier: BSD-3-Clause
// Plans of convolution in a transformed domain: which transform, how many tiles and columns a block has.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/phases.h"
#include "transform_ukernels.h"

namespace segpose {

struct TransformPlan {
  int64_t n = 0;  // edge of a tile's inputs; 0: not planned
  int64_t m = 0;  // edge of its outputs
  int64_t r = 0;  // edge of the filter
  int64_t frequencies = 0, parts = 1;
  int64_t codelet = 0;  // index into TransformUkernels::codelets
  // wgrad: the codelet that takes the gradient for a filter and gives the taps, the channels and filters of a task, and
  // the pieces of the tiles, whose sums are added in order.
  int64_t adjoint = 0;
  int64_t channel_block = 0, filter_block = 0;
  int64_t tile_splits = 1;
  int64_t terms = 0;  // of a split GEMM, or 0 for float
  int64_t tiles = 0;  // of a block, whole tiles of rows
  int64_t panel_columns = 0;
  int64_t panels = 0;
  int64_t group_panels = 0;   // whose products stand side by side before they are transformed back
  int64_t column_splits = 1;  // pieces of the panels, tasks of their own: each transforms the input again
};

// The shapes that compete.
struct TransformQuery {
  const std::vector<Phase>* phases;
  Isa isa;
  int64_t images, groups, columns, depth;
  int64_t terms;  // of a split GEMM where the machine has one, else 0
  bool prepared;  // the filter is transformed once and for all: its cost does not count
  int64_t threads = 1;
};

struct TransformCandidate {
  TransformPlan plan;
  double cycles = 0;
};

// The fastest Winograd and Fourier plans, n = 0 where there is none. Every phase must be a dense square of the same
// edge at unit stride; the taps of the phases must be sorted by row and column.
TransformCandidate plan_winograd(const TransformQuery& query);
TransformCandidate plan_fourier(const TransformQuery& query);

// The fastest wgrad, over the phase of the forward convolution.
struct TransformWgradQuery {
  const Phase* phase;
  Isa isa;
  int64_t images, groups, channels, filters;
};

TransformCandidate plan_winograd_wgrad(const TransformWgradQuery& query);
TransformCandidate plan_fourier_wgrad(const TransformWgradQuery& query);

// The same transform with its work cut for so many threads.
TransformPlan cut_for_threads(const TransformPlan& plan, TransformQuery query, int64_t threads);

}  // namespace segpose
