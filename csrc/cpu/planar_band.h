// SPDX-License-Identifier: BSD-3-Clause
// What a band of destination pixels reads of its source, copied into planes with zeros for the padding: the fast cache
// holds it, and kernels along its rows need no branch.
#pragma once

#include <algorithm>

#include "../common/integers.h"
#include "plan.h"
#include "row_table.h"
#include "tensor_view.h"
#include "ukernels.h"

namespace segpose {

// The phases of a dgrad read the same rows: as one over all their taps, and the most rows and columns.
inline Phase all_phases(const Plan& plan) {
  Phase all = plan.phases.front();
  for (size_t p = 1; p < plan.phases.size(); ++p) {
    const Phase& phase = plan.phases[p];
    all.taps.insert(all.taps.end(), phase.taps.begin(), phase.taps.end());
    all.rows = std::max(all.rows, phase.rows);
    all.cols = std::max(all.cols, phase.cols);
  }
  return all;
}

// A band of destination rows and columns, and what it reads: source rows from `low_h` on and columns from `low_w` on.
// The columns of a residue class of the stride lie side by side in a staged row.
struct PlanarBand {
  // Fewer columns would leave vectors idle.
  static constexpr int64_t kFewestColumns = 64;

  int64_t depth;         // staged planes
  int64_t rows, cols;    // of a band
  int64_t low_h, low_w;  // the first that destination row and column 0 read
  int64_t staged_h;      // rows of a whole band
  int64_t segment;       // staged values of a residue class of a row
  int64_t row_size;

  // As many rows as fit `values`, a multiple of `unit`, beside `others` planes of as many pixels as the band has.
  PlanarBand(const Phase& phase, int64_t depth, int64_t others, int64_t unit, int64_t values) : depth(depth) {
    int64_t high_h = low_h = phase.taps.empty() ? 0 : phase.taps.front().off_h;
    int64_t high_w = low_w = phase.taps.empty() ? 0 : phase.taps.front().off_w;
    for (const Tap& tap : phase.taps) {
      low_h = std::min(low_h, tap.off_h);
      low_w = std::min(low_w, tap.off_w);
      high_h = std::max(high_h, tap.off_h);
      high_w = std::max(high_w, tap.off_w);
    }
    const int64_t beyond_w = (high_w - low_w) / phase.istep_w;
    const auto staged_rows = [&](int64_t count) { return (count - 1) * phase.istep_h + high_h - low_h + 1; };
    const int64_t fitting = values / (depth * phase.istep_w * staged_rows(unit) + others * unit) - beyond_w;
    cols = std::min(phase.cols, std::max(fitting / kFewestColumns * kFewestColumns, kFewestColumns));
    segment = cols + beyond_w;
    row_size = phase.istep_w * segment;
    const auto size = [&](int64_t count) { return depth * staged_rows(count) * row_size + others * count * cols; };
    rows = unit;
    while (rows < phase.rows && size(rows + unit) <= values) rows += unit;
    staged_h = staged_rows(rows);
  }

  int64_t plane_size() const { return staged_h * row_size; }
  int64_t size() const { return depth * plane_size(); }

  // Of what a tap reads of a plane for destination pixel (0, 0).
  int64_t offset(const Phase& phase, const Tap& tap, int64_t plane) const {
    const int64_t w = tap.off_w - low_w;
    return (plane * staged_h + tap.off_h - low_h) * row_size + w % phase.istep_w * segment + w / phase.istep_w;
  }

  // Far apart, most taps of a pixel read the padding, which would be multiplied all the same.
  bool reads_mostly(const Phase& phase, int64_t source_h, int64_t source_w) const {
    const int64_t beyond_h = staged_h - (rows - 1) * phase.istep_h - 1;
    const int64_t beyond_w = (segment - cols) * phase.istep_w;
    return 2 * beyond_h <= source_h && 2 * beyond_w <= source_w;
  }
};

inline bool is_planar(const TensorView& view, DType dtype) {
  return view.dtype == dtype && view.stride_w == 1 && (view.c == 1 || view.stride_c != 1);
}

// Pixels `step` apart of some channels.
template <class T>
void copy_plane_lines(const Ukernels<T>& kernels, const TensorView& source, const T* line, int64_t step, int64_t pixels,
                      int64_t planes, T* out, int64_t plane_size) {
  if (source.stride_c == 1 && planes > 1) {
    kernels.transpose(line, step, pixels, planes, out, plane_size);
    return;
  }
  for (int64_t c = 0; c < planes; ++c, line += source.stride_c, out += plane_size) {
    if (step == 1) {
      std::copy_n(line, pixels, out);
    } else if (step == 2) {
      for (int64_t w = 0; w < pixels; ++w) out[w] = line[w * 2];  // becomes vectors
    } else {
      for (int64_t w = 0; w < pixels; ++w) out[w] = line[w * step];
    }
  }
}

// A line of a band: the pixels of a residue class in a source row, of which [begin, end) lie inside of the source.
struct StagedLine {
  int64_t at;  // staged values from the first of a plane
  int64_t begin, end;
  int64_t from;  // source elements from those of an image to its first pixel inside
};

// Calls fn(line) for what `rows` destination rows from (row, col) on read.
template <class Fn>
void for_each_staged_line(const Phase& phase, const PlanarBand& band, const TensorView& source, int64_t row,
                          int64_t rows, int64_t col, const Fn& fn) {
  const int64_t staged_rows = band.staged_h - (band.rows - rows) * phase.istep_h;
  const int64_t step = phase.istep_w;
  for (int64_t residue = 0; residue < step; ++residue) {
    const int64_t w = col * step + band.low_w + residue;
    const int64_t begin = first_inside(w, step, 0, band.segment);
    const int64_t end = first_inside(w, step, source.w, band.segment);
    for (int64_t i = 0; i < staged_rows; ++i) {
      const int64_t at = i * band.row_size + residue * band.segment;
      const int64_t h = row * phase.istep_h + band.low_h + i;
      if (h < 0 || h >= source.h || begin >= end) {
        fn(StagedLine{at, band.segment, band.segment, 0});
      } else {
        fn(StagedLine{at, begin, end, h * source.stride_h + (w + begin * step) * source.stride_w});
      }
    }
  }
}

// What `rows` destination rows from (row, col) on read of some planes, of which `first` is the first value.
template <class T>
void stage_planes(const Ukernels<T>& kernels, const Phase& phase, const PlanarBand& band, const TensorView& source,
                  const T* first, int64_t planes, int64_t row, int64_t rows, int64_t col, T* staged) {
  const int64_t plane_size = band.plane_size();
  for_each_staged_line(phase, band, source, row, rows, col, [&](const StagedLine& line) {
    T* const out = staged + line.at;
    for (int64_t c = 0; c < planes; ++c) {
      std::fill_n(out + c * plane_size, line.begin, T{0});
      std::fill_n(out + c * plane_size + line.end, band.segment - line.end, T{0});
    }
    if (line.begin == line.end) return;
    copy_plane_lines(kernels, source, first + line.from, phase.istep_w * source.stride_w, line.end - line.begin, planes,
                     out + line.begin, plane_size);
  });
}

}  // namespace segpose
