// SPDX-License-Identifier: BSD-3-Clause
#include "launchers.cuh"

namespace segpose::cuda {

const Launchers kLaunchersBF16 = launches::with_mma<__nv_bfloat16>(launches::common<__nv_bfloat16>());

}  // namespace segpose::cuda
