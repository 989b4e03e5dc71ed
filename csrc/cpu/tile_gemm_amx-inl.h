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

// Without a tile store among them, more than 128 tile products make the next one wait for about 900 cycles (measured;
// the manuals do not mention it): a 2 x 2 takes 6.7 ns a product over 32 steps and 8.8 over 36. A store of any tile
// counts.
constexpr int kProductsBetweenStores = 80;

// A share of the lines that a later panel needs of this step, after one of Products: a burst of
// requests to memory would keep the loads of operands waiting. 128 to 256 channels on 64 x 64 took 2.9 ms with a burst
// after every block and 1.9 to 2.4 with shares (two threads, six products).
template <int P, int Products>
SEGPOSE_INLINE void prefetch_share(const SplitGemmArgs& args, int64_t b) {
  const int64_t lines = args.next_lines;
  const char* next = args.next + b;
  for (int64_t line = lines * P / Products; line < lines * (P + 1) / Products; ++line) {
    _mm_prefetch(next + line * kLineBytes, _MM_HINT_T1);
  }
}

// Rows x Columns accumulators in the lowest tiles. What is left holds a step's operands: all of them, or a single
// column that all rows are multiplied with, or a row and a column at a time: then every other row goes back through the
// columns, beginning with the one that is there, 7 loads for 6 products.
template <int Rows, int Columns, int Terms>
struct TileGemm {
  static constexpr int kSums = Rows * Columns;
  static constexpr bool kAllFit = kSums + Rows + Columns <= 8;
  static constexpr int kStepsBetweenStores = kProductsBetweenStores / (kSums * split_products(Terms));
  static_assert(kSums + 2 <= 8 && (kAllFit || Columns == 1 || kSums == 6) && kStepsBetweenStores > 0);

  static constexpr int b_tile(int column) { return kAllFit ? kSums + Rows + column : Columns == 1 ? kSums : kSums + 1; }
  static constexpr int a_tile(int row) { return kAllFit ? kSums + row : Columns == 1 ? kSums + 1 + row % 3 : kSums; }

  template <int Sum>
  SEGPOSE_INLINE static void begin_sum(const SplitGemmArgs& args) {
    if (args.in == nullptr) return zero_tile<Sum>();
    load_tile<Sum>(args.in + Sum / Columns * args.out_row_tile + Sum % Columns * args.out_column_tile, 64);
  }
  template <int Sum>
  SEGPOSE_INLINE static void end_sum(const SplitGemmArgs& args) {
    store_tile<Sum>(args.out + Sum / Columns * args.out_row_tile + Sum % Columns * args.out_column_tile);
  }

  // A sum's share of product P, after the loads that it is the first to need. a and b are offsets of the step.
  template <int P, int Sum>
  SEGPOSE_INLINE static void add(const SplitGemmArgs& args, int64_t a, int64_t b) {
    constexpr Product kProduct = Products<Terms>::kOrder[P];
    constexpr Product kBefore = Products<Terms>::kOrder[P == 0 ? 0 : P - 1];
    constexpr bool kKeepsColumns = kAllFit || Columns == 1;
    constexpr int kRow = Sum / Columns;
    constexpr int kPlace = Sum % Columns;
    constexpr int kColumn = kKeepsColumns || kRow % 2 == 0 ? kPlace : Columns - 1 - kPlace;
    constexpr bool kFirstOfRow = kPlace == 0 && (!kAllFit || P == 0 || kProduct.a != kBefore.a);
    constexpr bool kFirstOfColumn =
        kKeepsColumns ? kRow == 0 && (P == 0 || kProduct.b != kBefore.b) : kRow == 0 || kPlace > 0;
    if constexpr (kFirstOfRow) load_tile<a_tile(kRow)>(args.a[kRow] + a + kProduct.a * args.a_term, args.a_row);
    if constexpr (kFirstOfColumn) load_tile<b_tile(kColumn)>(args.b[kColumn] + b + kProduct.b * args.b_term, 64);
    multiply_tiles<kRow * Columns + kColumn, a_tile(kRow), b_tile(kColumn)>();
  }
  template <int P, int... Sum>
  SEGPOSE_INLINE static void product(const SplitGemmArgs& args, int64_t a, int64_t b,
                                     std::integer_sequence<int, Sum...>) {
    (add<P, Sum>(args, a, b), ...);
  }

  template <int... Sum, int... P>
  SEGPOSE_INLINE static void run(const SplitGemmArgs& args, std::integer_sequence<int, Sum...> sums,
                                 std::integer_sequence<int, P...>) {
    alignas(64) char nobody_reads[kTileBytes];
    (begin_sum<Sum>(args), ...);
    int left = kStepsBetweenStores;
    for (int64_t block = 0; block < args.blocks; ++block) {
      for (int64_t i = 0; i < args.count; ++i) {
        if (left-- == 0) {
          store_tile<b_tile(0)>(nobody_reads);
          left = kStepsBetweenStores - 1;
        }
        const int64_t a = block * args.a_block + args.steps[i].a;
        const int64_t b = block * args.b_block + args.steps[i].b;
        ((product<P>(args, a, b, sums), prefetch_share<P, sizeof...(P)>(args, b)), ...);
      }
    }
    (end_sum<Sum>(args), ...);
  }
};

template <int Rows, int Columns, int Terms>
void gemm(const SplitGemmArgs& args) {
  TileGemm<Rows, Columns, Terms>::run(args, std::make_integer_sequence<int, Rows * Columns>(),
                                      std::make_integer_sequence<int, split_products(Terms)>());
}

template <int Rows, int Columns>
constexpr SplitShape gemm_shape() {
  return {Rows, Columns, {gemm<Rows, Columns, 1>, gemm<Rows, Columns, 2>, gemm<Rows, Columns, 3>}};
}
