// SPDX-License-Identifier: BSD-3-Clause
#include "split_wgrad.h"

#include <algorithm>
#include <cstring>

namespace segpose {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kPanelColumns = 2 * kTileColumns;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One microkernel call: up to four tiles of (filter tile, tap) against one panel of channels of one plane.
struct Call {
  int64_t plane, panel, count;
  int64_t grad_tile[kMaxRowTiles], tap[kMaxRowTiles];
};

// Extents in bytes of the packed operands of a block, for one group.
struct Layout {
  int64_t positions, lead, grad_row, grad_term, grad_size;
  int64_t panel, plane, source_size;

  explicit Layout(const Plan& plan) {
    const SplitWgradPlan& split = plan.split_wgrad;
    positions = split.positions();
    // Zeros before and after the line: a step reads up to most_shift positions before its own. An odd number of cache
    // lines keeps the rows of a tile in different sets.
    lead = round_up(split.most_shift() + kTileDepth, kTileDepth);
    grad_row = (round_up((lead + positions) * 2, kLine) / kLine | 1) * kLine;
    grad_term = split.grad_tiles * kTileRows * grad_row;
    grad_size = split.terms * grad_term;
    const int64_t tiles = ceil_div(plan.problem.c_per_group(), kTileColumns);
    panel = positions / kTileDepth * split.terms * 2 * kTileBytes;
    plane = positions / kTileDepth * split.terms * tiles * kTileBytes;
    source_size = plane * static_cast<int64_t>(split.planes.residues.size());
  }
};

int64_t panel_tiles(const Plan& plan, int64_t panel) {
  return plan.problem.c_per_group() - panel * kPanelColumns > kTileColumns ? 2 : 1;
}

// Pairs of filter tiles first, then the taps: a pair of gradient tiles stays in L2 for all taps of a plane.
std::vector<Call> list_calls(const Plan& plan) {
  const SplitWgradPlan& split = plan.split_wgrad;
  const std::vector<PlaneTap>& taps = split.planes.taps.front();
  std::vector<Call> calls;
  for (int64_t panel = 0; panel < split.panels; ++panel) {
    const int64_t most = panel_tiles(plan, panel) == 2 ? 2 : kMaxRowTiles;
    for (size_t plane = 0; plane < split.planes.residues.size(); ++plane) {
      const size_t first = calls.size();
      for (int64_t tile = 0; tile < split.grad_tiles; tile += 2) {
        for (size_t t = 0; t < taps.size(); ++t) {
          if (taps[t].plane != static_cast<int64_t>(plane)) continue;
          for (int64_t k = tile; k < std::min(tile + 2, split.grad_tiles); ++k) {
            if (calls.size() == first || calls.back().count == most) {
              calls.push_back({static_cast<int64_t>(plane), panel, 0, {}, {}});
            }
            Call& call = calls.back();
            call.grad_tile[call.count] = k;
            call.tap[call.count++] = static_cast<int64_t>(t);
          }
        }
      }
    }
  }
  return calls;
}

// A rectangular piece of the pixels, of one group.
struct Block {
  int64_t group, first_image, images, first_row, rows;
};

// A side of the product: the tensor where its rows can be read, or a staged copy of the block's rows.
struct Side {
  MaskedSource source;
  float* staged;  // [image][row][w][c] of the block, or null

  bool in_place() const { return source.mask == nullptr && (source.view.stride_c == 1 || source.view.c == 1); }
};

struct Buffers {
  char* grad;
  char* source;
  float* sums;  // [call][4][256]
  float* grad_rows;
  float* source_rows;
  float* row;    // [worker] one row and its mask
  float* zeros;  // a pixel of padding
  SplitStep* steps;

