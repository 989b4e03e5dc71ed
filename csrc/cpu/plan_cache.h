// SPDX-License-Identifier: BSD-3-Clause
// Plans that were made before, by everything that they depend on.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "choices.h"

namespace segpose {

struct PlanKey {
  ChoiceKey problem;
  int64_t threads;
  int forced;          // the algorithm that was asked for, or -1
  int64_t generation;  // of the measured choices

  auto operator<=>(const PlanKey&) const = default;
};

class PlanCache {
 public:
  static PlanCache& instance() {
    static PlanCache cache;
    return cache;
  }

  template <class Make>
  std::shared_ptr<const Plan> find(const PlanKey& key, const Make& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return found->second;
    }
    auto plan = std::make_shared<const Plan>(make());
    const std::lock_guard<std::mutex> lock(mutex_);
    // Inputs of ever new shapes: those seen again are made again.
    if (plans_.size() >= kMostPlans) plans_.clear();
    plans_[key] = plan;
    return plan;
  }

 private:
  static constexpr size_t kMostPlans = 1024;

  std::mutex mutex_;
  std::map<PlanKey, std::shared_ptr<const Plan>> plans_;
};

}  // namespace segpose
