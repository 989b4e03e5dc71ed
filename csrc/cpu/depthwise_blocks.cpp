// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise_blocks.h"

#include <algorithm>

#include "../common/integers.h"
#include "planar_band.h"
#include "streaming.h"

namespace segpose {
namespace {

// Staged values of a band of rows, 128 KB of floats: what a row reads of them stays in L1, and the fewer bands, the
// fewer rows are copied twice. 7 x 7 taps over 96 channels of 56 x 56 took 520 us from where the channels lie, 388 with
// 64 KB and 340 with 128; 5 x 5 over 240 of 28 x 28 217, 165 and 132; 3 x 3 over 384 of 14 x 14 82, 56 and 57 (Zen 3).
constexpr int64_t kStagedValues = 32 << 10;
// Beyond L2 the copies of a few taps cost more than they save: 3 x 3 over 64 channels of 56 x 56 took 0.88 of the time,
// over 144 1.02 and 1.21 at stride two, over 32 of 112 x 112 1.24; 5 x 5 over 64 of 112 x 112 0.87.
constexpr int64_t kFarBytes = 1 << 20;
constexpr int64_t kManyTaps = 16;
// Rows and results of a task.
constexpr int64_t kTaskRows = 8;
constexpr int64_t kTaskValues = 16 << 10;
// Of a block of columns: the largest tile, in phases of which one has a column less.
constexpr int64_t kFewestColumns = 16;

// Channels of a block.
template <class T>
constexpr int64_t kBlock = kLineBytes / static_cast<int64_t>(sizeof(T));

template <class T>
PlanarBand band_of(const Phase& all) {
  return {all, 1, 0, 1, kStagedValues / kBlock<T>};
}

template <class T>
struct Scratch {
  int64_t* offsets;  // [phase][tap]
  T* staged;         // [row][residue][column][channel]

  Scratch(const Phase& all, Arena& arena)
      : offsets(arena.take<int64_t>(static_cast<int64_t>(all.taps.size()))),
        staged(arena.take<T>(band_of<T>(all).size() * kBlock<T>)) {}
};

// The tile that computes the fewest pixels twice.
template <class T>
const DepthwiseBlockTile<T>& tile_for(const Ukernels<T>& kernels, int64_t cols) {
  const DepthwiseBlockTile<T>* best = nullptr;
  for (const DepthwiseBlockTile<T>& tile : kernels.depthwise_blocks) {
    if (tile.pixels > cols && best != nullptr) continue;
    if (best == nullptr || best->pixels > cols || round_up(cols, tile.pixels) < round_up(cols, best->pixels)) {
      best = &tile;
    }
  }
  return *best;
}

// Some channels of an image.
template <class T>
class ChannelBlock {
 public:
  ChannelBlock(const GatherLaunch<T>& launch, const Phase& all, const Scratch<T>& scratch, int64_t n, int64_t channel)
      : launch_(launch),
        plan_(*launch.plan),
        kernels_(ukernels<T>(plan_.isa)),
        scratch_(scratch),
        all_(all),
        band_(band_of<T>(all)),
        n_(n),
        channel_(channel) {
    for (size_t t = 0; t < all.taps.size(); ++t) scratch.offsets[t] = band_.offset(all, all.taps[t], 0) * kBlock<T>;
  }

  // Rows [begin, end) of every phase.
  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += band_.rows) {
      const int64_t rows = std::min(band_.rows, end - row);
      for (int64_t col = 0; col < all_.cols; col += band_.cols) {
        // What is left begins early rather than be less than a tile.
        const int64_t from = std::min(col, std::max<int64_t>(all_.cols - kFewestColumns, 0));
        stage(row, rows, from);
        const int64_t* offsets = scratch_.offsets;
        for (size_t p = 0; p < plan_.phases.size(); ++p) {
          run_phase(p, offsets, row, rows, from);
          offsets += plan_.phases[p].taps.size();
        }
      }
    }
  }

