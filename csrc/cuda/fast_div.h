// SPDX-License-Identifier: BSD-3-Clause
// Division of numbers below 2^31 by a divisor that is known before the launch: a multiplication and a shift.
// Granlund and Montgomery, "Division by invariant integers using multiplication" (1994), figure 4.1.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SEGPOSE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SEGPOSE_HOST_DEVICE inline
#endif

namespace segpose::cuda {

struct FastDiv {
  uint32_t divisor, multiplier, shift;

  SEGPOSE_HOST_DEVICE uint32_t divide(uint32_t value) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(value, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{value} * multiplier) >> 32);
#endif
    return (high + value) >> shift;
  }

  // Quotient, and the remainder in `value`.
  SEGPOSE_HOST_DEVICE uint32_t split(uint32_t& value) const {
    const uint32_t quotient = divide(value);
    value -= quotient * divisor;
    return quotient;
  }
};

// For 1 <= divisor < 2^31.
inline FastDiv make_fast_div(int64_t divisor) {
  const auto d = static_cast<uint32_t>(divisor);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < d) ++shift;
  const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1;
  return {d, static_cast<uint32_t>(multiplier), shift};
}

}  // namespace segpose::cuda
