// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels of the segpose ops: check, allocate, plan, launch.
#include "conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "backward_blocks.h"
#include "passes.h"
#include "results.h"
#include "settings.h"
#include "torch_views.h"
#include "workspace.h"

namespace segpose {
namespace {

std::string set_algorithm(const std::string& name) {
  const std::optional<Algorithm> algorithm = parse_algorithm(name);
  const int previous = forced_algorithm.exchange(algorithm.has_value() ? static_cast<int>(*algorithm) : -1);
  return previous < 0 ? "" : algorithm_name(static_cast<Algorithm>(previous));
}

std::string set_precision(const std::string& name) {
  const int chosen = name == "default" ? -1 : static_cast<int>(parse_precision(name));
  const int previous = chosen_precision.exchange(chosen);
  return previous < 0 ? "default" : precision_name(static_cast<Precision>(previous));
}

// What torch's switches and the user's choice mean for passes with this weight and so many operations.
std::string precision_of(const Tensor& weight, double flops) {
  return precision_name(current_precision(flops, weight));
}

void choose_algorithm(Ints problem, const std::string& pass, const std::string& dtype, const std::string& precision,
                      bool prepared, const std::string& algorithm) {
  ChoiceKey key{{}, parse_pass(pass), parse_dtype(dtype), parse_precision(precision), prepared};
  STD_TORCH_CHECK(problem.size() == key.problem.size(), "segpose: problem must have ", key.problem.size(),
                  " numbers, got ", problem.size());
  std::copy(problem.begin(), problem.end(), key.problem.begin());
  Choices::instance().choose(key, parse_algorithm(algorithm));
}

bool is_empty(const Tensor& input, const Tensor& weight) { return input.numel() == 0 || weight.numel() == 0; }

char* advance(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * dtype_size(dtype);
}

void run_request(const GatherPass& request, const Tensor& like) {
  const Executor executor = torch_executor();
  const Workspace workspace(gather_workspace(request, executor.workers), like);
  run_gather_pass(request, workspace.data(), executor);
}

// A transformed filter is up to eight times as large as the filter: a pass whose filter would take more than this reads
// its source again for every part of the destination's channels.
constexpr int64_t kMostFilterBytes = int64_t{32} << 20;
constexpr int64_t kChannelMultiple = 64;

void run_gather(const Plan& plan, const MaskedSource& source, const Tensor& weight, const OptionalTensor& bias,
                const Tensor& destination, const Epilogue& epilogue, Precision precision) {
  const int64_t bias_stride = bias.has_value() ? bias->stride(0) : 0;
  const GatherPass whole{&plan,
                         source,
                         filter_of(weight),
                         nullptr,
                         bias.has_value() ? bias->data_ptr() : nullptr,
                         bias_stride,
                         view_of(destination),
                         epilogue};
  const int64_t channels = plan.columns();
  const int64_t parts = packed_filter_bytes(plan) / kMostFilterBytes + 1;
  if (parts == 1 || plan.problem.groups > 1 || channels < 2 * kChannelMultiple) return run_request(whole, weight);
  const bool forward = plan.pass == Pass::fprop;
  const int64_t step = (channels / parts + kChannelMultiple - 1) / kChannelMultiple * kChannelMultiple;
  for (int64_t first = 0; first < channels; first += step) {
    GatherPass part = whole;
    ConvProblem problem = plan.problem;
    part.destination.c = (forward ? problem.k : problem.c) = std::min(step, channels - first);
    const auto part_plan = plan_for(problem, plan.pass, weight, precision);
    part.plan = part_plan.get();
    const int64_t filter_step = forward ? part.filter.stride_k : part.filter.stride_c;
    part.filter.data = advance(part.filter.data, first * filter_step, plan.dtype);
    if (bias.has_value()) part.bias = advance(bias->data_ptr(), first * bias_stride, plan.dtype);
    part.destination.data = advance(part.destination.data, first * part.destination.stride_c, plan.dtype);
    run_request(part, weight);
  }
}

// act(bias) everywhere: what a convolution over no channels gives.
void fill_with_bias(Tensor& output, const OptionalTensor& bias, const ConvProblem& problem, const Epilogue& epilogue) {
  torch::stable::zero_(output);
  if (!bias.has_value() || output.numel() == 0) return;
  ConvProblem one = problem;
  one.c = one.k = output.size(1);
  one.groups = output.size(1);
  one.r = one.s = one.stride_h = one.stride_w = one.dilation_h = one.dilation_w = 1;
  one.pad_h = one.pad_w = 0;
  one.h = one.p = output.size(2);
  one.w = one.q = output.size(3);
  Tensor weight = torch::stable::new_zeros(output, {output.size(1), 1, 1, 1});
  Tensor source = torch::stable::new_zeros(output, {output.size(0), output.size(1), output.size(2), output.size(3)});
  run_gather(*plan_for(one, Pass::fprop, weight, Precision::exact), {view_of(source), nullptr}, weight, bias, output,
             epilogue, Precision::exact);
}

// dy after the activation's gradient, as the passes of a backward read it.
struct MaskedGradient {
  MaskedSource source;
  std::unique_ptr<Workspace> storage;  // of a masked copy, where a pass reads rows in place
};

// How the passes of a backward read dy.
enum class GradientUse {
  fused,     // one pass, which packs its source and masks it on the way
  packed,    // several that pack: one masked copy in dy's dtype
  in_place,  // rows are read where they lie, in the compute type
  planes,    // or planes are
};

// The bias gradient falls out of the same pass over dy.
MaskedGradient mask_gradient(const LayerBackward& layer, GradientUse use, const Tensor& like) {
  const TensorView& grad = layer.grad.view;
  const DType compute = compute_dtype_of(grad.dtype);
  MaskedGradient gradient{layer.grad, nullptr};
  const bool copied = use == GradientUse::in_place ? !layer.grad.in_place(compute)
                                                   : use != GradientUse::fused && layer.grad.mask != nullptr;
  if (!copied && layer.grad_bias == nullptr) return gradient;
  const DType dtype = use == GradientUse::in_place ? compute : grad.dtype;
  const auto view = use == GradientUse::planes ? nchw_view : nhwc_view;
  GradientPass pass{layer.grad, selected_isa(), view(nullptr, dtype, grad.n, grad.c, grad.h, grad.w), layer.grad_bias};
  if (copied) {
    gradient.storage = std::make_unique<Workspace>(grad.n * grad.c * grad.h * grad.w * dtype_size(dtype), like);
    pass.masked.data = gradient.storage->data();
  }
  const Executor executor = torch_executor();
  const Workspace workspace(gradient_workspace(pass, executor.workers), like);
  run_gradient_pass(pass, workspace.data(), executor);
  if (copied) gradient.source = {pass.masked, nullptr};
  return gradient;
}

Pass input_pass(const LayerBackward& layer) { return layer.transposed ? Pass::fprop : Pass::dgrad; }

// Plans of the passes that are wanted, over so many images.
BlockPlans plans_of(const LayerBackward& layer, int64_t images, const Tensor& weight, Precision precision) {
  ConvProblem problem = layer.problem;
  problem.n = images;
  BlockPlans plans;
  if (layer.grad_input.data != nullptr) plans.input = plan_for(problem, input_pass(layer), weight, precision);
  if (layer.grad_filter.data != nullptr) plans.weight = plan_for(problem, Pass::wgrad, weight, precision);
  return plans;
}

// Algorithms that were asked for or measured are those of whole passes.
bool has_choice(const LayerBackward& layer, const Tensor& weight, Precision precision) {
  if (forced_algorithm >= 0) return true;
  const auto measured = [&](Pass pass) {
    return Choices::instance().find({numbers_of(layer.problem), pass, to_dtype(weight), precision, false}).has_value();
  };
  return measured(input_pass(layer)) || measured(Pass::wgrad);
}

// False, and nothing done, where whole passes are better.
bool backward_in_blocks(const LayerBackward& layer, const Tensor& weight, Precision precision) {
  const int64_t images = block_images(layer);
  if (images == 0 || has_choice(layer, weight, precision)) return false;
  const int64_t rest = layer.problem.n % images;
  BlockwiseBackward backward{&layer, images, plans_of(layer, images, weight, precision), {}};
  backward.last = rest == 0 ? backward.plans : plans_of(layer, rest, weight, precision);
  if (!can_run_in_blocks(backward.plans) || !can_run_in_blocks(backward.last)) return false;
  const Executor executor = torch_executor();
  const Workspace workspace(blockwise_workspace(backward, executor.workers), weight);
  run_blockwise_backward(backward, workspace.data(), executor);
  return true;
}

}  // namespace

Tensor conv_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    const ConvAttributes& attributes, double negative_slope) {
  const ConvProblem problem = make_problem(input, weight, attributes);
  const Ints shape = shape_of(problem, attributes.transposed);
  check_bias(bias, input, shape[1]);
  const Epilogue epilogue = epilogue_from_slope(negative_slope);
  Tensor output = allocate_result(input, shape, suggests_channels_last(input) || suggests_channels_last(weight));
  if (is_empty(input, weight)) {
    fill_with_bias(output, bias, problem, epilogue);
  } else {
    const Precision precision = current_precision(problem.flops(), weight);
    const auto plan = plan_for(problem, forward_pass(attributes), weight, precision);
    run_gather(*plan, {view_of(input), nullptr}, weight, bias, output, epilogue, precision);
  }
  return output;
}