  Buffers(const WgradPass& pass, size_t calls, int64_t workers, Arena& arena) {
    const Plan& plan = *pass.plan;
    const SplitWgradPlan& split = plan.split_wgrad;
    const Layout layout(plan);
    grad = arena.take<char>(layout.grad_size);
    source = arena.take<char>(layout.source_size);
    sums = arena.take<float>(static_cast<int64_t>(calls) * kMaxRowTiles * kTileFloats);
    const TensorView& g = pass.grad.view;
    const TensorView& x = pass.activation.view;
    const int64_t source_rows_count =
        std::min(x.h, (split.rows - 1 + split.planes.span_h) * split.planes.istep_h + split.planes.istep_h);
    grad_rows =
        Side{pass.grad, nullptr}.in_place() ? nullptr : arena.take<float>(split.images * split.rows * g.w * g.c);
    source_rows = Side{pass.activation, nullptr}.in_place()
                      ? nullptr
                      : arena.take<float>(split.images * source_rows_count * x.w * x.c);
    row = arena.take<float>(workers * std::max(source_row_scratch(pass.grad), source_row_scratch(pass.activation)));
    zeros = arena.take<float>(std::max(g.c, x.c) + kTileColumns);
    steps = arena.take<SplitStep>(layout.positions / kTileDepth);
  }
};

// Pixels of a side for a block: what a line's positions point to.
struct Pixels {
  const char* data;
  DType dtype;
  int64_t first_image, first_row;  // that the data begin with
  int64_t stride_n, stride_h, stride_w;

  const void* at(int64_t n, int64_t h, int64_t w) const {
    return data + ((n - first_image) * stride_n + (h - first_row) * stride_h + w * stride_w) * dtype_size(dtype);
  }
};

Pixels pixels_of(const Plan& plan, const MaskedSource& source, const Block& block, int64_t first_row, int64_t rows,
                 float* staged, float* row, const Executor& executor) {
  const TensorView& view = source.view;
  if (staged == nullptr) {
    return {static_cast<const char*>(view.data), view.dtype, 0, 0, view.stride_n, view.stride_h, view.stride_w};
  }
  const Ukernels<float>& kernels = ukernels<float>(plan.isa);
  const int64_t size = view.w * view.c;
  for_each_task(executor, block.images * rows, [&](int64_t task, int64_t worker) {
    float* temporary = row + worker * source_row_scratch(source);
    load_source_row(kernels, source, block.first_image + task / rows, first_row + task % rows, temporary);
    std::copy_n(temporary, size, staged + task * size);
  });
  return {
      reinterpret_cast<const char*>(staged), DType::float32, block.first_image, first_row, rows * size, size, view.c};
}

// Coordinates along the positions of a line.
struct Place {
  int64_t inner, pixel, row, outer;

  Place(const SplitWgradPlan& split, int64_t position)
      : inner(position % split.inner),
        pixel(position / split.inner % split.planes.pitch),
        row(position / (split.inner * split.planes.pitch) % split.height()),
        outer(position / (split.inner * split.planes.pitch * split.height())) {}

  int64_t image(const SplitWgradPlan& split) const { return outer * split.inner + inner; }

  void advance(const SplitWgradPlan& split) {
    if (++inner < split.inner) return;
    inner = 0;
    if (++pixel < split.planes.pitch) return;
    pixel = 0;
    if (++row < split.height()) return;
    row = 0;
    ++outer;
  }
};

// 32 positions of the gradient line: [filter][position].
void pack_grad(const Plan& plan, const Layout& layout, const Block& block, const Pixels& pixels, const float* zeros,
               int64_t step, char* packed) {
  const SplitWgradPlan& split = plan.split_wgrad;
  const ConvProblem& problem = plan.problem;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const int64_t filters = problem.k_per_group();
  const void* rows[kTileDepth];
  Place place(split, step * kTileDepth);
  for (int64_t i = 0; i < kTileDepth; ++i, place.advance(split)) {
    const int64_t image = place.image(split);
    const bool valid = image < block.images && place.row < block.rows && place.pixel < problem.q;
    rows[i] = valid ? pixels.at(block.first_image + image, block.first_row + place.row, place.pixel) : zeros;
  }
  char* out = packed + (layout.lead + step * kTileDepth) * 2;
  for (int64_t tile = 0; tile < split.grad_tiles; ++tile) {
    const int64_t filter = tile * kTileRows;
    kernels.transpose_rows(pixels.dtype, rows, block.group * filters + filter,
                           std::min<int64_t>(kTileRows, filters - filter), static_cast<int>(split.terms),
                           out + filter * layout.grad_row, layout.grad_row, layout.grad_term);
  }
}

// 32 positions of one plane of the activation: tiles of B.
void pack_source(const Plan& plan, const Layout& layout, const Block& block, const Pixels& pixels, const float* zeros,
                 int64_t plane, int64_t step, char* packed) {
  const SplitWgradPlan& split = plan.split_wgrad;
  const ConvProblem& problem = plan.problem;
  const Planes& planes = split.planes;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const int64_t channels = problem.c_per_group();
  const Planes::Residue& residue = planes.residues[static_cast<size_t>(plane)];
  const void* rows[kTileDepth];
  Place place(split, step * kTileDepth);
  for (int64_t i = 0; i < kTileDepth; ++i, place.advance(split)) {
    const int64_t image = place.image(split);
    const int64_t h = planes.source_h(residue, block.first_row + place.row);
    const int64_t w = planes.source_w(residue, place.pixel);
    const bool valid = image < block.images && place.row < block.rows + planes.span_h && h >= 0 && h < problem.h &&
                       w >= 0 && w < problem.w;
    rows[i] = valid ? pixels.at(block.first_image + image, h, w) : zeros;
  }
  char* out = packed + plane * layout.plane;
  for (int64_t panel = 0; panel < split.panels; ++panel, out += layout.panel) {
    const int64_t tiles = panel_tiles(plan, panel);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t channel = panel * kPanelColumns + tile * kTileColumns;
      kernels.pair_rows(pixels.dtype, rows, block.group * channels + channel,
                        std::min<int64_t>(kTileColumns, channels - channel), static_cast<int>(split.terms),
                        out + (step * split.terms * tiles + tile) * kTileBytes, tiles * kTileBytes);
    }
  }
}

