// SPDX-License-Identifier: BSD-3-Clause
// A block tile of products in full float32 or float64: 16 x 16 threads, each with BLOCK_M / 16 rows and BLOCK_N / 16
// columns in vectors of 16 bytes. Both operands lie in shared memory with gemm_k down the rows.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "tiles.h"

namespace segpose::cuda {

template <class T, int BLOCK_M, int BLOCK_N>
class FmaAccumulators {
 public:
  static constexpr int BLOCK_K = FmaTile::kBlockK;
  static constexpr int kPad = FmaTile::kPadBytes / sizeof(T);
  static constexpr int kPitchM = BLOCK_M + kPad, kPitchN = BLOCK_N + kPad;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kRows = BLOCK_M / 16, kColumns = BLOCK_N / 16;

  struct Stage {
    T a[BLOCK_K][kPitchM];
    T b[BLOCK_K][kPitchN];
  };

  __device__ __forceinline__ FmaAccumulators() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) c_[i][j] = T(0);
    }
  }

  __device__ __forceinline__ void multiply(const Stage& stage) {
#pragma unroll
    for (int k = 0; k < BLOCK_K; ++k) {
      T a[kRows], b[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; i += kVector) load(a + i, &stage.a[k][m(i)]);
#pragma unroll
      for (int j = 0; j < kColumns; j += kVector) load(b + j, &stage.b[k][n(j)]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) c_[i][j] += a[i] * b[j];
      }
    }
  }

  template <class Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        fn(m(i / kVector * kVector) + i % kVector, n(j / kVector * kVector) + j % kVector, c_[i][j]);
    }
  }

 private:
  __device__ __forceinline__ static int m(int i) { return i * 16 + threadIdx.x / 16 * kVector; }
  __device__ __forceinline__ static int n(int j) { return j * 16 + threadIdx.x % 16 * kVector; }

  __device__ __forceinline__ static void load(T* values, const T* source) {
    if constexpr (sizeof(T) == 4) {
      const float4 four = *reinterpret_cast<const float4*>(source);
      values[0] = four.x;
      values[1] = four.y;
      values[2] = four.z;
      values[3] = four.w;
    } else {
      const double2 two = *reinterpret_cast<const double2*>(source);
      values[0] = two.x;
      values[1] = two.y;
    }
  }

  T c_[kRows][kColumns];
};

}  // namespace segpose::cuda
