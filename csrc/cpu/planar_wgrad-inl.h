// SPDX-License-Identifier: BSD-3-Clause
// The microkernel of a wgrad over planes: vectors along the columns of the gradient, whose products with the shifted
// activation are summed for several filters and steps (a tap and a channel) at once, and lane by lane at the end. A
// text like ukernels-inl.h, included after dots-inl.h.

// A vector of columns, or the `left` ones at the end of a row.
template <class T, int Filters, int Steps, bool Whole>
SEGPOSE_INLINE void planar_wgrad_step(const T* g, int64_t g_filter, const T* const (&x)[Steps], int64_t col,
                                      int64_t left, typename Simd<T>::Vector (&sums)[Filters][Steps]) {
  using Vector = typename Simd<T>::Vector;
  // What is fewer stays in registers.
  if constexpr (Filters < Steps) {
    Vector gradients[Filters];
    SEGPOSE_UNROLL
    for (int f = 0; f < Filters; ++f) {
      gradients[f] = load_some<T, Whole>(g + f * g_filter + col, left);
      keep_in_register(gradients[f]);
    }
    SEGPOSE_UNROLL
    for (int s = 0; s < Steps; ++s) {
      Vector value = load_some<T, Whole>(x[s] + col, left);
      if constexpr (Filters > 1) keep_in_register(value);
      SEGPOSE_UNROLL
      for (int f = 0; f < Filters; ++f) sums[f][s] += gradients[f] * value;
    }
  } else {
    Vector values[Steps];
    SEGPOSE_UNROLL
    for (int s = 0; s < Steps; ++s) {
      values[s] = load_some<T, Whole>(x[s] + col, left);
      keep_in_register(values[s]);
    }
    SEGPOSE_UNROLL
    for (int f = 0; f < Filters; ++f) {
      Vector gradient = load_some<T, Whole>(g + f * g_filter + col, left);
      keep_in_register(gradient);
      SEGPOSE_UNROLL
      for (int s = 0; s < Steps; ++s) sums[f][s] += gradient * values[s];
    }
  }
}

template <class T, int Filters, int Steps>
void planar_wgrad_tile(const PlanarWgradArgs<T>& args) {
  constexpr int kLength = Simd<T>::kLength;
  constexpr int kSums = Filters * Steps;
  using Vector = typename Simd<T>::Vector;
  Vector sums[Filters][Steps] = {};
  const T* g = args.g;
  const T* x[Steps];
  SEGPOSE_UNROLL
  for (int s = 0; s < Steps; ++s) x[s] = args.x + args.offsets[s];
  for (int64_t row = 0; row < args.rows; ++row) {
    int64_t col = 0;
    for (; col + kLength <= args.columns; col += kLength) {
      planar_wgrad_step<T, Filters, Steps, true>(g, args.g_filter, x, col, kLength, sums);
    }
    if (col < args.columns) {
      planar_wgrad_step<T, Filters, Steps, false>(g, args.g_filter, x, col, args.columns - col, sums);
    }
    g += args.g_step;
    SEGPOSE_UNROLL
    for (int s = 0; s < Steps; ++s) x[s] += args.x_step;
  }
  T totals[(kSums + kLength - 1) / kLength * kLength];
  SEGPOSE_UNROLL
  for (int first = 0; first < kSums; first += kLength) {
    Vector some[kLength] = {};
    SEGPOSE_UNROLL
    for (int i = 0; i < kLength; ++i) {
      if (first + i < kSums) some[i] = sums[(first + i) / Steps][(first + i) % Steps];
    }
    store<T>(totals + first, add_lanes<T>(some));
  }
  SEGPOSE_UNROLL
  for (int f = 0; f < Filters; ++f) {
    SEGPOSE_UNROLL
    for (int s = 0; s < Steps; ++s) args.out[f * args.out_filter + s] += totals[f * Steps + s];
  }
}

template <class T, int Filters, int Steps>
constexpr PlanarWgradTile<T> planar_wgrad_entry() {
  static_assert(Steps <= kPlanarWgradSteps);
  return {Filters, Steps, planar_wgrad_tile<T, Filters, Steps>};
}
