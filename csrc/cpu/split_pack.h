// SPDX-License-Identifier: BSD-3-Clause
// Packs the operands of a split GEMM: source pixels into planes, filters into tiles.
#pragma once

#include "executor.h"
#include "plan.h"
#include "staging.h"
#include "tensor_view.h"

namespace segpose {

// The planes of a block of images and rows, in bytes:
//   [term][channel block][plane][image][height][pitch][unit] bfloat16
struct PlaneLayout {
  int64_t pixel, row, image, plane, block, term;
  int64_t height;
  int64_t slack;  // readable bytes past the last row, zeros

  PlaneLayout(const SplitPlan& plan)
      : pixel(plan.unit * 2),
        row(plan.planes.pitch * pixel),
        image(0),
        plane(0),
        block(0),
        term(0),
        height(plan.rows + plan.planes.span_h),
        slack(0) {
    image = height * row;
    plane = plan.images * image;
    block = plane * static_cast<int64_t>(plan.planes.residues.size());
    term = block * plan.channel_blocks;
    const int64_t width = plan.planes.cols + plan.planes.span_w;
    slack = (width - plan.planes.pitch + kTileRows + kTileDepth / plan.unit) * pixel;
  }
  int64_t size(int64_t terms) const { return terms * term + slack; }
  int64_t offset(const PlaneTap& at) const { return at.plane * plane + at.dh * row + at.dw * pixel; }
};

// A piece of the destination pixels of all phases, and the channels of one group.
struct PlaneBlock {
  int64_t group;
  int64_t first_image, images;
  int64_t first_row, rows;
};

// `row` has room for one row of the source (masked: two), in float.
void pack_planes(const Plan& plan, const MaskedSource& source, const PlaneBlock& block, float* row, char* packed);

// Packed filters: [phase][group][panel][channel block][step][term][column tile] tiles of 1 KB.
class SplitFilter {
 public:
  explicit SplitFilter(const Plan& plan);
  int64_t size() const { return size_; }
  int64_t step_bytes(const Plan& plan, int64_t panel) const {
    return plan.split.terms * plan.split.panel_tiles(plan.columns(), panel) * kTileBytes;
  }
  int64_t panel_offset(const Plan& plan, int64_t phase, int64_t group, int64_t panel) const;

 private:
  std::vector<int64_t> phase_offsets_;
  int64_t size_ = 0;
};

void pack_split_filter(const Plan& plan, const SplitFilter& layout, const FilterView& filter, char* packed,
                       const Executor& executor);

}  // namespace segpose
