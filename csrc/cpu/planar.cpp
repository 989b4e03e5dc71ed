// SPDX-License-Identifier: BSD-3-Clause
#include "planar.h"

#include <algorithm>

#include "../common/integers.h"
#include "planar_plan.h"
#include "streaming.h"

namespace segpose {
namespace {

// Of channel rows: a cache line of floats. Two and four lines were no faster.
constexpr int64_t kBundledChannels = 16;
// Rows of a task.
constexpr int64_t kTaskRows = 12;
// Results of a task.
constexpr int64_t kTaskValues = 64 << 10;

// Groups that are staged and written together: of channel rows a cache line holds several.
template <class T>
int64_t bundle_of(const Plan& plan, const TensorView& source, const TensorView& destination) {
  if (is_planar(source, compute_dtype<T>()) && is_planar(destination, compute_dtype<T>())) return 1;
  const int64_t fewest = std::min(planar_depth(plan), plan.columns());
  return std::min(ceil_div(kBundledChannels, fewest), planar_groups(plan));
}

template <class T>
struct Scratch {
  int64_t* offsets;  // [phase][tap][plane]
  T* staged;         // [group of a bundle][plane][row][residue][column]
  T* results;  // [phase][channel of a bundle][row][column] on their way to channel rows or to other phases, or null

  Scratch(const Plan& plan, const Phase& all, const TensorView& source, const TensorView& destination, Arena& arena) {
    const int64_t bundle = bundle_of<T>(plan, source, destination);
    const PlanarBand band = planar_band(plan, all);
    offsets = arena.take<int64_t>(static_cast<int64_t>(all.taps.size()) * band.depth);
    staged = arena.take<T>(bundle * band.size());
    const auto phases = static_cast<int64_t>(plan.phases.size());
    const bool direct = phases == 1 && is_planar(destination, compute_dtype<T>());
    results = direct ? nullptr : arena.take<T>(phases * bundle * planar_results(plan) * band.rows * band.cols);
  }
};

// Some groups of an image.
template <class T>
class BundlePlanes {
 public:
  BundlePlanes(const GatherLaunch<T>& launch, const Phase& all, const Scratch<T>& scratch, int64_t n, int64_t group,
               int64_t groups)
      : launch_(launch),
        plan_(*launch.plan),
        kernels_(ukernels<T>(plan_.isa)),
        scratch_(scratch),
        all_(all),
        band_(planar_band(plan_, all_)),
        group_(group),
        groups_(groups),
        columns_(planar_results(plan_)),
        streams_(overflows_caches(launch.destination, sizeof(T)) && are_lines<T>(launch.destination.stride_h) &&
                 are_lines<T>(launch.destination.stride_c)) {
    source_ = launch.source.template as<const T>() + n * launch.source.stride_n +
              group * band_.depth * launch.source.stride_c;
    destination_ = launch.destination.template as<T>() + n * launch.destination.stride_n +
                   group * columns_ * launch.destination.stride_c;
    int64_t step = 0;
    for (const Tap& tap : all_.taps) {
      for (int64_t c = 0; c < band_.depth; ++c) scratch.offsets[step++] = band_.offset(all_, tap, c);
    }
  }

  // Rows [begin, end) of every phase. What is left of them begins early rather than be less than a tile: some results
  // are computed twice.
  void run(int64_t begin, int64_t end) {
    const int64_t tile = std::min(planar_tile_rows(plan_), end - begin);
    const int64_t vector = kernels_.vector_length;
    const int64_t bands = ceil_div(end - begin, band_.rows);
    const int64_t most = round_up(ceil_div(end - begin, bands), tile);
    for (int64_t row = begin; row < end; row += most) {
      const int64_t rows = std::clamp(end - row, tile, most);
      for (int64_t col = 0; col < all_.cols; col += band_.cols) {
        const int64_t cols = std::clamp(all_.cols - col, vector, band_.cols);
        run_band(std::min(row, end - rows), rows, std::min(col, all_.cols - cols), cols);
      }
    }
  }

