// SPDX-License-Identifier: BSD-3-Clause
// A strided activation as the kernels see it: plain data, strides in elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace segpose {

constexpr int64_t kLineBytes = 64;  // of a cache line

struct TensorView {
  void* data;
  DType dtype;
  int64_t n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;

  // Rows of channels can be read and written in place: one element after the other, in the compute type.
  bool has_channel_rows(DType compute) const { return dtype == compute && (c <= 1 || stride_c == 1); }

  // Its pixels follow each other in planes, one for each channel, in the compute type.
  bool has_planes(DType compute) const {
    return dtype == compute && stride_w == 1 && (h <= 1 || stride_h == w) && (c <= 1 || stride_c != 1);
  }

  int64_t offset(int64_t in, int64_t ih, int64_t iw) const { return in * stride_n + ih * stride_h + iw * stride_w; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  // So many of its channels, from `first` on.
  TensorView channels(int64_t first, int64_t count) const {
    TensorView part = *this;
    part.data = static_cast<char*>(data) + first * stride_c * static_cast<int64_t>(dtype_size(dtype));
    part.c = count;
    return part;
  }
};

// [N, H, W, C] without gaps.
inline TensorView nhwc_view(void* data, DType dtype, int64_t n, int64_t c, int64_t h, int64_t w) {
  return {data, dtype, n, c, h, w, h * w * c, 1, w * c, c};
}

// [N, C, H, W] without gaps.
inline TensorView nchw_view(void* data, DType dtype, int64_t n, int64_t c, int64_t h, int64_t w) {
  return {data, dtype, n, c, h, w, c * h * w, h * w, w, 1};
}

// A filter [K, C / groups, R, S] with any strides.
struct FilterView {
  void* data;
  DType dtype;
  int64_t stride_k, stride_c, stride_r, stride_s;
};

// Hands out pieces of one allocation, each on its own cache lines. With a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t start = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kLineBytes - 1) / kLineBytes * kLineBytes;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + start);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace segpose
