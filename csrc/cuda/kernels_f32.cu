// SPDX-License-Identifier: BSD-3-Clause
#include "launchers.cuh"

namespace segpose::cuda {

const Launchers kLaunchersF32 = launches::with_fma<float, kFmaTileF32.block_m, kFmaTileF32.block_n>(
    launches::with_mma<float>(launches::common<float>()));

}  // namespace segpose::cuda
