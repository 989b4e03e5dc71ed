// SPDX-License-Identifier: BSD-3-Clause
// Microkernels for AVX2 with FMA and F16C: 16 registers of 32 bytes.
#include "ukernels_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SEGPOSE_VECTOR_BYTES 32
#define SEGPOSE_HAVE_F16C

#pragma GCC push_options
#pragma GCC target("prfchw,avx2,fma,f16c")
namespace segpose::avx2 {

// The first `count` values, fewer than a vector, in halves of halves. AMD's processors run a vmaskmovps store as 40
// instructions: with it half the time of 6 x 2 tiles of 10 columns and 16 to 64 steps was their stores (Zen 3). The
// pieces come from registers: through an array, GCC 12 keeps the accumulators of the tile in memory.
__attribute__((always_inline)) inline void partial_store(float* destination, __m256 value, int64_t count) {
  __m128 rest = _mm256_castps256_ps128(value);
  if (count & 4) {
    _mm_storeu_ps(destination, rest);
    rest = _mm256_extractf128_ps(value, 1);
    destination += 4;
  }
  if (count & 2) {
    _mm_storel_epi64(reinterpret_cast<__m128i_u*>(destination), _mm_castps_si128(rest));
    rest = _mm_movehl_ps(rest, rest);
    destination += 2;
  }
  if (count & 1) _mm_store_ss(destination, rest);
}
__attribute__((always_inline)) inline void partial_store(double* destination, __m256d value, int64_t count) {
  __m128d rest = _mm256_castpd256_pd128(value);
  if (count & 2) {
    _mm_storeu_pd(destination, rest);
    rest = _mm256_extractf128_pd(value, 1);
    destination += 2;
  }
  if (count & 1) _mm_store_sd(destination, rest);
}
__attribute__((always_inline)) inline __m256 masked_load(const float* source, int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(source, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes));
}
__attribute__((always_inline)) inline __m256d masked_load(const double* source, int64_t count) {
  const __m256i lanes = _mm256_setr_epi64x(0, 1, 2, 3);
  return _mm256_maskload_pd(source, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lanes));
}
__attribute__((always_inline)) inline void streaming_store(float* destination, __m256 value) {
  _mm256_stream_ps(destination, value);
}
__attribute__((always_inline)) inline void streaming_store(double* destination, __m256d value) {
  _mm256_stream_pd(destination, value);
}
#define SEGPOSE_STREAM streaming_store
#define SEGPOSE_PARTIAL_STORE partial_store
#define SEGPOSE_MASKED_LOAD masked_load

// clang-format off: each text uses those before it
#include "ukernels-inl.h"
#include "staging-inl.h"
#include "depthwise-inl.h"
#include "dots-inl.h"
#include "planar-inl.h"
#include "planar_wgrad-inl.h"
#include "pointers-inl.h"
// clang-format on

// 12 accumulators, 2 vectors of B and one broadcast use 15 of the 16 registers.
template <class T>
constexpr Ukernels<T> table() {
  return {Simd<T>::kLength,
          2,
          {gemm_entry<T, 12, 1>(), gemm_entry<T, 6, 2>()},
          8,
          {wgrad_entry<T, 6, 2>(), wgrad_entry<T, 4, 2>(), wgrad_entry<T, 2, 2>(), wgrad_entry<T, 1, 2>(),
           wgrad_entry<T, 8, 1>(), wgrad_entry<T, 4, 1>(), wgrad_entry<T, 2, 1>(), wgrad_entry<T, 1, 1>()},
          10,
          {rows_entry<T, 6, 2>(), rows_entry<T, 5, 2>(), rows_entry<T, 4, 2>(), rows_entry<T, 2, 2>(),
           rows_entry<T, 1, 2>(), rows_entry<T, 13, 1>(), rows_entry<T, 7, 1>(), rows_entry<T, 4, 1>(),
           rows_entry<T, 2, 1>(), rows_entry<T, 1, 1>()},
          depthwise_row<T>,
          {depthwise_block_entry<T, 8>(), depthwise_block_entry<T, 7>(), depthwise_block_entry<T, 4>()},
          depthwise_wgrad_run<T>,
          load_row<T>,
          store_row<T>,
          mask_line<T>,
          transpose<T>,
          point_rows<T>,
          dots_tiles<T>(),
          {planar_entry<T, kPlanarChannels, 3>(), planar_entry<T, 1, 8>(), planar_entry<T, 1, 7>()},
          lines_entry<T, 1, 4>(),
          {planar_wgrad_entry<T, 4, 3>(), planar_wgrad_entry<T, 2, 6>(), planar_wgrad_entry<T, 1, 9>()}};
}

const Ukernels<float> kFloat = table<float>();
const Ukernels<double> kDouble = table<double>();

}  // namespace segpose::avx2
#pragma GCC pop_options
#endif
