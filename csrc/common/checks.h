// SPDX-License-Identifier: BSD-3-Clause
// The last line of defence of the raw ops: a malformed call raises instead of reading out of bounds. The friendly
// messages are segpose_kernels/checks.py's.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "conv_problem.h"

namespace segpose {

using torch::stable::Tensor;

struct ConvAttributes {
  std::vector<int64_t> stride, padding, output_padding, dilation;
  int64_t groups;
  bool transposed;
};

// Of an attribute: sums and products of two of them fit into 64 bits.
constexpr int64_t kLargestAttribute = (int64_t{1} << 31) - 1;

inline void check_attributes(const ConvAttributes& attributes) {
  for (const auto* pair : {&attributes.stride, &attributes.padding, &attributes.output_padding, &attributes.dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, "segpose: stride, padding, output_padding and dilation must have 2 values, got ",
                    pair->size());
    for (const int64_t value : *pair) {
      STD_TORCH_CHECK(value <= kLargestAttribute,
                      "segpose: stride, padding, output_padding and dilation must be at most ", kLargestAttribute,
                      ", got ", value);
    }
  }
  for (size_t axis = 0; axis < 2; ++axis) {
    const int64_t stride = attributes.stride[axis];
    const int64_t dilation = attributes.dilation[axis];
    const int64_t output_padding = attributes.output_padding[axis];
    STD_TORCH_CHECK(stride > 0, "segpose: stride must be positive, got ", stride);
    STD_TORCH_CHECK(dilation > 0, "segpose: dilation must be positive, got ", dilation);
    STD_TORCH_CHECK(attributes.padding[axis] >= 0, "segpose: padding must not be negative, got ",
                    attributes.padding[axis]);
    STD_TORCH_CHECK(
        output_padding >= 0 && (output_padding == 0 || output_padding < stride || output_padding < dilation),
        "segpose: output_padding must be smaller than stride or dilation, got ", output_padding);
  }
  STD_TORCH_CHECK(attributes.groups > 0 && attributes.groups <= kLargestAttribute,
                  "segpose: groups must be positive and at most ", kLargestAttribute, ", got ", attributes.groups);
}

// The convolution view of a call, or an error that names what does not fit.
inline ConvProblem make_problem(const std::vector<int64_t>& input, const Tensor& weight,
                                const ConvAttributes& attributes) {
  check_attributes(attributes);
  STD_TORCH_CHECK(input.size() == 4, "segpose: input must be 4-D (N, C, H, W), got ", input.size(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 4, "segpose: weight must be 4-D, got ", weight.dim(), " dimensions");
  const auto &stride = attributes.stride, &padding = attributes.padding, &dilation = attributes.dilation;
  ConvProblem problem{};
  problem.n = input[0];
  problem.r = weight.size(2);
  problem.s = weight.size(3);
  problem.stride_h = stride[0];
  problem.stride_w = stride[1];
  problem.pad_h = padding[0];
  problem.pad_w = padding[1];
  problem.dilation_h = dilation[0];
  problem.dilation_w = dilation[1];
  problem.groups = attributes.groups;
  problem.k = weight.size(0);
  problem.c = weight.size(1) * attributes.groups;
  STD_TORCH_CHECK(problem.r > 0 && problem.s > 0, "segpose: kernel extents must be positive, got ", problem.r, " x ",
                  problem.s);
  STD_TORCH_CHECK((attributes.transposed ? problem.c : problem.k) > 0, "segpose: weight must have output channels");
  STD_TORCH_CHECK(problem.k % attributes.groups == 0, "segpose: weight.size(0)=", problem.k,
                  " must be divisible by groups=", attributes.groups);
  if (attributes.transposed) {
    STD_TORCH_CHECK(input[1] == problem.k, "segpose: input.size(1)=", input[1], " but weight.size(0)=", problem.k);
    problem.p = input[2];
    problem.q = input[3];
    problem.h =
        conv_transpose_extent(problem.p, problem.r, stride[0], padding[0], attributes.output_padding[0], dilation[0]);
    problem.w =
        conv_transpose_extent(problem.q, problem.s, stride[1], padding[1], attributes.output_padding[1], dilation[1]);
  } else {
    STD_TORCH_CHECK(input[1] == problem.c, "segpose: input.size(1)=", input[1],
                    " but weight.size(1) * groups=", problem.c);
    problem.h = input[2];
    problem.w = input[3];
    problem.p = conv_extent(problem.h, problem.r, stride[0], padding[0], dilation[0]);
    problem.q = conv_extent(problem.w, problem.s, stride[1], padding[1], dilation[1]);
  }
  const int64_t out_h = attributes.transposed ? problem.h : problem.p;
  const int64_t out_w = attributes.transposed ? problem.w : problem.q;
  STD_TORCH_CHECK(problem.n == 0 || (input[2] > 0 && input[3] > 0), "segpose: only the batch may be empty, got input ",
                  input[2], " x ", input[3]);
  STD_TORCH_CHECK(out_h > 0 && out_w > 0, "segpose: output size is too small: input ", input[2], " x ", input[3],
                  ", output ", out_h, " x ", out_w);
  // Its bytes are counted in 64 bits, too.
  const double channels = static_cast<double>(attributes.transposed ? problem.c : problem.k);
  const double elements =
      static_cast<double>(problem.n) * channels * static_cast<double>(out_h) * static_cast<double>(out_w);
  STD_TORCH_CHECK(elements < 0x1p60, "segpose: output size is too large: ", out_h, " x ", out_w);
  return problem;
}

inline ConvProblem make_problem(const Tensor& input, const Tensor& weight, const ConvAttributes& attributes) {
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "segpose: input and weight must have the same dtype");
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < input.dim(); ++axis) shape.push_back(input.size(axis));
  return make_problem(shape, weight, attributes);
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& input, int64_t channels) {
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, "segpose: bias must be 1-D with ", channels,
                  " elements");
  STD_TORCH_CHECK(bias->scalar_type() == input.scalar_type(), "segpose: input and bias must have the same dtype");
}

inline void check_same_shape(const Tensor& tensor, const char* name, const Tensor& input,
                             const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.dim() == 4, "segpose: ", name, " must be 4-D, got ", tensor.dim(), " dimensions");
  for (int64_t axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(tensor.size(axis) == shape[static_cast<size_t>(axis)], "segpose: ", name, ".size(", axis,
                    ") must be ", shape[static_cast<size_t>(axis)], ", got ", tensor.size(axis));
  }
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "segpose: ", name, " must have the dtype of input");
}

// torch's own rule (is_strides_like_channels_last_4d): size-1 axes count by their strides.
inline bool suggests_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.stride(1) == 0) return false;
  int64_t smallest = 0;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (tensor.size(axis) == 0 || tensor.stride(axis) < smallest) return false;
    if (axis == 0 && smallest == tensor.stride(1)) return false;
    smallest = tensor.stride(axis);
    if (tensor.size(axis) > 1) smallest *= tensor.size(axis);
  }
  return true;
}

}  // namespace segpose