 private:
  void run_phase(size_t p, const int64_t* offsets, int64_t row, int64_t rows, int64_t col) const {
    const Phase& phase = plan_.phases[p];
    const TensorView& destination = launch_.destination;
    DepthwiseBlockArgs<T> args{};
    args.offsets = offsets;
    args.count = static_cast<int64_t>(phase.taps.size());
    args.w = launch_.packed + launch_.layout->phase_offset(static_cast<int64_t>(p)) + channel_;
    args.w_step = plan_.columns();
    args.bias = launch_.bias == nullptr ? nullptr : launch_.bias + channel_;
    args.activation = launch_.epilogue.activation;
    args.negative_slope = static_cast<T>(launch_.epilogue.negative_slope);
    args.out_step = phase.ostep_w * destination.stride_w;
    args.pixels = std::min(band_.cols, phase.cols - col);
    const DepthwiseBlockTile<T>& tile = tile_for(kernels_, std::min(band_.cols, phase.cols));
    for (int64_t r = 0; r < std::min(rows, phase.rows - row); ++r) {
      args.a = scratch_.staged + r * all_.istep_h * band_.row_size * kBlock<T>;
      args.out = destination.template as<T>() + channel_ +
                 destination.offset(n_, phase.oh + (row + r) * phase.ostep_h, phase.ow + col * phase.ostep_w);
      tile.run(args);
    }
  }

  void stage(int64_t row, int64_t rows, int64_t col) const {
    const TensorView& source = launch_.source;
    const T* const image = source.template as<const T>() + n_ * source.stride_n + channel_;
    const int64_t pixel_step = all_.istep_w * source.stride_w;
    for_each_staged_line(all_, band_, source, row, rows, col, [&](const StagedLine& line) {
      T* const out = scratch_.staged + line.at * kBlock<T>;
      std::fill_n(out, line.begin * kBlock<T>, T{0});
      std::fill_n(out + line.end * kBlock<T>, (band_.segment - line.end) * kBlock<T>, T{0});
      const T* pixel = image + line.from;
      for (int64_t i = line.begin; i < line.end; ++i, pixel += pixel_step) {
        std::copy_n(pixel, kBlock<T>, out + i * kBlock<T>);
      }
    });
  }

  const GatherLaunch<T>& launch_;
  const Plan& plan_;
  const Ukernels<T>& kernels_;
  const Scratch<T>& scratch_;
  const Phase& all_;
  PlanarBand band_;
  int64_t n_, channel_;
};

}  // namespace

template <class T>
bool runs_in_blocks(const Plan& plan, const TensorView& source, const TensorView& destination) {
  if (plan.algorithm != Algorithm::depthwise || plan.columns() < kBlock<T>) return false;
  if (!destination.has_channel_rows(compute_dtype<T>())) return false;
  if (overflows_caches(destination, sizeof(T)) || overflows_caches(source, sizeof(T))) return false;
  const int64_t bytes = source.n * source.h * source.w * source.c * static_cast<int64_t>(sizeof(T));
  if (bytes > kFarBytes && plan.problem.taps() < kManyTaps) return false;
  const Ukernels<T>& kernels = ukernels<T>(plan.isa);
  int64_t fewest = kernels.depthwise_blocks[0].pixels;
  for (const DepthwiseBlockTile<T>& tile : kernels.depthwise_blocks) fewest = std::min<int64_t>(fewest, tile.pixels);
  const auto fits = [&](const Phase& phase) { return phase.cols >= fewest; };
  if (!std::all_of(plan.phases.begin(), plan.phases.end(), fits)) return false;
  const Phase all = all_phases(plan);
  return band_of<T>(all).reads_mostly(all, source.h, source.w);
}

template <class T>
int64_t blocks_scratch(const Plan& plan) {
  Arena arena(nullptr);
  const Scratch<T> scratch(all_phases(plan), arena);
  return arena.used();
}

template <class T>
void launch_blocks(const GatherLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const Phase all = all_phases(plan);
  const int64_t scratch_bytes = blocks_scratch<T>(plan);
  const int64_t channels = plan.columns();
  const int64_t blocks = ceil_div(channels, kBlock<T>);
  const int64_t values = launch.destination.h * launch.destination.w * kBlock<T>;
  const int64_t parts = std::clamp<int64_t>(all.rows / kTaskRows, 1, ceil_div(values, kTaskValues));
  for_each_task(executor, plan.problem.n * blocks * parts, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch<T> scratch(all, arena);
    const int64_t part = task % parts;
    const int64_t block = task / parts % blocks;
    // The last block begins early and computes some channels twice.
    const int64_t channel = std::min(block * kBlock<T>, channels - kBlock<T>);
    ChannelBlock<T>(launch, all, scratch, task / parts / blocks, channel)
        .run(all.rows * part / parts, all.rows * (part + 1) / parts);
  });
}

#define SEGPOSE_INSTANTIATE(T)                                                        \
  template bool runs_in_blocks<T>(const Plan&, const TensorView&, const TensorView&); \
  template int64_t blocks_scratch<T>(const Plan&);                                    \
  template void launch_blocks<T>(const GatherLaunch<T>&, const Executor&);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
