// SPDX-License-Identifier: BSD-3-Clause
// The microkernel of few columns, a text like ukernels-inl.h that stands after it and staging-inl.h: vectors lie along
// the values of a run, which every column multiplies, and their lanes are added up at the end. With vectors along the
// columns most lanes would idle: 64 channels into 3, 4 x 4 at stride 2, took 2.2 ms that way and 0.7 ms this way.

// Lane i of the result is the sum of all lanes of sums[i % Count]: halves of two vectors meet at growing distances.
template <class T, int Count, int Distance = 1>
SEGPOSE_INLINE typename Simd<T>::Vector add_lanes(const typename Simd<T>::Vector (&sums)[Count]) {
  constexpr int kLength = Simd<T>::kLength;
  static_assert(Count * Distance <= kLength);
  if constexpr (Distance == kLength) {
    return sums[0];
  } else {
    constexpr int kPairs = Count > 1 ? Count / 2 : 1;
    typename Lanes<T>::Vector near, far;
    SEGPOSE_UNROLL
    for (int lane = 0; lane < kLength; ++lane) {
      near[lane] = lane & Distance ? kLength + lane : lane;
      far[lane] = near[lane] ^ Distance;
    }
    typename Simd<T>::Vector pairs[kPairs];
    SEGPOSE_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const typename Simd<T>::Vector a = sums[Count > 1 ? 2 * i : 0], b = sums[Count > 1 ? 2 * i + 1 : 0];
      pairs[i] = __builtin_shuffle(a, b, near) + __builtin_shuffle(a, b, far);
    }
    return add_lanes<T, kPairs, 2 * Distance>(pairs);
  }
}

// What several products share is loaded once instead of by each of them.
template <class Vector>
SEGPOSE_INLINE void keep_in_register(Vector& value) {
#if defined(SEGPOSE_EMULATE)
  (void)value;  // wider than a register
#elif defined(__x86_64__)
  __asm__("" : "+v"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#else
  (void)value;
#endif
}

constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// b is [run][NR][depth].
template <class T, int MR, int NR>
void dots_tile(const RowsArgs<T>& args) {
  constexpr int kLength = Simd<T>::kLength;
  using Vector = typename Simd<T>::Vector;
  PixelSteps steps = pixel_steps<T>(args.a_step);
  Vector sums[power_of_two(MR * NR)] = {};
  if (args.bias != nullptr) {
    SEGPOSE_UNROLL
    for (int i = 0; i < MR * NR; ++i) sums[i][0] = args.bias[i % NR];
  }
  const T* b = args.b;
  for (int64_t i = 0; i < args.count; ++i, b += NR * args.depth) {
    const T* a = args.a + args.runs[i];
    int64_t done = 0;
    for (; done + kLength <= args.depth; done += kLength, a += kLength) {
      steps.keep<MR>();
      Vector row[NR];
      SEGPOSE_UNROLL
      for (int n = 0; n < NR; ++n) row[n] = load<T>(b + n * args.depth + done);
      SEGPOSE_UNROLL
      for (int m = 0; m < MR; ++m) {
        Vector values = load<T>(pixel(a, steps, m));
        if constexpr (NR > 1) keep_in_register(values);
        SEGPOSE_UNROLL
        for (int n = 0; n < NR; ++n) sums[m * NR + n] += values * row[n];
      }
    }
    const int64_t left = args.depth - done;
    if (left == 0) continue;
    Vector row[NR];
    SEGPOSE_UNROLL
    for (int n = 0; n < NR; ++n) row[n] = load_columns<T>(b + n * args.depth + done, left);
    SEGPOSE_UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vector values = load_columns<T>(pixel(a, steps, m), left);
      SEGPOSE_UNROLL
      for (int n = 0; n < NR; ++n) sums[m * NR + n] += values * row[n];
    }
  }
  const Vector result = activate<T>(add_lanes<T>(sums), args.activation, args.negative_slope);
  if (args.out_step == NR) {
    store_columns<T>(args.out, result, MR * NR);
    return;
  }
  T values[kLength];
  store<T>(values, result);
  SEGPOSE_UNROLL
  for (int m = 0; m < MR; ++m) {
    SEGPOSE_UNROLL
    for (int n = 0; n < NR; ++n) args.out[m * args.out_step + n] = values[m * NR + n];
  }
}

template <class T, int MR, int NR>
constexpr RowsTile<T> dots_entry() {
  return {MR, NR, dots_tile<T, MR, NR>};
}

// As many sums as a vector has lanes; of one column at most 8, with which the adders are busy.
template <class T>
constexpr DotsTiles<T> dots_tiles() {
  constexpr int kLength = Simd<T>::kLength;
  constexpr int kOne = kLength < 8 ? kLength : 8;
  if constexpr (kLength < 4) {
    return {2, 3, {dots_entry<T, kOne, 1>(), dots_entry<T, 1, 1>(), dots_entry<T, 1, 2>()}};
  } else {
    return {
        4,
        9,
        {dots_entry<T, kOne, 1>(), dots_entry<T, kOne / 2, 1>(), dots_entry<T, 1, 1>(),
         dots_entry<T, kLength / 2 < 8 ? kLength / 2 : 8, 2>(), dots_entry<T, 1, 2>(), dots_entry<T, kLength / 3, 3>(),
         dots_entry<T, 1, 3>(), dots_entry<T, kLength / 4, 4>(), dots_entry<T, 1, 4>()}};
  }
}
