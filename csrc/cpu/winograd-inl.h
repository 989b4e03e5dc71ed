// SPDX-License-Identifier: BSD-3-Clause
// Winograd tile transforms F(4x4, 3x3) and F(4x4, 2x2), written once for every instruction set; included like
// ukernels-inl.h. Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv
// 1509.09308).
//
//   y = A^T [ (G g G^T) * (B^T d B) ] A      d: n x n inputs, g: r x r filter, y: m x m outputs, n = m + r - 1

// Interpolation points 0, 1, -1, 2, -2 and infinity: the transforms are small integers and fractions, and the relative
// error of a layer stays below 5e-6 in float32.
struct F43 {
  static constexpr int kM = 4, kR = 3, kN = 6;
  static constexpr double kInput[kN][kN] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                            {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr double kFilter[kN][kR] = {{1. / 4, 0, 0},
                                             {-1. / 6, -1. / 6, -1. / 6},
                                             {-1. / 6, 1. / 6, -1. / 6},
                                             {1. / 24, 1. / 12, 1. / 6},
                                             {1. / 24, -1. / 12, 1. / 6},
                                             {0, 0, 1}};
  static constexpr double kOutput[kM][kN] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};

// Points 0, 1, -1, 2 and infinity.
struct F42 {
  static constexpr int kM = 4, kR = 2, kN = 5;
  static constexpr double kInput[kN][kN] = {
      {2, -1, -2, 1, 0}, {0, -2, -1, 1, 0}, {0, 2, -3, 1, 0}, {0, -1, 0, 1, 0}, {0, 2, -1, -2, 1}};
  static constexpr double kFilter[kN][kR] = {
      {1. / 2, 0}, {-1. / 2, -1. / 2}, {-1. / 6, 1. / 6}, {1. / 6, 1. / 3}, {0, 1}};
  static constexpr double kOutput[kM][kN] = {{1, 1, 1, 1, 0}, {0, 1, -1, 2, 0}, {0, 1, 1, 4, 0}, {0, 1, -1, 8, 1}};
};

// One row of a transform: sum over j of coefficient[j] * in[j * step]. The coefficients are constants, so zeros vanish.
template <class T, int Columns>
SEGPOSE_INLINE typename Simd<T>::Vector combine(const double (&coefficients)[Columns],
                                                const typename Simd<T>::Vector* in, int step) {
  typename Simd<T>::Vector sum = {};
  bool first = true;
  SEGPOSE_UNROLL
  for (int j = 0; j < Columns; ++j) {
    if (coefficients[j] == 0) continue;
    const typename Simd<T>::Vector term = static_cast<T>(coefficients[j]) * in[j * step];
    sum = first ? term : sum + term;
    first = false;
  }
  return sum;
}

// out = M in M^T for a Rows x Columns matrix M.
template <class T, int Rows, int Columns>
SEGPOSE_INLINE void transform_2d(const double (&matrix)[Rows][Columns], const typename Simd<T>::Vector* in,
                                 typename Simd<T>::Vector* out) {
  typename Simd<T>::Vector half[Rows * Columns];
  SEGPOSE_UNROLL
  for (int j = 0; j < Columns; ++j) {
    SEGPOSE_UNROLL
    for (int i = 0; i < Rows; ++i) half[i * Columns + j] = combine<T>(matrix[i], in + j, Columns);
  }
  SEGPOSE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    SEGPOSE_UNROLL
    for (int j = 0; j < Rows; ++j) out[i * Rows + j] = combine<T>(matrix[j], half + i * Columns, 1);
  }
}

template <class T>
SEGPOSE_INLINE typename Simd<T>::Vector load_partial(const T* source, int64_t count) {
  T lanes[Simd<T>::kLength] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load<T>(lanes);
}

// rows: n * n pixels of one tile, row by row. v[frequency * step + channel], whole vectors.
template <class T, class F>
void winograd_input(const T* const* rows, int64_t channels, T* v, int64_t step) {
  constexpr int kLength = Simd<T>::kLength;
  constexpr int kPixels = F::kN * F::kN;
  for (int64_t channel = 0; channel < channels; channel += kLength) {
    typename Simd<T>::Vector in[kPixels];
    typename Simd<T>::Vector out[kPixels];
    if (channels - channel >= kLength) {
      SEGPOSE_UNROLL_TILE
      for (int i = 0; i < kPixels; ++i) in[i] = load<T>(rows[i] + channel);
    } else {
      for (int i = 0; i < kPixels; ++i) in[i] = load_partial<T>(rows[i] + channel, channels - channel);
    }
    transform_2d<T>(F::kInput, in, out);
    SEGPOSE_UNROLL_TILE
    for (int i = 0; i < kPixels; ++i) store<T>(v + i * step + channel, out[i]);
  }
}

// w[tap * tap_step + column] to u[frequency * step + column]; `columns` is a multiple of the vector length.
template <class T, class F>
void winograd_filter(const T* w, int64_t tap_step, int64_t columns, T* u, int64_t step) {
  for (int64_t column = 0; column < columns; column += Simd<T>::kLength) {
    typename Simd<T>::Vector in[F::kR * F::kR];
    typename Simd<T>::Vector out[F::kN * F::kN];
    SEGPOSE_UNROLL_TILE
    for (int i = 0; i < F::kR * F::kR; ++i) in[i] = load<T>(w + i * tap_step + column);
    transform_2d<T>(F::kFilter, in, out);
    SEGPOSE_UNROLL_TILE
    for (int i = 0; i < F::kN * F::kN; ++i) store<T>(u + i * step + column, out[i]);
  }
}

// m[frequency * step + column] to the m * m pixels of a tile, with the epilogue; pixels outside the image are null.
template <class T, class F>
void winograd_output(const T* m, int64_t step, int64_t columns, const Epilogue& epilogue, const T* bias,
                     T* const* out) {
  constexpr int kLength = Simd<T>::kLength;
  const T negative_slope = static_cast<T>(epilogue.negative_slope);
  for (int64_t column = 0; column < columns; column += kLength) {
    typename Simd<T>::Vector in[F::kN * F::kN];
    typename Simd<T>::Vector pixels[F::kM * F::kM];
    SEGPOSE_UNROLL_TILE
    for (int i = 0; i < F::kN * F::kN; ++i) in[i] = load<T>(m + i * step + column);
    transform_2d<T>(F::kOutput, in, pixels);
    typename Simd<T>::Vector offset = {};
    if (bias != nullptr) offset = load<T>(bias + column);
    const int64_t valid = columns - column;
    for (int i = 0; i < F::kM * F::kM; ++i) {
      if (out[i] == nullptr) continue;
      const typename Simd<T>::Vector value = activate<T>(pixels[i] + offset, epilogue.activation, negative_slope);
      if (valid >= kLength) {
        store<T>(out[i] + column, value);
      } else {
        T lanes[kLength];
        store<T>(lanes, value);
        for (int64_t lane = 0; lane < valid; ++lane) out[i][column + lane] = lanes[lane];
      }
    }
  }
}

template <class T, class F>
constexpr WinogradCodelets<T> winograd_entry() {
  return {F::kM, F::kR, winograd_input<T, F>, winograd_filter<T, F>, winograd_output<T, F>};
}
