// SPDX-License-Identifier: BSD-3-Clause
// Microkernels of convolution in a transformed domain: tile transforms and the GEMM of each frequency.
//
// A tile of n x n inputs gives m x m outputs of r x r taps, n = m + r - 1:
//
//   y = A^T [ (G g G^T) * (B^T d B) ] A
//
// where the product in brackets is, for every frequency, a GEMM over channels. Values of `vector_length` channels of a
// tile stand together (a line), each value in `parts` vectors (real and imaginary).
#pragma once

#include <cstdint>

#include "../common/conv_problem.h"
#include "cpu_features.h"
#include "dtype.h"
#include "split_ukernels.h"

namespace segpose {

struct TransformCodelets {
  int n;
  int taps;  // r, or 0 for any r <= n
  int frequencies;
  int parts;
  // rows: n rows of the tile, whose pixels lie `pixel_step` apart. Writes v[frequency][line][parts][vector].
  void (*input)(const float* const* rows, int64_t pixel_step, int64_t channels, float* v, int64_t frequency_step,
                int64_t line_step);
  // rows: r rows of taps, `tap_step` apart. Writes u[frequency][line][parts][vector].
  void (*filter)(const float* const* rows, int64_t r, int64_t tap_step, int64_t columns, float* u,
                 int64_t frequency_step, int64_t line_step);
  // p[frequency][line][parts][vector] to m * m pixels, null where there is none, with the epilogue. The m * m pixels of
  // the next tile follow in `out`.
  void (*output)(const float* p, int64_t m, int64_t frequency_step, int64_t line_step, int64_t columns,
                 const Epilogue& epilogue, const float* bias, float* const* out);
};

// out[row][nr] = sum over depth of a[row][depth] * b[depth][nr], in lines on both sides.
struct PanelArgs {
  const float* a;  // [line][row][parts][vector], lines `a_line` apart
  int64_t a_line;
  int64_t depth;
  const float* b;     // [depth][nr vectors][parts][vector]
  const float* next;  // needed soon: asked for on the way, `next_step` values in a step of depth
  int64_t next_step;  // one vector or two
  float* out;         // [line][row][parts][vector], lines `out_line` apart
  int64_t out_line;
};

struct PanelTile {
  int mr;
  void (*run)(const PanelArgs&);
};

// out[row][column] = (first ? 0 : out) + sum over tiles of a[tile][row] * b[tile][column].
struct ReduceArgs {
  const float* a;  // [tile][parts][vector], from the first of the rows on
  const float* b;  // [line][tile][parts][vector]
  int64_t b_line;
  int64_t count;  // of tiles
  float* out;     // [row][line][parts][vector], rows `out_step` apart
  int64_t out_step;
  bool first;
};

struct ReduceTile {
  int mr;       // divides the vector length
  int vectors;  // of columns
  void (*run)(const ReduceArgs&);
};

constexpr int kMaxTransforms = 10;
constexpr int kMaxTransformN = 20;
constexpr int kPanelHeights = 3;
// The least height of a tile; blocks have a multiple of it.
constexpr int64_t kTransformRows = 4;

struct TransformUkernels {
  int vector_length;
  int count;
  TransformCodelets codelets[kMaxTransforms];
  int vectors;                    // of columns of a real panel; a complex one has one
  PanelTile real[kPanelHeights];  // tall to low
  PanelTile complex[kPanelHeights];
  ReduceTile reduce_real;
  ReduceTile reduce_complex;
  void (*pool)(const float* tile, int64_t step, int64_t m, int64_t columns, float* const* out);
};

const TransformUkernels& transform_ukernels(Isa isa);

// The same transforms with operands as tiles of a split GEMM (split_ukernels.h).
struct SplitTransformCodelets {
  int n;
  int taps;
  int frequencies;
  // By terms - 1. Writes v[term][frequency][block of 32 channels][32] bfloat16, steps in bytes.
  void (*input[kMaxTerms])(const float* const* rows, int64_t pixel_step, int64_t channels, char* v, int64_t term_step,
                           int64_t frequency_step, int64_t block_step);
  // w[tap][32 channels][16 columns] to one tile of B for every term and frequency.
  void (*filter[kMaxTerms])(const float* w, char* u, int64_t term_step, int64_t frequency_step);
};

// The codelets for these taps, or null.
const SplitTransformCodelets* split_transform(Isa isa, int r);

}  // namespace segpose
