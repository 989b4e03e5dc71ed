// SPDX-License-Identifier: BSD-3-Clause
// Max-pooling over 2 x 2 pixels with stride 2, rows of channels at a time, and its gradient. The gradient finds the
// largest value of a window again, by comparison with the result: eight bytes of index a window are not kept.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

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

// What the gradient compares, a vector at a time, and the bits that it passes on. 16-bit numbers are compared by their
// order, with both zeros equal.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Bits [[gnu::vector_size(16)]] = int32_t;
  using Values [[gnu::vector_size(16)]] = float;
  static Values values(Bits bits) { return reinterpret_cast<Values>(bits); }
  static Bits is_nan(Values values) { return values != values; }
};

template <>
struct Lanes<double> {
  using Bits [[gnu::vector_size(16)]] = int64_t;
  using Values [[gnu::vector_size(16)]] = double;
  static Values values(Bits bits) { return reinterpret_cast<Values>(bits); }
  static Bits is_nan(Values values) { return values != values; }
};

template <int16_t kInfinity>
struct Half {
  int16_t bits;
};

template <int16_t kInfinity>
struct Lanes<Half<kInfinity>> {
  using Bits = segpose::Bits;
  using Values = segpose::Bits;
  static Values values(Bits bits) { return order<kInfinity>(bits & ~(bits == int16_t{INT16_MIN})); }
  static Bits is_nan(Values values) { return values == int16_t{INT16_MAX}; }
};

// dx of a window: dy where x is the result, at the first such place, or at the last NaN.
template <class T>
void unpool_pixel(const T* dy, const T* y, const T* const (&x)[4], int64_t channels, T* const (&dx)[4]) {
  using Bits = typename Lanes<T>::Bits;
  constexpr auto kLanes = static_cast<int64_t>(sizeof(Bits) / sizeof(T));
  const auto step = [&](int64_t i, size_t bytes) {
    const auto load = [&](const T* from) {
      Bits bits{};
      std::memcpy(&bits, from + i, bytes);
      return bits;
    };
    const auto result = Lanes<T>::values(load(y));
    const Bits is_nan = Lanes<T>::is_nan(result);
    Bits here[4], found{};
    for (int k = 0; k < 4; ++k) {
      const auto value = Lanes<T>::values(load(x[k]));
      here[k] = (value == result) | (Lanes<T>::is_nan(value) & is_nan);
    }
    const Bits gradient = load(dy);
    Bits first[4], last[4];
    for (int k = 0; k < 4; ++k, found |= here[k - 1]) first[k] = here[k] & ~found;
    found = Bits{};
    for (int k = 3; k >= 0; found |= here[k], --k) last[k] = here[k] & ~found;
    for (int k = 0; k < 4; ++k) {
      const Bits out = gradient & ((last[k] & is_nan) | (first[k] & ~is_nan));
      std::memcpy(dx[k] + i, &out, bytes);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= channels; i += kLanes) step(i, sizeof(Bits));
  if (i < channels) step(i, static_cast<size_t>(channels - i) * sizeof(T));
}

// What lies beyond the last whole window gets no gradient.
template <class T>
void clear_edges(const TensorView& dx, int64_t n, int64_t row, int64_t from_column) {
  for (int64_t w = from_column; w < dx.w; ++w) std::fill_n(dx.as<T>() + dx.offset(n, row, w), dx.c, T{});
}

template <class T>
void unpool(const TensorView& dy, const TensorView& y, const TensorView& x, const TensorView& dx,
            const Executor& executor) {
  for_each_task(executor, x.n * ((x.h + 1) / 2), [&](int64_t task, int64_t) {
    const int64_t n = task / ((x.h + 1) / 2);
    const int64_t p = task % ((x.h + 1) / 2);
    if (p == y.h) return clear_edges<T>(dx, n, 2 * p, 0);
    for (int64_t q = 0; q < y.w; ++q) {
      const T* from = x.as<const T>() + x.offset(n, 2 * p, 2 * q);
      T* to = dx.as<T>() + dx.offset(n, 2 * p, 2 * q);
      unpool_pixel<T>(dy.as<const T>() + dy.offset(n, p, q), y.as<const T>() + y.offset(n, p, q),
                      {from, from + x.stride_w, from + x.stride_h, from + x.stride_h + x.stride_w}, x.c,
                      {to, to + dx.stride_w, to + dx.stride_h, to + dx.stride_h + dx.stride_w});
    }
    for (int64_t row = 2 * p; row < 2 * p + 2; ++row) clear_edges<T>(dx, n, row, 2 * y.w);
  });
}

void max_pool2x2_backward(const Tensor& grad_output, const Tensor& output, const Tensor& input, Tensor grad_input) {
  const TensorView dy = view_of(grad_output), y = view_of(output), x = view_of(input), dx = view_of(grad_input);
  const auto alike = [](const TensorView& a, const TensorView& b) {
    return a.dtype == b.dtype && a.n == b.n && a.c == b.c && a.h == b.h && a.w == b.w;
  };
  STD_TORCH_CHECK(alike(dy, y) && alike(x, dx) && x.dtype == y.dtype && x.n == y.n && x.c == y.c && x.h / 2 == y.h &&
                      x.w / 2 == y.w,
                  "segpose: the gradients must have the shapes and the dtype of input and output");
  for (const TensorView* view : {&dy, &y, &x, &dx}) {
    STD_TORCH_CHECK(view->c <= 1 || view->stride_c == 1, "segpose: channels must be adjacent");
  }
  const Executor executor = torch_executor();
  switch (x.dtype) {
    case DType::float32:
      return unpool<float>(dy, y, x, dx, executor);
    case DType::float64:
      return unpool<double>(dy, y, x, dx, executor);
    case DType::bfloat16:
      return unpool<Half<0x7f80>>(dy, y, x, dx, executor);
    case DType::float16:
      return unpool<Half<0x7c00>>(dy, y, x, dx, executor);
  }
}

}  // namespace

// Rows and columns beyond the last whole window are left out.
void max_pool2x2(const TensorView& in, const TensorView& out) {
  STD_TORCH_CHECK(out.n == in.n && out.c == in.c && out.h == in.h / 2 && out.w == in.w / 2,
                  "segpose: output must have half the extents of input");
  STD_TORCH_CHECK(out.dtype == in.dtype, "segpose: input and output must have the same dtype");
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

namespace {

void pool_tensors(const Tensor& input, Tensor output) {
  STD_TORCH_CHECK(input.dim() == 4 && output.dim() == 4, "segpose: input and output must be 4-D");
  max_pool2x2(view_of(input), view_of(output));
}

}  // namespace
}  // namespace segpose

STABLE_TORCH_LIBRARY_IMPL(segpose, CPU, m) {
  m.impl("max_pool2x2", TORCH_BOX(&segpose::pool_tensors));
  m.impl("max_pool2x2_backward", TORCH_BOX(&segpose::max_pool2x2_backward));
}
