// SPDX-License-Identifier: BSD-3-Clause
// Transforms for AVX2 with FMA.
#include "transforms_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SEGPOSE_VECTOR_BYTES 32

#pragma GCC push_options
#pragma GCC target("prfchw,avx2,fma,f16c")
namespace segpose::avx2 {

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
    {panel_entry<6, 2>(), panel_entry<4, 2>()},
    {panel_complex_entry<6>(), panel_complex_entry<4>()},
    reduce_entry<4, 2>(),
    reduce_complex_entry<4>(),
    pool_tile};

}  // namespace segpose::avx2
#pragma GCC pop_options
#endif
