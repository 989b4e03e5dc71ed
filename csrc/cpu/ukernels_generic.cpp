// SPDX-License-Identifier: BSD-3-Clause
// Microkernels for any processor: 16-byte vectors, which the compiler maps to SSE2, NEON or scalar code; and the choice
// of a table.
#include "ukernels_isa.h"

#define SEGPOSE_VECTOR_BYTES 16

namespace segpose {
namespace generic {

// clang-format off: each text uses those before it
#include "ukernels-inl.h"
#include "staging-inl.h"
#include "depthwise-inl.h"
#include "dots-inl.h"
#include "planar-inl.h"
#include "planar_wgrad-inl.h"
#include "pointers-inl.h"
// clang-format on

template <class T>
constexpr Ukernels<T> table() {
  return {Simd<T>::kLength,
          2,
          {gemm_entry<T, 8, 1>(), gemm_entry<T, 4, 2>()},
          6,
          {wgrad_entry<T, 4, 2>(), wgrad_entry<T, 2, 2>(), wgrad_entry<T, 1, 2>(), wgrad_entry<T, 4, 1>(),
           wgrad_entry<T, 2, 1>(), wgrad_entry<T, 1, 1>()},
          8,
          {rows_entry<T, 4, 2>(), rows_entry<T, 3, 2>(), rows_entry<T, 2, 2>(), rows_entry<T, 1, 2>(),
           rows_entry<T, 8, 1>(), rows_entry<T, 4, 1>(), rows_entry<T, 2, 1>(), rows_entry<T, 1, 1>()},
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
          lines_entry<T, 1, 2>(),
          {planar_wgrad_entry<T, 4, 3>(), planar_wgrad_entry<T, 2, 6>(), planar_wgrad_entry<T, 1, 9>()}};
}

const Ukernels<float> kFloat = table<float>();
const Ukernels<double> kDouble = table<double>();

}  // namespace generic

template <>
const Ukernels<float>& ukernels<float>(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::kFloat;
  if (isa == Isa::avx2) return avx2::kFloat;
#endif
  (void)isa;
  return generic::kFloat;
}

template <>
const Ukernels<double>& ukernels<double>(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::kDouble;
  if (isa == Isa::avx2) return avx2::kDouble;
#endif
  (void)isa;
  return generic::kDouble;
}

}  // namespace segpose
