// SPDX-License-Identifier: BSD-3-Clause
#include "staging.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "../common/integers.h"

namespace segpose {
namespace {

// Pixels and channels of a transposition block: 16 floats are a cache line on both sides.
constexpr int64_t kBlock = 16;
// Fewer pixels side by side are written one by one.
constexpr int64_t kShortRun = 4;
// Partial bias sums, and the fewest values of one; fixed, so that the sum does not depend on the threads.
constexpr int64_t kBiasChunks = 64;
constexpr int64_t kBiasValues = 16 << 10;
constexpr int64_t kSumVectors = 4;

const char* address(const TensorView& view, int64_t offset) {
  return static_cast<const char*>(view.data) + offset * dtype_size(view.dtype);
}

// One image row [w][c] of any layout into channel rows.
template <class T>
void load_image_row(const Ukernels<T>& kernels, const TensorView& view, int64_t n, int64_t h, T* row) {
  const int64_t base = view.offset(n, h, 0);
  if (view.c == 1 && view.stride_w == 1) {
    kernels.load_row(view.dtype, address(view, base), view.w, row);
    return;
  }
  if (view.stride_c == 1 && view.stride_w == view.c) {
    kernels.load_row(view.dtype, address(view, base), view.w * view.c, row);
    return;
  }
  if (view.stride_c == 1 || view.c == 1) {
    for (int64_t w = 0; w < view.w; ++w) {
      kernels.load_row(view.dtype, address(view, base + w * view.stride_w), view.c, row + w * view.c);
    }
    return;
  }
  if (view.stride_w == 1 && view.dtype == compute_dtype<T>()) {
    kernels.transpose(view.template as<T>() + base, view.stride_c, view.c, view.w, row, view.c);
    return;
  }
  T line[kBlock];
  for (int64_t w0 = 0; w0 < view.w; w0 += kBlock) {
    const int64_t width = std::min(kBlock, view.w - w0);
    for (int64_t c = 0; c < view.c; ++c) {
      const int64_t start = base + c * view.stride_c + w0 * view.stride_w;
      if (view.stride_w == 1) {
        kernels.load_row(view.dtype, address(view, start), width, line);
      } else {
        for (int64_t w = 0; w < width; ++w) line[w] = load_element<T>(view.data, view.dtype, start + w * view.stride_w);
      }
      T* column = row + w0 * view.c + c;
      for (int64_t w = 0; w < width; ++w) column[w * view.c] = line[w];
    }
  }
}

// The gradient's row (n, h) through the mask; `row` has room for two rows. g and y are read where they lie if they can.
template <class T>
MaskArgs<T> mask_args(const Ukernels<T>& kernels, const MaskedSource& source, int64_t n, int64_t h, T* row) {
  const TensorView& view = source.view;
  const int64_t size = view.w * view.c;
  const auto packed = [&](const TensorView& tensor, DType dtype) {
    return tensor.dtype == dtype && (tensor.stride_c == 1 || tensor.c == 1) && tensor.stride_w == tensor.c;
  };
  MaskArgs<T> args{compute_dtype<T>(), row, nullptr, row, size, Activation::none, T{1}, nullptr, 0};
  const bool half = view.dtype == DType::bfloat16 && packed(view, DType::bfloat16) &&
                    (source.mask == nullptr || packed(source.mask->output, DType::bfloat16));
  if (half) args.dtype = DType::bfloat16;
  if (packed(view, args.dtype)) {
    args.g = address(view, view.offset(n, h, 0));
  } else {
    load_image_row(kernels, view, n, h, row);
  }
  if (source.mask == nullptr) return args;
  const TensorView& output = source.mask->output;
  args.activation = source.mask->activation;
  args.negative_slope = static_cast<T>(source.mask->negative_slope);
  if (packed(output, args.dtype)) {
    args.y = address(output, output.offset(n, h, 0));
  } else {
    load_image_row(kernels, output, n, h, row + size);
    args.y = row + size;
  }
  return args;
}

// Whole vectors after which the channels come round again; several, so that an addition need not wait for the one
// before.
int64_t sum_period(int64_t channels, int64_t vector) {
  const int64_t period = channels / std::gcd(channels, vector) * vector;
  return period * ceil_div(kSumVectors * vector, period);
}

// Whether rows of channels follow each other without a gap, image after image.
bool is_dense(const TensorView& view) {
  return (view.stride_c == 1 || view.c == 1) && view.stride_w == view.c && view.stride_h == view.w * view.c &&
         view.stride_n == view.h * view.w * view.c;
}

}  // namespace

template <class T>
void load_source_row(const Ukernels<T>& kernels, const MaskedSource& source, int64_t n, int64_t h, T* row) {
  if (source.mask == nullptr) {
    load_image_row(kernels, source.view, n, h, row);
    return;
  }
  MaskArgs<T> args = mask_args(kernels, source, n, h, row);
  if (args.dtype == compute_dtype<T>()) {
    args.out = row;
    kernels.mask_line(args);
    return;
  }
  // bfloat16 rows that lie in place: masked as such, then widened.
  args.out = row + args.count;
  kernels.mask_line(args);
  kernels.load_row(args.dtype, args.out, args.count, row);
}

int64_t source_row_scratch(const MaskedSource& source) {
  return source.view.w * source.view.c * (source.mask == nullptr ? 1 : 2);
}

template <class T>
void stage(const Ukernels<T>& kernels, const MaskedSource& source, T* destination, const Executor& executor) {
  const TensorView& view = source.view;
  for_each_task(executor, view.n * view.h, [&](int64_t task, int64_t) {
    load_image_row(kernels, view, task / view.h, task % view.h, destination + task * view.w * view.c);
  });
}

template <class T>
int64_t gradient_scratch(const Ukernels<T>& kernels, const TensorView& grad, int64_t workers) {
  return 2 * workers * grad.w * grad.c + kBiasChunks * sum_period(grad.c, kernels.vector_length);
}

template <class T>
void stage_gradient(const Ukernels<T>& kernels, const GradientStage<T>& stage, T* scratch, const Executor& executor) {
  const TensorView& grad = stage.source.view;
  const int64_t row_size = grad.w * grad.c;
  const int64_t period = sum_period(grad.c, kernels.vector_length);
  T* partials = scratch + 2 * executor.workers * row_size;
  const int64_t rows = grad.n * grad.h;
  const int64_t chunks = std::clamp<int64_t>(rows * row_size / kBiasValues, 1, std::min(kBiasChunks, rows));
  const SourceMask* mask = stage.source.mask;
  const bool dense = is_dense(grad) && (mask == nullptr || is_dense(mask->output));
  for_each_task(executor, chunks, [&](int64_t chunk, int64_t worker) {
    T* sums = partials + chunk * period;
    std::fill_n(sums, period, T{0});
    T* temporary = scratch + 2 * worker * row_size;
    const int64_t end = rows * (chunk + 1) / chunks;
    int64_t count = 1;
    for (int64_t row = rows * chunk / chunks; row < end; row += count) {
      MaskArgs<T> args = mask_args(kernels, stage.source, row / grad.h, row % grad.h, temporary);
      args.sums = stage.bias_grad == nullptr ? nullptr : sums;
      args.period = period;
      char* out = stage.destination == nullptr
                      ? nullptr
                      : static_cast<char*>(stage.destination) + row * row_size * dtype_size(stage.destination_dtype);
      if (out == nullptr || stage.destination_dtype == args.dtype) {
        const bool in_place = args.g != temporary && args.y != temporary + row_size;
        count = dense && in_place ? end - row : 1;
        args.count *= count;
        args.out = out;
        kernels.mask_line(args);
        continue;
      }
      args.out = temporary;
      kernels.mask_line(args);
      if (args.dtype == compute_dtype<T>()) {
        kernels.store_row(stage.destination_dtype, temporary, row_size, out);
      } else {
        kernels.load_row(args.dtype, temporary, row_size, reinterpret_cast<T*>(out));
      }
    }
  });
  if (stage.bias_grad == nullptr) return;
  for (int64_t c = 0; c < grad.c; ++c) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t i = c; i < period; i += grad.c) sum += static_cast<double>(partials[chunk * period + i]);
    }
    stage.bias_grad[c] = sum;
  }
}

