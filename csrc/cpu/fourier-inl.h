// SPDX-License-Identifier: BSD-3-Clause
// Real discrete Fourier transforms of n x n tiles (overlap-save): any filter of up to n taps an axis, m = n - r + 1.
// Included like ukernels-inl.h, after it. Source: M. Mathieu, M. Henaff, Y. LeCun, "Fast Training of Convolutional
// Networks through FFTs", 2013 (arXiv 1312.5851).
//
// One axis is a cosine and a sine transform of the even and odd parts of its input:
//
//   re[k] = sum_j even[j] cos(2 pi j k / n),   im[k] = -sum_j odd[j] sin(2 pi j k / n)
//
// Both matrices are symmetric, so the same two routines also give the inverse (the transposed network).

constexpr double kTau = 6.283185307179586476925;

// Taylor series on [0, pi / 4]; constant expressions only.
constexpr double sine_series(double x) {
  double term = x;
  double sum = x;
  for (int i = 1; i < 14; ++i) {
    term *= -x * x / ((2 * i) * (2 * i + 1));
    sum += term;
  }
  return sum;
}

constexpr double cosine_series(double x) {
  double term = 1;
  double sum = 1;
  for (int i = 1; i < 14; ++i) {
    term *= -x * x / ((2 * i - 1) * (2 * i));
    sum += term;
  }
  return sum;
}

// cos(2 pi i / n), exact at the axes.
constexpr double turn_cosine(int i, int n) {
  i %= n;
  if (2 * i > n) i = n - i;                              // even
  if (4 * i > n) return -turn_cosine(n - 2 * i, 2 * n);  // about a quarter turn
  if (4 * i == n) return 0;
  if (8 * i > n) return sine_series(kTau * (n - 4 * i) / (4.0 * n));
  return cosine_series(kTau * i / n);
}

constexpr double turn_sine(int i, int n) { return turn_cosine((4 * (i % n) + 3 * n) % (4 * n), 4 * n); }

template <int N>
struct Turn {
  float cosine[N];
  float sine[N];
  constexpr Turn() : cosine(), sine() {
    for (int i = 0; i < N; ++i) {
      cosine[i] = static_cast<float>(turn_cosine(i, N));
      sine[i] = static_cast<float>(turn_sine(i, N));
    }
  }
};

template <int N>
inline constexpr Turn<N> kTurn{};

// sum += coefficient * value, where the coefficient is known after unrolling.
template <class V>
SEGPOSE_INLINE void accumulate(V& sum, float coefficient, const V& value) {
  if (coefficient == 1) {
    sum += value;
  } else if (coefficient == -1) {
    sum -= value;
  } else if (coefficient != 0) {
    sum += coefficient * value;
  }
}

// out[k] = sum_j in[j] cos(2 pi j k / N) for j, k in 0 .. N / 2. Outputs k and N / 2 - k differ in the sign of the odd
// j only, and the even j are a transform of half the size.
template <int N, class V>
SEGPOSE_INLINE void cosine_transform(const V* in, V* out) {
  constexpr int kHalf = N / 2;
  if constexpr (N == 2) {
    out[0] = in[0] + in[1];
    out[1] = in[0] - in[1];
  } else {
    constexpr int kCount = kHalf / 2 + 1;
    V even[kCount];
    V odd[kCount];
    if constexpr (kHalf % 2 == 0) {
      V half[kCount];
      SEGPOSE_UNROLL
      for (int j = 0; j < kCount; ++j) half[j] = in[2 * j];
      cosine_transform<kHalf>(half, even);
    } else {
      SEGPOSE_UNROLL
      for (int k = 0; k < kCount; ++k) {
        even[k] = in[0];
        SEGPOSE_UNROLL
        for (int j = 2; j <= kHalf; j += 2) accumulate(even[k], kTurn<N>.cosine[j * k % N], in[j]);
      }
    }
    SEGPOSE_UNROLL
    for (int k = 0; k < kCount; ++k) {
      odd[k] = V{};
      SEGPOSE_UNROLL
      for (int j = 1; j <= kHalf; j += 2) accumulate(odd[k], kTurn<N>.cosine[j * k % N], in[j]);
      out[k] = even[k] + odd[k];
      out[kHalf - k] = even[k] - odd[k];
    }
  }
}

