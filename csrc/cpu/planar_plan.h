// SPDX-License-Identifier: BSD-3-Clause
// Which passes may run in planes (planar.h, planar_wgrad.h), how they are cut, and what they take: by the problem
// alone. The launch looks at the formats of the tensors.
#pragma once

#include "plan.h"
#include "planar_band.h"
#include "ukernels.h"

namespace segpose {

// Depthwise, each channel is a group.
inline int64_t planar_depth(const Plan& plan) { return plan.algorithm == Algorithm::depthwise ? 1 : plan.depth(); }
inline int64_t planar_results(const Plan& plan) { return plan.algorithm == Algorithm::depthwise ? 1 : plan.columns(); }
inline int64_t planar_groups(const Plan& plan) {
  return plan.algorithm == Algorithm::depthwise ? plan.columns() : plan.gemm_groups();
}

// A band of a fprop or dgrad, for all phases at once. Its rows are a multiple of the height of its tiles.
PlanarBand planar_band(const Plan& plan, const Phase& all);
// The height of these tiles.
int64_t planar_tile_rows(const Plan& plan);
// A band of both sides of a wgrad.
PlanarBand planar_wgrad_band(const Plan& plan);

// Whether planes are worth their way: few channels a group, and rows of some vectors. A plan of fprop or dgrad has its
// panels.
bool may_run_planar(const Plan& plan);

}  // namespace segpose
