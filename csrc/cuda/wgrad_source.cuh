// SPDX-License-Identifier: BSD-3-Clause
// Loaders of the operands of wgrad: [BLOCK_K pixels][columns] for each stage.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"
#include "smem_layout.cuh"
#include "wgrad_pixels.cuh"

namespace segpose::cuda {

// Shared-memory tile of one operand. Two-byte elements are swizzled for ldmatrix; tf32 rows are 32 bytes apart in the
// banks, so that the four pixels and eight columns of a fragment load meet different ones.
template <class T, int COLUMNS>
struct WgradLayout {
  static constexpr int BLOCK_K = kStageRowBytes / sizeof(T);
  static constexpr int kPerChunk = kChunkBytes / sizeof(T);
  static constexpr int kRowBytes = COLUMNS * sizeof(T) + (sizeof(T) == 4 ? 32 : 0);
  static constexpr int kBytes = BLOCK_K * kRowBytes;

  __device__ __forceinline__ static uint32_t chunk(int row, int column_chunk) {
    if constexpr (sizeof(T) == 4) {
      return row * kRowBytes + column_chunk * kChunkBytes;
    } else {
      return swizzled_wide<kRowBytes>(row, column_chunk);
    }
  }
};

// Channels in whole, aligned chunks. A thread owns one pixel of a K block and every kThreadsPerRow-th of its chunks.
template <class T, int COLUMNS, int kThreads>
struct PixelThreads {
  using Layout = WgradLayout<T, COLUMNS>;
  static constexpr int kThreadsPerRow = kThreads / Layout::BLOCK_K;
  static constexpr int kChunks = COLUMNS / Layout::kPerChunk / kThreadsPerRow;
  // Eight neighbouring threads have four chunks of two swizzled rows, or the eight of one row. In the first case odd
  // rows take each pair of chunks the other way round, or the two rows would meet in the banks.
  static constexpr bool kTwoRows = kThreadsPerRow == 4;
  static_assert(kTwoRows || kThreadsPerRow == 8, "the order of the chunks is made for these");
  static constexpr int kBases = kTwoRows ? 2 : 1;
  static constexpr int kStepBytes = kTwoRows ? 128 : kThreadsPerRow * kChunkBytes;  // from chunk i to i + kBases

  __device__ __forceinline__ static int row() { return threadIdx.x / kThreadsPerRow; }
  // First column of chunk i of this thread.
  __device__ __forceinline__ static int column(int i) {
    const int turn = kTwoRows ? i ^ (row() & 1) : i;
    return (threadIdx.x % kThreadsPerRow + turn * kThreadsPerRow) * Layout::kPerChunk;
  }
  __device__ __forceinline__ static uint32_t target(int i) {
    return Layout::chunk(row(), column(i) / Layout::kPerChunk);
  }
};

template <class T, int BLOCK_M, int BLOCK_N, int kThreads>
class AlignedWgradSource {
 public:
  using Output = PixelThreads<T, BLOCK_M, kThreads>;
  using Activation = PixelThreads<T, BLOCK_N, kThreads>;
  using Pixels = WgradPixels<Output::Layout::BLOCK_K>;

  __device__ __forceinline__ AlignedWgradSource(const WgradParams& p, const WgradBlock& block, uint32_t target) {
    const int first = static_cast<int>(block.m_tile) * BLOCK_M;
    const T* const output = static_cast<const T*>(p.output.data) + int64_t{block.group} * p.output_depth + first;
#pragma unroll
    for (int i = 0; i < Output::kChunks; ++i) {
      output_bytes_[i] = first + Output::column(i) < p.filters ? kChunkBytes : 0;
      keep(output_bytes_[i]);
    }
#pragma unroll
    for (int i = 0; i < Output::kBases; ++i) {
      output_[i] = reinterpret_cast<const char*>(output + Output::column(i));
      output_target_[i] = target + Output::target(i);
      activation_target_[i] = target + Output::Layout::kBytes + Activation::target(i);
      keep(output_target_[i]);
      keep(activation_target_[i]);
    }
#pragma unroll
    for (int i = 0; i < Activation::kChunks; ++i) {
      columns_[i].locate(p, block.group, block.n_tile * BLOCK_N + Activation::column(i), sizeof(T));
      keep(columns_[i].source);
    }
  }

