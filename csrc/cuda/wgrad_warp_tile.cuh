// SPDX-License-Identifier: BSD-3-Clause
// A warp's share of a wgrad tile. Both operands lie in shared memory with gemm_k (pixels) down the rows, so fragments
// are transposed on the way to the registers.
#pragma once

#include "wgrad_source.cuh"

namespace segpose::cuda {

template <class T, int BLOCK_M, int BLOCK_N, int WARP_M, int WARP_N>
class WgradWarpTile {
 public:
  using OutputLayout = WgradLayout<T, BLOCK_M>;
  using ActivationLayout = WgradLayout<T, BLOCK_N>;
  static constexpr int kFragsM = WARP_M / 16;
  static constexpr int kFragsN = WARP_N / 8;
  static constexpr int kSteps = 2;
  static constexpr int kStepRows = OutputLayout::BLOCK_K / kSteps;
  static constexpr bool kTf32 = sizeof(T) == 4;

  __device__ __forceinline__ WgradWarpTile()
      : row_(threadIdx.x / 32 / (BLOCK_N / WARP_N) * WARP_M), column_(threadIdx.x / 32 % (BLOCK_N / WARP_N) * WARP_N) {
    const int lane = threadIdx.x % 32;
    if constexpr (kTf32) {
      a_ = lane % 4 * OutputLayout::kRowBytes + (row_ + lane / 4 * 4) * 4;
      b_ = OutputLayout::kBytes + lane % 4 * ActivationLayout::kRowBytes + (column_ + lane / 4 * 4) * 4;
    } else {
      a_ = OutputLayout::chunk(lane % 8 + lane / 16 * 8, row_ / 8 + lane / 8 % 2);
      b_ = OutputLayout::kBytes + ActivationLayout::chunk(lane % 8 + lane / 8 % 2 * 8, column_ / 8 + lane / 16);
    }
    keep(a_);
    keep(b_);
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragsN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c_[i][j][e] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void multiply(uint32_t stage) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kFragsM][4];
      uint32_t b[kFragsN][2];
      if constexpr (kTf32) {
        load_tf32(stage, step, a, b);
      } else {
        load_transposed(stage, step, a, b);
      }
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragsN; ++j) mma<T>(c_[i][j], a[i], b[j][0], b[j][1]);
      }
    }
  }

  // Writes the sums as [BLOCK_M][BLOCK_N].
  __device__ __forceinline__ void store(float* sums) const {
    const int group = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kTf32) {
          const int slot = 2 * i + half;
          float* const line = sums + (row_ + slot / 4 * 32 + group * 4 + slot % 4) * BLOCK_N + column_;
#pragma unroll
          for (int j = 0; j < kFragsN; j += 4) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              store_quad(line + j / 4 * 32 + (2 * t + e) * 4, c_[i][j][2 * half + e], c_[i][j + 1][2 * half + e],
                         c_[i][j + 2][2 * half + e], c_[i][j + 3][2 * half + e]);
            }
          }
        } else {
          float* const line = sums + (row_ + i * 16 + half * 8 + group) * BLOCK_N + column_;
#pragma unroll
          for (int j = 0; j < kFragsN; ++j) {
            store_pair(line + j * 8 + 2 * t, c_[i][j][2 * half], c_[i][j][2 * half + 1]);
          }
        }
      }
    }
  }

 private:
  // ldmatrix.trans; the chunks of the fragments i lie two apart, which under the swizzle flips address bits.
  __device__ __forceinline__ void load_transposed(uint32_t stage, int step, uint32_t (&a)[kFragsM][4],
                                                  uint32_t (&b)[kFragsN][2]) const {
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
      load_matrix_x4_transposed(
          a[i], stage + (a_ ^ (i * 2 * kChunkBytes)) + step * kStepRows * OutputLayout::kRowBytes);
    }
#pragma unroll
    for (int j = 0; j < kFragsN / 2; ++j) {
      uint32_t pair[4];
      load_matrix_x4_transposed(
          pair, stage + (b_ ^ (j * 2 * kChunkBytes)) + step * kStepRows * ActivationLayout::kRowBytes);
      b[2 * j][0] = pair[0];
      b[2 * j][1] = pair[1];
      b[2 * j + 1][0] = pair[2];
      b[2 * j + 1][1] = pair[3];
    }
  }

  // ldmatrix cannot transpose 32-bit elements. A thread reads four neighbouring columns at once instead, and the rows
  // of the fragments are dealt out accordingly: row group + 8 * half of fragment i is row 4 * group + slot % 4 of the
  // 32 rows number slot / 4, slot = 2 * i + half; columns alike with slot = j.
  __device__ __forceinline__ void load_tf32(uint32_t stage, int step, uint32_t (&a)[kFragsM][4],
                                            uint32_t (&b)[kFragsN][2]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = step * kStepRows + k * 4;
#pragma unroll
      for (int i = 0; i < kFragsM; i += 2) {
        uint32_t four[4];
        load_chunk(four, stage + a_ + row * OutputLayout::kRowBytes + i / 2 * 32 * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i + e / 2][2 * k + e % 2] = round_tf32(four[e]);
      }
#pragma unroll
      for (int j = 0; j < kFragsN; j += 4) {
        uint32_t four[4];
        load_chunk(four, stage + b_ + row * ActivationLayout::kRowBytes + j / 4 * 32 * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j + e][k] = round_tf32(four[e]);
      }
    }
  }

  float c_[kFragsM][kFragsN][4];
  uint32_t a_, b_;  // this lane's addresses in a stage
  int row_, column_;
};

}  // namespace segpose::cuda
