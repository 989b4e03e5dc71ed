// SPDX-License-Identifier: BSD-3-Clause
// Loaders of the source operand of a gather: [BLOCK_M pixels][64 bytes of gemm_k] for each stage.
//
// gemm_k is tap * depth + channel. A thread owns one 16-byte chunk column and every 32nd row of a tile; chunks are
// swizzled so that eight rows of a column and the four chunks of two rows lie in different banks.
#pragma once

#include "elements.cuh"
#include "gather_pixels.cuh"
#include "ptx.cuh"
#include "smem_layout.cuh"

namespace segpose::cuda {

constexpr int kChunksPerRow = kStageRowBytes / kChunkBytes;
// Rows that are not pixels: no tap can bring such a row or column into the source.
constexpr int kOutside = -(1 << 30);

// The source pixels of a thread's rows at tap (0, 0).
template <int kRows, int kThreads>
struct SourceRows {
  const char* pixel[kRows];
  int h[kRows], w[kRows];

  __device__ __forceinline__ SourceRows(const GatherParams& p, const GatherBlock& block, const PhaseParams& phase,
                                        int block_m, int element_bytes) {
    const int64_t channel = int64_t{block.group} * p.depth * p.source.stride_c;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t m = int64_t{block.m_tile} * block_m + threadIdx.x / kChunksPerRow + i * (kThreads / kChunksPerRow);
      h[i] = w[i] = kOutside;
      pixel[i] = static_cast<const char*>(p.source.data);
      if (m < p.m_total) {
        const Pixel at(p, static_cast<uint32_t>(m));
        h[i] = static_cast<int>(at.row) * p.istep_h + phase.off_h;
        w[i] = static_cast<int>(at.col) * p.istep_w + phase.off_w;
        pixel[i] +=
            (at.n * p.source.stride_n + h[i] * p.source.stride_h + w[i] * p.source.stride_w + channel) * element_bytes;
      }
    }
  }

  // Both comparisons are made: a branch would cost more.
  __device__ __forceinline__ bool inside(int row, int dh, int dw, int height, int width) const {
    return (static_cast<unsigned>(h[row] + dh) < static_cast<unsigned>(height)) &
           (static_cast<unsigned>(w[row] + dw) < static_cast<unsigned>(width));
  }
};

// Channels in whole, aligned 16-byte chunks: asynchronous copies.
template <class T, int BLOCK_M, int kThreads>
class AlignedSource {
 public:
  static constexpr int kPerChunk = kChunkBytes / sizeof(T);
  static constexpr int BLOCK_K = kStageRowBytes / sizeof(T);
  static constexpr int kRows = BLOCK_M * kChunksPerRow / kThreads;

  __device__ __forceinline__ AlignedSource(const GatherParams& p, const GatherBlock& block, const PhaseParams& phase,
                                           int k_block, uint32_t target)
      : rows_(p, block, phase, BLOCK_M, sizeof(T)), taps_h_(phase.taps_h), taps_w_(phase.taps_w) {
    const uint32_t k = k_block * BLOCK_K + threadIdx.x % kChunksPerRow * kPerChunk;
    uint32_t channel = k;
    const uint32_t tap = p.depth_div.split(channel);
    channel_ = static_cast<int>(channel);
    tap_h_ = static_cast<int>(tap) / max(taps_w_, 1);
    tap_w_ = static_cast<int>(tap) - tap_h_ * taps_w_;
    target_ = target + swizzled(threadIdx.x / kChunksPerRow, threadIdx.x % kChunksPerRow);
    keep(target_);
    enter_tap(p);
  }

  // Starts the copies of the next K block.
  template <int kStage>
  __device__ __forceinline__ void fetch(const GatherParams& p) {
    unroll<kRows>([&](auto i) {
      copy_async_16<kStage + i*(kThreads / kChunksPerRow) * kStageRowBytes>(target_, rows_.pixel[i] + offset_,
                                                                            bytes_[i]);
    });
    channel_ += BLOCK_K;
    offset_ += kStageRowBytes;
    if (channel_ >= p.depth) {
      do {
        channel_ -= p.depth;
        if (++tap_w_ == taps_w_) {
          tap_w_ = 0;
          ++tap_h_;
        }
      } while (channel_ >= p.depth);
      enter_tap(p);
    }
  }

