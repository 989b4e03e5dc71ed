// SPDX-License-Identifier: BSD-3-Clause
// Between dtypes, memory formats and the two sides of an activation: conversions of rows, the mask of a gradient with
// its sums, transposition in registers. Included after ukernels-inl.h, whose vectors it uses and whose rules it keeps.

template <class T>
void load_row(DType dtype, const void* source, int64_t count, T* row) {
  const auto* halves = static_cast<const uint16_t*>(source);
  int64_t i = 0;
  switch (dtype) {
    case DType::float32:
      for (; i < count; ++i) row[i] = static_cast<T>(static_cast<const float*>(source)[i]);
      break;
    case DType::float64:
      for (; i < count; ++i) row[i] = static_cast<T>(static_cast<const double*>(source)[i]);
      break;
    case DType::bfloat16:
      for (; i < count; ++i) row[i] = static_cast<T>(bfloat16_to_float(halves[i]));
      break;
    case DType::float16:
#ifdef SEGPOSE_HAVE_F16C
      if (sizeof(T) == sizeof(float)) {
        for (; i + 8 <= count; i += 8) {
          const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
          _mm256_storeu_ps(reinterpret_cast<float*>(row + i), _mm256_cvtph_ps(packed));
        }
      }
#endif
      for (; i < count; ++i) row[i] = static_cast<T>(float16_to_float(halves[i]));
      break;
  }
}

template <class T>
void store_row(DType dtype, const T* row, int64_t count, void* destination) {
  auto* halves = static_cast<uint16_t*>(destination);
  int64_t i = 0;
  switch (dtype) {
    case DType::float32:
      for (; i < count; ++i) static_cast<float*>(destination)[i] = static_cast<float>(row[i]);
      break;
    case DType::float64:
      for (; i < count; ++i) static_cast<double*>(destination)[i] = static_cast<double>(row[i]);
      break;
    case DType::bfloat16:
      for (; i < count; ++i) halves[i] = float_to_bfloat16(static_cast<float>(row[i]));
      break;
    case DType::float16:
#ifdef SEGPOSE_HAVE_F16C
      if (sizeof(T) == sizeof(float)) {
        for (; i + 8 <= count; i += 8) {
          const __m256 values = _mm256_loadu_ps(reinterpret_cast<const float*>(row + i));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i),
                           _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        }
      }
#endif
      for (; i < count; ++i) halves[i] = float_to_float16(static_cast<float>(row[i]));
      break;
  }
}

// bfloat16 as float and back, a vector at a time.
struct Bfloat16 {
  typedef uint16_t Halves __attribute__((vector_size(SEGPOSE_VECTOR_BYTES / 2)));
  typedef uint32_t Words __attribute__((vector_size(SEGPOSE_VECTOR_BYTES)));
};

SEGPOSE_INLINE Simd<float>::Vector load_as(DType dtype, const void* source, int64_t index, float) {
  if (dtype != DType::bfloat16) return load<float>(static_cast<const float*>(source) + index);
  Bfloat16::Halves halves;
  __builtin_memcpy(&halves, static_cast<const uint16_t*>(source) + index, sizeof(halves));
  return reinterpret_cast<Simd<float>::Vector>(__builtin_convertvector(halves, Bfloat16::Words) << 16);
}

