// SPDX-License-Identifier: BSD-3-Clause
// The tiles of AMX and the instructions on them, included by ukernels_amx.cpp inside its namespace and target.
#pragma once

struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Every tile is 16 rows of 64 bytes. Assembly with a memory operand: GCC 12's _tile_loadconfig lets the stores to the
// configuration be dropped.
void configure_tiles() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = kTileRows;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

void release_tiles() { _tile_release(); }

// Tiles by number: the intrinsics take literals only, hence assembly of our own.
template <int Tile>
SEGPOSE_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
template <int Tile>
SEGPOSE_INLINE void load_tile(const void* rows, int64_t pitch) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(pitch), "i"(Tile) : "memory");
}
template <int Tile>
SEGPOSE_INLINE void store_tile(void* rows) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(int64_t{64}), "i"(Tile) : "memory");
}
// sum += a * b
template <int Sum, int A, int B>
SEGPOSE_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
}
