// SPDX-License-Identifier: BSD-3-Clause
// Operations of a prepared model (see sequence.cpp): convolutions held by number, and what stands between them.
#pragma once

#include "torch_views.h"

namespace segpose {

// Whether weight, bias and the settings that decide about algorithms are as they were when it was prepared.
bool is_current(int64_t handle);
// output = act(conv(input)), both of the shapes that the convolution was prepared for.
void run_prepared(int64_t handle, const Tensor& input, Tensor output);
// output = max_pool2x2(act(conv(input))) without what stands between; false, and nothing done, where the convolution's
// algorithm cannot.
bool run_prepared_pooled(int64_t handle, const Tensor& input, Tensor output);
void max_pool2x2(const Tensor& input, Tensor output);
// Between tensors of the same shape, pixel by pixel.
void copy_channels(const Tensor& input, Tensor output);
// From channels_last to torch's default memory format.
void write_contiguous(const Tensor& input, Tensor output);
Tensor to_contiguous(const Tensor& input);

}  // namespace segpose
