// SPDX-License-Identifier: BSD-3-Clause
// The microkernels, written once with GCC/Clang vector extensions. Each ukernels_<isa>.cpp includes this text inside
// its own namespace, after `#pragma GCC target`, with SEGPOSE_VECTOR_BYTES set. No include and no lambda here: an
// inline function or a lambda compiled for a newer instruction set could reach older processors through the linker.

#define SEGPOSE_INLINE __attribute__((always_inline)) inline
// Accumulators must become registers: every loop over a register tile is unrolled whole.
#define SEGPOSE_UNROLL _Pragma("GCC unroll 16")
#define SEGPOSE_KEEP_LOOP _Pragma("GCC unroll 1")
// Steps of a GEMM that run without a branch. On a core shared with a busy neighbour the number of instructions decides:
// with 12 multiply-adds in 25 of them AVX2 reached 66 of 96 GF/s, with 12 in 21 it reaches 77 (Zen 3). A tile of
// AVX-512 has 28 in about 33 anyway.
#if SEGPOSE_VECTOR_BYTES == 32
#define SEGPOSE_UNROLL_STEPS _Pragma("GCC unroll 4")
#else
#define SEGPOSE_UNROLL_STEPS _Pragma("GCC unroll 1")
#endif

template <class T>
struct Simd {
  static constexpr int kLength = SEGPOSE_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T Vector __attribute__((vector_size(SEGPOSE_VECTOR_BYTES)));
};

template <class T>
SEGPOSE_INLINE typename Simd<T>::Vector load(const T* source) {
  typename Simd<T>::Vector value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

template <class T>
SEGPOSE_INLINE void store(T* destination, const typename Simd<T>::Vector& value) {
  __builtin_memcpy(destination, &value, sizeof(value));
}

// Whether so many vectors are whole cache lines: only such tiles store past the caches.
template <int NV>
constexpr bool kHasLines = NV * SEGPOSE_VECTOR_BYTES % 64 == 0;

// Past the caches where the processor has such stores, to an address that is a multiple of the vector.
template <class T>
SEGPOSE_INLINE void stream(T* destination, const typename Simd<T>::Vector& value) {
#ifdef SEGPOSE_STREAM
  SEGPOSE_STREAM(destination, value);
#else
  store<T>(destination, value);
#endif
}

// The first `count` values of a vector, in pieces of fixed size: a memcpy of run-time size would be a call.
template <class T>
SEGPOSE_INLINE void store_columns(T* destination, const typename Simd<T>::Vector& value, int64_t count) {
  if (count >= Simd<T>::kLength) {
    store<T>(destination, value);
    return;
  }
#ifdef SEGPOSE_PARTIAL_STORE
  SEGPOSE_PARTIAL_STORE(destination, value, count);
#else
  T values[16];
  store<T>(values, value);
  const T* source = values;
  if (count & 8) {
    __builtin_memcpy(destination, source, 8 * sizeof(T));
    source += 8;
    destination += 8;
  }
  if (count & 4) {
    __builtin_memcpy(destination, source, 4 * sizeof(T));
    source += 4;
    destination += 4;
  }
  if (count & 2) {
    __builtin_memcpy(destination, source, 2 * sizeof(T));
    source += 2;
    destination += 2;
  }
  if (count & 1) *destination = *source;
#endif
}

// torch's edges: relu(NaN) = NaN and relu(-inf) = 0, so ReLU selects instead of multiplying.
template <class T>
SEGPOSE_INLINE typename Simd<T>::Vector relu(const typename Simd<T>::Vector& value) {
  const typename Simd<T>::Vector zero = {};
  return value < zero ? zero : value;
}

template <class T>
SEGPOSE_INLINE typename Simd<T>::Vector leaky_relu(const typename Simd<T>::Vector& value, T negative_slope) {
  const typename Simd<T>::Vector zero = {};
  return value > zero ? value : value * negative_slope;
}

template <class T>
SEGPOSE_INLINE typename Simd<T>::Vector activate(const typename Simd<T>::Vector& value, Activation activation,
                                                 T negative_slope) {
  if (activation == Activation::leaky_relu) return leaky_relu<T>(value, negative_slope);
  return activation == Activation::relu ? relu<T>(value) : value;
}

template <class T>
SEGPOSE_INLINE T activate_scalar(T value, Activation activation, T negative_slope) {
  if (activation == Activation::leaky_relu) return value > 0 ? value : value * negative_slope;
  if (activation == Activation::relu) return value < 0 ? T{0} : value;
  return value;
}

// The epilogue of a register tile: bias, activation, and rows of at most NV vectors, ragged or not.
template <class T, int MR, int NV, class Args>
SEGPOSE_INLINE void finish_tile(const Args& args, typename Simd<T>::Vector (&sums)[MR][NV], T* const (&out)[MR]) {
  constexpr int kLength = Simd<T>::kLength;
  using Vector = typename Simd<T>::Vector;
  if (args.bias != nullptr) {
    SEGPOSE_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vector bias = load<T>(args.bias + v * kLength);
      SEGPOSE_UNROLL
      for (int m = 0; m < MR; ++m) sums[m][v] += bias;
    }
  }
  if (args.activation == Activation::leaky_relu) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) sums[m][v] = leaky_relu<T>(sums[m][v], args.negative_slope);
    }
  } else if (args.activation == Activation::relu) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) sums[m][v] = relu<T>(sums[m][v]);
    }
  }
  if constexpr (kHasLines<NV>) {
    if (args.streams) {
      SEGPOSE_UNROLL
      for (int m = 0; m < MR; ++m) {
        SEGPOSE_UNROLL
        for (int v = 0; v < NV; ++v) stream<T>(out[m] + v * kLength, sums[m][v]);
      }
      return;
    }
  }
  if (args.columns >= NV * kLength) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) store<T>(out[m] + v * kLength, sums[m][v]);
    }
    return;
  }
  SEGPOSE_UNROLL
  for (int v = 0; v < NV; ++v) {
    const int64_t left = args.columns - v * kLength;
    const int64_t count = left < kLength ? left : kLength;
    if (count <= 0) return;
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) store_columns<T>(out[m] + v * kLength, sums[m][v], count);
  }
}

