// SPDX-License-Identifier: BSD-3-Clause
// Winograd transforms that write and read operands of a split GEMM.
#include "split_ukernels.h"
#include "transforms_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(SEGPOSE_EMULATE)
#include "emulated.h"
#endif

#define SEGPOSE_VECTOR_BYTES 64

#pragma GCC push_options
#if defined(SEGPOSE_EMULATE)
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("prfchw,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace segpose::amx {

// clang-format off: each text uses those before it
#include "ukernels-inl.h"
#include "transform-inl.h"
#include "winograd-inl.h"
// clang-format on

using Vector = Simd<float>::Vector;

SEGPOSE_INLINE __m512 as_m512(const Vector& value) { return reinterpret_cast<const __m512&>(value); }

// Interleaves the 16 lanes of two rows: lane j of `terms` holds row 0, lane 16 + j row 1.
SEGPOSE_INLINE __m512i pair_lanes(__m512i terms) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, terms);
}

// The next terms of two remainders as 32 bfloat16 in pairs: lane 2 j of the first, lane 2 j + 1 of the second. Where
// three terms hold all 24 bits of a significand, each is cut off, which takes fewer instructions than rounding and is
// as exact. Infinities are not kept apart: a transform has spread them already.
template <int Terms>
SEGPOSE_INLINE __m512i next_terms(__m512& even, __m512& odd) {
  if constexpr (Terms == kMaxTerms) {
    const __m512i upper = _mm512_set1_epi32(-65536);
    const __m512i first = _mm512_and_si512(_mm512_castps_si512(even), upper);
    const __m512i second = _mm512_and_si512(_mm512_castps_si512(odd), upper);
    const __m512i terms = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), second);
    even = _mm512_sub_ps(even, _mm512_castsi512_ps(first));
    odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(second));
    return terms;
  }
  const __m512i terms = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  const __m512i first = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(terms)), 16);
  const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(terms, 1)), 16);
  even = _mm512_sub_ps(even, _mm512_castsi512_ps(first));
  odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(second));
  return pair_lanes(terms);
}

template <class F, int Terms>
void split_input(const float* const* rows, int64_t pixel_step, int64_t channels, char* v, int64_t term_step,
                 int64_t frequency_step, int64_t block_step) {
  for (int64_t channel = 0; channel < channels; channel += kTileDepth, v += block_step) {
    Vector half[2][F::kN * F::kN];
    input_columns<F>(rows, pixel_step, channel, channels - channel, half[0]);
    if (channels - channel > kTileDepth / 2) {
      input_columns<F>(rows, pixel_step, channel + kTileDepth / 2, channels - channel - kTileDepth / 2, half[1]);
    } else {
      for (Vector& value : half[1]) value = Vector{};
    }
    char* out = v;
    SEGPOSE_KEEP_LOOP
    for (int i = 0; i < F::kN; ++i) {
      Vector row[F::kN];
      Vector low[F::kN];
      Vector high[F::kN];
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j) row[j] = half[0][i * F::kN + j];
      F::input(row, low);
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j) row[j] = half[1][i * F::kN + j];
      F::input(row, high);
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j, out += frequency_step) {
        __m512 first = as_m512(low[j]);
        __m512 second = as_m512(high[j]);
        SEGPOSE_UNROLL
        for (int t = 0; t < Terms; ++t) _mm512_storeu_si512(out + t * term_step, next_terms<Terms>(first, second));
      }
    }
  }
}

template <class F, int Terms>
void split_filter(const float* w, char* u, int64_t term_step, int64_t frequency_step) {
  constexpr int64_t kTapStep = kTileDepth * kTileColumns;
  // The pairs of split_input: channels that lie 16 apart.
  for (int pair = 0; pair < kTileDepth / 2; ++pair, w += kTileColumns, u += 64) {
    Vector half[2][F::kN * F::kR];
    const float* rows[F::kR];
    for (int i = 0; i < F::kR; ++i) rows[i] = w + i * F::kR * kTapStep;
    filter_columns<F>(rows, kTapStep, 0, kTileColumns, half[0]);
    filter_columns<F>(rows, kTapStep, kTileDepth / 2 * kTileColumns, kTileColumns, half[1]);
    char* out = u;
    SEGPOSE_KEEP_LOOP
    for (int i = 0; i < F::kN; ++i) {
      Vector row[F::kR];
      Vector even[F::kN];
      Vector odd[F::kN];
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kR; ++j) row[j] = half[0][i * F::kR + j];
      F::filter(row, even);
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kR; ++j) row[j] = half[1][i * F::kR + j];
      F::filter(row, odd);
      SEGPOSE_UNROLL
      for (int j = 0; j < F::kN; ++j, out += frequency_step) {
        __m512 first = as_m512(even[j]);
        __m512 second = as_m512(odd[j]);
        SEGPOSE_UNROLL
        for (int t = 0; t < Terms; ++t) _mm512_storeu_si512(out + t * term_step, next_terms<Terms>(first, second));
      }
    }
  }
}

template <class F>
constexpr SplitTransformCodelets split_entry() {
  return {F::kN,
          F::kR,
          F::kN * F::kN,
          {split_input<F, 1>, split_input<F, 2>, split_input<F, 3>},
          {split_filter<F, 1>, split_filter<F, 2>, split_filter<F, 3>}};
}

constexpr SplitTransformCodelets kSplitTransforms[] = {split_entry<F43>(), split_entry<F42>()};

}  // namespace segpose::amx
#pragma GCC pop_options
#endif

namespace segpose {

const SplitTransformCodelets* split_transform(Isa isa, int r) {
#if defined(__x86_64__)
  if (isa == Isa::amx) {
    for (const SplitTransformCodelets& codelets : amx::kSplitTransforms) {
      if (codelets.taps == r) return &codelets;
    }
  }
#endif
  (void)isa;
  (void)r;
  return nullptr;
}

}  // namespace segpose
