// SPDX-License-Identifier: BSD-3-Clause
#include "transform_wgrad.h"

#include <algorithm>

#include "../common/integers.h"
#include "tile_reader.h"

namespace segpose {
namespace {

// Extents in floats of a block of channels and filters. X: transformed tiles of the activation, G: of the gradient,
// [frequency][line][tile][parts][vector]; S: sums [frequency][channel][filter line][parts][vector]. All three stay in
// L2: tiles are transformed again for every block, which costs less than streaming the sums of all channels.
struct Extents {
  int64_t vector, value, tiles;
  int64_t channels, filters;  // of a group
  int64_t channel_blocks, filter_blocks;
  int64_t line, x_frequency, g_frequency, s_row, s_frequency, sums;

  explicit Extents(const Plan& plan)
      : vector(transform_ukernels(plan.isa).vector_length),
        value(plan.transform.parts * vector),
        tiles(plan.transform.tiles),
        channels(plan.problem.c_per_group()),
        filters(plan.problem.k_per_group()),
        channel_blocks(ceil_div(channels, plan.transform.channel_block)),
        filter_blocks(ceil_div(filters, plan.transform.filter_block)) {
    line = tiles * value;
    // One cache line apart from a power of two, as in transform_conv.cpp.
    x_frequency = plan.transform.channel_block / vector * line + vector;
    g_frequency = plan.transform.filter_block / vector * line + vector;
    s_row = plan.transform.filter_block / vector * value;
    s_frequency = plan.transform.channel_block * s_row + vector;
    sums = plan.transform.frequencies * s_frequency;
  }
};

// A task: a block of channels and filters of one group, over one split of the tiles.
struct Block {
  int64_t group, channel, channels, filter, filters, split;
};

int64_t block_count(const Plan& plan, const Extents& e) {
  return plan.problem.groups * e.channel_blocks * e.filter_blocks;
}

Block block_of(const Plan& plan, const Extents& e, int64_t index, int64_t split) {
  const TransformPlan& t = plan.transform;
  const int64_t filter = index % e.filter_blocks * t.filter_block;
  const int64_t channel = index / e.filter_blocks % e.channel_blocks * t.channel_block;
  return {index / (e.filter_blocks * e.channel_blocks),    channel,
          std::min(t.channel_block, e.channels - channel), filter,
          std::min(t.filter_block, e.filters - filter),    split};
}

// What one worker needs.
struct Scratch {
  TileReader source, grad;
  float* x;
  float* g;
  float* sums;  // null where the splits of a block have sums of their own
  float* taps;  // [r * r][filters] of a line of channels

  Scratch(const WgradPass& pass, Arena& arena)
      : source(pass.plan->isa, pass.activation, pass.plan->transform.n,
               std::min(pass.plan->transform.channel_block, pass.plan->problem.c_per_group()), arena),
        grad(pass.plan->isa, pass.grad, pass.plan->transform.m,
             std::min(pass.plan->transform.filter_block, pass.plan->problem.k_per_group()), arena) {
    const TransformPlan& t = pass.plan->transform;
    const Extents e(*pass.plan);
    x = arena.take<float>(t.frequencies * e.x_frequency);
    g = arena.take<float>(t.frequencies * e.g_frequency);
    sums = t.tile_splits > 1 ? nullptr : arena.take<float>(e.sums);
    taps = arena.take<float>(e.vector * t.r * t.r * t.filter_block);
  }
};

struct Buffers {
  float* partials;  // [block][split] sums
  char* workers;
  int64_t worker_bytes;

  Buffers(const WgradPass& pass, int64_t count, Arena& arena) {
    const Plan& plan = *pass.plan;
    const Extents e(plan);
    const int64_t splits = plan.transform.tile_splits;
    partials = splits > 1 ? arena.take<float>(block_count(plan, e) * splits * e.sums) : nullptr;
    Arena measure(nullptr);
    const Scratch scratch(pass, measure);
    worker_bytes = measure.used();
    workers = arena.take<char>(count * worker_bytes);
  }
};

// Tiles of the output gradient, counted over (image, tile row, tile column).
struct Tiles {
  int64_t rows, cols, count;

  explicit Tiles(const Plan& plan)
      : rows(ceil_div(plan.problem.p, plan.transform.m)),
        cols(ceil_div(plan.problem.q, plan.transform.m)),
        count(plan.problem.n * rows * cols) {}
};

// The codelets: those of the forward transform read the activation, the gradient takes the place of the filter, and the
// taps that of the outputs (F(r, m); a Fourier tile serves both).
struct Codelets {
  const TransformCodelets& input;
  const TransformCodelets& adjoint;

