// SPDX-License-Identifier: BSD-3-Clause
#include "panels.h"

#include <algorithm>

namespace segpose {

std::vector<Panel> split_columns(int64_t columns, const Widths& widths) {
  const auto width = [&](int i) { return widths.width[i]; };
  std::vector<Panel> panels;
  int64_t column = 0;
  const int64_t widest = width(widths.count - 1);
  for (; columns - column >= widest; column += widest) panels.push_back({column, widest, widths.count - 1, widest});
  while (column < columns) {
    int tile = 0;
    while (width(tile) < columns - column && width(tile + 1) <= columns - column) ++tile;
    // One panel with a few idle lanes beats two that each pay for the broadcasts.
    if (width(tile) < columns - column && 8 * (columns - column) >= 5 * width(tile + 1)) ++tile;
    const int64_t valid = std::min(width(tile), columns - column);
    panels.push_back({column, valid, tile, width(tile)});
    column += valid;
  }
  return panels;
}

std::vector<Panel> split_dots(int64_t columns, int64_t dots, const Widths& widths) {
  std::vector<Panel> panels = split_columns(columns - dots, widths);
  panels.push_back({columns - dots, dots, 0, dots, true});
  return panels;
}

int64_t padded(int64_t columns, const Widths& widths) {
  const std::vector<Panel> panels = split_columns(columns, widths);
  return panels.back().column + panels.back().nr;
}

bool takes_filter_lanes(const ConvProblem& problem, int64_t columns, const Widths& widths) {
  return problem.groups == 1 && problem.k % widths.width[0] == 0 && 4 * columns <= 3 * padded(columns, widths);
}

}  // namespace segpose
