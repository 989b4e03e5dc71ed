// SPDX-License-Identifier: BSD-3-Clause
#include "split_conv.h"

#include <algorithm>

#include "../common/integers.h"
#include "streaming.h"

namespace segpose {
namespace {

constexpr int64_t kPanelColumns = 32;

constexpr int64_t kAnyRow = -1;

// 16 destination pixels: where the first one reads, and where each is written.
struct RowTile {
  int64_t a;
  int64_t row, last_row;  // of the phase, or kAnyRow for both ends of an image
  int64_t col;            // -1 for several columns
  int64_t offsets[kTileRows];
};

// Consecutive tiles of one microkernel call with the steps that read at least one pixel of the source.
struct TileGroup {
  int64_t first, count;
  int64_t steps_begin, steps;
};

int64_t most_tiles(const Plan& plan) {
  const SplitPlan& split = plan.split;
  const int64_t cols = split.planes.cols;
  switch (split.row_tiles) {
    case RowTiles::columns:
      return split.images * split.rows * ceil_div(cols, kTileRows);
    case RowTiles::images:
      return ceil_div(split.images, kTileRows) * split.rows * cols;
    case RowTiles::line:
      return ceil_div(split.images * (split.rows + split.planes.span_h) * split.planes.pitch, kTileRows);
  }
  return 0;
}

int64_t most_steps(const Plan& plan) {
  size_t most = 1;
  for (const auto& steps : plan.split.steps) most = std::max(most, steps.size());
  return static_cast<int64_t>(most);
}

struct Scratch {
  char* planes;
  float* row;
  RowTile* tiles;
  TileGroup* groups;
  SplitStep* steps;  // lists of the groups
  float* sums;       // [tile][column tile] accumulators between chunks
  float* result;     // of two calls: one is written out while the next one's products run
  float* rows;       // finished rows on their way to another layout

  Scratch(const Plan& plan, const MaskedSource& source, Arena& arena) {
    const SplitPlan& split = plan.split;
    const int64_t count = most_tiles(plan) + kMaxRowTiles;
    planes = arena.take<char>(PlaneLayout(split).size(split.terms));
    row = arena.take<float>(source_row_scratch(source));
    tiles = arena.take<RowTile>(count);
    groups = arena.take<TileGroup>(count);
    steps = arena.take<SplitStep>(count * most_steps(plan));
    sums = split.chunk_blocks < split.channel_blocks ? arena.take<float>(count * 2 * kTileFloats) : nullptr;
    result = arena.take<float>(2 * kMaxTiles * kTileFloats);
    rows = arena.take<float>(kTileRows * kPanelColumns);
  }
};

struct Block : PlaneBlock {
  int64_t panel_begin, panel_end;
};

// The tiles of one phase in a block.
int64_t list_tiles(const SplitLaunch& launch, const Block& block, const Phase& phase, const PlaneLayout& layout,
                   RowTile* tiles) {
  const SplitPlan& split = launch.plan->split;
  const TensorView& out = launch.destination;
  const int64_t rows = std::min(block.rows, phase.rows - block.first_row);
  const int64_t pitch = split.planes.pitch;
  const int64_t step_w = phase.ostep_w * out.stride_w;
  const bool pooled = launch.epilogue.pooled;
  const auto start = [&](int64_t image, int64_t row) {
    return out.offset(block.first_image + image, phase.oh + (block.first_row + row) * phase.ostep_h, phase.ow);
  };
  int64_t count = 0;
  if (rows <= 0) return 0;
  switch (split.row_tiles) {
    case RowTiles::columns:
      for (int64_t image = 0; image < block.images; ++image) {
        // To be pooled, a tile comes with the one below it, and half its offsets count: where windows are written.
        const int64_t height = pooled ? 2 : 1;
        for (int64_t row = 0; row + height <= rows; row += height) {
          const int64_t line =
              pooled ? out.offset(block.first_image + image, (block.first_row + row) / 2, 0) : start(image, row);
          for (int64_t col = 0; col < phase.cols; col += kTileRows) {
            const int64_t from = std::max<int64_t>(std::min(col, phase.cols - kTileRows), 0);
            const int64_t valid = std::min<int64_t>(kTileRows, phase.cols - from) / height;
            for (int64_t y = row; y < row + height; ++y) {
              RowTile& tile = tiles[count++];
              tile.a = image * layout.image + y * layout.row + from * layout.pixel;
              tile.row = tile.last_row = block.first_row + y;
              tile.col = -1;
              for (int64_t i = 0; i < kTileRows; ++i) {
                tile.offsets[i] = i < valid ? line + (from / height + i) * step_w : -1;
              }
            }
          }
        }
      }
      return count;
    case RowTiles::images:
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < phase.cols; ++col) {
          for (int64_t image = 0; image < block.images; image += kTileRows) {
            RowTile& tile = tiles[count++];
            tile.a = image * layout.image + row * layout.row + col * layout.pixel;
            tile.row = tile.last_row = block.first_row + row;
            tile.col = col;
            for (int64_t i = 0; i < kTileRows; ++i) {
              tile.offsets[i] = image + i < block.images ? start(image + i, row) + col * step_w : -1;
            }
          }
        }
      }
      return count;
    case RowTiles::line: {
      const int64_t end = ((block.images - 1) * layout.height + rows - 1) * pitch + phase.cols;
      for (int64_t m = 0; m < end; m += kTileRows) {
        RowTile& tile = tiles[count++];
        const int64_t last = m + kTileRows - 1;
        const bool one_image = m / (pitch * layout.height) == last / (pitch * layout.height);
        tile.a = m * layout.pixel;
        tile.row = one_image ? block.first_row + m / pitch % layout.height : kAnyRow;
        tile.last_row = block.first_row + last / pitch % layout.height;
        tile.col = -1;
        for (int64_t i = 0; i < kTileRows; ++i) {
          const int64_t image = (m + i) / (pitch * layout.height);
          const int64_t row = (m + i) / pitch % layout.height;
          const int64_t col = (m + i) % pitch;
          const bool valid = image < block.images && row < rows && col < phase.cols;
          tile.offsets[i] = valid ? start(image, row) + col * step_w : -1;
        }
      }
      return count;
    }
  }
  return count;
}

