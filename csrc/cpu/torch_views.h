// SPDX-License-Identifier: BSD-3-Clause
// torch's tensors, threads and shapes as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../common/checks.h"
#include "executor.h"
#include "plan.h"
#include "tensor_view.h"

namespace segpose {

using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

inline DType to_dtype(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "segpose: the cpu backend supports float32, float64, bfloat16 and float16");
  }
}

inline TensorView view_of(const Tensor& tensor) {
  return {tensor.data_ptr(), to_dtype(tensor), tensor.size(0),   tensor.size(1),   tensor.size(2),
          tensor.size(3),    tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline TensorView checked_view(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "segpose: ", name, " must be on CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, "segpose: ", name, " must be 4-D, got ", tensor.dim(), " dimensions");
  return view_of(tensor);
}

inline FilterView filter_of(const Tensor& tensor) {
  return {tensor.data_ptr(), to_dtype(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// torch's thread pool.
inline Executor torch_executor() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t workers, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
            });
          }};
}

inline Ints shape_of(const ConvProblem& problem, bool x_shaped) {
  if (x_shaped) return {problem.n, problem.c, problem.h, problem.w};
  return {problem.n, problem.k, problem.p, problem.q};
}

inline Pass forward_pass(const ConvAttributes& attributes) { return attributes.transposed ? Pass::dgrad : Pass::fprop; }

}  // namespace segpose
