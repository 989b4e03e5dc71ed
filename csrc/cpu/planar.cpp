// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise_planes.h"

#include <algorithm>

#include "../common/integers.h"
#include "streaming.h"

namespace segpose {
namespace {

// Staged values of a band of rows, and copies of the taps' weights for the columns of a block: 24 and 8 KB of floats,
// which stay in L1. Bands are copied without a padding too: eight rows at once are more streams than the hardware sees.
// 64 channels of 256 x 256 took 5.2 ms where they lie and take 4.5, 3 x 7 taps over 128 channels 7.1 and 5.8 (Zen 3).
constexpr int64_t kStagedValues = 6 << 10;
constexpr int64_t kWeightValues = 2 << 10;
constexpr int64_t kMostColumns = 512;
// Rows of a tile of the microkernel.
constexpr int64_t kRows = kDepthwisePixels;
// Rows of fewer vectors leave too much of them idle: beside channel rows in between, 3 x 3 taps took 1.3 times as long
// with rows of 14 floats and 0.64 with 16, 0.6 with 56 and 0.5 with 256.
constexpr int64_t kFewestVectors = 2;
// Results of a task.
constexpr int64_t kTaskValues = 64 << 10;

// A band of destination rows, and what it reads: source rows and columns from `low` on, zeros outside of the source.
struct BandShape {
  int64_t rows;                // of a band
  int64_t low_h, low_w;        // the first that destination row and column 0 read
  int64_t staged_h, staged_w;  // of a whole band

  BandShape(const Phase& phase) {
    int64_t high_h = low_h = phase.taps.empty() ? 0 : phase.taps.front().off_h;
    int64_t high_w = low_w = phase.taps.empty() ? 0 : phase.taps.front().off_w;
    for (const Tap& tap : phase.taps) {
      low_h = std::min(low_h, tap.off_h);
      low_w = std::min(low_w, tap.off_w);
      high_h = std::max(high_h, tap.off_h);
      high_w = std::max(high_w, tap.off_w);
    }
    staged_w = phase.cols + high_w - low_w;
    const int64_t fitting = (kStagedValues / staged_w - (high_h - low_h) - 1) / phase.istep_h + 1;
    rows = std::clamp<int64_t>(fitting / kRows * kRows, kRows, std::max(phase.rows, kRows));
    staged_h = (rows - 1) * phase.istep_h + high_h - low_h + 1;
  }
};

template <class T>
int64_t block_columns(const Plan& plan) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  int64_t cols = 1;
  for (const Phase& phase : plan.phases) cols = std::max(cols, phase.cols);
  const int64_t fitting = kWeightValues / plan.most_taps() / kLine * kLine;
  return std::clamp(std::min(fitting, round_up(cols, kLine)), kLine, kMostColumns);
}

// The microkernel of channel rows computes pixels by channels with a weight for each channel. Here its pixels are the
// rows of a plane and its channels their columns, whose weights are all the same.
template <class T>
struct Scratch {
  DepthwiseTap<T>* taps;
  T* weights;  // [tap][column]
  T* bias;     // [column]
  T* staged;   // [row][column]

  Scratch(const Plan& plan, Arena& arena) {
    const int64_t columns = block_columns<T>(plan);
    taps = arena.take<DepthwiseTap<T>>(plan.most_taps());
    weights = arena.take<T>(plan.most_taps() * columns);
    bias = arena.take<T>(columns);
    int64_t most = 0;
    for (const Phase& phase : plan.phases) {
      const BandShape band(phase);
      most = std::max(most, band.staged_h * band.staged_w);
    }
    staged = arena.take<T>(most);
  }
};

// One channel of an image, and the destination pixels of one phase.
template <class T>
class Plane {
 public:
  Plane(const GatherLaunch<T>& launch, const Scratch<T>& scratch, size_t phase, int64_t n, int64_t channel)
      : launch_(launch),
        scratch_(scratch),
        phase_(launch.plan->phases[phase]),
        band_(phase_),
        columns_(block_columns<T>(*launch.plan)),
        streams_(overflows_caches(launch.destination, sizeof(T)) &&
                 are_lines<T>(phase_.ostep_h * launch.destination.stride_h)) {
    source_ = launch.source.template as<const T>() + launch.source.offset(n, 0, 0) + channel * launch.source.stride_c;
    destination_ = launch.destination.template as<T>() + launch.destination.offset(n, phase_.oh, phase_.ow) +
                   channel * launch.destination.stride_c;
    const T* weights = launch.packed + launch.layout->phase_offset(static_cast<int64_t>(phase)) + channel;
    for (size_t t = 0; t < phase_.taps.size(); ++t) {
      const auto tap = static_cast<int64_t>(t);
      std::fill_n(scratch.weights + tap * columns_, columns_, weights[tap * launch.plan->columns()]);
    }
    if (launch.bias != nullptr) std::fill_n(scratch.bias, columns_, launch.bias[channel]);
  }

