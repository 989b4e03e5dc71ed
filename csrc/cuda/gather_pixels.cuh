// SPDX-License-Identifier: BSD-3-Clause
// Which part of a gather a thread block computes, and where its results go.
#pragma once

#include "numeric.cuh"

namespace segpose::cuda {

// Blocks are numbered with gemm_n fastest, so that those which share source pixels run together, then groups, pixels
// and phases; the heaviest phase is the first.
struct GatherBlock {
  uint32_t n_tile, m_tile, group, phase;

  __device__ __forceinline__ explicit GatherBlock(const GatherParams& p) {
    uint32_t rest = blockIdx.x;
    n_tile = rest;
    rest = p.n_tiles.split(n_tile);
    group = rest;
    rest = p.groups.split(group);
    m_tile = rest;
    phase = p.m_tiles.split(m_tile);
  }
};

struct Pixel {
  uint32_t n, row, col;

  __device__ __forceinline__ Pixel(const GatherParams& p, uint32_t m) {
    col = m;
    n = p.image.split(col);
    row = p.row.split(col);
  }
};

// Offset of a phase's pixel m in the destination, -1 when it lies outside: phases have different extents, and all of
// them are given the largest.
__device__ __forceinline__ int64_t destination_pixel(const GatherParams& p, const PhaseParams& phase, int64_t m) {
  if (m >= p.m_total) return -1;
  const Pixel pixel(p, static_cast<uint32_t>(m));
  const int h = phase.oh + static_cast<int>(pixel.row) * p.ostep_h;
  const int w = phase.ow + static_cast<int>(pixel.col) * p.ostep_w;
  if (h >= p.destination.h || w >= p.destination.w) return -1;
  return pixel.n * p.destination.stride_n + h * p.destination.stride_h + w * p.destination.stride_w;
}

// Offsets of a tile's rows and columns in the destination, -1 for those outside, and the bias of its columns.
template <class T, int BLOCK_M, int BLOCK_N>
struct DestinationTables {
  using Acc = Accumulator<T>;
  int64_t row[BLOCK_M];
  int64_t column[BLOCK_N];
  Acc bias[BLOCK_N];

  __device__ __forceinline__ void fill(const GatherParams& p, const GatherBlock& block, const PhaseParams& phase,
                                       int block_m = BLOCK_M, int block_n = BLOCK_N) {
    const View& d = p.destination;
    for (int i = threadIdx.x; i < block_m; i += blockDim.x) {
      row[i] = destination_pixel(p, phase, int64_t{block.m_tile} * block_m + i);
    }
    for (int i = threadIdx.x; i < block_n; i += blockDim.x) {
      const uint32_t n = block.n_tile * block_n + i;
      int64_t offset = -1;
      Acc b = Acc(0);
      if (n < static_cast<uint32_t>(p.columns)) {
        uint32_t channel = n;
        offset = 0;
        if (p.shuffle_channels != 0) {
          uint32_t tap_w = p.shuffle_channel.split(channel);
          const uint32_t tap_h = p.shuffle_tap_w.split(tap_w);
          offset = tap_h * d.stride_h + tap_w * d.stride_w;
          channel += block.group * p.shuffle_channels;
        } else {
          channel += block.group * p.columns;
        }
        offset += channel * d.stride_c;
        if (p.epilogue.bias != nullptr) {
          b = widen(static_cast<const T*>(p.epilogue.bias)[channel * p.epilogue.bias_stride]);
        }
      }
      column[i] = offset;
      bias[i] = b;
    }
  }
};

// Stores a slab [BLOCK_M][SLAB_N] of finished elements that lies in shared memory, rows kPitch elements apart.
template <class T, int BLOCK_M, int BLOCK_N, int SLAB_N, int kPitch>
__device__ __forceinline__ void store_slab(const GatherParams& p, const T* slab,
                                           const DestinationTables<T, BLOCK_M, BLOCK_N>& tables, int first_column) {
  T* const destination = static_cast<T*>(p.destination.data);
  constexpr int kVector = 16 / sizeof(T);
  if (p.vector_store) {
    constexpr int kVectors = SLAB_N / kVector;
    for (int i = threadIdx.x; i < BLOCK_M * kVectors; i += blockDim.x) {
      const int m = i / kVectors;
      const int n = i % kVectors * kVector;
      const int64_t row = tables.row[m];
      const int64_t column = tables.column[first_column + n];
      if (row >= 0 && column >= 0) {
        *reinterpret_cast<uint4*>(destination + row + column) = *reinterpret_cast<const uint4*>(slab + m * kPitch + n);
      }
    }
    return;
  }
  // Neighbouring threads take neighbouring elements of the destination: channels, or pixels where those are apart.
  const bool channels_last = p.destination.stride_c == 1;
  for (int i = threadIdx.x; i < BLOCK_M * SLAB_N; i += blockDim.x) {
    const int m = channels_last ? i / SLAB_N : i % BLOCK_M;
    const int n = channels_last ? i % SLAB_N : i / BLOCK_M;
    const int64_t row = tables.row[m];
    const int64_t column = tables.column[first_column + n];
    if (row >= 0 && column >= 0) destination[row + column] = slab[m * kPitch + n];
  }
}

}  // namespace segpose::cuda
