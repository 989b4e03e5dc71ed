// SPDX-License-Identifier: BSD-3-Clause
// A layer forward and backward, as the operators of conv.cpp and of chain.cpp run it.
#pragma once

#include <tuple>

#include "torch_views.h"

namespace segpose {

// act(conv(input) + bias), checked and allocated. negative_slope is that of the operators: 1 without activation, 0 for
// ReLU.
Tensor conv_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    const ConvAttributes& attributes, double negative_slope);

// Gradients of input, weight and bias; empty where they are not needed. `output` may be missing without activation.
std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad_output, const OptionalTensor& output,
                                                 const Tensor& input, const Tensor& weight,
                                                 const ConvAttributes& attributes, double negative_slope,
                                                 bool need_input, bool need_weight, bool need_bias);

}  // namespace segpose
