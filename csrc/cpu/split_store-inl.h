// SPDX-License-Identifier: BSD-3-Clause
// Accumulators on their way to the destination: bias, activation, dtype. Text of ukernels_amx.cpp, inside of its
// namespace.

// torch's edges: relu(NaN) = NaN and relu(-inf) = 0, so ReLU selects instead of multiplying.
template <Activation Act>
SEGPOSE_INLINE __m512 activate(__m512 value, __m512 slope) {
  const __m512 zero = _mm512_setzero_ps();
  if constexpr (Act == Activation::relu) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, zero, _CMP_LT_OQ), zero);
  } else if constexpr (Act == Activation::leaky_relu) {
    return _mm512_mask_mul_ps(value, _mm512_cmp_ps_mask(value, zero, _CMP_NGT_UQ), value, slope);
  }
  return value;
}

template <DType Type>
SEGPOSE_INLINE void store16(void* data, int64_t index, __mmask16 mask, __m512 value) {
  if constexpr (Type == DType::float32) {
    _mm512_mask_storeu_ps(static_cast<float*>(data) + index, mask, value);
  } else if constexpr (Type == DType::bfloat16) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + index, mask,
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  } else {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + index, mask,
                             _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

// The 32 channels of a pixel: one cache line of 16-bit values, two of float32.
template <DType Type, bool Streams>
SEGPOSE_INLINE void store32(void* data, int64_t index, __m512 low, __m512 high) {
  if constexpr (Type == DType::float32) {
    float* pixel = static_cast<float*>(data) + index;
    if constexpr (Streams) {
      _mm512_stream_ps(pixel, low);
      _mm512_stream_ps(pixel + kTileColumns, high);
    } else {
      _mm512_storeu_ps(pixel, low);
      _mm512_storeu_ps(pixel + kTileColumns, high);
    }
  } else {
    void* pixel = static_cast<uint16_t*>(data) + index;
    __m512i halves;
    if constexpr (Type == DType::bfloat16) {
      halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    } else {
      constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      halves = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, kRounding)),
                                  _mm512_cvtps_ph(high, kRounding), 1);
    }
    if constexpr (Streams) {
      _mm512_stream_si512(static_cast<__m512i*>(pixel), halves);
    } else {
      _mm512_storeu_si512(pixel, halves);
    }
  }
}

// Two column tiles: both halves of a pixel's 32 channels follow each other.
template <DType Type, Activation Act, bool Streams>
void store_wide_rows(const SplitStoreArgs& args) {
  const __m512 slope = _mm512_set1_ps(args.negative_slope);
  const __m512 zero = _mm512_setzero_ps();
  const __m512 bias_low = args.bias == nullptr ? zero : _mm512_loadu_ps(args.bias);
  const __m512 bias_high = args.bias == nullptr ? zero : _mm512_loadu_ps(args.bias + kTileColumns);
  for (int i = 0; i < kTileRows; ++i) {
    const int64_t offset = args.offsets[i];
    if (offset < 0) continue;
    const float* tile = args.tiles + i * kTileColumns;
    const __m512 low = activate<Act>(_mm512_add_ps(_mm512_loadu_ps(tile), bias_low), slope);
    const __m512 high = activate<Act>(_mm512_add_ps(_mm512_loadu_ps(tile + kTileFloats), bias_high), slope);
    store32<Type, Streams>(args.data, offset, low, high);
  }
}

template <DType Type, Activation Act>
void store_rows(const SplitStoreArgs& args) {
  if (args.streams) return store_wide_rows<Type, Act, true>(args);
  if (args.columns == 2 * kTileColumns) return store_wide_rows<Type, Act, false>(args);
  const __m512 slope = _mm512_set1_ps(args.negative_slope);
  for (int64_t c = 0; c < args.columns; c += kTileColumns) {
    const __mmask16 mask = first_lanes(args.columns - c);
    const __m512 bias = args.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(args.bias + c);
    const float* tile = args.tiles + c / kTileColumns * kTileFloats;
    for (int i = 0; i < kTileRows; ++i) {
      if (args.offsets[i] < 0) continue;
      const __m512 value = _mm512_add_ps(_mm512_loadu_ps(tile + i * 16), bias);
      store16<Type>(args.data, args.offsets[i] + c, mask, activate<Act>(value, slope));
    }
  }
}

template <DType Type>
void store_activated(const SplitStoreArgs& args) {
  if (args.activation == Activation::leaky_relu) return store_rows<Type, Activation::leaky_relu>(args);
  if (args.activation == Activation::relu) return store_rows<Type, Activation::relu>(args);
  store_rows<Type, Activation::none>(args);
}

void store(const SplitStoreArgs& args) {
  if (args.dtype == DType::float32) return store_activated<DType::float32>(args);
  if (args.dtype == DType::bfloat16) return store_activated<DType::bfloat16>(args);
  store_activated<DType::float16>(args);
}

// torch's maximum: the first of equal values stays, and a NaN wins.
SEGPOSE_INLINE __m512 larger(__m512 a, __m512 b) {
  return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(b, a, _CMP_GT_OQ) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), b);
}

// Bias, activation and rounding keep the order of values: the largest sum gives the largest result.
void store_pooled(const SplitStoreArgs& args, int64_t below) {
  alignas(64) float most[2 * kTileFloats];
  for (int64_t c = 0; c < args.columns; c += kTileColumns) {
    const int64_t column_tile = c / kTileColumns * kTileFloats;
    for (int i = 0; i < kTileRows / 2; ++i) {
      const float* above = args.tiles + column_tile + 2 * i * kTileColumns;
      const __m512 first = larger(_mm512_loadu_ps(above), _mm512_loadu_ps(above + kTileColumns));
      const __m512 second = larger(first, _mm512_loadu_ps(above + below));
      _mm512_store_ps(most + column_tile + i * kTileColumns,
                      larger(second, _mm512_loadu_ps(above + below + kTileColumns)));
    }
  }
  SplitStoreArgs pooled = args;
  pooled.tiles = most;
  store(pooled);
}
