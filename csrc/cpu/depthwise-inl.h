// SPDX-License-Identifier: BSD-3-Clause
// The microkernels of depthwise convolutions: vectors along the channels, or along whatever lies side by side. Included
// after ukernels-inl.h, whose vectors it uses and whose rules it keeps.

// `Pixels` neighbours from `first` on share the loads of their weights, for `Vectors` of channels.
template <class T, int Pixels, int Vectors, bool Streams>
SEGPOSE_INLINE void depthwise_tile(const DepthwiseArgs<T>& args, int64_t first, int64_t channel) {
  constexpr int kLength = Simd<T>::kLength;
  using Vector = typename Simd<T>::Vector;
  Vector sums[Pixels][Vectors] = {};
  for (int64_t tap = 0; tap < args.count; ++tap) {
    const T* a = args.taps[tap].a + first * args.a_step + channel;
    Vector w[Vectors];
    SEGPOSE_UNROLL
    for (int v = 0; v < Vectors; ++v) w[v] = load<T>(args.taps[tap].w + channel + v * kLength);
    SEGPOSE_UNROLL
    for (int m = 0; m < Pixels; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < Vectors; ++v) sums[m][v] += load<T>(a + m * args.a_step + v * kLength) * w[v];
    }
    if (Pixels > 1 && args.taps[tap].prefetches && channel % (64 / sizeof(T)) == 0) {
      SEGPOSE_UNROLL
      for (int m = 0; m < Pixels; ++m) __builtin_prefetch(a + (Pixels + m) * args.a_step);
    }
  }
  SEGPOSE_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    Vector bias = {};
    if (args.bias != nullptr) bias = load<T>(args.bias + channel + v * kLength);
    SEGPOSE_UNROLL
    for (int m = 0; m < Pixels; ++m) {
      T* const out = args.out + (first + m) * args.out_step + channel + v * kLength;
      const Vector result = activate<T>(sums[m][v] + bias, args.activation, args.negative_slope);
      if constexpr (Streams) {
        stream<T>(out, result);
      } else {
        store<T>(out, result);
      }
    }
  }
}

template <class T, int Pixels>
SEGPOSE_INLINE void depthwise_pixels(const DepthwiseArgs<T>& args, int64_t first) {
  constexpr int kLength = Simd<T>::kLength;
  T* const out = args.out + first * args.out_step;
  int64_t channel = 0;
  for (; channel + kLength <= args.channels; channel += kLength) {
    depthwise_tile<T, Pixels, 1, false>(args, first, channel);
  }
  for (; channel < args.channels; ++channel) {
    SEGPOSE_UNROLL
    for (int m = 0; m < Pixels; ++m) {
      T sum = 0;
      for (int64_t tap = 0; tap < args.count; ++tap) {
        sum += args.taps[tap].a[(first + m) * args.a_step + channel] * args.taps[tap].w[channel];
      }
      if (args.bias != nullptr) sum += args.bias[channel];
      out[m * args.out_step + channel] = activate_scalar<T>(sum, args.activation, args.negative_slope);
    }
  }
}

template <class T>
void depthwise_row(const DepthwiseArgs<T>& args) {
  constexpr int kPixels = kDepthwisePixels;
  int64_t pixel = 0;
#ifdef SEGPOSE_STREAM
  if (args.streams) {
    // Whole cache lines at a time.
    constexpr int kVectors = 64 / SEGPOSE_VECTOR_BYTES;
    constexpr int kStreamed = kPixels / kVectors;
    for (; pixel + kStreamed <= args.pixels; pixel += kStreamed) {
      for (int64_t channel = 0; channel < args.channels; channel += kVectors * Simd<T>::kLength) {
        depthwise_tile<T, kStreamed, kVectors, true>(args, pixel, channel);
      }
    }
  }
#endif
  for (; pixel + kPixels <= args.pixels; pixel += kPixels) depthwise_pixels<T, kPixels>(args, pixel);
  for (; pixel < args.pixels; ++pixel) depthwise_pixels<T, 1>(args, pixel);
}

