// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad of depthwise convolutions: every channel by itself, vectors over channels, no GEMM.
#pragma once

#include "igemm.h"

namespace segpose {

// Bytes of scratch per worker.
template <class T>
int64_t depthwise_scratch(const Plan& plan);

template <class T>
void launch_depthwise(const GatherLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
