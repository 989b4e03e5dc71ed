// SPDX-License-Identifier: BSD-3-Clause
// Results larger than the caches go past them: an ordinary store fetches the line that it writes to, and takes the
// place of others in the caches.
#pragma once

#include <cstdint>

#include "plan.h"
#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

// Depthwise layers of 64 channels took 0.91 of the time with 4 MiB of results, 0.62 with 6 and 0.57 with 16 (Zen 3, two
// threads). With a layer behind them that reads the results 1.12, 0.94 and 0.76: from 8 MiB on it pays in a network.
constexpr int64_t kStreamedBytes = 8 << 20;

inline bool overflows_caches(const TensorView& view, int64_t element_bytes) {
  return view.n * view.c * view.h * view.w * element_bytes >= kStreamedBytes;
}

// Whether so many values are whole cache lines: parts of a line would go to memory one by one.
template <class T>
bool are_lines(int64_t values) {
  return values * static_cast<int64_t>(sizeof(T)) % kLineBytes == 0;
}

template <class T>
bool is_at_line(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % kLineBytes == 0;
}

// Whether so many channels of each pixel of a result, from `channel` on, go past the caches: whole cache lines.
inline bool streams(const TensorView& result, int64_t columns, int64_t channel) {
  const int64_t element_bytes = dtype_size(result.dtype);
  const auto are_whole = [&](auto... values) { return (... && (values * element_bytes % kLineBytes == 0)); };
  return result.has_channel_rows(result.dtype) && overflows_caches(result, element_bytes) && is_at_line(result.data) &&
         are_whole(result.stride_n, result.stride_h, result.stride_w, columns, channel);
}

// The same for a panel that computes in T.
template <class T>
bool streams(const TensorView& result, const Panel& panel, int64_t channel) {
  return result.dtype == compute_dtype<T>() && panel.columns == panel.nr && streams(result, panel.nr, channel);
}

// Before other threads read what went past the caches.
inline void finish_streaming() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace segpose
