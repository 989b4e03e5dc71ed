// SPDX-License-Identifier: BSD-3-Clause
#include "transform_conv.h"

#include <algorithm>
#include <cstring>

#include "../common/integers.h"
#include "split_ukernels.h"
#include "tile_reader.h"

namespace segpose {
namespace {

// Extents of a block's transformed input V and products P, in bytes. Frequencies lie one cache line more than their
// size apart: those of a tile must not share cache sets.
struct Extents {
  int64_t m, n, tiles, lines, depth_blocks;
  int64_t v_line, v_frequency, v_term, v_size;
  int64_t p_line, p_frequency, p_size;

  explicit Extents(const Plan& plan) {
    const TransformPlan& t = plan.transform;
    const int64_t vector = transform_ukernels(plan.isa).vector_length;
    m = t.m;
    n = t.n;
    tiles = t.tiles;
    lines = ceil_div(plan.depth(), vector);
    depth_blocks = ceil_div(plan.depth(), kTileDepth);
    v_line = tiles * (t.terms > 0 ? kTileDepth * 2 : t.parts * vector * 4);
    v_frequency = (t.terms > 0 ? depth_blocks : lines) * v_line + 64;
    v_term = t.frequencies * v_frequency;
    v_size = v_term * std::max<int64_t>(t.terms, 1);
    p_line = tiles * t.parts * vector * 4;
    p_frequency = t.group_panels * t.panel_columns / vector * p_line + 64;
    p_size = t.frequencies * p_frequency;
  }
};

// The transformed input of one block is shared by the tasks of its column splits.
bool shares_input(const Plan& plan) { return plan.transform.column_splits > 1; }

struct Scratch {
  char* v;  // null where it is shared
  char* p;
  TileReader reader;
  float** out;       // [tile and one more][m * m] destination pixels, null outside the image
  int64_t* offsets;  // their element offsets
  float* pixels;     // [tile][m * m][columns] on their way to another layout or dtype
  float* window;     // [m * m][columns] of a tile to be pooled

  Scratch(const Plan& plan, const MaskedSource& source, bool direct, Arena& arena)
      : reader(plan.isa, source, plan.transform.n, plan.depth(), arena) {
    const TransformPlan& t = plan.transform;
    const Extents e(plan);
    v = shares_input(plan) ? nullptr : arena.take<char>(e.v_size);
    p = arena.take<char>(e.p_size);
    out = arena.take<float*>((e.tiles + 1) * t.m * t.m);
    offsets = arena.take<int64_t>(e.tiles * t.m * t.m);
    window = arena.take<float>(t.m * t.m * t.group_panels * t.panel_columns);
    pixels = direct ? nullptr : arena.take<float>(e.tiles * t.m * t.m * t.group_panels * t.panel_columns);
  }
};

// Tiles of a phase, counted over (image, tile row, tile column).
struct Tiles {
  int64_t rows, cols, count;

