// SPDX-License-Identifier: BSD-3-Clause
// The mainloop of the tensor-core kernels: asynchronous copies of K blocks run kStages - 1 ahead of the products. The
// loop is unrolled over the stages, so where a stage lies is part of the instructions.
#pragma once

#include "ptx.cuh"

namespace segpose::cuda {

// `fetch(stage, k_block)` starts the copies of a K block into a stage, `land(stage)` writes what a fetch left in
// registers, `multiply(stage)` reads it. `next(k_block)` runs after each barrier, before the copies of k_block begin.
template <int kStages, class Next, class Fetch, class Multiply, class Land>
__device__ __forceinline__ void run_pipeline(int k_blocks, const Next& next, const Fetch& fetch,
                                             const Multiply& multiply, const Land& land) {
  unroll<kStages - 1>([&](auto stage) {
    __syncthreads();
    next(stage);
    if (stage < k_blocks) {
      fetch(stage, stage);
      land(stage);
    }
    commit_copies();
  });
  for (int i = 0; i < k_blocks; i += kStages) {
    unroll<kStages>([&](auto stage) {
      constexpr Constant<(stage + kStages - 1) % kStages> kFree{};
      const int ahead = i + stage + kStages - 1;
      if (i + stage >= k_blocks) return;
      wait_copies<kStages - 2>();
      // What the barrier says, besides that the copies of all threads are here: the stage multiplied last is free.
      __syncthreads();
      next(ahead);
      const bool more = ahead < k_blocks;
      if (more) fetch(kFree, ahead);
      commit_copies();
      multiply(stage);
      if (more) land(kFree);
    });
  }
}

}  // namespace segpose::cuda
