// SPDX-License-Identifier: BSD-3-Clause
// Tile shapes, shared by the plan that chooses one and the kernels that are compiled for each.
#pragma once

#include <cstdint>

namespace segpose::cuda {

// Asynchronous copies move 16 bytes; a stage holds 64 bytes of gemm_k for each row of either operand, whatever the
// element: 32 of two bytes, 16 of four.
constexpr int kChunkBytes = 16;
constexpr int kStageRowBytes = 64;

struct Tile {
  int block_m, block_n;  // of a thread block
  int warp_m, warp_n;    // of a warp, inside the block
  int stages;            // of the copy pipeline
  int blocks_per_sm;     // the register budget the kernel is compiled for

  constexpr int threads() const { return (block_m / warp_m) * (block_n / warp_n) * 32; }
  constexpr int stage_bytes() const { return (block_m + block_n) * kStageRowBytes; }
};

// Offsets of rows and columns in the destination, and the bias of the columns.
constexpr int destination_tables_bytes(int block_m, int block_n, int accumulator) {
  return (block_m + block_n) * 8 + block_n * accumulator;
}

constexpr int gather_shared_bytes(const Tile& tile) {
  return tile.stages * tile.stage_bytes() + destination_tables_bytes(tile.block_m, tile.block_n, 4);
}

// Where the pixels of two K blocks lie; tf32 rows are padded by 32 bytes.
constexpr int kWgradPixelBytes = 32;
constexpr int wgrad_shared_bytes(const Tile& tile, int element) {
  const int block_k = kStageRowBytes / element;
  const int padding = element == 4 ? 2 * 32 * block_k : 0;
  return tile.stages * (tile.stage_bytes() + padding) + 2 * block_k * kWgradPixelBytes;
}

// fprop and dgrad on tensor cores. gemm_m: destination pixels, gemm_n: destination channels.
constexpr Tile kGatherTiles[] = {
    {128, 128, 64, 64, 3, 2}, {256, 64, 64, 64, 3, 2}, {128, 64, 64, 32, 3, 3},
    {64, 64, 32, 32, 4, 4},   {128, 32, 32, 32, 3, 4},
};
constexpr int kGatherTileCount = 5;
constexpr int kLargestBlockM = 256, kLargestBlockN = 128;
// Of these, the ones with a loader for channels that are not whole 16-byte chunks.
constexpr bool kGatherTileIsNarrow[] = {false, false, true, false, true};

// wgrad on tensor cores. gemm_m: filters, gemm_n: (tap, channel), gemm_k: output pixels.
constexpr Tile kWgradTiles[] = {
    {128, 128, 64, 64, 3, 2},
    {64, 128, 32, 64, 3, 3},
    {64, 64, 32, 32, 4, 4},
};
constexpr int kWgradTileCount = 3;
constexpr bool kWgradTileIsNarrow[] = {false, false, true};

// Products in full float32 and float64: 256 threads, each with (block_m / 16) x (block_n / 16) sums.
struct FmaTile {
  int block_m, block_n;

  static constexpr int kThreads = 256;
  static constexpr int kBlockK = 8;
  static constexpr int kStages = 3;
  static constexpr int kPadBytes = 16;
  static constexpr int kBlocksPerSm = 2;

  static constexpr int kSlabN = 32;  // columns that are stored at a time

  constexpr int pipeline_bytes(int element) const {
    return kStages * kBlockK * ((block_m + block_n) * element + 2 * kPadBytes);
  }
  constexpr int gather_shared_bytes(int element) const {
    const int slab = block_m * (kSlabN * element + kPadBytes);
    const int pipeline = pipeline_bytes(element);
    return (pipeline > slab ? pipeline : slab) + destination_tables_bytes(block_m, block_n, element);
  }
  constexpr int wgrad_shared_bytes(int element) const {
    return pipeline_bytes(element) + 2 * kBlockK * kWgradPixelBytes;
  }
};
constexpr FmaTile kFmaTileF32{128, 64};
constexpr FmaTile kFmaTileF64{64, 64};

// Few channels: a thread has kPixels pixels and 8 columns or 1.
struct DirectTile {
  static constexpr int kThreads = 128;
  static constexpr int kPixels = 4;
  static constexpr int kChunk = 128;
  // The register budget: more blocks would make ptxas spill.
  static constexpr int blocks_per_sm(int columns, int accumulator) {
    return columns * accumulator > 32 ? 2 : columns * accumulator > 8 ? 3 : 4;
  }
  static constexpr int kBlockM = kThreads * kPixels;
};

struct DepthwiseTile {
  static constexpr int kThreads = 128;
  static constexpr int kPixels = 4;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kWgradThreads = 256;
  static constexpr int kWgradTaps = 9;
  static constexpr int kWgradBlocksPerSm = 2;
};

}  // namespace segpose::cuda
