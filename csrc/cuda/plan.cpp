// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>

#include "plan_parts.h"

namespace segpose::cuda {
namespace {

// A copy to padded rows does not pay when it adds more padding than this.
constexpr double kCopyPadding = 1.5;

double tensor_bytes(const ConvProblem& problem, DType dtype) {
  const double x = as_double(problem.n * problem.h * problem.w * problem.c);
  const double y = as_double(problem.n * problem.p * problem.q * problem.k);
  const double w = as_double(problem.k * problem.c_per_group() * problem.taps());
  return (x + y + w) * as_double(dtype_size(dtype));
}

int64_t packed_filter_bytes(const Plan& plan) {
  if (!plan.pack_filter) return 0;
  const ConvProblem& problem = plan.request.problem;
  int64_t elements = 0;
  for (const Phase& phase : plan.phases) {
    const int64_t pitch = round_up(static_cast<int64_t>(phase.taps.size()) * plan.depth, plan.block_k);
    elements += pitch * plan.columns * problem.groups;
  }
  return elements * plan.element();
}

// Bytes of an operand as aligned rows.
int64_t row_bytes(const Plan& plan, int64_t pixels, int64_t channels) {
  const int64_t chunk = plan.algorithm == Algorithm::mma ? per_chunk(plan.request.dtype) : 1;
  return pixels * plan.request.problem.groups * round_up(channels, chunk) * plan.element();
}

}  // namespace

int64_t row_depth(int64_t channels, DType dtype, bool tf32) {
  if (!uses_mma(dtype, tf32)) return channels;
  const int64_t padded = round_up(channels, per_chunk(dtype));
  return as_double(padded) <= kCopyPadding * as_double(channels) ? padded : channels;
}

std::string unsupported(const PlanRequest& request) {
  const ConvProblem& p = request.problem;
  constexpr int64_t kLimit = (int64_t{1} << 31) - 512;
  const auto over = [](const char* what, int64_t value) {
    return std::string(what) + " must be below 2^31, got " + std::to_string(value);
  };
  if (p.n * p.h * p.w >= kLimit) return over("pixels of the activation", p.n * p.h * p.w);
  if (p.n * p.p * p.q >= kLimit) return over("pixels of the output", p.n * p.p * p.q);
  const int64_t weights = p.k * round_up(p.c_per_group(), kChunkBytes) * p.taps();
  if (weights >= kLimit) return over("elements of the filter", weights);
  return "";
}

Plan plan_conv(const PlanRequest& request) {
  Plan plan{};
  plan.request = request;
  plan.splits = 1;
  plan.flops = request.problem.flops();
  plan.bytes = plan.moved_bytes = tensor_bytes(request.problem, request.dtype);
  if (request.pass == Pass::wgrad) {
    plan_wgrad(plan);
  } else {
    plan_gather(plan);
    if (plan.splits > 1) {
      plan.partial_bytes =
          plan.splits * plan.blocks * plan.block_m * plan.block_n * (request.dtype == DType::float64 ? 8 : 4);
    }
  }
  const ConvProblem& p = request.problem;
  plan.filter_bytes = packed_filter_bytes(plan);
  if (plan.copy_source) {
    const int64_t channels = request.pass == Pass::fprop ? p.c_per_group() : p.k_per_group();
    plan.rows_bytes = row_bytes(plan, source_pixels(request), channels);
  }
  if (plan.copy_activation) plan.activation_bytes = row_bytes(plan, p.n * p.h * p.w, p.c_per_group());
  plan.moved_bytes =
      plan.bytes + 2.0 * as_double(plan.filter_bytes + plan.rows_bytes + plan.activation_bytes + plan.partial_bytes);
  return plan;
}

}  // namespace segpose::cuda