  template <int kStage>
  __device__ __forceinline__ void land() {}

 private:
  __device__ __forceinline__ void enter_tap(const GatherParams& p) {
    const int dh = tap_h_ * p.tap_step_h;
    const int dw = tap_w_ * p.tap_step_w;
    offset_ = (dh * p.source.stride_h + dw * p.source.stride_w + channel_) * int64_t{sizeof(T)};
    // Behind the last tap no row is inside.
    const int height = tap_h_ < taps_h_ ? p.source.h : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) bytes_[i] = rows_.inside(i, dh, dw, height, p.source.w) ? kChunkBytes : 0;
  }

  SourceRows<kRows, kThreads> rows_;
  int bytes_[kRows];  // of each row's chunk: none outside the source
  int64_t offset_;    // of the tap and channel, in bytes
  int taps_h_, taps_w_, tap_h_, tap_w_, channel_;
  uint32_t target_;
};

// Any channel count and any strides: a chunk is put together from single elements, which may belong to two taps. The
// loads of a K block are in flight while the block before it is multiplied.
template <class T, int BLOCK_M, int kThreads>
class NarrowSource {
 public:
  static constexpr int kPerChunk = kChunkBytes / sizeof(T);
  static constexpr int BLOCK_K = kStageRowBytes / sizeof(T);
  static constexpr int kRows = BLOCK_M * kChunksPerRow / kThreads;

  __device__ __forceinline__ NarrowSource(const GatherParams& p, const GatherBlock& block, const PhaseParams& phase,
                                          int k_block, uint32_t target)
      : rows_(p, block, phase, BLOCK_M, sizeof(T)), taps_h_(phase.taps_h), taps_w_(phase.taps_w) {
    k_ = k_block * BLOCK_K + threadIdx.x % kChunksPerRow * kPerChunk;
    target_ = target + swizzled(threadIdx.x / kChunksPerRow, threadIdx.x % kChunksPerRow);
  }

  template <int kStage>
  __device__ __forceinline__ void fetch(const GatherParams& p) {
    uint32_t channel = k_;
    const uint32_t tap = p.depth_div.split(channel);
    int tap_h = static_cast<int>(tap) / max(taps_w_, 1);
    int tap_w = static_cast<int>(tap) - tap_h * taps_w_;
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) {
      const int dh = tap_h * p.tap_step_h;
      const int dw = tap_w * p.tap_step_w;
      const int64_t offset =
          dh * p.source.stride_h + dw * p.source.stride_w + static_cast<int64_t>(channel) * p.source.stride_c;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool valid = tap_h < taps_h_ && rows_.inside(i, dh, dw, p.source.h, p.source.w);
        const T* const address = reinterpret_cast<const T*>(rows_.pixel[i]) + offset;
        place_element<T>(chunk_[i], e, load_element(address, valid));
      }
      if (++channel == static_cast<uint32_t>(p.depth)) {
        channel = 0;
        if (++tap_w == taps_w_) {
          tap_w = 0;
          ++tap_h;
        }
      }
    }
    k_ += BLOCK_K;
  }

  // Writes the chunks of the last fetch into a stage.
  template <int kStage>
  __device__ __forceinline__ void land() {
    unroll<kRows>(
        [&](auto i) { store_chunk<kStage + i*(kThreads / kChunksPerRow) * kStageRowBytes>(target_, chunk_[i]); });
  }

 private:
  SourceRows<kRows, kThreads> rows_;
  uint32_t chunk_[kRows][4];
  uint32_t k_;
  int taps_h_, taps_w_;
  uint32_t target_;
};

}  // namespace segpose::cuda
