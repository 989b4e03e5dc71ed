// SPDX-License-Identifier: BSD-3-Clause
// Microkernels: the innermost register-tile routines, one table per instruction set and compute type.
#pragma once

#include <cstdint>

#include "../common/conv_problem.h"
#include "cpu_features.h"
#include "dtype.h"

namespace segpose {

// C[mr][nr] = sum over the listed taps and depth of A[tap][row][depth] * B[tap][depth][nr], then the epilogue.
template <class T>
struct GemmArgs {
  const int32_t* taps;  // [count] which taps
  int64_t count;
  const T* const* a;  // [tap][mr] pointers to rows of `depth` values
  int64_t a_step;     // pointers from one tap to the next
  int64_t a_offset;   // elements added to every pointer of `a`
  int64_t depth;
  const T* b;           // [tap][depth][nr] packed
  int64_t b_step;       // elements from one tap to the next
  const T* partial_in;  // [mr][nr] sums of earlier chunks, or null
  T* partial_out;       // [mr][nr] where sums go while chunks remain, or null for the epilogue
  T* const* out;        // [mr] destination rows
  int64_t columns;      // valid columns of the last panel, <= nr
  bool streams;         // past the caches: nr columns, each row of `out` whole cache lines
  const T* bias;        // [nr], or null
  Activation activation;
  T negative_slope;
};

// The rows left at the end of a block run in the lowest of the tiles that holds them.
constexpr int kLowGemmTiles = 3;
constexpr int kLowGemmRows[kLowGemmTiles] = {1, 2, 4};

template <class T>
struct GemmTile {
  int mr;
  int nr;
  void (*run)(const GemmArgs<T>&);
  void (*low[kLowGemmTiles])(const GemmArgs<T>&);

  // Position in `low` of the tile for the last `rows` of a block; kLowGemmTiles for the tall one.
  int low_tile(int64_t rows) const {
    int i = 0;
    while (i < kLowGemmTiles && rows > kLowGemmRows[i]) ++i;
    return i < kLowGemmTiles && kLowGemmRows[i] < mr ? i : kLowGemmTiles;
  }

  void run_rows(const GemmArgs<T>& args, int64_t rows) const {
    const int i = low_tile(rows);
    (i < kLowGemmTiles ? low[i] : run)(args);
  }