  // Destination rows [begin, end).
  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += band_.rows) run_band(row, std::min(band_.rows, end - row));
  }

 private:
  // A ragged end in either direction begins early, and some results are computed twice.
  void run_band(int64_t row, int64_t count) {
    stage(row, count);
    const int64_t ragged = count > kRows ? count % kRows : 0;
    run_rows(row, 0, count - ragged);
    if (ragged > 0) run_rows(row, count - kRows, kRows);
  }

  void stage(int64_t row, int64_t count) {
    const TensorView& source = launch_.source;
    const int64_t begin = std::clamp<int64_t>(-band_.low_w, 0, band_.staged_w);
    const int64_t end = std::clamp<int64_t>(source.w - band_.low_w, begin, band_.staged_w);
    const int64_t staged = band_.staged_h - (band_.rows - count) * phase_.istep_h;
    for (int64_t i = 0; i < staged; ++i) {
      T* const out = scratch_.staged + i * band_.staged_w;
      const int64_t h = row * phase_.istep_h + band_.low_h + i;
      if (h < 0 || h >= source.h) {
        std::fill_n(out, band_.staged_w, T{0});
        continue;
      }
      std::fill(out, out + begin, T{0});
      std::copy_n(source_ + h * source.stride_h + band_.low_w + begin, end - begin, out + begin);
      std::fill(out + end, out + band_.staged_w, T{0});
    }
  }

  // Rows from `first` on of the band at `row`.
  void run_rows(int64_t row, int64_t first, int64_t count) {
    const int64_t length = ukernels<T>(launch_.plan->isa).vector_length;
    const int64_t ragged = phase_.cols % length;
    const int64_t whole = phase_.cols - ragged;
    const T* const source = scratch_.staged + first * phase_.istep_h * band_.staged_w;
    row += first;
    for (int64_t col = 0; col < whole; col += columns_) {
      run_block(source, row, count, col, std::min(columns_, whole - col));
    }
    if (ragged > 0) run_block(source, row, count, phase_.cols - length, length);
  }

  void run_block(const T* source, int64_t row, int64_t count, int64_t col, int64_t columns) {
    DepthwiseArgs<T> args{};
    args.taps = scratch_.taps;
    args.count = static_cast<int64_t>(phase_.taps.size());
    for (int64_t t = 0; t < args.count; ++t) {
      const Tap& tap = phase_.taps[static_cast<size_t>(t)];
      scratch_.taps[t] = {source + (tap.off_h - band_.low_h) * band_.staged_w + tap.off_w - band_.low_w + col,
                          scratch_.weights + t * columns_, false};
    }
    args.a_step = phase_.istep_h * band_.staged_w;
    args.out = destination_ + row * phase_.ostep_h * launch_.destination.stride_h + col;
    args.out_step = phase_.ostep_h * launch_.destination.stride_h;
    args.pixels = count;
    args.channels = columns;
    args.streams = streams_ && is_at_line(args.out) && are_lines<T>(columns);
    args.bias = launch_.bias == nullptr ? nullptr : scratch_.bias;
    args.activation = launch_.epilogue.activation;
    args.negative_slope = static_cast<T>(launch_.epilogue.negative_slope);
    ukernels<T>(launch_.plan->isa).depthwise(args);
  }

  const GatherLaunch<T>& launch_;
  const Scratch<T>& scratch_;
  const Phase& phase_;
  BandShape band_;
  int64_t columns_;
  bool streams_;
  const T* source_;
  T* destination_;
};

bool is_planar(const TensorView& view, DType dtype) {
  return view.dtype == dtype && view.stride_w == 1 && !view.has_channel_rows(dtype);
}

}  // namespace

template <class T>
bool runs_in_planes(const Plan& plan, const MaskedSource& source, const TensorView& destination) {
  const DType dtype = compute_dtype<T>();
  if (plan.algorithm != Algorithm::depthwise || source.mask != nullptr) return false;
  if (!is_planar(source.view, dtype) || !is_planar(destination, dtype)) return false;
  const int64_t least = kFewestVectors * ukernels<T>(plan.isa).vector_length;
  return std::all_of(plan.phases.begin(), plan.phases.end(), [&](const Phase& phase) {
    if (phase.istep_w != 1 || phase.ostep_w != 1 || phase.cols < least) return false;
    const BandShape band(phase);
    // Far apart, most taps of a pixel read the padding, which would be multiplied all the same.
    const int64_t beyond_h = band.staged_h - (band.rows - 1) * phase.istep_h - 1;
    return 2 * beyond_h <= source.view.h && 2 * (band.staged_w - phase.cols) <= source.view.w;
  });
}

template <class T>
int64_t planes_scratch(const Plan& plan) {
  Arena arena(nullptr);
  const Scratch<T> scratch(plan, arena);
  return arena.used();
}

template <class T>
void launch_planes(const GatherLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const int64_t scratch_bytes = planes_scratch<T>(plan);
  int64_t values = 1;  // of a plane's largest phase
  for (const Phase& phase : plan.phases) values = std::max(values, phase.rows * phase.cols);
  const int64_t parts = ceil_div(values, kTaskValues);
  for_each_task(executor, plan.problem.n * plan.columns() * parts, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch<T> scratch(plan, arena);
    const int64_t plane = task / parts, part = task % parts;
    for (size_t p = 0; p < plan.phases.size(); ++p) {
      const int64_t rows = plan.phases[p].rows;
      Plane<T>(launch, scratch, p, plane / plan.columns(), plane % plan.columns())
          .run(rows * part / parts, rows * (part + 1) / parts);
    }
    finish_streaming();
  });
}

#define SEGPOSE_INSTANTIATE(T)                                                          \
  template bool runs_in_planes<T>(const Plan&, const MaskedSource&, const TensorView&); \
  template int64_t planes_scratch<T>(const Plan&);                                      \
  template void launch_planes<T>(const GatherLaunch<T>&, const Executor&);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
