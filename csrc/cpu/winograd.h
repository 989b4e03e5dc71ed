// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad by Winograd tiles: transform the input tiles, one GEMM per frequency, transform back with the
// epilogue.
#pragma once

#include "igemm.h"

namespace segpose {

// Elements of the transformed filters of all phases and groups.
int64_t winograd_filter_size(const Plan& plan);

// Bytes of scratch per worker.
template <class T>
int64_t winograd_scratch(const Plan& plan);

// `launch.packed` is not used; `transformed` holds winograd_filter_size elements and is filled here.
template <class T>
void launch_winograd(const GatherLaunch<T>& launch, const FilterView& filter, T* transformed, const Executor& executor);

}  // namespace segpose
