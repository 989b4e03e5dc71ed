// SPDX-License-Identifier: BSD-3-Clause
// What the processor offers, probed once, and which instruction set the kernels use.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace segpose {

// In rising order of preference. amx is avx512 with tiles of bfloat16 beside it.
enum class Isa { generic, avx2, avx512, amx };

const char* isa_name(Isa isa);

// Features that decide between kernels, by their usual names.
std::vector<std::pair<std::string, bool>> cpu_features();

// Instruction sets that were compiled in and run on this machine; the last one is the best.
std::vector<Isa> available_isas();

// The best available one, or the one that SEGPOSE_CPU_ISA names (read once). Throws std::runtime_error with the valid
// names when the variable names something else.
Isa selected_isa();

// The instruction set of that name; throws std::runtime_error with the valid names.
Isa parse_isa(const std::string& name);

}  // namespace segpose
