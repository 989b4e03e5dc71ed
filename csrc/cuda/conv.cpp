// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels of the segpose ops: check, allocate, plan, launch. Everything is enqueued on torch's current stream,
// memory comes from torch's allocator, and nothing waits: calls can be captured in a graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <tuple>

#include "../common/checks.h"
#include "device.h"
#include "passes.h"
#include "tiles.h"

namespace segpose::cuda {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

DType to_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "segpose: the cuda backend supports float32, float64, bfloat16 and float16");
  }
}

// torch's flag, through an operator that Python implements; where there is no Python, torch's default.
bool tf32_allowed(DType dtype) {
  static std::atomic<bool> implemented{true};
  if (dtype != DType::float32) return false;
  if (!implemented.load(std::memory_order_relaxed)) return true;
  std::array<StableIValue, 1> stack{};
  if (torch_call_dispatcher("segpose::tf32_allowed", "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    implemented.store(false, std::memory_order_relaxed);
    return true;
  }
  return torch::stable::detail::to<bool>(stack[0]);
}

// Everything from the first to the last element.
void note_tensor(const Tensor& tensor, Memory kind) {
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  note_memory(tensor.data_ptr(), (last + 1) * dtype_size(to_dtype(tensor)), kind);
}

View view_of(const Tensor& tensor) {
  note_tensor(tensor, Memory::input);
  // torch lets the stride of an axis of size 1 be anything.
  const auto stride = [&](int64_t axis) { return tensor.size(axis) == 1 ? 0 : tensor.stride(axis); };
  return {tensor.data_ptr(),
          stride(0),
          stride(2),
          stride(3),
          tensor.size(1) == 1 ? 1 : tensor.stride(1),
          static_cast<int>(tensor.size(2)),
          static_cast<int>(tensor.size(3))};
}

FilterView filter_of(const Tensor& tensor) {
  note_tensor(tensor, Memory::input);
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

Layout layout_of(const View& view, DType dtype, int64_t depth = 0) {
  return {view.stride_c == 1, in_aligned_rows(view, dtype), depth};
}

// Filter rows [K][R][S][C / groups] without gaps, as a gather reads them.
bool lies_in_rows(const Tensor& weight) {
  const int64_t c = weight.size(1), r = weight.size(2), s = weight.size(3);
  const auto is = [&](int64_t axis, int64_t expected) {
    return weight.size(axis) == 1 || weight.stride(axis) == expected;
  };
  return is(1, 1) && is(3, c) && is(2, s * c) && is(0, r * s * c) &&
         reinterpret_cast<uintptr_t>(weight.data_ptr()) % kChunkBytes == 0;
}

Tensor allocate(const Ints& shape, const Tensor& like, bool channels_last) {
  Tensor tensor = torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                       channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  note_tensor(tensor, Memory::output);
  return tensor;
}

Tensor allocate_bytes(int64_t bytes, const Tensor& like) {
  Tensor tensor = torch::stable::empty({std::max<int64_t>(bytes, 1)}, ScalarType::Byte, std::nullopt, like.device());
  note_memory(tensor.data_ptr(), tensor.numel(), Memory::scratch);
  return tensor;
}

void fill_zeros(Tensor& tensor) {
  torch::stable::zero_(tensor);
  note_tensor(tensor, Memory::filled);
}

void check_status(const Status& status) {
  STD_TORCH_CHECK(status.error == cudaSuccess, "segpose: kernel ", status.kernel,
                  " did not launch: ", cudaGetErrorString(status.error));
}

void check_device(const Tensor& tensor, const char* name, const Tensor& input) {
  STD_TORCH_CHECK(tensor.device() == input.device(), "segpose: ", name, " must be on the device of input");
}

Act to_act(const Epilogue& epilogue) {
  switch (epilogue.activation) {
    case Activation::none:
      return Act::none;
    case Activation::relu:
      return Act::relu;
    case Activation::leaky_relu:
      break;
  }
  return Act::leaky_relu;
}

Ints shape_of(const ConvProblem& problem, bool x_shaped) {
  if (x_shaped) return {problem.n, problem.c, problem.h, problem.w};
  return {problem.n, problem.k, problem.p, problem.q};
}

// Everything a pass needs besides its operands.
struct Context {
  const DeviceScope& scope;
  ConvProblem problem;
  DType dtype;
  bool tf32;

  Context(const DeviceScope& device_scope, const ConvProblem& conv_problem, const Tensor& input)
      : scope(device_scope), problem(conv_problem), dtype(to_dtype(input)), tf32(tf32_allowed(dtype)) {}

  PlanRequest request(Pass pass) const {
    PlanRequest request{};
    request.problem = problem;
    request.pass = pass;
    request.dtype = dtype;
    request.tf32 = tf32;
    request.gpu = scope.gpu;
    return request;
  }
};

// An operand that may have padded channels behind those of every group.
struct Operand {
  View view;
  int64_t depth = 0;  // 0: none

  Layout layout(DType dtype) const { return layout_of(view, dtype, depth); }
};

PlanRequest gather_request(const Context& context, Pass pass, const Operand& source, const Tensor& weight,
                           const View& destination) {
  PlanRequest request = context.request(pass);
  request.source = source.layout(context.dtype);
  request.destination = layout_of(destination, context.dtype);
  request.filter_rows = lies_in_rows(weight);
  return request;
}

PlanRequest wgrad_request(const Context& context, const Operand& output, const Operand& activation) {
  PlanRequest request = context.request(Pass::wgrad);
  request.source = output.layout(context.dtype);
  request.activation = activation.layout(context.dtype);
  return request;
}

void run_gather(const Context& context, Pass pass, const Operand& source, const Tensor& weight,
                const OptionalTensor& bias, const Tensor& destination, const Epilogue& epilogue) {
  const View target = view_of(destination);
  const Plan plan = plan_conv(gather_request(context, pass, source, weight, target));
  if (bias.has_value()) note_tensor(*bias, Memory::input);
  const GatherPass request{plan,
                           source.view,
                           filter_of(weight),
                           bias.has_value() ? bias->data_ptr() : nullptr,
                           bias.has_value() ? bias->stride(0) : 0,
                           target,
                           to_act(epilogue),
                           epilogue.negative_slope};
  const Tensor workspace = allocate_bytes(workspace_bytes(plan), weight);
  check_status(run(request, workspace.data_ptr(), context.scope.stream));
}

void run_wgrad(const Context& context, const Operand& output, const Operand& activation, const Tensor& grad_weight) {
  const Plan plan = plan_conv(wgrad_request(context, output, activation));
  const WgradPass request{plan, output.view, activation.view, filter_of(grad_weight)};
  const Tensor workspace = allocate_bytes(workspace_bytes(plan), grad_weight);
  check_status(run(request, workspace.data_ptr(), context.scope.stream));
}

void check_extents(const Context& context) {
  const std::string reason = unsupported(context.request(Pass::fprop));
  STD_TORCH_CHECK(reason.empty(), "segpose: the cuda backend cannot run this call: ", reason);
}

// act(bias) everywhere: what a convolution over no channels gives.
void fill_with_bias(const DeviceScope& scope, Tensor& output, const OptionalTensor& bias, const ConvProblem& problem,
                    const Epilogue& epilogue) {
  fill_zeros(output);
  if (!bias.has_value() || output.numel() == 0) return;
  ConvProblem one = problem;
  one.c = one.k = output.size(1);
  one.groups = output.size(1);
  one.r = one.s = one.stride_h = one.stride_w = one.dilation_h = one.dilation_w = 1;
  one.pad_h = one.pad_w = 0;
  one.h = one.p = output.size(2);
  one.w = one.q = output.size(3);
  const Tensor weight = torch::stable::new_zeros(output, {output.size(1), 1, 1, 1});
  const Tensor source =
      torch::stable::new_zeros(output, {output.size(0), output.size(1), output.size(2), output.size(3)});
  run_gather(Context(scope, one, output), Pass::fprop, {view_of(source)}, weight, bias, output, epilogue);
}

bool is_empty(const Tensor& input, const Tensor& weight) { return input.numel() == 0 || weight.numel() == 0; }

Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvAttributes& attributes,
               double negative_slope) {
  const DeviceScope scope(input);
  const ConvProblem problem = make_problem(input, weight, attributes);
  const Ints shape = shape_of(problem, attributes.transposed);
  check_bias(bias, input, shape[1]);
  check_device(weight, "weight", input);
  if (bias.has_value()) check_device(*bias, "bias", input);
  const Epilogue epilogue = epilogue_from_slope(negative_slope);
  const Context context(scope, problem, input);
  check_extents(context);
  Tensor output = allocate(shape, input, suggests_channels_last(input) || suggests_channels_last(weight));
  if (is_empty(input, weight)) {
    fill_with_bias(scope, output, bias, problem, epilogue);
  } else {
    run_gather(context, attributes.transposed ? Pass::dgrad : Pass::fprop, {view_of(input)}, weight, bias, output,
               epilogue);
  }
  return output;
}

// The gradient as the other passes read it: masked, in rows where any of them would copy it, and summed for the bias.
struct Gradient {
  Operand operand;
  OptionalTensor storage;
};

Gradient load_gradient(const Context& context, const Tensor& grad_output, const OptionalTensor& output,
                       const Epilogue& epilogue, bool to_rows, const OptionalTensor& grad_bias) {
  Gradient gradient{{view_of(grad_output)}, std::nullopt};
  const bool masked = epilogue.activation != Activation::none;
  if (!masked && !to_rows && !grad_bias.has_value()) return gradient;
  const int64_t channels = grad_output.size(1);
  const int64_t groups = context.problem.groups;
  GradientPass pass{};
  pass.dtype = context.dtype;
  pass.gpu = context.scope.gpu;
  pass.n = grad_output.size(0);
  pass.channels = channels;
  pass.h = grad_output.size(2);
  pass.w = grad_output.size(3);
  pass.groups = groups;
  pass.depth = row_depth(channels / groups, context.dtype, context.tf32);
  pass.gradient = gradient.operand.view;
  pass.act = to_act(epilogue);
  pass.negative_slope = epilogue.negative_slope;
  if (masked) pass.output = view_of(*output);
  if (masked || to_rows) {
    gradient.storage = allocate_bytes(row_bytes(pass), grad_output);
    pass.rows = gradient.storage->data_ptr();
    gradient.operand.view =
        rows_view(pass.rows, groups * pass.depth, static_cast<int>(pass.h), static_cast<int>(pass.w));
    if (pass.depth != channels / groups) gradient.operand.depth = pass.depth;
  } else {
    pass.groups = 1;
    pass.depth = channels;
  }
  if (grad_bias.has_value()) pass.bias = grad_bias->data_ptr();
  const Tensor workspace = allocate_bytes(workspace_bytes(pass), grad_output);
  check_status(run(pass, workspace.data_ptr(), context.scope.stream));
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& output,
                                            const Tensor& input, const Tensor& weight, const ConvAttributes& attributes,
                                            double negative_slope, bool need_input, bool need_weight, bool need_bias) {
  const DeviceScope scope(input);
  const ConvProblem problem = make_problem(input, weight, attributes);
  const Ints shape = shape_of(problem, attributes.transposed);
  const Epilogue epilogue = epilogue_from_slope(negative_slope);
  check_same_shape(grad_output, "grad_output", input, shape);
  check_device(grad_output, "grad_output", input);
  check_device(weight, "weight", input);
  if (epilogue.activation != Activation::none) {
    STD_TORCH_CHECK(output.has_value(), "segpose: output is needed to mask the gradient of an activation");
    check_same_shape(*output, "output", input, shape);
    check_device(*output, "output", input);
  }
  const Context context(scope, problem, input);
  check_extents(context);
  const Ints none{0};
  Tensor grad_input = need_input ? allocate(shape_of(problem, !attributes.transposed), input,
                                            suggests_channels_last(input) || suggests_channels_last(weight))
                                 : torch::stable::new_empty(input, none);
  Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, none);
  note_tensor(grad_weight, Memory::output);
  OptionalTensor grad_bias;
  if (need_bias) {
    grad_bias = torch::stable::new_empty(weight, {shape[1]});
    note_tensor(*grad_bias, Memory::output);
  }
  need_input = need_input && grad_input.numel() > 0;
  need_weight = need_weight && grad_weight.numel() > 0;
  if (grad_output.numel() == 0) {
    fill_zeros(grad_input);
    fill_zeros(grad_weight);
    if (grad_bias.has_value()) fill_zeros(*grad_bias);
  } else {
    const Pass pass = attributes.transposed ? Pass::fprop : Pass::dgrad;
    const Operand in_place{view_of(grad_output)};
    const Operand other{view_of(input)};
    const auto wgrad_operands = [&](const Operand& gradient) {
      return attributes.transposed ? std::pair(other, gradient) : std::pair(gradient, other);
    };
    // A pass that would copy the gradient for itself gets it in rows.
    bool to_rows = false;
    if (need_input) {
      to_rows = plan_conv(gather_request(context, pass, in_place, weight, view_of(grad_input))).copy_source;
    }
    if (need_weight && !to_rows) {
      const auto [y_shaped, x_shaped] = wgrad_operands(in_place);
      const Plan plan = plan_conv(wgrad_request(context, y_shaped, x_shaped));
      to_rows = attributes.transposed ? plan.copy_activation : plan.copy_source;
    }
    const Gradient gradient = load_gradient(context, grad_output, output, epilogue, to_rows, grad_bias);
    if (need_input) {
      run_gather(context, pass, gradient.operand, weight, std::nullopt, grad_input, {Activation::none, 1.0});
    }
    if (need_weight) {
      const auto [y_shaped, x_shaped] = wgrad_operands(gradient.operand);
      run_wgrad(context, y_shaped, x_shaped, grad_weight);
    }
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
}  // namespace segpose::cuda

#ifdef SEGPOSE_SIMULATED
STABLE_TORCH_LIBRARY_IMPL(segpose_simulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(segpose, CUDA, m) {
#endif
  m.impl("conv2d_act", TORCH_BOX(&segpose::cuda::conv2d_act));
  m.impl("conv2d_act_backward", TORCH_BOX(&segpose::cuda::conv2d_act_backward));
  m.impl("conv_transpose2d_act", TORCH_BOX(&segpose::cuda::conv_transpose2d_act));
  m.impl("conv_transpose2d_act_backward", TORCH_BOX(&segpose::cuda::conv_transpose2d_act_backward));
}
