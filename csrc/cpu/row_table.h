// SPDX-License-Identifier: BSD-3-Clause
// Which source row each (tap, destination pixel) of a phase reads, as pointers: the "im2col" that is never copied.
#pragma once

#include "../common/phases.h"
#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

template <class T>
struct RowTable {
  const T** sources;  // [taps][step]
  int64_t step;
  int64_t* offsets;  // [step] element offsets of the destination pixels
  // [step] of the source pixels that they read at offset zero: see PointerArgs
  int64_t* row;
  int64_t* col;
  int64_t* at;
};

// Calls fn(first row of the run, length, n, row, col) for every run of pixels of one image row, for the destination
// pixels first .. first + count - 1 of the phase. Pixels count over (n, row, col), or with `batch_inner` over (row,
// col, n): small maps put the images side by side, so that the rows of a tile share their taps.
template <class Fn>
void for_each_run(const Phase& phase, int64_t batch, int64_t first, int64_t count, const Fn& fn) {
  if (phase.batch_inner) {
    for (int64_t m = 0; m < count; ++m) {
      const int64_t pixel = (first + m) / batch;
      fn(m, int64_t{1}, (first + m) % batch, pixel / phase.cols, pixel % phase.cols);
    }
    return;
  }
  int64_t col = first % phase.cols;
  int64_t row = first / phase.cols % phase.rows;
  int64_t n = first / (phase.cols * phase.rows);
  for (int64_t m = 0; m < count;) {
    const int64_t run = phase.cols - col < count - m ? phase.cols - col : count - m;
    fn(m, run, n, row, col);
    m += run;
    col = 0;
    if (++row == phase.rows) {
      row = 0;
      ++n;
    }
  }
}

// The destination pixels' element offsets.
template <class T>
void fill_offsets(const Phase& phase, const TensorView& destination, int64_t first, int64_t count,
                  const RowTable<T>& table) {
  for_each_run(phase, destination.n, first, count, [&](int64_t m, int64_t run, int64_t n, int64_t row, int64_t col) {
    const int64_t start = destination.offset(n, phase.oh + row * phase.ostep_h, phase.ow + col * phase.ostep_w);
    for (int64_t i = 0; i < run; ++i) table.offsets[m + i] = start + i * phase.ostep_w * destination.stride_w;
  });
}

// Fills `rows` pointers for each tap, those of the destination pixels first .. first + count - 1 of the phase and some
// past them. Taps outside the source and rows past `count` point to `zeros`.
template <class T>
void fill_row_table(const Ukernels<T>& kernels, const Phase& phase, const TensorView& source,
                    const TensorView& destination, const T* zeros, int64_t first, int64_t count, int64_t rows,
                    const RowTable<T>& table) {
  fill_offsets(phase, destination, first, count, table);
  for_each_run(phase, source.n, first, count, [&](int64_t m, int64_t run, int64_t n, int64_t row, int64_t col) {
    const int64_t h = row * phase.istep_h, w = col * phase.istep_w;
    const int64_t start = source.offset(n, h, w);
    for (int64_t i = 0; i < run; ++i) {
      table.row[m + i] = h;
      table.col[m + i] = w + i * phase.istep_w;
      table.at[m + i] = start + i * phase.istep_w * source.stride_w;
    }
  });
  const PointerArgs<T> args{source.as<T>(),  zeros, source.h,  source.w,  source.stride_h,
                            source.stride_w, count, table.row, table.col, table.at};
  for (size_t t = 0; t < phase.taps.size(); ++t) {
    const T** const out = table.sources + static_cast<int64_t>(t) * table.step;
    kernels.point_rows(args, phase.taps[t].off_h, phase.taps[t].off_w, out);
    for (int64_t m = count; m < rows; ++m) out[m] = zeros;
  }
}

// The first i in [0, count] with start + i * step >= bound.
inline int64_t first_inside(int64_t start, int64_t step, int64_t bound, int64_t count) {
  if (start >= bound) return 0;
  const int64_t steps = (bound - start + step - 1) / step;
  return steps < count ? steps : count;
}

// A few channels: a loop beats memcpy. Null reads as zeros.
template <class T>
inline void copy_pixel(const T* source, int64_t channels, T* out) {
  if (source == nullptr) {
    for (int64_t c = 0; c < channels; ++c) out[c] = T{0};
  } else if (channels == 1) {
    *out = *source;
  } else {
    for (int64_t c = 0; c < channels; ++c) out[c] = source[c];
  }
}

// Copies the taps of every pixel together: rows of taps * channels values, `row_step` apart, zeros for padding.
// `offset` is the first channel.
template <class T>
void gather_rows(const Phase& phase, const TensorView& source, int64_t offset, int64_t channels, int64_t first,
                 int64_t count, int64_t row_step, T* rows) {
  const int64_t taps = static_cast<int64_t>(phase.taps.size());
  const T* data = source.as<T>() + offset;
  for_each_run(phase, source.n, first, count, [&](int64_t m, int64_t run, int64_t n, int64_t row, int64_t col) {
    for (int64_t t = 0; t < taps; ++t) {
      const Tap& tap = phase.taps[static_cast<size_t>(t)];
      T* out = rows + m * row_step + t * channels;
      const int64_t ih = row * phase.istep_h + tap.off_h;
      const int64_t iw = col * phase.istep_w + tap.off_w;
      // Pixels [begin, end) of the run read the source, the others padding.
      const bool inside_h = ih >= 0 && ih < source.h;
      const int64_t begin = inside_h ? first_inside(iw, phase.istep_w, 0, run) : run;
      const int64_t end = inside_h ? first_inside(iw, phase.istep_w, source.w, run) : run;
      const T* line = inside_h ? data + source.offset(n, ih, 0) : nullptr;
      for (int64_t i = 0; i < begin; ++i) copy_pixel<T>(nullptr, channels, out + i * row_step);
      for (int64_t i = begin; i < end; ++i) {
        copy_pixel(line + (iw + i * phase.istep_w) * source.stride_w, channels, out + i * row_step);
      }
      for (int64_t i = end; i < run; ++i) copy_pixel<T>(nullptr, channels, out + i * row_step);
    }
  });
}

}  // namespace segpose
