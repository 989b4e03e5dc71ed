// SPDX-License-Identifier: BSD-3-Clause
// The widths of the microkernels, and the columns of a GEMM cut into panels of them.
#pragma once

#include <vector>

#include "plan.h"
#include "ukernels.h"

namespace segpose {

// Narrow to wide.
struct Widths {
  int count;
  int64_t width[kMaxWgradTiles];
};

template <class T>
Widths rows_widths(Isa isa) {
  const Ukernels<T>& table = ukernels<T>(isa);
  Widths widths{2, {}};
  widths.width[0] = table.rows[table.rows_tiles - 1].nr;
  widths.width[1] = table.rows[0].nr;
  return widths;
}

template <class T>
Widths gemm_widths(Isa isa) {
  const Ukernels<T>& table = ukernels<T>(isa);
  Widths widths{table.gemm_tiles, {}};
  for (int i = 0; i < table.gemm_tiles; ++i) widths.width[i] = table.gemm[i].nr;
  return widths;
}

// wgrad tables are sorted wide to narrow with several heights each; panels name the first of a width.
template <class T>
Widths wgrad_widths(Isa isa) {
  const Ukernels<T>& table = ukernels<T>(isa);
  Widths widths{0, {}};
  for (int i = table.wgrad_tiles - 1; i >= 0; --i) {
    if (widths.count == 0 || widths.width[widths.count - 1] != table.wgrad[i].nr) {
      widths.width[widths.count++] = table.wgrad[i].nr;
    }
  }
  return widths;
}

// Columns that fill no vector of a rows plan and have tiles of their own; 0 for none.
template <class T>
int64_t dots_columns(Isa isa, int64_t columns) {
  const Ukernels<T>& table = ukernels<T>(isa);
  const int64_t left = columns % table.vector_length;
  return left <= table.dots.widest ? left : 0;
}

// Widest panels first, then the narrowest width that holds what is left.
std::vector<Panel> split_columns(int64_t columns, const Widths& widths);

// The same with the last `dots` columns in a panel of their own.
std::vector<Panel> split_dots(int64_t columns, int64_t dots, const Widths& widths);

// Columns of whole panels.
int64_t padded(int64_t columns, const Widths& widths);

// Whether the filters of a wgrad fill vectors so much better than a run of its columns that they take the lanes.
bool takes_filter_lanes(const ConvProblem& problem, int64_t columns, const Widths& widths);

}  // namespace segpose
