// SPDX-License-Identifier: BSD-3-Clause
// Max-pooling over 2 x 2 pixels with stride 2, rows of channels at a time.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "torch_views.h"

namespace segpose {
namespace {

// As torch's: the first of equal values stays, and a NaN wins.
template <class T>
inline T larger(T a, T b) {
  return (b > a) | (b != b) ? b : a;
}

template <class T>
void pool_pixel(const T* a, const T* b, const T* c, const T* d, int64_t channels, T* __restrict out) {
  for (int64_t i = 0; i < channels; ++i) out[i] = larger(larger(larger(a[i], b[i]), c[i]), d[i]);
}

// Eight at a time, which the compiler does not find by itself for 16-bit integers.
using Bits [[gnu::vector_size(16)]] = int16_t;
constexpr int64_t kBits = sizeof(Bits) / sizeof(int16_t);

// bfloat16 and float16 by their bits, whose NaNs lie above kInfinity when the sign is off. With the other bits of
// negative numbers flipped, integers have the order of the numbers; NaNs become the largest.
template <int16_t kInfinity>
inline Bits order(Bits bits) {
  const Bits is_nan = (bits & int16_t{0x7fff}) > kInfinity;
  return ((bits ^ ((bits >> 15) & int16_t{0x7fff})) & ~is_nan) | (is_nan & int16_t{0x7fff});
}

inline Bits from_order(Bits order) { return order ^ ((order >> 15) & int16_t{0x7fff}); }

inline Bits load_bits(const int16_t* from, int64_t count) {
  Bits bits{};
  std::memcpy(&bits, from, static_cast<size_t>(count) * sizeof(int16_t));
  return bits;
}

template <int16_t kInfinity>
void pool_pixel(const int16_t* a, const int16_t* b, const int16_t* c, const int16_t* d, int64_t channels,
                int16_t* out) {
  const auto step = [&](int64_t i, int64_t count) {
    Bits most = order<kInfinity>(load_bits(a + i, count));
    for (const int16_t* other : {b, c, d}) {
      const Bits next = order<kInfinity>(load_bits(other + i, count));
      most = next > most ? next : most;
    }
    const Bits result = from_order(most);
    std::memcpy(out + i, &result, static_cast<size_t>(count) * sizeof(int16_t));
  };
  int64_t i = 0;
  for (; i + kBits <= channels; i += kBits) step(i, kBits);
  if (i < channels) step(i, channels - i);
}

template <class T, class Pixel>
void pool(const TensorView& in, const TensorView& out, const Executor& executor, const Pixel& pixel) {
  // Enough pixels a task to be worth a thread.
  constexpr int64_t kElements = 1 << 14;
  const int64_t rows = out.n * out.h;
  const int64_t rows_per_task = std::max<int64_t>(kElements / std::max<int64_t>(out.w * out.c, 1), 1);
  for_each_task(executor, (rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int64_t) {
    const int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) {
      const int64_t n = row / out.h;
      const int64_t p = row % out.h;
      for (int64_t q = 0; q < out.w; ++q) {
        const T* source = in.as<const T>() + in.offset(n, 2 * p, 2 * q);
        T* target = out.as<T>() + out.offset(n, p, q);
        pixel(source, source + in.stride_w, source + in.stride_h, source + in.stride_h + in.stride_w, out.c, target);
      }
    }
  });
}

// Rows and columns beyond the last whole window are left out.
void max_pool2x2(const Tensor& input, Tensor output) {
  STD_TORCH_CHECK(input.dim() == 4 && output.dim() == 4, "segpose: input and output must be 4-D");
  STD_TORCH_CHECK(output.size(0) == input.size(0) && output.size(1) == input.size(1) &&
                      output.size(2) == input.size(2) / 2 && output.size(3) == input.size(3) / 2,
                  "segpose: output must have half the extents of input");
  STD_TORCH_CHECK(output.scalar_type() == input.scalar_type(), "segpose: input and output must have the same dtype");
  const TensorView in = view_of(input);
  const TensorView out = view_of(output);
  STD_TORCH_CHECK(in.c <= 1 || (in.stride_c == 1 && out.stride_c == 1),
                  "segpose: the channels of input and output must be adjacent");
  const Executor executor = torch_executor();
  switch (in.dtype) {
    case DType::float32:
      return pool<float>(in, out, executor, pool_pixel<float>);
    case DType::float64:
      return pool<double>(in, out, executor, pool_pixel<double>);
    case DType::bfloat16:
      return pool<int16_t>(in, out, executor, pool_pixel<0x7f80>);
    case DType::float16:
      return pool<int16_t>(in, out, executor, pool_pixel<0x7c00>);
  }
}

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) { m.impl("max_pool2x2", TORCH_BOX(&segpose::max_pool2x2)); }