 private:
  void run_band(int64_t row, int64_t rows, int64_t col, int64_t cols) {
    stage_planes(kernels_, all_, band_, launch_.source, source_, groups_ * band_.depth, row, rows, col,
                 scratch_.staged);
    const TensorView& destination = launch_.destination;
    PlanarArgs<T> args{};
    args.a_step = all_.istep_h * band_.row_size;
    args.offsets = scratch_.offsets;
    args.columns = cols;
    args.activation = launch_.epilogue.activation;
    args.negative_slope = static_cast<T>(launch_.epilogue.negative_slope);
    if (scratch_.results == nullptr) {
      args.out = destination_ + row * destination.stride_h + col;
      args.out_step = destination.stride_h;
      args.out_channel = destination.stride_c;
      run_phase(args, 0, rows);
      return;
    }
    args.out = scratch_.results;
    args.out_step = band_.cols;
    args.out_channel = rows * band_.cols;
    for (size_t p = 0; p < plan_.phases.size(); ++p) {
      run_phase(args, p, rows);
      args.out += groups_ * columns_ * args.out_channel;
    }
    if (is_planar(destination, compute_dtype<T>())) {
      write_planes(row, rows, col, cols);
    } else {
      write_channel_rows(row, rows, col, cols);
    }
  }

  // All groups; moves to the offsets of the next phase.
  void run_phase(PlanarArgs<T>& args, size_t phase, int64_t rows) {
    T* const out = args.out;
    args.count = static_cast<int64_t>(plan_.phases[phase].taps.size()) * band_.depth;
    for (int64_t i = 0; i < groups_; ++i) {
      args.a = scratch_.staged + i * band_.size();
      args.out = out + i * columns_ * args.out_channel;
      run_group(args, static_cast<int64_t>(phase), group_ + i, rows);
    }
    args.out = out;
    args.offsets += args.count;
  }

  // The results of a phase, and of those that are written how many rows and columns.
  struct Results {
    const T* values;
    int64_t rows, cols;
  };
  Results results(size_t phase, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const Phase& own = plan_.phases[phase];
    return {scratch_.results + static_cast<int64_t>(phase) * groups_ * columns_ * rows * band_.cols,
            std::min(rows, own.rows - row), std::min(cols, own.cols - col)};
  }
  T* first_pixel(const Phase& phase, int64_t row, int64_t col) const {
    return destination_ + (phase.oh + row * phase.ostep_h) * launch_.destination.stride_h +
           (phase.ow + col * phase.ostep_w) * launch_.destination.stride_w;
  }

  void write_channel_rows(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    for (size_t p = 0; p < plan_.phases.size(); ++p) {
      const Phase& phase = plan_.phases[p];
      const Results from = results(p, row, rows, col, cols);
      for (int64_t r = 0; r < from.rows; ++r) {
        kernels_.transpose(from.values + r * band_.cols, rows * band_.cols, groups_ * columns_, from.cols,
                           first_pixel(phase, row + r, col), phase.ostep_w * launch_.destination.stride_w);
      }
    }
  }

  // Two phases of a stride of two fill whole rows together.
  void write_planes(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const auto partner_of = [&](const Phase& phase, int64_t ow) {
      size_t other = 0;
      while (other < plan_.phases.size() &&
             (phase.ostep_w != 2 || plan_.phases[other].oh != phase.oh || plan_.phases[other].ow != ow)) {
        ++other;
      }
      return other;
    };
    for (size_t p = 0; p < plan_.phases.size(); ++p) {
      const Phase& phase = plan_.phases[p];
      const size_t partner = partner_of(phase, 1 - phase.ow);
      const bool paired = partner < plan_.phases.size();
      if (paired && phase.ow == 1) continue;
      const Results from = results(p, row, rows, col, cols);
      const Results beside = paired ? results(partner, row, rows, col, cols) : Results{from.values, 0, 0};
      for (int64_t c = 0; c < groups_ * columns_; ++c) {
        for (int64_t r = 0; r < from.rows; ++r) {
          T* const out = first_pixel(phase, row + r, col) + c * launch_.destination.stride_c;
          const T* const values = from.values + (c * rows + r) * band_.cols;
          const T* const others = beside.values + (c * rows + r) * band_.cols;
          for (int64_t i = 0; i < beside.cols; ++i) {
            out[2 * i] = values[i];
            out[2 * i + 1] = others[i];
          }
          for (int64_t i = beside.cols; i < from.cols; ++i) out[i * phase.ostep_w] = values[i];
        }
      }
    }
  }

  void run_group(PlanarArgs<T> args, int64_t phase, int64_t group, int64_t rows) {
    const T* const packed = launch_.packed + launch_.layout->phase_offset(phase);
    if (plan_.algorithm == Algorithm::depthwise) {
      args.w = packed + group;
      args.w_step = plan_.columns();
      run_channels(args, group, 1, rows);
      return;
    }
    T* const out = args.out;
    for (const Panel& panel : plan_.panels) {
      args.w = packed + launch_.layout->panel_offset(plan_, phase, group, panel);
      args.w_step = panel.nr;
      args.out = out + panel.column * args.out_channel;
      run_channels(args, group * plan_.padded_columns() + panel.column, panel.columns, rows);
    }
  }

