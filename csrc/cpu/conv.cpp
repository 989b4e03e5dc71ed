// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels of the segpose ops: check, allocate, plan, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <tuple>

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
    const Plan part_plan = plan_for(problem, plan.pass, weight, precision);
    part.plan = &part_plan;
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
  run_gather(plan_for(one, Pass::fprop, weight, Precision::exact), {view_of(source), nullptr}, weight, bias, output,
             epilogue, Precision::exact);
}

Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvAttributes& attributes,
               double negative_slope) {
  const ConvProblem problem = make_problem(input, weight, attributes);
  const Ints shape = shape_of(problem, attributes.transposed);
  check_bias(bias, input, shape[1]);
  const Epilogue epilogue = epilogue_from_slope(negative_slope);
  Tensor output = allocate_result(input, shape, suggests_channels_last(input) || suggests_channels_last(weight));
  if (is_empty(input, weight)) {
    fill_with_bias(output, bias, problem, epilogue);
  } else {
    const Precision precision = current_precision(problem.flops(), weight);
    const Plan plan = plan_for(problem, forward_pass(attributes), weight, precision);
    run_gather(plan, {view_of(input), nullptr}, weight, bias, output, epilogue, precision);
  }
  return output;
}

// dy after the activation's gradient, as the passes of a backward read it.
struct MaskedGradient {
  MaskedSource source;
  SourceMask mask{};
  std::unique_ptr<Workspace> storage;  // of a masked copy, where a pass reads rows in place
};

// How the passes of a backward read dy.
enum class GradientUse {
  fused,     // one pass, which packs its source and masks it on the way
  packed,    // several that pack: one masked copy in dy's dtype
  in_place,  // rows are read where they lie, in the compute type
};

// The bias gradient falls out of the same pass over dy.
void mask_gradient(MaskedGradient& gradient, const Tensor& grad_output, const OptionalTensor& output,
                   const Epilogue& epilogue, GradientUse use, OptionalTensor& grad_bias) {
  const TensorView grad = view_of(grad_output);
  const DType compute = compute_dtype_of(grad.dtype);
  gradient.source = {grad, nullptr};
  if (epilogue.activation != Activation::none) {
    gradient.mask = {view_of(*output), epilogue.activation, epilogue.negative_slope};
    gradient.source.mask = &gradient.mask;
  }
  const bool copied = use == GradientUse::in_place ? !gradient.source.in_place(compute)
                                                   : use == GradientUse::packed && gradient.source.mask != nullptr;
  if (!copied && !grad_bias.has_value()) return;
  const DType dtype = use == GradientUse::in_place ? compute : grad.dtype;
  GradientPass pass{gradient.source, selected_isa(), nhwc_view(nullptr, dtype, grad.n, grad.c, grad.h, grad.w),
                    grad_bias.has_value() ? grad_bias->data_ptr() : nullptr};
  if (copied) {
    gradient.storage = std::make_unique<Workspace>(grad.n * grad.c * grad.h * grad.w * dtype_size(dtype), grad_output);
    pass.masked.data = gradient.storage->data();
  }
  const Executor executor = torch_executor();
  const Workspace workspace(gradient_workspace(pass, executor.workers), grad_output);
  run_gradient_pass(pass, workspace.data(), executor);
  if (copied) gradient.source = {pass.masked, nullptr};
}

