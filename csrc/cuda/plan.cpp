// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <sstream>

#include "tiles.h"

namespace segpose::cuda {
namespace {

// Shares of the peak that the estimates grant: large warp tiles load fewer fragments for a product, loops without
// tensor cores are bound by shared-memory and address instructions.
constexpr double kGatherEfficiency[] = {0.80, 0.80, 0.70, 0.60, 0.50};
constexpr double kWgradEfficiency[] = {0.70, 0.65, 0.55};
constexpr double kNarrowEfficiency = 0.4;  // of the same tile with whole chunks
constexpr double kFmaEfficiency = 0.75;
constexpr double kDirectEfficiency = 0.5;
// Cycles that a block spends outside its mainloop, with so many elements stored in each, and those of one more kernel.
constexpr double kBlockCycles = 500;
constexpr double kStoresPerCycle = 16;
constexpr double kLonelyShare = 0.6;     // of the efficiency, for a block alone on its multiprocessor
constexpr double kL2BytesPerClock = 48;  // of a multiprocessor
constexpr double kOverlapLoss = 0.1;
constexpr double kLaunchCycles = 4000;
// A copy to padded rows pays when elements are read more often than this, and does not when it adds more padding.
constexpr double kCopyReuse = 2.0;
constexpr double kCopyPadding = 1.5;
// Up to so many columns, or so much gemm_k, a layer counts as one of few channels.
constexpr int64_t kFewColumns = 32;
constexpr int64_t kFewK = 64;
constexpr int64_t kMinSplitBlocks = 4;
constexpr int64_t kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};
constexpr int64_t kWgradPartialBytes = int64_t{256} << 20;
constexpr int64_t kMaxWgradSplits = 512;
constexpr int kReservedShared = 1;  // KiB of a block for the system

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
double as_double(int64_t value) { return static_cast<double>(value); }

const char* pass_word(Pass pass) { return pass == Pass::fprop ? "fprop" : pass == Pass::dgrad ? "dgrad" : "wgrad"; }

int64_t per_chunk(DType dtype) { return kChunkBytes / dtype_size(dtype); }

bool uses_mma(DType dtype, bool tf32) {
  return dtype == DType::float16 || dtype == DType::bfloat16 || (dtype == DType::float32 && tf32);
}
bool uses_mma(const PlanRequest& request) { return uses_mma(request.dtype, request.tf32); }

double fma_rate(const PlanRequest& request) {
  return request.dtype == DType::float64 ? request.gpu.fma64 : request.gpu.fma32;
}

double mma_rate(const PlanRequest& request) {
  return request.dtype == DType::float32 ? request.gpu.mma32 : request.gpu.mma16;
}

double tensor_bytes(const ConvProblem& problem, DType dtype) {
  const double x = as_double(problem.n * problem.h * problem.w * problem.c);
  const double y = as_double(problem.n * problem.p * problem.q * problem.k);
  const double w = as_double(problem.k * problem.c_per_group() * problem.taps());
  return (x + y + w) * as_double(dtype_size(dtype));
}

int64_t source_pixels(const PlanRequest& request) {
  const ConvProblem& p = request.problem;
  return request.pass == Pass::fprop ? p.n * p.h * p.w : p.n * p.p * p.q;
}

bool is_depthwise(const ConvProblem& problem) {
  return problem.groups > 1 && problem.c_per_group() == 1 && problem.k_per_group() == 1;
}

// Taps of all phases together.
int64_t count_taps(const std::vector<Phase>& phases) {
  int64_t taps = 0;
  for (const Phase& phase : phases) taps += static_cast<int64_t>(phase.taps.size());
  return taps;
}

// Pixels of the largest phase; every phase is given as many.
int64_t phase_pixels(const Plan& plan) {
  int64_t rows = 0, cols = 0;
  for (const Phase& phase : plan.phases) {
    rows = std::max(rows, phase.rows);
    cols = std::max(cols, phase.cols);
  }
  return plan.request.problem.n * rows * cols;
}

int resident_blocks(const Gpu& gpu, int shared_bytes, int threads, int register_limit) {
  const int by_shared = gpu.shared_per_sm * 1024 / (shared_bytes + kReservedShared * 1024);
  return std::max(1, std::min({by_shared, gpu.threads_per_sm / threads, register_limit}));
}

double memory_cycles(const PlanRequest& request, double bytes) {
  return bytes / (request.gpu.bytes_per_clock * request.gpu.multiprocessors);
}

// Time of `blocks` equal blocks of `cycles` each, spread over the multiprocessors. One block alone leaves gaps in the
// pipes that others fill, up to as many as fit.
double block_cycles(const Plan& plan, double blocks, double cycles) {
  const double on_one = std::ceil(blocks / plan.request.gpu.multiprocessors);
  const double gaps = std::max(0.0, as_double(plan.blocks_per_sm) - on_one) / std::max(1, plan.blocks_per_sm - 1);
  return on_one * cycles / (1 - (1 - kLonelyShare) * gaps);
}

double fixed_cycles(const Plan& plan) {
  return kBlockCycles + as_double(int64_t{plan.block_m} * plan.block_n) / kStoresPerCycle;
}

// Data that the blocks load, tiles of both operands for every K block, come from L2.
double l2_cycles(const Plan& plan, double k_blocks) {
  const double bytes = k_blocks * (plan.block_m + plan.block_n) * plan.block_k * as_double(plan.element());
  return bytes / (kL2BytesPerClock * plan.request.gpu.multiprocessors);
}

// The slowest of what goes on at the same time, and a little of the rest: none of it is free.
double overlapped(std::initializer_list<double> cycles) {
  double sum = 0;
  for (const double each : cycles) sum += each;
  return std::max(cycles) + kOverlapLoss * (sum - std::max(cycles));
}

void set_blocks(Plan& plan, int64_t m) {
  plan.gemm_m = m;
  plan.m_tiles = ceil_div(m, plan.block_m);
  plan.n_tiles = ceil_div(plan.columns, plan.block_n);
  const int64_t phases = plan.request.pass == Pass::wgrad ? 1 : static_cast<int64_t>(plan.phases.size());
  plan.blocks = plan.m_tiles * plan.n_tiles * plan.request.problem.groups * phases;
}

// fprop, dgrad --------------------------------------------------------------------------------

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

FmaTile fma_tile(DType dtype) { return dtype == DType::float64 ? kFmaTileF64 : kFmaTileF32; }

void use_fma_tile(Plan& plan, bool wgrad) {
  const FmaTile tile = fma_tile(plan.request.dtype);
  const int element = static_cast<int>(plan.element());
  plan.block_m = tile.block_m;
  plan.block_n = tile.block_n;
  plan.block_k = FmaTile::kBlockK;
  plan.stages = FmaTile::kStages;
  plan.threads = FmaTile::kThreads;
  plan.shared_bytes = wgrad ? tile.wgrad_shared_bytes(element) : tile.gather_shared_bytes(element);
  plan.blocks_per_sm = resident_blocks(plan.request.gpu, plan.shared_bytes, plan.threads, FmaTile::kBlocksPerSm);
}

// Whether an operand that is not aligned rows is copied to such, or read element by element.
bool copy_pays(const Plan& plan, int64_t channels, double reuse) {
  return row_depth(channels, plan.request.dtype, true) % per_chunk(plan.request.dtype) == 0 && reuse > kCopyReuse;
}

// Channels of a group as they lie in an operand.
int64_t stored_depth(const Layout& layout, int64_t channels) { return layout.depth != 0 ? layout.depth : channels; }

bool in_chunks(const Plan& plan, const Layout& layout, int64_t channels) {
  return layout.rows && layout.aligned && stored_depth(layout, channels) % per_chunk(plan.request.dtype) == 0;
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
  plan.pack_filter = true;
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

void plan_gather(Plan& plan) {
  const PlanRequest& request = plan.request;
  const ConvProblem& problem = request.problem;
  const bool fprop = request.pass == Pass::fprop;
  const int64_t source_channels = fprop ? problem.c_per_group() : problem.k_per_group();
  const int64_t destination_channels = fprop ? problem.k_per_group() : problem.c_per_group();
  plan.phases = fprop ? std::vector<Phase>{fprop_phase(problem)} : dgrad_phases(problem);
  if (is_depthwise(problem) && request.source.rows && request.source.depth <= 1 && request.destination.rows) {
    plan.algorithm = Algorithm::depthwise;
    plan_depthwise(plan);
    return;
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

int64_t packed_filter_bytes(const Plan& plan) {
  if (!plan.pack_filter) return 0;
  const ConvProblem& problem = plan.request.problem;
  int64_t elements = 0;
  for (const Phase& phase : plan.phases) {
    const int64_t pitch = round_up(static_cast<int64_t>(phase.taps.size()) * plan.depth, plan.block_k);
    elements += pitch * plan.columns * problem.groups;
  }
  return elements * plan.element();
}

// wgrad ---------------------------------------------------------------------------------------

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

// Bytes of an operand as aligned rows.
int64_t row_bytes(const Plan& plan, int64_t pixels, int64_t channels) {
  const int64_t chunk = plan.algorithm == Algorithm::mma ? per_chunk(plan.request.dtype) : 1;
  return pixels * plan.request.problem.groups * round_up(channels, chunk) * plan.element();
}

const char* short_name(const Plan& plan) {
  switch (plan.request.dtype) {
    case DType::float32:
      return plan.tf32() ? "tf32" : "f32";
    case DType::float64:
      return "f64";
    case DType::bfloat16:
      return "bf16";
    case DType::float16:
      return "f16";
  }
  return "";
}

}  // namespace

const char* algorithm_name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::depthwise:
      return "depthwise";
    case Algorithm::direct:
      return "direct";
    case Algorithm::mma:
      return "mma";
    case Algorithm::fma:
      return "fma";
  }
  return "unknown";
}

int64_t row_depth(int64_t channels, DType dtype, bool tf32) {
  if (!uses_mma(dtype, tf32)) return channels;
  const int64_t padded = round_up(channels, per_chunk(dtype));
  return as_double(padded) <= kCopyPadding * as_double(channels) ? padded : channels;
}

std::string unsupported(const PlanRequest& request) {
  const ConvProblem& p = request.problem;
  constexpr int64_t kLimit = (int64_t{1} << 31) - 512;
  const auto over = [](const char* what, int64_t value) {
    return std::string(what) + " must be below 2^31, got " + std::to_string(value);
  };
  if (p.n * p.h * p.w >= kLimit) return over("pixels of the activation", p.n * p.h * p.w);
  if (p.n * p.p * p.q >= kLimit) return over("pixels of the output", p.n * p.p * p.q);
  const int64_t weights = p.k * round_up(p.c_per_group(), kChunkBytes) * p.taps();
  if (weights >= kLimit) return over("elements of the filter", weights);
  return "";
}

Plan plan_conv(const PlanRequest& request) {
  Plan plan{};
  plan.request = request;
  plan.splits = 1;
  plan.flops = request.problem.flops();
  plan.bytes = plan.moved_bytes = tensor_bytes(request.problem, request.dtype);
  if (request.pass == Pass::wgrad) {
    plan_wgrad(plan);
  } else {
    plan_gather(plan);
    if (plan.splits > 1) {
      plan.partial_bytes =
          plan.splits * plan.blocks * plan.block_m * plan.block_n * (request.dtype == DType::float64 ? 8 : 4);
    }
  }
  const ConvProblem& p = request.problem;
  plan.filter_bytes = packed_filter_bytes(plan);
  if (plan.copy_source) {
    const int64_t channels = request.pass == Pass::fprop ? p.c_per_group() : p.k_per_group();
    plan.rows_bytes = row_bytes(plan, source_pixels(request), channels);
  }
  if (plan.copy_activation) plan.activation_bytes = row_bytes(plan, p.n * p.h * p.w, p.c_per_group());
  plan.moved_bytes =
      plan.bytes + 2.0 * as_double(plan.filter_bytes + plan.rows_bytes + plan.activation_bytes + plan.partial_bytes);
  return plan;
}

double Plan::waves() const {
  return as_double(blocks * splits) / as_double(int64_t{request.gpu.multiprocessors} * std::max(blocks_per_sm, 1));
}

std::vector<std::string> Plan::kernels() const {
  std::vector<std::string> names;
  const std::string dtype = short_name(*this);
  const std::string storage = dtype == "tf32" ? "f32" : dtype;
  const bool wgrad = request.pass == Pass::wgrad;
  const auto rows = [&](const Layout& layout, int64_t channels) {
    const bool vector = layout.rows && layout.aligned && channels % per_chunk(request.dtype) == 0;
    names.push_back((vector ? "rows_vector_" : "rows_any_") + storage);
  };
  if (copy_source)
    rows(request.source, request.pass == Pass::fprop ? request.problem.c_per_group() : request.problem.k_per_group());
  if (copy_activation) rows(request.activation, request.problem.c_per_group());
  if (pack_filter) names.push_back("pack_filter_" + dtype);
  std::string name = wgrad ? "wgrad" : "gather";
  const std::string tile_name = std::to_string(block_m) + "x" + std::to_string(block_n);
  switch (algorithm) {
    case Algorithm::depthwise:
      name = wgrad ? "depthwise_wgrad_" + dtype : "depthwise_" + dtype + (narrow ? "" : "_vector");
      break;
    case Algorithm::direct:
      name = "direct_" + dtype + "_" + std::to_string(block_n) + (narrow ? "" : "_vector");
      break;
    case Algorithm::mma:
      name += "_mma_" + dtype + "_" + tile_name + (narrow ? "_narrow" : "");
      break;
    case Algorithm::fma:
      name += "_fma_" + dtype + "_" + tile_name;
      break;
  }
  names.push_back(name);
  if (wgrad) {
    names.push_back("finish_wgrad_" + storage);
  } else if (splits > 1) {
    names.push_back("finish_gather_" + storage);
  }
  return names;
}

std::string Plan::str() const {
  std::ostringstream out;
  const std::string name = kernels()[static_cast<size_t>(pack_filter) + copy_source + copy_activation];
  out << pass_word(request.pass) << ' ' << algorithm_name(algorithm) << ' ' << dtype_name(request.dtype) << " sm_"
      << request.gpu.capability << ' ' << name << " phases=" << phases.size();
  if (shuffle) out << " shuffle";
  out << " blocks=" << blocks;
  if (splits > 1) out << " splits=" << splits;
  out << " blocks_per_sm=" << blocks_per_sm << " waves=" << waves();
  if (copy_source || copy_activation)
    out << " copied=" << (copy_source ? "source" : "") << (copy_source && copy_activation ? "+" : "")
        << (copy_activation ? "activation" : "");
  out << " gflop=" << flops * 1e-9 << " issued=" << (flops > 0 ? issued_flops / flops : 0.0)
      << "x mbytes=" << bytes * 1e-6 << " moved=" << (bytes > 0 ? moved_bytes / bytes : 0.0) << 'x';
  return out.str();
}

}  // namespace segpose::cuda