namespace {

GatherPass input_gradient_pass(const LayerBackward& layer, const Plan& plan, const MaskedSource& grad) {
  return {&plan, grad, layer.filter, nullptr, nullptr, 0, layer.grad_input, {Activation::none, 1.0}};
}

WgradPass weight_gradient_pass(const LayerBackward& layer, const Plan& plan, const MaskedSource& grad) {
  const MaskedSource activation{layer.input, nullptr};
  if (layer.transposed) return {&plan, activation, grad, layer.grad_filter};
  return {&plan, grad, activation, layer.grad_filter};
}

// How the passes would run over a masked copy of dy, which has planes or channel rows. Both of them, wanted or not:
// what a gradient is, bit by bit, does not depend on what else is asked for.
struct MaskedPasses {
  std::shared_ptr<const Plan> input_plan, weight_plan;
  bool input_planar, weight_planar;

  MaskedPasses(const LayerBackward& layer, bool has_planes, const Tensor& weight, bool channels_last,
               Precision precision)
      : input_plan(plan_for(layer.problem, input_pass(layer), weight, precision)),
        weight_plan(plan_for(layer.problem, Pass::wgrad, weight, precision)) {
    const auto view = [](bool rows, const TensorView& like, DType dtype) {
      return (rows ? nhwc_view : nchw_view)(nullptr, dtype, like.n, like.c, like.h, like.w);
    };
    const TensorView& grad = layer.grad.view;
    LayerBackward whole = layer;
    whole.grad_input = view(channels_last, layer.input, layer.input.dtype);
    const MaskedSource masked{view(!has_planes, grad, compute_dtype_of(grad.dtype)), nullptr};
    input_planar = reads_planes(input_gradient_pass(whole, *input_plan, masked));
    weight_planar = reads_planes(weight_gradient_pass(whole, *weight_plan, masked));
  }

