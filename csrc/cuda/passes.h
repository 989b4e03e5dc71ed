// SPDX-License-Identifier: BSD-3-Clause
// plan -> launch: turns a plan and its operands into the parameters of kernels, and enqueues them. Host-only, no torch,
// no allocation: the caller brings the workspace.
#pragma once

#include "launch.h"
#include "plan.h"

namespace segpose::cuda {

// A filter [K, C / groups, R, S] with any strides.
struct FilterView {
  void* data;
  int64_t stride_k, stride_c, stride_r, stride_s;
};

struct GatherPass {
  const Plan& plan;
  View source;
  FilterView filter;
  const void* bias;
  int64_t bias_stride;
  View destination;
  Act act;
  double negative_slope;
};

struct WgradPass {
  const Plan& plan;
  View output;      // y-shaped: gradient of a convolution, input of a transposed one
  View activation;  // x-shaped
  FilterView gradient;
};

// What the passes of a backward share: the gradient after the activation's mask, and its sums.
struct GradientPass {
  DType dtype;
  Gpu gpu;
  int64_t n, channels, h, w;
  int64_t groups, depth;  // of the rows; the depth is a group's channels with their padding
  View gradient;
  View output;  // data null: no mask
  Act act;
  double negative_slope;
  void* rows;  // [pixels][groups][depth], null: the gradient is used where it is
  void* bias;  // gradient of the bias [channels], or null
};

int64_t workspace_bytes(const Plan& plan);
int64_t workspace_bytes(const GradientPass& pass);
int64_t row_bytes(const GradientPass& pass);

// An error and the kernel whose launch it came from.
struct Status {
  cudaError_t error = cudaSuccess;
  const char* kernel = "";
};

Status run(const GatherPass& pass, void* workspace, cudaStream_t stream);
Status run(const WgradPass& pass, void* workspace, cudaStream_t stream);
Status run(const GradientPass& pass, void* workspace, cudaStream_t stream);

// Dense rows [n][h][w][channels].
View rows_view(void* data, int64_t channels, int h, int w);

// Rows of channels in which every pixel lies on a 16-byte boundary.
bool in_aligned_rows(const View& view, DType dtype);

}  // namespace segpose::cuda
