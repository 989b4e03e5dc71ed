// SPDX-License-Identifier: BSD-3-Clause
// Process-wide settings of the CPU kernels, and the plan of a call under them.
#pragma once

#include <array>
#include <atomic>
#include <string>

#include "choices.h"
#include "plan_cache.h"
#include "torch_views.h"

namespace segpose {

// An algorithm that tests and benchmarks ask for, -1 for none; read once at the start of a pass.
inline std::atomic<int> forced_algorithm{-1};
// A precision that the user chose for every pass, -1 where torch's switches decide.
inline std::atomic<int> chosen_precision{-1};

// torch's switches for float32, through an operator that Python implements; where there is no Python, torch's default.
// Without AMX they make no difference, and Python's lock is not taken.
inline Precision torch_precision() {
  static std::atomic<bool> implemented{true};
  if (selected_isa() < Isa::amx || !implemented.load(std::memory_order_relaxed)) return Precision::highest;
  std::array<StableIValue, 1> stack{};
  if (torch_call_dispatcher("segpose::cpu_float32_precision", "", stack.data(), TORCH_ABI_VERSION) !=
      AOTI_TORCH_SUCCESS) {
    implemented.store(false, std::memory_order_relaxed);
    return Precision::highest;
  }
  return parse_precision(torch::stable::detail::to<std::string>(stack[0]));
}

// Of the passes of a call.
inline Precision current_precision(double flops, const Tensor& weight) {
  // Smaller problems are faster than asking.
  constexpr double kAskFlops = 20e6;
  const int chosen = chosen_precision;
  if (chosen >= 0) return static_cast<Precision>(chosen);
  if (to_dtype(weight) != DType::float32 || flops < kAskFlops) return Precision::highest;
  return torch_precision();
}

// The plan of a pass. Making one takes 2 to 20 us, and training asks for the same ones in every step.
inline std::shared_ptr<const Plan> plan_for(const ConvProblem& problem, Pass pass, const Tensor& weight,
                                            Precision precision, bool prepared = false) {
  Choices& choices = Choices::instance();
  const ChoiceKey problem_key{numbers_of(problem), pass, to_dtype(weight), precision, prepared};
  const PlanKey key{problem_key, static_cast<int64_t>(torch::stable::get_num_threads()), forced_algorithm.load(),
                    choices.generation()};
  return PlanCache::instance().find(key, [&] {
    PlanOptions options{precision, std::nullopt, prepared, key.threads};
    options.algorithm = key.forced >= 0 ? std::optional(static_cast<Algorithm>(key.forced)) : choices.find(problem_key);
    return plan_conv(problem, pass, problem_key.dtype, selected_isa(), options);
  });
}

// Differs where plans may differ, but for torch's switches.
inline int64_t settings_key() {
  return (Choices::instance().generation() << 32) | (static_cast<int64_t>(torch::stable::get_num_threads()) << 16) |
         ((forced_algorithm.load() + 1) << 8) | (chosen_precision.load() + 1);
}

}  // namespace segpose