  // `count` channels, whose biases begin at `packed_bias`.
  void run_channels(const PlanarArgs<T>& channels, int64_t packed_bias, int64_t count, int64_t rows) {
    // Planes of several channels side by side are too far apart for it: 64 of 256 x 256 from three took 3.5 ms past the
    // caches and 2.9 through them (Zen 3).
    const bool streams = count == 1 && streams_ && scratch_.results == nullptr && is_at_line(channels.out) &&
                         are_lines<T>(channels.columns);
    const PlanarTile<T>& tile = streams ? kernels_.planar_lines : tile_for(count, rows);
    PlanarArgs<T> args = channels;
    for (int64_t k = 0; k < count; k += tile.channels) {
      const int64_t from = std::min(k, count - tile.channels);
      args.w = channels.w + from;
      args.bias = launch_.bias == nullptr ? nullptr : launch_.bias + packed_bias + from;
      for (int64_t r = 0; r < rows; r += tile.rows) {
        const int64_t first = std::min(r, rows - tile.rows);
        args.a = channels.a + first * args.a_step;
        args.out = channels.out + from * args.out_channel + first * args.out_step;
        tile.run(args);
      }
    }
  }

  // Of those for one channel the one that computes the fewest rows twice.
  const PlanarTile<T>& tile_for(int64_t channels, int64_t rows) const {
    const PlanarTile<T>* const tiles = kernels_.planar;
    if (channels >= tiles[0].channels) return tiles[0];
    return round_up(rows, tiles[2].rows) < round_up(rows, tiles[1].rows) ? tiles[2] : tiles[1];
  }

  const GatherLaunch<T>& launch_;
  const Plan& plan_;
  const Ukernels<T>& kernels_;
  const Scratch<T>& scratch_;
  const Phase& all_;
  PlanarBand band_;
  int64_t group_, groups_;
  int64_t columns_;  // channels of a group's results
  bool streams_;
  const T* source_;
  T* destination_;
};

}  // namespace

template <class T>
bool runs_planar(const Plan& plan, const MaskedSource& source, const TensorView& destination) {
  if (!plan.may_be_planar || source.mask != nullptr) return false;
  // Channel rows of a few channels a group pay for their way into planes and back; depthwise they are vectors already.
  const bool takes_rows = plan.problem.groups > 1 && plan.algorithm != Algorithm::depthwise;
  const DType dtype = compute_dtype<T>();
  const auto fits = [&](const TensorView& view) {
    return is_planar(view, dtype) || (takes_rows && view.has_channel_rows(dtype));
  };
  return fits(source.view) && fits(destination);
}

template <class T>
int64_t planar_scratch(const Plan& plan, const TensorView& source, const TensorView& destination) {
  Arena arena(nullptr);
  const Scratch<T> scratch(plan, all_phases(plan), source, destination, arena);
  return arena.used();
}

template <class T>
void launch_planar(const GatherLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  const int64_t scratch_bytes = planar_scratch<T>(plan, launch.source, launch.destination);
  const int64_t groups = planar_groups(plan);
  const int64_t bundle = bundle_of<T>(plan, launch.source, launch.destination);
  const int64_t bundles = ceil_div(groups, bundle);
  const Phase all = all_phases(plan);
  const int64_t rows = all.rows;
  const int64_t values = launch.destination.h * launch.destination.w * launch.destination.c / bundles;
  const int64_t parts = std::clamp<int64_t>(rows / kTaskRows, 1, ceil_div(values, kTaskValues));
  for_each_task(executor, plan.problem.n * bundles * parts, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    const Scratch<T> scratch(plan, all, launch.source, launch.destination, arena);
    const int64_t part = task % parts;
    const int64_t image = task / parts / bundles;
    const int64_t group = task / parts % bundles * bundle;
    BundlePlanes<T>(launch, all, scratch, image, group, std::min(bundle, groups - group))
        .run(rows * part / parts, rows * (part + 1) / parts);
    finish_streaming();
  });
}

#define SEGPOSE_INSTANTIATE(T)                                                           \
  template bool runs_planar<T>(const Plan&, const MaskedSource&, const TensorView&);     \
  template int64_t planar_scratch<T>(const Plan&, const TensorView&, const TensorView&); \
  template void launch_planar<T>(const GatherLaunch<T>&, const Executor&);
SEGPOSE_INSTANTIATE(float)
SEGPOSE_INSTANTIATE(double)

}  // namespace segpose
