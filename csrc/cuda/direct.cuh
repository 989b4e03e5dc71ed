// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad for few channels: a thread owns some pixels and a few destination channels of a group, filters come
// from where they are into shared memory, every operand passes through once. Any channels, strides and groups.
#pragma once

#include "filter.cuh"
#include "gather_pixels.cuh"
#include "tiles.h"

namespace segpose::cuda {

template <class T, int kColumns, int kVector>
struct Direct {
  using Acc = Accumulator<T>;
  static constexpr int kPixels = DirectTile::kPixels;
  static constexpr int kThreads = DirectTile::kThreads;
  static constexpr int kChunk = DirectTile::kChunk;  // gemm_k whose filters lie in shared memory at a time
  static_assert(kChunk % kVector == 0, "a vector of channels must not straddle two chunks");

  union Chunk {
    uint4 bits;
    T value[kVector];

    __device__ __forceinline__ Chunk() {}
    __device__ __forceinline__ void load(const T* source, bool valid) {
      if constexpr (kVector == 1) {
        value[0] = valid ? __ldg(source) : narrow<T>(Acc(0));
      } else {
        bits = valid ? __ldg(reinterpret_cast<const uint4*>(source)) : uint4{0, 0, 0, 0};
      }
    }
  };

  Acc filters[kChunk][kColumns];

  __device__ __forceinline__ void load_filters(const GatherParams& p, const GatherBlock& block,
                                               const PhaseParams& phase, int first, int k_total) {
    for (int i = threadIdx.x; i < kChunk * kColumns; i += kThreads) {
      uint32_t channel = first + i % kChunk;
      const uint32_t column = block.n_tile * kColumns + i / kChunk;
      Acc value = Acc(0);
      if (static_cast<int>(channel) < k_total && column < static_cast<uint32_t>(p.columns)) {
        const auto tap = static_cast<int>(p.depth_div.split(channel));
        if (channel < static_cast<uint32_t>(p.unpacked.channels)) {
          const int r = phase.r + tap / phase.taps_w * p.unpacked.r_step;
          const int s = phase.s + tap % phase.taps_w * p.unpacked.s_step;
          value =
              widen(load_filter<T>(p.unpacked, block.group, block.group * p.columns + column, column, channel, r, s));
        }
      }
      filters[i % kChunk][i / kChunk] = value;
    }
  }

  __device__ __forceinline__ void run(const GatherParams& p) {
    const GatherBlock block(p);
    const PhaseParams& phase = p.phases[block.phase];
    const T* pixel[kPixels];
    int h[kPixels], w[kPixels];
    const int64_t first_m = int64_t{block.m_tile} * (kPixels * kThreads) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int64_t m = first_m + i * kThreads;
      h[i] = w[i] = -(1 << 30);
      pixel[i] = static_cast<const T*>(p.source.data);
      if (m < p.m_total) {
        const Pixel at(p, static_cast<uint32_t>(m));
        h[i] = static_cast<int>(at.row) * p.istep_h + phase.off_h;
        w[i] = static_cast<int>(at.col) * p.istep_w + phase.off_w;
        pixel[i] += at.n * p.source.stride_n + h[i] * p.source.stride_h + w[i] * p.source.stride_w +
                    int64_t{block.group} * p.depth * p.source.stride_c;
      }
    }
    Acc sums[kPixels][kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = block.n_tile * kColumns + j;
      Acc bias = Acc(0);
      if (p.epilogue.bias != nullptr && column < p.columns) {
        const int64_t channel = int64_t{block.group} * p.columns + column;
        bias = widen(static_cast<const T*>(p.epilogue.bias)[channel * p.epilogue.bias_stride]);
      }
#pragma unroll
      for (int i = 0; i < kPixels; ++i) sums[i][j] = bias;
    }
    // A step is a vector of channels of a tap. Its values are on their way while those of the one before are used.
    const int k_total = phase.taps_h * phase.taps_w * p.depth;
    int tap_h = 0, tap_w = 0, channel = 0;
    Chunk next[kPixels];
    const auto load_next = [&] {
      const int dh = tap_h * p.tap_step_h;
      const int dw = tap_w * p.tap_step_w;
      const int64_t offset = dh * p.source.stride_h + dw * p.source.stride_w + channel * p.source.stride_c;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const bool inside = static_cast<unsigned>(h[i] + dh) < static_cast<unsigned>(p.source.h) &&
                            static_cast<unsigned>(w[i] + dw) < static_cast<unsigned>(p.source.w);
        next[i].load(pixel[i] + offset, inside);
      }
      channel += kVector;
      if (channel < p.depth) return;
      channel = 0;
      if (++tap_w < phase.taps_w) return;
      tap_w = 0;
      ++tap_h;
    };
    if (k_total > 0) load_next();
#pragma unroll 1
    for (int k = 0; k < k_total; k += kVector) {
      if (k % kChunk == 0) {
        __syncthreads();
        load_filters(p, block, phase, k, k_total);
        __syncthreads();
      }
      Acc values[kPixels][kVector];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) values[i][e] = widen(next[i].value[e]);
      }
      if (k + kVector < k_total) load_next();
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const Acc filter = filters[k % kChunk + e][j];
#pragma unroll
          for (int i = 0; i < kPixels; ++i) sums[i][j] += values[i][e] * filter;
        }
      }
    }
    store(p, block, phase, first_m, sums);
  }

 private:
  __device__ __forceinline__ static void store(const GatherParams& p, const GatherBlock& block,
                                               const PhaseParams& phase, int64_t first_m,
                                               const Acc (&sums)[kPixels][kColumns]) {
    constexpr int kStore = 16 / sizeof(T);
    const auto slope = static_cast<Acc>(p.epilogue.negative_slope);
    const int column = block.n_tile * kColumns;
    const int64_t channel = int64_t{block.group} * p.columns + column;
    T* const destination = static_cast<T*>(p.destination.data) + channel * p.destination.stride_c;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int64_t offset = destination_pixel(p, phase, first_m + i * kThreads);
      if (offset < 0) continue;
      alignas(16) T results[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) results[j] = narrow<T>(activate(sums[i][j], p.epilogue.act, slope));
      if (kColumns % kStore == 0 && p.vector_store) {
#pragma unroll
        for (int j = 0; j < kColumns; j += kStore) {
          if (column + j < p.columns) {
            *reinterpret_cast<uint4*>(destination + offset + j) = *reinterpret_cast<const uint4*>(results + j);
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (column + j < p.columns) destination[offset + j * p.destination.stride_c] = results[j];
        }
      }
    }
  }
};

template <class T, int kColumns, int kVector>
__global__ void __launch_bounds__(DirectTile::kThreads, DirectTile::blocks_per_sm(kColumns, sizeof(Accumulator<T>)))
    direct(const __grid_constant__ GatherParams p) {
  __shared__ Direct<T, kColumns, kVector> shared;
  shared.run(p);
}

}  // namespace segpose::cuda
