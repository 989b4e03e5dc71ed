// SPDX-License-Identifier: BSD-3-Clause
// Microkernels for AVX-512 (F, BW, DQ, VL): 32 registers of 64 bytes.
#include "ukernels_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(SEGPOSE_EMULATE)
#include "emulated.h"
#endif

#define SEGPOSE_VECTOR_BYTES 64
#define SEGPOSE_HAVE_F16C

#pragma GCC push_options
#if defined(SEGPOSE_EMULATE)
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace segpose::avx512 {

inline void partial_store(float* destination, __m512 value, int64_t count) {
  _mm512_mask_storeu_ps(destination, static_cast<__mmask16>((1u << count) - 1), value);
}
inline void partial_store(double* destination, __m512d value, int64_t count) {
  _mm512_mask_storeu_pd(destination, static_cast<__mmask8>((1u << count) - 1), value);
}
inline __m512 masked_load(const float* source, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), source);
}
inline __m512d masked_load(const double* source, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), source);
}
__attribute__((always_inline)) inline void streaming_store(float* destination, __m512 value) {
  _mm512_stream_ps(destination, value);
}
__attribute__((always_inline)) inline void streaming_store(double* destination, __m512d value) {
  _mm512_stream_pd(destination, value);
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

// 24 accumulators with 4 vectors of B leave room for the broadcast; twelve row pointers still fit the integer
// registers.
template <class T>
constexpr Ukernels<T> table() {
  return {Simd<T>::kLength,
          3,
          {gemm_entry<T, 12, 1>(), gemm_entry<T, 12, 2>(), gemm_entry<T, 6, 4>()},
          16,
          {wgrad_entry<T, 6, 4>(), wgrad_entry<T, 4, 4>(), wgrad_entry<T, 2, 4>(), wgrad_entry<T, 1, 4>(),
           wgrad_entry<T, 8, 3>(), wgrad_entry<T, 4, 3>(), wgrad_entry<T, 2, 3>(), wgrad_entry<T, 1, 3>(),
           wgrad_entry<T, 8, 2>(), wgrad_entry<T, 4, 2>(), wgrad_entry<T, 2, 2>(), wgrad_entry<T, 1, 2>(),
           wgrad_entry<T, 8, 1>(), wgrad_entry<T, 4, 1>(), wgrad_entry<T, 2, 1>(), wgrad_entry<T, 1, 1>()},
          10,
          {rows_entry<T, 14, 2>(), rows_entry<T, 7, 2>(), rows_entry<T, 4, 2>(), rows_entry<T, 2, 2>(),
           rows_entry<T, 1, 2>(), rows_entry<T, 14, 1>(), rows_entry<T, 7, 1>(), rows_entry<T, 4, 1>(),
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
          {planar_entry<T, kPlanarChannels, 6>(), planar_entry<T, 1, 8>(), planar_entry<T, 1, 7>()},
          lines_entry<T, 1, 8>(),
          {planar_wgrad_entry<T, 4, 6>(), planar_wgrad_entry<T, 2, 6>(), planar_wgrad_entry<T, 1, 9>()}};
}

const Ukernels<float> kFloat = table<float>();
const Ukernels<double> kDouble = table<double>();

}  // namespace segpose::avx512
#pragma GCC pop_options
#endif