template <class T>
void stage_gradient_planes(const Ukernels<T>& kernels, const GradientStage<T>& stage, double* plane_sums,
                           const Executor& executor) {
  constexpr int64_t kMostLanes = kSumVectors * 16;
  const TensorView& grad = stage.source.view;
  const SourceMask* mask = stage.source.mask;
  const int64_t pixels = grad.h * grad.w;
  for_each_task(executor, grad.n * grad.c, [&](int64_t task, int64_t) {
    const int64_t n = task / grad.c, c = task % grad.c;
    T lanes[kMostLanes] = {};
    MaskArgs<T> args{compute_dtype<T>(), nullptr, nullptr, nullptr, pixels, Activation::none, T{1}, nullptr, 0};
    args.g = grad.template as<const T>() + n * grad.stride_n + c * grad.stride_c;
    if (mask != nullptr) {
      args.y = mask->output.template as<const T>() + n * mask->output.stride_n + c * mask->output.stride_c;
      args.activation = mask->activation;
      args.negative_slope = static_cast<T>(mask->negative_slope);
    }
    if (stage.destination != nullptr) args.out = static_cast<T*>(stage.destination) + task * pixels;
    if (plane_sums != nullptr) args.sums = lanes;
    args.period = kSumVectors * kernels.vector_length;
    kernels.mask_line(args);
    if (plane_sums == nullptr) return;
    double sum = 0;
    for (const T lane : lanes) sum += static_cast<double>(lane);
    plane_sums[task] = sum;
  });
  if (plane_sums == nullptr) return;
  for (int64_t c = 0; c < grad.c; ++c) {
    stage.bias_grad[c] = 0;
    for (int64_t n = 0; n < grad.n; ++n) stage.bias_grad[c] += plane_sums[n * grad.c + c];
  }
}

