// SPDX-License-Identifier: BSD-3-Clause
#include "winograd.h"

#include <algorithm>

#include "row_table.h"
#include "staging.h"

namespace segpose {
namespace {

// Channels of a filter that are repacked before they are transformed: 9 taps x 32 x 64 floats stay in L2.
constexpr int64_t kFilterChannels = 32;
// One cache line more than a power of two: the frequencies of a tile must not share cache sets.
constexpr int64_t kSkew = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
const WinogradCodelets<T>& codelets(const Plan& plan) {
  const Ukernels<T>& kernels = ukernels<T>(plan.isa);
  int variant = 0;
  while (kernels.winograd[variant].r != plan.winograd_r) ++variant;
  return kernels.winograd[variant];
}

// Extents that follow from the plan: what a frequency occupies in the transformed filter, input and product.
struct Extents {
  int64_t m, n, frequencies, depth, rows, filter_step, group_size, v_step, v_row, m_step, m_row;

  explicit Extents(const Plan& plan)
      : m(plan.winograd_m),
        n(plan.winograd_m + plan.winograd_r - 1),
        frequencies(n * n),
        depth(plan.depth()),
        rows(plan.block_m),
        filter_step(depth * plan.padded_columns() + kSkew),
        group_size(frequencies * filter_step),
        v_row(round_up(depth, kSkew)),
        m_row(0) {
    for (const Panel& panel : plan.panels) m_row = std::max(m_row, panel.nr);
    m_row *= plan.panels_per_task;
    v_step = rows * v_row + kSkew;
    m_step = rows * m_row + kSkew;
  }
};

template <class T>
struct Scratch {
  T* v;              // [frequency][tile][channel]
  T* product;        // [frequency][tile][column]
  const T** v_rows;  // [tile]
  T** product_rows;  // [tile]
  T** out;           // [tile][m * m] destination pixels, null outside the image
  int64_t* offsets;  // [tile][m * m] their element offsets
  T* pixels;         // [tile][m * m][columns] on their way to another layout or dtype
  T* taps;           // filters of one panel before their transform

  Scratch(const Plan& plan, bool direct, Arena& arena) {
    const Extents e(plan);
    v = arena.take<T>(e.frequencies * e.v_step);
    product = arena.take<T>(e.frequencies * e.m_step);
    v_rows = arena.take<const T*>(e.rows);
    product_rows = arena.take<T*>(e.rows);
    out = arena.take<T*>(e.rows * e.m * e.m);
    offsets = arena.take<int64_t>(e.rows * e.m * e.m);
    pixels = direct ? nullptr : arena.take<T>(e.rows * e.m * e.m * e.m_row);
    taps = arena.take<T>(plan.winograd_r * plan.winograd_r * kFilterChannels * e.m_row);
  }
};

// Tiles of a phase, counted over (image, tile row, tile column).
struct Tiles {
  int64_t rows, cols, count;

