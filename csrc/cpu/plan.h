// SPDX-License-Identifier: BSD-3-Clause
// problem -> plan: which algorithm runs, with which tiles and blocks. Pure, so it is tested and printed without
// running.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../common/conv_problem.h"
#include "../common/phases.h"
#include "cpu_features.h"
#include "dtype.h"
#include "rows_plan.h"
#include "split_plan.h"
#include "transform_plan.h"

namespace segpose {

// Those that support a problem compete by their predicted cycles.
enum class Algorithm {
  depthwise,  // one channel per group on both sides: vectors over channels, no GEMM
  split,      // GEMM on AMX tiles of bfloat16, of one to three terms a value
  winograd,   // dense 3 x 3 or 2 x 2 taps at unit stride: F(4 x 4, r x r) tiles, 4 or 2.56 times fewer multiplications
  fourier,    // larger dense squares: n x n tiles
  rows,       // few channels: direct sums over staged bands of rows
  gathered,   // few channels: copy each pixel's taps into one row, then GEMM over taps * channels
  igemm,      // implicit GEMM through row pointers; supports everything
};

const char* algorithm_name(Algorithm algorithm);
const char* pass_name(Pass pass);

// Columns of one GEMM that share a microkernel width; the last one may be ragged.
struct Panel {
  int64_t column;   // first column within the group
  int64_t columns;  // valid columns, <= nr
  int tile;         // index into Ukernels::gemm, or width class of Ukernels::wgrad
  int64_t nr;
  bool dots = false;  // rows: vectors along the values that are summed, for a few columns
};

struct Plan {
  ConvProblem problem;
  Pass pass;
  DType dtype;
  Isa isa;
  Algorithm algorithm;
  std::vector<Phase> phases;  // fprop and dgrad: destination pixels; wgrad: the fprop phase, whose taps it reduces over
  std::vector<Panel> panels;  // of one group
  int64_t block_m;            // destination pixels (wgrad: reduced pixels) a task keeps in cache
  int64_t k_chunk;            // gemm_k steps between visits to the partial sums
  int64_t panels_per_task;    // fprop and dgrad
  bool phases_together;       // fprop and dgrad: the phases of a block run one after the other
  int64_t k_block;            // wgrad: filters a task owns
  int64_t splits;             // wgrad: pieces of the pixel reduction, added in order
  bool packs_pixels = false;  // wgrad by igemm: tiles read copies of the pixels
  bool filter_lanes = false;  // wgrad in rows: vectors hold filters, columns are broadcast
  TransformPlan transform;    // winograd and fourier, whose block_m counts tiles
  RowsPlan rows;
  SplitPlan split;
  SplitWgradPlan split_wgrad;
  bool may_be_planar = false;  // runs in planes where the formats of its tensors allow it (planar_plan.h)
  double cycles;               // predicted, of one core
  double flops;
  double bytes;  // each operand and result once

  // The GEMMs of fprop and dgrad: one per group, each `columns` wide with gemm_k = taps * depth. Depthwise problems
  // count as one group whose columns are the channels and whose depth is 1.
  int64_t gemm_groups() const { return algorithm == Algorithm::depthwise ? 1 : problem.groups; }
  int64_t columns() const;
  int64_t depth() const;
  int64_t padded_columns() const;  // whole panels
  int64_t most_taps() const;       // of a phase, at least 1

  bool transforms() const { return algorithm == Algorithm::winograd || algorithm == Algorithm::fourier; }
  // Packs its source, and its filter in an own layout.
  bool packs_source() const { return algorithm == Algorithm::split || transforms(); }
  // Copies its source on the way, converted and masked.
  bool masks_source() const { return packs_source() || (algorithm == Algorithm::rows && pass != Pass::wgrad); }

  std::string str() const;
};

// How much of a value the products of float32 and float16 keep.
//   exact    direct sums in float32 only: NaN and infinity reach the outputs that see them and no other
//   highest  any algorithm whose relative L2 error stays below 1e-5 (float32)
//   high     float32 as two bfloat16 terms: 16 bits of significand
//   medium   float32 as bfloat16
enum class Precision { exact, highest, high, medium };

struct PlanOptions {
  Precision precision = Precision::highest;
  std::optional<Algorithm> algorithm = std::nullopt;  // taken where it supports the problem
  bool prepared = false;                              // filters are packed once: the cost does not count
  int64_t threads = 1;                                // decides how the work is cut, never what is computed
};

// By name; an empty algorithm is none. Throw std::invalid_argument with the valid names.
const char* precision_name(Precision precision);
Pass parse_pass(const std::string& name);
DType parse_dtype(const std::string& name);
Precision parse_precision(const std::string& name);
std::optional<Algorithm> parse_algorithm(const std::string& name);

Plan plan_conv(const ConvProblem& problem, Pass pass, DType dtype, Isa isa, const PlanOptions& options = {});

}  // namespace segpose
