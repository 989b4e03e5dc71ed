// SPDX-License-Identifier: BSD-3-Clause
// AMX-BF16 tiles with AVX-512 around them. Source of the split: G. Henry, P. T. P. Tang, A. Heinecke, "Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019 (arXiv 1904.06376).
#include <utility>

#include "split_ukernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(SEGPOSE_EMULATE)
#include "emulated.h"
#endif

#pragma GCC push_options
#if defined(SEGPOSE_EMULATE)
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace segpose::amx {

#define SEGPOSE_INLINE __attribute__((always_inline)) inline

#if !defined(SEGPOSE_EMULATE)
#include "tiles_amx-inl.h"
#endif
#include "tile_gemm_amx-inl.h"

SEGPOSE_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
}

// The next term of a remainder: its value rounded to bfloat16, in the upper half of each lane. A value that would round
// to infinity is cut instead, and after an infinity or NaN nothing remains.
SEGPOSE_INLINE __m512i next_term(__m512& rest) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
  __m512i term = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
  const __mmask16 infinite = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(term), 0x18);
  if (__builtin_expect(infinite != 0, 0)) {
    term = _mm512_mask_and_epi32(term, infinite, _mm512_castps_si512(rest), _mm512_set1_epi32(-65536));
  }
  const __mmask16 special = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(term), 0x99);
  rest = _mm512_maskz_sub_ps(static_cast<__mmask16>(~special), rest, _mm512_castsi512_ps(term));
  return term;
}

SEGPOSE_INLINE __m256i upper_halves(__m512i term) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(term, 16)); }

// Lanes that next_term has to look at: infinities, NaN and what would round to infinity.
SEGPOSE_INLINE __mmask16 special_lanes(__m512 value) {
  const __m512i magnitude = _mm512_and_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
  return _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7f7f8000));
}

// The next terms of two rows, interleaved lane by lane. Without special lanes a rounding and a subtraction suffice.
template <bool Special>
SEGPOSE_INLINE __m512i next_pair(__m512& first, __m512& second) {
  if constexpr (Special) {
    const __m512i low = next_term(first);
    return _mm512_or_epi32(next_term(second), _mm512_srli_epi32(low, 16));
  }
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i terms = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i pairs = _mm512_permutexvar_epi16(order, terms);
  first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
  second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_epi32(pairs, _mm512_set1_epi32(-65536))));
  return pairs;
}

SEGPOSE_INLINE __m512 load16(DType dtype, const void* source, int64_t index, __mmask16 mask) {
  if (dtype == DType::float32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(source) + index);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(source) + index);
  if (dtype == DType::float16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Two rows of bfloat16, interleaved as they are.
SEGPOSE_INLINE __m512i load_pair(const void* first, const void* second, int64_t index, __mmask16 mask) {
  const __m256i low = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(first) + index);
  const __m256i high = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(second) + index);
  return _mm512_or_epi32(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// The next terms of 32 values, low half first.
template <bool Special>
SEGPOSE_INLINE __m512i next_terms(__m512& low, __m512& high) {
  if constexpr (Special) {
    const __m256i first = upper_halves(next_term(low));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), upper_halves(next_term(high)), 1);
  }
  const __m512i terms = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const __m512i first = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(terms)), 16);
  const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(terms, 1)), 16);
  low = _mm512_sub_ps(low, _mm512_castsi512_ps(first));
  high = _mm512_sub_ps(high, _mm512_castsi512_ps(second));
  return terms;
}

// Whole lines of 32 values, `step` apart.
template <bool Special>
SEGPOSE_INLINE bool split_lines(const float* source, int64_t step, int64_t lines, int terms, char* destination,
                                int64_t term_step) {
  __mmask16 special = 0;
  for (int64_t i = 0; i < lines; ++i, source += step, destination += 64) {
    __m512 low = _mm512_loadu_ps(source);
    __m512 high = _mm512_loadu_ps(source + 16);
    special |= special_lanes(low) | special_lanes(high);
    for (int t = 0; t < terms; ++t) {
      _mm512_storeu_si512(destination + t * term_step, next_terms<Special>(low, high));
    }
  }
  return special != 0;
}

