// SPDX-License-Identifier: BSD-3-Clause
// The products of AMX tiles, included by ukernels_amx.cpp inside its namespace and target.
#pragma once

// Which terms are multiplied, in an order that loads each operand tile once or twice: with six products 14 loads for
// 24 tile products of a 2 x 2. Every shape keeps the order, so that a sum does not depend on the shape it ran in.
struct Product {
  int a, b;
};

template <int Terms>
struct Products;
template <>
struct Products<1> {
  static constexpr Product kOrder[] = {{0, 0}};
};
template <>
struct Products<2> {
  static constexpr Product kOrder[] = {{0, 1}, {0, 0}, {1, 0}};
};
template <>
struct Products<3> {
  static constexpr Product kOrder[] = {{0, 2}, {0, 1}, {0, 0}, {2, 0}, {1, 0}, {1, 1}};
};

// Whether product i needs another term of A or B than the one before it.
template <int Terms>
constexpr bool changes_a(int i) {
  return i == 0 || Products<Terms>::kOrder[i].a != Products<Terms>::kOrder[i - 1].a;
}
template <int Terms>
constexpr bool changes_b(int i) {
  return i == 0 || Products<Terms>::kOrder[i].b != Products<Terms>::kOrder[i - 1].b;
}

// Accumulators are the lowest tiles, operands those up to 7. Tile numbers are immediates, hence macros.
#define SEGPOSE_BEGIN_TILE(tile, row, column)                                                     \
  if (args.in != nullptr) {                                                                       \
    _tile_loadd(tile, args.in + (row) * args.out_row_tile + (column) * args.out_column_tile, 64); \
  } else {                                                                                        \
    _tile_zero(tile);                                                                             \
  }
#define SEGPOSE_END_TILE(tile, row, column) \
  _tile_stored(tile, args.out + (row) * args.out_row_tile + (column) * args.out_column_tile, 64);
// The accumulators of each shape: (tile, row, column).
#define SEGPOSE_TILES_1X2(each) each(0, 0, 0) each(1, 0, 1)
#define SEGPOSE_TILES_2X2(each) SEGPOSE_TILES_1X2(each) each(2, 1, 0) each(3, 1, 1)
#define SEGPOSE_TILES_4X1(each) each(0, 0, 0) each(1, 1, 0) each(2, 2, 0) each(3, 3, 0)
#define SEGPOSE_TILES_2X3(each) each(0, 0, 0) each(1, 0, 1) each(2, 0, 2) each(3, 1, 0) each(4, 1, 1) each(5, 1, 2)
#define SEGPOSE_FOR_STEPS                                                            \
  for (int64_t block = 0; block < args.blocks; prefetch_block(args, block), ++block) \
    for (int64_t i = 0; i < args.count; ++i)

