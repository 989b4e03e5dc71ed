// SPDX-License-Identifier: BSD-3-Clause
#include "rows_conv.h"

#include <algorithm>

#include "../common/integers.h"
#include "line_tiles.h"
#include "rows_stage.h"
#include "streaming.h"

namespace segpose {
namespace {

// Results that wait for their way to another layout or dtype: many at a time, for planes are written in long runs then,
// and so few that they stay in L1. Line by line SegNet's first layer took 77 us instead of 72 (64 images, Zen 3).
constexpr int64_t kWaiting = 512;

// A line of tiles at least: the columns of a row, or the images of a task.
int64_t most_waiting(const Plan& plan) {
  int64_t most = std::max(kWaiting, plan.rows.images);
  for (const Phase& phase : plan.phases) most = std::max(most, phase.cols);
  return most;
}

template <class T>
struct Scratch {
  BandStage<T> band;
  T* waiting;        // [capacity][nr] results
  int64_t* offsets;  // of their pixels
  int64_t capacity;

  Scratch(const Plan& plan, const MaskedSource& source, Arena& arena) : band(plan.rows, source, arena) {
    int64_t widest = 1;
    for (const Panel& panel : plan.panels) widest = std::max(widest, panel.nr);
    capacity = most_waiting(plan);
    waiting = arena.take<T>(capacity * widest);
    offsets = arena.take<int64_t>(capacity);
  }
};

// One panel of a task, a phase at a time: there may be many phases of a single pixel.
template <class T>
class PanelRows {
 public:
  PanelRows(const RowsLaunch<T>& launch, const PanelTiles<T>& tiles, Scratch<T>& scratch, const Panel& panel,
            int64_t group)
      : launch_(launch), tiles_(tiles.of(panel.nr)), scratch_(scratch), panel_(panel) {
    const Plan& plan = *launch.plan;
    source_channel_ = group * plan.depth();
    packed_column_ = group * plan.padded_columns() + panel.column;
    args_.columns = panel.columns;
    args_.bias = launch.bias == nullptr ? nullptr : launch.bias + packed_column_;
    args_.activation = launch.epilogue.activation;
    args_.negative_slope = static_cast<T>(launch.epilogue.negative_slope);
    channel_ = group * plan.columns() + panel.column;
    direct_ = launch.destination.has_channel_rows(compute_dtype<T>());
    args_.streams = streams<T>(launch.destination, panel, channel_);
  }

  // At most `rows` rows of a phase from `first` on, of a task that begins at `row`.
  void run(size_t phase, int64_t image, int64_t images, int64_t row, int64_t first, int64_t rows) {
    select(phase);
    const RowsPlan& plan = launch_.plan->rows;
    const int64_t pixel = launch_.source.view.c;
    const int64_t end = std::min(first + rows, phase_->rows - row);
    const auto source = [&](int64_t r) {
      return scratch_.band.data() + source_channel_ + r * phase_->istep_h * scratch_.band.row_size();
    };
    if (plan.along_images) {
      for (int64_t r = first; r < end; ++r) {
        for (int64_t col = 0; col < phase_->cols; ++col) {
          run_line(source(r) + col * phase_->istep_w * pixel, scratch_.band.image_size(), images,
                   offset(image, row + r, col), launch_.destination.stride_n);
        }
      }
    } else {
      for (int64_t i = 0; i < images; ++i) {
        for (int64_t r = first; r < end; ++r) {
          run_line(source(r) + i * scratch_.band.image_size(), phase_->istep_w * pixel, phase_->cols,
                   offset(image + i, row + r, 0), phase_->ostep_w * launch_.destination.stride_w);
        }
      }
    }
    if (waiting_ > 0) write_waiting();
  }

 private:
  void select(size_t phase) {
    phase_ = &launch_.plan->phases[phase];
    const PhaseSpan& span = launch_.plan->rows.phases[phase];
    args_.runs = launch_.plan->rows.offsets.data() + span.first;
    args_.count = span.count;
    args_.depth = span.depth;
    // Where PackedFilter::panel_offset leads, without asking the plan for each of many phases.
    args_.b = launch_.packed + launch_.layout->phase_offset(static_cast<int64_t>(phase)) +
              span.count * span.depth * packed_column_;
  }

  int64_t offset(int64_t image, int64_t row, int64_t col) const {
    return launch_.destination.offset(image, phase_->oh + row * phase_->ostep_h, phase_->ow + col * phase_->ostep_w);
  }