// Whether a tile reads the source anywhere in this step: if not, it reads zeros only.
bool reads_source(const SplitLaunch& launch, const PlaneStep& step, const RowTile& tile) {
  const Planes& planes = launch.plan->split.planes;
  const TensorView& source = launch.source.view;
  const Planes::Residue& residue = planes.residues[static_cast<size_t>(step.at.plane)];
  if (tile.row == kAnyRow) return true;
  const int64_t last = planes.source_h(residue, tile.last_row + step.at.dh);
  const int64_t first = planes.source_h(residue, tile.row + step.at.dh);
  if (last < 0 || first >= source.h) return false;
  if (tile.col < 0) return true;
  for (const auto& [pixel, tap] : step.taps) {
    const int64_t w = planes.source_w(residue, tile.col + step.at.dw + pixel);
    if (w >= 0 && w < source.w) return true;
  }
  return false;
}

// Row tiles of a call. With one product a step the filter comes from L2 hardly faster than it is used, and three rows
// share it: 512 channels, 3 x 3 on 32 x 32, took 1.61 ms instead of 1.71 (two threads). Not for few steps, after which
// sums leave the tiles, nor where tiles of a group skip different steps, nor for pairs of rows that are pooled. Of one
// column tile with three terms, 16 to 10 channels on 64 images took 0.34 ms in groups of three rows instead of 0.38.
const SplitShape& group_shape(const SplitLaunch& launch, size_t phase, int64_t column_tiles) {
  constexpr int64_t kManySteps = 32;
  const SplitUkernels& kernels = *split_ukernels(launch.plan->isa);
  const SplitPlan& split = launch.plan->split;
  if (column_tiles == 1) return split.terms > 1 && !launch.epilogue.pooled ? kernels.slim : kernels.narrow;
  const bool tall = split.terms == 1 && split.row_tiles != RowTiles::images && !launch.epilogue.pooled &&
                    static_cast<int64_t>(split.steps[phase].size()) * split.chunk_blocks >= kManySteps;
  return tall ? kernels.tall : kernels.wide;
}

int64_t group_tiles(const SplitLaunch& launch, const std::vector<PlaneStep>& steps, const PlaneLayout& layout,
                    int64_t step_bytes, int64_t tiles, int64_t group_size, bool whole, const Scratch& scratch) {
  const int64_t height = launch.epilogue.pooled ? 2 : 1;  // tiles that stay together
  const int64_t groups = ceil_div(tiles, group_size);
  // Of about the same size. Whole ones, but for the last, where a call writes the sums of all its rows in any case.
  const auto begin = [&](int64_t g) {
    return whole ? std::min(g * group_size, tiles) : tiles / height * g / groups * height;
  };
  int64_t used = 0;
  for (int64_t g = 0; g < groups; ++g) {
    TileGroup& group = scratch.groups[g];
    const int64_t first = begin(g);
    group = {first, begin(g + 1) - first, used, 0};
    for (size_t s = 0; s < steps.size(); ++s) {
      bool reads = false;
      for (int64_t t = 0; t < group.count; ++t) {
        reads = reads || reads_source(launch, steps[s], scratch.tiles[first + t]);
      }
      if (!reads) continue;
      scratch.steps[used++] = {static_cast<int32_t>(layout.offset(steps[s].at)),
                               static_cast<int32_t>(static_cast<int64_t>(s) * step_bytes)};
    }
    group.steps = used - group.steps_begin;
  }
  return groups;
}