// out[k - 1] = sum_j in[j - 1] sin(2 pi j k / N) for j, k in 1 .. N / 2 - 1.
template <int N, class V>
SEGPOSE_INLINE void sine_transform(const V* in, V* out) {
  constexpr int kHalf = N / 2;
  if constexpr (N == 4) {
    out[0] = in[0];
  } else if constexpr (N > 4) {
    constexpr int kCount = kHalf / 2;
    V even[kCount + 1] = {};
    if constexpr (kHalf % 2 == 0) {
      V half[kCount];
      SEGPOSE_UNROLL
      for (int j = 1; j < kCount; ++j) half[j - 1] = in[2 * j - 1];
      sine_transform<kHalf>(half, even);
    } else {
      SEGPOSE_UNROLL
      for (int k = 1; k <= kCount; ++k) {
        SEGPOSE_UNROLL
        for (int j = 2; j < kHalf; j += 2) accumulate(even[k - 1], kTurn<N>.sine[j * k % N], in[j - 1]);
      }
    }
    SEGPOSE_UNROLL
    for (int k = 1; k <= kCount; ++k) {
      V odd = {};
      SEGPOSE_UNROLL
      for (int j = 1; j < kHalf; j += 2) accumulate(odd, kTurn<N>.sine[j * k % N], in[j - 1]);
      out[kHalf - k - 1] = odd - even[k - 1];
      out[k - 1] = odd + even[k - 1];
    }
  }
}

// N reals to re[0 .. N / 2] and im[1 .. N / 2 - 1] (at index k - 1).
template <int N, class V>
SEGPOSE_INLINE void real_transform(const V* x, V* re, V* im) {
  constexpr int kHalf = N / 2;
  V even[kHalf + 1];
  V odd[kHalf];
  even[0] = x[0];
  even[kHalf] = x[kHalf];
  SEGPOSE_UNROLL
  for (int j = 1; j < kHalf; ++j) {
    even[j] = x[j] + x[N - j];
    odd[j - 1] = x[N - j] - x[j];
  }
  cosine_transform<N>(even, re);
  sine_transform<N>(odd, im);
}

// The transposed network: x[j] = sum_k re[k] cos(2 pi j k / N) - im[k] sin(2 pi j k / N).
template <int N, class V>
SEGPOSE_INLINE void real_transform_transposed(const V* re, const V* im, V* x) {
  constexpr int kHalf = N / 2;
  V even[kHalf + 1];
  V odd[kHalf];
  cosine_transform<N>(re, even);
  sine_transform<N>(im, odd);
  x[0] = even[0];
  x[kHalf] = even[kHalf];
  SEGPOSE_UNROLL
  for (int j = 1; j < kHalf; ++j) {
    x[j] = even[j] - odd[j - 1];
    x[N - j] = even[j] + odd[j - 1];
  }
}

// Frequencies of a real tile: columns 0 and N / 2 for ky = 0 .. N / 2, then columns 1 .. N / 2 - 1 for every ky. The
// others are conjugates of these.
template <int N>
constexpr int fourier_frequencies() {
  return 2 * (N / 2 + 1) + (N / 2 - 1) * N;
}

// `half` holds the rows' transforms, [row][re 0 .. N / 2, im 1 .. N / 2 - 1]. Writes out[frequency * step] and the
// imaginary part one vector behind, scaled by scale(weight of the frequency in the inverse).
template <int N>
void fourier_columns(const Simd<float>::Vector* half, float* out, int64_t step, float once, float twice,
                     float imaginary_sign) {
  using Vector = Simd<float>::Vector;
  constexpr int kLength = Simd<float>::kLength;
  constexpr int kHalf = N / 2;
  Vector column[N];
  Vector re[kHalf + 1];
  Vector im[kHalf];
  for (int k = 0; k < 2; ++k) {  // columns 0 and N / 2, real
    for (int i = 0; i < N; ++i) column[i] = half[i * N + k * kHalf];
    real_transform<N>(column, re, im);
    for (int ky = 0; ky <= kHalf; ++ky, out += step) {
      const bool edge = ky == 0 || ky == kHalf;
      store<float>(out, re[ky] * (edge ? once : twice));
      store<float>(out + kLength, edge ? Vector{} : im[ky - 1] * (twice * imaginary_sign));
    }
  }
  for (int k = 1; k < kHalf; ++k) {
    Vector re_i[kHalf + 1];
    Vector im_i[kHalf];
    for (int i = 0; i < N; ++i) column[i] = half[i * N + k];
    real_transform<N>(column, re, im);
    for (int i = 0; i < N; ++i) column[i] = half[i * N + kHalf + k];
    real_transform<N>(column, re_i, im_i);
    for (int ky = 0; ky <= kHalf; ++ky) {
      const bool edge = ky == 0 || ky == kHalf;
      const Vector a = edge ? Vector{} : im[ky == 0 ? 0 : ky - 1];
      const Vector b = edge ? Vector{} : im_i[ky == 0 ? 0 : ky - 1];
      store<float>(out + ky * step, (re[ky] - b) * twice);
      store<float>(out + ky * step + kLength, (a + re_i[ky]) * (twice * imaginary_sign));
      if (edge) continue;
      store<float>(out + (N - ky) * step, (re[ky] + b) * twice);
      store<float>(out + (N - ky) * step + kLength, (re_i[ky] - a) * (twice * imaginary_sign));
    }
    out += N * step;
  }
}

