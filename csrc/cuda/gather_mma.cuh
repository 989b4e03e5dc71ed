// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad as an implicit GEMM on tensor cores: gemm_m = destination pixels of a phase, gemm_n = destination
// channels, gemm_k = (tap, source channel). float means tf32.
#pragma once

#include "gather_source.cuh"
#include "warp_tile.cuh"

namespace segpose::cuda {

// Loader of the packed filters: [BLOCK_N columns][64 bytes of gemm_k], kOffset bytes into a stage. Rows are padded to
// whole K blocks.
template <class T, int BLOCK_N, int kThreads, int kOffset>
class FilterTile {
 public:
  static constexpr int kRows = BLOCK_N * kChunksPerRow / kThreads;

  __device__ __forceinline__ FilterTile(const GatherParams& p, const GatherBlock& block, const PhaseParams& phase,
                                        int k_block) {
    const int first = threadIdx.x / kChunksPerRow;
    const int chunk = threadIdx.x % kChunksPerRow;
    const int64_t column = int64_t{block.n_tile} * BLOCK_N + first;
    const int64_t pitch = int64_t{phase.filter_pitch} * sizeof(T);
    row_ = static_cast<const char*>(p.filter) + phase.filter_start * int64_t{sizeof(T)} +
           (int64_t{block.group} * p.columns + column) * pitch + k_block * kStageRowBytes + chunk * kChunkBytes;
    step_ = pitch * (kThreads / kChunksPerRow);
#pragma unroll
    for (int i = 0; i < kRows; ++i) valid_[i] = column + i * (kThreads / kChunksPerRow) < p.columns;
    target_ = kOffset + swizzled(first, chunk);
  }

  __device__ __forceinline__ void fetch(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy_async_16(stage + target_ + i * (kThreads / kChunksPerRow) * kStageRowBytes, row_ + i * step_, valid_[i]);
    }
    row_ += kStageRowBytes;
  }

 private:
  const char* row_;
  int64_t step_;
  bool valid_[kRows];
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
  // A slab of finished elements is as wide as a warp; eight elements of padding keep the warps' writes apart.
  static constexpr int kPitch = WARP_N + 8;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static_assert(BLOCK_M * kPitch * sizeof(T) <= kPipelineBytes, "a slab must fit where the stages were");

  using Source = std::conditional_t<kNarrow, NarrowSource<T, BLOCK_M, kThreads>, AlignedSource<T, BLOCK_M, kThreads>>;
  using Filter = FilterTile<T, BLOCK_N, kThreads, BLOCK_M * kStageRowBytes>;
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
    WarpTile<T, WARP_M, WARP_N> tile(threadIdx.x / 32 / (BLOCK_N / WARP_N), threadIdx.x / 32 % (BLOCK_N / WARP_N),
                                     BLOCK_M * kStageRowBytes);
    {
      Source source(p, block, phase, first);
      Filter filter(p, block, phase, first);
#pragma unroll
      for (int i = 0; i < kStages - 1; ++i) {
        if (i < k_blocks) {
          source.fetch(p, stages + i * kStageBytes);
          filter.fetch(stages + i * kStageBytes);
          source.land(stages + i * kStageBytes);
        }
        commit_copies();
      }
      uint32_t reading = stages;
      uint32_t writing = stages + (kStages - 1) * kStageBytes;
      for (int i = 0; i < k_blocks; ++i) {
        wait_copies<kStages - 2>();
        __syncthreads();
        // The stage that was multiplied last is free: the barrier says so.
        const bool more = i + kStages - 1 < k_blocks;
        if (more) {
          source.fetch(p, writing);
          filter.fetch(writing);
        }
        commit_copies();
        tile.multiply(reading);
        if (more) source.land(writing);
        reading = reading == stages + (kStages - 1) * kStageBytes ? stages : reading + kStageBytes;
        writing = writing == stages + (kStages - 1) * kStageBytes ? stages : writing + kStageBytes;
      }
    }

    // Epilogue
    if (p.partial != nullptr) {
      float* const partial = static_cast<float*>(p.partial) +
                             (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (BLOCK_M * BLOCK_N);
      tile.for_each_pair([&](int m, int n, float v0, float v1) {
        store_pair(partial + m * BLOCK_N + n, v0, v1);
      });
      return;
    }
    wait_copies<0>();
    const auto slope = static_cast<float>(p.epilogue.negative_slope);
    T* const slab = reinterpret_cast<T*>(shared);
    for (int first_column = 0; first_column < BLOCK_N; first_column += WARP_N) {
      __syncthreads();
      if (tile.column() == first_column) {
        tile.for_each_pair([&](int m, int n, float v0, float v1) {
          Pair<T> pair;
          pair.value[0] = narrow<T>(activate(v0 + tables.bias[n], p.epilogue.act, slope));
          pair.value[1] = narrow<T>(activate(v1 + tables.bias[n + 1], p.epilogue.act, slope));
          *reinterpret_cast<Pair<T>*>(slab + m * kPitch + n - first_column) = pair;
        });
      }
      __syncthreads();
      store_slab<T, BLOCK_M, BLOCK_N, WARP_N, kPitch>(p, slab, tables, first_column);
    }
  }
};

}  // namespace segpose::cuda
