// SPDX-License-Identifier: BSD-3-Clause
// Which source row each (tap, destination pixel) of a phase reads, as pointers: the "im2col" that is never copied.
#pragma once

#include "../common/phases.h"
#include "tensor_view.h"

namespace segpose {

template <class T>
struct RowTable {
  const T** sources;  // [taps][step]
  int64_t step;
  int64_t* offsets;  // [step] element offsets of the destination pixels
};

// Fills rows [0, step) for the destination pixels first .. first + count - 1 of the phase, counted over (n, row, col).
// Taps outside the source and rows past `count` point to `zeros`.
template <class T>
void fill_row_table(const Phase& phase, const TensorView& source, const TensorView& destination, const T* zeros,
                    int64_t first, int64_t count, const RowTable<T>& table) {
  int64_t col = first % phase.cols;
  int64_t row = first / phase.cols % phase.rows;
  int64_t n = first / (phase.cols * phase.rows);
  const int64_t taps = static_cast<int64_t>(phase.taps.size());
  const T* data = source.as<T>();
  for (int64_t m = 0; m < count;) {
    // A run of pixels of one image row.
    const int64_t run = phase.cols - col < count - m ? phase.cols - col : count - m;
    const int64_t start =
        destination.offset(n, phase.oh + row * phase.ostep_h, phase.ow + col * phase.ostep_w);
    for (int64_t i = 0; i < run; ++i) table.offsets[m + i] = start + i * phase.ostep_w * destination.stride_w;
    for (int64_t t = 0; t < taps; ++t) {
      const T** out = table.sources + t * table.step + m;
      const int64_t ih = row * phase.istep_h + phase.taps[static_cast<size_t>(t)].off_h;
      if (ih < 0 || ih >= source.h) {
        for (int64_t i = 0; i < run; ++i) out[i] = zeros;
        continue;
      }
      const T* line = data + source.offset(n, ih, 0);
      const int64_t iw = col * phase.istep_w + phase.taps[static_cast<size_t>(t)].off_w;
      for (int64_t i = 0; i < run; ++i) {
        const int64_t w = iw + i * phase.istep_w;
        out[i] = w >= 0 && w < source.w ? line + w * source.stride_w : zeros;
      }
    }
    m += run;
    col = 0;
    if (++row == phase.rows) {
      row = 0;
      ++n;
    }
  }
  for (int64_t m = count; m < table.step; ++m) {
    table.offsets[m] = 0;
    for (int64_t t = 0; t < taps; ++t) table.sources[t * table.step + m] = zeros;
  }
}

}  // namespace segpose