// B comes from L2; asking for it this many steps ahead gains AVX-512 about 3% over the hardware's own prefetching. It
// costs AVX2 as much, whose instructions do less.
constexpr int kPrefetchSteps = SEGPOSE_VECTOR_BYTES == 64 ? 12 : 0;

// The rows of a tile are often new to the cache: asked for before its sums, they are there when they are stored. A 1 x
// 1 convolution from 128 to 512 channels took 1.48 ms without and 1.22 ms with it (Zen 3, 2 threads).
template <class T, int NV>
SEGPOSE_INLINE void prefetch_result_row(const T* row) {
  constexpr int kBytes = NV * SEGPOSE_VECTOR_BYTES;
  SEGPOSE_UNROLL
  for (int byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 1);
}

// A sum waits four cycles for the one before it, while two multiply-adds start in each cycle: a tile of fewer than
// eight vectors takes steps in turns into several sets of sums.
template <int MR, int NV>
constexpr int sum_sets() {
  return MR * NV >= 8 ? 1 : MR * NV >= 4 ? 2 : 4;
}

// Into the first.
template <class T, int MR, int NV, int Sets>
SEGPOSE_INLINE void add_sets(typename Simd<T>::Vector (&sums)[Sets][MR][NV]) {
  SEGPOSE_UNROLL
  for (int set = 1; set < Sets; ++set) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) sums[0][m][v] += sums[set][m][v];
    }
  }
}

template <class T, int MR, int NV>
SEGPOSE_INLINE void gemm_step(const T* const (&a)[MR], int64_t step, const T* b,
                              typename Simd<T>::Vector (&sums)[MR][NV]) {
  constexpr int kLength = Simd<T>::kLength;
  typename Simd<T>::Vector row[NV];
  SEGPOSE_UNROLL
  for (int v = 0; v < NV; ++v) {
    row[v] = load<T>(b + v * kLength);
    if constexpr (kPrefetchSteps > 0) __builtin_prefetch(b + (v + kPrefetchSteps * NV) * kLength);
  }
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    const T value = a[m][step];
    SEGPOSE_UNROLL
    for (int v = 0; v < NV; ++v) sums[m][v] += value * row[v];
  }
}

