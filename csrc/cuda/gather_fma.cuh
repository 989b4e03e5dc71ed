// SPDX-License-Identifier: BSD-3-Clause
// fprop and dgrad as an implicit GEMM in full float32 or float64. Elements are copied one by one, so channels and
// strides are free.
#pragma once

#include "fma_tile.cuh"
#include "gather_pixels.cuh"

namespace segpose::cuda {

template <class T, int BLOCK_M, int BLOCK_N>
struct GatherFma {
  using Sums = FmaAccumulators<T, BLOCK_M, BLOCK_N>;
  using Stage = typename Sums::Stage;
  using Tables = DestinationTables<T, BLOCK_M, BLOCK_N>;
  static constexpr int BLOCK_K = Sums::BLOCK_K;
  static constexpr int kThreads = FmaTile::kThreads;
  static constexpr int kStages = FmaTile::kStages;
  static constexpr int kRowStep = kThreads / BLOCK_K;
  static constexpr int kRows = BLOCK_M / kRowStep, kColumns = BLOCK_N / kRowStep;
  static constexpr int kPipelineBytes = kStages * static_cast<int>(sizeof(Stage));
  // Finished elements go through shared memory a slab of columns at a time.
  static constexpr int SLAB_N = FmaTile::kSlabN;
  static constexpr int kPitch = SLAB_N + 16 / static_cast<int>(sizeof(T));
  static constexpr int kSlabBytes = BLOCK_M * kPitch * static_cast<int>(sizeof(T));
  static constexpr int kBufferBytes = kPipelineBytes > kSlabBytes ? kPipelineBytes : kSlabBytes;
  static constexpr int kSharedBytes = FmaTile{BLOCK_M, BLOCK_N}.gather_shared_bytes(sizeof(T));
  static_assert(kSharedBytes == kBufferBytes + sizeof(Tables), "the plan must know what the kernel takes");

  __device__ __forceinline__ static void run(const GatherParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    auto* const stages = reinterpret_cast<Stage*>(shared);
    Tables& tables = *reinterpret_cast<Tables*>(shared + kBufferBytes);

    // Block scheduling
    const GatherBlock block(p);
    const PhaseParams& phase = p.phases[block.phase];
    const int first = blockIdx.y * p.k_blocks_per_split;
    const int k_blocks = max(0, min(phase.k_blocks - first, p.k_blocks_per_split));
    if (p.partial == nullptr) tables.fill(p, block, phase);

    // This thread copies gemm_k index k of some rows and columns.
    const int k_lane = threadIdx.x % BLOCK_K;
    const int line = threadIdx.x / BLOCK_K;
    const T* pixel[kRows];
    int h[kRows], w[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t m = int64_t{block.m_tile} * BLOCK_M + line + i * kRowStep;
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
    const int64_t column = int64_t{block.n_tile} * BLOCK_N + line;
    const T* filter = static_cast<const T*>(p.filter) + phase.filter_start +
                      (int64_t{block.group} * p.columns + column) * phase.filter_pitch + first * BLOCK_K + k_lane;
    uint32_t k = first * BLOCK_K + k_lane;
    const auto fetch = [&](Stage& stage) {
      uint32_t channel = k;
      const int tap = static_cast<int>(p.depth_div.split(channel));
      const int tap_h = tap / max(phase.taps_w, 1);
      const int tap_w = tap - tap_h * phase.taps_w;
      const int dh = tap_h * p.tap_step_h;
      const int dw = tap_w * p.tap_step_w;
      const int64_t offset = dh * p.source.stride_h + dw * p.source.stride_w + channel * p.source.stride_c;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool inside = static_cast<unsigned>(h[i] + dh) < static_cast<unsigned>(p.source.h) &&
                            static_cast<unsigned>(w[i] + dw) < static_cast<unsigned>(p.source.w);
        copy_async_element<sizeof(T)>(shared_address(&stage.a[k_lane][line + i * kRowStep]), pixel[i] + offset,
                                      inside && tap_h < phase.taps_h);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        copy_async_element<sizeof(T)>(shared_address(&stage.b[k_lane][line + j * kRowStep]),
                                      filter + int64_t{j} * kRowStep * phase.filter_pitch,
                                      column + j * kRowStep < p.columns);
      }
      k += BLOCK_K;
      filter += BLOCK_K;
    };

    // Mainloop
    Sums sums;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < k_blocks) fetch(stages[i]);
      commit_copies();
    }
    for (int i = 0; i < k_blocks; ++i) {
      wait_copies<kStages - 2>();
      __syncthreads();
      const int next = i + kStages - 1;
      if (next < k_blocks) fetch(stages[next % kStages]);
      commit_copies();
      sums.multiply(stages[i % kStages]);
    }

    // Epilogue
    if (p.partial != nullptr) {
      T* const partial =
          static_cast<T*>(p.partial) + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (BLOCK_M * BLOCK_N);
      sums.for_each([&](int m, int n, T value) { partial[m * BLOCK_N + n] = value; });
      return;
    }
    wait_copies<0>();
    const auto slope = static_cast<T>(p.epilogue.negative_slope);
    T* const slab = reinterpret_cast<T*>(shared);
#pragma unroll
    for (int first_column = 0; first_column < BLOCK_N; first_column += SLAB_N) {
      __syncthreads();
      sums.for_each([&](int m, int n, T value) {
        if (n >= first_column && n < first_column + SLAB_N) {
          slab[m * kPitch + n - first_column] = activate(value + tables.bias[n], p.epilogue.act, slope);
        }
      });
      __syncthreads();
      store_slab<T, BLOCK_M, BLOCK_N, SLAB_N, kPitch>(p, slab, tables, first_column);
    }
  }
};

}  // namespace segpose::cuda