// The block of the next panel that takes this one's place: products leave the loads of memory time to arrive.
SEGPOSE_INLINE void prefetch_block(const SplitGemmArgs& args, int64_t block) {
  if (args.next == nullptr) return;
  const char* next = args.next + block * args.b_block;
  for (int64_t line = 0; line < args.b_block; line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
}

template <int Terms>
void gemm_2x2(const SplitGemmArgs& args) {
  SEGPOSE_TILES_2X2(SEGPOSE_BEGIN_TILE)
  SEGPOSE_FOR_STEPS {
    const char* a0 = args.a[0] + block * args.a_block + args.steps[i].a;
    const char* a1 = args.a[1] + block * args.a_block + args.steps[i].a;
    const int64_t b = block * args.b_block + args.steps[i].b;
    for (int p = 0; p < split_products(Terms); ++p) {
      const Product product = Products<Terms>::kOrder[p];
      if (changes_a<Terms>(p)) {
        _tile_loadd(4, a0 + product.a * args.a_term, args.a_row);
        _tile_loadd(5, a1 + product.a * args.a_term, args.a_row);
      }
      if (changes_b<Terms>(p)) {
        _tile_loadd(6, args.b[0] + b + product.b * args.b_term, 64);
        _tile_loadd(7, args.b[1] + b + product.b * args.b_term, 64);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  SEGPOSE_TILES_2X2(SEGPOSE_END_TILE)
}

template <int Terms>
void gemm_1x2(const SplitGemmArgs& args) {
  SEGPOSE_TILES_1X2(SEGPOSE_BEGIN_TILE)
  SEGPOSE_FOR_STEPS {
    const char* a = args.a[0] + block * args.a_block + args.steps[i].a;
    const int64_t b = block * args.b_block + args.steps[i].b;
    for (int p = 0; p < split_products(Terms); ++p) {
      const Product product = Products<Terms>::kOrder[p];
      if (changes_a<Terms>(p)) _tile_loadd(4, a + product.a * args.a_term, args.a_row);
      if (changes_b<Terms>(p)) {
        _tile_loadd(6, args.b[0] + b + product.b * args.b_term, 64);
        _tile_loadd(7, args.b[1] + b + product.b * args.b_term, 64);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  SEGPOSE_TILES_1X2(SEGPOSE_END_TILE)
}

template <int Terms>
void gemm_4x1(const SplitGemmArgs& args){
    SEGPOSE_TILES_4X1(SEGPOSE_BEGIN_TILE) SEGPOSE_FOR_STEPS{const int64_t step = block * args.a_block + args.steps[i].a;
const int64_t b = block * args.b_block + args.steps[i].b;
for (int p = 0; p < split_products(Terms); ++p) {
  const Product product = Products<Terms>::kOrder[p];
  const int64_t offset = step + product.a * args.a_term;
  if (changes_b<Terms>(p)) _tile_loadd(6, args.b[0] + b + product.b * args.b_term, 64);
  _tile_loadd(4, args.a[0] + offset, args.a_row);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, args.a[1] + offset, args.a_row);
  _tile_dpbf16ps(1, 5, 6);
  _tile_loadd(4, args.a[2] + offset, args.a_row);
  _tile_dpbf16ps(2, 4, 6);
  _tile_loadd(5, args.a[3] + offset, args.a_row);
  _tile_dpbf16ps(3, 5, 6);
}
}
SEGPOSE_TILES_4X1(SEGPOSE_END_TILE)
}

#define SEGPOSE_LOAD_PRODUCT(accumulator, operand, column)                \
  _tile_loadd(operand, args.b[column] + b + product.b * args.b_term, 64); \
  _tile_dpbf16ps(accumulator, 6, operand)

template <int Terms>
void gemm_2x3(const SplitGemmArgs& args) {
  SEGPOSE_TILES_2X3(SEGPOSE_BEGIN_TILE)
  SEGPOSE_FOR_STEPS {
    const int64_t a = block * args.a_block + args.steps[i].a;
    const int64_t b = block * args.b_block + args.steps[i].b;
    for (int p = 0; p < split_products(Terms); ++p) {
      const Product product = Products<Terms>::kOrder[p];
      _tile_loadd(6, args.a[0] + a + product.a * args.a_term, args.a_row);
      SEGPOSE_LOAD_PRODUCT(0, 7, 0);
      SEGPOSE_LOAD_PRODUCT(1, 7, 1);
      SEGPOSE_LOAD_PRODUCT(2, 7, 2);
      _tile_loadd(6, args.a[1] + a + product.a * args.a_term, args.a_row);
      SEGPOSE_LOAD_PRODUCT(3, 7, 0);
      SEGPOSE_LOAD_PRODUCT(4, 7, 1);
      SEGPOSE_LOAD_PRODUCT(5, 7, 2);
    }
  }
  SEGPOSE_TILES_2X3(SEGPOSE_END_TILE)
}

#undef SEGPOSE_LOAD_PRODUCT
#undef SEGPOSE_FOR_STEPS
#undef SEGPOSE_TILES_2X3
#undef SEGPOSE_TILES_4X1
#undef SEGPOSE_TILES_2X2
#undef SEGPOSE_TILES_1X2
#undef SEGPOSE_END_TILE
#undef SEGPOSE_BEGIN_TILE
