// SPDX-License-Identifier: BSD-3-Clause
#include "transform_wgrad.h"

#include <algorithm>

#include "tile_reader.h"

namespace segpose {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Extents in floats. X: transformed tiles of the activation, G: of the gradient, [frequency][line][tile][parts][vector];
// S: sums [frequency][channel][filter line][parts][vector], the channels padded to whole tiles of the microkernel.
struct Extents {
  int64_t vector, value, tiles;
  int64_t channels, filters, channel_lines, filter_lines;
  int64_t line, x_frequency, g_frequency, s_row, s_frequency;

  explicit Extents(const Plan& plan)
      : vector(transform_ukernels(plan.isa).vector_length),
        value(plan.transform.parts * vector),
        tiles(plan.transform.tiles),
        channels(plan.problem.c_per_group()),
        filters(plan.problem.k_per_group()) {
    const ReduceTile& tile = plan.transform.parts == 2 ? transform_ukernels(plan.isa).reduce_complex
                                                       : transform_ukernels(plan.isa).reduce_real;
    channel_lines = ceil_div(channels, vector);
    filter_lines = round_up(ceil_div(filters, vector), tile.vectors);
    line = tiles * value;
    // One cache line apart from a power of two, as in transform_conv.cpp.
    x_frequency = channel_lines * line + vector;
    g_frequency = filter_lines * line + vector;
    s_row = filter_lines * value;
    s_frequency = channel_lines * vector * s_row + vector;
  }
};

struct Buffers {
  float* x;
  float* g;
  float* sums;
  char* workers;
  int64_t worker_bytes;

  Buffers(const WgradPass& pass, int64_t count, Arena& arena);
};

// What one worker needs: to read tiles of either side, to hold the taps of one line of channels.
struct Scratch {
  TileReader source, grad;
  float* taps;  // [vector of channels][r * r][filters]

