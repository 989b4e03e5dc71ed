// SPDX-License-Identifier: BSD-3-Clause
// Plain C entries to the kernels: parameters and a stream in, an error code out. No torch, no allocation, no
// synchronisation; an error names a bad argument (cudaErrorInvalidValue) or is the runtime's.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace segpose::cuda {

// The kernels of one element type. `tile` counts kGatherTiles or kWgradTiles; entries that a type has no kernel for are
// null: tensor cores compute float16, bfloat16 and float (as tf32), multiply-adds float and double.
struct Launchers {
  cudaError_t (*gather_mma)(const GatherParams&, int tile, bool narrow, cudaStream_t);
  cudaError_t (*gather_fma)(const GatherParams&, cudaStream_t);
  cudaError_t (*finish_gather)(const GatherParams&, int block_m, int block_n, cudaStream_t);
  cudaError_t (*direct)(const GatherParams&, int columns, bool vector, cudaStream_t);
  cudaError_t (*depthwise)(const GatherParams&, bool vector, cudaStream_t);
  cudaError_t (*wgrad_mma)(const WgradParams&, int tile, bool narrow, cudaStream_t);
  cudaError_t (*wgrad_fma)(const WgradParams&, cudaStream_t);
  cudaError_t (*depthwise_wgrad)(const WgradParams&, cudaStream_t);
  cudaError_t (*pack_filter)(const PackParams&, bool tf32, cudaStream_t);
  cudaError_t (*rows)(const RowsParams&, bool vector, cudaStream_t);
  cudaError_t (*finish_wgrad)(const FinishParams&, cudaStream_t);
  cudaError_t (*finish_bias)(const FinishBiasParams&, cudaStream_t);
};

extern const Launchers kLaunchersF16, kLaunchersBF16, kLaunchersF32, kLaunchersF64;

}  // namespace segpose::cuda