  Tiles(const Plan& plan, const Phase& phase)
      : rows(ceil_div(phase.rows, plan.transform.m)),
        cols(ceil_div(phase.cols, plan.transform.m)),
        count(plan.problem.n * rows * cols) {}
};

struct Block {
  int64_t phase, group, panel_begin, panel_end, first, count;
};

void transform_tile(const Plan& plan, const Extents& e, const TileRows& tile, int64_t t, char* v) {
  const TransformPlan& transform = plan.transform;
  if (transform.terms > 0) {
    const SplitTransformCodelets& codelets = *split_transform(plan.isa, static_cast<int>(transform.r));
    codelets.input[transform.terms - 1](tile.rows, tile.pixel_step, plan.depth(), v + t * kTileDepth * 2, e.v_term,
                                        e.v_frequency, e.v_line);
    return;
  }
  const TransformUkernels& kernels = transform_ukernels(plan.isa);
  kernels.codelets[transform.codelet].input(tile.rows, tile.pixel_step, plan.depth(),
                                            reinterpret_cast<float*>(v) + t * transform.parts * kernels.vector_length,
                                            e.v_frequency / 4, e.v_line / 4);
}

// Tiles [begin, end) of a block, whole rows of the microkernels.
void transform_input(const TransformLaunch& launch, const Block& block, const Extents& e, int64_t begin, int64_t end,
                     char* v, TileReader& reader) {
  const Plan& plan = *launch.plan;
  const Phase& phase = plan.phases[static_cast<size_t>(block.phase)];
  const Tiles tiles(plan, phase);
  const Tap& first_tap = phase.taps.front();
  const int64_t channel = block.group * plan.depth();
  for (int64_t t = begin; t < std::min(end, block.count); ++t) {
    const int64_t tile = block.first + t;
    const int64_t image = tile / (tiles.cols * tiles.rows);
    const int64_t h = tile / tiles.cols % tiles.rows * e.m + first_tap.off_h;
    const int64_t w = tile % tiles.cols * e.m + first_tap.off_w;
    reader.prefetch(image, h, w + e.m, e.m, channel, plan.depth());
    transform_tile(plan, e, reader.read(image, h, w, channel, plan.depth()), t, v);
  }
  // The last rows of a microkernel: zeros, so that no value of an earlier call slows it down.
  for (int64_t t = std::max(begin, block.count); t < end; ++t) transform_tile(plan, e, reader.zeros(), t, v);
}

// Products of the block's panels with tiles of floats.
void multiply(const Plan& plan, const TransformFilter& layout, const Block& block, const Extents& e, const char* filter,
              const char* input, const Scratch& scratch) {
  const TransformPlan& transform = plan.transform;
  const TransformUkernels& kernels = transform_ukernels(plan.isa);
  const int64_t vectors = transform.panel_columns / kernels.vector_length;
  const PanelTile* heights = transform.parts == 2 ? kernels.complex : kernels.real;
  const int64_t row = transform.parts * kernels.vector_length;
  const int64_t rows = round_up(block.count, kTransformRows);
  PanelArgs args{};
  args.a_line = e.v_line / 4;
  args.out_line = e.p_line / 4;
  args.depth = plan.depth();
  const int64_t count = block.panel_end - block.panel_begin;
  for (int64_t f = 0; f < transform.frequencies; ++f) {
    const float* v = reinterpret_cast<const float*>(input + f * e.v_frequency);
    for (int64_t p = 0; p < count; ++p) {
      const char* b = filter + f * layout.frequency + (block.panel_begin + p) * layout.panel;
      const bool more = p + 1 < count || f + 1 < transform.frequencies;
      const char* next = p + 1 < count ? b + layout.panel : b + layout.frequency - p * layout.panel;
      args.b = reinterpret_cast<const float*>(b);
      args.next = reinterpret_cast<const float*>(more ? next : b);
      float* out = reinterpret_cast<float*>(scratch.p + f * e.p_frequency + p * vectors * e.p_line);
      const PanelTile* tile = heights;
      for (int64_t t = 0; t < rows; t += tile->mr) {
        // The tallest that leaves rows of a tile or none; 8 + 8 runs faster than 12 + 4.
        const int64_t left = rows - t;
        while (tile->mr > left || (tile->mr < left && left - tile->mr < kTransformRows) ||
               (left == 16 && tile->mr == 12)) {
          ++tile;
        }
        args.a = v + t * row;
        args.out = out + t * row;
        // The next panel arrives evenly: half of it during the first call, half during the second.
        args.next_step = kernels.vector_length * (tile->mr < rows ? 1 : 2);
        tile->run(args);
        args.next = t == 0 ? args.next + args.depth * args.next_step : args.b;
      }
    }
  }
}

// The same with tiles of bfloat16.
void multiply_split(const Plan& plan, const TransformFilter& layout, const Block& block, const Extents& e,
                    const char* filter, const char* input, const Scratch& scratch) {
  const TransformPlan& transform = plan.transform;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const SplitStep step{0, 0};
  SplitGemmArgs args{};
  args.a_row = kTileDepth * 2;
  args.a_term = e.v_term;
  args.steps = &step;
  args.count = 1;
  args.blocks = e.depth_blocks;
  args.a_block = e.v_line;
  args.b_term = 2 * kTileBytes;
  args.b_block = transform.terms * 2 * kTileBytes;
  args.out_row_tile = kTileFloats;
  args.out_column_tile = e.p_line / 4;
  const int64_t lines = args.b_block / kLineBytes;
  for (int64_t f = 0; f < transform.frequencies; ++f) {
    const char* v = input + f * e.v_frequency;
    for (int64_t p = block.panel_begin; p < block.panel_end; ++p) {
      args.b[0] = filter + f * layout.frequency + p * layout.panel;
      args.b[1] = args.b[0] + kTileBytes;
      // The next panel arrives evenly, a share of its lines during each call.
      const bool last = p + 1 == block.panel_end;
      const char* next = args.b[0] + (last ? layout.frequency - (p - block.panel_begin) * layout.panel : layout.panel);
      const bool more = !last || f + 1 < transform.frequencies;
      const int64_t calls = ceil_div(block.count, 2 * kTileRows);
      float* out = reinterpret_cast<float*>(scratch.p + f * e.p_frequency + (p - block.panel_begin) * 2 * e.p_line);
      for (int64_t call = 0; call < calls; ++call) {
        const int64_t t = call * 2 * kTileRows;
        const SplitShape& shape = block.count - t > kTileRows ? kernels.wide : kernels.flat;
        args.a[0] = v + t * kTileDepth * 2;
        args.a[1] = args.a[0] + kTileRows * kTileDepth * 2;
        args.out = out + t * kTileColumns;
        args.next = next + lines * call / calls * kLineBytes;
        args.next_lines = more ? lines * (call + 1) / calls - lines * call / calls : 0;
        shape.run[transform.terms - 1](args);
      }
    }
  }
}

void transform_output(const TransformLaunch& launch, const Block& block, const Extents& e, const Scratch& scratch) {
  const Plan& plan = *launch.plan;
  const TransformPlan& transform = plan.transform;
  const TransformUkernels& kernels = transform_ukernels(plan.isa);
  const Phase& phase = plan.phases[static_cast<size_t>(block.phase)];
  const Tiles tiles(plan, phase);
  const TensorView& destination = launch.destination;
  const bool direct = scratch.pixels == nullptr;
  const int64_t first = block.panel_begin * transform.panel_columns;
  const int64_t columns = std::min(block.panel_end * transform.panel_columns, plan.columns()) - first;
  const int64_t channel = block.group * plan.columns() + first;
  const int64_t width = transform.group_panels * transform.panel_columns;
  const float* bias =
      launch.bias == nullptr ? nullptr : launch.bias + block.group * transform.panels * transform.panel_columns + first;
  const bool pooled = launch.epilogue.pooled;
  const int64_t edge = pooled ? e.m / 2 : e.m;  // of a tile's pixels in the destination
  const int64_t rows = pooled ? phase.rows / 2 : phase.rows;
  const int64_t cols = pooled ? phase.cols / 2 : phase.cols;
  int64_t written = 0;
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t tile = block.first + t;
    const int64_t row = tile / tiles.cols % tiles.rows * edge;
    const int64_t col = tile % tiles.cols * edge;
    const int64_t n = tile / (tiles.cols * tiles.rows);
    float** out = scratch.out + t * edge * edge;
    for (int64_t i = 0; i < edge; ++i) {
      for (int64_t j = 0; j < edge; ++j) {
        float*& pixel = out[i * edge + j];
        pixel = nullptr;
        if (row + i >= rows || col + j >= cols) continue;
        const int64_t offset =
            destination.offset(n, phase.oh + (row + i) * phase.ostep_h, phase.ow + (col + j) * phase.ostep_w);
        pixel = direct ? destination.as<float>() + offset + channel : scratch.pixels + written * width;
        scratch.offsets[written++] = offset;
      }
    }
  }
  std::fill_n(scratch.out + block.count * edge * edge, edge * edge, nullptr);
  // A tile to be pooled, twice: it is its own next.
  constexpr int64_t kMostPixels = kMaxTransformN * kMaxTransformN;
  float* window[2 * kMostPixels];
  for (int64_t i = 0; pooled && i < 2 * e.m * e.m; ++i) window[i] = scratch.window + i % (e.m * e.m) * width;
  for (int64_t t = 0; t < block.count; ++t) {
    const float* p = reinterpret_cast<const float*>(scratch.p) + t * transform.parts * kernels.vector_length;
    kernels.codelets[transform.codelet].output(p, transform.m, e.p_frequency / 4, e.p_line / 4, columns,
                                               launch.epilogue, bias, pooled ? window : scratch.out + t * e.m * e.m);
    if (pooled) kernels.pool(scratch.window, width, e.m, columns, scratch.out + t * edge * edge);
  }
  if (!direct) {
    unstage_block(ukernels<float>(plan.isa), scratch.pixels, width, written, columns, destination, scratch.offsets,
                  channel);
  }
}

std::vector<Block> split_blocks(const Plan& plan) {
  const TransformPlan& transform = plan.transform;
  std::vector<Block> blocks;
  for (size_t p = 0; p < plan.phases.size(); ++p) {
    const Tiles tiles(plan, plan.phases[p]);
    for (int64_t group = 0; group < plan.problem.groups; ++group) {
      for (int64_t first = 0; first < tiles.count; first += transform.tiles) {
        blocks.push_back({static_cast<int64_t>(p), group, 0, transform.panels, first,
                          std::min(transform.tiles, tiles.count - first)});
      }
    }
  }
  return blocks;
}

// Products and outputs of the block's panels, a group of them at a time.
void run_panels(const TransformLaunch& launch, const Extents& e, Block block, const char* input,
                const Scratch& scratch) {
  const Plan& plan = *launch.plan;
  const char* filter = launch.packed + block.phase * launch.layout->phase + block.group * launch.layout->group;
  const bool split = plan.transform.terms > 0;
  if (split) split_ukernels(plan.isa)->begin();
  const int64_t end = block.panel_end;
  for (; block.panel_begin < end; block.panel_begin = block.panel_end) {
    block.panel_end = std::min(block.panel_begin + plan.transform.group_panels, end);
    if (split) {
      multiply_split(plan, *launch.layout, block, e, filter, input, scratch);
    } else {
      multiply(plan, *launch.layout, block, e, filter, input, scratch);
    }
    transform_output(launch, block, e, scratch);
  }
  if (split) split_ukernels(plan.isa)->end();
}

}  // namespace

