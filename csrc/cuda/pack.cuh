// SPDX-License-Identifier: BSD-3-Clause
// Filters into the order in which a gather reads them.
#pragma once

#include "filter.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace segpose::cuda {

constexpr int kPackThreads = 256;

template <class T, bool kTf32>
__global__ void __launch_bounds__(kPackThreads) pack_filter(const __grid_constant__ PackParams p) {
  const PackPhase& phase = p.phases[blockIdx.y];
  T* const packed = static_cast<T*>(p.packed);
  for (int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; i < phase.count;
       i += int64_t{gridDim.x} * kPackThreads) {
    auto k = static_cast<uint32_t>(i);
    const uint32_t row = phase.pitch.split(k);
    uint32_t column = row;
    const uint32_t group = p.columns.split(column);
    uint32_t channel = k;
    const auto tap = static_cast<int>(p.depth_div.split(channel));
    T value = narrow<T>(Accumulator<T>(0));
    if (tap < phase.taps && channel < static_cast<uint32_t>(p.filter.channels)) {
      uint32_t tap_w = tap;
      uint32_t tap_h = phase.taps_w.split(tap_w);
      if (p.shuffle_channels != 0) {
        tap_w = p.shuffle_channel.split(column);
        tap_h = p.shuffle_tap_w.split(tap_w);
      }
      const int r = phase.r + static_cast<int>(tap_h) * p.filter.r_step;
      const int s = phase.s + static_cast<int>(tap_w) * p.filter.s_step;
      value = load_filter<T>(p.filter, group, row, column, channel, r, s);
      if constexpr (kTf32) value = __uint_as_float(round_tf32(__float_as_uint(value)));
    }
    const int64_t row_stride = p.row_stride != 0 ? p.row_stride : phase.pitch.divisor;
    packed[phase.start + row * row_stride + k * p.k_stride] = value;
  }
}

}  // namespace segpose::cuda
