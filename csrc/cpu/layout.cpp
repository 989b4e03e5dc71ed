// SPDX-License-Identifier: BSD-3-Clause
// Between memory formats: results in torch's default one from channels_last, and inputs of a concatenation into it.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "formats.h"
#include "prepared.h"
#include "results.h"

namespace segpose {
namespace {

void check_alike(const TensorView& in, const TensorView& out) {
  STD_TORCH_CHECK(in.dtype == out.dtype && in.n == out.n && in.c == out.c && in.h == out.h && in.w == out.w,
                  "segpose: input and output must have the same shape and dtype");
}

}  // namespace

void write_contiguous(const TensorView& in, const TensorView& out) {
  check_alike(in, out);
  STD_TORCH_CHECK((in.stride_c == 1 || in.c == 1) && (in.h == 1 || in.w == 1 || in.stride_h == in.w * in.stride_w),
                  "segpose: input must be channels_last");
  STD_TORCH_CHECK(is_contiguous(out), "segpose: output must be contiguous");
  if (in.n * in.c * in.h * in.w == 0) return;
  transpose_pixels(in, out, torch_executor());
}

void copy_channels(const TensorView& in, const TensorView& out) {
  check_alike(in, out);
  const auto size = static_cast<int64_t>(dtype_size(in.dtype));
  const int64_t run = in.stride_c == 1 && out.stride_c == 1 ? in.c : 1;
  for_each_task(torch_executor(), in.n * in.h, [&](int64_t task, int64_t) {
    const int64_t n = task / in.h;
    const int64_t row = task % in.h;
    for (int64_t w = 0; w < in.w; ++w) {
      char* to = static_cast<char*>(out.data) + out.offset(n, row, w) * size;
      const char* from = static_cast<const char*>(in.data) + in.offset(n, row, w) * size;
      for (int64_t c = 0; c < in.c; c += run) {
        std::memcpy(to + c * out.stride_c * size, from + c * in.stride_c * size, static_cast<size_t>(run * size));
      }
    }
  });
}

Tensor to_contiguous(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 4, "segpose: input must be 4-D");
  Tensor output = allocate_result(input, {input.size(0), input.size(1), input.size(2), input.size(3)}, false);
  write_contiguous(view_of(input), view_of(output));
  return output;
}

}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) { m.impl("to_contiguous", TORCH_BOX(&segpose::to_contiguous)); }
