// SPDX-License-Identifier: BSD-3-Clause
// Microkernels on AMX tiles: GEMM on bfloat16 with float32 sums, and what packs its operands.
//
// A float32 value is the sum of up to three bfloat16 terms, each the remainder of the one before, rounded or cut off:
// 8, 16 or 24 bits of significand. One term is bfloat16 itself. Two need three products (high * high, high * low, low *
// high) and keep 16 bits, which also holds a float16 exactly; three need six and match a float32 sum.
#pragma once

#include <cstdint>

#include "../common/conv_problem.h"
#include "cpu_features.h"
#include "dtype.h"
#include "tensor_view.h"

namespace segpose {

constexpr int kTileRows = 16;     // rows of A and of C in a tile
constexpr int kTileColumns = 16;  // columns of B and of C in a tile
constexpr int kTileDepth = 32;    // gemm_k of a step: one row of A, 16 pairs of rows of B
constexpr int kTileBytes = 1024;  // of an operand tile
constexpr int kTileFloats = 256;  // of an accumulator tile
constexpr int kMaxTerms = 3;
constexpr int kMaxRowTiles = 4;
constexpr int kMaxColumnTiles = 3;
constexpr int kMaxTiles = 6;  // accumulators of a call

// Where a step reads, in bytes: added to the rows of A and to the tiles of B.
struct SplitStep {
  int32_t a, b;
};

// out = in + sum over blocks and steps of A * B.
struct SplitGemmArgs {
  const char* a[kMaxRowTiles];     // first row of each row tile
  int64_t a_row;                   // bytes from one row of A to the next
  int64_t a_term;                  // bytes from one term of A to the next
  const char* b[kMaxColumnTiles];  // first tile of each column tile, [16 pairs][16 columns][2]
  int64_t b_term;                  // bytes from one term of B to the next
  const SplitStep* steps;
  int64_t count;
  int64_t blocks, a_block, b_block;  // the steps are repeated for every block, so many bytes apart
  const float* in;                   // sums so far, or null; tiles lie as those of `out` do
  float* out;
  int64_t out_row_tile, out_column_tile;  // elements from one tile of [16][16] to the next
  const char* next;                       // what a later call reads in place of `b`,
  int64_t next_lines;                     // and how many cache lines to ask for at each step
};

// Row tiles and column tiles of one call. Four accumulators hide the latency of a tile product.
struct SplitShape {
  int row_tiles, column_tiles;
  void (*run[kMaxTerms])(const SplitGemmArgs&);  // [terms - 1]
};

// Writes 16 rows of accumulators with bias and activation.
struct SplitStoreArgs {
  const float* tiles;  // [column tile][16][16]
  int64_t columns;     // valid columns
  const float* bias;   // [column tiles * 16], or null
  Activation activation;
  float negative_slope;
  DType dtype;
  void* data;
  const int64_t* offsets;  // [16] element offsets of the destination rows, negative where there is none
  bool streams;            // past the caches: 32 columns, each row whole cache lines
};

struct SplitUkernels {
  SplitShape tall;    // 3 x 2, for columns that come from L2: more loads, of fewer bytes
  SplitShape wide;    // 2 x 2
  SplitShape flat;    // 1 x 2, a last row tile
  SplitShape narrow;  // 4 x 1, a last column tile
  SplitShape slim;   // 3 x 1, likewise with several terms: rows stay for all products of a term, which halves the loads
  SplitShape broad;  // 2 x 3, likewise for columns that share cache lines
  void (*begin)();   // before and after gemm calls on a thread
  void (*end)();
  // `pixels` rows of `channels` values, `step` elements apart, to rows of `unit` bfloat16 that follow each other, zeros
  // after the channels. Terms lie `term_step` bytes apart.
  void (*split_pixels)(const float* source, int64_t step, int64_t pixels, int64_t channels, int64_t unit, int terms,
                       char* destination, int64_t term_step);
  void (*copy_pixels)(const uint16_t* source, int64_t step, int64_t pixels, int64_t channels, int64_t unit,
                      char* destination);
  // 32 rows of `columns` <= 16 values to a tile of B.
  void (*pair_rows)(DType dtype, const void* const* rows, int64_t offset, int64_t columns, int terms, char* destination,
                    int64_t term_step);
  // 32 rows of `columns` <= 16 values to 16 rows of 32 bfloat16, `pitch` bytes apart: rows of A for a wgrad. bfloat16
  // sources are taken as they are, so they have one term.
  void (*transpose_rows)(DType dtype, const void* const* rows, int64_t offset, int64_t columns, int terms,
                         char* destination, int64_t pitch, int64_t term_step);
  // [rows][16] floats from a strided matrix, zeros after `columns`.
  void (*gather_matrix)(DType dtype, const void* source, int64_t offset, int64_t row_step, int64_t column_step,
                        int64_t rows, int64_t columns, float* destination);
  void (*store)(const SplitStoreArgs&);
  // The largest values of 2 x 2 pixels: of two row tiles, one image row above the other, `below` elements apart.
  void (*store_pooled)(const SplitStoreArgs&, int64_t below);
};

// Null where the instruction set has no tiles.
const SplitUkernels* split_ukernels(Isa isa);

// Tile products of a step.
constexpr int64_t split_products(int64_t terms) { return terms * (terms + 1) / 2; }

}  // namespace segpose
