// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad as an implicit GEMM on tensor cores: gemm_m = destination pixels of a phase, gemm_n = destination
// channels, gemm_k = (tap, source channel). float means tf32.
#pragma once

#include <type_traits>

#include "gather_source.cuh"
#include "pipeline.cuh"
#include "warp_tile.cuh"

namespace segpose::cuda {

// Loader of the packed filters: [BLOCK_N columns][64 bytes of gemm_k]. Rows are padded to whole K blocks.
template <class T, int BLOCK_N, int kThreads>
class FilterTile {
 public:
  static constexpr int kRows = BLOCK_N * kChunksPerRow / kThreads;

  __device__ __forceinline__ FilterTile(const GatherParams& p, const GatherBlock& block, const PhaseParams& phase,
                                        int k_block, uint32_t target) {
    const int first = threadIdx.x / kChunksPerRow;
    const int chunk = threadIdx.x % kChunksPerRow;
    const int64_t column = int64_t{block.n_tile} * BLOCK_N + first;
    const int64_t pitch = int64_t{phase.filter_pitch} * sizeof(T);
    const char* const first_row = static_cast<const char*>(p.filter) + phase.filter_start * int64_t{sizeof(T)} +
                                  (int64_t{block.group} * p.columns + column) * pitch + k_block * kStageRowBytes +
                                  chunk * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      row_[i] = first_row + i * (kThreads / kChunksPerRow) * pitch;
      bytes_[i] = column + i * (kThreads / kChunksPerRow) < p.columns ? kChunkBytes : 0;
    }
    target_ = target + swizzled(first, chunk);
    keep(target_);
  }

  template <int kStage>
  __device__ __forceinline__ void fetch() {
    unroll<kRows>([&](auto i) {
      copy_async_16<kStage + i*(kThreads / kChunksPerRow) * kStageRowBytes>(target_, row_[i], bytes_[i]);
      row_[i] += kStageRowBytes;
    });
  }

 private:
  const char* row_[kRows];
  int bytes_[kRows];
  uint32_t target_;
};

template <class T, int kTile, bool kNarrow>
struct GatherMma {
  static constexpr Tile kShape = kGatherTiles[kTile];
  static constexpr int BLOCK_M = kShape.block_m, BLOCK_N = kShape.block_n;
  static constexpr int WARP_M = kShape.warp_m, WARP_N = kShape.warp_n;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStages = kShape.stages;
  static constexpr int kStageBytes = kShape.stage_bytes();
  // Finished elements go through shared memory a slab of columns at a time; eight elements of padding keep the writes
  // of a warp's rows apart.
  static constexpr int SLAB_N = sizeof(T) == 4 ? 32 : WARP_N;
  static constexpr int kPitch = SLAB_N + 8;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static_assert(BLOCK_M * kPitch * sizeof(T) <= kPipelineBytes, "a slab must fit where the stages were");

  using Source = std::conditional_t<kNarrow, NarrowSource<T, BLOCK_M, kThreads>, AlignedSource<T, BLOCK_M, kThreads>>;
  using Filter = FilterTile<T, BLOCK_N, kThreads>;
  using Tables = DestinationTables<T, BLOCK_M, BLOCK_N>;
  static constexpr int kSharedBytes = gather_shared_bytes(kShape);
  static_assert(kSharedBytes == kPipelineBytes + sizeof(Tables), "the plan must know what the kernel takes");

  __device__ __forceinline__ static void run(const GatherParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t stages = shared_address(shared);
    Tables& tables = *reinterpret_cast<Tables*>(shared + kPipelineBytes);

    // Block scheduling
    const GatherBlock block(p);
    const PhaseParams& phase = p.phases[block.phase];
    const int first = blockIdx.y * p.k_blocks_per_split;
    const int k_blocks = max(0, min(phase.k_blocks - first, p.k_blocks_per_split));
    if (p.partial == nullptr) tables.fill(p, block, phase);

    // Mainloop
    WarpTile<T, WARP_M, WARP_N> tile(stages, BLOCK_M * kStageRowBytes, threadIdx.x / 32 / (BLOCK_N / WARP_N),
                                     threadIdx.x / 32 % (BLOCK_N / WARP_N));
    {
      Source source(p, block, phase, first, stages);
      Filter filter(p, block, phase, first, stages + BLOCK_M * kStageRowBytes);
      run_pipeline<kStages>(
          k_blocks, [](int) {},
          [&](auto stage, int) {
            source.template fetch<stage * kStageBytes>(p);
            filter.template fetch<stage * kStageBytes>();
          },
          [&](auto stage) { tile.template multiply<stage * kStageBytes>(); },
          [&](auto stage) { source.template land<stage * kStageBytes>(); });
    }

    // Epilogue
    if (p.partial != nullptr) {
      float* const partial =
          static_cast<float*>(p.partial) + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (BLOCK_M * BLOCK_N);
      tile.for_each_pair([&](int m, int n, float v0, float v1) { store_pair(partial + m * BLOCK_N + n, v0, v1); });
      return;
    }
    wait_copies<0>();
    const auto slope = static_cast<float>(p.epilogue.negative_slope);
    T* const slab = reinterpret_cast<T*>(shared);
#pragma unroll 1
    for (int first_column = 0; first_column < BLOCK_N; first_column += SLAB_N) {
      __syncthreads();
      tile.for_each_pair([&](int m, int n, float v0, float v1) {
        if (static_cast<unsigned>(n - first_column) >= SLAB_N) return;
        Pair<T> pair;
        pair.value[0] = narrow<T>(activate(v0 + tables.bias[n], p.epilogue.act, slope));
        pair.value[1] = narrow<T>(activate(v1 + tables.bias[n + 1], p.epilogue.act, slope));
        *reinterpret_cast<Pair<T>*>(slab + m * kPitch + n - first_column) = pair;
      });
      __syncthreads();
      store_slab<T, BLOCK_M, BLOCK_N, SLAB_N, kPitch>(p, slab, tables, first_column);
    }
  }
};

}  // namespace segpose::cuda
