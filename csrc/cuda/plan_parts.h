// SPDX-License-Identifier: BSD-3-Clause
// What the plans of all passes are made of: extents, tiles that a device can hold, and estimates of time.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "plan.h"
#include "tiles.h"

namespace segpose::cuda {

// Cycles of one more kernel.
constexpr double kLaunchCycles = 4000;
// Cycles that a block spends outside its mainloop, besides its stores.
constexpr double kBlockCycles = 500;
constexpr double kLonelyShare = 0.6;       // of the efficiency, for a block alone on its multiprocessor
constexpr double kNarrowEfficiency = 0.4;  // of the same tile with whole chunks
constexpr double kFmaEfficiency = 0.75;
// A copy to padded rows pays when elements are read more often than this.
constexpr double kCopyReuse = 2.0;
// A split has no fewer K blocks.
constexpr int64_t kMinSplitBlocks = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline double as_double(int64_t value) { return static_cast<double>(value); }
inline int64_t per_chunk(DType dtype) { return kChunkBytes / dtype_size(dtype); }
bool uses_mma(DType dtype, bool tf32);
inline bool uses_mma(const PlanRequest& request) { return uses_mma(request.dtype, request.tf32); }
double fma_rate(const PlanRequest& request);
double mma_rate(const PlanRequest& request);
int64_t source_pixels(const PlanRequest& request);
// Taps of all phases together.
int64_t count_taps(const std::vector<Phase>& phases);
// Pixels of the largest phase; every phase is given as many.
int64_t phase_pixels(const Plan& plan);
int resident_blocks(const Gpu& gpu, int shared_bytes, int threads, int register_limit);
double memory_cycles(const PlanRequest& request, double bytes);
// Time of `blocks` equal blocks of `cycles` each, spread over the multiprocessors. One block alone leaves gaps in the
// pipes that others fill, up to as many as fit.
double block_cycles(const Plan& plan, double blocks, double cycles);
double fixed_cycles(const Plan& plan);
// Data that the blocks load, tiles of both operands for every K block, come from L2.
double l2_cycles(const Plan& plan, double k_blocks);
// The slowest of what goes on at the same time, and a little of the rest: none of it is free.
double overlapped(std::initializer_list<double> cycles);
void set_blocks(Plan& plan, int64_t m);
FmaTile fma_tile(DType dtype);
void use_fma_tile(Plan& plan, bool wgrad);
// Whether an operand that is not aligned rows is copied to such, or read element by element.
bool copy_pays(const Plan& plan, int64_t channels, double reuse);
// Channels of a group as they lie in an operand.
inline int64_t stored_depth(const Layout& layout, int64_t channels) {
  return layout.depth != 0 ? layout.depth : channels;
}
bool in_chunks(const Plan& plan, const Layout& layout, int64_t channels);
bool is_depthwise(const ConvProblem& problem);

// The plans of a pass; algorithm, phases and everything of the tiles.
void plan_gather(Plan& plan);
void plan_wgrad(Plan& plan);

}  // namespace segpose::cuda
