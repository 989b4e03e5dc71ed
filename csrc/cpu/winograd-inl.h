// SPDX-License-Identifier: BSD-3-Clause
// Winograd transforms F(4, 3) and F(4, 2) of one axis, and the two-dimensional codelets made of them. Included like
// ukernels-inl.h, after it. Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015
// (arXiv 1509.09308).

// Interpolation points 0, 1, -1, 2, -2 and infinity: small integers and fractions keep the relative error of a layer
// below 5e-6 in float32.
struct F43 {
  static constexpr int kM = 4, kR = 3, kN = 6;

  template <class V>
  SEGPOSE_INLINE static void input(const V (&d)[kN], V (&o)[kN]) {
    const V even1 = d[4] - 4 * d[2];
    const V odd1 = d[3] - 4 * d[1];
    const V even2 = d[4] - d[2];
    const V odd2 = 2 * (d[3] - d[1]);
    o[0] = 4 * d[0] - 5 * d[2] + d[4];
    o[1] = even1 + odd1;
    o[2] = even1 - odd1;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = 4 * d[1] - 5 * d[3] + d[5];
  }

  template <class V>
  SEGPOSE_INLINE static void filter(const V (&g)[kR], V (&o)[kN]) {
    const V even1 = (g[0] + g[2]) * (-1.f / 6);
    const V odd1 = g[1] * (1.f / 6);
    const V even2 = (g[0] + 4 * g[2]) * (1.f / 24);
    const V odd2 = g[1] * (1.f / 12);
    o[0] = g[0] * 0.25f;
    o[1] = even1 - odd1;
    o[2] = even1 + odd1;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = g[2];
  }

  template <class V>
  SEGPOSE_INLINE static void output(const V (&p)[kN], V (&o)[kM]) {
    const V even1 = p[1] + p[2];
    const V odd1 = p[1] - p[2];
    const V even2 = p[3] + p[4];
    const V odd2 = p[3] - p[4];
    o[0] = p[0] + even1 + even2;
    o[1] = odd1 + 2 * odd2;
    o[2] = even1 + 4 * even2;
    o[3] = odd1 + 8 * odd2 + p[5];
  }
};

// Points 0, 1, -1, 2 and infinity.
struct F42 {
  static constexpr int kM = 4, kR = 2, kN = 5;

  template <class V>
  SEGPOSE_INLINE static void input(const V (&d)[kN], V (&o)[kN]) {
    const V odd = d[3] - d[1];
    o[0] = 2 * (d[0] - d[2]) + odd;
    o[1] = d[3] - d[2] - 2 * d[1];
    o[2] = d[3] - 3 * d[2] + 2 * d[1];
    o[3] = odd;
    o[4] = d[4] - d[2] - 2 * odd;
  }

  template <class V>
  SEGPOSE_INLINE static void filter(const V (&g)[kR], V (&o)[kN]) {
    o[0] = g[0] * 0.5f;
    o[1] = (g[0] + g[1]) * -0.5f;
    o[2] = (g[1] - g[0]) * (1.f / 6);
    o[3] = (g[0] + 2 * g[1]) * (1.f / 6);
    o[4] = g[1];
  }

  template <class V>
  SEGPOSE_INLINE static void output(const V (&p)[kN], V (&o)[kM]) {
    const V even = p[1] + p[2];
    const V odd = p[1] - p[2];
    o[0] = p[0] + even + p[3];
    o[1] = odd + 2 * p[3];
    o[2] = even + 4 * p[3];
    o[3] = odd + 8 * p[3] + p[4];
  }
};

// A wgrad correlates the inputs of a tile with the m x m gradients of its outputs, which gives r x r: the exact
// adjoint, with the same input transform, the transposed output transform on the gradient and the transposed filter
// transform on the sums.
struct F34 {
  static constexpr int kM = 3, kR = 4, kN = 6;

  template <class V>
  SEGPOSE_INLINE static void input(const V (&d)[kN], V (&o)[kN]) {
    F43::input(d, o);
  }

  template <class V>
  SEGPOSE_INLINE static void filter(const V (&g)[kR], V (&o)[kN]) {
    const V even1 = g[0] + g[2];
    const V odd1 = g[1] + g[3];
    const V even2 = g[0] + 4 * g[2];
    const V odd2 = 2 * g[1] + 8 * g[3];
    o[0] = g[0];
    o[1] = even1 + odd1;
    o[2] = even1 - odd1;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = g[3];
  }

  template <class V>
  SEGPOSE_INLINE static void output(const V (&p)[kN], V (&o)[kM]) {
    const V sum1 = (p[1] + p[2]) * (-1.f / 6);
    const V sum2 = p[3] + p[4];
    o[0] = p[0] * 0.25f + sum1 + sum2 * (1.f / 24);
    o[1] = (p[2] - p[1]) * (1.f / 6) + (p[3] - p[4]) * (1.f / 12);
    o[2] = sum1 + sum2 * (1.f / 6) + p[5];
  }
};

struct F24 {
  static constexpr int kM = 2, kR = 4, kN = 5;

  template <class V>
  SEGPOSE_INLINE static void input(const V (&d)[kN], V (&o)[kN]) {
    F42::input(d, o);
  }

