// SPDX-License-Identifier: BSD-3-Clause
// Results in torch's default memory format from channels_last ones: transposed in registers, where torch's copy goes
// element by element.
#include <torch/csrc/stable/library.h>

#include "torch_views.h"
#include "ukernels.h"

namespace segpose {
namespace {

template <class T>
void transpose_images(const TensorView& in, const TensorView& out, const Executor& executor) {
  // Pixels of a task; a multiple of every vector.
  constexpr int64_t kPixels = 512;
  const Ukernels<T>& kernels = ukernels<T>(selected_isa());
  const int64_t pixels = in.h * in.w;
  const int64_t pieces = (pixels + kPixels - 1) / kPixels;
  for_each_task(executor, in.n * pieces, [&](int64_t task, int64_t) {
    const int64_t n = task / pieces;
    const int64_t first = task % pieces * kPixels;
    const int64_t count = pixels - first < kPixels ? pixels - first : kPixels;
    kernels.transpose(in.as<T>() + n * in.stride_n + first * in.c, in.c, count, in.c,
                      out.as<T>() + n * out.stride_n + first, pixels);
  });
}

Tensor to_contiguous(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 4, "segpose: input must be 4-D");
  const TensorView in = view_of(input);
  STD_TORCH_CHECK(in.stride_c == 1 && in.stride_w == in.c && in.stride_h == in.w * in.c,
                  "segpose: input must be channels_last");
  Tensor output = torch::stable::empty({in.n, in.c, in.h, in.w}, input.scalar_type(), std::nullopt, input.device());
  const TensorView out = view_of(output);
  const Executor executor = torch_executor();
  if (input.numel() == 0) return output;
  if (in.dtype == DType::float64) {
    transpose_images<double>(in, out, executor);
  } else {
    STD_TORCH_CHECK(in.dtype == DType::float32, "segpose: input must be float32 or float64");
    transpose_images<float>(in, out, executor);
  }
  return output;
}

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) { m.impl("to_contiguous", TORCH_BOX(&segpose::to_contiguous)); }
