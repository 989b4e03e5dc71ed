// SPDX-License-Identifier: BSD-3-Clause
// Results larger than the caches go past them: an ordinary store fetches the line that it writes to, and takes the
// place of others in the caches.
#pragma once

#include <cstdint>

#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

// Depthwise layers of 64 channels took 0.91 of the time with 4 MiB of results, 0.62 with 6 and 0.57 with 16 (Zen 3, two
// threads). With a layer behind them that reads the results 1.12, 0.94 and 0.76: from 8 MiB on it pays in a network.
constexpr int64_t kStreamedBytes = 8 << 20;

inline bool overflows_caches(const TensorView& view, int64_t element_bytes) {
  return view.n * view.c * view.h * view.w * element_bytes >= kStreamedBytes;
}

// Whether so many values are whole cache lines. Half a line costs as much past the caches as a whole one.
template <class T>
bool are_lines(int64_t values) {
  return values * static_cast<int64_t>(sizeof(T)) % kLineBytes == 0;
}

template <class T>
bool is_at_line(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % kLineBytes == 0;
}

// Whether the pixels of a result go past the caches: each begins with a cache line.
template <class T>
bool streams(const TensorView& result) {
  return result.has_channel_rows(compute_dtype<T>()) && overflows_caches(result, sizeof(T)) &&
         is_at_line(result.as<const T>()) && are_lines<T>(result.stride_n) && are_lines<T>(result.stride_h) &&
         are_lines<T>(result.stride_w);
}

// Before other threads read what went past the caches.
inline void finish_streaming() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace segpose
