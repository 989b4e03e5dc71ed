// SPDX-License-Identifier: BSD-3-Clause
#include "split_pack.h"

#include <algorithm>
#include <cstring>

#include "../common/integers.h"
#include "packing.h"

namespace segpose {
namespace {

// Columns [begin, end) of a plane row lie inside the source.
struct Inside {
  int64_t begin, end;
};

Inside columns_inside(const Planes& planes, const Planes::Residue& residue, int64_t source_w) {
  const int64_t first = planes.source_w(residue, 0);
  const int64_t begin = first >= 0 ? 0 : ceil_div(-first, planes.istep_w);
  const int64_t end = source_w <= first ? 0 : ceil_div(source_w - first, planes.istep_w);
  return {std::min(begin, planes.pitch), std::clamp(end, std::min(begin, planes.pitch), planes.pitch)};
}

// The pixels of source row (n, h) that a plane row takes, one channel block after the other.
struct RowReader {
  const Plan& plan;
  const MaskedSource& source;
  float* row;
  int64_t loaded = -1;  // which row stands in `row`

  bool copies() const {
    return plan.split.terms == 1 && source.mask == nullptr && source.view.has_channel_rows(DType::bfloat16);
  }

  void write(int64_t n, int64_t h, int64_t w, int64_t pixels, int64_t channel, int64_t channels, char* out,
             int64_t term_step) {
    const SplitUkernels& kernels = *split_ukernels(plan.isa);
    const TensorView& view = source.view;
    const int64_t istep = plan.split.planes.istep_w;
    const int64_t unit = plan.split.unit;
    if (copies()) {
      const uint16_t* data = view.as<uint16_t>() + view.offset(n, h, w) + channel;
      kernels.copy_pixels(data, istep * view.stride_w, pixels, channels, unit, out);
      return;
    }
    const float* data = nullptr;
    int64_t step = 0;
    if (source.mask == nullptr && view.has_channel_rows(DType::float32)) {
      data = view.as<float>() + view.offset(n, h, w) + channel;
      step = istep * view.stride_w;
    } else {
      if (loaded != n * view.h + h) load_source_row(ukernels<float>(plan.isa), source, n, h, row);
      loaded = n * view.h + h;
      data = row + w * view.c + channel;
      step = istep * view.c;
    }
    kernels.split_pixels(data, step, pixels, channels, unit, static_cast<int>(plan.split.terms), out, term_step);
  }
};

}  // namespace

void pack_planes(const Plan& plan, const MaskedSource& source, const PlaneBlock& block, float* row, char* packed) {
  const SplitPlan& split = plan.split;
  const Planes& planes = split.planes;
  const PlaneLayout layout(split);
  const int64_t depth = plan.depth();
  RowReader reader{plan, source, row};
  const int64_t rows = block.rows + planes.span_h;
  const auto zero = [&](char* out, int64_t bytes) {
    for (int64_t t = 0; t < split.terms; ++t) {
      for (int64_t b = 0; b < split.channel_blocks; ++b) {
        std::memset(out + t * layout.term + b * layout.block, 0, static_cast<size_t>(bytes));
      }
    }
  };
  for (int64_t image = 0; image < block.images; ++image) {
    for (int64_t y = 0; y < rows; ++y) {
      for (size_t p = 0; p < planes.residues.size(); ++p) {
        const Planes::Residue& residue = planes.residues[p];
        char* out = packed + static_cast<int64_t>(p) * layout.plane + image * layout.image + y * layout.row;
        const int64_t h = planes.source_h(residue, block.first_row + y);
        const Inside inside = columns_inside(planes, residue, source.view.w);
        if (h < 0 || h >= source.view.h || inside.begin >= inside.end) {
          zero(out, layout.row);
          continue;
        }
        if (inside.begin > 0) zero(out, inside.begin * layout.pixel);
        if (inside.end < planes.pitch) {
          zero(out + inside.end * layout.pixel, (planes.pitch - inside.end) * layout.pixel);
        }
        for (int64_t b = 0; b < split.channel_blocks; ++b) {
          reader.write(block.first_image + image, h, planes.source_w(residue, inside.begin), inside.end - inside.begin,
                       block.group * depth + b * split.unit, std::min(split.unit, depth - b * split.unit),
                       out + b * layout.block + inside.begin * layout.pixel, layout.term);
        }
      }
    }
    // Destination pixels of the last row read past it.
    const int64_t left = (layout.height - rows) * layout.row;
    if (left > 0) {
      for (size_t p = 0; p < planes.residues.size(); ++p) {
        zero(packed + static_cast<int64_t>(p) * layout.plane + image * layout.image + rows * layout.row,
             std::min(left, layout.slack));
      }
    }
  }
  if (block.images < split.images) {
    for (size_t p = 0; p < planes.residues.size(); ++p) {
      zero(packed + static_cast<int64_t>(p) * layout.plane + block.images * layout.image,
           std::min((split.images - block.images) * layout.image, layout.slack));
    }
  }
  std::memset(packed + split.terms * layout.term, 0, static_cast<size_t>(layout.slack));
}

SplitFilter::SplitFilter(const Plan& plan) {
  const SplitPlan& split = plan.split;
  const int64_t tiles = ceil_div(plan.columns(), kTileColumns);
  for (const auto& steps : split.steps) {
    phase_offsets_.push_back(size_);
    size_ += plan.problem.groups * tiles * split.channel_blocks * static_cast<int64_t>(steps.size()) * split.terms *
             kTileBytes;
  }
}

int64_t SplitFilter::panel_offset(const Plan& plan, int64_t phase, int64_t group, int64_t panel) const {
  const SplitPlan& split = plan.split;
  const int64_t tiles = ceil_div(plan.columns(), kTileColumns);
  const int64_t column_tile = split.channel_blocks *
                              static_cast<int64_t>(split.steps[static_cast<size_t>(phase)].size()) * split.terms *
                              kTileBytes;
  return phase_offsets_[static_cast<size_t>(phase)] + (group * tiles + 2 * panel) * column_tile;
}

void pack_split_filter(const Plan& plan, const SplitFilter& layout, const FilterView& filter, char* packed,
                       const Executor& executor) {
  const SplitPlan& split = plan.split;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const FilterStrides strides = filter_strides(plan, filter);
  const int64_t groups = plan.problem.groups;
  for (size_t p = 0; p < split.steps.size(); ++p) {
    const auto& steps = split.steps[p];
    const auto& taps = plan.phases[p].taps;
    const int64_t count = static_cast<int64_t>(steps.size());
    for_each_task(executor, groups * split.panels * split.channel_blocks, [&](int64_t task, int64_t) {
      const int64_t block = task % split.channel_blocks;
      const int64_t panel = task / split.channel_blocks % split.panels;
      const int64_t group = task / (split.channel_blocks * split.panels);
      const int64_t tiles = split.panel_tiles(plan.columns(), panel);
      const int64_t bytes = layout.step_bytes(plan, panel);
      const int64_t depth = std::min(split.unit, plan.depth() - block * split.unit);
      char* out = packed + layout.panel_offset(plan, static_cast<int64_t>(p), group, panel) + block * count * bytes;
      alignas(64) float matrix[kTileDepth * kTileColumns];
      const void* rows[kTileDepth];
      for (int i = 0; i < kTileDepth; ++i) rows[i] = matrix + i * kTileColumns;
      for (int64_t i = 0; i < count; ++i, out += bytes) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t column = panel * 32 + tile * kTileColumns;
          const int64_t columns = std::min<int64_t>(kTileColumns, plan.columns() - column);
          std::memset(matrix, 0, sizeof(matrix));
          for (const auto& [pixel, t] : steps[static_cast<size_t>(i)].taps) {
            const Tap& tap = taps[static_cast<size_t>(t)];
            const int64_t start = group * strides.group + column * strides.column + block * split.unit * strides.from +
                                  tap.r * filter.stride_r + tap.s * filter.stride_s;
            kernels.gather_matrix(filter.dtype, filter.data, start, strides.from, strides.column, depth, columns,
                                  matrix + pixel * split.unit * kTileColumns);
          }
          kernels.pair_rows(DType::float32, rows, 0, kTileColumns, static_cast<int>(split.terms),
                            out + tile * kTileBytes, tiles * kTileBytes);
        }
      }
    });
  }
}

}  // namespace segpose
