// SPDX-License-Identifier: BSD-3-Clause
// The microkernel of planes: vectors along the columns of several rows, which several channels multiply by a weight of
// their own. A text like ukernels-inl.h, included after dots-inl.h.

template <class T, int Channels, int Rows, int Vectors>
SEGPOSE_INLINE void activate_all(typename Simd<T>::Vector (&sums)[Channels][Rows][Vectors], Activation activation,
                                 T negative_slope) {
  SEGPOSE_UNROLL
  for (int c = 0; c < Channels; ++c) {
    SEGPOSE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      SEGPOSE_UNROLL
      for (int v = 0; v < Vectors; ++v) sums[c][r][v] = activate<T>(sums[c][r][v], activation, negative_slope);
    }
  }
}

template <class T, int Channels, int Rows, int Vectors, bool Streams>
SEGPOSE_INLINE void planar_columns(const PlanarArgs<T>& args, int64_t col) {
  constexpr int kLength = Simd<T>::kLength;
  using Vector = typename Simd<T>::Vector;
  Vector sums[Channels][Rows][Vectors] = {};
  if (args.bias != nullptr) {
    SEGPOSE_UNROLL
    for (int c = 0; c < Channels; ++c) {
      SEGPOSE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        SEGPOSE_UNROLL
        for (int v = 0; v < Vectors; ++v) sums[c][r][v] += args.bias[c];
      }
    }
  }
  const T* w = args.w;
  for (int64_t step = 0; step < args.count; ++step, w += args.w_step) {
    const T* a = args.a + args.offsets[step] + col;
    Vector values[Rows][Vectors];
    SEGPOSE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      SEGPOSE_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        values[r][v] = load<T>(a + r * args.a_step + v * kLength);
        if constexpr (Channels > 1) keep_in_register(values[r][v]);
      }
    }
    SEGPOSE_UNROLL
    for (int c = 0; c < Channels; ++c) {
      const T weight = w[c];
      SEGPOSE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        SEGPOSE_UNROLL
        for (int v = 0; v < Vectors; ++v) sums[c][r][v] += weight * values[r][v];
      }
    }
  }
  if (args.activation == Activation::relu) activate_all<T, Channels, Rows, Vectors>(sums, Activation::relu, T{0});
  if (args.activation == Activation::leaky_relu) {
    activate_all<T, Channels, Rows, Vectors>(sums, Activation::leaky_relu, args.negative_slope);
  }
  // In registers: what is written might be them.
  const int64_t row_step = args.out_step, channel_step = args.out_channel;
  T* channel = args.out + col;
  SEGPOSE_UNROLL
  for (int c = 0; c < Channels; ++c, channel += channel_step) {
    T* row = channel;
    SEGPOSE_UNROLL
    for (int r = 0; r < Rows; ++r, row += row_step) {
      SEGPOSE_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        if constexpr (Streams) {
          stream<T>(row + v * kLength, sums[c][r][v]);
        } else {
          store<T>(row + v * kLength, sums[c][r][v]);
        }
      }
    }
  }
}

// The last vector begins early rather than be shorter: some columns are computed twice.
template <class T, int Channels, int Rows>
void planar_tile(const PlanarArgs<T>& args) {
  constexpr int kLength = Simd<T>::kLength;
  int64_t col = 0;
  for (; col + kLength <= args.columns; col += kLength) planar_columns<T, Channels, Rows, 1, false>(args, col);
  if (col < args.columns) planar_columns<T, Channels, Rows, 1, false>(args, args.columns - kLength);
}

// Whole cache lines, past the caches.
template <class T, int Channels, int Rows>
void planar_lines(const PlanarArgs<T>& args) {
  constexpr int kVectors = 64 / SEGPOSE_VECTOR_BYTES;
  constexpr int kLine = kVectors * Simd<T>::kLength;
  for (int64_t col = 0; col < args.columns; col += kLine) {
    planar_columns<T, Channels, Rows, kVectors, true>(args, col);
  }
}

template <class T, int Channels, int Rows>
constexpr PlanarTile<T> planar_entry() {
  return {Channels, Rows, planar_tile<T, Channels, Rows>};
}

template <class T, int Channels, int Rows>
constexpr PlanarTile<T> lines_entry() {
  return {Channels, Rows, planar_lines<T, Channels, Rows>};
}
