// SPDX-License-Identifier: BSD-3-Clause
// wgrad in a transformed domain: per frequency, filters by channels, summed over tiles; transformed back once.
#pragma once

#include "executor.h"
#include "passes.h"

namespace segpose {

// Bytes of workspace for run_transform_wgrad with that many workers.
int64_t transform_wgrad_workspace(const WgradPass& pass, int64_t workers);
void run_transform_wgrad(const WgradPass& pass, void* workspace, const Executor& executor);

}  // namespace segpose
