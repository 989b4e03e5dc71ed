// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad of depthwise convolutions between channel rows, a cache line of channels at a time: what a band of
// rows reads is copied, so that its pixels lie side by side with zeros around them.
#pragma once

#include "igemm.h"

namespace segpose {

// Whether the pass runs this way: to channel rows of the compute type, a cache line at least, of images that stay in
// the caches. The source has such rows, or will have.
template <class T>
bool runs_in_blocks(const Plan& plan, const TensorView& source, const TensorView& destination);

// Bytes of scratch per worker.
template <class T>
int64_t blocks_scratch(const Plan& plan);

template <class T>
void launch_blocks(const GatherLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