void split_pixels(const float* source, int64_t step, int64_t pixels, int64_t channels, int64_t unit, int terms,
                  char* destination, int64_t term_step) {
  if (step == unit && channels == unit) {  // no gaps: lines, and what is left of one
    const int64_t lines = pixels * unit / 32;
    if (split_lines<false>(source, 32, lines, terms, destination, term_step)) {
      split_lines<true>(source, 32, lines, terms, destination, term_step);
    }
    source += lines * 32;
    destination += lines * 64;
    channels = unit = pixels * unit - lines * 32;
    pixels = unit > 0 ? 1 : 0;
  } else if (unit == 32 && channels == 32) {
    if (split_lines<false>(source, step, pixels, terms, destination, term_step)) {
      split_lines<true>(source, step, pixels, terms, destination, term_step);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    const float* row = source + p * step;
    char* out = destination + p * unit * 2;
    for (int64_t c = 0; c < unit; c += 16) {
      __m512 rest = _mm512_maskz_loadu_ps(first_lanes(channels - c), row + c);
      const __mmask16 stored = first_lanes(unit - c);
      for (int t = 0; t < terms; ++t) {
        _mm256_mask_storeu_epi16(out + t * term_step + c * 2, stored, upper_halves(next_term(rest)));
      }
    }
  }
}

void copy_pixels(const uint16_t* source, int64_t step, int64_t pixels, int64_t channels, int64_t unit,
                 char* destination) {
  if (unit == 32 && channels == 32) {
    for (int64_t p = 0; p < pixels; ++p) {
      _mm512_storeu_si512(destination + p * 64, _mm512_loadu_si512(source + p * step));
    }
    return;
  }
  if (step == unit && channels == unit) {
    channels = unit = pixels * unit;
    pixels = 1;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    const uint16_t* row = source + p * step;
    char* out = destination + p * unit * 2;
    for (int64_t c = 0; c < unit; c += 16) {
      const __m256i values = _mm256_maskz_loadu_epi16(first_lanes(channels - c), row + c);
      _mm256_mask_storeu_epi16(out + c * 2, first_lanes(unit - c), values);
    }
  }
}

template <bool Special>
SEGPOSE_INLINE bool split_rows(DType dtype, const void* const* rows, int64_t offset, __mmask16 mask, int terms,
                               char* destination, int64_t term_step) {
  __mmask16 special = 0;
  for (int i = 0; i < kTileDepth / 2; ++i) {
    __m512 first = load16(dtype, rows[2 * i], offset, mask);
    __m512 second = load16(dtype, rows[2 * i + 1], offset, mask);
    special |= special_lanes(first) | special_lanes(second);
    for (int t = 0; t < terms; ++t) {
      _mm512_storeu_si512(destination + t * term_step + i * 64, next_pair<Special>(first, second));
    }
  }
  return special != 0;
}

void pair_rows(DType dtype, const void* const* rows, int64_t offset, int64_t columns, int terms, char* destination,
               int64_t term_step) {
  const __mmask16 mask = first_lanes(columns);
  if (dtype == DType::bfloat16) {
    for (int i = 0; i < kTileDepth / 2; ++i) {
      _mm512_storeu_si512(destination + i * 64, load_pair(rows[2 * i], rows[2 * i + 1], offset, mask));
    }
  } else if (split_rows<false>(dtype, rows, offset, mask, terms, destination, term_step)) {
    split_rows<true>(dtype, rows, offset, mask, terms, destination, term_step);
  }
}

SEGPOSE_INLINE void transpose_16x16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Pairs of rows as one lane, so that a transposition of 16 x 16 lanes moves 32 rows.
SEGPOSE_INLINE void store_columns(__m512i (&pairs)[16], char* destination, int64_t pitch) {
  transpose_16x16(pairs);
  for (int c = 0; c < 16; ++c) _mm512_storeu_si512(destination + c * pitch, pairs[c]);
}

template <bool Special>
SEGPOSE_INLINE bool split_columns(DType dtype, const void* const* rows, int64_t offset, __mmask16 mask, int terms,
                                  char* destination, int64_t pitch, int64_t term_step) {
  __m512 values[kTileDepth];
  __mmask16 special = 0;
  for (int i = 0; i < kTileDepth; ++i) {
    values[i] = load16(dtype, rows[i], offset, mask);
    special |= special_lanes(values[i]);
  }
  for (int t = 0; t < terms; ++t) {
    __m512i pairs[16];
    for (int i = 0; i < 16; ++i) pairs[i] = next_pair<Special>(values[2 * i], values[2 * i + 1]);
    store_columns(pairs, destination + t * term_step, pitch);
  }
  return special != 0;
}

void transpose_rows(DType dtype, const void* const* rows, int64_t offset, int64_t columns, int terms, char* destination,
                    int64_t pitch, int64_t term_step) {
  const __mmask16 mask = first_lanes(columns);
  if (dtype == DType::bfloat16) {
    __m512i pairs[16];
    for (int i = 0; i < 16; ++i) pairs[i] = load_pair(rows[2 * i], rows[2 * i + 1], offset, mask);
    store_columns(pairs, destination, pitch);
  } else if (split_columns<false>(dtype, rows, offset, mask, terms, destination, pitch, term_step)) {
    split_columns<true>(dtype, rows, offset, mask, terms, destination, pitch, term_step);
  }
}

void gather_matrix(DType dtype, const void* source, int64_t offset, int64_t row_step, int64_t column_step, int64_t rows,
                   int64_t columns, float* destination) {
  const __mmask16 mask = first_lanes(columns);
  if (column_step == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      _mm512_storeu_ps(destination + i * 16, load16(dtype, source, offset + i * row_step, mask));
    }
    return;
  }
  if (row_step == 1) {  // whole lines, transposed
    for (int64_t i0 = 0; i0 < rows; i0 += 16) {
      const __mmask16 valid = first_lanes(rows - i0);
      __m512i values[16];
      for (int64_t j = 0; j < 16; ++j) {
        const __mmask16 lanes = j < columns ? valid : static_cast<__mmask16>(0);
        values[j] = _mm512_castps_si512(load16(dtype, source, offset + j * column_step + i0, lanes));
      }
      transpose_16x16(values);
      for (int64_t i = i0; i < rows && i < i0 + 16; ++i) _mm512_storeu_si512(destination + i * 16, values[i - i0]);
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < 16; ++j) {
      const int64_t index = offset + i * row_step + j * column_step;
      destination[i * 16 + j] = j < columns ? _mm512_cvtss_f32(load16(dtype, source, index, 1)) : 0.0f;
    }
  }
}

#include "split_store-inl.h"

constexpr SplitUkernels kTable = {gemm_shape<3, 2>(), gemm_shape<2, 2>(),
                                  gemm_shape<1, 2>(), gemm_shape<4, 1>(),
                                  gemm_shape<3, 1>(), gemm_shape<2, 3>(),
                                  configure_tiles,    release_tiles,
                                  split_pixels,       copy_pixels,
                                  pair_rows,          transpose_rows,
                                  gather_matrix,      store,
                                  store_pooled};

}  // namespace segpose::amx
#pragma GCC pop_options
#endif

namespace segpose {

const SplitUkernels* split_ukernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::amx) return &amx::kTable;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace segpose
