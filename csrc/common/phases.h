// SPDX-License-Identifier: BSD-3-Clause
// Phase (sub-pixel) decomposition: fprop and dgrad as lists of unit-stride gathers.
#pragma once

#include <cstdint>
#include <vector>

#include "conv_problem.h"

namespace segpose {

// One filter position that contributes to a phase: source pixel = (row * step_h + off_h, col * step_w + off_w).
struct Tap {
  int64_t r, s;
  int64_t off_h, off_w;
};

// A grid of destination pixels that all use the same taps.
//   destination pixel (oh + row * ostep_h, ow + col * ostep_w)  for row in [0, rows), col in [0, cols)
//   source pixel      (row * istep_h + tap.off_h, col * istep_w + tap.off_w), absent when outside the source
// A phase without taps still owns its pixels: they receive act(bias).
struct Phase {
  int64_t oh, ow, rows, cols;
  int64_t ostep_h, ostep_w;
  int64_t istep_h, istep_w;
  std::vector<Tap> taps;
  bool batch_inner = false;  // order in which a plan walks the pixels: see row_table.h
};

// fprop is a single phase over all output pixels [P, Q] that reads the activation [H, W].
Phase fprop_phase(const ConvProblem& problem);

// dgrad has stride_h * stride_w phases over the activation [H, W] that read the output gradient [P, Q]. Destination row
// h is reached by tap r exactly when (h + pad_h - r * dilation_h) is a multiple of stride_h, so the taps of a phase are
// one residue class of r * dilation_h mod stride_h: no multiplication by inserted zeros. Heaviest phase first.
std::vector<Phase> dgrad_phases(const ConvProblem& problem);

}  // namespace segpose