  // Rows that the tiles of a block of so many read, real or not.
  int64_t rows_read(int64_t rows) const {
    const int64_t last = rows % mr;
    if (last == 0) return rows;
    const int i = low_tile(last);
    return rows - last + (i < kLowGemmTiles ? kLowGemmRows[i] : mr);
  }
};

// The same for pixels at equal distances: C[m][nr] = sum over runs and depth of a[runs[i] + m * a_step + d] *
// b[i][d][nr].
template <class T>
struct RowsArgs {
  const T* a;
  int64_t a_step;       // elements from one pixel to the next
  const int64_t* runs;  // [count] elements from `a`
  int64_t count;
  int64_t depth;
  const T* b;  // [count][depth][nr] packed
  T* out;
  int64_t out_step;  // elements from one pixel to the next
  int64_t columns;   // valid columns of the last panel, <= nr
  bool streams;      // past the caches: nr columns, each row of `out` whole cache lines
  const T* bias;     // [nr], or null
  Activation activation;
  T negative_slope;
};

template <class T>
struct RowsTile {
  int mr;
  int nr;
  void (*run)(const RowsArgs<T>&);
};

// Consecutive pixel pairs of a wgrad reduction.
template <class T>
struct Segment {
  const T* g;  // output-gradient row of the first pixel
  const T* x;  // activation row of the first pixel
  int64_t length;
};

// out[mr][nr] += sum over segments and pixels of g[pixel][row] * x[pixel][column].
template <class T>
struct WgradArgs {
  const Segment<T>* segments;
  int64_t count;
  int64_t g_offset, x_offset;  // added to every segment's pointers
  int64_t g_step, x_step;      // elements from one pixel to the next
  T* out;
  int64_t out_step;  // elements from one row of `out` to the next
};

template <class T>
struct WgradTile {
  int mr;
  int nr;
  void (*run)(const WgradArgs<T>&);
};

// out[pixel][channel] = act(sum over taps of a[pixel][channel] * w[channel] + bias[channel]), pixels `a_step` and
// `out_step` apart.
template <class T>
struct DepthwiseTap {
  const T* a;
  const T* w;
  bool prefetches;  // what it reads of the next pixels
};

template <class T>
struct DepthwiseArgs {
  const DepthwiseTap<T>* taps;
  int64_t count;
  int64_t a_step;
  T* out;
  int64_t out_step;
  int64_t pixels;
  int64_t channels;
  bool streams;  // past the caches: each pixel of `out` whole cache lines
  const T* bias;
  Activation activation;
  T negative_slope;
};

// out[pixel][channel] = act(sum over taps of a[offsets[tap]][pixel][channel] * w[tap][channel] + bias[channel]) for a
// cache line of channels, of which `a` holds no others.
template <class T>
struct DepthwiseBlockArgs {
  const T* a;
  const int64_t* offsets;  // [count]
  int64_t count;
  const T* w;
  int64_t w_step;  // elements from one tap to the next
  T* out;
  int64_t out_step;  // elements from one pixel to the next
  int64_t pixels;    // those of the tile at least
  const T* bias;     // or null
  Activation activation;
  T negative_slope;
};

template <class T>
struct DepthwiseBlockTile {
  int pixels;
  void (*run)(const DepthwiseBlockArgs<T>&);
};

// sums[tap][channel] += sum over pixels of g[pixel][channel] * x[tap][pixel][channel], pixels `g_step` and `x_step`
// apart.
template <class T>
struct DepthwiseWgradTap {
  const T* x;
  T* sums;  // whole vectors
};

template <class T>
struct DepthwiseWgradArgs {
  const DepthwiseWgradTap<T>* taps;  // a tile follows them, whose sums are of no use
  int64_t count;
  const T* g;
  int64_t g_step, x_step;
  int64_t pixels;
  int64_t channels;
};

// out[channel][row][col] = act(sum over steps of a[offsets[step] + row * a_step + col] * w[step * w_step + channel] +
// bias[channel]) for the channels and rows of a tile.
template <class T>
struct PlanarArgs {
  const T* a;
  int64_t a_step;
  const int64_t* offsets;  // [count]
  int64_t count;
  const T* w;
  int64_t w_step;
  T* out;
  int64_t out_step;     // elements from one row to the next
  int64_t out_channel;  // and from one channel to the next
  int64_t columns;      // a vector at least; of tiles that write past the caches whole cache lines
  const T* bias;        // or null
  Activation activation;
  T negative_slope;
};

template <class T>
struct PlanarTile {
  int channels;
  int rows;
  void (*run)(const PlanarArgs<T>&);
};

// out[filter][step] += sum over rows and columns of g[filter][row][col] * x[offsets[step] + row * x_step + col].
template <class T>
struct PlanarWgradArgs {
  const T* g;
  int64_t g_step;    // elements from one row to the next
  int64_t g_filter;  // and from one filter to the next
  const T* x;
  int64_t x_step;
  const int64_t* offsets;  // [steps of the tile]
  int64_t rows, columns;
  T* out;
  int64_t out_filter;
};

template <class T>
struct PlanarWgradTile {
  int filters;
  int steps;
  void (*run)(const PlanarWgradArgs<T>&);
};

// Destination pixels, and where the tap at offset zero reads for each of them.
template <class T>
struct PointerArgs {
  const T* source;
  const T* zeros;  // what a tap outside of the source reads
  int64_t h, w;    // the source's extents, and elements from one row and column to the next
  int64_t stride_h, stride_w;
  int64_t count;
  const int64_t* row;  // [count] coordinates in the source
  const int64_t* col;
  const int64_t* at;  // [count] elements from `source` to there
};

// out = gradient g through the activation, by the sign of its output y, and its sums.
template <class T>
struct MaskArgs {
  DType dtype;  // of g, y and out: T's own, or bfloat16 with T = float
  const void* g;
  const void* y;  // or null: out = g
  void* out;      // or null: sums only
  int64_t count;
  Activation activation;
  T negative_slope;
  T* sums;         // [period] sums of out[i] by i % period, added to what is there; or null
  int64_t period;  // a multiple of the vector length
};

constexpr int kMaxGemmTiles = 3;
constexpr int kMaxWgradTiles = 16;
constexpr int kMaxRowsTiles = 10;
constexpr int kMaxDotsTiles = 9;
constexpr int kDepthwisePixels = 8;
constexpr int kDepthwiseBlockTiles = 3;
constexpr int kDepthwiseWgradTaps = 9;  // of a tile
constexpr int kPlanarTiles = 3;
constexpr int kPlanarChannels = 4;  // of a tile of several
constexpr int kPlanarWgradTiles = 3;
constexpr int kPlanarWgradSteps = 9;  // of a tile at most

// Rows tiles of few columns, whose filter is [run][nr][depth].
template <class T>
struct DotsTiles {
  int widest;  // columns; tiles have every number of them from 1 on
  int count;
  RowsTile<T> tiles[kMaxDotsTiles];  // of one width tall first; the last has one row
};

template <class T>
struct Ukernels {
  int vector_length;  // elements of T
  int gemm_tiles;
  GemmTile<T> gemm[kMaxGemmTiles];  // narrow to wide
  int wgrad_tiles;
  WgradTile<T> wgrad[kMaxWgradTiles];  // wide and tall first
  int rows_tiles;
  RowsTile<T> rows[kMaxRowsTiles];  // wide and tall first; every width has tiles of one row
  void (*depthwise)(const DepthwiseArgs<T>&);
  DepthwiseBlockTile<T> depthwise_blocks[kDepthwiseBlockTiles];  // of most pixels first
  void (*depthwise_wgrad)(const DepthwiseWgradArgs<T>&);
  void (*load_row)(DType dtype, const void* source, int64_t count, T* row);
  void (*store_row)(DType dtype, const T* row, int64_t count, void* destination);
  void (*mask_line)(const MaskArgs<T>&);
  // destination[column][row] = source[row][column], each with elements from one row to the next.
  void (*transpose)(const T* source, int64_t source_step, int64_t rows, int64_t columns, T* destination,
                    int64_t destination_step);
  // The pointers of the tap that reads so many rows and columns further.
  void (*point_rows)(const PointerArgs<T>&, int64_t off_h, int64_t off_w, const T** out);
  DotsTiles<T> dots;
  PlanarTile<T> planar[kPlanarTiles];                  // of several channels and of one
  PlanarTile<T> planar_lines;                          // of one channel, past the caches
  PlanarWgradTile<T> planar_wgrad[kPlanarWgradTiles];  // many filters first, the last of one
};

template <class T>
const Ukernels<T>& ukernels(Isa isa);

// A dtype of this compute type needs no conversion.
template <class T>
constexpr DType compute_dtype();
template <>
constexpr DType compute_dtype<float>() {
  return DType::float32;
}
template <>
constexpr DType compute_dtype<double>() {
  return DType::float64;
}

}  // namespace segpose
