// SPDX-License-Identifier: BSD-3-Clause
// Plans of fprop and dgrad: a gather for each destination pixel, by implicit GEMM, directly or depthwise.
#include <algorithm>
#include <limits>

#include "plan_parts.h"

namespace segpose::cuda {
namespace {

// Shares of the peak that the estimates grant: large warp tiles load fewer fragments for a product.
constexpr double kGatherEfficiency[] = {0.80, 0.80, 0.70, 0.60, 0.50};
constexpr double kDirectEfficiency = 0.5;
// Up to so many columns, or so much gemm_k, a layer counts as one of few channels.
constexpr int64_t kFewColumns = 32;
constexpr int64_t kFewK = 64;
// A depthwise kernel numbers its threads in 32 bits.
constexpr int64_t kMostThreads = (int64_t{1} << 31) - DepthwiseTile::kThreads;
constexpr int64_t kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};

// K blocks of a phase.
int64_t k_blocks_of(const Plan& plan, const Phase& phase) {
  return ceil_div(static_cast<int64_t>(phase.taps.size()) * plan.depth, plan.block_k);
}

// Chooses the splits of a tile and fills in its estimate.
void estimate_gather(Plan& plan, double rate, double efficiency) {
  const double k_cycles = as_double(int64_t{plan.block_m} * plan.block_n * plan.block_k) / (rate * efficiency);
  int64_t total_k = 0, most_k = 0;
  for (const Phase& phase : plan.phases) {
    total_k += k_blocks_of(plan, phase);
    most_k = std::max(most_k, k_blocks_of(plan, phase));
  }
  const double phases = as_double(static_cast<int64_t>(plan.phases.size()));
  const double average_k = total_k / phases;
  plan.issued_flops =
      2.0 * as_double(plan.blocks) * average_k * as_double(int64_t{plan.block_m} * plan.block_n * plan.block_k);
  const double memory = memory_cycles(plan.request, plan.moved_bytes);
  plan.cycles = std::numeric_limits<double>::infinity();
  for (const int64_t splits : kSplits) {
    if (splits > 1 && most_k / splits < kMinSplitBlocks) break;
    const double compute = block_cycles(plan, as_double(plan.blocks * splits),
                                        average_k / as_double(splits) * k_cycles + fixed_cycles(plan));
    // However many multiprocessors there are, the deepest block runs on one of them.
    const double deepest = (as_double(ceil_div(most_k, splits)) * k_cycles + fixed_cycles(plan)) / kLonelyShare;
    double cycles =
        overlapped({std::max(compute, deepest), memory, l2_cycles(plan, as_double(plan.blocks) * average_k)});
    const int64_t partial = splits == 1 ? 0 : splits * plan.blocks * plan.block_m * plan.block_n * 4;
    if (splits > 1) cycles += kLaunchCycles + memory_cycles(plan.request, as_double(partial));
    if (cycles < plan.cycles) {
      plan.cycles = cycles;
      plan.splits = static_cast<int>(splits);
    }
  }
  plan.k_per_split = std::max<int64_t>(ceil_div(most_k, plan.splits), 1);
}

void use_gather_tile(Plan& plan, int tile, bool narrow) {
  const Tile& shape = kGatherTiles[tile];
  plan.tile = tile;
  plan.narrow = narrow;
  plan.block_m = shape.block_m;
  plan.block_n = shape.block_n;
  plan.block_k = static_cast<int>(kStageRowBytes / plan.element());
  plan.stages = shape.stages;
  plan.threads = shape.threads();
  plan.shared_bytes = gather_shared_bytes(shape);
  plan.blocks_per_sm = resident_blocks(plan.request.gpu, plan.shared_bytes, plan.threads, shape.blocks_per_sm);
}

// Every destination position along an axis has exactly one tap: kernels equal their stride, or there is one source.
bool one_tap_each(int64_t source, int64_t extent, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return pad == 0 && (kernel == 1 || dilation == 1) && extent == source * kernel && (source == 1 || kernel == stride);
}

bool can_shuffle(const PlanRequest& request) {
  const ConvProblem& p = request.problem;
  return request.pass == Pass::dgrad && p.taps() > 1 &&
         one_tap_each(p.p, p.h, p.r, p.stride_h, p.pad_h, p.dilation_h) &&
         one_tap_each(p.q, p.w, p.s, p.stride_w, p.pad_w, p.dilation_w);
}

// One phase over the source pixels; its columns are (tap, channel).
Phase shuffle_phase(const ConvProblem& p) { return {0, 0, p.p, p.q, p.r, p.s, 1, 1, {{0, 0, 0, 0}}, false}; }

void plan_implicit_gemm(Plan& plan, int64_t source_channels, int64_t destination_channels) {
  const PlanRequest& request = plan.request;
  const ConvProblem& problem = request.problem;
  plan.shuffle = can_shuffle(request);
  plan.columns = destination_channels;
  if (plan.shuffle) {
    plan.phases = {shuffle_phase(problem)};
    plan.columns *= problem.taps();
  }
  const int64_t m = phase_pixels(plan);
  const double reads =
      as_double(count_taps(plan.phases)) * as_double(m) / as_double(std::max<int64_t>(source_pixels(request), 1));
  const double element = as_double(plan.element());
  const double source_bytes = as_double(source_pixels(request) * source_channels * problem.groups) * element;
  const bool mma = plan.algorithm == Algorithm::mma;
  plan.depth = stored_depth(request.source, source_channels);

  Plan best;
  best.cycles = std::numeric_limits<double>::infinity();
  for (int tile = 0; tile < (mma ? kGatherTileCount : 1); ++tile) {
    Plan candidate = plan;
    if (mma) {
      use_gather_tile(candidate, tile, false);
    } else {
      use_fma_tile(candidate, false);
    }
    const double reuse = reads * as_double(ceil_div(plan.columns, candidate.block_n));
    double efficiency = mma ? kGatherEfficiency[tile] : kFmaEfficiency;
    if (mma && !in_chunks(plan, request.source, source_channels)) {
      candidate.copy_source = copy_pays(plan, source_channels, reuse);
      candidate.narrow = !candidate.copy_source;
      if (candidate.narrow && !kGatherTileIsNarrow[tile]) continue;
      if (candidate.narrow) efficiency *= kNarrowEfficiency;
    } else if (!mma) {
      candidate.copy_source = !request.source.rows && reuse > 2 * kCopyReuse;
    }
    if (candidate.copy_source) {
      if (mma) candidate.depth = round_up(source_channels, per_chunk(request.dtype));
      candidate.moved_bytes += source_bytes + source_bytes * as_double(candidate.depth) / as_double(source_channels);
    }
    set_blocks(candidate, m);
    estimate_gather(candidate, mma ? mma_rate(request) : fma_rate(request), efficiency);
    if (candidate.copy_source) candidate.cycles += kLaunchCycles + memory_cycles(request, 2 * source_bytes);
    if (candidate.cycles < best.cycles) best = candidate;
  }
  plan = best;
  // A 1x1 or channels-last filter already lies in rows of gemm_k; tf32 has to be rounded on the way.
  const int64_t k_total = problem.taps() * source_channels;
  plan.pack_filter = !(request.pass == Pass::fprop && request.filter_rows && plan.depth == source_channels &&
                       k_total % plan.block_k == 0 && !plan.tf32());
}

void plan_direct(Plan& plan, int64_t source_channels, int64_t destination_channels) {
  const PlanRequest& request = plan.request;
  plan.depth = stored_depth(request.source, source_channels);
  plan.columns = destination_channels;
  plan.block_m = DirectTile::kBlockM;
  plan.block_n = destination_channels == 1 ? 1 : 8;
  plan.block_k = 1;
  plan.stages = 1;
  plan.threads = DirectTile::kThreads;
  const int accumulator = request.dtype == DType::float64 ? 8 : 4;
  plan.shared_bytes = DirectTile::kChunk * plan.block_n * accumulator;
  plan.blocks_per_sm = resident_blocks(request.gpu, plan.shared_bytes, plan.threads,
                                       DirectTile::blocks_per_sm(plan.block_n, accumulator));
  plan.narrow = !in_chunks(plan, request.source, source_channels);
  plan.pack_filter = false;  // each block reads what it needs of it once
  plan.splits = 1;
  set_blocks(plan, phase_pixels(plan));
  const double products = as_double(phase_pixels(plan) * count_taps(plan.phases) * plan.depth) *
                          as_double(plan.n_tiles * plan.block_n * request.problem.groups);
  plan.issued_flops = 2 * products;
  plan.k_per_split = std::numeric_limits<int32_t>::max();
  // Multiply-adds are spread over all multiprocessors, or over the few that have a block.
  const double busy = std::min(as_double(request.gpu.multiprocessors), as_double(plan.blocks));
  const double compute = products / (busy * fma_rate(request) * kDirectEfficiency);
  plan.cycles = overlapped({compute, memory_cycles(request, plan.moved_bytes)}) + kBlockCycles;
}

void plan_depthwise(Plan& plan) {
  const PlanRequest& request = plan.request;
  const ConvProblem& problem = request.problem;
  plan.depth = 1;
  plan.columns = 1;
  plan.narrow = !(in_chunks(plan, request.source, problem.c) && request.destination.aligned);
  const int64_t lanes = problem.c / (plan.narrow ? 1 : per_chunk(request.dtype));
  plan.block_m = DepthwiseTile::kPixels;
  plan.block_n = static_cast<int>(plan.narrow ? 1 : per_chunk(request.dtype));
  plan.block_k = 1;
  plan.stages = 1;
  plan.threads = DepthwiseTile::kThreads;
  plan.shared_bytes = 0;
  plan.blocks_per_sm = resident_blocks(request.gpu, 0, plan.threads, DepthwiseTile::kBlocksPerSm);
  plan.pack_filter = true;
  plan.splits = 1;
  plan.gemm_m = phase_pixels(plan);
  plan.m_tiles = ceil_div(plan.gemm_m, plan.block_m);
  plan.n_tiles = lanes;
  plan.blocks = ceil_div(plan.m_tiles * lanes, plan.threads) * static_cast<int64_t>(plan.phases.size());
  plan.issued_flops = 2.0 * as_double(plan.gemm_m * count_taps(plan.phases) * problem.c);
  plan.k_per_split = std::numeric_limits<int32_t>::max();
  plan.cycles = memory_cycles(request, plan.moved_bytes) + kBlockCycles;
}

bool few_channels(const Plan& plan, int64_t source_channels, int64_t destination_channels) {
  return destination_channels <= kFewColumns || plan.request.problem.taps() * source_channels <= kFewK;
}

}  // namespace

