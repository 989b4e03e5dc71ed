// SPDX-License-Identifier: BSD-3-Clause
// wgrad of a few channels a group: both sides are read as planes, with vectors along the rows of the gradient.
#pragma once

#include "wgrad.h"

namespace segpose {

// Whether the pass runs this way, from planes or from channel rows of the compute type.
template <class T>
bool wgrad_runs_planar(const Plan& plan, const TensorView& grad, const TensorView& activation);

// Elements of partial sums, and bytes of scratch per worker.
template <class T>
int64_t planar_wgrad_partials(const Plan& plan, const TensorView& grad, const TensorView& activation);
template <class T>
int64_t planar_wgrad_scratch(const Plan& plan, const TensorView& grad, const TensorView& activation);

// The two sides of `launch` have any of the two formats.
template <class T>
void launch_planar_wgrad(const WgradLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