  explicit Codelets(const Plan& plan)
      : input(transform_ukernels(plan.isa).codelets[plan.transform.codelet]),
        adjoint(transform_ukernels(plan.isa).codelets[plan.transform.adjoint]) {}
};

void transform_tiles(const WgradPass& pass, const Extents& e, const Block& block, int64_t first, int64_t count,
                     Scratch& scratch) {
  const Plan& plan = *pass.plan;
  const TransformPlan& transform = plan.transform;
  const Codelets codelets(plan);
  const Tiles tiles(plan);
  const Tap& tap = plan.phases.front().taps.front();
  const int64_t channel = block.group * e.channels + block.channel;
  const int64_t filter = block.group * e.filters + block.filter;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t;
    const int64_t image = tile / (tiles.cols * tiles.rows);
    const int64_t row = tile / tiles.cols % tiles.rows * transform.m;
    const int64_t col = tile % tiles.cols * transform.m;
    const int64_t ahead = col + transform.m;
    scratch.source.prefetch(image, row + tap.off_h, ahead + tap.off_w, transform.m, channel, block.channels);
    scratch.grad.prefetch(image, row, ahead, transform.m, filter, block.filters);
    const TileRows x = scratch.source.read(image, row + tap.off_h, col + tap.off_w, channel, block.channels);
    codelets.input.input(x.rows, x.pixel_step, block.channels, scratch.x + t * e.value, e.x_frequency, e.line);
    const TileRows g = scratch.grad.read(image, row, col, filter, block.filters);
    codelets.adjoint.filter(g.rows, transform.m, g.pixel_step, block.filters, scratch.g + t * e.value, e.g_frequency,
                            e.line);
  }
}

void accumulate(const Plan& plan, const Extents& e, const Block& block, int64_t count, bool first,
                const Scratch& scratch, float* sums) {
  const TransformUkernels& kernels = transform_ukernels(plan.isa);
  const ReduceTile& tile = plan.transform.parts == 2 ? kernels.reduce_complex : kernels.reduce_real;
  const int64_t panels = ceil_div(block.filters, tile.vectors * e.vector);
  ReduceArgs args{};
  args.count = count;
  args.b_line = e.line;
  args.out_step = e.s_row;
  args.first = first;
  for (int64_t f = 0; f < plan.transform.frequencies; ++f) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      args.b = scratch.g + f * e.g_frequency + panel * tile.vectors * e.line;
      for (int64_t c = 0; c < block.channels; c += tile.mr) {
        args.a = scratch.x + f * e.x_frequency + c / e.vector * e.line + c % e.vector;
        args.out = sums + f * e.s_frequency + c * e.s_row + panel * tile.vectors * e.value;
        tile.run(args);
      }
    }
  }
}

// Back to taps, a line of channels at a time, and to [K][C / groups][R][S] with the filter's strides and dtype.
void store_taps(const WgradPass& pass, const Extents& e, const Block& block, const float* sums,
                const Scratch& scratch) {
  const Plan& plan = *pass.plan;
  const TransformPlan& transform = plan.transform;
  const Codelets codelets(plan);
  const FilterView& out = pass.destination;
  const std::vector<Tap>& taps = plan.phases.front().taps;
  const int64_t area = transform.r * transform.r;
  const int64_t width = transform.filter_block;
  for (int64_t begin = 0; begin < block.channels; begin += e.vector) {
    const int64_t count = std::min(e.vector, block.channels - begin);
    for (int64_t c = 0; c < count; ++c) {
      float* pixels[2 * kMaxTransformN * kMaxTransformN];  // no tile follows
      for (int64_t t = 0; t < area; ++t) pixels[t] = scratch.taps + (c * area + t) * width;
      std::fill_n(pixels + area, area, nullptr);
      codelets.adjoint.output(sums + (begin + c) * e.s_row, transform.r, e.s_frequency, e.value, block.filters,
                              {Activation::none, 1.0}, nullptr, pixels);
    }
    for (int64_t k = 0; k < block.filters; ++k) {
      for (int64_t t = 0; t < area; ++t) {
        const Tap& tap = taps[static_cast<size_t>(t)];
        const int64_t start = (block.group * e.filters + block.filter + k) * out.stride_k +
                              (block.channel + begin) * out.stride_c + tap.r * out.stride_r + tap.s * out.stride_s;
        for (int64_t c = 0; c < count; ++c) {
          store_element(out.data, out.dtype, start + c * out.stride_c, scratch.taps[(c * area + t) * width + k]);
        }
      }
    }
  }
}

}  // namespace

int64_t transform_wgrad_workspace(const WgradPass& pass, int64_t workers) {
  Arena arena(nullptr);
  const Buffers buffers(pass, workers, arena);
  return arena.used();
}

void run_transform_wgrad(const WgradPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const Extents e(plan);
  Arena arena(workspace);
  const Buffers buffers(pass, executor.workers, arena);
  const Tiles tiles(plan);
  const int64_t splits = plan.transform.tile_splits;
  const int64_t chunks = ceil_div(tiles.count, e.tiles);
  const auto scratch_of = [&](int64_t worker) {
    Arena scratch(buffers.workers + worker * buffers.worker_bytes);
    return Scratch(pass, scratch);
  };
  for_each_task(executor, block_count(plan, e) * splits, [&](int64_t task, int64_t worker) {
    Scratch scratch = scratch_of(worker);
    scratch.source.clear();
    scratch.grad.clear();
    const Block block = block_of(plan, e, task / splits, task % splits);
    float* sums = splits > 1 ? buffers.partials + task * e.sums : scratch.sums;
    const int64_t begin = chunks * block.split / splits;
    const int64_t end = chunks * (block.split + 1) / splits;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t count = std::min(e.tiles, tiles.count - chunk * e.tiles);
      transform_tiles(pass, e, block, chunk * e.tiles, count, scratch);
      accumulate(plan, e, block, count, chunk == begin, scratch, sums);
    }
    if (splits == 1) store_taps(pass, e, block, sums, scratch);
  });
  if (splits == 1) return;
  // Splits are added in order.
  for_each_task(executor, block_count(plan, e), [&](int64_t task, int64_t worker) {
    float* sums = buffers.partials + task * splits * e.sums;
    for (int64_t split = 1; split < splits; ++split) {
      const float* part = sums + split * e.sums;
      for (int64_t i = 0; i < e.sums; ++i) sums[i] += part[i];
    }
    store_taps(pass, e, block_of(plan, e, task, 0), sums, scratch_of(worker));
  });
}

}  // namespace segpose
