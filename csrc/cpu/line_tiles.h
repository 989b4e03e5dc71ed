// SPDX-License-Identifier: BSD-3-Clause
// How a line of pixels is cut into register tiles of the row kernels: the cheapest that add up to it, which need not be
// the tallest first: each tile begins and ends, and a low one loads as much as it multiplies.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "ukernels.h"

namespace segpose {

template <class T>
class LineTiles {
 public:
  // Tiles `nr` columns wide.
  LineTiles(const Ukernels<T>& kernels, int64_t nr) {
    const auto vectors = static_cast<double>(nr / kernels.vector_length);
    std::array<double, kLongest + 1> cycles{};
    for (int64_t pixels = 1; pixels <= kLongest; ++pixels) {
      for (int i = 0; i < kernels.rows_tiles; ++i) {
        const RowsTile<T>& tile = kernels.rows[i];
        if (tile.nr != nr || tile.mr > pixels) continue;
        const double all = step_cycles(tile.mr, vectors) + kEnds + cycles[static_cast<size_t>(pixels - tile.mr)];
        if (first_[static_cast<size_t>(pixels)] != nullptr && all >= cycles[static_cast<size_t>(pixels)]) continue;
        first_[static_cast<size_t>(pixels)] = &tile;
        cycles[static_cast<size_t>(pixels)] = all;
      }
    }
  }

  // The tile that so many pixels begin with.
  const RowsTile<T>& first(int64_t pixels) const { return *first_[static_cast<size_t>(std::min(pixels, kLongest))]; }

  // Cycles of a step of a tile: two multiply-adds or two loads a cycle, in no less than the lowest tiles take.
  static double step_cycles(int64_t mr, double vectors) {
    const auto rows = static_cast<double>(mr);
    return std::max({0.5 * rows * vectors, 0.5 * (rows + vectors), 2.5});
  }

 private:
  // Longer lines begin as this one does.
  static constexpr int64_t kLongest = 56;
  // A step's share of the beginning and the end of a tile: several small ones must gain more than that.
  static constexpr double kEnds = 1;

  std::array<const RowsTile<T>*, kLongest + 1> first_{};
};

// Of both widths of panels.
template <class T>
class PanelTiles {
 public:
  explicit PanelTiles(const Ukernels<T>& kernels)
      : wide_(kernels, kernels.rows[0].nr), narrow_(kernels, kernels.rows[kernels.rows_tiles - 1].nr) {}

  const LineTiles<T>& of(int64_t nr) const { return wide_.first(1).nr == nr ? wide_ : narrow_; }

 private:
  LineTiles<T> wide_, narrow_;
};

// Worked out once for each instruction set.
template <class T>
const PanelTiles<T>& panel_tiles(Isa isa) {
  static const std::array<PanelTiles<T>, 4> all = {
      PanelTiles<T>(ukernels<T>(Isa::generic)), PanelTiles<T>(ukernels<T>(Isa::avx2)),
      PanelTiles<T>(ukernels<T>(Isa::avx512)), PanelTiles<T>(ukernels<T>(Isa::amx))};
  return all[static_cast<size_t>(isa)];
}

}  // namespace segpose