template <int N>
SEGPOSE_INLINE void fourier_row(const Simd<float>::Vector* row, Simd<float>::Vector* half) {
  Simd<float>::Vector re[N / 2 + 1];
  Simd<float>::Vector im[N / 2];
  real_transform<N>(row, re, im);
  for (int k = 0; k <= N / 2; ++k) half[k] = re[k];
  for (int k = 1; k < N / 2; ++k) half[N / 2 + k] = im[k - 1];
}

template <int N>
void fourier_input(const float* const* rows, int64_t pixel_step, int64_t channels, float* v, int64_t frequency_step,
                   int64_t line_step) {
  using Vector = Simd<float>::Vector;
  constexpr int kLength = Simd<float>::kLength;
  for (int64_t channel = 0; channel < channels; channel += kLength, v += line_step) {
    Vector half[N * N];
    for (int i = 0; i < N; ++i) {
      Vector row[N];
      for (int j = 0; j < N; ++j) row[j] = load_lanes(rows[i] + channel + j * pixel_step, channels - channel);
      fourier_row<N>(row, half + i * N);
    }
    fourier_columns<N>(half, v, frequency_step, 1, 1, 1);
  }
}

// A correlation multiplies by the conjugate; the inverse's weights and 1 / n^2 are taken in as well.
template <int N>
void fourier_filter(const float* const* rows, int64_t r, int64_t tap_step, int64_t columns, float* u,
                    int64_t frequency_step, int64_t line_step) {
  using Vector = Simd<float>::Vector;
  constexpr int kLength = Simd<float>::kLength;
  constexpr float kOnce = 1.f / (N * N);
  for (int64_t column = 0; column < columns; column += kLength, u += line_step) {
    Vector half[N * N] = {};
    for (int64_t i = 0; i < r; ++i) {
      Vector row[N] = {};
      for (int64_t j = 0; j < r; ++j) row[j] = load_lanes(rows[i] + column + j * tap_step, columns - column);
      fourier_row<N>(row, half + i * N);
    }
    fourier_columns<N>(half, u, frequency_step, kOnce, 2 * kOnce, -1);
  }
}

template <int N>
void fourier_output(const float* p, int64_t m, int64_t frequency_step, int64_t line_step, int64_t columns,
                    const Epilogue& epilogue, const float* bias, float* const* out) {
  using Vector = Simd<float>::Vector;
  constexpr int kLength = Simd<float>::kLength;
  constexpr int kHalf = N / 2;
  const float negative_slope = static_cast<float>(epilogue.negative_slope);
  for (int64_t column = 0; column < columns; column += kLength, p += line_step) {
    Vector half[N * N];  // [row][re 0 .. N / 2, im 1 .. N / 2 - 1]
    Vector re[kHalf + 1];
    Vector im[kHalf];
    Vector x[N];
    const float* source = p;
    for (int k = 0; k < 2; ++k) {
      for (int ky = 0; ky <= kHalf; ++ky, source += frequency_step) {
        re[ky] = load<float>(source);
        if (ky > 0 && ky < kHalf) im[ky - 1] = load<float>(source + kLength);
      }
      real_transform_transposed<N>(re, im, x);
      for (int i = 0; i < N; ++i) half[i * N + k * kHalf] = x[i];
    }
    for (int k = 1; k < kHalf; ++k, source += N * frequency_step) {
      // Real and imaginary part of the column's inverse, each from its Hermitian half.
      Vector re_i[kHalf + 1];
      Vector im_i[kHalf];
      for (int ky = 0; ky <= kHalf; ++ky) {
        const float* low = source + ky * frequency_step;
        if (ky == 0 || ky == kHalf) {
          re[ky] = load<float>(low);
          re_i[ky] = load<float>(low + kLength);
          continue;
        }
        const float* high = source + (N - ky) * frequency_step;
        const Vector low_re = load<float>(low);
        const Vector low_im = load<float>(low + kLength);
        const Vector high_re = load<float>(high);
        const Vector high_im = load<float>(high + kLength);
        re[ky] = low_re + high_re;
        im[ky - 1] = low_im - high_im;
        re_i[ky] = low_im + high_im;
        im_i[ky - 1] = high_re - low_re;
      }
      real_transform_transposed<N>(re, im, x);
      for (int i = 0; i < N; ++i) half[i * N + k] = x[i];
      real_transform_transposed<N>(re_i, im_i, x);
      for (int i = 0; i < N; ++i) half[i * N + kHalf + k] = x[i];
    }
    Vector offset = {};
    if (bias != nullptr) offset = load<float>(bias + column);
    for (int64_t i = 0; i < m; ++i) {
      real_transform_transposed<N>(half + i * N, half + i * N + kHalf + 1, x);
      store_pixels<0>(x, offset, epilogue.activation, negative_slope, columns - column, column, out + i * m,
                      out + (m + i) * m, m);
    }
  }
}

template <int N>
constexpr TransformCodelets fourier_entry() {
  return {N, 0, fourier_frequencies<N>(), 2, fourier_input<N>, fourier_filter<N>, fourier_output<N>};
}
