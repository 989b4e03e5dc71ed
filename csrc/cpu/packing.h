// SPDX-License-Identifier: BSD-3-Clause
// Filters in the order in which the microkernels read them.
#pragma once

#include "executor.h"
#include "plan.h"
#include "tensor_view.h"

namespace segpose {

// Packed filters of fprop and dgrad: for every phase, group and panel a block [taps][depth][nr], ragged columns
// filled with zeros; of dots [runs][nr][taps of a run][depth]. Offsets in elements.
class PackedFilter {
 public:
  explicit PackedFilter(const Plan& plan);
  int64_t size() const { return size_; }
  int64_t phase_offset(int64_t phase) const { return phase_offsets_[static_cast<size_t>(phase)]; }
  // From the start of a phase to a panel of a group.
  int64_t panel_offset(const Plan& plan, int64_t phase, int64_t group, const Panel& panel) const;

 private:
  std::vector<int64_t> phase_offsets_;
  int64_t size_ = 0;
};

// Element strides of the weight that multiplies source channel `from` into column `column` of a group.
struct FilterStrides {
  int64_t group, column, from;
};

FilterStrides filter_strides(const Plan& plan, const FilterView& filter);

// [rows][width] values of one tap of a filter, zeros after `columns`; `start` and the steps in elements.
template <class T>
void gather_filter(const FilterView& filter, int64_t start, int64_t row_step, int64_t column_step, int64_t rows,
                   int64_t columns, int64_t width, T* out);

template <class T>
void pack_filter(const Plan& plan, const PackedFilter& layout, const FilterView& filter, T* packed,
                 const Executor& executor);

// Writes a filter's gradient [taps][channels of a group] from `start` on, in elements, with the strides and dtype of
// `filter`.
template <class T>
void scatter_filter(const FilterView& filter, int64_t start, const ConvProblem& problem, const T* values);

// The bias of every group, padded to whole panels: [groups][padded], zeros after `columns`.
template <class T>
void pack_bias(const void* bias, DType dtype, int64_t stride, int64_t groups, int64_t columns, int64_t padded,
               T* packed);

}  // namespace segpose
