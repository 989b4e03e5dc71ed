// SPDX-License-Identifier: BSD-3-Clause
// problem -> plan on a GPU: algorithm, tile, split-K, phases, workspace and predicted traffic. Pure and host-only, so
// it is tested and printed for any architecture without a device.
#pragma once

#include <string>
#include <vector>

#include "../common/conv_problem.h"
#include "../common/dtype.h"
#include "../common/phases.h"
#include "gpu.h"

namespace segpose::cuda {

// In order of preference; a plan takes the first that supports the problem and is not clearly slower than the next.
enum class Algorithm {
  depthwise,  // one channel per group on both sides: threads along the channels
  direct,     // few channels: memory-bound on multiply-adds, nothing padded
  mma,        // implicit GEMM on tensor cores
  fma,        // implicit GEMM in full float32 or float64
};

const char* algorithm_name(Algorithm algorithm);

// How an operand lies in memory.
struct Layout {
  bool rows = true;     // channels one behind the other
  bool aligned = true;  // and every pixel on a 16-byte boundary
  int64_t depth = 0;    // channels of a group with their padding, 0 where there is none
};

struct PlanRequest {
  ConvProblem problem;
  Pass pass;
  DType dtype;
  bool tf32;  // float32 may be computed in tf32
  Gpu gpu;
  Layout source;             // fprop: activation, dgrad and wgrad: output
  Layout destination;        // fprop: output, dgrad: activation; unused by wgrad
  Layout activation;         // wgrad only
  bool filter_rows = false;  // the filter lies as [K][R][S][C / groups] on a 16-byte boundary
};

struct Plan {
  PlanRequest request;
  Algorithm algorithm;
  std::vector<Phase> phases;  // fprop and dgrad: destination pixels; wgrad: the fprop phase
  bool shuffle;      // dgrad with one tap for each destination pixel: one GEMM whose columns are (tap, channel)
  int tile;          // of kGatherTiles or kWgradTiles, mma only
  bool narrow;       // loads of single elements, or of none-vector channels
  bool copy_source;  // operands first copied to aligned rows
  bool copy_activation;
  bool pack_filter;
  int block_m, block_n, block_k;
  int stages, threads, shared_bytes, blocks_per_sm;
  int64_t depth;    // channels of a tap of gemm_k (wgrad: of gemm_n), padded where copied
  int64_t columns;  // gemm_n of a group
  int64_t gemm_m;   // pixels of a phase; wgrad: filters of a group
  int64_t m_tiles, n_tiles;
  int64_t blocks;  // of one split, all phases
  int splits;
  int64_t k_per_split;                                                // K blocks; wgrad: pixels
  int64_t filter_bytes, rows_bytes, activation_bytes, partial_bytes;  // of the workspace
  double flops;                                                       // of the problem
  double issued_flops;                                                // of the tiles, padding included
  double bytes;                                                       // least traffic: each operand and result once
  double moved_bytes;                                                 // with copies, packed filters and partial sums
  double cycles;                                                      // estimate that the choice is based on

  int64_t element() const { return dtype_size(request.dtype); }
  bool tf32() const { return algorithm == Algorithm::mma && request.dtype == DType::float32; }
  int64_t grid_x() const { return blocks; }
  double waves() const;
  // Every kernel that runs, in order, as the table of kernels names them.
  std::vector<std::string> kernels() const;
  std::string str() const;
};

// Why the kernels cannot run a problem (extents over 32 bits inside an image or a phase), empty when they can.
std::string unsupported(const PlanRequest& request);

Plan plan_conv(const PlanRequest& request);

// Channels of a group, padded where a copy to rows had better be.
int64_t row_depth(int64_t channels, DType dtype, bool tf32);

}  // namespace segpose::cuda
