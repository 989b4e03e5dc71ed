// SPDX-License-Identifier: BSD-3-Clause
// Predicted cycles of one core for a pass by each algorithm: what a plan chooses by. The constants were fitted to
// single passes of the models' layers on one core with AVX-512 and AMX; what counts is their order, not their size.
// Transforms predict themselves (transform_plan.h), times transform_factor.
#pragma once

#include "panels.h"

namespace segpose {

// Whether a direct pass copies the taps of a pixel together: where several share a row and channels are few.
bool gathers(const Plan& plan);

// Of all passes.
double depthwise_cycles(const Plan& plan);
double planar_cycles(const Plan& plan);

// Of fprop and dgrad; the plan has its problem, phases and a direct algorithm.
double direct_cycles(const Plan& plan, const Widths& widths);
double rows_cycles(const Plan& plan, const RowsPlan& rows, const std::vector<Panel>& panels);
double split_gather_cycles(const Plan& plan, const SplitPlan& split, bool prepared);
double transform_factor(Algorithm algorithm, const TransformPlan& transform);

double direct_wgrad_cycles(const Plan& plan, const Widths& widths);
double rows_wgrad_cycles(const Plan& plan, const RowsPlan& rows, const PhaseRuns& merged, const Widths& widths);
double split_wgrad_cycles(const Plan& plan, const SplitWgradPlan& split);

// Splits of the reduction of a wgrad over bands of rows, whose partial sums hold so many values.
int64_t rows_wgrad_splits(const ConvProblem& problem, const RowsPlan& rows, int64_t values);
// Reduced pixels of a direct wgrad's block: its rows of x and g stay in L2 for all the tiles that use them.
inline constexpr int64_t kWgradPixels = 512;

}  // namespace segpose
