// SPDX-License-Identifier: BSD-3-Clause
#include "split_wgrad.h"

#include <algorithm>
#include <cstring>

#include "../common/integers.h"

namespace segpose {
namespace {

constexpr int64_t kLine = 64;

// A tile of columns: 16 channels of the plane that a tap reads.
struct Column {
  int64_t plane, tap, tile;
};

// One microkernel call: two filter tiles against two or three columns, or four against one.
struct Call {
  int64_t first, filters;
  int64_t count;
  Column columns[kMaxColumnTiles];
};

// Extents in bytes of the packed operands of a block, for one group. Every step of either side is a tile in one piece.
struct Layout {
  int64_t grad_tile, grad_term, grad_size;                                   // [term][filter tile][step]
  int64_t pairs, source_term, source_copy, source_tile, plane, source_size;  // [plane][channel tile][copy][term][pair]

  explicit Layout(const Plan& plan) {
    const SplitWgradPlan& split = plan.split_wgrad;
    grad_tile = split.positions() / kTileDepth * kTileBytes;
    grad_term = split.grad_tiles * grad_tile;
    grad_size = split.terms * grad_term;
    pairs = (split.positions() + split.most_shift()) / 2 + 1;
    source_term = pairs * kLine;
    source_copy = split.terms * source_term;
    source_tile = split.copies * source_copy;
    plane = ceil_div(plan.problem.c_per_group(), kTileColumns) * source_tile;
    source_size = plane * static_cast<int64_t>(split.planes.residues.size());
  }
};

// The taps of a plane side by side: shifted by little, they read the same lines. Where there is one tap, the channels.
std::vector<std::vector<Column>> list_columns(const Plan& plan) {
  const SplitWgradPlan& split = plan.split_wgrad;
  const std::vector<PlaneTap>& taps = split.planes.taps.front();
  const int64_t tiles = ceil_div(plan.problem.c_per_group(), kTileColumns);
  std::vector<std::vector<Column>> runs;
  for (int64_t plane = 0; plane < static_cast<int64_t>(split.planes.residues.size()); ++plane) {
    std::vector<int64_t> own;
    for (int64_t t = 0; t < static_cast<int64_t>(taps.size()); ++t) {
      if (taps[static_cast<size_t>(t)].plane == plane) own.push_back(t);
    }
    std::sort(own.begin(), own.end(), [&](int64_t a, int64_t b) {
      return split.shift(taps[static_cast<size_t>(a)]) < split.shift(taps[static_cast<size_t>(b)]);
    });
    if (own.size() == 1) {
      runs.emplace_back();
      for (int64_t tile = 0; tile < tiles; ++tile) runs.back().push_back({plane, own.front(), tile});
    } else {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        runs.emplace_back();
        for (const int64_t tap : own) runs.back().push_back({plane, tap, tile});
      }
    }
  }
  return runs;
}

// All columns of a run for one block of filters before the next: what a run reads stays in L2, and so does the block.
std::vector<Call> list_calls(const Plan& plan) {
  const SplitWgradPlan& split = plan.split_wgrad;
  std::vector<Call> calls;
  const std::vector<std::vector<Column>> runs = list_columns(plan);
  for (int64_t block = 0; block < split.grad_tiles; block += split.block_tiles) {
    const int64_t end = std::min(block + split.block_tiles, split.grad_tiles);
    for (const std::vector<Column>& run : runs) {
      const auto size = static_cast<int64_t>(run.size());
      const int64_t pieces = ceil_div(size, kMaxColumnTiles);
      const int64_t most = size == 1 ? kMaxRowTiles : 2;
      for (int64_t first = block; first < end; first += most) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          Call call{first, std::min(most, end - first), 0, {}};
          for (int64_t c = size * piece / pieces; c < size * (piece + 1) / pieces; ++c) {
            call.columns[call.count++] = run[static_cast<size_t>(c)];
          }
          calls.push_back(call);
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
  float* sums;  // [call][6][256]
  float* grad_rows;
  float* source_rows;
  float* row;    // [worker] one row and its mask
  float* zeros;  // a pixel of padding

  Buffers(const WgradPass& pass, size_t calls, int64_t workers, Arena& arena) {
    const Plan& plan = *pass.plan;
    const SplitWgradPlan& split = plan.split_wgrad;
    const Layout layout(plan);
    grad = arena.take<char>(layout.grad_size);
    source = arena.take<char>(layout.source_size);
    sums = arena.take<float>(static_cast<int64_t>(calls) * kMaxTiles * kTileFloats);
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

// 32 positions of the gradient line: tiles of A, [filter][position].
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
  for (int64_t tile = 0; tile < split.grad_tiles; ++tile) {
    const int64_t filter = tile * kTileRows;
    kernels.transpose_rows(pixels.dtype, rows, block.group * filters + filter,
                           std::min<int64_t>(kTileRows, filters - filter), static_cast<int>(split.terms),
                           packed + tile * layout.grad_tile + step * kTileBytes, kLine, layout.grad_term);
  }
}

// 32 positions of one plane of the activation: pairs of B.
void pack_source(const Plan& plan, const Layout& layout, const Block& block, const Pixels& pixels, const float* zeros,
                 int64_t plane, int64_t step, char* packed) {
  const SplitWgradPlan& split = plan.split_wgrad;
  const ConvProblem& problem = plan.problem;
  const Planes& planes = split.planes;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const int64_t channels = problem.c_per_group();
  const Planes::Residue& residue = planes.residues[static_cast<size_t>(plane)];
  const void* rows[kTileDepth + 1];
  Place place(split, step * kTileDepth);
  for (int64_t i = 0; i < kTileDepth + split.copies - 1; ++i, place.advance(split)) {
    const int64_t image = place.image(split);
    const int64_t h = planes.source_h(residue, block.first_row + place.row);
    const int64_t w = planes.source_w(residue, place.pixel);
    const bool valid = image < block.images && place.row < block.rows + planes.span_h && h >= 0 && h < problem.h &&
                       w >= 0 && w < problem.w;
    rows[i] = valid ? pixels.at(block.first_image + image, h, w) : zeros;
  }
  char* out = packed + plane * layout.plane + step * kTileBytes;
  for (int64_t channel = 0; channel < channels; channel += kTileColumns, out += layout.source_tile) {
    for (int64_t copy = 0; copy < split.copies; ++copy) {
      kernels.pair_rows(pixels.dtype, rows + copy, block.group * channels + channel,
                        std::min<int64_t>(kTileColumns, channels - channel), static_cast<int>(split.terms),
                        out + copy * layout.source_copy, layout.source_term);
    }
  }
}

// Both sides of a block. A task takes neighbouring steps: their lines of the gradient follow each other.
void pack_block(const Plan& plan, const Layout& layout, const Block& block, const Pixels& grad, const Pixels& source,
                const Buffers& buffers, const Executor& executor) {
  constexpr int64_t kStepsPerTask = 4;
  const int64_t steps = plan.split_wgrad.positions() / kTileDepth;
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

const SplitShape& shape_of(const SplitUkernels& kernels, const Call& call) {
  if (call.count == 1) return kernels.narrow;
  if (call.count == 3) return kernels.broad;
  return call.filters == 1 ? kernels.flat : kernels.wide;
}

void multiply(const Plan& plan, const Layout& layout, const Block& block, const std::vector<Call>& calls,
              const Buffers& buffers, bool first, const Executor& executor) {
  const SplitWgradPlan& split = plan.split_wgrad;
  const SplitUkernels& kernels = *split_ukernels(plan.isa);
  const std::vector<PlaneTap>& taps = split.planes.taps.front();
  // Positions up to the last one of the gradient that is not zero.
  const int64_t used =
      (((ceil_div(block.images, split.inner) - 1) * split.height() + block.rows - 1) * split.planes.pitch +
       plan.problem.q) *
      split.inner;
  for_each_task(executor, static_cast<int64_t>(calls.size()), [&](int64_t task, int64_t) {
    const Call& call = calls[static_cast<size_t>(task)];
    const SplitShape& shape = shape_of(kernels, call);
    const SplitStep step{0, 0};
    SplitGemmArgs args{};
    for (int t = 0; t < shape.row_tiles; ++t) {
      args.a[t] = buffers.grad + (call.first + std::min<int64_t>(t, call.filters - 1)) * layout.grad_tile;
    }
    args.a_row = kLine;
    args.a_term = layout.grad_term;
    for (int64_t c = 0; c < call.count; ++c) {
      const Column& column = call.columns[c];
      const int64_t shift = split.shift(taps[static_cast<size_t>(column.tap)]);
      args.b[c] = buffers.source + column.plane * layout.plane + column.tile * layout.source_tile +
                  shift % split.copies * layout.source_copy + shift / 2 * kLine;
    }
    args.b_term = layout.source_term;
    args.steps = &step;
    args.count = 1;
    args.blocks = ceil_div(used, kTileDepth);
    args.a_block = args.b_block = kTileBytes;
    args.out_row_tile = call.count * kTileFloats;
    args.out_column_tile = kTileFloats;
    args.out = buffers.sums + task * kMaxTiles * kTileFloats;
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
  const Ukernels<float>& kernels = ukernels<float>(plan.isa);
  const int64_t filters = plan.problem.k_per_group();
  const int64_t channels = plan.problem.c_per_group();
  for_each_task(executor, static_cast<int64_t>(calls.size()), [&](int64_t task, int64_t) {
    const Call& call = calls[static_cast<size_t>(task)];
    for (int64_t slot = 0; slot < call.filters; ++slot) {
      const int64_t filter = (call.first + slot) * kTileRows;
      for (int64_t column = 0; column < call.count; ++column) {
        const float* values = sums + (task * kMaxTiles + slot * call.count + column) * kTileFloats;
        const Tap& tap = taps[static_cast<size_t>(call.columns[column].tap)];
        const int64_t channel = call.columns[column].tile * kTileColumns;
        const int64_t valid = std::min<int64_t>(kTileColumns, channels - channel);
        for (int64_t k = 0; k < std::min<int64_t>(kTileRows, filters - filter); ++k) {
          const float* row = values + k * kTileColumns;
          const int64_t start = (group * filters + filter + k) * out.stride_k + channel * out.stride_c +
                                tap.r * out.stride_r + tap.s * out.stride_s;
          if (out.stride_c == 1) {
            kernels.store_row(out.dtype, row, valid, static_cast<char*>(out.data) + start * dtype_size(out.dtype));
            continue;
          }
          for (int64_t c = 0; c < valid; ++c) store_element(out.data, out.dtype, start + c * out.stride_c, row[c]);
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
  // A shift reads past the positions, where the gradient ends in zeros; what it reads must be finite.
  const int64_t packed = split.positions() / kTileDepth * kTileBytes;
  for (int64_t line = 0; line < layout.source_size; line += layout.source_term) {
    std::memset(buffers.source + line + packed, 0, static_cast<size_t>(layout.source_term - packed));
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
