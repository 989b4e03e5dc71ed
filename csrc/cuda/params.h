// SPDX-License-Identifier: BSD-3-Clause
// What the kernels receive: plain data, filled by the host. Strides and offsets are in elements.
#pragma once

#include <cstdint>

#include "fast_div.h"

namespace segpose::cuda {

// An activation or output, channels of all groups side by side.
struct View {
  void* data;
  int64_t stride_n, stride_h, stride_w, stride_c;
  int h, w;
};

enum class Act : int { none, relu, leaky_relu };

// 1-D grids hold what is fastest first; launchers check their bounds.
struct Grid {
  int64_t blocks;
  int splits;  // gridDim.y
};

struct EpilogueParams {
  const void* bias;  // [columns of all groups] or null
  int64_t bias_stride;
  double negative_slope;
  Act act;
};

// One phase of a gather; see common/phases.h. The taps of a phase form a grid: tap (i, j) reads the source pixel
// (row * istep_h + off_h + i * tap_step_h, col * istep_w + off_w + j * tap_step_w).
struct PhaseParams {
  int oh, ow;
  int off_h, off_w;
  int taps_h, taps_w;
  int k_blocks;          // of the tile's gemm_k
  int filter_pitch;      // gemm_k of a packed filter row
  int64_t filter_start;  // of this phase's packed filters
  int r, s;              // of tap (0, 0) in the filter
};

constexpr int kMaxPhases = 64;

// A filter [K, C / groups, R, S] with any strides, as a gather sees it: columns and gemm_k.
struct FilterParams {
  const void* data;
  int64_t stride_k, stride_c, stride_r, stride_s;
  int channels;        // of a group in gemm_k
  bool by_output;      // fprop: columns are filters; otherwise columns are activation channels
  int r_step, s_step;  // between the taps of a phase
};

// fprop and dgrad: destination(pixel, column) = act(sum over taps, depth of source * filter + bias).
struct GatherParams {
  Grid grid;
  View source;
  View destination;
  const void* filter;     // packed [phase][group][columns][filter_pitch], k = tap * depth + channel
  FilterParams unpacked;  // for the kernel that reads it where it is
  void* partial;          // split-K: sums [split][block][BLOCK_M][BLOCK_N]; null when not split
  EpilogueParams epilogue;
  int64_t m_total;  // pixels of a phase: batch * rows * cols
  int depth;        // source channels of a group
  int columns;      // destination columns of a group
  int istep_h, istep_w, ostep_h, ostep_w;
  int tap_step_h, tap_step_w;
  FastDiv depth_div;
  FastDiv image, row;  // pixels of a phase's image, and of its row
  FastDiv n_tiles, groups, m_tiles;
  int k_blocks_per_split;
  bool vector_store;  // the destination takes 16-byte stores
  // Kernel equals stride: columns are (tap, channel), and a tap is a place in the destination's patch.
  int shuffle_channels;  // 0: columns are channels
  FastDiv shuffle_channel, shuffle_tap_w;
  PhaseParams phases[kMaxPhases];
};

// wgrad: sums over output pixels of output(pixel, k) * activation(pixel at tap, c), in pieces of the pixels.
struct WgradParams {
  Grid grid;
  View output;
  View activation;
  void* partial;  // [split][block][BLOCK_M][BLOCK_N]; finish.cuh adds the pieces in order
  int64_t pixels;
  int64_t pixels_per_split;
  int groups;
  int filters;       // gemm_m of a group
  int output_depth;  // channels of a group in the output, padding included
  int depth;         // activation channels of a group
  int columns;       // gemm_n of a group: taps * depth
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  FastDiv image, row;
  FastDiv depth_div, tap_w;
  FastDiv n_tiles, m_tiles;
};

// Filters [K, C / groups, R, S] with any strides into the rows that a gather reads; zeros where a row is padded.
struct PackPhase {
  int r, s;  // of tap (0, 0)
  FastDiv taps_w;
  int taps;
  FastDiv pitch;
  int64_t start, count;
};

struct PackParams {
  Grid grid;
  FilterParams filter;
  void* packed;
  int64_t row_stride, k_stride;  // of the packed filters; a row stride of 0 stands for the phase's pitch
  FastDiv columns;               // rows of a group
  FastDiv depth_div;             // padded channels of a row's tap
  int shuffle_channels;          // 0, or rows are (tap, channel)
  FastDiv shuffle_channel, shuffle_tap_w;
  PackPhase phases[kMaxPhases];
};

// An activation or gradient with any strides as rows of channels [pixels][groups][depth], zeros where padded; on the
// way it may be masked by the sign of an output, and its columns summed.
struct RowsParams {
  Grid grid;
  View source;
  View output;  // decides the mask; data null: no mask
  Act act;
  double negative_slope;
  void* rows;     // null: only sum
  void* partial;  // sums [block of pixels][channels]; null: none
  int64_t pixels, pixels_per_block;
  FastDiv image, row;
  int channels;        // of all groups
  int group_channels;  // of a group, at most its depth
  FastDiv depth;       // padded channels of a group
  int padded;          // of all groups
};

// Adds the pieces of a wgrad in order and writes them as a filter gradient.
struct FinishParams {
  Grid grid;
  const void* partial;
  int64_t piece;  // elements of one
  int pieces;
  int block_m, block_n;
  FastDiv m_tile, n_tile;  // block_m and block_n as divisors
  int m_tiles, n_tiles;
  int64_t count;  // rows of all groups times columns
  FastDiv columns, filters, depth_div, tap_w;
  int channels;  // of a tap, at most its depth
  void* gradient;
  int64_t stride_k, stride_c, stride_r, stride_s;
};

struct FinishBiasParams {
  Grid grid;
  const void* partial;  // [pieces][channels]
  int pieces, channels;
  void* gradient;
};

}  // namespace segpose::cuda
