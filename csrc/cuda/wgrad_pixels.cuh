// SPDX-License-Identifier: BSD-3-Clause
// The reduction of wgrad runs over output pixels. Where a pixel lies in either operand is worked out once for a block,
// one K block ahead of the copies that need it.
#pragma once

#include "numeric.cuh"

namespace segpose::cuda {

struct WgradBlock {
  uint32_t n_tile, m_tile, group;

  __device__ __forceinline__ explicit WgradBlock(const WgradParams& p) {
    uint32_t rest = blockIdx.x;
    n_tile = rest;
    rest = p.n_tiles.split(n_tile);
    m_tile = rest;
    group = p.m_tiles.split(m_tile);
  }
};

constexpr int kOutsideActivation = -(1 << 30);

struct alignas(16) OutputPixel {
  int64_t offset;  // of its channel 0, in bytes
  int bytes;       // of a chunk of it: 16, or 0 behind the last pixel
  int padding;
};

struct alignas(16) ActivationPixel {
  int64_t offset;  // of the pixel that tap (0, 0) meets, in bytes
  int h, w;        // of that pixel; far outside behind the last one
};

// The pixels of a K block.
template <int BLOCK_K>
struct WgradPixels {
  OutputPixel output[BLOCK_K];
  ActivationPixel activation[BLOCK_K];

  __device__ __forceinline__ void locate(const WgradParams& p, int at, int64_t index, int64_t end, int element) {
    OutputPixel in_output{0, 0, 0};
    ActivationPixel in_activation{0, kOutsideActivation, kOutsideActivation};
    if (index < end) {
      auto col = static_cast<uint32_t>(index);
      const uint32_t n = p.image.split(col);
      const uint32_t row = p.row.split(col);
      const int h = static_cast<int>(row) * p.stride_h - p.pad_h;
      const int w = static_cast<int>(col) * p.stride_w - p.pad_w;
      in_output = {(n * p.output.stride_n + row * p.output.stride_h + col * p.output.stride_w) * element, 16, 0};
      in_activation = {(n * p.activation.stride_n + h * p.activation.stride_h + w * p.activation.stride_w) * element, h,
                       w};
    }
    output[at] = in_output;
    activation[at] = in_activation;
  }
};

// A column of gemm_n: the tap and channel of the activation that it stands for.
struct WgradColumn {
  int dh, dw;          // far outside behind the last column; two such distances do not wrap around
  const char* source;  // of the column, where tap (0, 0) meets pixel (0, 0)

  __device__ __forceinline__ void locate(const WgradParams& p, uint32_t group, uint32_t column, int element) {
    uint32_t channel = column;
    uint32_t tap_w = p.depth_div.split(channel);
    const uint32_t tap_h = p.tap_w.split(tap_w);
    dh = static_cast<int>(tap_h) * p.dilation_h;
    dw = static_cast<int>(tap_w) * p.dilation_w;
    source =
        static_cast<const char*>(p.activation.data) + (dh * p.activation.stride_h + dw * p.activation.stride_w +
                                                       (int64_t{group} * p.depth + channel) * p.activation.stride_c) *
                                                          element;
    if (column >= static_cast<uint32_t>(p.columns)) dh = kOutsideActivation;
  }

  // Both comparisons are made: a branch would cost more.
  __device__ __forceinline__ bool inside(const WgradParams& p, const ActivationPixel& pixel) const {
    return (static_cast<unsigned>(pixel.h + dh) < static_cast<unsigned>(p.activation.h)) &
           (static_cast<unsigned>(pixel.w + dw) < static_cast<unsigned>(p.activation.w));
  }
};

}  // namespace segpose::cuda
