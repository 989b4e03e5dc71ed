// SPDX-License-Identifier: BSD-3-Clause
#include "split_plan.h"

#include <algorithm>
#include <tuple>

#include "../common/integers.h"

namespace segpose {
namespace {

// Packed source of a block, and with the filter if that stays in the 2 MB L2 from one block to the next: one image of
// Mask R-CNN's head to a block instead of two, beside 1.5 MB of filter, took 1.63 ms instead of 1.83.
constexpr int64_t kSourceBytes = 640 << 10;
constexpr int64_t kSourceAndFilterBytes = 1920 << 10;
// Where it does not stay, blocks of whole images read it less often: 2048 channels on 8 x 6 pixels, 48 MB of filter,
// took 2.5 ms instead of 2.9.
constexpr int64_t kWholeImageBytes = 1 << 20;
// A block across images keeps all taps of 16 images.
constexpr int64_t kImagesSourceBytes = 1536 << 10;
// Channels of the filter that pass over all tiles of a block before the next. With several terms a step takes six times
// as long and smaller chunks leave more of L2 to the source: 512 channels on 4 x 4 pixels of 16 images took 2.00 ms
// instead of 2.35. With one term they made layers of CPM2DPose up to 6% slower.
constexpr int64_t kFilterChunkBytes = 512 << 10;
constexpr int64_t kSplitChunkBytes = 128 << 10;
// 32 filters and 32 channels of a wgrad block in L2.
constexpr int64_t kWgradBytes = 1536 << 10;
// Of the gradient: what stays in L2 while all channels pass.
constexpr int64_t kWgradBlockBytes = 1 << 20;
// Tasks to a thread, so that none idles for long; as few as read so much of the filter, since every block reads it
// once: 7 x 7 taps of 128 channels on 32 x 32 pixels, 1.6 MB of filter, took 0.47 ms in blocks of 16 rows instead of
// 0.57 in blocks of 4 (two threads, bfloat16). Fewer pixels to a block read it too often in any case; where it does not
// stay in L2 from one block to the next, twice as many. Blocks are cut by columns too, each part packing the pixels
// once more, only where threads would not have equal shares otherwise: 32 x 24 pixels of 256 channels in two blocks
// took 0.66 ms instead of 0.83 with each block in four parts (two threads, bfloat16).
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kOftenReadBytes = 1 << 20;
constexpr int64_t kMinPixels = 128;

std::vector<PlaneStep> make_steps(const std::vector<PlaneTap>& taps, int64_t unit) {
  const int64_t window = kTileDepth / unit;
  std::vector<int64_t> order(taps.size());
  for (size_t t = 0; t < taps.size(); ++t) order[t] = static_cast<int64_t>(t);
  const auto key = [&](int64_t t) {
    const PlaneTap& tap = taps[static_cast<size_t>(t)];
    return std::tuple(tap.plane, tap.dh, tap.dw);
  };
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  std::vector<PlaneStep> steps;
  for (const int64_t t : order) {
    const PlaneTap& tap = taps[static_cast<size_t>(t)];
    const bool joins = !steps.empty() && steps.back().at.plane == tap.plane && steps.back().at.dh == tap.dh &&
                       tap.dw - steps.back().at.dw < window;
    if (!joins) steps.push_back({tap, {}});
    steps.back().taps.emplace_back(tap.dw - steps.back().at.dw, t);
  }
  return steps;
}

// Row tiles of a whole pass.
double count_tiles(const ConvProblem& problem, const std::vector<Phase>& phases, const SplitPlan& plan,
                   RowTiles row_tiles) {
  double tiles = 0;
  for (const Phase& phase : phases) {
    int64_t count = 0;
    if (row_tiles == RowTiles::columns) {
      count = problem.n * phase.rows * ceil_div(phase.cols, kTileRows);
    } else if (row_tiles == RowTiles::images) {
      count = ceil_div(problem.n, kTileRows) * phase.rows * phase.cols;
    } else {
      const int64_t rows = (plan.images - 1) * (plan.rows + plan.planes.span_h) + std::min(plan.rows, phase.rows);
      count = ceil_div(problem.n, plan.images) * ceil_div(phase.rows, plan.rows) *
              ceil_div((rows - 1) * plan.planes.pitch + phase.cols, kTileRows);
    }
    tiles += static_cast<double>(count);
  }
  return tiles;
}

}  // namespace

SplitPlan plan_split_gather(const ConvProblem& problem, const std::vector<Phase>& phases, int64_t columns,
                            int64_t depth, int64_t source_w, int64_t terms, int64_t threads) {
  SplitPlan plan;
  plan.terms = terms;
  plan.planes = plan_planes(phases, source_w);
  while (plan.unit > 1 && plan.unit / 2 >= depth) plan.unit /= 2;
  plan.channel_blocks = ceil_div(depth, plan.unit);
  plan.panels = ceil_div(columns, 32);
  int64_t rows = 1;
  int64_t most_steps = 1;
  int64_t all_steps = 0;
  for (size_t p = 0; p < phases.size(); ++p) {
    plan.steps.push_back(make_steps(plan.planes.taps[p], plan.unit));
    rows = std::max(rows, phases[p].rows);
    most_steps = std::max(most_steps, static_cast<int64_t>(plan.steps.back().size()));
    all_steps += static_cast<int64_t>(plan.steps.back().size());
  }
  const int64_t row_bytes = terms * plan.channel_blocks * static_cast<int64_t>(plan.planes.residues.size()) *
                            plan.planes.pitch * plan.unit * 2;
  const int64_t image_bytes = std::max<int64_t>(row_bytes * (rows + plan.planes.span_h), 1);
  const int64_t filter_bytes = terms * all_steps * plan.channel_blocks * plan.panels * 2 * kTileBytes;
  const int64_t beside_filter = kSourceAndFilterBytes - filter_bytes;
  const bool resident = beside_filter >= std::min(image_bytes, kSourceBytes);
  const int64_t tasks_per_thread =
      std::clamp(ceil_div(kOftenReadBytes, std::max<int64_t>(filter_bytes, 1)), int64_t{1}, kTasksPerThread);
  const int64_t least_tasks = threads > 1 ? tasks_per_thread * threads : 1;
  const int64_t source_bytes = resident ? std::min(kSourceBytes, beside_filter) : kSourceBytes;
  const auto cut_rows = [&](int64_t most) {
    plan.rows = ceil_div(rows, ceil_div(rows, std::max<int64_t>(most, 1)));
    // Pairs of rows can be pooled.
    if (plan.rows > 1 && plan.rows < rows) plan.rows -= plan.rows % 2;
  };
  if (image_bytes <= (resident ? source_bytes : kWholeImageBytes)) {
    plan.rows = rows;
    const int64_t images = std::max<int64_t>(problem.n, 1);
    plan.images = std::clamp(source_bytes / image_bytes, int64_t{1}, images);
    plan.images = ceil_div(images, ceil_div(images, plan.images));
  } else {
    cut_rows(source_bytes / std::max<int64_t>(row_bytes, 1) - plan.planes.span_h);
  }
  const auto blocks = [&] { return ceil_div(problem.n, plan.images) * ceil_div(rows, plan.rows) * problem.groups; };
  const int64_t least_pixels = resident ? kMinPixels : 2 * kMinPixels;
  const auto can_halve = [&](int64_t size) {
    return blocks() < least_tasks && size > 1 && plan.images * plan.rows * plan.planes.cols >= 2 * least_pixels;
  };
  while (can_halve(plan.images)) plan.images = ceil_div(plan.images, 2);
  while (can_halve(plan.rows)) cut_rows(ceil_div(plan.rows, 2));
  plan.row_tiles = RowTiles::columns;
  double tiles = count_tiles(problem, phases, plan, RowTiles::columns);
  const double line = count_tiles(problem, phases, plan, RowTiles::line);
  if (line < tiles) {
    plan.row_tiles = RowTiles::line;
    tiles = line;
  }
  const double images = count_tiles(problem, phases, plan, RowTiles::images);
  if (images < tiles && kTileRows * image_bytes <= kImagesSourceBytes) {
    plan.row_tiles = RowTiles::images;
    plan.rows = rows;
    plan.images = kTileRows;
    while (blocks() > 2 * least_tasks && 2 * plan.images * image_bytes <= kImagesSourceBytes) plan.images *= 2;
  }
  const auto balanced = [&](int64_t splits) {
    const int64_t tasks = std::max<int64_t>(blocks(), 1) * splits;
    return 10 * tasks >= 9 * round_up(tasks, threads);
  };
  plan.column_splits = 1;
  while (plan.column_splits < plan.panels && !balanced(plan.column_splits)) ++plan.column_splits;
  const int64_t block_bytes = most_steps * terms * 2 * kTileBytes;
  plan.chunk_blocks =
      std::clamp((terms == 1 ? kFilterChunkBytes : kSplitChunkBytes) / block_bytes, int64_t{1}, plan.channel_blocks);
  plan.chunk_blocks = ceil_div(plan.channel_blocks, ceil_div(plan.channel_blocks, plan.chunk_blocks));
  for (size_t p = 0; p < phases.size(); ++p) {
    const double share = count_tiles(problem, {phases[p]}, plan, plan.row_tiles);
    plan.steps_issued += share * static_cast<double>(plan.steps[p].size() * static_cast<size_t>(plan.channel_blocks));
  }
  plan.steps_issued *= static_cast<double>(ceil_div(columns, kTileColumns) * problem.groups * split_products(terms));
  return plan;
}

SplitWgradPlan plan_split_wgrad(const ConvProblem& problem, const Phase& phase, int64_t terms) {
  SplitWgradPlan plan;
  plan.terms = terms;
  plan.planes = plan_planes({phase}, problem.w);
  plan.grad_tiles = ceil_div(problem.k_per_group(), kTileRows);
  const auto position_bytes = [&] { return plan.terms * (1 + plan.copies) * 2 * kTileColumns * 2; };
  const auto odd_shift = [&](const PlaneTap& tap) { return plan.shift(tap) % 2 != 0; };
  const std::vector<PlaneTap>& taps = plan.planes.taps.front();
  const int64_t image = (problem.p + plan.planes.span_h) * plan.planes.pitch;
  int64_t most_positions = kWgradBytes / position_bytes();
  if (problem.n >= kTileDepth / 2 && image * kTileDepth / 2 <= most_positions) {
    plan.inner = std::min<int64_t>(problem.n / (kTileDepth / 2) * (kTileDepth / 2), 2 * kTileDepth);
    while (plan.inner * image > most_positions) plan.inner -= kTileDepth / 2;
  } else if (std::any_of(taps.begin(), taps.end(), odd_shift)) {
    (problem.n % 2 == 0 ? plan.inner : plan.copies) = 2;
    most_positions = kWgradBytes / position_bytes();
  }
  plan.images = plan.inner;
  plan.rows = problem.p;
  if (image * plan.images <= most_positions) {
    const int64_t most = std::max<int64_t>(ceil_div(problem.n, plan.inner), 1);
    plan.images = plan.inner * std::clamp(most_positions / (image * plan.inner), int64_t{1}, most);
  } else {
    const int64_t most = most_positions / (plan.planes.pitch * plan.inner) - plan.planes.span_h;
    plan.rows = ceil_div(problem.p, ceil_div(problem.p, std::max<int64_t>(most, 1)));
  }
  const int64_t tile_bytes = plan.positions() * terms * kTileRows * 2;
  plan.block_tiles = std::max<int64_t>(kWgradBlockBytes / tile_bytes / 2 * 2, 2);
  const double blocks = static_cast<double>(ceil_div(problem.n, plan.images) * ceil_div(problem.p, plan.rows));
  const double steps = static_cast<double>(ceil_div(
      ((plan.images / plan.inner - 1) * plan.height() + plan.rows) * plan.planes.pitch * plan.inner, kTileDepth));
  const double tiles = static_cast<double>(ceil_div(plan.grad_tiles, 2) * 2 * problem.taps() *
                                           ceil_div(problem.c_per_group(), kTileColumns));
  plan.steps_issued = blocks * steps * tiles * static_cast<double>(problem.groups * split_products(terms));
  return plan;
}

}  // namespace segpose
