// SPDX-License-Identifier: BSD-3-Clause
// A warp's share of a block tile: fragments by ldmatrix, accumulators by mma.sync. Both operands lie in shared memory
// with 64 bytes of gemm_k to a row, so two-byte elements and tf32 have the same addresses.
#pragma once

#include "ptx.cuh"
#include "smem_layout.cuh"

namespace segpose::cuda {

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T value[2];
};

template <class T, int WARP_M, int WARP_N>
class WarpTile {
 public:
  static constexpr int kFragsM = WARP_M / 16;
  static constexpr int kFragsN = WARP_N / 8;
  static constexpr int kSteps = 2;  // mma instructions along the 64 bytes of a row

  // Stages begin at this shared-memory address; in each the B tile lies `b_offset` bytes behind the A tile.
  __device__ __forceinline__ WarpTile(uint32_t stages, uint32_t b_offset, int warp_m, int warp_n)
      : row_(warp_m * WARP_M), column_(warp_n * WARP_N) {
    const int lane = threadIdx.x % 32;
    // The second step's chunks are two further on, which under the swizzle flips one address bit.
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      a_[step] = stages + (swizzled(row_ + lane % 16, lane / 16) ^ (step * 2 * kChunkBytes));
      b_[step] =
          stages + b_offset + (swizzled(column_ + lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ (step * 2 * kChunkBytes));
      keep(a_[step]);
      keep(b_[step]);
    }
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragsN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c_[i][j][e] = 0.f;
      }
    }
  }

  // Adds the product of the tiles kStage bytes into the stages.
  template <int kStage>
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kFragsM][4];
      uint32_t b[kFragsN / 2][4];
      unroll<kFragsM>([&](auto i) { load_matrix_x4<kStage + i * 16 * kStageRowBytes>(a[i], a_[step]); });
      unroll<kFragsN / 2>([&](auto j) { load_matrix_x4<kStage + j * 16 * kStageRowBytes>(b[j], b_[step]); });
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i][e] = round_tf32(a[i][e]);
        }
      }
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragsN; ++j) mma<T>(c_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // Calls fn(m, n, v0, v1) for this thread's accumulators (m, n) and (m, n + 1) of the block tile.
  template <class Fn>
  __device__ __forceinline__ void for_each_pair(const Fn& fn) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragsN; ++j) {
        const int m = row_ + i * 16 + lane / 4;
        const int n = column_ + j * 8 + lane % 4 * 2;
        fn(m, n, c_[i][j][0], c_[i][j][1]);
        fn(m + 8, n, c_[i][j][2], c_[i][j][3]);
      }
    }
  }

 private:
  float c_[kFragsM][kFragsN][4];
  uint32_t a_[kSteps], b_[kSteps];  // this lane's ldmatrix addresses in a stage
  int row_, column_;
};

}  // namespace segpose::cuda
