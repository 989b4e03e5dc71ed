// SPDX-License-Identifier: BSD-3-Clause
#include "formats.h"

#include <algorithm>

#include "../common/integers.h"
#include "ukernels.h"

namespace segpose {
namespace {

template <class T>
void transpose(const T* in, int64_t step, int64_t rows, int64_t columns, T* out, int64_t out_step) {
  ukernels<T>(selected_isa()).transpose(in, step, rows, columns, out, out_step);
}

// 16-bit values: pairs of columns as floats, then apart.
void transpose(const uint16_t* in, int64_t step, int64_t rows, int64_t columns, uint16_t* out, int64_t out_step) {
  constexpr int64_t kRows = 128;
  constexpr int64_t kPairs = 16;
  alignas(64) uint32_t pairs[kPairs * kRows];
  const int64_t paired = step % 2 == 0 && reinterpret_cast<uintptr_t>(in) % 4 == 0 ? columns / 2 * 2 : 0;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t count = std::min(rows - r, kRows);
    for (int64_t c = 0; c < paired; c += 2 * kPairs) {
      const int64_t width = std::min(paired - c, 2 * kPairs) / 2;
      transpose(reinterpret_cast<const float*>(in + r * step + c), step / 2, count, width,
                reinterpret_cast<float*>(pairs), kRows);
      for (int64_t pair = 0; pair < width; ++pair) {
        uint16_t* even = out + (c + 2 * pair) * out_step + r;
        uint16_t* odd = even + out_step;
        for (int64_t i = 0; i < count; ++i) even[i] = static_cast<uint16_t>(pairs[pair * kRows + i]);
        for (int64_t i = 0; i < count; ++i) odd[i] = static_cast<uint16_t>(pairs[pair * kRows + i] >> 16);
      }
    }
    for (int64_t c = paired; c < columns; ++c) {
      for (int64_t i = r; i < r + count; ++i) out[c * out_step + i] = in[i * step + c];
    }
  }
}

template <class T>
void transpose_images(const TensorView& in, const TensorView& out, const Executor& executor) {
  // Pixels of a task; a multiple of every vector.
  constexpr int64_t kPixels = 512;
  // Waking the others takes longer than so many values.
  constexpr int64_t kAloneValues = 16 << 10;
  const int64_t pixels = in.h * in.w;
  const int64_t pieces = ceil_div(pixels, kPixels);
  const int64_t step = in.w > 1 ? in.stride_w : in.stride_h;
  Executor chosen = executor;
  if (in.n * pixels * in.c <= kAloneValues) chosen.workers = 1;
  for_each_task(chosen, in.n * pieces, [&](int64_t task, int64_t) {
    const int64_t n = task / pieces;
    const int64_t first = task % pieces * kPixels;
    const int64_t count = std::min(pixels - first, kPixels);
    transpose(in.as<const T>() + n * in.stride_n + first * step, step, count, in.c,
              out.as<T>() + n * out.stride_n + first, pixels);
  });
}

}  // namespace

bool is_contiguous(const TensorView& view) {
  return (view.w == 1 || view.stride_w == 1) && (view.h == 1 || view.stride_h == view.w) &&
         (view.c == 1 || view.stride_c == view.h * view.w) &&
         (view.n == 1 || view.stride_n == view.c * view.h * view.w);
}

void transpose_pixels(const TensorView& in, const TensorView& out, const Executor& executor) {
  switch (in.dtype) {
    case DType::float64:
      return transpose_images<double>(in, out, executor);
    case DType::float32:
      return transpose_images<float>(in, out, executor);
    case DType::bfloat16:
    case DType::float16:
      return transpose_images<uint16_t>(in, out, executor);
  }
}

}  // namespace segpose
