// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad of a few channels a group: a channel is a plane, with vectors along its rows. From and to both memory
// formats, depthwise and first layers in torch's default one only.
#pragma once

#include "igemm.h"
#include "staging.h"

namespace segpose {

// Whether the pass runs this way: planes or channel rows of the compute type, and rows of some vectors.
template <class T>
bool runs_planar(const Plan& plan, const MaskedSource& source, const TensorView& destination);

// Bytes of scratch per worker.
template <class T>
int64_t planar_scratch(const Plan& plan, const TensorView& source, const TensorView& destination);

// The two sides of `launch` have any of the two formats.
template <class T>
void launch_planar(const GatherLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