// `below`: from a tile's sums to those of the tile below, where the two are pooled.
void store_tile(const SplitLaunch& launch, const RowTile& tile, const float* sums, int64_t below, int64_t channel,
                int64_t columns, bool streamed, const float* bias, const Scratch& scratch) {
  const SplitUkernels& kernels = *split_ukernels(launch.plan->isa);
  const TensorView& out = launch.destination;
  SplitStoreArgs args{sums,
                      columns,
                      bias,
                      launch.epilogue.activation,
                      static_cast<float>(launch.epilogue.negative_slope),
                      out.dtype,
                      static_cast<char*>(out.data) + channel * dtype_size(out.dtype),
                      tile.offsets,
                      streamed};
  if (launch.epilogue.pooled) {
    kernels.store_pooled(args, below);
    return;
  }
  if (out.stride_c == 1 || out.c == 1) {
    kernels.store(args);
    return;
  }
  int64_t rows[kTileRows];
  int64_t offsets[kTileRows];
  int64_t count = 0;
  for (int64_t i = 0; i < kTileRows; ++i) {
    rows[i] = tile.offsets[i] < 0 ? -1 : count * kPanelColumns;
    if (tile.offsets[i] >= 0) offsets[count++] = tile.offsets[i];
  }
  args.dtype = DType::float32;
  args.data = scratch.rows;
  args.offsets = rows;
  args.streams = false;
  kernels.store(args);
  unstage_block(ukernels<float>(launch.plan->isa), scratch.rows, kPanelColumns, count, columns, out, offsets, channel);
}

// All channel blocks of one panel for the listed tiles.
void run_panel(const SplitLaunch& launch, const Block& block, const PlaneLayout& layout, int64_t phase, int64_t panel,
               int64_t groups, const Scratch& scratch) {
  const Plan& plan = *launch.plan;
  const SplitPlan& split = plan.split;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const int64_t tiles = split.panel_tiles(plan.columns(), panel);
  const int64_t steps = static_cast<int64_t>(split.steps[static_cast<size_t>(phase)].size());
  const int64_t first_column = panel * kPanelColumns;
  const int64_t columns = std::min(kPanelColumns, plan.columns() - first_column);
  const int64_t channel = block.group * plan.columns() + first_column;
  const bool streamed = columns == kPanelColumns && streams(launch.destination, columns, channel);
  const float* bias =
      launch.bias == nullptr ? nullptr : launch.bias + block.group * split.panels * kPanelColumns + first_column;
  const int64_t height = launch.epilogue.pooled ? 2 : 1;
  const SplitShape& narrow = group_shape(launch, static_cast<size_t>(phase), 1);
  SplitGemmArgs args{};
  args.a_row = split.row_tiles == RowTiles::images ? layout.image : layout.pixel;
  args.a_term = layout.term;
  args.a_block = layout.block;
  args.out_row_tile = tiles * kTileFloats;
  args.out_column_tile = kTileFloats;
  args.b_term = tiles * kTileBytes;
  args.b_block = steps * launch.layout->step_bytes(plan, panel);
  const char* filter = launch.packed + launch.layout->panel_offset(plan, phase, block.group, panel);
  for (int64_t chunk = 0; chunk < split.channel_blocks; chunk += split.chunk_blocks) {
    const bool last = chunk + split.chunk_blocks >= split.channel_blocks;
    args.blocks = std::min(split.chunk_blocks, split.channel_blocks - chunk);
    for (int64_t t = 0; t < tiles; ++t) args.b[t] = filter + chunk * args.b_block + t * kTileBytes;
    const auto store_group = [&](int64_t g) {
      const TileGroup& group = scratch.groups[g];
      const float* result = scratch.result + g % 2 * kMaxTiles * kTileFloats;
      for (int64_t t = 0; t < group.count; t += height) {
        store_tile(launch, scratch.tiles[group.first + t], result + t * args.out_row_tile, args.out_row_tile, channel,
                   columns, streamed, bias, scratch);
      }
    };
    // What follows arrives evenly: the next chunk, or the next panel where it is as wide.
    const char* next = nullptr;
    if (!last) {
      next = args.b[0] + split.chunk_blocks * args.b_block;
    } else if (panel + 1 < block.panel_end && split.panel_tiles(plan.columns(), panel + 1) == tiles) {
      next = launch.packed + launch.layout->panel_offset(plan, phase, block.group, panel + 1);
    }
    const int64_t lines = next == nullptr ? 0 : launch.layout->step_bytes(plan, panel) / kLineBytes;
    for (int64_t g = 0; g < groups; ++g) {
      const TileGroup& group = scratch.groups[g];
      args.next = next + lines * g / groups * kLineBytes;
      args.next_lines = lines * (g + 1) / groups - lines * g / groups;
      const SplitShape& shape = tiles == 1         ? narrow
                                : group.count == 1 ? kernels.flat
                                : group.count == 2 ? kernels.wide
                                                   : kernels.tall;
      for (int t = 0; t < shape.row_tiles; ++t) {
        const int64_t tile = group.first + std::min<int64_t>(t, group.count - 1);
        args.a[t] = scratch.planes + scratch.tiles[tile].a + chunk * layout.block;
      }
      args.steps = scratch.steps + group.steps_begin;
      args.count = group.steps;
      float* sums = scratch.sums == nullptr ? nullptr : scratch.sums + group.first * tiles * kTileFloats;
      args.in = chunk > 0 ? sums : nullptr;
      args.out = last ? scratch.result + g % 2 * kMaxTiles * kTileFloats : sums;
      shape.run[split.terms - 1](args);
      if (last && g > 0) store_group(g - 1);
    }
    if (last && groups > 0) store_group(groups - 1);
  }
}

