// SPDX-License-Identifier: BSD-3-Clause
// The tables that the transforms_<isa>.cpp define. Everything they need is included here, before any
// `#pragma GCC target`.
#pragma once

#include "transform_ukernels.h"
#include "ukernels.h"

namespace segpose {

namespace generic {
extern const TransformUkernels kTransforms;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TransformUkernels kTransforms;
}
namespace avx512 {
extern const TransformUkernels kTransforms;
}
#endif

}  // namespace segpose