  Tiles(const Plan& plan, const Phase& phase)
      : rows(ceil_div(phase.rows, plan.winograd_m)),
        cols(ceil_div(phase.cols, plan.winograd_m)),
        count(plan.problem.n * rows * cols) {}
};

struct Block {
  int64_t phase, group, panel_begin, panel_end, first, count;
};

template <class T>
void transform_input(const GatherLaunch<T>& launch, const Block& block, const Extents& e, const Scratch<T>& scratch) {
  const Phase& phase = launch.plan->phases[static_cast<size_t>(block.phase)];
  const Tiles tiles(*launch.plan, phase);
  const WinogradCodelets<T>& codelet = codelets<T>(*launch.plan);
  const TensorView& source = launch.source;
  const T* data = source.template as<T>() + block.group * e.depth;
  const T* pixels[kWinogradMaxN * kWinogradMaxN];
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t tile = block.first + t;
    const int64_t h0 = tile / tiles.cols % tiles.rows * e.m + phase.taps.front().off_h;
    const int64_t w0 = tile % tiles.cols * e.m + phase.taps.front().off_w;
    const int64_t n = tile / (tiles.cols * tiles.rows);
    for (int64_t i = 0; i < e.n; ++i) {
      for (int64_t j = 0; j < e.n; ++j) {
        const int64_t h = h0 + i;
        const int64_t w = w0 + j;
        const bool inside = h >= 0 && h < source.h && w >= 0 && w < source.w;
        pixels[i * e.n + j] = inside ? data + source.offset(n, h, w) : launch.zeros;
      }
    }
    codelet.input(pixels, e.depth, scratch.v + t * e.v_row, e.v_step);
  }
  // Tiles up to the height of the microkernel are computed too; keep them free of denormals.
  for (int64_t f = 0; f < e.frequencies; ++f) {
    std::fill(scratch.v + f * e.v_step + block.count * e.v_row, scratch.v + f * e.v_step + e.rows * e.v_row, T{0});
  }
  for (int64_t t = 0; t < e.rows; ++t) scratch.v_rows[t] = scratch.v + t * e.v_row;
}

// One GEMM per frequency: product[f] = v[f] * filter[f] for the block's panels.
template <class T>
void multiply(const Plan& plan, const Block& block, const Extents& e, const T* filter, const Scratch<T>& scratch) {
  const Ukernels<T>& kernels = ukernels<T>(plan.isa);
  const int64_t first_column = plan.panels[static_cast<size_t>(block.panel_begin)].column;
  const int32_t only_tap = 0;
  GemmArgs<T> args{};
  args.taps = &only_tap;
  args.count = 1;
  args.depth = e.depth;
  args.activation = Activation::none;
  for (int64_t f = 0; f < e.frequencies; ++f) {
    args.a_offset = f * e.v_step;
    for (int64_t p = block.panel_begin; p < block.panel_end; ++p) {
      const Panel& panel = plan.panels[static_cast<size_t>(p)];
      const GemmTile<T>& tile = kernels.gemm[panel.tile];
      args.b = filter + f * e.filter_step + panel.column * e.depth;
      args.columns = panel.nr;
      T* product = scratch.product + f * e.m_step + panel.column - first_column;
      for (int64_t t = 0; t < e.rows; ++t) scratch.product_rows[t] = product + t * e.m_row;
      for (int64_t t = 0; t < block.count; t += tile.mr) {
        args.a = scratch.v_rows + t;
        args.out = scratch.product_rows + t;
        tile.run(args);
      }
    }
  }
}

template <class T>
void transform_output(const GatherLaunch<T>& launch, const Block& block, const Extents& e, const Scratch<T>& scratch) {
  const Plan& plan = *launch.plan;
  const Phase& phase = plan.phases[static_cast<size_t>(block.phase)];
  const Tiles tiles(plan, phase);
  const WinogradCodelets<T>& codelet = codelets<T>(plan);
  const TensorView& destination = launch.destination;
  const bool direct = destination.has_channel_rows(compute_dtype<T>());
  const Panel& first = plan.panels[static_cast<size_t>(block.panel_begin)];
  const Panel& last = plan.panels[static_cast<size_t>(block.panel_end - 1)];
  const int64_t columns = last.column + last.columns - first.column;
  const int64_t channel = block.group * plan.columns() + first.column;
  const T* bias = launch.bias == nullptr ? nullptr : launch.bias + block.group * plan.padded_columns() + first.column;
  int64_t written = 0;
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t tile = block.first + t;
    const int64_t row = tile / tiles.cols % tiles.rows * e.m;
    const int64_t col = tile % tiles.cols * e.m;
    const int64_t n = tile / (tiles.cols * tiles.rows);
    T** out = scratch.out + t * e.m * e.m;
    for (int64_t i = 0; i < e.m; ++i) {
      for (int64_t j = 0; j < e.m; ++j) {
        T*& pixel = out[i * e.m + j];
        pixel = nullptr;
        if (row + i >= phase.rows || col + j >= phase.cols) continue;
        const int64_t offset =
            destination.offset(n, phase.oh + (row + i) * phase.ostep_h, phase.ow + (col + j) * phase.ostep_w);
        pixel = direct ? destination.template as<T>() + offset + channel : scratch.pixels + written * e.m_row;
        scratch.offsets[written++] = offset;
      }
    }
    codelet.output(scratch.product + t * e.m_row, e.m_step, columns, launch.epilogue, bias, out);
  }
  if (!direct) {
    unstage_block(ukernels<T>(plan.isa), scratch.pixels, e.m_row, written, columns, destination, scratch.offsets,
                  channel);
  }
}

