// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad of a few channels a group between tensors in torch's default memory format: a channel is a plane on
// both sides, read and written where it lies, with vectors along its rows. Depthwise convolutions, and first layers.
#pragma once

#include "igemm.h"
#include "staging.h"

namespace segpose {

// Whether the pass runs this way: planes of the compute type, destination pixels side by side, and rows of some
// vectors.
template <class T>
bool runs_planar(const Plan& plan, const MaskedSource& source, const TensorView& destination);

// Bytes of scratch per worker.
template <class T>
int64_t planar_scratch(const Plan& plan, const TensorView& source, const TensorView& destination);

// The source of `launch` lies in planes, not in channel rows.
template <class T>
void launch_planar(const GatherLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
