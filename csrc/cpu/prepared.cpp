// SPDX-License-Identifier: BSD-3-Clause
// Inference: convolutions bound to one input shape, with their plan made and their filter packed once, that write where
// the caller says. Python holds them by number (segpose_kernels/swap/filters.py).
#include "prepared.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "passes.h"
#include "registry.h"
#include "settings.h"
#include "staging.h"
#include "torch_views.h"
#include "workspace.h"

namespace segpose {
namespace {

// A tensor as it was, to tell whether it has changed since. Torch's version counter misses what is written through
// `.data`, NumPy or another process: a few elements from all over the tensor are compared too.
class Snapshot {
 public:
  explicit Snapshot(const Tensor& tensor)
      : tensor_(tensor), data_(tensor.data_ptr()), type_(tensor.scalar_type()), samples_(sample(data_)) {}

  const Tensor& tensor() const { return tensor_; }

  bool current() const {
    const void* const data = tensor_.data_ptr();
    return data == data_ && tensor_.scalar_type() == type_ && sample(data) == samples_;
  }

  // FNV-1a over what is compared.
  int64_t hash(int64_t seed) const {
    auto value = static_cast<uint64_t>(seed);
    const auto mix = [&](int64_t word) { value = (value ^ static_cast<uint64_t>(word)) * 0x100000001b3u; };
    mix(reinterpret_cast<int64_t>(data_));
    for (const int64_t word : samples_) mix(word);
    return static_cast<int64_t>(value);
  }

 private:
  static constexpr int64_t kSamples = 16;
  using Samples = std::array<int64_t, kSamples>;

  Samples sample(const void* data) const {
    switch (tensor_.element_size()) {
      case sizeof(int64_t):
        return sample_as(static_cast<const int64_t*>(data));
      case sizeof(int32_t):
        return sample_as(static_cast<const int32_t*>(data));
      case sizeof(int16_t):
        return sample_as(static_cast<const int16_t*>(data));
      default:
        return sample_as(static_cast<const int8_t*>(data));
    }
  }

  // Parameters are dense in some order of their axes, so every element lies in the first `count`.
  template <class Word>
  Samples sample_as(const Word* words) const {
    Samples samples{};
    const int64_t count = tensor_.numel();
    for (int64_t i = 0; i < kSamples && count > 0; ++i) {
      samples[static_cast<size_t>(i)] = words[(count - 1) * i / (kSamples - 1)];
    }
    return samples;
  }

  Tensor tensor_;
  const void* data_;
  torch::headeronly::ScalarType type_;
  Samples samples_;
};

}  // namespace

struct PreparedConv {
  static constexpr const char* kName = "prepared convolution";

  Plan plan;
  Ints input_shape, output_shape;
  Snapshot weight;
  std::optional<Snapshot> bias;
  OptionalTensor packed;  // without, the filter is packed on every run
  Epilogue epilogue;
  int64_t settings;