// Both sides of a block. A task takes neighbouring steps: their lines of the gradient follow each other.
void pack_block(const Plan& plan, const Layout& layout, const Block& block, const Pixels& grad, const Pixels& source,
                const Buffers& buffers, const Executor& executor) {
  constexpr int64_t kStepsPerTask = 4;
  const int64_t steps = layout.positions / kTileDepth;
  const int64_t tasks = ceil_div(steps, kStepsPerTask);
  const int64_t planes = static_cast<int64_t>(plan.split_wgrad.planes.residues.size());
  for_each_task(executor, (planes + 1) * tasks, [&](int64_t task, int64_t) {
    const int64_t plane = task / tasks - 1;
    const int64_t begin = task % tasks * kStepsPerTask;
    for (int64_t step = begin; step < std::min(begin + kStepsPerTask, steps); ++step) {
      if (plane < 0) {
        pack_grad(plan, layout, block, grad, buffers.zeros, step, buffers.grad);
      } else {
        pack_source(plan, layout, block, source, buffers.zeros, plane, step, buffers.source);
      }
    }
  });
}

void multiply(const Plan& plan, const Layout& layout, const Block& block, const std::vector<Call>& calls,
              const Buffers& buffers, bool first, const Executor& executor) {
  const SplitWgradPlan& split = plan.split_wgrad;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const std::vector<PlaneTap>& taps = split.planes.taps.front();
  // Positions of the gradient that are not zero.
  const int64_t used =
      (((ceil_div(block.images, split.inner) - 1) * split.height() + block.rows - 1) * split.planes.pitch +
       plan.problem.q) *
      split.inner;
  for_each_task(executor, static_cast<int64_t>(calls.size()), [&](int64_t task, int64_t) {
    const Call& call = calls[static_cast<size_t>(task)];
    const int64_t tiles = panel_tiles(plan, call.panel);
    const SplitShape& shape = tiles == 1 ? kernels.narrow : call.count == 1 ? kernels.flat : kernels.wide;
    int64_t begin = layout.positions;
    int64_t end = 0;
    SplitGemmArgs args{};
    for (int t = 0; t < shape.row_tiles; ++t) {
      const int64_t slot = std::min<int64_t>(t, call.count - 1);
      const int64_t shift = split.shift(taps[static_cast<size_t>(call.tap[slot])]);
      args.a[t] = buffers.grad + call.grad_tile[slot] * kTileRows * layout.grad_row + (layout.lead - shift) * 2;
      begin = std::min(begin, shift / kTileDepth);
      end = std::max(end, std::min(ceil_div(shift + used, kTileDepth), layout.positions / kTileDepth));
    }
    // The steps of both kinds of panel differ in the size of B only.
    const int64_t step_bytes = split.terms * tiles * kTileBytes;
    args.a_row = layout.grad_row;
    args.a_term = layout.grad_term;
    args.b = buffers.source + call.plane * layout.plane + call.panel * layout.panel;
    args.steps = buffers.steps;
    args.count = 1;
    args.blocks = end - begin;
    args.a_block = kTileDepth * 2;
    args.b_block = step_bytes;
    for (int t = 0; t < shape.row_tiles; ++t) args.a[t] += begin * args.a_block;
    args.b += begin * args.b_block;
    args.out_row_tile = tiles * kTileFloats;
    args.out_column_tile = kTileFloats;
    args.out = buffers.sums + task * kMaxRowTiles * kTileFloats;
    args.in = first ? nullptr : args.out;
    kernels.begin();
    shape.run[split.terms - 1](args);
    kernels.end();
  });
}

