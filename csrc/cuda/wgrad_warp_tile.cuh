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
  static constexpr int kAddressesM = kTf32 ? 1 : kFragsM;
  static constexpr int kAddressesN = kTf32 ? 1 : kFragsN / 2;

  // Stages begin at this shared-memory address.
  __device__ __forceinline__ explicit WgradWarpTile(uint32_t stages)
      : row_(threadIdx.x / 32 / (BLOCK_N / WARP_N) * WARP_M), column_(threadIdx.x / 32 % (BLOCK_N / WARP_N) * WARP_N) {
    const int lane = threadIdx.x % 32;
    if constexpr (kTf32) {
      a_[0] = stages + lane % 4 * OutputLayout::kRowBytes + (row_ + lane / 4 * 4) * 4;
      b_[0] = stages + OutputLayout::kBytes + lane % 4 * ActivationLayout::kRowBytes + (column_ + lane / 4 * 4) * 4;
    } else {
      // The chunks of neighbouring fragments lie two apart, which under the swizzle flips address bits.
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) {
        a_[i] = stages + OutputLayout::chunk(lane % 8 + lane / 16 * 8, row_ / 8 + 2 * i + lane / 8 % 2);
      }
#pragma unroll
      for (int j = 0; j < kFragsN / 2; ++j) {
        b_[j] = stages + OutputLayout::kBytes +
                ActivationLayout::chunk(lane % 8 + lane / 8 % 2 * 8, column_ / 8 + 2 * j + lane / 16);
      }
    }
#pragma unroll
    for (uint32_t& address : a_) keep(address);
#pragma unroll
    for (uint32_t& address : b_) keep(address);
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
    unroll<kSteps>([&](auto step) {
      uint32_t a[kFragsM][4];
      uint32_t b[kFragsN][2];
      if constexpr (kTf32) {
        load_tf32<kStage, step>(a, b);
      } else {
        load_transposed<kStage, step>(a, b);
      }
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragsN; ++j) mma<T>(c_[i][j], a[i], b[j][0], b[j][1]);
      }
    });
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
  template <int kStage, int kStep>
  __device__ __forceinline__ void load_transposed(uint32_t (&a)[kFragsM][4], uint32_t (&b)[kFragsN][2]) const {
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
      load_matrix_x4_transposed<kStage + kStep * kStepRows * OutputLayout::kRowBytes>(a[i], a_[i]);
    }
#pragma unroll
    for (int j = 0; j < kFragsN / 2; ++j) {
      uint32_t pair[4];
      load_matrix_x4_transposed<kStage + kStep * kStepRows * ActivationLayout::kRowBytes>(pair, b_[j]);
      b[2 * j][0] = pair[0];
      b[2 * j][1] = pair[1];
      b[2 * j + 1][0] = pair[2];
      b[2 * j + 1][1] = pair[3];
    }
  }

  // ldmatrix cannot transpose 32-bit elements. A thread reads four neighbouring columns at once instead, and the rows
  // of the fragments are dealt out accordingly: row group + 8 * half of fragment i is row 4 * group + slot % 4 of the
  // 32 rows number slot / 4, slot = 2 * i + half; columns alike with slot = j.
  template <int kStage, int kStep>
  __device__ __forceinline__ void load_tf32(uint32_t (&a)[kFragsM][4], uint32_t (&b)[kFragsN][2]) const {
    unroll<2>([&](auto k) {
      constexpr int kRow = kStep * kStepRows + k * 4;
      unroll<kFragsM / 2>([&](auto i) {
        uint32_t four[4];
        load_chunk<kStage + kRow * OutputLayout::kRowBytes + i * 32 * 4>(four, a_[0]);
#pragma unroll
        for (int e = 0; e < 4; ++e) a[2 * i + e / 2][2 * k + e % 2] = round_tf32(four[e]);
      });
      unroll<kFragsN / 4>([&](auto j) {
        uint32_t four[4];
        load_chunk<kStage + kRow * ActivationLayout::kRowBytes + j * 32 * 4>(four, b_[0]);
#pragma unroll
        for (int e = 0; e < 4; ++e) b[4 * j + e][k] = round_tf32(four[e]);
      });
    });
  }

  float c_[kFragsM][kFragsN][4];
  uint32_t a_[kAddressesM], b_[kAddressesN];  // this lane's addresses in a stage
  int row_, column_;
};

}  // namespace segpose::cuda
