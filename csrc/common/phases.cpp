// SPDX-License-Identifier: BSD-3-Clause
#include "phases.h"

#include <algorithm>

#include "integers.h"

namespace segpose {
namespace {

struct AxisTap {
  int64_t index;
  int64_t offset;
};

// Taps that reach destination positions congruent to `first` modulo the stride, with the source offset they read.
std::vector<AxisTap> axis_taps(int64_t first, int64_t extent, int64_t stride, int64_t pad, int64_t dilation) {
  std::vector<AxisTap> taps;
  for (int64_t tap = 0; tap < extent; ++tap) {
    const int64_t distance = first + pad - tap * dilation;
    if (distance % stride == 0) taps.push_back({tap, distance / stride});
  }
  return taps;
}

}  // namespace

Phase fprop_phase(const ConvProblem& problem) {
  Phase phase{0, 0, problem.p, problem.q, 1, 1, problem.stride_h, problem.stride_w, {}, false};
  for (int64_t r = 0; r < problem.r; ++r) {
    for (int64_t s = 0; s < problem.s; ++s) {
      phase.taps.push_back({r, s, r * problem.dilation_h - problem.pad_h, s * problem.dilation_w - problem.pad_w});
    }
  }
  return phase;
}

std::vector<Phase> dgrad_phases(const ConvProblem& problem) {
  std::vector<Phase> phases;
  for (int64_t oh = 0; oh < std::min(problem.stride_h, problem.h); ++oh) {
    const auto rows = axis_taps(oh, problem.r, problem.stride_h, problem.pad_h, problem.dilation_h);
    for (int64_t ow = 0; ow < std::min(problem.stride_w, problem.w); ++ow) {
      const auto cols = axis_taps(ow, problem.s, problem.stride_w, problem.pad_w, problem.dilation_w);
      Phase phase{oh,
                  ow,
                  ceil_div(problem.h - oh, problem.stride_h),
                  ceil_div(problem.w - ow, problem.stride_w),
                  problem.stride_h,
                  problem.stride_w,
                  1,
                  1,
                  {},
                  false};
      for (const AxisTap& row : rows) {
        for (const AxisTap& col : cols) phase.taps.push_back({row.index, col.index, row.offset, col.offset});
      }
      phases.push_back(std::move(phase));
    }
  }
  std::stable_sort(phases.begin(), phases.end(),
                   [](const Phase& a, const Phase& b) { return a.taps.size() > b.taps.size(); });
  return phases;
}

}  // namespace segpose