// `Pixels` from `first` on and `Vectors` of the block's channels from `channel` on.
template <class T, int Pixels, int Vectors>
SEGPOSE_INLINE void depthwise_block_tile(const DepthwiseBlockArgs<T>& args, int64_t first, int channel) {
  constexpr int kLength = Simd<T>::kLength;
  constexpr int kBlock = 64 / static_cast<int>(sizeof(T));
  using Vector = typename Simd<T>::Vector;
  Vector sums[Pixels][Vectors] = {};
  const T* w = args.w + channel;
  for (int64_t tap = 0; tap < args.count; ++tap, w += args.w_step) {
    const T* a = args.a + args.offsets[tap] + first * kBlock + channel;
    Vector weights[Vectors];
    SEGPOSE_UNROLL
    for (int v = 0; v < Vectors; ++v) weights[v] = load<T>(w + v * kLength);
    SEGPOSE_UNROLL
    for (int m = 0; m < Pixels; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < Vectors; ++v) sums[m][v] += load<T>(a + m * kBlock + v * kLength) * weights[v];
    }
  }
  SEGPOSE_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    Vector bias = {};
    if (args.bias != nullptr) bias = load<T>(args.bias + channel + v * kLength);
    SEGPOSE_UNROLL
    for (int m = 0; m < Pixels; ++m) {
      store<T>(args.out + (first + m) * args.out_step + channel + v * kLength,
               activate<T>(sums[m][v] + bias, args.activation, args.negative_slope));
    }
  }
}

// The last tile begins early, and computes some pixels twice.
template <class T, int Pixels>
void depthwise_block(const DepthwiseBlockArgs<T>& args) {
  constexpr int kLength = Simd<T>::kLength;
  constexpr int kBlock = 64 / static_cast<int>(sizeof(T));
  // 14 sums and two weights are the registers of AVX2.
  constexpr int kVectors = 2 * kLength <= kBlock && 2 * Pixels <= 14 ? 2 : 1;
  for (int64_t pixel = 0; pixel < args.pixels; pixel += Pixels) {
    const int64_t first = pixel + Pixels <= args.pixels ? pixel : args.pixels - Pixels;
    for (int channel = 0; channel < kBlock; channel += kVectors * kLength) {
      depthwise_block_tile<T, Pixels, kVectors>(args, first, channel);
    }
  }
}

template <class T, int Pixels>
constexpr DepthwiseBlockTile<T> depthwise_block_entry() {
  return {Pixels, depthwise_block<T, Pixels>};
}

// A vector of channels, or the `left` ones at the end: the sums of some taps, which share the gradient.
template <class T, bool Whole>
SEGPOSE_INLINE void depthwise_wgrad_taps(const DepthwiseWgradArgs<T>& args, const DepthwiseWgradTap<T>* taps,
                                         int64_t channel, int64_t left) {
  using Vector = typename Simd<T>::Vector;
  constexpr int kTaps = kDepthwiseWgradTaps;
  const T* g = args.g + channel;
  const T* x[kTaps];
  Vector sums[kTaps];
  SEGPOSE_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    x[t] = taps[t].x + channel;
    sums[t] = load<T>(taps[t].sums + channel);
  }
  int64_t at = 0;
  for (int64_t pixel = 0; pixel < args.pixels; ++pixel, g += args.g_step, at += args.x_step) {
    const Vector gradient = load_some<T, Whole>(g, left);
    SEGPOSE_UNROLL
    for (int t = 0; t < kTaps; ++t) sums[t] += gradient * load_some<T, Whole>(x[t] + at, left);
  }
  SEGPOSE_UNROLL
  for (int t = 0; t < kTaps; ++t) store<T>(taps[t].sums + channel, sums[t]);
}

template <class T>
void depthwise_wgrad_run(const DepthwiseWgradArgs<T>& args) {
  constexpr int kLength = Simd<T>::kLength;
  int64_t channel = 0;
  for (; channel + kLength <= args.channels; channel += kLength) {
    for (int64_t tap = 0; tap < args.count; tap += kDepthwiseWgradTaps) {
      depthwise_wgrad_taps<T, true>(args, args.taps + tap, channel, kLength);
    }
  }
  if (channel == args.channels) return;
  for (int64_t tap = 0; tap < args.count; tap += kDepthwiseWgradTaps) {
    depthwise_wgrad_taps<T, false>(args, args.taps + tap, channel, args.channels - channel);
  }
}
