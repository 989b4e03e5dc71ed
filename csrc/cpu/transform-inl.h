// SPDX-License-Identifier: BSD-3-Clause
// GEMM of one frequency and the pixel epilogue that the transforms share. Included like ukernels-inl.h, after it.

// Of a pixel that is written soon, null where there is none.
SEGPOSE_INLINE void prefetch_result(const float* pixel, int64_t column) {
  if (pixel != nullptr) __builtin_prefetch(pixel + column, 1);
}

// torch's maximum: the first of equal values stays, and a NaN wins.
SEGPOSE_INLINE Simd<float>::Vector larger(const Simd<float>::Vector& a, const Simd<float>::Vector& b) {
  return ((b > a) | (b != b)) ? b : a;
}

// The largest values of 2 x 2 pixels of a tile [m][m][columns], whose pixels lie `step` apart, to m / 2 * m / 2 pixels,
// null where there is none. Those of the next tile follow in `out`.
void pool_tile(const float* tile, int64_t step, int64_t m, int64_t columns, float* const* out) {
  constexpr int kLength = Simd<float>::kLength;
  const int64_t edge = m / 2;
  for (int64_t i = 0; i < edge; ++i) {
    for (int64_t j = 0; j < edge; ++j) {
      float* const pixel = out[i * edge + j];
      const float* const next = out[(edge + i) * edge + j];
      if (pixel == nullptr) continue;
      const float* const low = tile + (2 * i * m + 2 * j) * step;
      const float* const high = low + m * step;
      for (int64_t column = 0; column < columns; column += kLength) {
        prefetch_result(next, column);
        const Simd<float>::Vector above = larger(load<float>(low + column), load<float>(low + step + column));
        const Simd<float>::Vector first = larger(above, load<float>(high + column));
        const Simd<float>::Vector most = larger(first, load<float>(high + step + column));
        store_columns<float>(pixel + column, most, columns - column);
      }
    }
  }
}

// Pixels of one line with bias and activation, to where they belong: `Count` of them, or `count` where that is 0. Those
// of `next` are asked for, as the next tile writes them.
template <int Count>
SEGPOSE_INLINE void store_pixels(const Simd<float>::Vector* pixels, const Simd<float>::Vector& bias,
                                 Activation activation, float negative_slope, int64_t valid, int64_t column,
                                 float* const* out, float* const* next, int64_t count = Count) {
  const int64_t end = Count > 0 ? Count : count;
  SEGPOSE_UNROLL
  for (int64_t i = 0; i < end; ++i) {
    prefetch_result(next[i], column);
    if (out[i] == nullptr) continue;
    const Simd<float>::Vector value = activate<float>(pixels[i] + bias, activation, negative_slope);
    store_columns<float>(out[i] + column, value, valid);
  }
}

// The vectors of a step: one or two, which share a line where a vector is half of one.
SEGPOSE_INLINE void prefetch_next(const float* next, int64_t step) {
  __builtin_prefetch(next, 0, 2);
  if constexpr (SEGPOSE_VECTOR_BYTES >= 64) __builtin_prefetch(next + step - Simd<float>::kLength, 0, 2);
}

template <int MR, int NV>
void panel_gemm(const PanelArgs& args) {
  constexpr int kLength = Simd<float>::kLength;
  using Vector = Simd<float>::Vector;
  Vector sums[MR][NV] = {};
  const float* b = args.b;
  const float* next = args.next;
  const float* a = args.a;
  for (int64_t depth = args.depth; depth > 0; depth -= kLength, a += args.a_line) {
    const int64_t steps = depth < kLength ? depth : kLength;
    for (int64_t step = 0; step < steps; ++step) {
      Vector row[NV];
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) row[v] = load<float>(b + v * kLength);
      prefetch_next(next, args.next_step);
      SEGPOSE_UNROLL
      for (int m = 0; m < MR; ++m) {
        const float value = a[m * kLength + step];
        SEGPOSE_UNROLL
        for (int v = 0; v < NV; ++v) sums[m][v] += value * row[v];
      }
      b += NV * kLength;
      next += args.next_step;
    }
  }
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    SEGPOSE_UNROLL
    for (int v = 0; v < NV; ++v) store<float>(args.out + v * args.out_line + m * kLength, sums[m][v]);
  }
}

