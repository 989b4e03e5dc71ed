// SPDX-License-Identifier: BSD-3-Clause
// wgrad as an implicit GEMM on tensor cores: gemm_m = filters, gemm_n = (tap, activation channel), gemm_k = output
// pixels, cut into pieces whose sums finish.cu adds in order. float means tf32.
#pragma once

#include <type_traits>

#include "wgrad_source.cuh"
#include "wgrad_warp_tile.cuh"

namespace segpose::cuda {

template <class T, int kTile, bool kNarrow>
struct WgradMma {
  static constexpr Tile kShape = kWgradTiles[kTile];
  static constexpr int BLOCK_M = kShape.block_m, BLOCK_N = kShape.block_n;
  static constexpr int WARP_M = kShape.warp_m, WARP_N = kShape.warp_n;
  static constexpr int BLOCK_K = kStageRowBytes / sizeof(T);
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStages = kShape.stages;
  using OutputLayout = WgradLayout<T, BLOCK_M>;
  using ActivationLayout = WgradLayout<T, BLOCK_N>;
  static constexpr int kStageBytes = OutputLayout::kBytes + ActivationLayout::kBytes;
  // Pixels of the K block that is copied next and of the one after it.
  static constexpr int kPixelBlocks = 2;
  static constexpr int kSharedBytes = wgrad_shared_bytes(kShape, sizeof(T));
  static_assert(kSharedBytes == kStages * kStageBytes + kPixelBlocks * BLOCK_K * sizeof(WgradPixel),
                "the plan must know what the kernel takes");

  using Source = std::conditional_t<kNarrow, NarrowWgradSource<T, BLOCK_M, BLOCK_N, kThreads>,
                                    AlignedWgradSource<T, BLOCK_M, BLOCK_N, kThreads>>;

  __device__ __forceinline__ static void run(const WgradParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t stages = shared_address(shared);
    auto* const pixels = reinterpret_cast<WgradPixel*>(shared + kStages * kStageBytes);

    // Block scheduling
    const WgradBlock block(p);
    const int64_t first = blockIdx.y * p.pixels_per_split;
    const int64_t end = min(p.pixels, first + p.pixels_per_split);
    const int k_blocks = static_cast<int>((end - first + BLOCK_K - 1) / BLOCK_K);
    // The warps take turns at locating the pixels of a K block.
    const auto locate = [&](int k_block) {
      const int thread = threadIdx.x - k_block % (kThreads / 32) * 32;
      if (thread >= 0 && thread < BLOCK_K) {
        pixels[k_block % kPixelBlocks * BLOCK_K + thread].locate(p, first + int64_t{k_block} * BLOCK_K + thread, end);
      }
    };

    // Mainloop
    WgradWarpTile<T, BLOCK_M, BLOCK_N, WARP_M, WARP_N> tile;
    Source source(p, block);
    locate(0);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      __syncthreads();
      locate(i + 1);
      if (i < k_blocks) {
        source.fetch(p, pixels + i % kPixelBlocks * BLOCK_K, stages + i * kStageBytes);
        source.land(stages + i * kStageBytes);
      }
      commit_copies();
    }
    uint32_t reading = stages;
    uint32_t writing = stages + (kStages - 1) * kStageBytes;
    for (int i = 0; i < k_blocks; ++i) {
      wait_copies<kStages - 2>();
      __syncthreads();
      const int next = i + kStages - 1;
      locate(next + 1);
      const bool more = next < k_blocks;
      if (more) source.fetch(p, pixels + next % kPixelBlocks * BLOCK_K, writing);
      commit_copies();
      tile.multiply(reading);
      if (more) source.land(writing);
      reading = reading == stages + (kStages - 1) * kStageBytes ? stages : reading + kStageBytes;
      writing = writing == stages + (kStages - 1) * kStageBytes ? stages : writing + kStageBytes;
    }

    // Epilogue
    float* const partial =
        static_cast<float*>(p.partial) + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (BLOCK_M * BLOCK_N);
    tile.store(partial);
  }
};

}  // namespace segpose::cuda
