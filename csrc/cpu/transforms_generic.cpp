// SPDX-License-Identifier: BSD-3-Clause
// Transforms for any processor: 16-byte vectors; and the choice of a table.
#include "transforms_isa.h"

#define SEGPOSE_VECTOR_BYTES 16

namespace segpose::generic {

// clang-format off: each text uses those before it
#include "ukernels-inl.h"
#include "transform-inl.h"
#include "winograd-inl.h"
#include "fourier-inl.h"
// clang-format on

const TransformUkernels kTransforms = {
    Simd<float>::kLength,
    8,
    {winograd_entry<F43>(), winograd_entry<F42>(), winograd_entry<F34>(), winograd_entry<F24>(), fourier_entry<14>(),
     fourier_entry<16>(), fourier_entry<18>(), fourier_entry<20>()},
    2,
    {panel_entry<4, 2>()},
    {panel_complex_entry<4>()},
    reduce_entry<4, 2>(),
    reduce_complex_entry<4>(),
    pool_tile};

}  // namespace segpose::generic

namespace segpose {

const TransformUkernels& transform_ukernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::kTransforms;
  if (isa == Isa::avx2) return avx2::kTransforms;
#endif
  (void)isa;
  return generic::kTransforms;
}

}  // namespace segpose
