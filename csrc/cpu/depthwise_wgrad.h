// SPDX-License-Identifier: BSD-3-Clause
// wgrad of depthwise convolutions over channel rows: vectors along the channels, and several taps that share what is
// read of the gradient.
#pragma once

#include "wgrad.h"

namespace segpose {

// Elements of partial sums, and bytes of scratch per worker.
int64_t depthwise_wgrad_partials(const Plan& plan);
template <class T>
int64_t depthwise_wgrad_scratch(const Plan& plan);

template <class T>
void launch_depthwise_wgrad(const WgradLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