void plan_gather(Plan& plan) {
  const PlanRequest& request = plan.request;
  const ConvProblem& problem = request.problem;
  const bool fprop = request.pass == Pass::fprop;
  const int64_t source_channels = fprop ? problem.c_per_group() : problem.k_per_group();
  const int64_t destination_channels = fprop ? problem.k_per_group() : problem.c_per_group();
  plan.phases = fprop ? std::vector<Phase>{fprop_phase(problem)} : dgrad_phases(problem);
  if (is_depthwise(problem) && request.source.rows && request.source.depth <= 1 && request.destination.rows) {
    Plan depthwise = plan;
    depthwise.algorithm = Algorithm::depthwise;
    plan_depthwise(depthwise);
    if (depthwise.m_tiles * depthwise.n_tiles < kMostThreads) {
      plan = depthwise;
      return;
    }
  }
  Plan gemm = plan;
  gemm.algorithm = uses_mma(request) ? Algorithm::mma : Algorithm::fma;
  plan_implicit_gemm(gemm, source_channels, destination_channels);
  if (few_channels(plan, source_channels, destination_channels)) {
    plan.algorithm = Algorithm::direct;
    plan_direct(plan, source_channels, destination_channels);
    if (plan.cycles <= gemm.cycles) return;
  }
  plan = gemm;
}

}  // namespace segpose::cuda
