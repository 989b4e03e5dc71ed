// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <cstring>

#include "../common/integers.h"
#include "packing.h"
#include "split_ukernels.h"
#include "transform_conv.h"

namespace segpose {
namespace {

// Channels of a filter that are gathered before they are transformed.
constexpr int64_t kChannels = 32;
constexpr int64_t kSkewBytes = 64;

}  // namespace

TransformFilter::TransformFilter(const Plan& plan) {
  const TransformPlan& transform = plan.transform;
  const int64_t depth = transform.terms > 0 ? ceil_div(plan.depth(), kTileDepth) * kTileDepth : plan.depth();
  panel = depth * transform.panel_columns * (transform.terms > 0 ? 2 * transform.terms : 4 * transform.parts);
  // One cache line more than a power of two: frequencies are written in turn and must not share cache sets.
  frequency = transform.panels * panel + kSkewBytes;
  group = transform.frequencies * frequency;
  phase = plan.problem.groups * group;
  size = static_cast<int64_t>(plan.phases.size()) * phase;
}

int64_t transform_filter_scratch(const Plan& plan) {
  const int64_t taps = plan.transform.r * plan.transform.r;
  return taps * kChannels * std::max<int64_t>(plan.transform.panel_columns, kTileColumns) * 4;
}

// One block of channels of one panel at a time: gathered tap by tap, then transformed.
void pack_transform_filter(const Plan& plan, const TransformFilter& layout, const FilterView& filter, char* packed,
                           char* scratch, const Executor& executor) {
  const TransformPlan& transform = plan.transform;
  const TransformCodelets& codelets = transform_ukernels(plan.isa).codelets[transform.codelet];
  const FilterStrides strides = filter_strides(plan, filter);
  const int64_t chunks = ceil_div(plan.depth(), kChannels);
  const int64_t taps = transform.r * transform.r;
  const int64_t scratch_bytes = transform_filter_scratch(plan);
  const int64_t tasks = static_cast<int64_t>(plan.phases.size()) * plan.problem.groups * transform.panels * chunks;
  for_each_task(executor, tasks, [&](int64_t task, int64_t worker) {
    const int64_t begin = task % chunks * kChannels;
    const int64_t count = std::min(kChannels, plan.depth() - begin);
    const int64_t panel = task / chunks % transform.panels;
    const int64_t group = task / (chunks * transform.panels) % plan.problem.groups;
    const int64_t phase = task / (chunks * transform.panels * plan.problem.groups);
    float* const gathered = reinterpret_cast<float*>(scratch + worker * scratch_bytes);
    char* const out = packed + phase * layout.phase + group * layout.group + panel * layout.panel;
    const auto& phase_taps = plan.phases[static_cast<size_t>(phase)].taps;
    const int64_t first = panel * transform.panel_columns;
    if (transform.terms == 0) {
      const int64_t columns = std::min(transform.panel_columns, plan.columns() - first);
      const int64_t width = transform.panel_columns;
      for (int64_t t = 0; t < taps; ++t) {
        const Tap& tap = phase_taps[static_cast<size_t>(t)];
        const int64_t start = group * strides.group + first * strides.column + begin * strides.from +
                              tap.r * filter.stride_r + tap.s * filter.stride_s;
        gather_filter<float>(filter, start, strides.from, strides.column, count, columns, width,
                             gathered + t * count * width);
      }
      const int64_t row = width * transform.parts;
      float* u = reinterpret_cast<float*>(out) + begin * row;
      const int64_t vector = transform_ukernels(plan.isa).vector_length;
      for (int64_t c = 0; c < count; ++c) {
        const float* rows[kMaxTransformN];
        for (int64_t i = 0; i < transform.r; ++i) rows[i] = gathered + (i * transform.r * count + c) * width;
        codelets.filter(rows, transform.r, count * width, width, u + c * row, layout.frequency / 4,
                        vector * transform.parts);
      }
      return;
    }
    const SplitUkernels& kernels = *split_ukernels(plan.isa);
    const SplitTransformCodelets& split = *split_transform(plan.isa, static_cast<int>(transform.r));
    for (int64_t tile = 0; tile < 2; ++tile) {
      const int64_t column = first + tile * kTileColumns;
      const int64_t columns = std::clamp<int64_t>(plan.columns() - column, 0, kTileColumns);
      std::memset(gathered, 0, static_cast<size_t>(taps * kChannels * kTileColumns * 4));
      for (int64_t t = 0; t < taps && columns > 0; ++t) {
        const Tap& tap = phase_taps[static_cast<size_t>(t)];
        const int64_t start = group * strides.group + column * strides.column + begin * strides.from +
                              tap.r * filter.stride_r + tap.s * filter.stride_s;
        kernels.gather_matrix(filter.dtype, filter.data, start, strides.from, strides.column, count, columns,
                              gathered + t * kChannels * kTileColumns);
      }
      // [block][term][column tile] tiles.
      split.filter[transform.terms - 1](gathered,
                                        out + begin / kTileDepth * transform.terms * 2 * kTileBytes + tile * kTileBytes,
                                        2 * kTileBytes, layout.frequency);
    }
  });
}

}  // namespace segpose
