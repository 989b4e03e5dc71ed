// SPDX-License-Identifier: BSD-3-Clause
#include "planar_plan.h"

#include <algorithm>
#include <utility>

namespace segpose {
namespace {

// Channels of a group that are read at most, and of the only group. 128 channels in 32 groups of 56 x 56 took 7.9 ms
// through channel rows and take 1.4, 256 of 28 x 28 3.3 and 1.7, SegNet's first layer 109 and 87 us; from 3 channels to
// 64 in one group 2.5 and 2.6 ms (3 x 3 taps), 6.4 and 10.4 (7 x 7 at stride 2; Zen 3, two threads). The wgrad of 64
// channels with a multiplier of two took 8.4 ms and takes 0.8, depthwise with 7 x 7 taps over 96 channels 7.6 and 1.7.
constexpr int64_t kMostChannels = 8;
constexpr int64_t kMostAlone = 1;
constexpr int64_t kMostWgradFilters = 32;
// Staged values of a band of rows: 24 KB of floats, which stay in L1. Bands are copied without a padding too: eight
// rows at once are more streams than the hardware sees. 64 channels of 256 x 256, each by itself, took 5.2 ms where
// they lie and take 4.5, 3 x 7 taps over 128 channels 7.1 and 5.8 (Zen 3).
constexpr int64_t kStagedValues = 6 << 10;
// Of a wgrad on both sides, 64 KB of floats: a tile reads each of them for several steps. Beside it 16 KB took 1.0 to
// 1.5 times as long, 32 1.0 to 1.3 and 128 1.0 to 1.15.
constexpr int64_t kWgradValues = 16 << 10;
constexpr int64_t kWgradRows = 4;
// Depthwise rows of fewer vectors leave too much of them idle: beside channel rows in between, 3 x 3 taps took 1.3
// times as long with rows of 14 floats and 0.64 with 16, 0.6 with 56 and 0.5 with 256; the wgrad of 960 channels of 7 x
// 7 took 0.65 ms in planes, 0.43 in rows.
constexpr int64_t kFewestVectors = 2;

// Calls fn with the kernels of the plan.
template <class Fn>
auto with_kernels(const Plan& plan, const Fn& fn) {
  return plan.dtype == DType::float64 ? fn(ukernels<double>(plan.isa)) : fn(ukernels<float>(plan.isa));
}

bool is_depthwise(const Plan& plan) { return plan.algorithm == Algorithm::depthwise; }

// Whether every panel has the channels for tiles of several.
bool in_tiles_of_several(const Plan& plan) {
  const auto several = [](const Panel& panel) { return panel.columns >= kPlanarChannels; };
  return !is_depthwise(plan) && std::all_of(plan.panels.begin(), plan.panels.end(), several);
}

bool gather_may_run_planar(const Plan& plan) {
  const bool grouped = plan.problem.groups > 1;
  if (planar_depth(plan) > (grouped ? kMostChannels : kMostAlone)) return false;
  if (planar_results(plan) * planar_groups(plan) == 1) return false;
  const auto dots = [](const Panel& panel) { return panel.dots; };
  if (std::any_of(plan.panels.begin(), plan.panels.end(), dots)) return false;
  const auto [vector, tall] = with_kernels(plan, [](const auto& kernels) {
    int64_t most = 1;
    for (const auto& tile : kernels.planar) most = std::max<int64_t>(most, tile.rows);
    return std::pair<int64_t, int64_t>(kernels.vector_length, most);
  });
  const int64_t least = vector * (is_depthwise(plan) ? kFewestVectors : 1);
  for (const Phase& phase : plan.phases) {
    if (phase.cols < least || phase.rows < tall) return false;
  }
  const Phase all = all_phases(plan);
  const ConvProblem& problem = plan.problem;
  const bool forward = plan.pass == Pass::fprop;
  return planar_band(plan, all).reads_mostly(all, forward ? problem.h : problem.p, forward ? problem.w : problem.q);
}

bool wgrad_may_run_planar(const Plan& plan) {
  const ConvProblem& problem = plan.problem;
  if (problem.groups == 1 || problem.c_per_group() > kMostChannels) return false;
  if (problem.k_per_group() > kMostWgradFilters) return false;
  const int64_t vector = with_kernels(plan, [](const auto& kernels) { return int64_t{kernels.vector_length}; });
  if (is_depthwise(plan) ? problem.q < kFewestVectors * vector : 2 * problem.q < vector) return false;
  return planar_wgrad_band(plan).reads_mostly(plan.phases.front(), problem.h, problem.w);
}

}  // namespace

int64_t planar_tile_rows(const Plan& plan) {
  return with_kernels(
      plan, [&](const auto& kernels) { return int64_t{kernels.planar[in_tiles_of_several(plan) ? 0 : 1].rows}; });
}

PlanarBand planar_band(const Plan& plan, const Phase& all) {
  const auto phases = static_cast<int64_t>(plan.phases.size());
  return {all, planar_depth(plan), phases > 1 ? phases * planar_results(plan) : 0, planar_tile_rows(plan),
          kStagedValues};
}

PlanarBand planar_wgrad_band(const Plan& plan) {
  return {plan.phases.front(), plan.problem.c_per_group(), plan.problem.k_per_group(), kWgradRows, kWgradValues};
}

bool may_run_planar(const Plan& plan) {
  if (plan.packs_source() || dtype_size(plan.dtype) < 4 || plan.problem.n == 0) return false;
  return plan.pass == Pass::wgrad ? wgrad_may_run_planar(plan) : gather_may_run_planar(plan);
}

}  // namespace segpose
