// SPDX-License-Identifier: BSD-3-Clause
#include "igemm.h"

#include <algorithm>

#include "../common/integers.h"
#include "row_table.h"
#include "staging.h"
#include "streaming.h"

namespace segpose {
namespace {

// What one worker needs for a block of destination pixels.
template <class T>
struct Scratch {
  RowTable<T> rows;
  T** out;              // [block_m] destination rows
  T* partial;           // [block_m][nr] sums between chunks
  T* tile;              // [block_m][nr] results on their way to another layout or dtype
  int32_t* taps;        // [block_m][taps] lists of the taps in use, one list a tile of rows
  int64_t* tap_counts;  // [block_m]
  T* gathered;          // [block_m][taps * channels]
  const T** flat;       // [block_m] rows of `gathered`

  Scratch(const Plan& plan, Arena& arena) {
    int64_t nr = 1;
    for (const Panel& panel : plan.panels) nr = std::max(nr, panel.nr);
    rows.step = plan.block_m;
    rows.sources = arena.take<const T*>(plan.most_taps() * plan.block_m);
    rows.offsets = arena.take<int64_t>(plan.block_m);
    rows.row = arena.take<int64_t>(plan.block_m);
    rows.col = arena.take<int64_t>(plan.block_m);
    rows.at = arena.take<int64_t>(plan.block_m);
    out = arena.take<T*>(plan.block_m);
    partial = arena.take<T>(plan.block_m * nr);
    tile = arena.take<T>(plan.block_m * nr);
    taps = arena.take<int32_t>(plan.most_taps() * plan.block_m);
    tap_counts = arena.take<int64_t>(plan.block_m);
    gathered = nullptr;
    flat = nullptr;
    if (plan.algorithm == Algorithm::gathered) {
      gathered = arena.take<T>(plan.block_m * plan.most_taps() * plan.depth());
      flat = arena.take<const T*>(plan.block_m);
    }
  }
};

// Destination rows in place where the layout allows, else rows of the tile buffer; those of `rows` past `count` always
// land there.
template <class T>
void set_out_rows(const GatherLaunch<T>& launch, const Scratch<T>& scratch, int64_t count, int64_t rows,
                  int64_t channel, int64_t width, bool direct) {
  for (int64_t m = 0; m < rows; ++m) {
    scratch.out[m] = direct && m < count ? launch.destination.template as<T>() + scratch.rows.offsets[m] + channel
                                         : scratch.tile + m * width;
  }
}

// The reduction of one block of rows.
template <class T>
struct Reduction {
  const T* const* sources;  // [taps][step]
  int64_t step;
  int64_t taps;
  int64_t depth;
  int64_t a_offset;
  int64_t k_chunk;
};

// Per tile of `mr` rows the taps that read at least one real row: padding is skipped, not multiplied. A transposed
// convolution of a 1 x 1 map would otherwise spend 48 of 49 taps of a 7 x 7 filter on zeros.
template <class T>
void list_taps(const Reduction<T>& reduction, const T* zeros, int64_t mr, int64_t rows, const Scratch<T>& scratch) {
  for (int64_t row = 0; row < rows; row += mr) {
    int32_t* list = scratch.taps + row * reduction.taps;
    int64_t count = 0;
    for (int64_t tap = 0; tap < reduction.taps; ++tap) {
      const T* const* sources = reduction.sources + tap * reduction.step + row;
      const int64_t end = std::min(mr, rows - row);
      int64_t m = 0;  // of the first row that is real, most often the first of all
      while (m < end && sources[m] == zeros) ++m;
      if (m < end) list[count++] = static_cast<int32_t>(tap);
    }
    scratch.tap_counts[row] = count;
  }
}

// Chunks of whole taps, or of the channels of one tap where a tap alone is longer than a chunk.
template <class T>
void run_panel(const GemmTile<T>& tile, const Reduction<T>& reduction, const T* packed, GemmArgs<T> args,
               const Scratch<T>& scratch, int64_t rows) {
  const int64_t depth = reduction.depth;
  const int64_t pieces = std::max<int64_t>(ceil_div(depth, reduction.k_chunk), 1);
  const int64_t taps_per_chunk = std::max<int64_t>(reduction.k_chunk / std::max<int64_t>(depth, 1), 1);
  args.a_step = reduction.step;
  args.b_step = depth * tile.nr;
  const int64_t most_chunks = std::max<int64_t>(ceil_div(reduction.taps, taps_per_chunk), 1) * pieces;
  for (int64_t chunk = 0; chunk < most_chunks; ++chunk) {
    const int64_t first = chunk / pieces * taps_per_chunk;
    const int64_t begin = depth * (chunk % pieces) / pieces;
    args.depth = depth * (chunk % pieces + 1) / pieces - begin;
    args.a_offset = reduction.a_offset + begin;
    args.b = packed + begin * tile.nr;
    for (int64_t row = 0; row < rows; row += tile.mr) {
      const int64_t count = scratch.tap_counts[row];
      // Mostly one: a division for every tile would show.
      const int64_t tap_chunks =
          count <= taps_per_chunk ? std::min<int64_t>(count, 1) : ceil_div(count, taps_per_chunk);
      const int64_t chunks = std::max<int64_t>(tap_chunks * pieces, 1);
      if (chunk >= chunks) continue;
      T* partial = scratch.partial + row * tile.nr;
      GemmArgs<T> call = args;
      call.taps = scratch.taps + row * reduction.taps + first;
      call.count = std::min(taps_per_chunk, count - first);
      call.a = reduction.sources + row;
      call.partial_in = chunk > 0 ? partial : nullptr;
      call.partial_out = chunk + 1 < chunks ? partial : nullptr;
      call.out = scratch.out + row;
      tile.run_rows(call, rows - row);
    }
  }
}

struct Block {
  int64_t phase, group, panel_begin, panel_end, first, count;
};

template <class T>
void run_gemm_block(const GatherLaunch<T>& launch, const Block& block, Scratch<T>& scratch) {
  const Plan& plan = *launch.plan;
  const Ukernels<T>& kernels = ukernels<T>(plan.isa);
  const Phase& phase = plan.phases[static_cast<size_t>(block.phase)];
  const int64_t taps = static_cast<int64_t>(phase.taps.size());
  const int64_t channels = plan.depth();
  const bool direct = launch.destination.has_channel_rows(compute_dtype<T>());
  Reduction<T> reduction{scratch.rows.sources, scratch.rows.step, taps, channels, block.group * channels, plan.k_chunk};
  if (plan.algorithm == Algorithm::gathered) {
    fill_offsets(phase, launch.destination, block.first, block.count, scratch.rows);
    gather_rows(phase, launch.source, block.group * channels, channels, block.first, block.count, taps * channels,
                scratch.gathered);
    for (int64_t m = 0; m < plan.block_m; ++m) {
      scratch.flat[m] = scratch.gathered + std::min(m, block.count - 1) * taps * channels;
    }
    reduction = {scratch.flat, scratch.rows.step, taps == 0 ? 0 : 1, taps * channels, 0, plan.k_chunk};
  } else {
    int64_t rows = 0;
    for (int i = 0; i < kernels.gemm_tiles; ++i) rows = std::max(rows, kernels.gemm[i].rows_read(block.count));
    fill_row_table(kernels, phase, launch.source, launch.destination, launch.zeros, block.first, block.count, rows,
                   scratch.rows);
  }
  int64_t listed = 0;
  GemmArgs<T> args{};
  args.activation = launch.epilogue.activation;
  args.negative_slope = static_cast<T>(launch.epilogue.negative_slope);
  for (int64_t p = block.panel_begin; p < block.panel_end; ++p) {
    const Panel& panel = plan.panels[static_cast<size_t>(p)];
    const GemmTile<T>& tile = kernels.gemm[panel.tile];
    if (tile.mr != listed) list_taps(reduction, launch.zeros, tile.mr, block.count, scratch);
    listed = tile.mr;
    const int64_t channel = block.group * plan.columns() + panel.column;
    set_out_rows(launch, scratch, block.count, tile.rows_read(block.count), channel, panel.nr, direct);
    args.columns = panel.columns;
    args.streams = streams<T>(launch.destination, panel, channel);
    args.bias = launch.bias == nullptr ? nullptr : launch.bias + block.group * plan.padded_columns() + panel.column;
    const T* packed = launch.packed + launch.layout->phase_offset(block.phase) +
                      launch.layout->panel_offset(plan, block.phase, block.group, panel);
    run_panel(tile, reduction, packed, args, scratch, block.count);
    if (!direct) {
      unstage_block(kernels, scratch.tile, panel.nr, block.count, panel.columns, launch.destination,
                    scratch.rows.offsets, channel);
    }
  }
}

// Panels outermost: a packed panel stays in cache while the blocks of pixels pass by. Where the panels of all phases
// fit together, the phases of a block follow each other: they read the same source rows and write neighbouring pixels.
std::vector<Block> split_blocks(const Plan& plan) {
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  const int64_t phases = static_cast<int64_t>(plan.phases.size());
  const auto rows_of = [&](int64_t p) {
    const Phase& phase = plan.phases[static_cast<size_t>(p)];
    return plan.problem.n * phase.rows * phase.cols;
  };
  int64_t most_rows = 0;
  for (int64_t p = 0; p < phases; ++p) most_rows = std::max(most_rows, rows_of(p));
  std::vector<Block> blocks;
  for (int64_t group = 0; group < plan.gemm_groups(); ++group) {
    for (int64_t panel = 0; panel < panels; panel += plan.panels_per_task) {
      const int64_t panel_end = std::min(panel + plan.panels_per_task, panels);
      const auto add = [&](int64_t phase, int64_t first) {
        const int64_t rows = rows_of(phase);
        if (first < rows)
          blocks.push_back({phase, group, panel, panel_end, first, std::min(plan.block_m, rows - first)});
      };
      if (plan.phases_together) {
        for (int64_t first = 0; first < most_rows; first += plan.block_m) {
          for (int64_t phase = 0; phase < phases; ++phase) add(phase, first);
        }
      } else {
        for (int64_t phase = 0; phase < phases; ++phase) {
          for (int64_t first = 0; first < most_rows; first += plan.block_m) add(phase, first);
        }
      }
    }
  }
  return blocks;
}

}  // namespace

template <class T>
int64_t gather_scratch(const Plan& plan) {
  Arena arena(nullptr);
  Scratch<T> scratch(plan, arena);
  return arena.used();
}

template <class T>
void launch_gather(const GatherLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const std::vector<Block> blocks = split_blocks(plan);
  const int64_t scratch_bytes = gather_scratch<T>(plan);
  for_each_task(executor, static_cast<int64_t>(blocks.size()), [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    Scratch<T> scratch(plan, arena);
    run_gemm_block(launch, blocks[static_cast<size_t>(task)], scratch);
    finish_streaming();
  });
}

template int64_t gather_scratch<float>(const Plan&);
template int64_t gather_scratch<double>(const Plan&);
template void launch_gather<float>(const GatherLaunch<float>&, const Executor&);
template void launch_gather<double>(const GatherLaunch<double>&, const Executor&);

}  // namespace segpose
