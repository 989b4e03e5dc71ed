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

struct alignas(8) WgradPixel {
  int64_t output;      // offset of its channel 0, -1 behind the last pixel
  int64_t activation;  // of the pixel that tap (0, 0) meets
  int h, w;            // of that pixel; far outside behind the last one

  static constexpr int kOutside = -(1 << 30);

  __device__ __forceinline__ void locate(const WgradParams& p, int64_t index, int64_t end) {
    output = -1;
    activation = 0;
    h = w = kOutside;
    if (index < end) {
      auto col = static_cast<uint32_t>(index);
      const uint32_t n = p.image.split(col);
      const uint32_t row = p.row.split(col);
      h = static_cast<int>(row) * p.stride_h - p.pad_h;
      w = static_cast<int>(col) * p.stride_w - p.pad_w;
      output = n * p.output.stride_n + row * p.output.stride_h + col * p.output.stride_w;
      activation = n * p.activation.stride_n + h * p.activation.stride_h + w * p.activation.stride_w;
    }
  }
};

// A column of gemm_n: the tap and channel of the activation that it stands for.
struct WgradColumn {
  int dh, dw;
  int64_t offset;  // from WgradPixel::activation
  bool valid;

  __device__ __forceinline__ void locate(const WgradParams& p, uint32_t group, uint32_t column) {
    valid = column < static_cast<uint32_t>(p.columns);
    uint32_t channel = column;
    uint32_t tap_w = p.depth_div.split(channel);
    const uint32_t tap_h = p.tap_w.split(tap_w);
    dh = static_cast<int>(tap_h) * p.dilation_h;
    dw = static_cast<int>(tap_w) * p.dilation_w;
    offset = dh * p.activation.stride_h + dw * p.activation.stride_w +
             (int64_t{group} * p.depth + channel) * p.activation.stride_c;
  }

  __device__ __forceinline__ bool inside(const WgradParams& p, const WgradPixel& pixel) const {
    return valid && static_cast<unsigned>(pixel.h + dh) < static_cast<unsigned>(p.activation.h) &&
           static_cast<unsigned>(pixel.w + dw) < static_cast<unsigned>(p.activation.w);
  }
};

}  // namespace segpose::cuda
