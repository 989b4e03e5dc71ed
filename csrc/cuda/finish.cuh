// SPDX-License-Identifier: BSD-3-Clause
// Sums of a reduction that was cut into pieces, always added in the order of the pieces: results repeat bit by bit.
#pragma once

#include "gather_pixels.cuh"
#include "tiles.h"

namespace segpose::cuda {

constexpr int kFinishThreads = 256;

// wgrad: pieces [piece][block][BLOCK_M][BLOCK_N] to a filter gradient of any strides.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_wgrad(const __grid_constant__ FinishParams p) {
  using Acc = Accumulator<T>;
  const int64_t index = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (index >= p.count) return;
  auto column = static_cast<uint32_t>(index);
  const uint32_t row = p.columns.split(column);
  uint32_t channel = column;
  uint32_t tap_w = p.depth_div.split(channel);
  if (channel >= static_cast<uint32_t>(p.channels)) return;
  const uint32_t tap_h = p.tap_w.split(tap_w);
  uint32_t m = row;
  const uint32_t group = p.filters.split(m);
  const uint32_t m_tile = p.m_tile.split(m);
  uint32_t n = column;
  const uint32_t n_tile = p.n_tile.split(n);
  const int64_t block = (int64_t{group} * p.m_tiles + m_tile) * p.n_tiles + n_tile;
  const Acc* const partial = static_cast<const Acc*>(p.partial) + (block * p.block_m + m) * p.block_n + n;
  Acc sum = Acc(0);
#pragma unroll 4
  for (int i = 0; i < p.pieces; ++i) sum += partial[i * p.piece];
  static_cast<T*>(p.gradient)[row * p.stride_k + channel * p.stride_c + tap_h * p.stride_r + tap_w * p.stride_s] =
      narrow<T>(sum);
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_bias(const __grid_constant__ FinishBiasParams p) {
  using Acc = Accumulator<T>;
  const int channel = blockIdx.x * kFinishThreads + threadIdx.x;
  if (channel >= p.channels) return;
  const Acc* const partial = static_cast<const Acc*>(p.partial) + channel;
  Acc sum = Acc(0);
#pragma unroll 4
  for (int i = 0; i < p.pieces; ++i) sum += partial[int64_t{i} * p.channels];
  static_cast<T*>(p.gradient)[channel] = narrow<T>(sum);
}

// fprop and dgrad with split-K: the same blocks as the gather, pieces [piece][block][block_m][block_n].
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_gather(const __grid_constant__ GatherParams p, int block_m, int block_n, int pieces) {
  using Acc = Accumulator<T>;
  __shared__ DestinationTables<T, kLargestBlockM, kLargestBlockN> tables;
  const GatherBlock block(p);
  tables.fill(p, block, p.phases[block.phase], block_m, block_n);
  __syncthreads();
  const int elements = block_m * block_n;
  const int64_t piece = int64_t{gridDim.x} * elements;
  const Acc* const partial = static_cast<const Acc*>(p.partial) + int64_t{blockIdx.x} * elements;
  const auto slope = static_cast<Acc>(p.epilogue.negative_slope);
  for (int i = threadIdx.x; i < elements; i += kFinishThreads) {
    const int m = i / block_n;
    const int n = i % block_n;
    if (tables.row[m] < 0 || tables.column[n] < 0) continue;
    Acc sum = Acc(0);
#pragma unroll 4
    for (int j = 0; j < pieces; ++j) sum += partial[j * piece + i];
    static_cast<T*>(p.destination.data)[tables.row[m] + tables.column[n]] =
        narrow<T>(activate(sum + tables.bias[n], p.epilogue.act, slope));
  }
}

}  // namespace segpose::cuda
