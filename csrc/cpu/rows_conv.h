// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad of few channels: see rows_plan.h.
#pragma once

#include "executor.h"
#include "packing.h"
#include "plan.h"
#include "staging.h"

namespace segpose {

template <class T>
struct RowsLaunch {
  const Plan* plan;
  const PackedFilter* layout;
  MaskedSource source;     // any layout and dtype
  TensorView destination;  // likewise
  const T* packed;         // pack_filter
  const T* bias;           // pack_bias, or null
  char* scratch;           // workers * rows_scratch
  Epilogue epilogue;
};

// Bytes of scratch per worker.
template <class T>
int64_t rows_scratch(const Plan& plan, const MaskedSource& source);

template <class T>
void launch_rows(const RowsLaunch<T>& launch, const Executor& executor);

}  // namespace segpose
