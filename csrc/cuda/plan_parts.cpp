// SPDX-License-Identifier: BSD-3-Clause
#include "plan_parts.h"

#include <algorithm>
#include <cmath>

namespace segpose::cuda {
namespace {

constexpr double kStoresPerCycle = 16;
constexpr double kL2BytesPerClock = 48;  // of a multiprocessor
constexpr double kOverlapLoss = 0.1;
constexpr int kReservedShared = 1;  // KiB of a block for the system

}  // namespace

bool uses_mma(DType dtype, bool tf32) {
  return dtype == DType::float16 || dtype == DType::bfloat16 || (dtype == DType::float32 && tf32);
}

double fma_rate(const PlanRequest& request) {
  return request.dtype == DType::float64 ? request.gpu.fma64 : request.gpu.fma32;
}

double mma_rate(const PlanRequest& request) {
  return request.dtype == DType::float32 ? request.gpu.mma32 : request.gpu.mma16;
}

int64_t source_pixels(const PlanRequest& request) {
  const ConvProblem& p = request.problem;
  return request.pass == Pass::fprop ? p.n * p.h * p.w : p.n * p.p * p.q;
}

int64_t count_taps(const std::vector<Phase>& phases) {
  int64_t taps = 0;
  for (const Phase& phase : phases) taps += static_cast<int64_t>(phase.taps.size());
  return taps;
}

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

double block_cycles(const Plan& plan, double blocks, double cycles) {
  const double on_one = std::ceil(blocks / plan.request.gpu.multiprocessors);
  const double gaps = std::max(0.0, as_double(plan.blocks_per_sm) - on_one) / std::max(1, plan.blocks_per_sm - 1);
  return on_one * cycles / (1 - (1 - kLonelyShare) * gaps);
}

double fixed_cycles(const Plan& plan) {
  return kBlockCycles + as_double(int64_t{plan.block_m} * plan.block_n) / kStoresPerCycle;
}

double l2_cycles(const Plan& plan, double k_blocks) {
  const double bytes = k_blocks * (plan.block_m + plan.block_n) * plan.block_k * as_double(plan.element());
  return bytes / (kL2BytesPerClock * plan.request.gpu.multiprocessors);
}

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

bool copy_pays(const Plan& plan, int64_t channels, double reuse) {
  return row_depth(channels, plan.request.dtype, true) % per_chunk(plan.request.dtype) == 0 && reuse > kCopyReuse;
}

bool in_chunks(const Plan& plan, const Layout& layout, int64_t channels) {
  return layout.rows && layout.aligned && stored_depth(layout, channels) % per_chunk(plan.request.dtype) == 0;
}

bool is_depthwise(const ConvProblem& problem) {
  return problem.groups > 1 && problem.c_per_group() == 1 && problem.k_per_group() == 1;
}

}  // namespace segpose::cuda