  Scratch(const WgradPass& pass, Arena& arena)
      : source(pass.plan->isa, pass.activation, pass.plan->transform.n, arena),
        grad(pass.plan->isa, pass.grad, pass.plan->transform.m, arena) {
    const Extents e(*pass.plan);
    taps = arena.take<float>(e.vector * pass.plan->transform.r * pass.plan->transform.r * e.filter_lines * e.vector);
  }
};

Buffers::Buffers(const WgradPass& pass, int64_t count, Arena& arena) {
  const Extents e(*pass.plan);
  const int64_t frequencies = pass.plan->transform.frequencies;
  x = arena.take<float>(frequencies * e.x_frequency);
  g = arena.take<float>(frequencies * e.g_frequency);
  sums = arena.take<float>(frequencies * e.s_frequency);
  Arena measure(nullptr);
  const Scratch scratch(pass, measure);
  worker_bytes = measure.used();
  workers = arena.take<char>(count * worker_bytes);
}

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

void transform_tiles(const WgradPass& pass, const Extents& e, int64_t group, int64_t first, int64_t count,
                     const Buffers& buffers, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const TransformPlan& transform = plan.transform;
  const Codelets codelets(plan);
  const Tiles tiles(plan);
  const Tap& tap = plan.phases.front().taps.front();
  // Neighbouring tiles of a task share what the reader has staged.
  constexpr int64_t kTilesPerTask = 8;
  for_each_task(executor, ceil_div(count, kTilesPerTask), [&](int64_t task, int64_t worker) {
    Arena arena(buffers.workers + worker * buffers.worker_bytes);
    Scratch scratch(pass, arena);
    scratch.source.clear();
    scratch.grad.clear();
    for (int64_t t = task * kTilesPerTask; t < std::min((task + 1) * kTilesPerTask, count); ++t) {
      const int64_t tile = first + t;
      const int64_t image = tile / (tiles.cols * tiles.rows);
      const int64_t row = tile / tiles.cols % tiles.rows * transform.m;
      const int64_t col = tile % tiles.cols * transform.m;
      const TileRows x =
          scratch.source.read(image, row + tap.off_h, col + tap.off_w, group * e.channels, e.channels);
      codelets.input.input(x.rows, x.pixel_step, e.channels, buffers.x + t * e.value, e.x_frequency, e.line);
      const TileRows g = scratch.grad.read(image, row, col, group * e.filters, e.filters);
      codelets.adjoint.filter(g.rows, transform.m, g.pixel_step, e.filters, buffers.g + t * e.value, e.g_frequency,
                              e.line);
    }
  });
}

void accumulate(const Plan& plan, const Extents& e, int64_t count, bool first, const Buffers& buffers,
                const Executor& executor) {
  const TransformUkernels& kernels = transform_ukernels(plan.isa);
  const ReduceTile& tile = plan.transform.parts == 2 ? kernels.reduce_complex : kernels.reduce_real;
  const int64_t panels = e.filter_lines / tile.vectors;
  for_each_task(executor, plan.transform.frequencies * e.channel_lines, [&](int64_t task, int64_t) {
    const int64_t f = task / e.channel_lines;
    const int64_t line = task % e.channel_lines;
    ReduceArgs args{};
    args.count = count;
    args.b_line = e.line;
    args.out_step = e.s_row;
    args.first = first;
    const float* x = buffers.x + f * e.x_frequency + line * e.line;
    float* sums = buffers.sums + f * e.s_frequency + line * e.vector * e.s_row;
    for (int64_t panel = 0; panel < panels; ++panel) {
      args.b = buffers.g + f * e.g_frequency + panel * tile.vectors * e.line;
      const int64_t valid = std::min(e.vector, e.channels - line * e.vector);
      for (int64_t c = 0; c < valid; c += tile.mr) {
        args.a = x + c;
        args.out = sums + c * e.s_row + panel * tile.vectors * e.value;
        tile.run(args);
      }
    }
  });
}

// Back to taps, a line of channels at a time, and to [K][C / groups][R][S] with the filter's strides and dtype.
void store_taps(const WgradPass& pass, const Extents& e, int64_t group, const Buffers& buffers,
                const Executor& executor) {
  const Plan& plan = *pass.plan;
  const TransformPlan& transform = plan.transform;
  const Codelets codelets(plan);
  const FilterView& out = pass.destination;
  const std::vector<Tap>& taps = plan.phases.front().taps;
  const int64_t area = transform.r * transform.r;
  const int64_t width = e.filter_lines * e.vector;
  for_each_task(executor, e.channel_lines, [&](int64_t line, int64_t worker) {
    Arena arena(buffers.workers + worker * buffers.worker_bytes);
    const Scratch scratch(pass, arena);
    const int64_t begin = line * e.vector;
    const int64_t count = std::min(e.vector, e.channels - begin);
    for (int64_t c = 0; c < count; ++c) {
      float* pixels[kMaxTransformN * kMaxTransformN];
      for (int64_t t = 0; t < area; ++t) pixels[t] = scratch.taps + (c * area + t) * width;
      codelets.adjoint.output(buffers.sums + (begin + c) * e.s_row, transform.r, e.s_frequency, e.value, width,
                              {Activation::none, 1.0}, nullptr, pixels);
    }
    for (int64_t k = 0; k < e.filters; ++k) {
      for (int64_t t = 0; t < area; ++t) {
        const Tap& tap = taps[static_cast<size_t>(t)];
        const int64_t start = (group * e.filters + k) * out.stride_k + begin * out.stride_c + tap.r * out.stride_r +
                              tap.s * out.stride_s;
        for (int64_t c = 0; c < count; ++c) {
          store_element(out.data, out.dtype, start + c * out.stride_c, scratch.taps[(c * area + t) * width + k]);
        }
      }
    }
  });
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
  for (int64_t group = 0; group < plan.problem.groups; ++group) {
    for (int64_t first = 0; first < tiles.count; first += e.tiles) {
      const int64_t count = std::min(e.tiles, tiles.count - first);
      transform_tiles(pass, e, group, first, count, buffers, executor);
      accumulate(plan, e, count, first == 0, buffers, executor);
    }
    store_taps(pass, e, group, buffers, executor);
  }
}

}  // namespace segpose
