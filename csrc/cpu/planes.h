// SPDX-License-Identifier: BSD-3-Clause
// Planes: the source of fprop, dgrad and wgrad, sorted by residue classes of the stride and padded with zeros, so that
// every tap of a phase reads at one constant distance from the destination pixel.
//
//   plane (rh, rw) holds the source pixels (y * istep_h + rh, x * istep_w + rw)
//   destination pixel (row, col) of a phase reads, for tap t, plane t.plane at (row + t.dh, col + t.dw)
//
// with plane coordinates that start at (first_h, first_w). Pixels of a row lie `pitch` apart from those of the next:
// the zeros after a row are also the zeros before the next one.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/phases.h"

namespace segpose {

struct PlaneTap {
  int64_t plane, dh, dw;  // dh, dw >= 0
};

struct Planes {
  struct Residue {
    int64_t h, w;
  };
  int64_t istep_h = 1, istep_w = 1;
  std::vector<Residue> residues;
  int64_t first_h = 0, first_w = 0;
  int64_t span_h = 0, span_w = 0;           // largest dh and dw
  int64_t cols = 0;                         // destination columns
  int64_t pitch = 0;                        // pixels from one row of a plane to the next
  std::vector<std::vector<PlaneTap>> taps;  // [phase][tap]

  // The source row or column of a plane's row or column, which may lie outside of the source.
  int64_t source_h(const Residue& residue, int64_t row) const { return (row + first_h) * istep_h + residue.h; }
  int64_t source_w(const Residue& residue, int64_t col) const { return (col + first_w) * istep_w + residue.w; }
};

// Phases of one pass share their planes. `source_w` columns exist.
Planes plan_planes(const std::vector<Phase>& phases, int64_t source_w);

}  // namespace segpose
