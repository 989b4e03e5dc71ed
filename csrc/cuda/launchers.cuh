// SPDX-License-Identifier: BSD-3-Clause
// Kernel entries and their launches: run-time choices become template arguments here, once. Every instantiation of the
// library is named in this file.
#pragma once

#include <type_traits>

#include "depthwise.cuh"
#include "direct.cuh"
#include "finish.cuh"
#include "gather_fma.cuh"
#include "gather_mma.cuh"
#include "launch.h"
#include "pack.cuh"
#include "rows.cuh"
#include "wgrad_fma.cuh"
#include "wgrad_mma.cuh"

namespace segpose::cuda {

// Tiles are template arguments by their extents, so that a profiler shows them.
constexpr int gather_tile(int block_m, int block_n) {
  int tile = 0;
  while (kGatherTiles[tile].block_m != block_m || kGatherTiles[tile].block_n != block_n) ++tile;
  return tile;
}

constexpr int wgrad_tile(int block_m, int block_n) {
  int tile = 0;
  while (kWgradTiles[tile].block_m != block_m || kWgradTiles[tile].block_n != block_n) ++tile;
  return tile;
}

template <class T, int BLOCK_M, int BLOCK_N, bool kNarrow, int kTile = gather_tile(BLOCK_M, BLOCK_N)>
__global__ void __launch_bounds__(kGatherTiles[kTile].threads(), kGatherTiles[kTile].blocks_per_sm)
    gather_mma(const __grid_constant__ GatherParams p) {
  GatherMma<T, kTile, kNarrow>::run(p);
}

template <class T, int BLOCK_M, int BLOCK_N, bool kNarrow, int kTile = wgrad_tile(BLOCK_M, BLOCK_N)>
__global__ void __launch_bounds__(kWgradTiles[kTile].threads(), kWgradTiles[kTile].blocks_per_sm)
    wgrad_mma(const __grid_constant__ WgradParams p) {
  WgradMma<T, kTile, kNarrow>::run(p);
}

template <class T, int BLOCK_M, int BLOCK_N>
__global__ void __launch_bounds__(FmaTile::kThreads, FmaTile::kBlocksPerSm)
    gather_fma(const __grid_constant__ GatherParams p) {
  GatherFma<T, BLOCK_M, BLOCK_N>::run(p);
}

template <class T, int BLOCK_M, int BLOCK_N>
__global__ void __launch_bounds__(FmaTile::kThreads, FmaTile::kBlocksPerSm)
    wgrad_fma(const __grid_constant__ WgradParams p) {
  WgradFma<T, BLOCK_M, BLOCK_N>::run(p);
}

namespace launches {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxSlices = 65535;  // gridDim.y and gridDim.z
constexpr int kDefaultShared = 48 << 10;

template <class Kernel, class... Args>
cudaError_t launch(Kernel* kernel, int64_t blocks, int64_t slices, int64_t layers, int threads, int shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  if (blocks < 1 || blocks > kMaxBlocks || slices < 1 || slices > kMaxSlices || layers < 1 || layers > kMaxSlices) {
    return cudaErrorInvalidValue;
  }
  if (shared_bytes > kDefaultShared) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slices), static_cast<unsigned>(layers));
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

// A struct of kernels' own facts (threads, shared bytes) and the launch of one.
template <class T, int BLOCK_M, int BLOCK_N, bool kNarrow>
cudaError_t gather_mma_tile(const GatherParams& p, cudaStream_t stream) {
  using Kernel = GatherMma<T, gather_tile(BLOCK_M, BLOCK_N), kNarrow>;
  return launch(gather_mma<T, BLOCK_M, BLOCK_N, kNarrow>, p.grid.blocks, p.grid.splits, 1, Kernel::kThreads,
                Kernel::kSharedBytes, stream, p);
}

template <class T>
cudaError_t gather_mma(const GatherParams& p, int tile, bool narrow, cudaStream_t stream) {
  switch (tile * 2 + narrow) {
    case 0:
      return gather_mma_tile<T, 128, 128, false>(p, stream);
    case 2:
      return gather_mma_tile<T, 256, 64, false>(p, stream);
    case 4:
      return gather_mma_tile<T, 128, 64, false>(p, stream);
    case 5:
      return gather_mma_tile<T, 128, 64, true>(p, stream);
    case 6:
      return gather_mma_tile<T, 64, 64, false>(p, stream);
    case 8:
      return gather_mma_tile<T, 128, 32, false>(p, stream);
    case 9:
      return gather_mma_tile<T, 128, 32, true>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T, int BLOCK_M, int BLOCK_N, bool kNarrow>
cudaError_t wgrad_mma_tile(const WgradParams& p, cudaStream_t stream) {
  using Kernel = WgradMma<T, wgrad_tile(BLOCK_M, BLOCK_N), kNarrow>;
  return launch(wgrad_mma<T, BLOCK_M, BLOCK_N, kNarrow>, p.grid.blocks, p.grid.splits, 1, Kernel::kThreads,
                Kernel::kSharedBytes, stream, p);
}

template <class T>
cudaError_t wgrad_mma(const WgradParams& p, int tile, bool narrow, cudaStream_t stream) {
  switch (tile * 2 + narrow) {
    case 0:
      return wgrad_mma_tile<T, 128, 128, false>(p, stream);
    case 2:
      return wgrad_mma_tile<T, 64, 128, false>(p, stream);
    case 4:
      return wgrad_mma_tile<T, 64, 64, false>(p, stream);
    case 5:
      return wgrad_mma_tile<T, 64, 64, true>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T, int BLOCK_M, int BLOCK_N>
cudaError_t gather_fma(const GatherParams& p, cudaStream_t stream) {
  return launch(cuda::gather_fma<T, BLOCK_M, BLOCK_N>, p.grid.blocks, p.grid.splits, 1, FmaTile::kThreads,
                GatherFma<T, BLOCK_M, BLOCK_N>::kSharedBytes, stream, p);
}

template <class T, int BLOCK_M, int BLOCK_N>
cudaError_t wgrad_fma(const WgradParams& p, cudaStream_t stream) {
  return launch(cuda::wgrad_fma<T, BLOCK_M, BLOCK_N>, p.grid.blocks, p.grid.splits, 1, FmaTile::kThreads,
                WgradFma<T, BLOCK_M, BLOCK_N>::kSharedBytes, stream, p);
}

template <class T>
cudaError_t finish_gather(const GatherParams& p, int block_m, int block_n, cudaStream_t stream) {
  return launch(cuda::finish_gather<T>, p.grid.blocks, 1, 1, kFinishThreads, 0, stream, p, block_m, block_n,
                p.grid.splits);
}

template <class T, int kColumns, int kVector>
cudaError_t direct_kernel(const GatherParams& p, cudaStream_t stream) {
  return launch(cuda::direct<T, kColumns, kVector>, p.grid.blocks, 1, 1, DirectTile::kThreads, 0, stream, p);
}

template <class T>
cudaError_t direct(const GatherParams& p, int columns, bool vector, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (columns == 1) return vector ? direct_kernel<T, 1, kVector>(p, stream) : direct_kernel<T, 1, 1>(p, stream);
  if (columns == 8) return vector ? direct_kernel<T, 8, kVector>(p, stream) : direct_kernel<T, 8, 1>(p, stream);
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t depthwise(const GatherParams& p, bool vector, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  return launch(vector ? cuda::depthwise<T, kVector> : cuda::depthwise<T, 1>, p.grid.blocks, p.grid.splits, 1,
                DepthwiseTile::kThreads, 0, stream, p);
}

template <class T>
cudaError_t depthwise_wgrad(const WgradParams& p, cudaStream_t stream) {
  const int64_t layers = (p.columns + DepthwiseTile::kWgradTaps - 1) / DepthwiseTile::kWgradTaps;
  return launch(cuda::depthwise_wgrad<T>, p.grid.blocks, p.grid.splits, layers, DepthwiseTile::kWgradThreads, 0, stream,
                p);
}

template <class T>
cudaError_t pack_filter(const PackParams& p, bool tf32, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (tf32) {
      return launch(cuda::pack_filter<T, true>, p.grid.blocks, p.grid.splits, 1, kPackThreads, 0, stream, p);
    }
  }
  return launch(cuda::pack_filter<T, false>, p.grid.blocks, p.grid.splits, 1, kPackThreads, 0, stream, p);
}

template <class T>
cudaError_t rows(const RowsParams& p, bool vector, cudaStream_t stream) {
  return launch(vector ? rows_vector<T> : rows_any<T>, p.grid.blocks, p.grid.splits, 1, kRowsThreads, 0, stream, p);
}

template <class T>
cudaError_t finish_wgrad(const FinishParams& p, cudaStream_t stream) {
  return launch(cuda::finish_wgrad<T>, p.grid.blocks, 1, 1, kFinishThreads, 0, stream, p);
}

template <class T>
cudaError_t finish_bias(const FinishBiasParams& p, cudaStream_t stream) {
  return launch(cuda::finish_bias<T>, p.grid.blocks, 1, 1, kFinishThreads, 0, stream, p);
}

template <class T>
constexpr Launchers common() {
  Launchers table{};
  table.finish_gather = finish_gather<T>;
  table.direct = direct<T>;
  table.depthwise = depthwise<T>;
  table.depthwise_wgrad = depthwise_wgrad<T>;
  table.pack_filter = pack_filter<T>;
  table.rows = rows<T>;
  table.finish_wgrad = finish_wgrad<T>;
  table.finish_bias = finish_bias<T>;
  return table;
}

template <class T>
constexpr Launchers with_mma(Launchers table) {
  table.gather_mma = gather_mma<T>;
  table.wgrad_mma = wgrad_mma<T>;
  return table;
}

template <class T, int BLOCK_M, int BLOCK_N>
constexpr Launchers with_fma(Launchers table) {
  table.gather_fma = gather_fma<T, BLOCK_M, BLOCK_N>;
  table.wgrad_fma = wgrad_fma<T, BLOCK_M, BLOCK_N>;
  return table;
}

}  // namespace launches
}  // namespace segpose::cuda