template <class T>
void transform_filters(const Plan& plan, const FilterView& filter, const Extents& e, T* transformed, char* scratch_base,
                       int64_t scratch_bytes, bool direct, const Executor& executor) {
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  const int64_t chunks = ceil_div(e.depth, kFilterChannels);
  const int64_t groups = plan.gemm_groups();
  const WinogradCodelets<T>& codelet = codelets<T>(plan);
  for_each_task(
      executor, static_cast<int64_t>(plan.phases.size()) * groups * panels * chunks, [&](int64_t task, int64_t worker) {
        Arena arena(scratch_base + worker * scratch_bytes);
        const Scratch<T> scratch(plan, direct, arena);
        const int64_t begin = task % chunks * kFilterChannels;
        const int64_t count = std::min(kFilterChannels, e.depth - begin);
        const Panel& panel = plan.panels[static_cast<size_t>(task / chunks % panels)];
        const int64_t group = task / (chunks * panels) % groups;
        const int64_t phase = task / (chunks * panels * groups);
        const int64_t tap_step = count * panel.nr;
        const auto& taps = plan.phases[static_cast<size_t>(phase)].taps;
        for (size_t t = 0; t < taps.size(); ++t) {
          pack_tap(plan, filter, taps[t], group, panel, begin, count,
                   scratch.taps + static_cast<int64_t>(t) * tap_step);
        }
        T* u = transformed + (phase * groups + group) * e.group_size + panel.column * e.depth + begin * panel.nr;
        for (int64_t c = 0; c < count; ++c) {
          codelet.filter(scratch.taps + c * panel.nr, tap_step, panel.nr, u + c * panel.nr, e.filter_step);
        }
      });
}

}  // namespace

int64_t winograd_filter_size(const Plan& plan) {
  return static_cast<int64_t>(plan.phases.size()) * plan.gemm_groups() * Extents(plan).group_size;
}

template <class T>
int64_t winograd_scratch(const Plan& plan) {
  Arena arena(nullptr);
  Scratch<T> scratch(plan, false, arena);
  return arena.used();
}

template <class T>
void launch_winograd(const GatherLaunch<T>& launch, const FilterView& filter, T* transformed,
                     const Executor& executor) {
  const Plan& plan = *launch.plan;
  const Extents e(plan);
  const bool direct = launch.destination.has_channel_rows(compute_dtype<T>());
  const int64_t scratch_bytes = winograd_scratch<T>(plan);
  transform_filters(plan, filter, e, transformed, launch.scratch, scratch_bytes, direct, executor);
  std::vector<Block> blocks;
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  for (size_t p = 0; p < plan.phases.size(); ++p) {
    const Tiles tiles(plan, plan.phases[p]);
    for (int64_t group = 0; group < plan.gemm_groups(); ++group) {
      for (int64_t split = 0; split < plan.splits; ++split) {
        for (int64_t first = 0; first < tiles.count; first += plan.block_m) {
          blocks.push_back({static_cast<int64_t>(p), group, panels * split / plan.splits,
                            panels * (split + 1) / plan.splits, first, std::min(plan.block_m, tiles.count - first)});
        }
      }
    }
  }
  for_each_task(executor, static_cast<int64_t>(blocks.size()), [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch<T> scratch(plan, direct, arena);
    Block block = blocks[static_cast<size_t>(task)];
    transform_input(launch, block, e, scratch);
    const T* u = transformed + (block.phase * plan.gemm_groups() + block.group) * e.group_size;
    const int64_t end = block.panel_end;
    for (; block.panel_begin < end; block.panel_begin = block.panel_end) {
      block.panel_end = std::min(block.panel_begin + plan.panels_per_task, end);
      multiply(plan, block, e, u, scratch);
      transform_output(launch, block, e, scratch);
    }
  });
}

template int64_t winograd_scratch<float>(const Plan&);
template int64_t winograd_scratch<double>(const Plan&);
template void launch_winograd<float>(const GatherLaunch<float>&, const FilterView&, float*, const Executor&);
template void launch_winograd<double>(const GatherLaunch<double>&, const FilterView&, double*, const Executor&);

}  // namespace segpose
