// SPDX-License-Identifier: BSD-3-Clause
// One convolution, as every backend sees it: plain data, no torch, no allocation.
#pragma once

#include <cstdint>

namespace segpose {

// The *convolution* view of both public operations (CUTLASS' letters):
//   activation x [N, H, W, C], filter w [K, R, S, C / groups], output y [N, P, Q, K]
//   y = fprop(x, w),  dx = dgrad(dy, w),  dw = wgrad(dy, x)
// A transposed convolution is the dgrad of this problem: its input is y-shaped, its output is x-shaped, and its weight
// [C_in, C_out / groups, R, S] already is the filter [K, C / groups, R, S].
struct ConvProblem {
  int64_t n, h, w, c;  // activation extents
  int64_t p, q, k;     // output extents
  int64_t r, s;        // filter extents
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;  // before the first row and column; the far side follows from p and q
  int64_t dilation_h, dilation_w;
  int64_t groups;

  int64_t c_per_group() const { return c / groups; }
  int64_t k_per_group() const { return k / groups; }
  int64_t taps() const { return r * s; }

  // Multiply-adds counted as two, at every output position of the convolution (padding included): the figure that
  // fprop, dgrad and wgrad of this problem share.
  double flops() const {
    return 2.0 * static_cast<double>(n) * static_cast<double>(p) * static_cast<double>(q) * static_cast<double>(k) *
           static_cast<double>(c_per_group()) * static_cast<double>(taps());
  }
};

enum class Pass { fprop, dgrad, wgrad };

// What the epilogue does to an accumulator: v + bias, then the activation.
enum class Activation { none, relu, leaky_relu };

struct Epilogue {
  Activation activation;
  double negative_slope;
  bool pooled = false;  // the destination holds the largest values of 2 x 2 pixels, where a pass can_pool
};

// The op schemas carry the activation as one number: 1 none, 0 ReLU, anything else leaky ReLU.
inline Epilogue epilogue_from_slope(double negative_slope) {
  if (negative_slope == 1.0) return {Activation::none, 1.0};
  if (negative_slope == 0.0) return {Activation::relu, 0.0};
  return {Activation::leaky_relu, negative_slope};
}

// Extent of a convolution's output along one axis.
inline int64_t conv_extent(int64_t size, int64_t tap, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t reach = size + 2 * pad - dilation * (tap - 1) - 1;
  return reach < 0 ? 0 : reach / stride + 1;
}

// Extent of a transposed convolution's output along one axis.
inline int64_t conv_transpose_extent(int64_t size, int64_t tap, int64_t stride, int64_t pad, int64_t out_pad,
                                     int64_t dilation) {
  return (size - 1) * stride - 2 * pad + dilation * (tap - 1) + out_pad + 1;
}

}  // namespace segpose
