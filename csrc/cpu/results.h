// SPDX-License-Identifier: BSD-3-Clause
// Memory of results. malloc hands large blocks back to the system when they are freed and takes fresh pages, zeroed one
// fault at a time, for the next: for a result of 32 MiB that costs longer than many a convolution.
#pragma once

#include "torch_views.h"

namespace segpose {

// Uninitialised, of four extents, in channels_last or contiguous, with the dtype and device of `like`. A large one lies
// in memory of the pool and gives it back when its storage dies; its storage cannot be resized.
Tensor allocate_result(const Tensor& like, const Ints& shape, bool channels_last);

}  // namespace segpose
