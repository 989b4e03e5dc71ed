// SPDX-License-Identifier: BSD-3-Clause
// How csrc/calls.cpp runs a sequence: a plain function between two libraries, of which only one knows torch.
#pragma once

#include "tensor_view.h"

namespace segpose {

// Whether the sequence with that handle has run on these tensors; nothing is written otherwise, unless a kernel failed.
using RunSequence = bool (*)(int64_t handle, const TensorView* given, int64_t given_count, const TensorView* results,
                             int64_t result_count);

// Both sides compare it: to be raised when the function's arguments, or what they point to, change.
constexpr long kEntryVersion = 1000 + static_cast<long>(sizeof(TensorView));

}  // namespace segpose
