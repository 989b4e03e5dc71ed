// SPDX-License-Identifier: BSD-3-Clause
// Process-wide settings of the CPU kernels, and the plan of a call under them.
#pragma once

#include <atomic>

#include "torch_views.h"

namespace segpose {

// An algorithm that tests and benchmarks ask for, -1 for none; read once at the start of a pass.
inline std::atomic<int> forced_algorithm{-1};
inline std::atomic<int> chosen_precision{static_cast<int>(Precision::highest)};

inline Plan plan_for(const ConvProblem& problem, Pass pass, const Tensor& weight, bool prepared = false) {
  PlanOptions options{static_cast<Precision>(chosen_precision.load()), std::nullopt, prepared,
                      static_cast<int64_t>(torch::stable::get_num_threads())};
  const int forced = forced_algorithm;
  if (forced >= 0) options.algorithm = static_cast<Algorithm>(forced);
  return plan_conv(problem, pass, to_dtype(weight), selected_isa(), options);
}

// Differs where plans may differ.
inline int64_t settings_key() {
  return (static_cast<int64_t>(torch::stable::get_num_threads()) << 16) | ((forced_algorithm.load() + 1) << 8) |
         chosen_precision.load();
}

}  // namespace segpose
