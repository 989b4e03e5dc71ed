// SPDX-License-Identifier: BSD-3-Clause
// wgrad as an implicit GEMM in full float32 or float64.
#pragma once

#include "fma_tile.cuh"
#include "wgrad_pixels.cuh"

namespace segpose::cuda {

template <class T, int BLOCK_M, int BLOCK_N>
struct WgradFma {
  using Sums = FmaAccumulators<T, BLOCK_M, BLOCK_N>;
  using Stage = typename Sums::Stage;
  static constexpr int BLOCK_K = Sums::BLOCK_K;
  static constexpr int kThreads = FmaTile::kThreads;
  static constexpr int kStages = FmaTile::kStages;
  using Pixels = WgradPixels<BLOCK_K>;
  static constexpr int kPixelBlocks = 2;
  static constexpr int kSharedBytes = FmaTile{BLOCK_M, BLOCK_N}.wgrad_shared_bytes(sizeof(T));
  static_assert(kSharedBytes == kStages * sizeof(Stage) + kPixelBlocks * sizeof(Pixels),
                "the plan must know what the kernel takes");

  __device__ __forceinline__ static void run(const WgradParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    auto* const stages = reinterpret_cast<Stage*>(shared);
    auto* const pixels = reinterpret_cast<Pixels*>(stages + kStages);

    // Block scheduling
    const WgradBlock block(p);
    const int64_t first = blockIdx.y * p.pixels_per_split;
    const int64_t end = min(p.pixels, first + p.pixels_per_split);
    const int k_blocks = static_cast<int>((end - first + BLOCK_K - 1) / BLOCK_K);
    const auto locate = [&](int k_block) {
      if (threadIdx.x < BLOCK_K) {
        const int64_t index = first + int64_t{k_block} * BLOCK_K + threadIdx.x;
        pixels[k_block % kPixelBlocks].locate(p, threadIdx.x, index, end, sizeof(T));
      }
    };

    // This thread copies one filter and one (tap, channel) of some pixels.
    const int filter = threadIdx.x % BLOCK_M;
    const bool filter_valid = static_cast<int>(block.m_tile) * BLOCK_M + filter < p.filters;
    const auto* const output = reinterpret_cast<const char*>(
        static_cast<const T*>(p.output.data) +
        (int64_t{block.group} * p.output_depth + int64_t{block.m_tile} * BLOCK_M + filter) * p.output.stride_c);
    const int column = threadIdx.x % BLOCK_N;
    WgradColumn place;
    place.locate(p, block.group, block.n_tile * BLOCK_N + column, sizeof(T));
    const auto fetch = [&](int k_block, Stage& stage) {
      const Pixels& located = pixels[k_block % kPixelBlocks];
#pragma unroll
      for (int k = threadIdx.x / BLOCK_M; k < BLOCK_K; k += kThreads / BLOCK_M) {
        copy_async_element<sizeof(T)>(shared_address(&stage.a[k][filter]), output + located.output[k].offset,
                                      filter_valid && located.output[k].bytes != 0);
      }
#pragma unroll
      for (int k = threadIdx.x / BLOCK_N; k < BLOCK_K; k += kThreads / BLOCK_N) {
        copy_async_element<sizeof(T)>(shared_address(&stage.b[k][column]), place.source + located.activation[k].offset,
                                      place.inside(p, located.activation[k]));
      }
    };

    // Mainloop
    Sums sums;
    locate(0);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      __syncthreads();
      locate(i + 1);
      if (i < k_blocks) fetch(i, stages[i]);
      commit_copies();
    }
    for (int i = 0; i < k_blocks; ++i) {
      wait_copies<kStages - 2>();
      __syncthreads();
      const int next = i + kStages - 1;
      locate(next + 1);
      if (next < k_blocks) fetch(next, stages[next % kStages]);
      commit_copies();
      sums.multiply(stages[i % kStages]);
    }

    // Epilogue
    T* const partial =
        static_cast<T*>(p.partial) + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (BLOCK_M * BLOCK_N);
    sums.for_each([&](int m, int n, T value) { partial[m * BLOCK_N + n] = value; });
  }
};

}  // namespace segpose::cuda
