// SPDX-License-Identifier: BSD-3-Clause
// Between torch's tensors and the kernels: any strides and dtype on one side, rows of channels in the compute type on
// the other; the activation mask and the bias gradient ride along.
#pragma once

#include "executor.h"
#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

// The gradient through an activation: multiplied by its derivative, which the sign of its output tells.
struct SourceMask {
  TensorView output;
  Activation activation;
  double negative_slope;
};

// What a pass reads: a tensor of any layout and dtype, masked on the way when it is a gradient.
struct MaskedSource {
  TensorView view;
  const SourceMask* mask;  // or null

  // Its channel rows can be read where they are.
  bool in_place(DType compute) const { return mask == nullptr && view.has_channel_rows(compute); }

  bool has_planes(DType compute) const {
    return view.has_planes(compute) && (mask == nullptr || mask->output.has_planes(compute));
  }
};

// One image row [w][c] in the compute type; `row` has room for source_row_scratch elements.
template <class T>
void load_source_row(const Ukernels<T>& kernels, const MaskedSource& source, int64_t n, int64_t h, T* row);
int64_t source_row_scratch(const MaskedSource& source);

// Copies `source` into `destination`, an NHWC buffer of the compute type.
template <class T>
void stage(const Ukernels<T>& kernels, const MaskedSource& source, T* destination, const Executor& executor);

// The gradient through the activation and the bias gradient, in one pass over dy.
template <class T>
struct GradientStage {
  MaskedSource source;
  void* destination;  // masked dy as NHWC in T or in its own dtype, or null when only the sums are wanted
  DType destination_dtype;
  double* bias_grad;  // [c] sums, or null
};

// Elements of scratch that stage_gradient needs for `workers` workers.
template <class T>
int64_t gradient_scratch(const Ukernels<T>& kernels, const TensorView& grad, int64_t workers);

template <class T>
void stage_gradient(const Ukernels<T>& kernels, const GradientStage<T>& stage, T* scratch, const Executor& executor);

// The same from planes to planes of T without gaps. `plane_sums` has room for [n][c], or is null.
template <class T>
void stage_gradient_planes(const Ukernels<T>& kernels, const GradientStage<T>& stage, double* plane_sums,
                           const Executor& executor);

// Writes `rows` rows of `columns` values (`row_step` apart) to the pixels at element offsets `offsets` of
// `destination`, starting at channel `channel`.
template <class T>
void unstage_block(const Ukernels<T>& kernels, const T* rows, int64_t row_step, int64_t count, int64_t columns,
                   const TensorView& destination, const int64_t* offsets, int64_t channel);

// Writes one value in the tensor's dtype.
template <class T>
void store_element(void* data, DType dtype, int64_t index, T value) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case DType::float64:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      break;
    case DType::bfloat16:
      static_cast<uint16_t*>(data)[index] = float_to_bfloat16(static_cast<float>(value));
      break;
    case DType::float16:
      static_cast<uint16_t*>(data)[index] = float_to_float16(static_cast<float>(value));
      break;
  }
}

template <class T>
T load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float32:
      return static_cast<T>(static_cast<const float*>(data)[index]);
    case DType::float64:
      return static_cast<T>(static_cast<const double*>(data)[index]);
    case DType::bfloat16:
      return static_cast<T>(bfloat16_to_float(static_cast<const uint16_t*>(data)[index]));
    case DType::float16:
      return static_cast<T>(float16_to_float(static_cast<const uint16_t*>(data)[index]));
  }
  return T{0};
}

}  // namespace segpose
