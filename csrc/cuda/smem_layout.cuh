// SPDX-License-Identifier: BSD-3-Clause
// Where operand tiles keep their 16-byte chunks in shared memory. Shared memory serves eight chunks at a time when they
// lie in different banks, i.e. have different addresses modulo 128; both the copies and the fragment loads get that.
#pragma once

#include "tiles.h"

namespace segpose::cuda {

// gemm_k runs along the 64-byte rows: the four chunks of a row change places every second row.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * kStageRowBytes + ((chunk ^ ((row >> 1) & 3)) * kChunkBytes);
}

// gemm_k runs down the rows (wgrad), two-byte elements: eight chunks change places from row to row.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled_wide(int row, int chunk) {
  static_assert(kRowBytes % 128 == 0, "eight chunks are needed to take turns");
  return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

}  // namespace segpose::cuda