  // `pixels` of them, `step` apart in the source and `out_step` in the destination.
  void run_line(const T* source, int64_t step, int64_t pixels, int64_t out, int64_t out_step) {
    const Ukernels<T>& kernels = ukernels<T>(launch_.plan->isa);
    if (waiting_ + pixels > scratch_.capacity) write_waiting();
    T* const line =
        direct_ ? launch_.destination.template as<T>() + out + channel_ : scratch_.waiting + waiting_ * panel_.nr;
    args_.a_step = step;
    args_.out_step = direct_ ? out_step : panel_.nr;
    const auto run_tile = [&](const RowsTile<T>& tile, int64_t pixel) {
      args_.a = source + pixel * step;
      args_.out = line + pixel * args_.out_step;
      tile.run(args_);
    };
    if (panel_.dots) {
      const RowsTile<T>* tile = kernels.dots.tiles;
      while (tile->nr != panel_.nr || tile->mr > pixels) ++tile;
      // The last one begins early rather than be lower: some pixels are computed twice.
      for (int64_t done = 0; done < pixels; done += tile->mr) run_tile(*tile, std::min(done, pixels - tile->mr));
    } else {
      for (int64_t done = 0; done < pixels;) {
        const RowsTile<T>& tile = tiles_.first(pixels - done);
        run_tile(tile, done);
        done += tile.mr;
      }
    }
    if (direct_) return;
    for (int64_t m = 0; m < pixels; ++m) scratch_.offsets[waiting_ + m] = out + m * out_step;
    waiting_ += pixels;
  }

  void write_waiting() {
    unstage_block(ukernels<T>(launch_.plan->isa), scratch_.waiting, panel_.nr, waiting_, panel_.columns,
                  launch_.destination, scratch_.offsets, channel_);
    waiting_ = 0;
  }

  const RowsLaunch<T>& launch_;
  const LineTiles<T>& tiles_;
  Scratch<T>& scratch_;
  const Phase* phase_ = nullptr;
  const Panel& panel_;
  RowsArgs<T> args_{};
  int64_t source_channel_;
  int64_t packed_column_;
  int64_t channel_;
  bool direct_;
  int64_t waiting_ = 0;
};

// A band of the source, and the panels of all groups that are computed from it.
struct RowsTask {
  int64_t image, row;
  int64_t panel_begin, panel_end;
};

template <class T>
void run_task(const RowsLaunch<T>& launch, const PanelTiles<T>& tiles, const RowsTask& task, Scratch<T>& scratch) {
  const Plan& plan = *launch.plan;
  const int64_t images = std::min(plan.rows.images, plan.problem.n - task.image);
  const auto panels = static_cast<int64_t>(plan.panels.size());
  scratch.band.load(ukernels<T>(plan.isa), task.image, images, task.row);
  for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
    const Panel& panel = plan.panels[static_cast<size_t>(p % panels)];
    PanelRows<T> columns(launch, tiles, scratch, panel, p / panels);
    // The filter of all phases stays in L1, and with a few rows at a time the source does.
    const int64_t step = panel.dots ? 1 : plan.rows.rows;
    for (int64_t first = 0; first < plan.rows.rows; first += step) {
      for (size_t phase = 0; phase < plan.phases.size(); ++phase) {
        columns.run(phase, task.image, images, task.row, first, step);
      }
    }
  }
}

}  // namespace

template <class T>
int64_t rows_scratch(const Plan& plan, const MaskedSource& source) {
  Arena arena(nullptr);
  const Scratch<T> scratch(plan, source, arena);
  return arena.used();
}

template <class T>
void launch_rows(const RowsLaunch<T>& launch, const Executor& executor) {
  const Plan& plan = *launch.plan;
  int64_t most_rows = 0;
  for (const Phase& phase : plan.phases) most_rows = std::max(most_rows, phase.rows);
  const int64_t bands = ceil_div(most_rows, plan.rows.rows);
  const int64_t tasks = ceil_div(plan.problem.n, plan.rows.images) * bands;
  const int64_t panels = static_cast<int64_t>(plan.panels.size()) * plan.problem.groups;
  // Workers without a band take some of the panels; each stages the band for itself.
  const int64_t parts = std::clamp(executor.workers / tasks, int64_t{1}, panels);
  const int64_t scratch_bytes = rows_scratch<T>(plan, launch.source);
  const PanelTiles<T>& tiles = panel_tiles<T>(plan.isa);
  for_each_task(executor, tasks * parts, [&](int64_t task, int64_t worker) {
    Arena arena(launch.scratch + worker * scratch_bytes);
    Scratch<T> scratch(plan, launch.source, arena);
    const int64_t band = task / parts, part = task % parts;
    run_task(launch, tiles,
             {band / bands * plan.rows.images, band % bands * plan.rows.rows, panels * part / parts,
              panels * (part + 1) / parts},
             scratch);
    finish_streaming();
  });
}

template int64_t rows_scratch<float>(const Plan&, const MaskedSource&);
template int64_t rows_scratch<double>(const Plan&, const MaskedSource&);
template void launch_rows<float>(const RowsLaunch<float>&, const Executor&);
template void launch_rows<double>(const RowsLaunch<double>&, const Executor&);

}  // namespace segpose