void run_wgrad(const Plan& plan, const MaskedSource& grad, const MaskedSource& activation, const Tensor& grad_weight) {
  const Executor executor = torch_executor();
  const WgradPass pass{&plan, grad, activation, filter_of(grad_weight)};
  const Workspace workspace(wgrad_workspace(pass, executor.workers), grad_weight);
  run_wgrad_pass(pass, workspace.data(), executor);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& output,
                                            const Tensor& input, const Tensor& weight, const ConvAttributes& attributes,
                                            double negative_slope, bool need_input, bool need_weight, bool need_bias) {
  const ConvProblem problem = make_problem(input, weight, attributes);
  const Ints shape = shape_of(problem, attributes.transposed);
  const Epilogue epilogue = epilogue_from_slope(negative_slope);
  check_same_shape(grad_output, "grad_output", input, shape);
  if (epilogue.activation != Activation::none) {
    STD_TORCH_CHECK(output.has_value(), "segpose: output is needed to mask the gradient of an activation");
    check_same_shape(*output, "output", input, shape);
  }
  const Ints none{0};
  Tensor grad_input = need_input ? allocate_result(input, shape_of(problem, !attributes.transposed),
                                                   suggests_channels_last(input) || suggests_channels_last(weight))
                                 : torch::stable::new_empty(input, none);
  Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, none);
  OptionalTensor grad_bias;
  if (need_bias) grad_bias = torch::stable::new_empty(weight, {shape[1]});
  if (grad_output.numel() == 0) {
    torch::stable::zero_(grad_input);
    torch::stable::zero_(grad_weight);
    if (grad_bias.has_value()) torch::stable::zero_(*grad_bias);
  } else {
    const bool by_input = need_input && grad_input.numel() > 0;
    const bool by_weight = need_weight && grad_weight.numel() > 0;
    const Pass input_pass = attributes.transposed ? Pass::fprop : Pass::dgrad;
    const Precision precision = current_precision(problem.flops(), weight);
    const Plan input_plan = by_input ? plan_for(problem, input_pass, weight, precision) : Plan{};
    const Plan weight_plan = by_weight ? plan_for(problem, Pass::wgrad, weight, precision) : Plan{};
    const bool packed = (!by_input || input_plan.masks_source()) && (!by_weight || weight_plan.masks_source());
    const GradientUse use = !packed                 ? GradientUse::in_place
                            : by_input && by_weight ? GradientUse::packed
                                                    : GradientUse::fused;
    MaskedGradient gradient;
    mask_gradient(gradient, grad_output, output, epilogue, use, grad_bias);
    if (by_input) {
      run_gather(input_plan, gradient.source, weight, std::nullopt, grad_input, {Activation::none, 1.0}, precision);
    }
    const MaskedSource activation{view_of(input), nullptr};
    if (by_weight && attributes.transposed) run_wgrad(weight_plan, activation, gradient.source, grad_weight);
    if (by_weight && !attributes.transposed) run_wgrad(weight_plan, gradient.source, activation, grad_weight);
  }
  return {grad_input, grad_weight, grad_bias.has_value() ? *grad_bias : torch::stable::new_empty(weight, none)};
}

Tensor conv2d_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Ints stride, Ints padding,
                  Ints dilation, int64_t groups, double negative_slope) {
  return forward(input, weight, bias, {stride, padding, {0, 0}, dilation, groups, false}, negative_slope);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_act_backward(const Tensor& grad_output, const OptionalTensor& output,
                                                       const Tensor& input, const Tensor& weight, Ints stride,
                                                       Ints padding, Ints dilation, int64_t groups,
                                                       double negative_slope, bool need_input, bool need_weight,
                                                       bool need_bias) {
  return backward(grad_output, output, input, weight, {stride, padding, {0, 0}, dilation, groups, false},
                  negative_slope, need_input, need_weight, need_bias);
}

Tensor conv_transpose2d_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Ints stride,
                            Ints padding, Ints output_padding, int64_t groups, Ints dilation, double negative_slope) {
  return forward(input, weight, bias, {stride, padding, output_padding, dilation, groups, true}, negative_slope);
}

std::tuple<Tensor, Tensor, Tensor> conv_transpose2d_act_backward(const Tensor& grad_output,
                                                                 const OptionalTensor& output, const Tensor& input,
                                                                 const Tensor& weight, Ints stride, Ints padding,
                                                                 Ints output_padding, int64_t groups, Ints dilation,
                                                                 double negative_slope, bool need_input,
                                                                 bool need_weight, bool need_bias) {
  return backward(grad_output, output, input, weight, {stride, padding, output_padding, dilation, groups, true},
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