void run_block(const SplitLaunch& launch, const Block& block, const Scratch& scratch) {
  const Plan& plan = *launch.plan;
  const SplitPlan& split = plan.split;
  const PlaneLayout layout(split);
  pack_planes(plan, launch.source, block, scratch.row, scratch.planes);
  for (size_t p = 0; p < plan.phases.size(); ++p) {
    const int64_t tiles = list_tiles(launch, block, plan.phases[p], layout, scratch.tiles);
    int64_t listed = 0;
    int64_t groups = 0;
    for (int64_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
      const int64_t width = split.panel_tiles(plan.columns(), panel);
      if (width != listed) {
        groups = group_tiles(launch, split.steps[p], layout, launch.layout->step_bytes(plan, panel), tiles,
                             group_shape(launch, p, width).row_tiles, width == 1, scratch);
      }
      listed = width;
      run_panel(launch, block, layout, static_cast<int64_t>(p), panel, groups, scratch);
    }
  }
}

}  // namespace

bool split_can_pool(const Plan& plan) {
  const SplitPlan& split = plan.split;
  const Phase& phase = plan.phases.front();
  return plan.pass == Pass::fprop && split.row_tiles == RowTiles::columns && phase.cols % 2 == 0 &&
         (split.rows % 2 == 0 || split.rows >= phase.rows);
}

int64_t split_scratch(const Plan& plan, const MaskedSource& source) {
  Arena arena(nullptr);
  const Scratch scratch(plan, source, arena);
  return arena.used();
}

void launch_split(const SplitLaunch& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const SplitPlan& split = plan.split;
  int64_t rows = 0;
  for (const Phase& phase : plan.phases) rows = std::max(rows, phase.rows);
  const int64_t row_blocks = ceil_div(rows, split.rows);
  const int64_t image_blocks = ceil_div(plan.problem.n, split.images);
  const int64_t scratch_bytes = split_scratch(plan, launch.source);
  const int64_t tasks = plan.problem.groups * split.column_splits * image_blocks * row_blocks;
  for_each_task(executor, tasks, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch scratch(plan, launch.source, arena);
    Block block{};
    block.first_row = task % row_blocks * split.rows;
    block.rows = std::min(split.rows, rows - block.first_row);
    block.first_image = task / row_blocks % image_blocks * split.images;
    block.images = std::min(split.images, plan.problem.n - block.first_image);
    const int64_t part = task / (row_blocks * image_blocks) % split.column_splits;
    block.panel_begin = split.panels * part / split.column_splits;
    block.panel_end = split.panels * (part + 1) / split.column_splits;
    block.group = task / (row_blocks * image_blocks * split.column_splits);
    split_ukernels(plan.isa)->begin();
    run_block(launch, block, scratch);
    split_ukernels(plan.isa)->end();
    finish_streaming();
  });
}

}  // namespace segpose