SEGPOSE_INLINE void store_as(DType dtype, void* destination, int64_t index, const Simd<float>::Vector& value) {
  if (dtype != DType::bfloat16) {
    store<float>(static_cast<float*>(destination) + index, value);
    return;
  }
  const auto bits = reinterpret_cast<Bfloat16::Words>(value);
  const Bfloat16::Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bfloat16::Words words = ((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x00400000u : rounded) >> 16;
  const Bfloat16::Halves halves = __builtin_convertvector(words, Bfloat16::Halves);
  __builtin_memcpy(static_cast<uint16_t*>(destination) + index, &halves, sizeof(halves));
}

SEGPOSE_INLINE Simd<double>::Vector load_as(DType, const void* source, int64_t index, double) {
  return load<double>(static_cast<const double*>(source) + index);
}

SEGPOSE_INLINE void store_as(DType, void* destination, int64_t index, const Simd<double>::Vector& value) {
  store<double>(static_cast<double*>(destination) + index, value);
}

template <class T>
T load_one(DType dtype, const void* source, int64_t index) {
  if (dtype == DType::bfloat16) return static_cast<T>(bfloat16_to_float(static_cast<const uint16_t*>(source)[index]));
  return static_cast<const T*>(source)[index];
}

template <class T>
void store_one(DType dtype, void* destination, int64_t index, T value) {
  if (dtype == DType::bfloat16) {
    static_cast<uint16_t*>(destination)[index] = float_to_bfloat16(static_cast<float>(value));
  } else {
    static_cast<T*>(destination)[index] = value;
  }
}

template <class T, DType Type, Activation Act>
void mask_typed(const MaskArgs<T>& args) {
  using Vector = typename Simd<T>::Vector;
  constexpr int kLength = Simd<T>::kLength;
  const Vector zero = {};
  int64_t i = 0;
  int64_t phase = 0;
  for (; i + kLength <= args.count; i += kLength) {
    Vector g = load_as(Type, args.g, i, T{});
    if constexpr (Act != Activation::none) {
      const Vector y = load_as(Type, args.y, i, T{});
      if constexpr (Act == Activation::relu) g = y <= zero ? zero : g;
      if constexpr (Act == Activation::leaky_relu) g = y > zero ? g : g * args.negative_slope;
    }
    if (args.out != nullptr) store_as(Type, args.out, i, g);
    if (args.sums == nullptr) continue;
    store<T>(args.sums + phase, load<T>(args.sums + phase) + g);
    phase = phase + kLength == args.period ? 0 : phase + kLength;
  }
  for (; i < args.count; ++i, ++phase) {
    T g = load_one<T>(Type, args.g, i);
    if constexpr (Act != Activation::none) {
      const T y = load_one<T>(Type, args.y, i);
      if constexpr (Act == Activation::relu) g = y <= 0 ? T{0} : g;
      if constexpr (Act == Activation::leaky_relu) g = y > 0 ? g : g * args.negative_slope;
    }
    if (args.out != nullptr) store_one<T>(Type, args.out, i, g);
    if (args.sums != nullptr) args.sums[phase] += g;
  }
}

template <class T, DType Type>
void mask_activated(const MaskArgs<T>& args) {
  if (args.y == nullptr) return mask_typed<T, Type, Activation::none>(args);
  if (args.activation == Activation::relu) return mask_typed<T, Type, Activation::relu>(args);
  mask_typed<T, Type, Activation::leaky_relu>(args);
}

template <class T>
void mask_line(const MaskArgs<T>& args) {
  if (args.dtype == DType::bfloat16) return mask_activated<T, DType::bfloat16>(args);
  mask_activated<T, DType::float32>(args);
}

template <class T>
SEGPOSE_INLINE typename Simd<T>::Vector load_columns(const T* source, int64_t count) {
#ifdef SEGPOSE_MASKED_LOAD
  return SEGPOSE_MASKED_LOAD(source, count);
#else
  T values[Simd<T>::kLength] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = source[i];
  return load<T>(values);
#endif
}

// A whole vector, or its first `count` values.
template <class T, bool Whole>
SEGPOSE_INLINE typename Simd<T>::Vector load_some(const T* source, int64_t count) {
  if constexpr (Whole) return load<T>(source);
  return load_columns<T>(source, count);
}

// Integers as wide as T, to choose lanes with.
template <class T>
struct Lanes {
  typedef int64_t Vector __attribute__((vector_size(SEGPOSE_VECTOR_BYTES)));
};
template <>
struct Lanes<float> {
  typedef int32_t Vector __attribute__((vector_size(SEGPOSE_VECTOR_BYTES)));
};

// Exchanges the off-diagonal blocks of every size: Eklundh's transposition, in registers.
template <class T, int Distance>
SEGPOSE_INLINE void exchange_blocks(typename Simd<T>::Vector (&rows)[Simd<T>::kLength]) {
  constexpr int kLength = Simd<T>::kLength;
  typename Lanes<T>::Vector upper, lower;
  SEGPOSE_UNROLL
  for (int lane = 0; lane < kLength; ++lane) {
    upper[lane] = lane & Distance ? kLength + lane - Distance : lane;
    lower[lane] = lane & Distance ? kLength + lane : lane + Distance;
  }
  SEGPOSE_UNROLL
  for (int i = 0; i < kLength; ++i) {
    if (i & Distance) continue;
    const typename Simd<T>::Vector a = rows[i], b = rows[i + Distance];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + Distance] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (Distance > 1) exchange_blocks<T, Distance / 2>(rows);
}

// At most a vector of rows by a vector of columns.
template <class T>
SEGPOSE_INLINE void transpose_square(const T* from, int64_t source_step, int64_t height, int64_t width, T* to,
                                     int64_t destination_step) {
  constexpr int kLength = Simd<T>::kLength;
  typename Simd<T>::Vector tile[kLength] = {};
  if (height >= kLength && width >= kLength) {
    SEGPOSE_UNROLL
    for (int i = 0; i < kLength; ++i) tile[i] = load<T>(from + i * source_step);
    exchange_blocks<T, kLength / 2>(tile);
    SEGPOSE_UNROLL
    for (int i = 0; i < kLength; ++i) store<T>(to + i * destination_step, tile[i]);
    return;
  }
  SEGPOSE_UNROLL
  for (int i = 0; i < kLength; ++i) {
    if (i < height) tile[i] = load_columns<T>(from + i * source_step, width < kLength ? width : kLength);
  }
  exchange_blocks<T, kLength / 2>(tile);
  SEGPOSE_UNROLL
  for (int i = 0; i < kLength; ++i) {
    if (i < width) store_columns<T>(to + i * destination_step, tile[i], height);
  }
}

// A square at a ragged end begins early, and some values are written twice, rather than be cut: 208 channels of 14 x 14
// in 26 groups, which are transposed twice, took 126 us and take 99 (Zen 3).
template <class T>
SEGPOSE_INLINE int64_t last_square(int64_t first, int64_t count) {
  constexpr int kLength = Simd<T>::kLength;
  return first + kLength > count && count >= kLength ? count - kLength : first;
}

// Lines that lie far apart, planes of an image for example, share a set of the caches when the distance is a power of
// two: only a vector of them is visited at a time, from end to end. 64 planes of 256 x 256 out of channels_last took
// 6.8 ms the other way round and take 2.5 ms (Zen 3).
template <class T>
void transpose(const T* source, int64_t source_step, int64_t rows, int64_t columns, T* destination,
               int64_t destination_step) {
  constexpr int kLength = Simd<T>::kLength;
  const bool along_source = source_step > destination_step;
  const int64_t outer = along_source ? rows : columns;
  const int64_t inner = along_source ? columns : rows;
  for (int64_t i = 0; i < outer; i += kLength) {
    for (int64_t j = 0; j < inner; j += kLength) {
      const int64_t row = last_square<T>(along_source ? i : j, rows);
      const int64_t column = last_square<T>(along_source ? j : i, columns);
      transpose_square<T>(source + row * source_step + column, source_step, rows - row, columns - column,
                          destination + column * destination_step + row, destination_step);
    }
  }
}
