// SPDX-License-Identifier: BSD-3-Clause
#include "launchers.cuh"

namespace segpose::cuda {

const Launchers kLaunchersF16 = launches::with_mma<__half>(launches::common<__half>());

}  // namespace segpose::cuda
