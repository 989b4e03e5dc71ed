// SPDX-License-Identifier: BSD-3-Clause
// Elements of a filter where it lies in memory.
#pragma once

#include "params.h"

namespace segpose::cuda {

// Of a column, which is `row` among those of all groups, and a channel of gemm_k at filter position (r, s).
template <class T>
__device__ __forceinline__ T load_filter(const FilterParams& p, uint32_t group, uint32_t row, uint32_t column,
                                         uint32_t channel, int r, int s) {
  const int64_t place = p.by_output ? row * p.stride_k + channel * p.stride_c
                                    : (int64_t{group} * p.channels + channel) * p.stride_k + column * p.stride_c;
  return static_cast<const T*>(p.data)[place + r * p.stride_r + s * p.stride_s];
}

}  // namespace segpose::cuda
