// SPDX-License-Identifier: BSD-3-Clause
#include "planes.h"

#include <algorithm>

namespace segpose {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

Planes plan_planes(const std::vector<Phase>& phases, int64_t source_w) {
  Planes planes;
  planes.istep_h = phases.front().istep_h;
  planes.istep_w = phases.front().istep_w;
  bool any = false;
  for (const Phase& phase : phases) {
    planes.cols = std::max(planes.cols, phase.cols);
    for (const Tap& tap : phase.taps) {
      const int64_t h = floor_div(tap.off_h, planes.istep_h);
      const int64_t w = floor_div(tap.off_w, planes.istep_w);
      planes.first_h = any ? std::min(planes.first_h, h) : h;
      planes.first_w = any ? std::min(planes.first_w, w) : w;
      any = true;
    }
  }
  for (const Phase& phase : phases) {
    std::vector<PlaneTap> taps;
    for (const Tap& tap : phase.taps) {
      const int64_t h = floor_div(tap.off_h, planes.istep_h);
      const int64_t w = floor_div(tap.off_w, planes.istep_w);
      const Planes::Residue residue{tap.off_h - h * planes.istep_h, tap.off_w - w * planes.istep_w};
      size_t plane = 0;
      while (plane < planes.residues.size() &&
             (planes.residues[plane].h != residue.h || planes.residues[plane].w != residue.w)) {
        ++plane;
      }
      if (plane == planes.residues.size()) planes.residues.push_back(residue);
      taps.push_back({static_cast<int64_t>(plane), h - planes.first_h, w - planes.first_w});
      planes.span_h = std::max(planes.span_h, taps.back().dh);
      planes.span_w = std::max(planes.span_w, taps.back().dw);
    }
    planes.taps.push_back(std::move(taps));
  }
  const int64_t width = planes.cols + planes.span_w;
  // Zeros that every plane has on either side; rows of destination pixels stay apart.
  int64_t shared = planes.span_w;
  for (const Planes::Residue& residue : planes.residues) {
    int64_t left = 0;
    while (left < width && planes.source_w(residue, left) < 0) ++left;
    int64_t right = 0;
    while (right < width && planes.source_w(residue, width - 1 - right) >= source_w) ++right;
    shared = std::min({shared, left, right});
  }
  planes.pitch = std::max<int64_t>(width - std::max<int64_t>(shared, 0), 1);
  return planes;
}

}  // namespace segpose
