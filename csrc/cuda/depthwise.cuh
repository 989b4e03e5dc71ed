// SPDX-License-Identifier: BSD-3-Clause
// One channel on both sides of every group: no GEMM, threads along the channels. Rows of channels on both sides.
#pragma once

#include "gather_pixels.cuh"
#include "tiles.h"

namespace segpose::cuda {

// Filters are packed [phase][tap][channel]. A thread owns kVector channels and kPixels neighbouring pixels of a phase.
template <class T, int kVector>
__global__ void __launch_bounds__(DepthwiseTile::kThreads, DepthwiseTile::kBlocksPerSm)
    depthwise(const __grid_constant__ GatherParams p) {
  using Acc = Accumulator<T>;
  constexpr int kPixels = DepthwiseTile::kPixels;
  union Chunk {
    uint4 bits;
    T value[kVector];
    __device__ __forceinline__ Chunk() : bits{0, 0, 0, 0} {}
  };
  const auto load = [](const T* source) {
    Chunk chunk;
    if constexpr (kVector == 1) {
      chunk.value[0] = __ldg(source);
    } else {
      chunk.bits = __ldg(reinterpret_cast<const uint4*>(source));
    }
    return chunk;
  };
  const PhaseParams& phase = p.phases[blockIdx.y];
  // p.groups counts threads along the channels here.
  const int64_t thread = int64_t{blockIdx.x} * DepthwiseTile::kThreads + threadIdx.x;
  auto lane = static_cast<uint32_t>(thread);
  const int64_t first_m = int64_t{p.groups.split(lane)} * kPixels;
  if (first_m >= p.m_total) return;
  const int channel = static_cast<int>(lane) * kVector;

  const T* pixel[kPixels];
  int h[kPixels], w[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    h[i] = w[i] = -(1 << 30);
    pixel[i] = static_cast<const T*>(p.source.data);
    if (first_m + i < p.m_total) {
      const Pixel at(p, static_cast<uint32_t>(first_m + i));
      h[i] = static_cast<int>(at.row) * p.istep_h + phase.off_h;
      w[i] = static_cast<int>(at.col) * p.istep_w + phase.off_w;
      pixel[i] += at.n * p.source.stride_n + h[i] * p.source.stride_h + w[i] * p.source.stride_w + channel;
    }
  }
  Acc sums[kPixels][kVector];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) sums[i][e] = Acc(0);
  }
  const T* filter = static_cast<const T*>(p.filter) + phase.filter_start + channel;
  for (int tap_h = 0; tap_h < phase.taps_h; ++tap_h) {
    for (int tap_w = 0; tap_w < phase.taps_w; ++tap_w) {
      const int dh = tap_h * p.tap_step_h;
      const int dw = tap_w * p.tap_step_w;
      const int64_t offset = dh * p.source.stride_h + dw * p.source.stride_w;
      const Chunk factor = load(filter);
      filter += p.columns;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (static_cast<unsigned>(h[i] + dh) >= static_cast<unsigned>(p.source.h) ||
            static_cast<unsigned>(w[i] + dw) >= static_cast<unsigned>(p.source.w)) {
          continue;
        }
        const Chunk value = load(pixel[i] + offset);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sums[i][e] += widen(value.value[e]) * widen(factor.value[e]);
      }
    }
  }

  const auto slope = static_cast<Acc>(p.epilogue.negative_slope);
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int64_t place = destination_pixel(p, phase, first_m + i);
    if (place < 0) continue;
    Chunk result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      Acc bias = Acc(0);
      if (p.epilogue.bias != nullptr) {
        bias = widen(static_cast<const T*>(p.epilogue.bias)[(channel + e) * p.epilogue.bias_stride]);
      }
      result.value[e] = narrow<T>(activate(sums[i][e] + bias, p.epilogue.act, slope));
    }
    T* const target = static_cast<T*>(p.destination.data) + place + channel;
    if constexpr (kVector == 1) {
      *target = result.value[0];
    } else {
      *reinterpret_cast<uint4*>(target) = result.bits;
    }
  }
}

// Warps take turns at the pixels of a piece; their sums are added in order at its end. Partial sums [piece][channel]
// [tap]; gridDim.z covers the taps, kTaps at a time.
template <class T>
__global__ void __launch_bounds__(DepthwiseTile::kWgradThreads, DepthwiseTile::kWgradBlocksPerSm)
    depthwise_wgrad(const __grid_constant__ WgradParams p) {
  using Acc = Accumulator<T>;
  constexpr int kTaps = DepthwiseTile::kWgradTaps;
  constexpr int kWarps = DepthwiseTile::kWgradThreads / 32;
  __shared__ Acc warp_sums[kWarps][kTaps][32];
  const int channel = blockIdx.x * 32 + threadIdx.x % 32;
  const int channels = static_cast<int>(p.groups);
  const int first_tap = blockIdx.z * kTaps;
  const int64_t first = blockIdx.y * p.pixels_per_split;
  const int64_t end = min(p.pixels, first + p.pixels_per_split);
  Acc sums[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) sums[t] = Acc(0);
  if (channel < channels) {
    const T* const output = static_cast<const T*>(p.output.data) + channel;
    const T* const activation = static_cast<const T*>(p.activation.data) + channel;
    for (int64_t m = first + threadIdx.x / 32; m < end; m += kWarps) {
      auto col = static_cast<uint32_t>(m);
      const uint32_t n = p.image.split(col);
      const uint32_t row = p.row.split(col);
      const int h = static_cast<int>(row) * p.stride_h - p.pad_h;
      const int w = static_cast<int>(col) * p.stride_w - p.pad_w;
      const Acc gradient =
          widen(__ldg(output + n * p.output.stride_n + row * p.output.stride_h + col * p.output.stride_w));
      const T* const image = activation + n * p.activation.stride_n;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        uint32_t tap_w = first_tap + t;
        const uint32_t tap_h = p.tap_w.split(tap_w);
        const int at_h = h + static_cast<int>(tap_h) * p.dilation_h;
        const int at_w = w + static_cast<int>(tap_w) * p.dilation_w;
        if (first_tap + t < p.columns && static_cast<unsigned>(at_h) < static_cast<unsigned>(p.activation.h) &&
            static_cast<unsigned>(at_w) < static_cast<unsigned>(p.activation.w)) {
          sums[t] += gradient * widen(__ldg(image + at_h * p.activation.stride_h + at_w * p.activation.stride_w));
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) warp_sums[threadIdx.x / 32][t][threadIdx.x % 32] = sums[t];
  __syncthreads();
  Acc* const partial = static_cast<Acc*>(p.partial) + int64_t{blockIdx.y} * channels * p.columns;
  for (int i = threadIdx.x; i < 32 * kTaps; i += DepthwiseTile::kWgradThreads) {
    const int lane = i / kTaps;
    const int tap = i % kTaps;
    const int at = blockIdx.x * 32 + lane;
    if (at >= channels || first_tap + tap >= p.columns) continue;
    Acc total = Acc(0);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp][tap][lane];
    partial[int64_t{at} * p.columns + first_tap + tap] = total;
  }
}

}  // namespace segpose::cuda
