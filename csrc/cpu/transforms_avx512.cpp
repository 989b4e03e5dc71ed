// SPDX-License-Identifier: BSD-3-Clause
// Transforms for AVX-512.
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
#pragma GCC target("prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace segpose::avx512 {

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
    {panel_entry<12, 2>(), panel_entry<8, 2>(), panel_entry<4, 2>()},
    {panel_complex_entry<12>(), panel_complex_entry<8>(), panel_complex_entry<4>()},
    reduce_entry<8, 2>(),
    reduce_complex_entry<8>(),
    pool_tile};

}  // namespace segpose::avx512
#pragma GCC pop_options
#endif
