// SPDX-License-Identifier: BSD-3-Clause
// wgrad as a split GEMM on AMX tiles: filters by channels, summed over pixels.
#pragma once

#include "executor.h"
#include "passes.h"

namespace segpose {

// Bytes of workspace for run_split_wgrad with that many workers.
int64_t split_wgrad_workspace(const WgradPass& pass, int64_t workers);
void run_split_wgrad(const WgradPass& pass, void* workspace, const Executor& executor);

}  // namespace segpose
