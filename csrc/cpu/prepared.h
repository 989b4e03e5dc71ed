// SPDX-License-Identifier: BSD-3-Clause
// Operations of a prepared model (see sequence.cpp): convolutions held by number, and what stands between them.
#pragma once

#include <memory>

#include "torch_views.h"

namespace segpose {

// A convolution bound to one input shape.
struct PreparedConv;

std::shared_ptr<const PreparedConv> find_prepared(int64_t handle);
void release_prepared(int64_t handle);
// Whether weight, bias and the settings that decide about algorithms are as they were when it was prepared.
bool is_current(const PreparedConv& conv);
// output = act(conv(input)), both of the shapes that the convolution was prepared for.
void run_prepared(const PreparedConv& conv, const TensorView& input, const TensorView& output);
// output = max_pool2x2(act(conv(input))) without what stands between; false, and nothing done, where the convolution's
// algorithm cannot.
bool run_prepared_pooled(const PreparedConv& conv, const TensorView& input, const TensorView& output);
void max_pool2x2(const TensorView& input, const TensorView& output);
// Between views of the same shape, pixel by pixel.
void copy_channels(const TensorView& input, const TensorView& output);
// From channels_last to torch's default memory format.
void write_contiguous(const TensorView& input, const TensorView& output);
Tensor to_contiguous(const Tensor& input);

}  // namespace segpose
