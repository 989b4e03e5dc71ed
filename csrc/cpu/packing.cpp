// SPDX-License-Identifier: BSD-3-Clause
#include "packing.h"

#include <algorithm>
#include <utility>

#include "../common/integers.h"
#include "staging.h"

namespace segpose {
namespace {

// Values that one thread packs before others have woken up.
constexpr int64_t kSerialPack = 16 << 10;

// Source channels that a task packs together.
constexpr int64_t kPackRows = 8;

// Whether the taps of a filter and a channel follow each other, as in torch's default layout.
bool has_tap_rows(const FilterView& filter, const ConvProblem& problem) {
  return (problem.s == 1 || filter.stride_s == 1) && (problem.r == 1 || filter.stride_r == problem.s);
}

// The source channels [begin, end) of one panel, where taps follow each other and are cheaper to transpose than to
// visit one by one. `line` has room for [taps][nr].
template <class T>
void pack_tap_rows(const Plan& plan, const PackedFilter& layout, const FilterView& filter, int64_t group,
                   const Panel& panel, int64_t begin, int64_t end, T* line, T* packed) {
  const FilterStrides strides = filter_strides(plan, filter);
  const T* source =
      static_cast<const T*>(filter.data) + group * strides.group + panel.column * strides.column + begin * strides.from;
  for (int64_t i = begin; i < end; ++i, source += strides.from) {
    ukernels<T>(plan.isa).transpose(source, strides.column, panel.columns, plan.problem.taps(), line, panel.nr);
    for (size_t p = 0; p < plan.phases.size(); ++p) {
      const auto phase = static_cast<int64_t>(p);
      T* out = packed + layout.phase_offset(phase) + layout.panel_offset(plan, phase, group, panel) + i * panel.nr;
      for (const Tap& tap : plan.phases[p].taps) {
        std::copy_n(line + (tap.r * plan.problem.s + tap.s) * panel.nr, panel.nr, out);
        out += plan.depth() * panel.nr;
      }
    }
  }
}

}  // namespace

FilterStrides filter_strides(const Plan& plan, const FilterView& filter) {
  if (plan.algorithm == Algorithm::depthwise) return {0, filter.stride_k, 0};
  const int64_t group = plan.problem.k_per_group() * filter.stride_k;
  if (plan.pass == Pass::fprop) return {group, filter.stride_k, filter.stride_c};
  return {group, filter.stride_c, filter.stride_k};
}

PackedFilter::PackedFilter(const Plan& plan) {
  const int64_t tap = plan.depth() * plan.padded_columns() * plan.gemm_groups();
  phase_offsets_.reserve(plan.phases.size());
  for (const Phase& phase : plan.phases) {
    phase_offsets_.push_back(size_);
    size_ += static_cast<int64_t>(phase.taps.size()) * tap;
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
  const Executor& chosen = layout.size() < kSerialPack ? serial : executor;
  const bool dots = std::any_of(plan.panels.begin(), plan.panels.end(), [](const Panel& panel) { return panel.dots; });
  if (!dots && plan.problem.taps() > 1 && filter.dtype == compute_dtype<T>() && has_tap_rows(filter, plan.problem)) {
    const int64_t parts = ceil_div(from, kPackRows);
    for_each_task(chosen, parts * blocks, [&](int64_t task, int64_t) {
      const Panel& panel = plan.panels[static_cast<size_t>(task / parts % panels)];
      const int64_t begin = task % parts * kPackRows;
      // Zeros after the panel's columns, which a transposition leaves alone.
      std::vector<T> line(static_cast<size_t>(plan.problem.taps() * panel.nr));
      pack_tap_rows(plan, layout, filter, task / parts / panels, panel, begin, std::min(begin + kPackRows, from),
                    line.data(), packed);
    });
    return;
  }
  for_each_task(chosen, static_cast<int64_t>(taps.size()) * blocks, [&](int64_t task, int64_t) {
    const auto [p, t] = taps[static_cast<size_t>(task / blocks)];
    const Panel& panel = plan.panels[static_cast<size_t>(task % panels)];
    const int64_t group = task % blocks / panels;
    const Tap& tap = plan.phases[p].taps[static_cast<size_t>(t)];
    T* block = packed + layout.phase_offset(static_cast<int64_t>(p)) +
               layout.panel_offset(plan, static_cast<int64_t>(p), group, panel);
    const int64_t start =
        group * strides.group + panel.column * strides.column + tap.r * filter.stride_r + tap.s * filter.stride_s;
    if (panel.dots) {
      pack_dots(plan.phases[p], t, panel, start, block);
    } else {
      gather_filter(filter, start, strides.from, strides.column, from, panel.columns, panel.nr,
                    block + t * from * panel.nr);
    }
  });
}

template <class T>
void scatter_filter(const FilterView& filter, int64_t start, const ConvProblem& problem, const T* values) {
  const int64_t channels = problem.c_per_group();
  if (filter.dtype == compute_dtype<T>() && filter.stride_c != 1 && has_tap_rows(filter, problem)) {
    T* const out = static_cast<T*>(filter.data) + start;
    ukernels<T>(selected_isa()).transpose(values, channels, problem.taps(), channels, out, filter.stride_c);
    return;
  }
  for (int64_t t = 0; t < problem.taps(); ++t, values += channels) {
    const int64_t first = start + t / problem.s * filter.stride_r + t % problem.s * filter.stride_s;
    if (filter.dtype == compute_dtype<T>() && filter.stride_c == 1) {
      std::copy_n(values, channels, static_cast<T*>(filter.data) + first);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      store_element(filter.data, filter.dtype, first + c * filter.stride_c, values[c]);
    }
  }
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
  template void scatter_filter<T>(const FilterView&, int64_t, const ConvProblem&, const T*);                   \
  template void pack_bias<T>(const void*, DType, int64_t, int64_t, int64_t, int64_t, T*);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
