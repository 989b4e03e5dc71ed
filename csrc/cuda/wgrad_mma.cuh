// SPDX-License-Identifier: BSD-3-Clause
// wgrad as an implicit GEMM on tensor cores: gemm_m = filters, gemm_n = (tap, activation channel), gemm_k = output
// pixels, cut into pieces whose sums finish.cuh adds in order. float means tf32.
#pragma once

#include <type_traits>

#include "pipeline.cuh"
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
  using Pixels = WgradPixels<BLOCK_K>;
  // Of the K block that is copied next and of the one after it.
  static constexpr int kPixelBlocks = 2;
  static constexpr int kSharedBytes = wgrad_shared_bytes(kShape, sizeof(T));
  static_assert(kSharedBytes == kStages * kStageBytes + kPixelBlocks * sizeof(Pixels),
                "the plan must know what the kernel takes");

  using Source = std::conditional_t<kNarrow, NarrowWgradSource<T, BLOCK_M, BLOCK_N, kThreads>,
                                    AlignedWgradSource<T, BLOCK_M, BLOCK_N, kThreads>>;

  __device__ __forceinline__ static void run(const WgradParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t stages = shared_address(shared);
    auto* const pixels = reinterpret_cast<Pixels*>(shared + kStages * kStageBytes);

    // Block scheduling
    const WgradBlock block(p);
    const int64_t first = blockIdx.y * p.pixels_per_split;
    const int64_t end = min(p.pixels, first + p.pixels_per_split);
    const int k_blocks = static_cast<int>((end - first + BLOCK_K - 1) / BLOCK_K);
    // The warps take turns at locating the pixels of a K block.
    const unsigned warp = threadIdx.x / 32;
    const unsigned lane = threadIdx.x % 32;
    const auto locate = [&](unsigned k_block) {
      if (k_block % (kThreads / 32) == warp && lane < BLOCK_K) {
        const int64_t index = first + k_block * BLOCK_K + lane;
        pixels[k_block % kPixelBlocks].locate(p, lane, index, end, sizeof(T));
      }
    };

    // Mainloop
    WgradWarpTile<T, BLOCK_M, BLOCK_N, WARP_M, WARP_N> tile(stages);
    Source source(p, block, stages);
    locate(0);
    run_pipeline<kStages>(
        k_blocks, [&](unsigned k_block) { locate(k_block + 1); },
        [&](auto stage, unsigned k_block) {
          source.template fetch<stage * kStageBytes>(p, pixels[k_block % kPixelBlocks]);
        },
        [&](auto stage) { tile.template multiply<stage * kStageBytes>(); },
        [&](auto stage) { source.template land<stage * kStageBytes>(); });

    // Epilogue
    float* const partial =
        static_cast<float*>(p.partial) + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (BLOCK_M * BLOCK_N);
    tile.store(partial);
  }
};

}  // namespace segpose::cuda
