// SPDX-License-Identifier: BSD-3-Clause
// launch: one whole pass over tensors of any layout and dtype, given workspace. No torch, no allocation.
#pragma once

#include "executor.h"
#include "plan.h"
#include "staging.h"
#include "tensor_view.h"

namespace segpose {

// fprop or dgrad: destination = act(gather(source, filter) + bias).
struct GatherPass {
  const Plan* plan;
  MaskedSource source;  // masked only where the plan masks_source
  FilterView filter;
  const void* packed;  // pack_pass_filter of this plan and filter, or null: then it is packed on the way
  const void* bias;    // [destination channels] of the filter's dtype, or null
  int64_t bias_stride;
  TensorView destination;
  Epilogue epilogue;
};

// The filter of a fprop or dgrad as its algorithm reads it.
int64_t packed_filter_bytes(const Plan& plan);
// Whether a filter packed for one plan is the other's too.
bool same_packing(const Plan& a, const Plan& b);
int64_t pack_workspace(const Plan& plan, int64_t workers);
void pack_pass_filter(const Plan& plan, const FilterView& filter, void* packed, void* workspace,
                      const Executor& executor);

// Whether the pass can pool on its way to this destination, which has half the extents (see Epilogue::pooled).
bool can_pool(const Plan& plan, const TensorView& destination);

// Bytes of workspace for run_gather_pass with that many workers.
int64_t gather_workspace(const GatherPass& pass, int64_t workers);
void run_gather_pass(const GatherPass& pass, void* workspace, const Executor& executor);

struct WgradPass {
  const Plan* plan;
  MaskedSource grad;        // y-shaped
  MaskedSource activation;  // x-shaped; one of the two may be masked, as in GatherPass
  FilterView destination;
};

// Whether a pass reads planes of the gradient where they lie.
bool reads_planes(const GatherPass& pass);
bool reads_planes(const WgradPass& pass);

int64_t wgrad_workspace(const WgradPass& pass, int64_t workers);
void run_wgrad_pass(const WgradPass& pass, void* workspace, const Executor& executor);

// The backward prologue: masks dy by the sign of y and sums the bias gradient, in one pass over dy.
struct GradientPass {
  MaskedSource grad;
  Isa isa;
  TensorView masked;  // NHWC, or planes where dy has them, in the compute type; no data where dy is read in place
  void* bias_grad;    // [c] of dy's dtype, or null
};

int64_t gradient_workspace(const GradientPass& pass, int64_t workers);
void run_gradient_pass(const GradientPass& pass, void* workspace, const Executor& executor);

// float for everything but float64.
inline DType compute_dtype_of(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

}  // namespace segpose
