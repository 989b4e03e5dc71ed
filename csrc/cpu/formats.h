// SPDX-License-Identifier: BSD-3-Clause
// From channels_last to torch's default memory format, transposed in registers where torch's copy goes element by
// element.
#pragma once

#include "executor.h"
#include "tensor_view.h"

namespace segpose {

// Whether the view is dense in torch's default memory format.
bool is_contiguous(const TensorView& view);

// Every value of `in`, whose pixels lie at one distance, to its place in `out`, which is contiguous. Shapes and dtypes
// are the same; no extent is 0.
void transpose_pixels(const TensorView& in, const TensorView& out, const Executor& executor);

}  // namespace segpose
