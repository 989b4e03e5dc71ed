// SPDX-License-Identifier: BSD-3-Clause
// Algorithms that measuring has found fastest (segpose_kernels/cpu_tuning.py), by pass and problem; they go before the
// predicted ones. Independent of the number of threads, as results are.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>

#include "plan.h"

namespace segpose {

// A problem's numbers in the order of ConvProblem.
using ProblemNumbers = std::array<int64_t, 16>;

inline ProblemNumbers numbers_of(const ConvProblem& p) {
  return {p.n, p.h,        p.w,        p.c,     p.p,     p.q,          p.k,          p.r,
          p.s, p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, p.groups};
}

struct ChoiceKey {
  ProblemNumbers problem;
  Pass pass;
  DType dtype;
  Precision precision;
  bool prepared;

  auto operator<=>(const ChoiceKey&) const = default;
};

class Choices {
 public:
  static Choices& instance() {
    static Choices choices;
    return choices;
  }

  std::optional<Algorithm> find(const ChoiceKey& key) const {
    if (generation_.load(std::memory_order_acquire) == 0) return std::nullopt;  // as in most processes
    const std::shared_lock lock(mutex_);
    const auto found = chosen_.find(key);
    return found == chosen_.end() ? std::nullopt : std::optional(found->second);
  }

  // Without an algorithm the prediction decides again.
  void choose(const ChoiceKey& key, std::optional<Algorithm> algorithm) {
    const std::unique_lock lock(mutex_);
    if (algorithm.has_value()) {
      chosen_[key] = *algorithm;
    } else {
      chosen_.erase(key);
    }
    generation_.fetch_add(1, std::memory_order_release);
  }

  // Grows with every change.
  int64_t generation() const { return generation_.load(std::memory_order_acquire); }

 private:
  mutable std::shared_mutex mutex_;
  std::map<ChoiceKey, Algorithm> chosen_;
  std::atomic<int64_t> generation_{0};
};

}  // namespace segpose