// (ar + i ai) (br + i bi), four multiply-adds.
template <int MR>
void panel_gemm_complex(const PanelArgs& args) {
  constexpr int kLength = Simd<float>::kLength;
  using Vector = Simd<float>::Vector;
  Vector real[MR] = {};
  Vector imaginary[MR] = {};
  const float* b = args.b;
  const float* next = args.next;
  const float* a = args.a;
  for (int64_t depth = args.depth; depth > 0; depth -= kLength, a += args.a_line) {
    const int64_t steps = depth < kLength ? depth : kLength;
    for (int64_t step = 0; step < steps; ++step) {
      const Vector br = load<float>(b);
      const Vector bi = load<float>(b + kLength);
      prefetch_next(next, args.next_step);
      SEGPOSE_UNROLL
      for (int m = 0; m < MR; ++m) {
        const float ar = a[m * 2 * kLength + step];
        const float ai = a[(m * 2 + 1) * kLength + step];
        real[m] += ar * br;
        imaginary[m] += ar * bi;
        real[m] -= ai * bi;
        imaginary[m] += ai * br;
      }
      b += 2 * kLength;
      next += args.next_step;
    }
  }
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    store<float>(args.out + m * 2 * kLength, real[m]);
    store<float>(args.out + (m * 2 + 1) * kLength, imaginary[m]);
  }
}

template <int MR, int NV>
void reduce_gemm(const ReduceArgs& args) {
  constexpr int kLength = Simd<float>::kLength;
  using Vector = Simd<float>::Vector;
  Vector sums[MR][NV] = {};
  const float* a = args.a;
  const float* b = args.b;
  SEGPOSE_UNROLL_STEPS
  for (int64_t t = 0; t < args.count; ++t, a += kLength, b += kLength) {
    Vector row[NV];
    SEGPOSE_UNROLL
    for (int v = 0; v < NV; ++v) row[v] = load<float>(b + v * args.b_line);
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      const float value = a[m];
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) sums[m][v] += value * row[v];
    }
  }
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    SEGPOSE_UNROLL
    for (int v = 0; v < NV; ++v) {
      float* out = args.out + m * args.out_step + v * kLength;
      store<float>(out, args.first ? sums[m][v] : load<float>(out) + sums[m][v]);
    }
  }
}

template <int MR>
void reduce_gemm_complex(const ReduceArgs& args) {
  constexpr int kLength = Simd<float>::kLength;
  using Vector = Simd<float>::Vector;
  Vector real[MR] = {};
  Vector imaginary[MR] = {};
  const float* a = args.a;
  const float* b = args.b;
  SEGPOSE_UNROLL_STEPS
  for (int64_t t = 0; t < args.count; ++t, a += 2 * kLength, b += 2 * kLength) {
    const Vector br = load<float>(b);
    const Vector bi = load<float>(b + kLength);
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      const float ar = a[m];
      const float ai = a[kLength + m];
      real[m] += ar * br;
      imaginary[m] += ar * bi;
      real[m] -= ai * bi;
      imaginary[m] += ai * br;
    }
  }
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    float* out = args.out + m * args.out_step;
    store<float>(out, args.first ? real[m] : load<float>(out) + real[m]);
    store<float>(out + kLength, args.first ? imaginary[m] : load<float>(out + kLength) + imaginary[m]);
  }
}

template <int MR, int NV>
constexpr ReduceTile reduce_entry() {
  return {MR, NV, reduce_gemm<MR, NV>};
}

template <int MR>
constexpr ReduceTile reduce_complex_entry() {
  return {MR, 1, reduce_gemm_complex<MR>};
}

template <int MR, int NV>
constexpr PanelTile panel_entry() {
  return {MR, panel_gemm<MR, NV>};
}

template <int MR>
constexpr PanelTile panel_complex_entry() {
  return {MR, panel_gemm_complex<MR>};
}
