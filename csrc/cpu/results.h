// SPDX-License-Identifier: BSD-3-Clause
// Memory of results. malloc hands large blocks back to the system when they are freed and takes fresh pages, zeroed one
// fault at a time, for the next: for a result of 32 MiB that takes longer than many a convolution. What it keeps of
// smaller ones depends on where they lie in its heap: a step of SegNet with 64 images took 9 to 1,170 faults, up to 3.9
// of 10.5 ms, by the process (Zen 3).
#pragma once

#include "torch_views.h"

namespace segpose {

// Uninitialised, of four extents, in channels_last or contiguous, with the dtype and device of `like`. Of some sizes
// (see results.cpp) it lies in memory of a pool and gives it back when its storage dies, which cannot be resized.
Tensor allocate_result(const Tensor& like, const Ints& shape, bool channels_last);

// The same with the shape and strides of `like`, a filter.
Tensor allocate_gradient(const Tensor& like);

}  // namespace segpose