  template <int kStage>
  __device__ __forceinline__ void fetch(const WgradParams& p, const Pixels& pixels) {
    const OutputPixel output = pixels.output[Output::row()];
    unroll<Output::kChunks>([&](auto i) {
      constexpr int kBase = i % Output::kBases;
      constexpr int kStep = i / Output::kBases * Output::kStepBytes;
      copy_async_16<kStage + kStep, kStep>(output_target_[kBase], output_[kBase] + output.offset,
                                           output_bytes_[i] & output.bytes);
    });
    const ActivationPixel activation = pixels.activation[Activation::row()];
    unroll<Activation::kChunks>([&](auto i) {
      constexpr int kBase = i % Activation::kBases;
      constexpr int kStep = i / Activation::kBases * Activation::kStepBytes;
      copy_async_16<kStage + kStep>(activation_target_[kBase], columns_[i].source + activation.offset,
                                    columns_[i].inside(p, activation) ? kChunkBytes : 0);
    });
  }

  template <int kStage>
  __device__ __forceinline__ void land() {}

 private:
  const char* output_[Output::kBases];
  int output_bytes_[Output::kChunks];
  WgradColumn columns_[Activation::kChunks];
  uint32_t output_target_[Output::kBases], activation_target_[Activation::kBases];
};

// Any channel counts and strides: chunks put together from single elements. A thread owns one chunk column and every
// kRowStep-th pixel.
template <class T, int COLUMNS, int kThreads>
struct ColumnThreads {
  using Layout = WgradLayout<T, COLUMNS>;
  static constexpr int kChunks = COLUMNS / Layout::kPerChunk;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kRows = Layout::BLOCK_K / kRowStep;
  static_assert(kRowStep % 8 == 0 || sizeof(T) == 4,
                "the swizzle must not change from one row of a thread to the next");

  __device__ __forceinline__ static int first_row() { return threadIdx.x / kChunks; }
  __device__ __forceinline__ static int column() { return threadIdx.x % kChunks * Layout::kPerChunk; }
  __device__ __forceinline__ static uint32_t target() { return Layout::chunk(first_row(), threadIdx.x % kChunks); }
  static constexpr int kTargetStep = kRowStep * Layout::kRowBytes;
};

template <class T, int BLOCK_M, int BLOCK_N, int kThreads>
class NarrowWgradSource {
 public:
  using Output = ColumnThreads<T, BLOCK_M, kThreads>;
  using Activation = ColumnThreads<T, BLOCK_N, kThreads>;
  using Pixels = WgradPixels<Output::Layout::BLOCK_K>;
  static constexpr int kPerChunk = Output::Layout::kPerChunk;

  __device__ __forceinline__ NarrowWgradSource(const WgradParams& p, const WgradBlock& block, uint32_t target) {
    const int filter = static_cast<int>(block.m_tile) * BLOCK_M + Output::column();
    filters_ = min(max(p.filters - filter, 0), kPerChunk);
    output_ = reinterpret_cast<const char*>(static_cast<const T*>(p.output.data) +
                                            (int64_t{block.group} * p.output_depth + filter) * p.output.stride_c);
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) {
      columns_[e].locate(p, block.group, block.n_tile * BLOCK_N + Activation::column() + e, sizeof(T));
    }
    output_target_ = target + Output::target();
    activation_target_ = target + Output::Layout::kBytes + Activation::target();
  }

  template <int kStage>
  __device__ __forceinline__ void fetch(const WgradParams& p, const Pixels& pixels) {
#pragma unroll
    for (int i = 0; i < Output::kRows; ++i) {
      const OutputPixel& pixel = pixels.output[Output::first_row() + i * Output::kRowStep];
      const T* const source = reinterpret_cast<const T*>(output_ + pixel.offset);
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) {
        const bool valid = e < filters_ && pixel.bytes != 0;
        place_element<T>(output_chunk_[i], e, load_element(source + e * p.output.stride_c, valid));
      }
    }
#pragma unroll
    for (int i = 0; i < Activation::kRows; ++i) {
      const ActivationPixel& pixel = pixels.activation[Activation::first_row() + i * Activation::kRowStep];
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) {
        const T* const source = reinterpret_cast<const T*>(columns_[e].source + pixel.offset);
        place_element<T>(activation_chunk_[i], e, load_element(source, columns_[e].inside(p, pixel)));
      }
    }
  }

  // Writes the chunks of the last fetch into a stage.
  template <int kStage>
  __device__ __forceinline__ void land() {
    unroll<Output::kRows>(
        [&](auto i) { store_chunk<kStage + i * Output::kTargetStep>(output_target_, output_chunk_[i]); });
    unroll<Activation::kRows>(
        [&](auto i) { store_chunk<kStage + i * Activation::kTargetStep>(activation_target_, activation_chunk_[i]); });
  }

 private:
  const char* output_;
  int filters_;
  WgradColumn columns_[kPerChunk];
  uint32_t output_chunk_[Output::kRows][4];
  uint32_t activation_chunk_[Activation::kRows][4];
  uint32_t output_target_, activation_target_;
};

}  // namespace segpose::cuda
