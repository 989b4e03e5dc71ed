// SPDX-License-Identifier: BSD-3-Clause
// Element types at the edge of the kernels.
#pragma once

#include <cstdint>

namespace segpose {

enum class DType { float32, float64, bfloat16, float16 };

inline int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return 4;
    case DType::float64:
      return 8;
    case DType::bfloat16:
    case DType::float16:
      return 2;
  }
  return 0;
}

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
  }
  return "unknown";
}

}  // namespace segpose