// MR rows by NV vectors of accumulators stay in registers; each step broadcasts MR values and loads NV vectors.
template <class T, int MR, int NV>
void gemm_tile(const GemmArgs<T>& args) {
  constexpr int kLength = Simd<T>::kLength;
  constexpr int kSets = sum_sets<MR, NV>();
  using Vector = typename Simd<T>::Vector;
  Vector all_sums[kSets][MR][NV] = {};
  Vector(&sums)[MR][NV] = all_sums[0];
  if (args.partial_out == nullptr && !args.streams) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) prefetch_result_row<T, NV>(args.out[m]);
  }
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t tap = args.taps[i];
    const T* b = args.b + tap * args.b_step;
    const T* a[MR];
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) a[m] = args.a[tap * args.a_step + m] + args.a_offset;
    int64_t step = 0;
    if constexpr (kSets > 1) {
      for (; step + kSets <= args.depth; step += kSets) {
        SEGPOSE_UNROLL
        for (int set = 0; set < kSets; ++set, b += NV * kLength) gemm_step<T, MR, NV>(a, step + set, b, all_sums[set]);
      }
    }
    SEGPOSE_UNROLL_STEPS
    for (; step < args.depth; ++step, b += NV * kLength) gemm_step<T, MR, NV>(a, step, b, sums);
  }
  add_sets<T, MR, NV>(all_sums);
  // Chunks are summed apart and then added: fewer roundings in a row than one long sum.
  if (args.partial_in != nullptr) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) sums[m][v] += load<T>(args.partial_in + (m * NV + v) * kLength);
    }
  }
  if (args.partial_out != nullptr) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) store<T>(args.partial_out + (m * NV + v) * kLength, sums[m][v]);
    }
    return;
  }
  T* out[MR];
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) out[m] = args.out[m];
  finish_tile<T>(args, sums, out);
}

// Odd multiples of the distance between pixels, in bytes: with the scales of addressing modes seven registers reach
// fourteen pixels.
struct PixelSteps {
  int64_t by1, by3, by5, by7, by9, by11, by13;

  // Multiples belong into addressing modes: hoisted out of a loop, they would not fit registers.
  template <int Pixels>
  SEGPOSE_INLINE void keep() {
    if constexpr (Pixels > 1) __asm__("" : "+r"(by1));
    if constexpr (Pixels > 3) __asm__("" : "+r"(by3));
    if constexpr (Pixels > 5) __asm__("" : "+r"(by5));
    if constexpr (Pixels > 7) __asm__("" : "+r"(by7));
    if constexpr (Pixels > 9) __asm__("" : "+r"(by9));
    if constexpr (Pixels > 11) __asm__("" : "+r"(by11));
    if constexpr (Pixels > 13) __asm__("" : "+r"(by13));
  }

  SEGPOSE_INLINE int64_t bytes(int m) const {
    const int odd = m >> __builtin_ctz(m | 16);
    const int64_t step = odd == 1    ? by1
                         : odd == 3  ? by3
                         : odd == 5  ? by5
                         : odd == 7  ? by7
                         : odd == 9  ? by9
                         : odd == 11 ? by11
                                     : by13;
    return m == 0 ? 0 : step * (m / (odd == 0 ? 1 : odd));
  }
};

template <class T>
SEGPOSE_INLINE const T* pixel(const T* a, const PixelSteps& steps, int m) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(a) + steps.bytes(m));
}

// Pixels `step` elements apart.
template <class T>
SEGPOSE_INLINE PixelSteps pixel_steps(int64_t step) {
  const int64_t bytes = step * static_cast<int64_t>(sizeof(T));
  const int64_t two = 2 * bytes, four = 4 * bytes, six = two + four;
  return {bytes, bytes + two, bytes + four, bytes + six, bytes + 2 * four, bytes + six + four, bytes + 2 * six};
}

