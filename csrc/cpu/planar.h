// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad of depthwise convolutions between tensors in torch's default memory format: a channel is a plane on
// both sides, read and written where it lies, with vectors along its rows.
#pragma once

#include "igemm.h"
#include "staging.h"

namespace segpose {

// Whether the pass runs this way: planes of the compute type, neighbouring pixels that read neighbours, and rows of
// some vectors.
template <class T>
bool runs_in_planes(const Plan& plan, const MaskedSource& source, const TensorView& destination);

// Bytes of scratch per worker.
template <class T>
int64_t planes_scratch(const Plan& plan);

// The source of `launch` lies in planes, not in channel rows.
template <class T>
void launch_planes(const GatherLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