bool transform_can_pool(const Plan& plan) { return plan.pass == Pass::fprop && plan.transform.m % 2 == 0; }

int64_t transform_scratch(const Plan& plan, const MaskedSource& source, int64_t workers) {
  Arena arena(nullptr);
  const Scratch scratch(plan, source, false, arena);
  return workers * arena.used() + (shares_input(plan) ? Extents(plan).v_size : 0);
}

void launch_transform(const TransformLaunch& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const Extents e(plan);
  const bool direct = launch.destination.has_channel_rows(DType::float32);
  Arena measure(nullptr);
  const Scratch measured(plan, launch.source, false, measure);
  char* const shared = launch.scratch;
  char* const workers = launch.scratch + (shares_input(plan) ? e.v_size : 0);
  const auto scratch_of = [&](int64_t worker) {
    Arena arena(workers + worker * measure.used());
    Scratch scratch(plan, launch.source, direct, arena);
    scratch.reader.clear();
    return scratch;
  };
  const int64_t row_multiple = plan.transform.terms > 0 ? kTileRows : kTransformRows;
  const std::vector<Block> blocks = split_blocks(plan);
  if (!shares_input(plan)) {
    for_each_task(executor, static_cast<int64_t>(blocks.size()), [&](int64_t task, int64_t worker) {
      const Block& block = blocks[static_cast<size_t>(task)];
      Scratch scratch = scratch_of(worker);
      transform_input(launch, block, e, 0, round_up(block.count, row_multiple), scratch.v, scratch.reader);
      run_panels(launch, e, block, scratch.v, scratch);
    });
    return;
  }
  for (const Block& block : blocks) {
    for_each_task(executor, ceil_div(block.count, row_multiple), [&](int64_t task, int64_t worker) {
      Scratch scratch = scratch_of(worker);
      transform_input(launch, block, e, task * row_multiple, (task + 1) * row_multiple, shared, scratch.reader);
    });
    for_each_task(executor, plan.transform.column_splits, [&](int64_t task, int64_t worker) {
      Block part = block;
      part.panel_begin = plan.transform.panels * task / plan.transform.column_splits;
      part.panel_end = plan.transform.panels * (task + 1) / plan.transform.column_splits;
      run_panels(launch, e, part, shared, scratch_of(worker));
    });
  }
}

}  // namespace segpose
