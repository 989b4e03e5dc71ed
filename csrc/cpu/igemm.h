// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad: for every phase, gathered source rows times packed filters, with the epilogue on the way out.
#pragma once

#include "executor.h"
#include "packing.h"
#include "plan.h"
#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

template <class T>
struct GatherLaunch {
  const Plan* plan;
  const PackedFilter* layout;
  TensorView source;       // channel rows in the compute type
  TensorView destination;  // any layout and dtype
  const T* packed;         // pack_filter
  const T* bias;           // pack_bias, or null
  const T* zeros;          // source channels of all groups: what padding reads
  char* scratch;           // workers * gather_scratch
  Epilogue epilogue;
};

// Bytes of scratch per worker.
template <class T>
int64_t gather_scratch(const Plan& plan);

template <class T>
void launch_gather(const GatherLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