template <class T>
void unstage_block(const Ukernels<T>& kernels, const T* rows, int64_t row_step, int64_t count, int64_t columns,
                   const TensorView& destination, const int64_t* offsets, int64_t channel) {
  char* data = static_cast<char*>(destination.data);
  const int64_t size = dtype_size(destination.dtype);
  if (destination.stride_c == 1 || destination.c == 1) {
    for (int64_t m = 0; m < count; ++m) {
      kernels.store_row(destination.dtype, rows + m * row_step, columns, data + (offsets[m] + channel) * size);
    }
    return;
  }
  if (destination.dtype == compute_dtype<T>()) {
    T* plane = destination.template as<T>() + channel * destination.stride_c;
    for (int64_t m = 0; m < count;) {
      int64_t run = 1;
      while (m + run < count && offsets[m + run] == offsets[m] + run) ++run;
      if (run < kShortRun) {
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t i = 0; i < run; ++i) {
            plane[offsets[m] + i + c * destination.stride_c] = rows[(m + i) * row_step + c];
          }
        }
      } else {
        kernels.transpose(rows + m * row_step, row_step, run, columns, plane + offsets[m], destination.stride_c);
      }
      m += run;
    }
    return;
  }
  T line[kBlock];
  for (int64_t m0 = 0; m0 < count; m0 += kBlock) {
    const int64_t width = std::min(kBlock, count - m0);
    bool in_line = true;
    for (int64_t m = 1; m < width; ++m) in_line = in_line && offsets[m0 + m] == offsets[m0] + m;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t start = (channel + c) * destination.stride_c;
      for (int64_t m = 0; m < width; ++m) line[m] = rows[(m0 + m) * row_step + c];
      if (in_line) {
        kernels.store_row(destination.dtype, line, width, data + (start + offsets[m0]) * size);
      } else {
        for (int64_t m = 0; m < width; ++m) {
          store_element(destination.data, destination.dtype, start + offsets[m0 + m], line[m]);
        }
      }
    }
  }
}

#define SEGPOSE_INSTANTIATE(T)                                                                                   \
  template void load_source_row<T>(const Ukernels<T>&, const MaskedSource&, int64_t, int64_t, T*);               \
  template void stage<T>(const Ukernels<T>&, const MaskedSource&, T*, const Executor&);                          \
  template int64_t gradient_scratch<T>(const Ukernels<T>&, const TensorView&, int64_t);                          \
  template void stage_gradient<T>(const Ukernels<T>&, const GradientStage<T>&, T*, const Executor&);             \
  template void stage_gradient_planes<T>(const Ukernels<T>&, const GradientStage<T>&, double*, const Executor&); \
  template void unstage_block<T>(const Ukernels<T>&, const T*, int64_t, int64_t, int64_t, const TensorView&,     \
                                 const int64_t*, int64_t);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