  bool current() const {
    return settings == settings_key() && weight.current() && (!bias.has_value() || bias->current());
  }
};

namespace {

using Convolutions = Registry<PreparedConv>;

// The packed filter of one of these, if it fits.
OptionalTensor packed_by(const Ints& donors, const Plan& plan, const Tensor& weight) {
  for (const int64_t handle : donors) {
    const std::shared_ptr<const PreparedConv> donor = Convolutions::instance().get(handle);
    if (donor->packed.has_value() && donor->weight.tensor().data_ptr() == weight.data_ptr() && donor->current() &&
        same_packing(donor->plan, plan)) {
      return donor->packed;
    }
  }
  return std::nullopt;
}

// Takes the packed filter of a donor, which was prepared from the same weight for another shape, or packs its own
// unless that takes more than `max_bytes`.
int64_t prepare_conv(const Tensor& weight, const OptionalTensor& bias, Ints input_shape, Ints stride, Ints padding,
                     Ints output_padding, Ints dilation, int64_t groups, bool transposed, double negative_slope,
                     int64_t max_bytes, Ints donors) {
  const ConvAttributes attributes{stride, padding, output_padding, dilation, groups, transposed};
  const ConvProblem problem = make_problem(input_shape, weight, attributes);
  const Ints output_shape = shape_of(problem, transposed);
  check_bias(bias, weight, output_shape[1]);
  STD_TORCH_CHECK(problem.n > 0 && problem.c > 0 && problem.k > 0, "segpose: an empty problem cannot be prepared");
  const Precision precision = current_precision(problem.flops(), weight);
  Plan plan = *plan_for(problem, forward_pass(attributes), weight, precision, true);
  OptionalTensor packed = packed_by(donors, plan, weight);
  const int64_t bytes = packed_filter_bytes(plan);
  if (!packed.has_value() && filter_bytes_in_pages(bytes) <= max_bytes) {
    packed = allocate_filter(bytes, weight.device());
    const Executor executor = torch_executor();
    const Workspace workspace(pack_workspace(plan, executor.workers), weight);
    pack_pass_filter(plan, filter_of(weight), packed->data_ptr(), workspace.data(), executor);
  }
  if (!packed.has_value()) {
    plan = *plan_for(problem, forward_pass(attributes), weight, precision);
  }
  std::optional<Snapshot> bias_snapshot;
  if (bias.has_value()) bias_snapshot.emplace(*bias);
  return Convolutions::instance().add(std::make_shared<const PreparedConv>(
      PreparedConv{std::move(plan), std::move(input_shape), output_shape, Snapshot(weight), bias_snapshot, packed,
                   epilogue_from_slope(negative_slope), settings_key()}));
}

void check_operand(const TensorView& view, const char* name, const Ints& shape, const PreparedConv& conv) {
  STD_TORCH_CHECK(view.n == shape[0] && view.c == shape[1] && view.h == shape[2] && view.w == shape[3],
                  "segpose: ", name, " must have the prepared shape ", shape[0], " x ", shape[1], " x ", shape[2],
                  " x ", shape[3]);
  STD_TORCH_CHECK(view.dtype == conv.plan.dtype, "segpose: ", name, " must have the dtype of weight");
}

// Position of the first that is not current, or -1.
int64_t first_stale(Ints handles) {
  for (size_t i = 0; i < handles.size(); ++i) {
    if (!Convolutions::instance().get(handles[i])->current()) return static_cast<int64_t>(i);
  }
  return -1;
}

// A number that differs when the memory or the sampled values of one of the tensors do.
int64_t fingerprint(std::vector<Tensor> tensors) {
  int64_t hash = 0;
  for (const Tensor& tensor : tensors) hash = Snapshot(tensor).hash(hash);
  return hash;
}

// The plan, the bytes of the packed filter and where it lies: convolutions may share one.
std::tuple<std::string, int64_t, int64_t> prepared_info(int64_t handle) {
  const std::shared_ptr<const PreparedConv> conv = Convolutions::instance().get(handle);
  const bool packed = conv->packed.has_value();
  return {conv->plan.str(), packed ? conv->packed->numel() : 0,
          packed ? reinterpret_cast<int64_t>(conv->packed->data_ptr()) : 0};
}

// Memory for activations that are kept between runs.
Tensor allocate_workspace(const Tensor& like, int64_t bytes) {
  STD_TORCH_CHECK(bytes >= 0, "segpose: bytes must not be negative, got ", bytes);
  return allocate_bytes(bytes, like.device(), Use::runs);
}

void run(const PreparedConv& conv, const TensorView& input, const TensorView& output, const Epilogue& epilogue) {
  const Tensor& weight = conv.weight.tensor();
  check_operand(input, "input", conv.input_shape, conv);
  STD_TORCH_CHECK(to_dtype(weight) == conv.plan.dtype,
                  "segpose: the dtype of weight has changed since it was prepared");
  // Waking the others takes some microseconds.
  constexpr double kAloneCycles = 12e3;
  constexpr double kByteCycles = 0.05;  // of operands that may come from beyond L2
  Executor executor = torch_executor();
  if (conv.plan.cycles + kByteCycles * conv.plan.bytes < kAloneCycles) executor.workers = 1;
  const Tensor* bias = conv.bias.has_value() ? &conv.bias->tensor() : nullptr;
  const GatherPass request{&conv.plan,
                           {input, nullptr},
                           filter_of(weight),
                           conv.packed.has_value() ? conv.packed->data_ptr() : nullptr,
                           bias != nullptr ? bias->data_ptr() : nullptr,
                           bias != nullptr ? bias->stride(0) : 0,
                           output,
                           epilogue};
  const Workspace workspace(gather_workspace(request, executor.workers), weight);
  run_gather_pass(request, workspace.data(), executor);
}

void run_one(int64_t handle, const Tensor& input, Tensor output) {
  const std::shared_ptr<const PreparedConv> conv = find_prepared(handle);
  run_prepared(*conv, checked_view(input, "input"), checked_view(output, "output"));
}

}  // namespace

std::shared_ptr<const PreparedConv> find_prepared(int64_t handle) { return Convolutions::instance().get(handle); }

void release_prepared(int64_t handle) { Convolutions::instance().remove(handle); }

bool is_current(const PreparedConv& conv) { return conv.current(); }

void run_prepared(const PreparedConv& conv, const TensorView& input, const TensorView& output) {
  check_operand(output, "output", conv.output_shape, conv);
  run(conv, input, output, conv.epilogue);
}

bool run_prepared_pooled(const PreparedConv& conv, const TensorView& input, const TensorView& output) {
  const Ints& shape = conv.output_shape;
  check_operand(output, "output", {shape[0], shape[1], shape[2] / 2, shape[3] / 2}, conv);
  if (!can_pool(conv.plan, output)) return false;
  Epilogue epilogue = conv.epilogue;
  epilogue.pooled = true;
  run(conv, input, output, epilogue);
  return true;
}

}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) {
  m.impl("prepare_conv", TORCH_BOX(&segpose::prepare_conv));
  m.impl("run_prepared", TORCH_BOX(&segpose::run_one));
  m.impl("fingerprint", TORCH_BOX(&segpose::fingerprint));
  m.impl("allocate_workspace", TORCH_BOX(&segpose::allocate_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(segpose, CompositeExplicitAutograd, m) {
  m.impl("first_stale", TORCH_BOX(&segpose::first_stale));
  m.impl("prepared_info", TORCH_BOX(&segpose::prepared_info));
  m.impl("release_prepared", TORCH_BOX(&segpose::release_prepared));
}
