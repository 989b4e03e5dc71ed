// SPDX-License-Identifier: BSD-3-Clause
// Loaders of the operands of wgrad: [BLOCK_K pixels][columns] for each stage, a thread with one chunk column and every
// kRowStep-th pixel.
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

// How the threads of a block share a tile of COLUMNS columns.
template <class T, int COLUMNS, int kThreads>
struct WgradThreads {
  using Layout = WgradLayout<T, COLUMNS>;
  static constexpr int kChunks = COLUMNS / Layout::kPerChunk;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kRows = Layout::BLOCK_K / kRowStep;
  static_assert(kRowStep % 8 == 0 || sizeof(T) == 4, "the swizzle must not change from one row of a thread to the next");

  __device__ __forceinline__ static int first_row() { return threadIdx.x / kChunks; }
  __device__ __forceinline__ static int column() { return threadIdx.x % kChunks * Layout::kPerChunk; }
  __device__ __forceinline__ static uint32_t target() { return Layout::chunk(first_row(), threadIdx.x % kChunks); }
  static constexpr int kTargetStep = kRowStep * Layout::kRowBytes;
};

// Channels in whole, aligned chunks.
template <class T, int BLOCK_M, int BLOCK_N, int kThreads>
class AlignedWgradSource {
 public:
  using Output = WgradThreads<T, BLOCK_M, kThreads>;
  using Activation = WgradThreads<T, BLOCK_N, kThreads>;

  __device__ __forceinline__ AlignedWgradSource(const WgradParams& p, const WgradBlock& block) {
    const int filter = block.m_tile * BLOCK_M + Output::column();
    output_valid_ = filter < p.filters;
    output_ = static_cast<const T*>(p.output.data) + int64_t{block.group} * p.output_depth + filter;
    column_.locate(p, block.group, block.n_tile * BLOCK_N + Activation::column());
    activation_ = static_cast<const T*>(p.activation.data) + column_.offset;
    output_target_ = Output::target();
    activation_target_ = Output::Layout::kBytes + Activation::target();
  }

  __device__ __forceinline__ void fetch(const WgradParams& p, const WgradPixel* pixels, uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Output::kRows; ++i) {
      const WgradPixel& pixel = pixels[Output::first_row() + i * Output::kRowStep];
      copy_async_16(stage + output_target_ + i * Output::kTargetStep, output_ + pixel.output,
                    output_valid_ && pixel.output >= 0);
    }
#pragma unroll
    for (int i = 0; i < Activation::kRows; ++i) {
      const WgradPixel& pixel = pixels[Activation::first_row() + i * Activation::kRowStep];
      copy_async_16(stage + activation_target_ + i * Activation::kTargetStep, activation_ + pixel.activation,
                    column_.inside(p, pixel));
    }
  }

  __device__ __forceinline__ void land(uint32_t) {}

 private:
  const T* output_;
  const T* activation_;
  WgradColumn column_;
  bool output_valid_;
  uint32_t output_target_, activation_target_;
};

// Any channel counts and strides: chunks put together from single elements.
template <class T, int BLOCK_M, int BLOCK_N, int kThreads>
class NarrowWgradSource {
 public:
  using Output = WgradThreads<T, BLOCK_M, kThreads>;
  using Activation = WgradThreads<T, BLOCK_N, kThreads>;
  static constexpr int kPerChunk = Output::Layout::kPerChunk;

  __device__ __forceinline__ NarrowWgradSource(const WgradParams& p, const WgradBlock& block) {
    const int filter = block.m_tile * BLOCK_M + Output::column();
    filters_ = min(max(p.filters - filter, 0), kPerChunk);
    output_ = static_cast<const T*>(p.output.data) +
              (int64_t{block.group} * p.output_depth + filter) * p.output.stride_c;
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) {
      columns_[e].locate(p, block.group, block.n_tile * BLOCK_N + Activation::column() + e);
    }
    output_target_ = Output::target();
    activation_target_ = Output::Layout::kBytes + Activation::target();
  }

  __device__ __forceinline__ void fetch(const WgradParams& p, const WgradPixel* pixels, uint32_t) {
#pragma unroll
    for (int i = 0; i < Output::kRows; ++i) {
      const WgradPixel& pixel = pixels[Output::first_row() + i * Output::kRowStep];
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) {
        place_element<T>(output_chunk_[i], e,
                         load_element(output_ + pixel.output + e * p.output.stride_c, e < filters_ && pixel.output >= 0));
      }
    }
#pragma unroll
    for (int i = 0; i < Activation::kRows; ++i) {
      const WgradPixel& pixel = pixels[Activation::first_row() + i * Activation::kRowStep];
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) {
        const T* const address = static_cast<const T*>(p.activation.data) + pixel.activation + columns_[e].offset;
        place_element<T>(activation_chunk_[i], e, load_element(address, columns_[e].inside(p, pixel)));
      }
    }
  }

  __device__ __forceinline__ void land(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Output::kRows; ++i) {
      store_chunk(stage + output_target_ + i * Output::kTargetStep, output_chunk_[i]);
    }
#pragma unroll
    for (int i = 0; i < Activation::kRows; ++i) {
      store_chunk(stage + activation_target_ + i * Activation::kTargetStep, activation_chunk_[i]);
    }
  }

 private:
  const T* output_;
  int filters_;
  WgradColumn columns_[kPerChunk];
  uint32_t output_chunk_[Output::kRows][4];
  uint32_t activation_chunk_[Activation::kRows][4];
  uint32_t output_target_, activation_target_;
};

}  // namespace segpose::cuda
