// SPDX-License-Identifier: BSD-3-Clause
// Layers of a chain, each reading what the one before it wrote, in one call. Values push the code of Python and of the
// dispatcher out of the caches: they took 166 of 383 us of a backward of SegNet's last layer that only sums the bias.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "conv.h"
#include "prepared.h"

namespace segpose {
namespace {

// The numbers of a layer are those of segpose_kernels/chain.py: transposed, stride, padding, output_padding, dilation,
// groups, and whether it has a bias.
constexpr size_t kLayerInts = 11;

struct Layer {
  ConvAttributes attributes;
  double negative_slope;
  Tensor weight;
  OptionalTensor bias;
};

std::vector<Layer> layers_of(const Ints& code, const std::vector<double>& slopes, std::vector<Tensor>& parameters) {
  STD_TORCH_CHECK(code.size() == kLayerInts * slopes.size(), "segpose: code must hold ", kLayerInts,
                  " numbers for each slope");
  std::vector<Layer> layers;
  size_t parameter = 0;
  const auto next = [&] {
    STD_TORCH_CHECK(parameter < parameters.size(), "segpose: a layer lacks its parameters");
    return parameters[parameter++];
  };
  for (size_t i = 0; i < slopes.size(); ++i) {
    const auto at = code.begin() + static_cast<int64_t>(i * kLayerInts);
    const auto pair = [&](int64_t first) { return Ints(at + first, at + first + 2); };
    ConvAttributes attributes{pair(1), pair(3), pair(5), pair(7), at[9], at[0] != 0};
    Tensor weight = next();
    layers.push_back({std::move(attributes), slopes[i], std::move(weight), {}});
    if (at[10] != 0) layers.back().bias = next();
  }
  STD_TORCH_CHECK(parameter == parameters.size(), "segpose: parameters of no layer are left");
  return layers;
}

// By all strides, where formats.h leaves out those of extents of one: they tell the two formats apart where both fit.
bool has_default_strides(const Tensor& tensor) {
  return tensor.stride(3) == 1 && tensor.stride(2) == tensor.size(3) &&
         tensor.stride(1) == tensor.size(2) * tensor.size(3);
}

// The output of every layer; if `contiguous`, then a copy of the last one in torch's default memory format where it is
// in channels_last. The backward reads what is in channels_last: it would take longer to transpose the output there.
std::vector<Tensor> conv_chain(const Tensor& input, std::vector<Tensor> parameters, Ints code,
                               std::vector<double> slopes, bool contiguous) {
  std::vector<Tensor> outputs;
  for (const Layer& layer : layers_of(code, slopes, parameters)) {
    const Tensor& source = outputs.empty() ? input : outputs.back();
    outputs.push_back(conv_forward(source, layer.weight, layer.bias, layer.attributes, layer.negative_slope));
  }
  if (contiguous && !has_default_strides(outputs.back())) outputs.push_back(to_contiguous(outputs.back()));
  return outputs;
}

// `values`: the input and the output of every layer. `needs`: 1 for the input and each of the parameters whose gradient
// is wanted; the others come back empty.
std::vector<Tensor> conv_chain_backward(const Tensor& grad_output, std::vector<Tensor> values,
                                        std::vector<Tensor> parameters, Ints code, std::vector<double> slopes,
                                        Ints needs) {
  const std::vector<Layer> layers = layers_of(code, slopes, parameters);
  STD_TORCH_CHECK(values.size() == layers.size() + 1, "segpose: a chain has one value more than layers");
  STD_TORCH_CHECK(needs.size() == parameters.size() + 1, "segpose: needs must tell of the input and each parameter");
  size_t first_needed = needs.size();
  for (size_t i = needs.size(); i-- > 0;) {
    if (needs[i] != 0) first_needed = i;
  }
  std::vector<Tensor> grads(needs.size(), torch::stable::new_empty(grad_output, {0}));
  Tensor grad = grad_output;
  size_t parameter = parameters.size();  // behind those of the layer, counted with the input
  for (size_t i = layers.size(); i-- > 0 && first_needed <= parameter;) {
    const Layer& layer = layers[i];
    const size_t weight = layer.bias.has_value() ? parameter - 1 : parameter;
    const bool need_bias = layer.bias.has_value() && needs[parameter] != 0;
    const OptionalTensor output = layer.negative_slope == 1 ? OptionalTensor() : OptionalTensor(values[i + 1]);
    auto [grad_input, grad_weight, grad_bias] =
        conv_backward(grad, output, values[i], layer.weight, layer.attributes, layer.negative_slope,
                      first_needed < weight, needs[weight] != 0, need_bias);
    if (needs[weight] != 0) grads[weight] = grad_weight;
    if (need_bias) grads[parameter] = grad_bias;
    grad = std::move(grad_input);
    parameter = weight - 1;
  }
  if (needs[0] != 0) grads[0] = grad;
  return grads;
}

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) {
  m.impl("conv_chain", TORCH_BOX(&segpose::conv_chain));
  m.impl("conv_chain_backward", TORCH_BOX(&segpose::conv_chain_backward));
}
