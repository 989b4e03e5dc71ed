// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad as a split GEMM on AMX tiles: packed planes of the source times packed filters.
#pragma once

#include "executor.h"
#include "split_pack.h"

namespace segpose {

struct SplitLaunch {
  const Plan* plan;
  const SplitFilter* layout;
  MaskedSource source;
  TensorView destination;
  const char* packed;  // pack_split_filter
  const float* bias;   // [group][panels * 32], or null
  char* scratch;       // workers * split_scratch
  Epilogue epilogue;
};

// Whether the pass can write the largest values of 2 x 2 pixels, with channels side by side.
bool split_can_pool(const Plan& plan);

// Bytes of scratch per worker.
int64_t split_scratch(const Plan& plan, const MaskedSource& source);

void launch_split(const SplitLaunch& launch, const Executor& executor);

}  // namespace segpose