  template <class V>
  SEGPOSE_INLINE static void filter(const V (&g)[kR], V (&o)[kN]) {
    const V even = g[0] + g[2];
    const V odd = g[1] + g[3];
    o[0] = g[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = g[0] + 2 * g[1] + 4 * g[2] + 8 * g[3];
    o[4] = g[3];
  }

  template <class V>
  SEGPOSE_INLINE static void output(const V (&p)[kN], V (&o)[kM]) {
    o[0] = (p[0] - p[1]) * 0.5f + (p[3] - p[2]) * (1.f / 6);
    o[1] = p[1] * -0.5f + p[2] * (1.f / 6) + p[3] * (1.f / 3) + p[4];
  }
};

SEGPOSE_INLINE Simd<float>::Vector load_lanes(const float* source, int64_t count) {
  constexpr int kLength = Simd<float>::kLength;
  if (count >= kLength) return load<float>(source);
  float lanes[kLength] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load<float>(lanes);
}

// Both axes, one after the other: the columns of a line's n x n inputs into `half`, whose rows the caller transforms.
// The loops over columns and rows stay loops: unrolled, their values would spill.
template <class F>
SEGPOSE_INLINE void input_columns(const float* const* rows, int64_t pixel_step, int64_t channel, int64_t count,
                                  Simd<float>::Vector (&half)[F::kN * F::kN]) {
  using Vector = Simd<float>::Vector;
  SEGPOSE_KEEP_LOOP
  for (int j = 0; j < F::kN; ++j) {
    Vector column[F::kN];
    Vector result[F::kN];
    SEGPOSE_UNROLL
    for (int i = 0; i < F::kN; ++i) column[i] = load_lanes(rows[i] + channel + j * pixel_step, count);
    F::input(column, result);
    SEGPOSE_UNROLL
    for (int i = 0; i < F::kN; ++i) half[i * F::kN + j] = result[i];
  }
}

template <class F>
void winograd_input(const float* const* rows, int64_t pixel_step, int64_t channels, float* v, int64_t frequency_step,
                    int64_t line_step) {
  using Vector = Simd<float>::Vector;
  for (int64_t channel = 0; channel < channels; channel += Simd<float>::kLength, v += line_step) {
    Vector half[F::kN * F::kN];
    input_columns<F>(rows, pixel_step, channel, channels - channel, half);
    float* out = v;
    SEGPOSE_KEEP_LOOP
    for (int i = 0; i < F::kN; ++i) {
      Vector row[F::kN];
      Vector result[F::kN];
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j) row[j] = half[i * F::kN + j];
      F::input(row, result);
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j, out += frequency_step) store<float>(out, result[j]);
    }
  }
}

// The columns of a line's r x r taps.
template <class F>
SEGPOSE_INLINE void filter_columns(const float* const* rows, int64_t tap_step, int64_t column, int64_t count,
                                   Simd<float>::Vector (&half)[F::kN * F::kR]) {
  using Vector = Simd<float>::Vector;
  SEGPOSE_KEEP_LOOP
  for (int j = 0; j < F::kR; ++j) {
    Vector taps[F::kR];
    Vector result[F::kN];
    SEGPOSE_UNROLL
    for (int i = 0; i < F::kR; ++i) taps[i] = load_lanes(rows[i] + column + j * tap_step, count);
    F::filter(taps, result);
    SEGPOSE_UNROLL
    for (int i = 0; i < F::kN; ++i) half[i * F::kR + j] = result[i];
  }
}

template <class F>
void winograd_filter(const float* const* rows, int64_t, int64_t tap_step, int64_t columns, float* u,
                     int64_t frequency_step, int64_t line_step) {
  using Vector = Simd<float>::Vector;
  for (int64_t column = 0; column < columns; column += Simd<float>::kLength, u += line_step) {
    Vector half[F::kN * F::kR];
    filter_columns<F>(rows, tap_step, column, columns - column, half);
    float* out = u;
    SEGPOSE_KEEP_LOOP
    for (int i = 0; i < F::kN; ++i) {
      Vector row[F::kR];
      Vector result[F::kN];
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kR; ++j) row[j] = half[i * F::kR + j];
      F::filter(row, result);
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j, out += frequency_step) store<float>(out, result[j]);
    }
  }
}

template <class F>
void winograd_output(const float* p, int64_t, int64_t frequency_step, int64_t line_step, int64_t columns,
                     const Epilogue& epilogue, const float* bias, float* const* out) {
  using Vector = Simd<float>::Vector;
  constexpr int kLength = Simd<float>::kLength;
  const float negative_slope = static_cast<float>(epilogue.negative_slope);
  for (int64_t column = 0; column < columns; column += kLength, p += line_step) {
    Vector half[F::kM * F::kN];
    SEGPOSE_KEEP_LOOP
    for (int j = 0; j < F::kN; ++j) {
      Vector values[F::kN];
      Vector result[F::kM];
      SEGPOSE_UNROLL
      for (int i = 0; i < F::kN; ++i) values[i] = load<float>(p + (i * F::kN + j) * frequency_step);
      F::output(values, result);
      SEGPOSE_UNROLL
      for (int i = 0; i < F::kM; ++i) half[i * F::kN + j] = result[i];
    }
    Vector offset = {};
    if (bias != nullptr) offset = load<float>(bias + column);
    SEGPOSE_KEEP_LOOP
    for (int i = 0; i < F::kM; ++i) {
      Vector row[F::kN];
      Vector pixels[F::kM];
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j) row[j] = half[i * F::kN + j];
      F::output(row, pixels);
      store_pixels<F::kM>(pixels, offset, epilogue.activation, negative_slope, columns - column, column,
                          out + i * F::kM, out + (F::kM + i) * F::kM);
    }
  }
}

template <class F>
constexpr TransformCodelets winograd_entry() {
  return {F::kN, F::kR, F::kN * F::kN, 1, winograd_input<F>, winograd_filter<F>, winograd_output<F>};
}
