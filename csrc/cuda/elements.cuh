// SPDX-License-Identifier: BSD-3-Clause
// Chunks put together from single elements, for channels that do not come in aligned 16-byte pieces.
#pragma once

#include <cstdint>

namespace segpose::cuda {

// The bits of an element of 2 or 4 bytes; zero where it is not valid.
template <class T>
__device__ __forceinline__ uint32_t load_element(const T* address, bool valid) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "elements of tensor-core operands");
  if (!valid) return 0;
  if constexpr (sizeof(T) == 2) {
    return __ldg(reinterpret_cast<const unsigned short*>(address));
  } else {
    return __ldg(reinterpret_cast<const unsigned int*>(address));
  }
}

// Elements are placed in order, the first of a word before the second.
template <class T>
__device__ __forceinline__ void place_element(uint32_t (&chunk)[4], int element, uint32_t bits) {
  if constexpr (sizeof(T) == 2) {
    uint32_t& word = chunk[element / 2];
    word = element % 2 == 0 ? bits : word | bits << 16;
  } else {
    chunk[element] = bits;
  }
}

}  // namespace segpose::cuda
