// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad in a transformed domain (Winograd, Fourier): transform the tiles of a block, one GEMM per frequency,
// transform back with the epilogue.
#pragma once

#include "executor.h"
#include "plan.h"
#include "staging.h"
#include "tensor_view.h"

namespace segpose {

// Transformed filters: [phase][group][frequency][panel] blocks, in bytes. A block is [depth][panel columns] values
// (real and imaginary vectors in turn), or the tiles of a split GEMM.
struct TransformFilter {
  int64_t panel, frequency, group, phase, size;

  explicit TransformFilter(const Plan& plan);
};

// Bytes of scratch per worker.
int64_t transform_filter_scratch(const Plan& plan);
void pack_transform_filter(const Plan& plan, const TransformFilter& layout, const FilterView& filter, char* packed,
                           char* scratch, const Executor& executor);

struct TransformLaunch {
  const Plan* plan;
  const TransformFilter* layout;
  MaskedSource source;
  TensorView destination;
  const char* packed;
  const float* bias;  // [group][panels * panel columns], or null
  char* scratch;      // transform_scratch
  Epilogue epilogue;
};

// Whether the pass can write the largest values of 2 x 2 pixels, in channel rows of floats.
bool transform_can_pool(const Plan& plan);

// Bytes of scratch of all workers.
int64_t transform_scratch(const Plan& plan, const MaskedSource& source, int64_t workers);
void launch_transform(const TransformLaunch& launch, const Executor& executor);

}  // namespace segpose
