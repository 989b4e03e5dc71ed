// SPDX-License-Identifier: BSD-3-Clause
// Element types: float16 and bfloat16 are computed in float, float and double in themselves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace segpose::cuda {

template <class T>
struct Numeric {
  using Accumulator = float;
};
template <>
struct Numeric<double> {
  using Accumulator = double;
};
template <class T>
using Accumulator = typename Numeric<T>::Accumulator;

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// torch's edges: relu(NaN) is NaN and relu(-inf) is 0, so ReLU is not a multiplication.
template <class Acc>
__device__ __forceinline__ Acc activate(Acc value, Act act, Acc negative_slope) {
  if (act == Act::none) return value;
  const Acc below = act == Act::relu ? Acc(0) : value * negative_slope;
  return value <= Acc(0) ? below : value;
}

}  // namespace segpose::cuda