// [K][C / groups][R][S] with the filter's strides and dtype.
void store_sums(const WgradPass& pass, int64_t group, const std::vector<Call>& calls, const float* sums,
                const Executor& executor) {
  const Plan& plan = *pass.plan;
  const FilterView& out = pass.destination;
  const std::vector<Tap>& taps = plan.phases.front().taps;
  const int64_t filters = plan.problem.k_per_group();
  const int64_t channels = plan.problem.c_per_group();
  for_each_task(executor, static_cast<int64_t>(calls.size()), [&](int64_t task, int64_t) {
    const Call& call = calls[static_cast<size_t>(task)];
    const int64_t tiles = panel_tiles(plan, call.panel);
    for (int64_t slot = 0; slot < call.count; ++slot) {
      const Tap& tap = taps[static_cast<size_t>(call.tap[slot])];
      const int64_t filter = call.grad_tile[slot] * kTileRows;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* values = sums + (task * kMaxRowTiles + slot * tiles + tile) * kTileFloats;
        const int64_t channel = call.panel * kPanelColumns + tile * kTileColumns;
        for (int64_t k = 0; k < std::min<int64_t>(kTileRows, filters - filter); ++k) {
          const int64_t start = (group * filters + filter + k) * out.stride_k + channel * out.stride_c +
                                tap.r * out.stride_r + tap.s * out.stride_s;
          for (int64_t c = 0; c < std::min<int64_t>(kTileColumns, channels - channel); ++c) {
            store_element(out.data, out.dtype, start + c * out.stride_c, values[k * kTileColumns + c]);
          }
        }
      }
    }
  });
}

}  // namespace

int64_t split_wgrad_workspace(const WgradPass& pass, int64_t workers) {
  Arena arena(nullptr);
  const Buffers buffers(pass, list_calls(*pass.plan).size(), workers, arena);
  return arena.used();
}

void run_split_wgrad(const WgradPass& pass, void* workspace, const Executor& executor) {
  const Plan& plan = *pass.plan;
  const SplitWgradPlan& split = plan.split_wgrad;
  const ConvProblem& problem = plan.problem;
  const Layout layout(plan);
  const std::vector<Call> calls = list_calls(plan);
  Arena arena(workspace);
  const Buffers buffers(pass, calls.size(), executor.workers, arena);
  std::fill_n(buffers.zeros, std::max(pass.grad.view.c, pass.activation.view.c) + kTileColumns, 0.0f);
  buffers.steps[0] = {0, 0};
  for (int64_t row = 0; row < split.terms * split.grad_tiles * kTileRows; ++row) {
    std::memset(buffers.grad + row * layout.grad_row, 0, static_cast<size_t>(layout.lead * 2));
  }
  const Planes& planes = split.planes;
  for (int64_t group = 0; group < problem.groups; ++group) {
    bool first = true;
    for (int64_t image = 0; image < problem.n; image += split.images) {
      for (int64_t row = 0; row < problem.p; row += split.rows) {
        const Block block{group, image, std::min(split.images, problem.n - image), row,
                          std::min(split.rows, problem.p - row)};
        const Pixels grad =
            pixels_of(plan, pass.grad, block, block.first_row, block.rows, buffers.grad_rows, buffers.row, executor);
        const int64_t source_begin = std::max<int64_t>((row + planes.first_h) * planes.istep_h, 0);
        const int64_t source_end =
            std::min((row + block.rows + planes.span_h + planes.first_h) * planes.istep_h, problem.h);
        const Pixels source =
            pixels_of(plan, pass.activation, block, source_begin, std::max<int64_t>(source_end - source_begin, 0),
                      buffers.source_rows, buffers.row, executor);
        pack_block(plan, layout, block, grad, source, buffers, executor);
        multiply(plan, layout, block, calls, buffers, first, executor);
        first = false;
      }
    }
    store_sums(pass, group, calls, buffers.sums, executor);
  }
}

}  // namespace segpose
