// SPDX-License-Identifier: BSD-3-Clause
#include "launchers.cuh"

namespace segpose::cuda {

const Launchers kLaunchersF64 =
    launches::with_fma<double, kFmaTileF64.block_m, kFmaTileF64.block_n>(launches::common<double>());

}  // namespace segpose::cuda
