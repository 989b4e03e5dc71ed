// SPDX-License-Identifier: BSD-3-Clause
// wgrad: dw[k][r][s][c] = sum over pixels of dy[pixel][k] * x[pixel shifted by the tap][c].
#pragma once

#include "executor.h"
#include "plan.h"
#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

template <class T>
struct WgradLaunch {
  const Plan* plan;
  TensorView grad;        // y-shaped side [N, P, Q, K], channel rows in the compute type
  TensorView activation;  // x-shaped side [N, H, W, C], likewise; see wgrad_reads_past
  T* partials;            // wgrad_partials elements
  char* scratch;          // workers * wgrad_scratch bytes
  FilterView destination;
};

// Vector loads may read this many elements past the last channel of the activation's last pixel: when it is not zero,
// the activation must be a staged copy with as many elements of slack.
template <class T>
int64_t wgrad_reads_past(const Plan& plan);

template <class T>
int64_t wgrad_partials(const Plan& plan);

template <class T>
int64_t wgrad_scratch(const Plan& plan);

template <class T>
void launch_wgrad(const WgradLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
