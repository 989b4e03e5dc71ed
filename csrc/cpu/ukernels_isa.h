// SPDX-License-Identifier: BSD-3-Clause
// The tables that the ISA files define. Everything they need is included here, before any `#pragma GCC target`.
#pragma once

#include <cstddef>

#include "ukernels.h"

namespace segpose {

namespace generic {
extern const Ukernels<float> kFloat;
extern const Ukernels<double> kDouble;
}  // namespace generic

#if defined(__x86_64__)
namespace avx2 {
extern const Ukernels<float> kFloat;
extern const Ukernels<double> kDouble;
}  // namespace avx2

namespace avx512 {
extern const Ukernels<float> kFloat;
extern const Ukernels<double> kDouble;
}  // namespace avx512
#endif

}  // namespace segpose
