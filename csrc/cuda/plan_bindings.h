// SPDX-License-Identifier: BSD-3-Clause
// Plans of the CUDA backend in the pybind11 module `_plan`.
#pragma once

#include <pybind11/pybind11.h>

namespace segpose::cuda {

void bind_plans(pybind11::module_& module);

}  // namespace segpose::cuda
