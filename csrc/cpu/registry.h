// SPDX-License-Identifier: BSD-3-Clause
// Objects that Python holds by number.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

namespace segpose {

// Safe with several threads; what runs in one of them keeps its object until it is done.
template <class T>
class Registry {
 public:
  // Never destroyed: tensors must not be freed after torch's own statics.
  static Registry& instance() {
    static auto* registry = new Registry;
    return *registry;
  }

  int64_t add(std::shared_ptr<const T> object) {
    const std::unique_lock lock(mutex_);
    objects_.emplace(++last_, std::move(object));
    return last_;
  }

  std::shared_ptr<const T> get(int64_t handle) const {
    const std::shared_lock lock(mutex_);
    const auto found = objects_.find(handle);
    STD_TORCH_CHECK(found != objects_.end(), "segpose: no ", T::kName, " has the handle ", handle);
    return found->second;
  }

  void remove(int64_t handle) {
    std::shared_ptr<const T> object;  // destroyed without the lock
    const std::unique_lock lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) return;
    object = std::move(found->second);
    objects_.erase(found);
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const T>> objects_;
  int64_t last_ = 0;
};

}  // namespace segpose
