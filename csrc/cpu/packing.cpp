// SPDX-License-Identifier: BSD-3-Clause
#include "packing.h"

#include <algorithm>
#include <utility>

#include "staging.h"

namespace segpose {
namespace {

// Values that one thread packs before others have woken up.
constexpr int64_t kSerialPack = 16 << 10;

}  // namespace

FilterStrides filter_strides(const Plan& plan, const FilterView& filter) {
  if (plan.algorithm == Algorithm::depthwise) return {0, filter.stride_k, 0};
  const int64_t group = plan.problem.k_per_group() * filter.stride_k;
  if (plan.pass == Pass::fprop) return {group, filter.stride_k, filter.stride_c};
  return {group, filter.stride_c, filter.stride_k};
}

PackedFilter::PackedFilter(const Plan& plan) {
  for (const Phase& phase : plan.phases) {
    phase_offsets_.push_back(size_);
    size_ += static_cast<int64_t>(phase.taps.size()) * plan.depth() * plan.padded_columns() * plan.gemm_groups();
  }
}

int64_t PackedFilter::panel_offset(const Plan& plan, int64_t phase, int64_t group, const Panel& panel) const {
  const int64_t rows = static_cast<int64_t>(plan.phases[static_cast<size_t>(phase)].taps.size()) * plan.depth();
  return rows * (group * plan.padded_columns() + panel.column);
}

template <class T>
void gather_filter(const FilterView& filter, int64_t start, int64_t row_step, int64_t column_step, int64_t rows,
                   int64_t columns, int64_t width, T* out) {
  if (filter.dtype == compute_dtype<T>()) {
    const T* source = static_cast<const T*>(filter.data) + start;
    if (row_step == 1) {
      ukernels<T>(selected_isa()).transpose(source, column_step, columns, rows, out, width);
    } else if (column_step == 1) {
      for (int64_t i = 0; i < rows; ++i) std::copy_n(source + i * row_step, columns, out + i * width);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) out[i * width + j] = source[i * row_step + j * column_step];
      }
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        out[i * width + j] = load_element<T>(filter.data, filter.dtype, start + i * row_step + j * column_step);
      }
    }
  }
  if (columns == width) return;
  for (int64_t i = 0; i < rows; ++i) std::fill(out + i * width + columns, out + (i + 1) * width, T{0});
}

template <class T>
void pack_filter(const Plan& plan, const PackedFilter& layout, const FilterView& filter, T* packed,
                 const Executor& executor) {
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  const int64_t blocks = plan.gemm_groups() * panels;  // of a tap
  const int64_t from = plan.depth();
  const FilterStrides strides = filter_strides(plan, filter);
  std::vector<std::pair<size_t, int64_t>> taps;  // of every phase
  for (size_t p = 0; p < plan.phases.size(); ++p) {
    for (size_t t = 0; t < plan.phases[p].taps.size(); ++t) taps.emplace_back(p, static_cast<int64_t>(t));
  }
  // [run][nr][values] of a panel of dots, a tap at a time.
  const auto pack_dots = [&](const Phase& phase, int64_t tap, const Panel& panel, int64_t start, T* block) {
    const int64_t merged = merge_taps(phase, plan.problem.groups == 1).taps;
    T* out = block + (tap / merged * panel.nr * merged + tap % merged) * from;
    for (int64_t j = 0; j < panel.nr; ++j, out += merged * from) {
      for (int64_t i = 0; i < from; ++i) {
        out[i] = load_element<T>(filter.data, filter.dtype, start + j * strides.column + i * strides.from);
      }
    }
  };
  const Executor serial{1, nullptr};
  for_each_task(layout.size() < kSerialPack ? serial : executor, static_cast<int64_t>(taps.size()) * blocks,
                [&](int64_t task, int64_t) {
                  const auto [p, t] = taps[static_cast<size_t>(task / blocks)];
                  const Panel& panel = plan.panels[static_cast<size_t>(task % panels)];
                  const int64_t group = task % blocks / panels;
                  const Tap& tap = plan.phases[p].taps[static_cast<size_t>(t)];
                  T* block = packed + layout.phase_offset(static_cast<int64_t>(p)) +
                             layout.panel_offset(plan, static_cast<int64_t>(p), group, panel);
                  const int64_t start = group * strides.group + panel.column * strides.column +
                                        tap.r * filter.stride_r + tap.s * filter.stride_s;
                  if (panel.dots) {
                    pack_dots(plan.phases[p], t, panel, start, block);
                  } else {
                    gather_filter(filter, start, strides.from, strides.column, from, panel.columns, panel.nr,
                                  block + t * from * panel.nr);
                  }
                });
}

template <class T>
void pack_bias(const void* bias, DType dtype, int64_t stride, int64_t groups, int64_t columns, int64_t padded,
               T* packed) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t j = 0; j < padded; ++j) {
      packed[group * padded + j] = j < columns ? load_element<T>(bias, dtype, (group * columns + j) * stride) : T{0};
    }
  }
}

#define SEGPOSE_INSTANTIATE(T)                                                                                 \
  template void gather_filter<T>(const FilterView&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, T*); \
  template void pack_filter<T>(const Plan&, const PackedFilter&, const FilterView&, T*, const Executor&);      \
  template void pack_bias<T>(const void*, DType, int64_t, int64_t, int64_t, int64_t, T*);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