template <class T, int MR, int NV>
SEGPOSE_INLINE void rows_step(const T* a, const T* b, const PixelSteps& steps,
                              typename Simd<T>::Vector (&sums)[MR][NV]) {
  typename Simd<T>::Vector row[NV];
  SEGPOSE_UNROLL
  for (int v = 0; v < NV; ++v) row[v] = load<T>(b + v * Simd<T>::kLength);
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    const T value = *pixel(a, steps, m);
    SEGPOSE_UNROLL
    for (int v = 0; v < NV; ++v) sums[m][v] += value * row[v];
  }
}

template <class T, int MR, int NV>
void rows_tile(const RowsArgs<T>& args) {
  constexpr int kWidth = NV * Simd<T>::kLength;
  constexpr int kSets = sum_sets<MR, NV>();
  static_assert(MR <= 14);
  PixelSteps steps = pixel_steps<T>(args.a_step);
  typename Simd<T>::Vector sums[kSets][MR][NV] = {};
  if (!args.streams) {
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) prefetch_result_row<T, NV>(args.out + m * args.out_step);
  }
  const T* b = args.b;
  for (int64_t i = 0; i < args.count; ++i) {
    const T* a = args.a + args.runs[i];
    int64_t step = 0;
    if constexpr (kSets > 1) {
      for (; step + kSets <= args.depth; step += kSets, a += kSets, b += kSets * kWidth) {
        steps.keep<MR>();
        SEGPOSE_UNROLL
        for (int set = 0; set < kSets; ++set) rows_step<T, MR, NV>(a + set, b + set * kWidth, steps, sums[set]);
      }
    }
    SEGPOSE_UNROLL_STEPS
    for (; step < args.depth; ++step, ++a, b += kWidth) {
      steps.keep<MR>();
      rows_step<T, MR, NV>(a, b, steps, sums[0]);
    }
  }
  add_sets<T, MR, NV>(sums);
  T* out[MR];
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) out[m] = args.out + m * args.out_step;
  finish_tile<T>(args, sums[0], out);
}

template <class T, int MR, int NV>
void wgrad_tile(const WgradArgs<T>& args) {
  constexpr int kLength = Simd<T>::kLength;
  using Vector = typename Simd<T>::Vector;
  Vector sums[MR][NV] = {};
  for (int64_t i = 0; i < args.count; ++i) {
    const T* g = args.segments[i].g + args.g_offset;
    const T* x = args.segments[i].x + args.x_offset;
    SEGPOSE_UNROLL_STEPS
    for (int64_t pixel = 0; pixel < args.segments[i].length; ++pixel) {
      Vector row[NV];
      SEGPOSE_UNROLL
      for (int v = 0; v < NV; ++v) row[v] = load<T>(x + v * kLength);
      SEGPOSE_UNROLL
      for (int m = 0; m < MR; ++m) {
        const T value = g[m];
        SEGPOSE_UNROLL
        for (int v = 0; v < NV; ++v) sums[m][v] += value * row[v];
      }
      g += args.g_step;
      x += args.x_step;
    }
  }
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    T* out = args.out + m * args.out_step;
    SEGPOSE_UNROLL
    for (int v = 0; v < NV; ++v) store<T>(out + v * kLength, load<T>(out + v * kLength) + sums[m][v]);
  }
}

template <class T, int MR, int NV>
constexpr GemmTile<T> gemm_entry() {
  static_assert(kLowGemmTiles == 3);
  return {MR,
          NV * Simd<T>::kLength,
          gemm_tile<T, MR, NV>,
          {gemm_tile<T, kLowGemmRows[0], NV>, gemm_tile<T, kLowGemmRows[1], NV>, gemm_tile<T, kLowGemmRows[2], NV>}};
}

template <class T, int MR, int NV>
constexpr RowsTile<T> rows_entry() {
  return {MR, NV * Simd<T>::kLength, rows_tile<T, MR, NV>};
}

template <class T, int MR, int NV>
constexpr WgradTile<T> wgrad_entry() {
  return {MR, NV * Simd<T>::kLength, wgrad_tile<T, MR, NV>};
}