  bool input_packs() const { return input_plan->masks_source() && !input_planar; }
  bool weight_packs() const { return weight_plan->masks_source() && !weight_planar; }
};

GradientUse gradient_use(const LayerBackward& layer, const BlockPlans& plans, const Tensor& weight, bool channels_last,
                         Precision precision) {
  if (layer.input.h * layer.input.w == 0 || layer.problem.flops() == 0) return GradientUse::in_place;
  const bool has_planes = layer.grad.has_planes(compute_dtype_of(layer.grad.view.dtype));
  const MaskedPasses passes(layer, has_planes, weight, channels_last, precision);
  // The other pass might copy them into channel rows, in place of the gradient and the output.
  if (has_planes && (passes.input_planar || passes.weight_planar)) return GradientUse::planes;
  const bool by_input = plans.input != nullptr;
  const bool by_weight = plans.weight != nullptr;
  if ((by_input && !passes.input_packs()) || (by_weight && !passes.weight_packs())) return GradientUse::in_place;
  return by_input && by_weight ? GradientUse::packed : GradientUse::fused;
}

void backward_in_passes(const LayerBackward& layer, const Tensor& weight, const Tensor& grad_input,
                        const Tensor& grad_weight, bool channels_last, Precision precision) {
  const BlockPlans plans = plans_of(layer, layer.problem.n, weight, precision);
  const GradientUse use = gradient_use(layer, plans, weight, channels_last, precision);
  const MaskedGradient gradient = mask_gradient(layer, use, weight);
  if (plans.input != nullptr) {
    run_gather(*plans.input, gradient.source, weight, std::nullopt, grad_input, {Activation::none, 1.0}, precision);
  }
  if (plans.weight != nullptr) {
    const Executor executor = torch_executor();
    const WgradPass pass = weight_gradient_pass(layer, *plans.weight, gradient.source);
    const Workspace workspace(wgrad_workspace(pass, executor.workers), grad_weight);
    run_wgrad_pass(pass, workspace.data(), executor);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad_output, const OptionalTensor& output,
                                                 const Tensor& input, const Tensor& weight,
                                                 const ConvAttributes& attributes, double negative_slope,
                                                 bool need_input, bool need_weight, bool need_bias) {
  const ConvProblem problem = make_problem(input, weight, attributes);
  const Ints shape = shape_of(problem, attributes.transposed);
  const Epilogue epilogue = epilogue_from_slope(negative_slope);
  check_same_shape(grad_output, "grad_output", input, shape);
  if (epilogue.activation != Activation::none) {
    STD_TORCH_CHECK(output.has_value(), "segpose: output is needed to mask the gradient of an activation");
    check_same_shape(*output, "output", input, shape);
  }
  const Ints none{0};
  const bool channels_last = suggests_channels_last(input) || suggests_channels_last(weight);
  Tensor grad_input = need_input ? allocate_result(input, shape_of(problem, !attributes.transposed), channels_last)
                                 : torch::stable::new_empty(input, none);
  Tensor grad_weight = need_weight ? allocate_gradient(weight) : torch::stable::new_empty(weight, none);
  OptionalTensor grad_bias;
  if (need_bias) grad_bias = torch::stable::new_empty(weight, {shape[1]});
  if (grad_output.numel() == 0) {
    torch::stable::zero_(grad_input);
    torch::stable::zero_(grad_weight);
    if (grad_bias.has_value()) torch::stable::zero_(*grad_bias);
  } else {
    const Precision precision = current_precision(problem.flops(), weight);
    LayerBackward layer{
        problem, attributes.transposed, {view_of(grad_output), nullptr}, view_of(input), filter_of(weight)};
    SourceMask mask{};
    if (epilogue.activation != Activation::none) {
      mask = {view_of(*output), epilogue.activation, epilogue.negative_slope};
      layer.grad.mask = &mask;
    }
    if (need_input && grad_input.numel() > 0) layer.grad_input = view_of(grad_input);
    if (need_weight && grad_weight.numel() > 0) layer.grad_filter = filter_of(grad_weight);
    if (need_bias) layer.grad_bias = grad_bias->data_ptr();
    if (!backward_in_blocks(layer, weight, precision)) {
      backward_in_passes(layer, weight, grad_input, grad_weight, channels_last, precision);
    }
  }
  return {grad_input, grad_weight, grad_bias.has_value() ? *grad_bias : torch::stable::new_empty(weight, none)};
}

namespace {

Tensor conv2d_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Ints stride, Ints padding,
                  Ints dilation, int64_t groups, double negative_slope) {
  return conv_forward(input, weight, bias, {stride, padding, {0, 0}, dilation, groups, false}, negative_slope);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_act_backward(const Tensor& grad_output, const OptionalTensor& output,
                                                       const Tensor& input, const Tensor& weight, Ints stride,
                                                       Ints padding, Ints dilation, int64_t groups,
                                                       double negative_slope, bool need_input, bool need_weight,
                                                       bool need_bias) {
  return conv_backward(grad_output, output, input, weight, {stride, padding, {0, 0}, dilation, groups, false},
                       negative_slope, need_input, need_weight, need_bias);
}

Tensor conv_transpose2d_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Ints stride,
                            Ints padding, Ints output_padding, int64_t groups, Ints dilation, double negative_slope) {
  return conv_forward(input, weight, bias, {stride, padding, output_padding, dilation, groups, true}, negative_slope);
}

std::tuple<Tensor, Tensor, Tensor> conv_transpose2d_act_backward(const Tensor& grad_output,
                                                                 const OptionalTensor& output, const Tensor& input,
                                                                 const Tensor& weight, Ints stride, Ints padding,
                                                                 Ints output_padding, int64_t groups, Ints dilation,
                                                                 double negative_slope, bool need_input,
                                                                 bool need_weight, bool need_bias) {
  return conv_backward(grad_output, output, input, weight, {stride, padding, output_padding, dilation, groups, true},
                       negative_slope, need_input, need_weight, need_bias);
}

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) {
  m.impl("conv2d_act", TORCH_BOX(&segpose::conv2d_act));
  m.impl("conv2d_act_backward", TORCH_BOX(&segpose::conv2d_act_backward));
  m.impl("conv_transpose2d_act", TORCH_BOX(&segpose::conv_transpose2d_act));
  m.impl("conv_transpose2d_act_backward", TORCH_BOX(&segpose::conv_transpose2d_act_backward));
}

STABLE_TORCH_LIBRARY_IMPL(segpose, CompositeExplicitAutograd, m) {
  m.impl("set_precision", TORCH_BOX(&segpose::set_precision));
  m.impl("set_algorithm", TORCH_BOX(&segpose::set_algorithm));
  m.impl("choose_algorithm", TORCH_BOX(&segpose::choose_algorithm));
  m.impl("precision_of", TORCH_BOX(&segpose::precision_of));
}
