// SPDX-License-Identifier: BSD-3-Clause
// Plans of wgrad: the reduction over output pixels in pieces that are added in order.
#include <algorithm>
#include <limits>

#include "plan_parts.h"

namespace segpose::cuda {
namespace {

// Shares of the peak that the estimates grant.
constexpr double kWgradEfficiency[] = {0.70, 0.65, 0.55};
constexpr int64_t kWgradPartialBytes = int64_t{256} << 20;
constexpr int64_t kMaxWgradSplits = 512;

// Chooses the pieces of the reduction and fills in the estimate.
void estimate_wgrad(Plan& plan, double rate, double efficiency) {
  const PlanRequest& request = plan.request;
  const int64_t pixels = source_pixels(request);
  const int64_t k_blocks = std::max<int64_t>(ceil_div(pixels, plan.block_k), 1);
  const int64_t tile = int64_t{plan.block_m} * plan.block_n;
  const double k_cycles = as_double(tile * plan.block_k) / (rate * efficiency);
  const int64_t piece_bytes = plan.blocks * tile * (request.dtype == DType::float64 ? 8 : 4);
  const int64_t most = std::clamp<int64_t>(kWgradPartialBytes / piece_bytes, 1, kMaxWgradSplits);
  plan.issued_flops = 2.0 * as_double(plan.blocks * tile * k_blocks * plan.block_k);
  plan.cycles = std::numeric_limits<double>::infinity();
  // Enough pieces to fill the device once, twice, ...
  for (int rounds = 0; rounds <= 8; ++rounds) {
    int64_t splits = rounds == 0 ? 1 : ceil_div(int64_t{rounds} * request.gpu.multiprocessors, plan.blocks);
    splits = std::clamp<int64_t>(splits, 1, std::min(most, ceil_div(k_blocks, kMinSplitBlocks)));
    const int64_t depth = ceil_div(k_blocks, splits);
    splits = ceil_div(k_blocks, depth);
    const double compute =
        block_cycles(plan, as_double(plan.blocks * splits), as_double(depth) * k_cycles + fixed_cycles(plan));
    const double partial = 2.0 * as_double(piece_bytes * splits);
    const double cycles = overlapped({compute, memory_cycles(request, plan.moved_bytes),
                                      l2_cycles(plan, as_double(plan.blocks * k_blocks))}) +
                          memory_cycles(request, partial) + kLaunchCycles;
    if (cycles < plan.cycles) {
      plan.cycles = cycles;
      plan.splits = static_cast<int>(splits);
      plan.k_per_split = depth * plan.block_k;
      plan.partial_bytes = piece_bytes * splits;
    }
  }
}

void use_wgrad_tile(Plan& plan, int tile) {
  const Tile& shape = kWgradTiles[tile];
  plan.tile = tile;
  plan.block_m = shape.block_m;
  plan.block_n = shape.block_n;
  plan.block_k = static_cast<int>(kStageRowBytes / plan.element());
  plan.stages = shape.stages;
  plan.threads = shape.threads();
  plan.shared_bytes = wgrad_shared_bytes(shape, static_cast<int>(plan.element()));
  plan.blocks_per_sm = resident_blocks(plan.request.gpu, plan.shared_bytes, plan.threads, shape.blocks_per_sm);
}

void plan_depthwise_wgrad(Plan& plan) {
  const PlanRequest& request = plan.request;
  const ConvProblem& problem = request.problem;
  plan.depth = 1;
  plan.columns = problem.taps();
  plan.copy_source = !request.source.rows;
  plan.copy_activation = !request.activation.rows;
  plan.block_m = 1;
  plan.block_n = static_cast<int>(plan.columns);
  plan.block_k = DepthwiseTile::kWgradThreads / 32;
  plan.stages = 1;
  plan.threads = DepthwiseTile::kWgradThreads;
  plan.shared_bytes =
      DepthwiseTile::kWgradThreads * DepthwiseTile::kWgradTaps * (request.dtype == DType::float64 ? 8 : 4);
  plan.blocks_per_sm = resident_blocks(request.gpu, plan.shared_bytes, plan.threads, DepthwiseTile::kWgradBlocksPerSm);
  plan.gemm_m = 1;
  plan.m_tiles = plan.n_tiles = 1;
  const int64_t pixels = source_pixels(request);
  const int64_t channel_blocks = ceil_div(problem.groups, 32);
  plan.blocks = channel_blocks;
  const int64_t wanted = ceil_div(int64_t{4} * request.gpu.multiprocessors, channel_blocks);
  plan.k_per_split =
      round_up(std::max<int64_t>(ceil_div(pixels, std::clamp<int64_t>(wanted, 1, kMaxWgradSplits)), 16), plan.block_k);
  plan.splits = static_cast<int>(std::max<int64_t>(ceil_div(pixels, plan.k_per_split), 1));
  plan.partial_bytes = plan.splits * problem.groups * plan.columns * (request.dtype == DType::float64 ? 8 : 4);
  plan.issued_flops = 2.0 * as_double(pixels * plan.columns * problem.groups);
  plan.cycles = memory_cycles(request, plan.moved_bytes) + kLaunchCycles;
}

}  // namespace

void plan_wgrad(Plan& plan) {
  const PlanRequest& request = plan.request;
  const ConvProblem& problem = request.problem;
  plan.phases = {fprop_phase(problem)};
  plan.pack_filter = false;
  if (is_depthwise(problem)) {
    plan.algorithm = Algorithm::depthwise;
    plan_depthwise_wgrad(plan);
    return;
  }
  const bool mma = uses_mma(request);
  plan.algorithm = mma ? Algorithm::mma : Algorithm::fma;
  const int64_t filters = problem.k_per_group();
  Plan best;
  best.cycles = std::numeric_limits<double>::infinity();
  for (int tile = 0; tile < (mma ? kWgradTileCount : 1); ++tile) {
    Plan candidate = plan;
    if (mma) {
      use_wgrad_tile(candidate, tile);
    } else {
      use_fma_tile(candidate, true);
    }
    double efficiency = mma ? kWgradEfficiency[tile] : kFmaEfficiency;
    candidate.depth = stored_depth(request.activation, problem.c_per_group());
    if (mma) {
      const double source_reuse = as_double(ceil_div(problem.taps() * problem.c_per_group(), candidate.block_n));
      const double activation_reuse =
          as_double(ceil_div(filters, candidate.block_m) * problem.taps() * problem.p * problem.q) /
          as_double(std::max<int64_t>(problem.h * problem.w, 1));
      const bool source_fits = in_chunks(plan, request.source, filters);
      const bool activation_fits = in_chunks(plan, request.activation, problem.c_per_group());
      candidate.copy_source = !source_fits;
      candidate.copy_activation = !activation_fits;
      candidate.narrow = (!source_fits && !copy_pays(plan, filters, source_reuse)) ||
                         (!activation_fits && !copy_pays(plan, problem.c_per_group(), activation_reuse));
      if (candidate.narrow) {
        if (!kWgradTileIsNarrow[tile]) continue;
        candidate.copy_source = candidate.copy_activation = false;
        efficiency *= kNarrowEfficiency;
      }
      if (candidate.copy_activation) candidate.depth = round_up(problem.c_per_group(), per_chunk(request.dtype));
    } else {
      candidate.copy_source = !request.source.rows;
      candidate.copy_activation = !request.activation.rows;
    }
    candidate.columns = problem.taps() * candidate.depth;
    set_blocks(candidate, filters);
    estimate_wgrad(candidate, mma ? mma_rate(request) : fma_rate(request), efficiency);
    if (candidate.cycles < best.cycles) best = candidate;
  }
  plan = best;
}

}  // namespace segpose::cuda
